"""One scenario simulated, and its result."""
