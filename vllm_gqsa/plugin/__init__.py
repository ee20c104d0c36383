"""vLLM's side: the quantization config, the linear method and the loading of weights under tensor parallelism."""
