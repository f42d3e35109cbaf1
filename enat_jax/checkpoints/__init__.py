"""States, weights, formats of weights and the Hugging Face Hub; knows no network."""
