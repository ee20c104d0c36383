"""`python -m benchmarks.serving`: whole models of 8B and 70B shape in vLLM, by vLLM's own benchmarks."""
