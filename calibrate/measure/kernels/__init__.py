"""Times of single kernels."""
