"""A leaf of any pytree by its path, seen as ``[groups, weights in a group]``."""
