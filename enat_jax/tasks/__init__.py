"""What differs between training the tokenizer and training the transformer."""
