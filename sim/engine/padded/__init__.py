"""Engines that pad a batch: static, contiguous and paged batching."""
