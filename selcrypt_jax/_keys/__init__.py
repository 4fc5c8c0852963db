"""Secrets, level keys, signatures; ChaCha20 for ``jax.random``."""
