"""A trained model at work: the sampler, the generator, the tokenizer, and pictures of them."""
