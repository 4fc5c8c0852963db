"""The lossless cipher in NumPy, with ChaCha20 from OpenSSL: XLA's bits, without JAX.

`lossless` defines the cipher, `selcrypt_jax._keys.chacha` the derivation of keys.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from .._tree.groups import unit_positions
from .blocks import BLOCK, INDEX_BITS, LEAF_DOMAIN, MASK, PERMUTATION, Form, block_count

_BLOCK_BYTES = 64  # of the ChaCha20 block function
_KEY_BYTES = 32
_STRIP = 16  # rows that are transposed together: all at once takes three times as long


def rewrite_leaf(
    bits: np.ndarray,
    shape: Sequence[int],
    rings: Sequence[tuple[np.ndarray, bytes]],
    name: str,
    *,
    cipher: Form,
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
    masks = [mask for mask, _ in rings]
    # A leaf is too large for a cache and its selected weights are not: one pass over it serves all
    # rings whose masks have the same shape.
    for same in sorted({mask.shape for mask in masks}):
        which = [index for index, mask in enumerate(masks) if mask.shape == same]
        positions, own = unit_positions(shape, [masks[index] for index in which], cipher.unit)
        size = positions.shape[1]
        whole = size == 1 and len(positions) == len(bits)  # in order, as they lie there
        if size == 1 and not whole:
            # One index an entry, as wide as NumPy wants it: everything else is a slower loop.
            positions = positions.astype(np.intp)[:, 0]
        dense = bits if whole else bits[positions]
        for index, units in zip(which, own, strict=True):
            all_of_them = len(units) == len(dense)
            ring = dense.copy() if all_of_them else dense[units]
            key = leaf_key(rings[index][1], name)
            source = mask = None
            if cipher.permute:
                source = _permutation(_fold_in(key, PERMUTATION), len(ring))
            if fine:
                mask = _mask(_fold_in(key, MASK), ring.size, bits.dtype, fine).reshape(ring.shape)
            new, plain[index] = _moved(ring, source, mask, inverse=inverse)
            dense[... if all_of_them else units] = new
        if not whole:
            bits[positions] = dense
    return plain


def _moved(
    ring: np.ndarray, source: np.ndarray | None, mask: np.ndarray | None, *, inverse: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The ring encrypted (or decrypted), and the one of the two that is plaintext.

    Args:
        ring: the bits ``[units, ...]``.
        source: the unit that each unit is taken from; None where none moves.
        mask: the keystream, cut to the fine bits; None where there are none.
        inverse: whether to decrypt.
    """
    if not inverse:
        moved = ring if source is None else ring[source]
        return moved if mask is None else moved ^ mask, ring
    if mask is not None:
        ring = ring ^ mask
    if source is None:
        return ring, ring
    plain = np.empty_like(ring)
    plain[source] = ring
    return plain, plain


def leaf_digest(name: str) -> np.ndarray:
    """Eight words that are folded into a level's key, one by one, for the key of a leaf."""
    digest = hashlib.sha256(LEAF_DOMAIN + name.encode("utf-8", "surrogatepass")).digest()
    return np.frombuffer(digest, "<u4")


def leaf_key(key: bytes, name: str) -> bytes:
    """The key of a ring in a leaf, from the 32 bytes of its level's."""
    for word in leaf_digest(name):
        key = _fold_in(key, int(word))
    return key


def _keystream(key: bytes, domain: bytes, size: int, counter: int = 0) -> bytes:
    nonce = counter.to_bytes(4, "little") + domain.ljust(12, b"\0")
    return Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(bytes(size))


def _fold_in(key: bytes, data: int) -> bytes:
    return _keystream(key, b"fold_in", _KEY_BYTES, data)


def _blocks_of_bits(key: bytes, size: int, total: int) -> bytearray:
    """``total`` random bytes, of which each ``fold_in(key, i)`` gives ``size``."""
    blocks = -(-total // size)
    children = _keystream(key, b"fold_in", blocks * _BLOCK_BYTES)
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


def _mask(key: bytes, weights: int, dtype: np.dtype, fine: int) -> np.ndarray:
    """What the weights of a ring are masked with."""
    width = dtype.itemsize
    bits = _blocks_of_bits(key, width * min(BLOCK, weights), width * weights)
    words = np.frombuffer(bits, dtype.newbyteorder("<")).astype(dtype, copy=False)
    words &= dtype.type(fine)
    return words
