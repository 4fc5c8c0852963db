"""Encryption and decryption of rings in place, and the engines that do it."""
