"""`poise bench balance`: the balance planner's time and quality, beside the paper's greedy search and what cannot be beaten."""
