"""Flax linen networks: the spatial-temporal transformer, its baselines and the VQ tokenizer."""
