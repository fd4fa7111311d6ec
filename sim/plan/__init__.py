"""The largest request rate that meets the SLOs, and what follows from it."""
