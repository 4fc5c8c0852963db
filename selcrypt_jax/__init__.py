"""Selective encryption of neural network weights with nested permission levels."""

__version__ = "0.1.0"
