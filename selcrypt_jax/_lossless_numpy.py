"""The lossless cipher in NumPy, with ChaCha20 from OpenSSL: bit for bit what JAX gives.

It opens a file without starting JAX. The definition is in `_lossless`, that of the keys in
`_chacha` and `_dprm`.
"""

import hashlib

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from ._lossless import BLOCK, INDEX_BITS, MASK, PERMUTATION, LosslessCipher, block_count

_BLOCK_BYTES = 64  # of the ChaCha20 block function
_KEY_BYTES = 32


def rewrite_ring(
    bits: np.ndarray,
    positions: np.ndarray,
    key: bytes,
    name: str,
    *,
    cipher: LosslessCipher,
    fine: int,
    inverse: bool,
) -> np.ndarray:
    """Encrypts (or, inverse, decrypts) one ring of one leaf, in place.

    Args:
        bits: unsigned integers ``[weights]``, writable: the bit patterns of the leaf in C order.
        positions: of the ring in it, ``[groups, weights in a group]``, see
            `selcrypt_jax._groups.group_positions`.
        key: 32 bytes, the cipher key of the ring's level.
        name: of the leaf.
        cipher: its `unit` and `permute` are used.
        fine: ``cipher.fine_mask(dtype of the leaf)``.
        inverse: whether to decrypt.

    Returns:
        The ring's plaintext, in the order of the cipher.
    """
    if cipher.unit == "weight" or positions.shape[1] == 1:
        positions = positions.reshape(-1)
        if (positions[1:] < positions[:-1]).any():  # PyTorch's kernels lie in order already
            positions = np.sort(positions)
    positions = positions.astype(np.intp)  # what NumPy would make of them three times
    key = _leaf_key(key, name)
    source = _permutation(_fold_in(key, PERMUTATION), len(positions)) if cipher.permute else None
    ring = bits[positions]
    mask = _mask(_fold_in(key, MASK), ring.size, bits.dtype, fine).reshape(ring.shape)
    if inverse:
        ring ^= mask
        plain = np.empty_like(ring) if source is not None else ring
        if source is not None:
            plain[source] = ring
        bits[positions] = plain
    else:
        plain = ring
        bits[positions] = (ring if source is None else ring[source]) ^ mask
    return plain


def _keystream(key: bytes, domain: bytes, size: int, counter: int = 0) -> bytes:
    nonce = counter.to_bytes(4, "little") + domain.ljust(12, b"\0")
    return Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(bytes(size))


def _fold_in(key: bytes, data: int) -> bytes:
    return _keystream(key, b"fold_in", _KEY_BYTES, data)


def _leaf_key(key: bytes, name: str) -> bytes:
    """The key of a ring in a leaf, as `selcrypt_jax._dprm` derives it."""
    digest = hashlib.sha256(b"selcrypt/v1/leaf\0" + name.encode("utf-8", "surrogatepass")).digest()
    for word in np.frombuffer(digest, "<u4"):
        key = _fold_in(key, int(word))
    return key


def _blocks_of_bits(key: bytes, blocks: int, size: int) -> bytearray:
    """``size`` bytes of random bits from ``fold_in(key, i)`` for each of the blocks i."""
    children = _keystream(key, b"fold_in", blocks * _BLOCK_BYTES)
    zeros, nonce = bytes(size), bytes(4) + b"random_bits\0"
    result = bytearray(blocks * size)
    view = memoryview(result)
    for block in range(blocks):
        child = children[block * _BLOCK_BYTES :][:_KEY_BYTES]
        stream = Cipher(ChaCha20(child, nonce), mode=None).encryptor()
        stream.update_into(zeros, view[block * size : (block + 1) * size])
    return result


def _permutation(key: bytes, units: int) -> np.ndarray:
    """``source[i]``: the unit that unit i is taken from."""
    blocks = block_count(units)
    length = -(-units // blocks)  # of the longest block
    bits = np.frombuffer(_blocks_of_bits(key, blocks, 4 * BLOCK), "<u4").reshape(blocks, BLOCK)
    index = np.arange(length, dtype=np.uint32)
    packed = bits[:, :length] >> INDEX_BITS << INDEX_BITS | index
    if length > 1:
        # Blocks that are one unit short: what lies behind their end sorts last and so stays.
        packed[units - (length - 1) * blocks :, -1] = 2**32 - 1
    packed.sort(axis=1)
    place = (packed & (BLOCK - 1)).astype(np.intp)
    return (place.T * blocks + np.arange(blocks)).ravel()[:units]


def _mask(key: bytes, weights: int, dtype: np.dtype, fine: int) -> np.ndarray:
    if not fine:
        return np.zeros(weights, dtype)
    bits = _blocks_of_bits(key, block_count(weights), BLOCK * dtype.itemsize)
    words = np.frombuffer(bits, dtype.newbyteorder("<"))[:weights].astype(dtype, copy=False)
    return words & dtype.type(fine)
