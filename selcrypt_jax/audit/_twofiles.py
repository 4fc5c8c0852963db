"""What two protected files tell without a key.

The same network protected twice, two networks of one owner, or a network and its fine-tuned
successor. With a new model id for each protection no keystream and no order is used twice; what
two files then still tell is where they differ, and what one leaves plain that the other encrypts.
"""

import math
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._ciphers.cipher import Cipher
from .._ciphers.lossless import LosslessCipher
from .._tree.names import NamedLeaves, is_array, named_leaves
from .._tree.rings import checked_mask, split_rings
from ._chosen import ALARM, bits_of, skipped
from ._records import CipherCheck


class Changed(NamedTuple):
    """See `changed`."""

    mask: PyTree
    found: float
    precision: float


def merge(protected_a: PyTree, protected_b: PyTree, mask_a: PyTree, mask_b: PyTree) -> PyTree:
    """Takes from b what is encrypted in a and plain in b.

    Of the same network, protected twice with two selections, that is the original.

    Args:
        protected_a: parameters of one file; not changed.
        protected_b: of the other: the same paths, shapes and dtypes.
        mask_a: what is encrypted in a, all levels together.
        mask_b: what is encrypted in b.

    Returns:
        A tree with the structure of a. Leaves of which nothing is taken are passed through.

    Raises:
        ValueError, TypeError: files or masks that do not fit each other.

    Examples:
        >>> found = merge(protected, protected_again, masks[-1], masks[0])
    """
    tree, other = _both(protected_a, protected_b)
    theirs = checked_mask(tree, mask_b, "mask_b")
    new = {}
    for ring in split_rings(tree, (mask_a,)):
        taken = ring.mask & ~theirs[ring.name]
        if taken.any():
            new[ring.name] = jnp.where(taken, other[ring.name], tree.leaves[ring.name])
    return tree.rebuild(new)


def shared_keystream(
    a: PyTree, b: PyTree, mask: PyTree, *, cipher: Cipher | None = None
) -> CipherCheck:
    """Whether two files are masked with the same keystream, as under one model id.

    The XOR of two ciphertexts is then the XOR of the weights. Where those are alike (a successor
    after little training, a scale that is 1 in both, bfloat16 kept as float32), it is far from
    random: every masked bit is looked at on its own, over all leaves. Of two networks that have
    nothing in common the masked bits are random themselves; a keystream used twice then neither
    shows nor tells anything, until one of the networks becomes known.

    Args:
        a: protected parameters.
        b: protected parameters of another file: the same paths, shapes and dtypes.
        mask: what is encrypted in both, all levels together.
        cipher: as in `encrypt`; it tells which bits are masked. Of one that does not say so, those
            that `LosslessCipher` would mask.

    Returns:
        A check whose `found` is the share of set bits, of the XOR of the files, in the bit that
        is furthest from chance. It has passed if that is so near to 0.5 as 1 - 1e-8 of all
        unrelated keystreams are (Hoeffding's inequality), or, with NaN, if no bit is masked.

    Raises:
        ValueError, TypeError: files or a mask that do not fit each other.

    Examples:
        >>> assert shared_keystream(protected, protected_again, masks[0]).passed
    """
    fine_mask = getattr(cipher, "fine_mask", LosslessCipher().fine_mask)
    name = "two files: another keystream in each"
    tree, other = _both(a, b)
    # By the place of the bit below the highest masked one, which is what dtypes have in common.
    ones, total = Counter[int](), Counter[int]()
    for ring in split_rings(tree, (mask,)):
        leaf = tree.leaves[ring.name]
        fine = fine_mask(leaf.dtype)
        chosen = np.broadcast_to(ring.mask, leaf.shape)
        words = (_bits(leaf) ^ _bits(other[ring.name]))[chosen]
        for bit in range(fine.bit_length()):
            if fine >> bit & 1:
                place = fine.bit_length() - bit
                ones[place] += int((words >> words.dtype.type(bit) & 1).sum())
                total[place] += words.size
    if not total:
        return skipped(name, "no bit is masked")

    def deviation(place: int) -> float:
        return abs(2 * ones[place] - total[place]) / math.sqrt(total[place])

    limit = math.sqrt(2 * math.log(2 * len(total) / ALARM))
    worst = max(total, key=deviation)
    text = f"0.5 of the bits differ, within {limit:.1f} standard deviations, for each masked bit"
    return CipherCheck(name, deviation(worst) <= limit, ones[worst] / total[worst], text)


def changed(a: PyTree, b: PyTree, truth: PyTree | None = None) -> Changed:
    """Where two files differ.

    The same network protected twice differs where it is encrypted: that is no secret from
    an attacker who has both. A successor differs wherever it was trained.

    Args:
        a: protected parameters.
        b: of the other file: the same paths, shapes and dtypes.
        truth: what is encrypted, all levels together, to judge the attacker by; one that fits.

    Returns:
        A named tuple of ``mask``, a pytree of booleans, one a weight, which the attacker takes for
        encrypted, ``False`` for leaves that are no arrays; ``found``, the share of the weights of
        the true mask that are in it, NaN without one; and ``precision``, the share of it that the
        true mask selects, NaN without one, or if nothing differs.

    Raises:
        ValueError, TypeError: files or a mask that do not fit each other.

    Examples:
        >>> found = changed(protected, protected_again, masks[-1])
        >>> assert found.precision == 1
    """
    tree, other = _both(a, b)
    differs = {name: _bits(tree.leaves[name]) != _bits(leaf) for name, leaf in other.items()}
    mask = tree.rebuild_only(differs)
    if truth is None:
        return Changed(mask, math.nan, math.nan)
    right = checked_mask(tree, truth, "truth")
    both = sum(int((differs[name] & right[name]).sum()) for name in differs)
    seen = sum(int(leaf.sum()) for leaf in differs.values())
    true = sum(int(np.broadcast_to(right[n], leaf.shape).sum()) for n, leaf in differs.items())
    if not true:
        raise ValueError("truth: expected to select some weights, got a mask that selects none.")
    return Changed(mask, both / true, both / seen if seen else math.nan)


def _both(a: PyTree, b: PyTree) -> tuple[NamedLeaves, dict[str, np.ndarray]]:
    """The leaves of a, and the arrays of numbers of b, once they are sure to fit."""
    tree, other = named_leaves(a, "a"), named_leaves(b, "b").leaves
    if set(tree.leaves) != set(other):
        odd = sorted(set(tree.leaves) ^ set(other))
        raise ValueError(
            f"two files: expected the same paths in both, got {odd} in one only. Compare files "
            "of one architecture."
        )
    arrays = {}
    for name, leaf in tree.leaves.items():
        if not is_array(leaf):
            continue
        found = other[name]
        kind = (found.shape, found.dtype) if is_array(found) else type(found).__name__
        if kind != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"two files: {name!r}: expected the same shape and dtype in both, got "
                f"{(leaf.shape, leaf.dtype)} and {kind}. Compare files of one architecture."
            )
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):  # random state
            arrays[name] = found
    return tree, arrays


def _bits(leaf: jax.Array | np.ndarray) -> np.ndarray:
    return bits_of(np.asarray(jax.device_get(leaf)))
