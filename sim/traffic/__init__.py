"""Requests: their arrivals, lengths and contents."""
