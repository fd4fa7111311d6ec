"""How long a step lasts: physics, measured grids, layer tables, padded batches."""
