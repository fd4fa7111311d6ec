"""Step times of vLLM's engine."""
