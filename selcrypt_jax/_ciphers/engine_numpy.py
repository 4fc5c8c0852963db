"""The lossless cipher in NumPy, with ChaCha20 from OpenSSL: XLA's bits, without JAX.

`lossless` defines the cipher, `selcrypt_jax._keys.chacha` the derivation of keys.
"""

import hashlib

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from .._tree.groups import Places
from .blocks import BLOCK, INDEX_BITS, LEAF_DOMAIN, MASK, PERMUTATION, Form, block_count

_BLOCK_BYTES = 64  # of the ChaCha20 block function
_KEY_BYTES = 32


def rewrite_ring(
    bits: np.ndarray,
    places: Places,
    key: bytes,
    *,
    cipher: Form,
    fine: int,
    inverse: bool,
) -> np.ndarray:
    """Encrypts (or, inverse, decrypts) a ring of one leaf, in place.

    Args:
        bits: unsigned integers ``[weights]``, writable: the bit patterns of the leaf in C order.
        places: of the ring's weights.
        key: of the ring in this leaf, see `leaf_key`.
        cipher: see `LosslessCipher`.
        fine: ``cipher.fine_mask(dtype of the leaf)``.
        inverse: whether to decrypt.

    Returns:
        The ring's plaintext ``[weights]``, in the order of the cipher.
    """
    runs, size, units = places
    whole = len(runs) * size == len(bits)  # in order, as they lie there
    rows = bits if whole or size == 1 else bits.reshape(-1, size)
    ring = (bits.copy() if whole else rows[runs]).reshape(-1)
    new = ring
    if not inverse and cipher.permute:
        new = _permuted(ring, units, key, inverse=False)
    if fine:
        stream = keystream(fold_in(key, MASK), len(ring), bits.dtype)
        stream &= bits.dtype.type(fine)
        stream ^= new
        new = stream
    if inverse and cipher.permute:
        new = _permuted(new, units, key, inverse=True)
    rows[... if whole else runs] = new.reshape(-1, size) if rows.ndim == 2 else new
    return new if inverse else ring


def _permuted(ring: np.ndarray, units: int, key: bytes, *, inverse: bool) -> np.ndarray:
    """The units of a ring in the order of the key; or, inverse, back where they were."""
    blocks = block_count(units)
    length = -(-units // blocks)  # of the longest block
    words = keystream(fold_in(key, PERMUTATION), BLOCK * blocks, np.dtype("u4"))
    packed = words.reshape(blocks, BLOCK)[:, :length] >> INDEX_BITS << INDEX_BITS
    packed |= np.arange(length, dtype=np.uint32)
    if length > 1:
        # Blocks that are one unit short: what lies behind their end sorts last and so stays.
        packed[units - (length - 1) * blocks :, -1] = 2**32 - BLOCK + length - 1
    packed.sort(axis=1)
    packed &= BLOCK - 1
    packed += np.arange(0, blocks * length, length, dtype=np.uint32)[:, None]
    order = packed.astype(np.intp)
    # Block r holds the units r, r + blocks, ...: as rows they stay in the cache while they move.
    size = len(ring) // units
    filled = np.zeros((length * blocks, size), ring.dtype)
    filled[:units] = ring.reshape(units, size)
    rows = np.ascontiguousarray(filled.reshape(length, blocks, size).swapaxes(0, 1))
    rows = rows.reshape(-1, size) if size > 1 else rows.reshape(-1)
    if inverse:
        moved = np.empty_like(rows)
        moved[order.reshape(-1)] = rows
    else:
        moved = rows[order.reshape(-1)]
    moved = moved.reshape(blocks, length, size).swapaxes(0, 1)
    return np.ascontiguousarray(moved).reshape(-1)[: len(ring)]


def leaf_digest(name: str) -> np.ndarray:
    """Eight words that are folded into a level's key, one by one, for the key of a leaf."""
    digest = hashlib.sha256(LEAF_DOMAIN + name.encode("utf-8", "surrogatepass")).digest()
    return np.frombuffer(digest, "<u4")


def leaf_key(key: bytes, name: str) -> bytes:
    """The key of a ring in a leaf, from the 32 bytes of its level's."""
    for word in leaf_digest(name):
        key = fold_in(key, int(word))
    return key


def keystream(key: bytes, count: int, dtype: np.dtype) -> np.ndarray:
    """The first of the numbers that ``jax.random.bits`` gives for a key."""
    stream = np.zeros(count * dtype.itemsize, np.uint8)
    random_bits(key).update_into(stream.data, stream.data)
    return stream.view(dtype.newbyteorder("<")).astype(dtype, copy=False)


def random_bits(key: bytes, start: int = 0) -> CipherContext:
    """XORs with the keystream of ``jax.random.bits``, from its byte number ``start`` on."""
    block, skipped = divmod(start, _BLOCK_BYTES)
    stream = _stream(key, b"random_bits", block)
    stream.update(bytes(skipped))
    return stream


def fold_in(key: bytes, data: int) -> bytes:
    """As ``jax.random.fold_in``."""
    return _stream(key, b"fold_in", data).update(bytes(_KEY_BYTES))


def _stream(key: bytes, domain: bytes, counter: int) -> CipherContext:
    nonce = counter.to_bytes(4, "little") + domain.ljust(12, b"\0")
    return Cipher(ChaCha20(key, nonce), mode=None).encryptor()
