"""Secrets, level keys, signing keys, grants, and their files; ChaCha20 for ``jax.random``."""
