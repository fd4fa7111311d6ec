"""The commands: each asks one question and prints its answer."""
