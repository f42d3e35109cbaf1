"""Host arithmetic of token counts: the reveal order, shape buckets of training, costs."""
