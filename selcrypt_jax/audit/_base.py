"""Attacks with a public base: the network that this one was fine-tuned from.

Fine-tuning changes a weight little, so the base has nearly the same weight in the same position. If
a cipher permutes weights, the k-th smallest belongs where the base has its k-th smallest.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._ciphers.lossless import LosslessCipher
from .._tree.dtypes import DTYPES
from .._tree.names import named_leaves
from .._tree.rings import split_rings

_Value = Callable[[np.ndarray, np.ndarray], np.ndarray]


def fill_from_base(params: PyTree, base: PyTree, suspected: PyTree) -> PyTree:
    """Replaces weights that seem to be encrypted with those of the base.

    Args:
        params: protected parameters; not modified.
        base: a tree with the same paths and shapes.
        suspected: a mask of these weights, see `nested_masks`.

    Returns:
        A tree of the same structure.
    """
    return _replaced(params, base, suspected, lambda seen, known: known)


def rank_by_base(params: PyTree, base: PyTree, suspected: PyTree, cipher: LosslessCipher) -> PyTree:
    """Sorts encrypted weights into the base's order, and makes each as close to it as possible.

    A permuting cipher keeps the weights up to their fine bits, so they are sorted, leaf by leaf;
    otherwise they are already in place. Then each weight is set as close to the base's weight as
    its coarse bits allow.

    Args:
        params: protected parameters; not modified.
        base: a tree with the same paths and shapes.
        suspected: a mask of the encrypted weights.
        cipher: the file's cipher.

    Returns:
        A tree of the same structure; leaves that are not floats are passed through.
    """

    def value(seen: np.ndarray, known: np.ndarray) -> np.ndarray:
        if cipher.permute:
            ordered = np.empty_like(seen)
            ordered[np.argsort(known.astype(np.float32))] = seen[
                np.argsort(seen.astype(np.float32))
            ]
            seen = ordered
        return _within_coarse_bits(seen, known, cipher)

    return _replaced(params, base, suspected, value)


def _within_coarse_bits(seen: np.ndarray, known: np.ndarray, cipher: LosslessCipher) -> np.ndarray:
    """The number closest to each known one, among those whose ciphertext could be the one seen."""
    dtype = DTYPES[seen.dtype.name]
    word = np.dtype(f"u{seen.dtype.itemsize}").type
    fine, sign = cipher.fine_mask(dtype), 1 << (dtype.bits - 1)
    bits = seen.view(word) & word(~sign & (2 * sign - 1))
    low = (bits & word(~fine & (2 * sign - 1))).view(seen.dtype).astype(np.float32)
    high = (bits | word(fine & ~sign)).view(seen.dtype).astype(np.float32)
    sizes = np.clip(np.abs(known.astype(np.float32)), low, high)
    signs = np.signbit(known if fine & sign else seen)
    # If the known number has the other sign, the smallest one is the closest.
    sizes = np.where(signs == np.signbit(known), sizes, low)
    return np.where(signs, -sizes, sizes).astype(seen.dtype)


def _replaced(params: PyTree, base: PyTree, suspected: PyTree, value: _Value) -> PyTree:
    tree, known = named_leaves(params), named_leaves(base).leaves
    new = dict(tree.leaves)
    for ring in split_rings(tree, (suspected,)):
        leaf = np.array(jax.device_get(tree.leaves[ring.name]))
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        where = np.broadcast_to(ring.mask, leaf.shape)
        other = np.asarray(jax.device_get(known[ring.name])).astype(leaf.dtype)
        leaf[where] = value(leaf[where], other[where])
        new[ring.name] = jnp.asarray(leaf)
    return tree.rebuild(new)


def check_base(params: PyTree, base: Any, what: str) -> None:
    """Refuses a base that does not fit or is broken, with which attacks would simply fail.

    Raises:
        ValueError: the shapes differ, or weights are not finite.
    """
    check_like(
        named_leaves(params).arrays,
        base,
        f"{what}: base",
        "Give the network that this one was fine-tuned from.",
    )


def check_like(
    params: Mapping[str, Any], other: Any, what: str, remedy: str, *, more: bool = False
) -> None:
    """Refuses parameters of another network.

    Args:
        params: name → array, the expected leaves.
        other: the tree to check.
        what: its name, for messages.
        remedy: the remedy, for messages.
        more: whether extra leaves are allowed.

    Raises:
        ValueError: names or shapes differ, or weights are not finite.
    """
    arrays = named_leaves(other).arrays
    expected, actual = (
        {n: np.shape(leaf) for n, leaf in each.items()} for each in (params, arrays)
    )
    for name in sorted(expected.keys() if more else expected.keys() | actual.keys()):
        if name not in expected:
            raise ValueError(
                f"{what}: expected only the leaves of params, got {name!r} of shape "
                f"{actual[name]}. {remedy}"
            )
        if expected[name] != actual.get(name):
            found = actual.get(name, "no such leaf")
            raise ValueError(
                f"{what}: {name!r}: expected shape {expected[name]} as in params, got {found}. "
                f"{remedy}"
            )
        known = np.asarray(arrays[name])
        if (
            jnp.issubdtype(known.dtype, jnp.floating)
            and not np.isfinite(known.astype(np.float32)).all()
        ):
            raise ValueError(
                f"{what}: {name!r}: expected finite weights, got NaN or infinity. Give a network "
                "that works."
            )
