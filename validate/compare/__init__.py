"""Measured runs beside predicted ones, and the verdict."""
