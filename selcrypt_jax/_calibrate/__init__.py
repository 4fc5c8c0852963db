"""Levels of a given quality, found by search."""
