"""How the shipped data is made."""
