"""Models, GPUs and what a step costs on them."""
