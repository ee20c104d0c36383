"""`make bench-cpu`: kernels, vLLM and llama.cpp on one thread of this machine."""
