"""The window cipher on bytes, on host arrays, and in XLA. `window` defines it."""

import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from .._tree.dtypes import DTYPES, Dtype
from .blocks import SEAL
from .engine_numpy import drawn_words, fold_in, leaf_key, random_bits
from .windows import FEWEST, Window, exponent_bits, has_window, offset_and_mask, sealed_words


class Windows(Protocol):
    """The part of a `WindowCipher` that this engine needs."""

    def window(self, name: str, dtype: Dtype) -> Window | None:
        """The window of a leaf."""
        ...


_PIECE = 1 << 18  # bytes that are masked at a time: they stay in a core's cache


def find_window(data: memoryview, dtype: Dtype) -> Window | None:
    """The window of the numbers in these bytes; None if their dtype has no exponents."""
    if not has_window(dtype):
        return None
    dtype = sealed_words(dtype)
    width = exponent_bits(dtype)
    if not data:
        return Window(0, min(FEWEST, width - 1), False)
    words = np.frombuffer(data, _word(dtype))
    least, most = int(words.min()), int(words.max())
    negative = dtype.signed and most >> (dtype.bits - 1) == 1
    sign = negative and least >> (dtype.bits - 1) == 0
    if negative:
        least, most = 1 << dtype.bits, 0
        for start in range(0, len(words), _PIECE):
            sizes = words[start : start + _PIECE] & words.dtype.type((1 << (dtype.bits - 1)) - 1)
            least, most = min(least, int(sizes.min())), max(most, int(sizes.max()))
    bottom, top = least >> dtype.mantissa, most >> dtype.mantissa
    exponents = max(min(FEWEST, width - 1), (top - bottom).bit_length())
    if exponents == width or top == (1 << width) - 1:
        return Window(0, width, sign)
    return Window(max(0, top - (1 << exponents) + 1), exponents, sign)


def _word(dtype: Dtype) -> np.dtype:
    return np.dtype(f"<u{sealed_words(dtype).bits // 8}")


def mask_words(
    data: memoryview, key: bytes, dtype: Dtype, window: Window | None, start: int = 0
) -> None:
    """Masks (or unmasks) numbers of a leaf in place.

    Args:
        data: the numbers' bytes, little-endian, writable.
        key: the keystream's key: `seal_key_of` the leaf.
        dtype: the leaf's dtype.
        window: the leaf's window, or None for numbers without exponents.
        start: the offset of ``data`` in the leaf, in bytes.
    """
    offset, mask = offset_and_mask(dtype, window)
    word = _word(dtype)
    stream = random_bits(key, start)
    if mask == (1 << 8 * word.itemsize) - 1 and not offset:
        stream.update_into(data, data)
        return
    numbers = np.frombuffer(data, word)
    step = _PIECE // word.itemsize
    for first in range(0, len(numbers), step):
        piece = numbers[first : first + step]
        drawn = drawn_words(stream, len(piece), word)
        drawn &= word.type(mask)
        if offset:
            piece -= word.type(offset)
        piece ^= drawn
        if offset:
            piece += word.type(offset)


def seal_key_of(secret: bytes, name: str) -> bytes:
    """The key of a leaf's keystream, from its level's cipher key."""
    return fold_in(leaf_key(secret, name), SEAL)


def run_window(
    cipher: Windows, leaves: Mapping[str, Any], rings: Sequence[Any], keys: Any
) -> dict[str, Any]:
    """See `Cipher.run`: in NumPy if it knows keys and weights, otherwise in XLA."""
    from .engine_host import copied, handed, on_host

    of_leaf: dict[str, list[tuple[Any, int]]] = {}
    for index, ring in enumerate(rings):
        of_leaf.setdefault(ring.name, []).append((ring, index))
    result, here = dict(leaves), []
    for name, own in of_leaf.items():
        if keys.secrets is not None and on_host(leaves[name]):
            here.append(name)
            continue
        for ring, index in own:
            result[name] = _in_xla(cipher, result[name], ring, keys.array, index)

    def masked(name: str) -> np.ndarray:
        bits = copied(leaves[name])
        for ring, index in of_leaf[name]:
            _on_host(cipher, leaves[name], bits, ring, keys.secrets[index])
        return bits

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, bits in zip(here, pool.map(masked, here), strict=True):
            # In this thread: JAX's configuration is thread-local.
            result[name] = handed(bits.view(leaves[name].dtype), leaves[name])
    return result


def _on_host(cipher: Windows, leaf: Any, bits: np.ndarray, ring: Any, secret: bytes) -> None:
    """Each host masks its own part in place; nothing of the leaf is sent."""
    from .engine_host import parts

    dtype = DTYPES[str(leaf.dtype)]
    key, window = seal_key_of(secret, ring.name), cipher.window(ring.name, dtype)
    rows = np.atleast_1d(bits)  # the same memory
    mask = np.broadcast_to(ring.mask, leaf.shape).reshape(rows.shape)
    everything = bool(ring.mask.all())

    def masked(part: np.ndarray, row: int) -> None:
        data = part.reshape(-1).view(np.uint8).data
        mask_words(data, key, dtype, window, row * rows[0].nbytes)

    for index in parts(leaf):
        first, *rest = index or (slice(None),)
        inner = zip(rest, rows.shape[1:], strict=True)
        whole_rows = all(part.indices(n) == (0, n, 1) for part, n in inner)
        if whole_rows and (everything or mask[index].all()):
            masked(rows[first], first.indices(len(rows))[0])  # one contiguous run
            continue
        for row in range(*first.indices(len(rows))):
            here = slice(row, row + 1), *rest
            if mask[here].any():
                new = rows[row : row + 1].copy()
                masked(new, row)
                np.copyto(rows[here], new[:, *rest], where=mask[here])


def _in_xla(cipher: Windows, leaf: Any, ring: Any, keys: Any, index: int) -> Any:
    import jax

    dtype = DTYPES[str(leaf.dtype)]
    window = cipher.window(ring.name, dtype)
    low, mask = np.array(offset_and_mask(dtype, window), f"u{leaf.dtype.itemsize}")
    where = None if ring.mask.all() else ring.mask
    with jax.debug_nans(False), jax.debug_infs(False):
        return _compiled()(leaf, keys, np.int32(index), where, low, mask)


@functools.cache
def _compiled() -> Any:
    """`_in_xla` as one program for all leaves of a shape, whatever their windows."""
    import jax
    from jax import lax

    from .._tree.names import unsigned, without_explicit_axes

    def masked(leaf: Any, keys: Any, index: Any, where: Any, low: Any, mask: Any) -> Any:
        word, key = unsigned(leaf), jax.random.fold_in(keys[index], SEAL)
        bits = lax.bitcast_convert_type(leaf, word)
        drawn = jax.random.bits(key, leaf.shape, word)
        new = ((bits - low) ^ (drawn & mask)) + low
        if where is not None:
            new = jax.numpy.where(where, new, bits)
        return lax.bitcast_convert_type(new, leaf.dtype)

    return jax.jit(lambda leaf, *rest: without_explicit_axes(masked, leaf)(leaf, *rest))
