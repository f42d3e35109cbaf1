"""Image sources, token sets and the Grain pipeline."""
