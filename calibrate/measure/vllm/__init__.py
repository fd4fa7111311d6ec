"""A vLLM server: starting, driving and recording it."""
