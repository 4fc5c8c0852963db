"""Attacks without training: replace the weights that seem to be encrypted.

Each attack is a pure function of the protected parameters and of a mask of the suspected weights:
the true mask, a guess (see `selcrypt_jax.audit.detect`), or everything.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._tree.names import named_key, named_leaves
from .._tree.rings import split_rings


def zero_fill(params: PyTree, suspected: PyTree) -> PyTree:
    """Prunes suspected weights: replaces them with zero.

    Args:
        params: protected parameters; not modified.
        suspected: a mask that fits them, such as one from `nested_masks`.

    Returns:
        A tree of the same structure. Leaves without suspected weights are passed through.

    Raises:
        ValueError, TypeError: the mask does not fit, see `encrypt`.

    Examples:
        >>> pruned = zero_fill(protected, masks[-1])
    """
    return _replace(params, suspected, lambda name, leaf, mask: jnp.zeros_like(leaf))


def mean_fill(params: PyTree, suspected: PyTree) -> PyTree:
    """Replaces suspected weights with the mean of the leaf's others. Arguments as in `zero_fill`.

    Examples:
        >>> filled = mean_fill(protected, masks[-1])
    """

    def value(name: str, leaf: Array, mask: np.ndarray) -> Array:
        others = ~np.broadcast_to(mask, leaf.shape)
        mean = leaf.astype(jnp.float32).mean(where=others) if others.any() else jnp.float32(0)
        return jnp.broadcast_to(mean.astype(leaf.dtype), leaf.shape)

    return _replace(params, suspected, value)


def resample(params: PyTree, suspected: PyTree, *, key: PRNGKeyArray) -> PyTree:
    """Replaces suspected weights with others of the leaf, drawn with replacement.

    Args:
        params: see `zero_fill`.
        suspected: see `zero_fill`. If a leaf has no other weights, it becomes zero.
        key: a typed key; each leaf's key is derived from it and the leaf's name.

    Examples:
        >>> filled = resample(protected, masks[-1], key=jax.random.key(0))
    """

    def value(name: str, leaf: Array, mask: np.ndarray) -> Array:
        others = np.flatnonzero(~np.broadcast_to(mask, leaf.shape))
        if not others.size:
            return jnp.zeros_like(leaf)
        which = jax.random.randint(named_key(key, name), leaf.shape, 0, others.size)
        return leaf.reshape(-1)[jnp.asarray(others)[which]]

    return _replace(params, suspected, value)


def clip_norm(params: PyTree, suspected: PyTree, *, quantile: float = 0.5) -> PyTree:
    """Scales suspected groups down to a quantile of the norms of the leaf's other groups.

    Args:
        params: see `zero_fill`.
        suspected: see `zero_fill`; axes on which it has size 1 lie inside the group.
        quantile: the quantile, in [0, 1].

    Examples:
        >>> clipped = clip_norm(protected, masks[-1], quantile=0.25)
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile: expected a number in [0, 1], got {quantile}.")

    def value(name: str, leaf: Array, mask: np.ndarray) -> Array:
        axes = tuple(a for a, size in enumerate(mask.shape) if size == 1 != leaf.shape[a])
        wide = leaf.astype(jnp.float32)
        norms = jnp.sqrt(jnp.square(wide).sum(axes, keepdims=True))
        if mask.all():
            return leaf
        limit = jnp.quantile(norms[jnp.asarray(~mask)], float(quantile))
        scale = jnp.where(norms > limit, limit / jnp.where(norms > 0, norms, 1), 1)
        return (wide * scale).astype(leaf.dtype)

    return _replace(params, suspected, value)


def _replace(
    params: PyTree, suspected: PyTree, value: Callable[[str, Array, np.ndarray], Array]
) -> PyTree:
    tree = named_leaves(params)
    new = dict(tree.leaves)
    for ring in split_rings(tree, (suspected,)):
        leaf = jnp.asarray(tree.leaves[ring.name])
        new[ring.name] = jnp.where(ring.mask, value(ring.name, leaf, ring.mask), leaf)
    return tree.rebuild(new)
