"""Floor 5: what this machine can do, measured with the readers and kernels that the engine runs."""
