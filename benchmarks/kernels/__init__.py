"""`python -m benchmarks.kernels`: the CUDA kernels beside those of others on one GPU."""
