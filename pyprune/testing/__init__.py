"""For tests and benchmarks: random checkpoints of any size."""
