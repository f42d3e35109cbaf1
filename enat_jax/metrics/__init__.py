"""Feature vectors to numbers: moments, Frechet distance, manifolds, Inception score, bootstrap."""
