"""The expert-parallel benchmarks: real ranks in a cluster in a box, one processor shared by quotas that the kernel enforces."""
