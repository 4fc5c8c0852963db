"""What two protected files reveal without a key.

The files may hold the same network protected twice, two networks of one owner, or a network and its
fine-tuned successor. Since each protection has a new model id, no keystream and no order is used
twice. What two files still reveal is where they differ, and what one leaves plain and the other
encrypts.
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
    """Takes from b the weights that are encrypted in a and plain in b.

    For one network protected twice with different selections, these are the original weights.

    Args:
        protected_a: parameters of one file; not modified.
        protected_b: parameters of the other, with the same paths, shapes and dtypes.
        mask_a: the weights encrypted in a, at any level.
        mask_b: the weights encrypted in b, at any level.

    Returns:
        A tree with the structure of a. Leaves from which nothing is taken are passed through.

    Raises:
        ValueError, TypeError: files or masks do not fit each other.

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

    The XOR of two ciphertexts is then the XOR of the weights. If the weights are alike (a successor
    after little training, a scale that is 1 in both, bfloat16 stored as float32), that is far from
    random; each masked bit is tested by itself, over all leaves. If two networks have nothing in
    common, their masked bits are random anyway: a reused keystream is then neither visible nor
    useful, until one of the networks becomes known.

    Args:
        a: protected parameters.
        b: protected parameters of another file, with the same paths, shapes and dtypes.
        mask: the weights encrypted in both, at any level.
        cipher: as in `encrypt`; it says which bits are masked. For a cipher that does not, the
            bits that `LosslessCipher` masks.

    Returns:
        A check whose `found` is the share of weights in which the files differ, for the bit
        furthest from chance. It passes if that share is as close to 0.5 as for all but 1e-8 of
        unrelated keystreams (Hoeffding's inequality). If no bit is masked, it does not apply.

    Raises:
        ValueError, TypeError: the files or the mask do not fit each other.

    Examples:
        >>> assert shared_keystream(protected, protected_again, masks[0]).passed
    """
    fine_mask = getattr(cipher, "fine_mask", LosslessCipher().fine_mask)
    name = "two files: different keystreams"
    tree, other = _both(a, b)
    # Count bits down from the highest masked one, so that dtypes can be pooled.
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
    text = f"half of the bits differ, within {limit:.1f} standard deviations, for each masked bit"
    return CipherCheck(name, deviation(worst) <= limit, ones[worst] / total[worst], text)


def changed(a: PyTree, b: PyTree, truth: PyTree | None = None) -> Changed:
    """Where two files differ.

    Two protected files of the same network differ where they are encrypted, so an attacker with
    both learns where that is. A successor differs wherever it was trained.

    Args:
        a: protected parameters.
        b: parameters of the other file, with the same paths, shapes and dtypes.
        truth: the true mask of the encrypted weights, at any level, to score the attack.

    Returns:
        A named tuple of ``mask``, a pytree with a boolean for each weight, true if it seems
        encrypted, and ``False`` for leaves that are not arrays; ``found``, the share of the truly
        encrypted weights that it selects; and ``precision``, the share of the selected weights
        that are truly encrypted. Both are NaN without `truth`; ``precision`` also if nothing
        differs.

    Raises:
        ValueError, TypeError: the files or the mask do not fit each other.

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
        raise ValueError("truth: expected a mask that selects some weights, got one without.")
    return Changed(mask, both / true, both / seen if seen else math.nan)


def _both(a: PyTree, b: PyTree) -> tuple[NamedLeaves, dict[str, np.ndarray]]:
    """The leaves of a and the numeric arrays of b, after checking that they fit each other."""
    tree, other = named_leaves(a, "a"), named_leaves(b, "b").leaves
    if set(tree.leaves) != set(other):
        odd = sorted(set(tree.leaves) ^ set(other))
        raise ValueError(
            f"two files: expected the same paths in both, got {odd} in only one. Compare files "
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
