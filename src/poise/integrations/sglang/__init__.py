"""SGLang: its expert distribution recorder is read, `--init-expert-location` is written."""
