"""Validation: judge predictions and the engine model against the real vLLM."""
