"""`poise bench place`: the placement planner against token balancers, at the same redundancy."""
