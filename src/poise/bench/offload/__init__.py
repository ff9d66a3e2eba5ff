"""The offload benchmarks: one reference model, limits set by the kernel, contenders in processes of their own."""
