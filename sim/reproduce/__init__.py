"""Predictions beside a reported benchmark, cell by cell."""
