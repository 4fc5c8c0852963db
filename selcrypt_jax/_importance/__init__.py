"""Importance of groups of weights: closed forms, and learned gates."""
