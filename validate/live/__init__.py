"""A live server, predicted before it is driven."""
