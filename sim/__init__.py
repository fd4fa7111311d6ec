"""The simulator: pure Python, no torch, no vllm, no wall clock, no global random state."""
