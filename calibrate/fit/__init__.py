"""From measurements or reports to a profile."""
