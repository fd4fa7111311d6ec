"""Scenarios, results and routers side by side."""
