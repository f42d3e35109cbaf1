"""The public face of ``enat_jax.inference.generator``; exported models' cards name this module."""

from enat_jax.inference.generator import Generator as Generator
