"""Sets of images to cards of measures, and the paper's analyses."""
