"""Measure the machine at hand: ``python -m measure ...``, on the standard library, torch and vllm alone."""
