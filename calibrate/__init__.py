"""Calibration: measure a machine, fit a profile."""
