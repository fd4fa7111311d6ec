"""Forecast LLM serving: a discrete-event simulator of vLLM, calibrated on real GPUs."""
