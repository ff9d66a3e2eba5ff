"""TensorRT-LLM: its expert statistics are read, its load balancer's configuration is written."""
