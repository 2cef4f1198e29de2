"""Benchmarks: synthetic checkpoints, workloads and measurements behind ``tpctl bench``. No torch."""
