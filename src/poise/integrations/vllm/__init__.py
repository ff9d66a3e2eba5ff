"""vLLM: a plug-in whose policy takes the place of the default one under `--enable-eplb`."""
