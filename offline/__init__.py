"""Makes GQSA checkpoints from dense Hugging Face models; installed as ``vllm_gqsa.offline``. Needs no vLLM."""
