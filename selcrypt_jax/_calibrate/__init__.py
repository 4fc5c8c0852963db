"""Finds levels of a given quality by search."""
