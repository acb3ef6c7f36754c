"""What vLLM sees: all that imports vllm."""
