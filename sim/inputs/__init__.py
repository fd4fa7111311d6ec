"""Errors, units and files: what every room stands on."""
