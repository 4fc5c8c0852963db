"""The lossless cipher in NumPy, with ChaCha20 from OpenSSL: bit for bit what JAX gives.

It opens a file without starting JAX. The definition is in `_lossless`, that of the keys in
`_chacha` and `_dprm`.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from .._tree.groups import unit_positions
from .lossless import BLOCK, INDEX_BITS, MASK, PERMUTATION, LosslessCipher, block_count

_BLOCK_BYTES = 64  # of the ChaCha20 block function
_KEY_BYTES = 32
_STRIP = 16  # rows that are transposed together: all at once takes three times as long


def rewrite_leaf(
    bits: np.ndarray,
    shape: Sequence[int],
    rings: Sequence[tuple[np.ndarray, bytes]],
    name: str,
    *,
    cipher: LosslessCipher,
    fine: int,
    inverse: bool,
) -> list[np.ndarray]:
    """Encrypts (or, inverse, decrypts) rings of one leaf, in place.

    Args:
        bits: unsigned integers ``[weights]``, writable: the bit patterns of the leaf in C order.
        shape: of the leaf.
        rings: disjoint masks, see `group_positions`, each with the cipher key of its level.
        name: of the leaf.
        cipher: see `LosslessCipher`.
        fine: ``cipher.fine_mask(dtype of the leaf)``.
        inverse: whether to decrypt.

    Returns:
        The plaintext of each ring, in the order of the cipher.
    """
    plain: list[np.ndarray] = [bits[:0]] * len(rings)
    for positions, numbers in _together(shape, [mask for mask, _ in rings], cipher.unit):
        # A leaf is too large for a cache and its selected weights are not: it is gone through
        # once for all rings, and not ring by ring.
        size = positions.shape[1]
        whole = size == 1 and len(positions) == len(bits)  # in order, as they lie there
        if size == 1 and not whole:
            # One index an entry, as wide as NumPy wants it: everything else is a slower loop.
            positions = positions.astype(np.intp)[:, 0]
        dense = bits if whole else bits[positions]
        for index, units in numbers:
            tables = ring_tables(
                (len(units), size),
                leaf_key(rings[index][1], name),
                cipher=cipher,
                fine=fine,
                dtype=bits.dtype,
            )
            all_of_them = len(units) == len(dense)
            ring = dense.copy() if all_of_them else dense[units]
            new, plain[index] = _moved(ring, *tables, inverse=inverse)
            dense[... if all_of_them else units] = new
        if not whole:
            bits[positions] = dense
    return plain


def _moved(
    ring: np.ndarray, source: np.ndarray | None, mask: np.ndarray | None, *, inverse: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The ring encrypted (or decrypted), and the one of the two that is plaintext."""
    if not inverse:
        moved = ring if source is None else ring[source]
        return moved if mask is None else moved ^ mask.reshape(ring.shape), ring
    if mask is not None:
        ring = ring ^ mask.reshape(ring.shape)
    if source is None:
        return ring, ring
    plain = np.empty_like(ring)
    plain[source] = ring
    return plain, plain


def _together(
    shape: Sequence[int], masks: Sequence[np.ndarray], unit: Literal["weight", "group"]
) -> Iterator[tuple[np.ndarray, list[tuple[int, np.ndarray]]]]:
    """Rings whose masks have the same shape.

    Yields:
        The positions of all their units, ``[units, weights in a unit]``, and for each ring, by its
        index, which of them are its own, in order.
    """
    for same in sorted({mask.shape for mask in masks}):
        which = [index for index, mask in enumerate(masks) if mask.shape == same]
        positions, own = unit_positions(shape, [masks[index] for index in which], unit)
        yield positions, list(zip(which, own, strict=True))


class LeafTables(NamedTuple):
    """What the cipher does with the rings of a leaf, as arrays ``[selected weights]``.

    Attributes:
        positions: int32, of the weights in the leaf; None for all of them in order.
        source: int32, which of them each is taken from; None where none moves.
        mask: that each is masked with, before it is moved or after; None where none is.
    """

    positions: np.ndarray | None
    source: np.ndarray | None
    mask: np.ndarray | None


def leaf_tables(
    shape: Sequence[int],
    rings: Sequence[tuple[np.ndarray, bytes]],
    *,
    cipher: LosslessCipher,
    fine: int,
    dtype: np.dtype,
    inverse: bool,
) -> LeafTables:
    """What `rewrite_leaf` does with a leaf, for another engine to do.

    Encryption takes each weight from its source and then masks it; decryption masks first.

    Args:
        shape: of the leaf.
        rings: disjoint masks, each with the key of the ring in this leaf, see `leaf_key`.
        cipher: see `LosslessCipher`.
        fine: ``cipher.fine_mask(dtype of the leaf)``.
        dtype: unsigned, as wide as the leaf's.
        inverse: whether to decrypt.
    """
    parts = []
    for positions, numbers in _together(shape, [mask for mask, _ in rings], cipher.unit):
        units, size = positions.shape
        source = np.arange(units, dtype=np.int32) if cipher.permute else None
        mask = np.empty((units, size), dtype) if fine else None
        for index, own in numbers:
            order, words = ring_tables(
                (len(own), size), rings[index][1], cipher=cipher, fine=fine, dtype=dtype
            )
            if source is not None and order is not None:
                if inverse:
                    source[own[order]] = own
                else:
                    source[own] = own[order]
            if mask is not None and words is not None:
                words = words.reshape(-1, size)
                if len(own) == units:
                    mask = words
                else:
                    mask[own] = words
        if source is not None and size > 1:
            source = (source[:, None] * size + np.arange(size, dtype=np.int32)).reshape(-1)
        whole = positions.shape == (math.prod(shape), 1)
        parts.append(LeafTables(None if whole else positions.reshape(-1), source, mask))
    return _joined(parts)


def _joined(parts: Sequence[LeafTables]) -> LeafTables:
    """Tables for one leaf, one after the other."""
    if len(parts) == 1:
        positions, source, mask = parts[0]
        return LeafTables(positions, source, None if mask is None else mask.reshape(-1))
    positions = [part.positions for part in parts if part.positions is not None]
    starts = np.cumsum([0, *map(len, positions[:-1])], dtype=np.int32)
    sources = [p.source + s for p, s in zip(parts, starts, strict=True) if p.source is not None]
    masks = [part.mask.reshape(-1) for part in parts if part.mask is not None]
    return LeafTables(
        np.concatenate(positions),
        np.concatenate(sources) if sources else None,
        np.concatenate(masks) if masks else None,
    )


def leaf_chunks(
    shape: Sequence[int],
    rings: Sequence[tuple[np.ndarray, bytes]],
    *,
    cipher: LosslessCipher,
    fine: int,
    dtype: np.dtype,
    inverse: bool,
    most: int,
) -> Iterator[LeafTables]:
    """As `leaf_tables`, in parts that can be done one after the other.

    Args:
        shape: of the leaf.
        rings: disjoint masks, each with the key of the ring in this leaf, see `leaf_key`.
        cipher: see `LosslessCipher`.
        fine: ``cipher.fine_mask(dtype of the leaf)``.
        dtype: unsigned, as wide as the leaf's.
        inverse: whether to decrypt.
        most: weights in a part, unless a permutation block of the ring has more.
    """
    for mask, key in rings:
        positions, _ = unit_positions(shape, [mask], cipher.unit)
        units, size = positions.shape
        blocks = block_count(units)
        length = -(-units // blocks)
        source, words = ring_tables((units, size), key, cipher=cipher, fine=fine, dtype=dtype)
        if source is not None and inverse:
            back = np.empty_like(source)
            back[source] = np.arange(units)
            source = back
        step = max(most // (length * size), 1)
        place = np.empty(units, np.int32)  # of a unit in its part
        within = np.arange(size, dtype=np.int32)
        for block in range(0, blocks, step):
            these = np.arange(block, min(block + step, blocks))
            part = (np.arange(length)[:, None] * blocks + these).reshape(-1)
            part = part[part < units]
            moved = None
            if source is not None:
                place[part] = np.arange(len(part), dtype=np.int32)
                moved = (place[source[part]][:, None] * size + within).reshape(-1)
            yield LeafTables(
                positions[part].reshape(-1),
                moved,
                None if words is None else words.reshape(-1, size)[part].reshape(-1),
            )


def ring_tables(
    shape: Sequence[int], key: bytes, *, cipher: LosslessCipher, fine: int, dtype: np.dtype
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What the cipher does with a ring.

    Args:
        shape: number of units, and of weights in each.
        key: 32 bytes, of the ring in its leaf, see `leaf_key`.
        cipher: its `permute` is used.
        fine: ``cipher.fine_mask(dtype)``.
        dtype: unsigned, as wide as the leaf's.

    Returns:
        The unit that each unit is taken from, or None where none moves; the keystream of all
        weights, cut to the fine bits, or None where there are none.
    """
    units, size = shape
    source = _permutation(_fold_in(key, PERMUTATION), units) if cipher.permute else None
    return source, _mask(_fold_in(key, MASK), units * size, dtype, fine) if fine else None


def _keystream(key: bytes, domain: bytes, size: int, counter: int = 0) -> bytes:
    nonce = counter.to_bytes(4, "little") + domain.ljust(12, b"\0")
    return Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(bytes(size))


def _fold_in(key: bytes, data: int) -> bytes:
    return _keystream(key, b"fold_in", _KEY_BYTES, data)


def leaf_key(key: bytes, name: str) -> bytes:
    """The key of a ring in a leaf, as `selcrypt_jax._dprm` derives it."""
    digest = hashlib.sha256(b"selcrypt/v1/leaf\0" + name.encode("utf-8", "surrogatepass")).digest()
    for word in np.frombuffer(digest, "<u4"):
        key = _fold_in(key, int(word))
    return key


def _blocks_of_bits(key: bytes, size: int, total: int, first: int = 0) -> bytearray:
    """``total`` random bytes, of which each ``fold_in(key, i)`` from `first` on gives ``size``."""
    blocks = -(-total // size)
    children = _keystream(key, b"fold_in", blocks * _BLOCK_BYTES, first)
    zeros, nonce = bytes(size), bytes(4) + b"random_bits\0"
    result = bytearray(total)
    view = memoryview(result)
    for block in range(blocks):
        child = children[block * _BLOCK_BYTES :][:_KEY_BYTES]
        stream = Cipher(ChaCha20(child, nonce), mode=None).encryptor()
        place = view[block * size : (block + 1) * size]
        stream.update_into(zeros[: len(place)], place)
    return result


def _permutation(key: bytes, units: int) -> np.ndarray:
    """``source[i]``: the unit that unit i is taken from."""
    blocks = block_count(units)
    length = -(-units // blocks)  # of the longest block
    bits = _blocks_of_bits(key, 4 * length, 4 * length * blocks)
    packed = np.frombuffer(bits, "<u4").reshape(blocks, length)
    packed = packed >> INDEX_BITS << INDEX_BITS | np.arange(length, dtype=np.uint32)
    if length > 1:
        # Blocks that are one unit short: what lies behind their end sorts last and so stays.
        packed[units - (length - 1) * blocks :, -1] = 2**32 - 1
    packed.sort(axis=1)
    packed &= BLOCK - 1
    packed *= np.uint32(blocks)
    packed += np.arange(blocks, dtype=np.uint32)[:, None]
    source = np.empty((length, blocks), np.intp)
    for start in range(0, blocks, _STRIP):
        source[:, start : start + _STRIP] = packed[start : start + _STRIP].T
    return source.reshape(-1)[:units]


def mask_words(
    key: bytes, numbers: np.ndarray, weights: int, dtype: np.dtype, fine: int
) -> np.ndarray:
    """What weights of a ring are masked with.

    Args:
        key: 32 bytes, of the ring in its leaf, see `leaf_key`.
        numbers: of the weights in the ring, ascending.
        weights: of the ring in all.
        dtype: unsigned, as wide as the leaf's.
        fine: ``cipher.fine_mask(dtype of the leaf)``.
    """
    if not len(numbers):
        return np.zeros(0, dtype)
    first = int(numbers[0]) // BLOCK * BLOCK
    last = min(-(-(int(numbers[-1]) + 1) // BLOCK) * BLOCK, weights)
    words = _mask(_fold_in(key, MASK), last, dtype, fine, skip=first // BLOCK)
    return words[numbers - first]


def _mask(key: bytes, weights: int, dtype: np.dtype, fine: int, skip: int = 0) -> np.ndarray:
    """For the weights of a ring, without those of the first blocks."""
    width = dtype.itemsize
    size = width * min(BLOCK, weights)
    bits = _blocks_of_bits(key, size, width * weights - skip * size, skip)
    words = np.frombuffer(bits, dtype.newbyteorder("<")).astype(dtype, copy=False)
    words &= dtype.type(fine)
    return words
