"""Our scheduler beside vLLM's own, step by step."""
