"""vLLM's engine: scheduler, paged KV cache and steps, without time."""
