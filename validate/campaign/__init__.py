"""A series of measurements on a rented machine."""
