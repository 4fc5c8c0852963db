"""The lossless cipher in NumPy, with ChaCha20 from OpenSSL: the same bits as XLA's, without JAX.

`lossless` defines the cipher, `selcrypt_jax._keys.chacha` the derivation of keys.
"""

import hashlib
import threading

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from .._tree.groups import Places
from .blocks import BLOCK, LEAF_DOMAIN, MASK, PERMUTATION, Form, block_count

_BLOCK_BYTES = 64  # of the ChaCha20 block function
_KEY_BYTES = 32
_PIECE = 1 << 16  # weights that are permuted or masked at a time: they stay in a core's cache
_MOST_KEPT = 1 << 20  # bytes
_kept = threading.local()


def rewrite_ring(
    bits: np.ndarray,
    places: Places,
    key: bytes,
    *,
    cipher: Form,
    fine: int,
    inverse: bool,
) -> np.ndarray:
    """Encrypts a ring of one leaf in place, or decrypts it if ``inverse``.

    Args:
        bits: unsigned integers ``[weights]``, writable: the bit patterns of the leaf in C order.
        places: where the ring's weights lie.
        key: the ring's key in this leaf, see `leaf_key`.
        cipher: see `LosslessCipher`.
        fine: ``cipher.fine_mask(dtype of the leaf)``.
        inverse: whether to decrypt.

    Returns:
        The ring's plaintext ``[weights]``, in the order of the cipher; a view of ``bits`` if the
        ring is the whole leaf.
    """
    runs, size, units = places
    rows = bits.reshape(-1, size) if size > 1 else bits
    ring = rows[runs].reshape(-1)  # a copy, unless the ring is the whole leaf
    plain = ring if inverse else ring.copy()
    if cipher.permute and not inverse:
        _permute(ring, units, key, inverse=False)
    if fine:
        _mask(ring, key, fine)
    if cipher.permute and inverse:
        _permute(ring, units, key, inverse=True)
    if not isinstance(runs, slice):
        rows[runs] = ring.reshape(-1, size) if size > 1 else ring
    return plain


def _mask(ring: np.ndarray, key: bytes, fine: int) -> None:
    """Masks the fine bits of a ring in place."""
    stream = random_bits(fold_in(key, MASK))
    for start in range(0, len(ring), _PIECE):
        piece = ring[start : start + _PIECE]
        drawn = drawn_words(stream, len(piece), piece.dtype)
        drawn &= ring.dtype.type(fine)
        piece ^= drawn


def _permute(ring: np.ndarray, units: int, key: bytes, *, inverse: bool) -> None:
    """Permutes the units of a ring by the key; inverse, restores their order."""
    blocks, size = block_count(units), len(ring) // units
    length = -(-units // blocks)  # of the longest block
    longest = units - (length - 1) * blocks  # the number of such blocks; others are a unit shorter
    stream = random_bits(fold_in(key, PERMUTATION))
    # Block r holds the units r, r + blocks, ...: a column, plus one last unit if it is among the
    # longest.
    columns = ring[: -longest * size].reshape(length - 1, blocks, size)
    last = ring[-longest * size :].reshape(longest, size)
    step = max(_PIECE // (BLOCK * size), 1)
    for first in range(0, blocks, step):
        here = slice(first, min(first + step, blocks))
        longer = slice(first, min(here.stop, longest))
        count, own = here.stop - first, max(longer.stop - first, 0)
        words = drawn_words(stream, BLOCK * count, np.dtype("u4"))
        packed = words.reshape(count, BLOCK)[:, :length]
        packed &= 2**32 - BLOCK
        packed |= np.arange(length, dtype=np.uint32)
        packed[own:, length - 1 :] = 2**32 - BLOCK + length - 1  # sorts last, so it stays there
        packed.sort(axis=1)
        packed &= BLOCK - 1
        packed += np.arange(0, count * length, length, dtype=np.uint32)[:, None]
        order = _room("order", count * length, np.dtype(np.intp))
        order.reshape(count, length)[...] = packed
        # As rows they stay in the cache while they are permuted.
        rows, moved = (
            _room(name, count * length * size, ring.dtype).reshape(count, length, size)
            for name in ("rows", "moved")
        )
        rows[:, :-1] = columns[:, here].swapaxes(0, 1)
        rows[:own, -1] = last[longer]
        flat = (count * length, size) if size > 1 else -1
        if inverse:
            moved.reshape(flat)[order] = rows.reshape(flat)
        else:
            np.take(rows.reshape(flat), order, axis=0, out=moved.reshape(flat), mode="clip")
        columns[:, here] = moved[:, :-1].swapaxes(0, 1)
        last[longer] = moved[:own, -1]


def _room(name: str, count: int, dtype: np.dtype) -> np.ndarray:
    """Uninitialised scratch memory of this thread, valid until the next call with this name.

    Fresh pages for each ring would take longer than the cipher itself.
    """
    size = count * dtype.itemsize
    memory = vars(_kept).get(name)
    if memory is None or len(memory) < size:
        memory = np.empty(size, np.uint8)
        if size <= _MOST_KEPT:
            setattr(_kept, name, memory)
    return memory[:size].view(dtype)


def leaf_digest(name: str) -> np.ndarray:
    """Eight words that are folded into a level's key, one by one, to derive the leaf's key."""
    digest = hashlib.sha256(LEAF_DOMAIN + name.encode("utf-8", "surrogatepass")).digest()
    return np.frombuffer(digest, "<u4")


def leaf_key(key: bytes, name: str) -> bytes:
    """The key of a ring in a leaf, from the 32 bytes of its level's key."""
    for word in leaf_digest(name):
        key = fold_in(key, int(word))
    return key


def drawn_words(stream: CipherContext, count: int, dtype: np.dtype) -> np.ndarray:
    """The next numbers of `random_bits`, in memory that the next call reuses."""
    words = _room("words", count, dtype.newbyteorder("<"))
    words[:] = 0
    data = words.view(np.uint8).data
    stream.update_into(data, data)
    return words.astype(dtype, copy=False)


def random_bits(key: bytes, start: int = 0) -> CipherContext:
    """XORs with the keystream of ``jax.random.bits``, from byte ``start`` on."""
    block, skipped = divmod(start, _BLOCK_BYTES)
    stream = _stream(key, b"random_bits", block)
    stream.update(bytes(skipped))
    return stream


def fold_in(key: bytes, data: int) -> bytes:
    """The same as ``jax.random.fold_in``."""
    return _stream(key, b"fold_in", data).update(bytes(_KEY_BYTES))


def _stream(key: bytes, domain: bytes, counter: int) -> CipherContext:
    nonce = counter.to_bytes(4, "little") + domain.ljust(12, b"\0")
    return Cipher(ChaCha20(key, nonce), mode=None).encryptor()
