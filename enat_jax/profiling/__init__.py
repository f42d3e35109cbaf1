"""What ``python -m enat_jax.benchmark`` measures and reports."""
