"""Floor 1: how long work and transfers take. NumPy only, no clock, no I/O."""
