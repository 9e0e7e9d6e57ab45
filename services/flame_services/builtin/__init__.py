"""Applications that every cluster has from its first start."""
