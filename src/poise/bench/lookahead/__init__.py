"""`poise bench lookahead`: what the lookahead predictor names right, how it learns, and what that is worth to the engine."""
