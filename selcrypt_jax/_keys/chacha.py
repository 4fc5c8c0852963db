"""ChaCha20 (RFC 8439) as a ``jax.random`` implementation with 256-bit keys.

A key made by ``chacha20_key`` works with everything in ``jax.random``: ``bits``, ``split``,
``fold_in``, ``normal``, ``permutation`` and the rest. Every derivation from a key uses the RFC's
block function under its own nonce, its *domain*, so no two derivations ever read the same
keystream:

================  ======================  ==================================================
derivation        nonce (12 ASCII bytes)  output
================  ======================  ==================================================
``random_bits``   ``random_bits``         the keystream from block 0, little-endian
``split``         ``split``               child ``i`` is words ``8i .. 8i+7`` of the keystream
``fold_in``       ``fold_in``             words ``0 .. 7`` of block number ``data``
``seed``          ``seed``                words ``0 .. 7`` of block 0, the key being the seed
================  ======================  ==================================================
"""

import math
import operator
from functools import partial, reduce
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from .._io.errors import counted
from .material import forgetting

_SIGMA = np.frombuffer(b"expand 32-byte k", "<u4").astype(np.uint32)  # RFC 8439, section 2.3
_BLOCK_WORDS = 16
_KEY_WORDS = 8
_MAX_BLOCKS = 2**32  # the counter is one word; a block after the last would repeat block 0

# A longer stream is made in pieces, because the state of a whole piece (64 bytes per block) is in
# memory between two rounds. On a CPU half a MiB stays in a core's own cache: in one piece, 16 M
# words take twice as long. An accelerator needs more blocks to be busy; there the pieces only bound
# the memory.
_CPU_CHUNK = 2**13
_ACCELERATOR_CHUNK = 2**20
# Two double rounds per step: a GPU then moves half as much state, which is its bottleneck (0.7
# against 1.1 ms for 16 M words). Five gain another quarter, but take four seconds to compile.
_ACCELERATOR_UNROLL = 2

_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def _domain(label: bytes) -> np.ndarray:
    """The nonce of a derivation: its label, padded to the RFC's 12 bytes."""
    return np.frombuffer(label.ljust(12, b"\0"), "<u4").astype(np.uint32)


_RANDOM_BITS = _domain(b"random_bits")
_SPLIT = _domain(b"split")
_FOLD_IN = _domain(b"fold_in")
_SEED = _domain(b"seed")


def _rotate_left(x: Array, bits: int) -> Array:
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))


def _quarter_round(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, ...]:
    """RFC 8439, section 2.1; elementwise over arrays of words."""
    a = a + b
    d = _rotate_left(d ^ a, 16)
    c = c + d
    b = _rotate_left(b ^ c, 12)
    a = a + b
    d = _rotate_left(d ^ a, 8)
    c = c + d
    b = _rotate_left(b ^ c, 7)
    return a, b, c, d


def _double_round(_: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
    """One round over the columns and one over the diagonals: RFC 8439, section 2.3."""
    words = list(state)
    for at in _COLUMNS + _DIAGONALS:
        for i, word in zip(at, _quarter_round(*(words[i] for i in at)), strict=True):
            words[i] = word
    return tuple(words)


def _zero(*words: Array) -> Array:
    """A zero that, in ``shard_map``, varies over the mesh axes that ``words`` vary over."""
    return reduce(operator.or_, (word & np.uint32(0) for word in words))


@partial(jax.jit, static_argnums=3)
def _block(key: Array, counter: Array, nonce: Array, unroll: int = 1) -> Array:
    """The block function (RFC 8439, section 2.3), with its final addition.

    Args:
        key: uint32 ``[..., 8]``, little-endian words, like the other arguments.
        counter: uint32 ``[...]``, the number of the block.
        nonce: uint32 ``[..., 3]``.
        unroll: the number of double rounds in one step of the loop.

    Returns:
        uint32 ``[..., 16]``, a block of keystream.
    """
    shape = np.broadcast_shapes(key.shape[:-1], counter.shape, nonce.shape[:-1])
    sigma = (jnp.asarray(word) for word in _SIGMA)
    words = (*sigma, *jnp.unstack(key, axis=-1), counter, *jnp.unstack(nonce, axis=-1))
    start = [jnp.broadcast_to(word, shape) for word in words]
    # A loop's carry can't start to vary over a mesh axis later. XLA removes this.
    start = tuple(word | _zero(start[4], start[12], start[13]) for word in start)
    # A loop, because the unrolled rounds take five times as long to compile and longer to run:
    # XLA fuses across two of them by computing most words twice.
    end = lax.fori_loop(0, 10, _double_round, start, unroll=unroll)
    return jnp.stack([x + y for x, y in zip(start, end, strict=True)], axis=-1)


def _blocks(key: Array, nonce: Array, blocks: int, chunk: int, unroll: int) -> Array:
    """Blocks 0 .. ``blocks - 1``, a chunk at a time; ``[blocks, 16]``."""
    steps = -(-blocks // chunk)
    if steps <= 1:
        return _block(key, lax.iota(np.uint32, blocks), nonce, unroll)
    # Chunks of equal size, the last one shifted back so that it overlaps the one before it: at most
    # `steps` blocks are made twice, and no second copy of the stream is needed to trim it.
    chunk = -(-blocks // steps)

    def write(step: Array, stream: Array) -> Array:
        first = lax.convert_element_type(step, np.uint32) * np.uint32(chunk)
        first = jnp.minimum(first, np.uint32(blocks - chunk))
        made = _block(key, lax.iota(np.uint32, chunk) + first, nonce, unroll)
        return lax.dynamic_update_slice(stream, made, (first, np.uint32(0)))

    empty = jnp.broadcast_to(_zero(key[0], nonce[0]), (blocks, _BLOCK_WORDS))
    return lax.fori_loop(0, steps, write, empty)


@partial(jax.jit, static_argnums=2)
def _keystream(key: Array, nonce: Array, words: int) -> Array:
    """The keystream (RFC 8439, section 2.4) from block 0 on, ``[words]``."""
    blocks = -(-words // _BLOCK_WORDS)
    if blocks > _MAX_BLOCKS:  # it would repeat
        raise ValueError(
            f"{words} words of ChaCha20 keystream are {blocks} blocks, but the 32-bit counter "
            f"allows {_MAX_BLOCKS}; split the key and draw a part of the words from each of its "
            "children"
        )
    make = partial(_blocks, blocks=blocks)
    on_cpu = partial(make, chunk=_CPU_CHUNK, unroll=1)
    elsewhere = partial(make, chunk=_ACCELERATOR_CHUNK, unroll=_ACCELERATOR_UNROLL)
    if words <= _CPU_CHUNK * _BLOCK_WORDS:  # one piece on every platform
        stream = on_cpu(key, nonce)
    else:
        stream = lax.platform_dependent(key, nonce, cpu=on_cpu, default=elsewhere)
    return stream.reshape(-1)[:words]


# Jitted, so that a call outside jit is one dispatch and its constants are not transferred.
@partial(jax.jit, static_argnums=(1, 2))
def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    dtype = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}.get(bit_width)
    if dtype is None or jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"ChaCha20 makes 8, 16, 32 or (with jax_enable_x64) 64 random bits, not {bit_width}"
        )
    size = math.prod(shape)
    words = _keystream(key, _RANDOM_BITS, -(-size * bit_width // 32))
    return _numbers(words, bit_width, dtype)[:size].reshape(shape)


def _numbers(words: Array, bit_width: int, dtype: Any) -> Array:
    """The numbers of another width held in 32-bit words, little-endian, ``[numbers]``."""
    # Shifts rather than a bit cast: they are little-endian on every platform.
    if bit_width == 64:
        low, high = (lax.convert_element_type(words[i::2], dtype) for i in (0, 1))
        return low | (high << np.uint64(32))
    if bit_width < 32:
        shifts = lax.broadcasted_iota(np.uint32, (1, 32 // bit_width), 1) * np.uint32(bit_width)
        return lax.convert_element_type(words[:, None] >> shifts, dtype).reshape(-1)
    return words


def bits_from(key: Array, part: Array, count: int, dtype: Any) -> Array:
    """A part of the output of ``jax.random.bits`` for a key, without computing what precedes it.

    Args:
        key: a typed key of `chacha20_impl`.
        part: unsigned or signed integer: numbers ``part * count`` and the following.
        count: how many numbers a part has; a whole number of 64-byte blocks.
        dtype: the dtype of the numbers, unsigned.

    Returns:
        ``[count]``, as ``jax.random.bits(key, (n,), dtype)[part * count:][:count]``.
    """
    dtype = np.dtype(dtype)
    blocks = count * dtype.itemsize // (4 * _BLOCK_WORDS)
    counter = lax.iota(np.uint32, blocks)
    counter += lax.convert_element_type(part, np.uint32) * np.uint32(blocks)
    words = _block(jax.random.key_data(key), counter, _RANDOM_BITS).reshape(-1)
    return _numbers(words, 8 * dtype.itemsize, dtype)


@partial(jax.jit, static_argnums=1)
def _split(key: Array, shape: tuple[int, ...]) -> Array:
    words = _keystream(key, _SPLIT, math.prod(shape) * _KEY_WORDS)
    return words.reshape(*shape, _KEY_WORDS)


@jax.jit
def _fold_in(key: Array, data: Array) -> Array:
    # jax.random.fold_in has converted the data to uint32 (and refused an int that doesn't fit).
    return _block(key, lax.convert_element_type(data, np.uint32), _FOLD_IN)[:_KEY_WORDS]


@jax.jit
def _seed(seed: Array) -> Array:
    # Sign-extended to two words, so that jax_enable_x64 doesn't change what a seed means.
    if seed.dtype.itemsize < 4:
        seed = lax.convert_element_type(seed, np.int32)
    half = np.asarray(16, seed.dtype)
    parts = (seed, (seed >> half) >> half)  # never shifts an int32 by all of its bits
    words = jnp.stack([lax.convert_element_type(part, np.uint32) for part in parts])
    key = jnp.concatenate([words, jnp.zeros(_KEY_WORDS - 2, np.uint32)])
    return _block(key, np.uint32(0), _SEED)[:_KEY_WORDS]


# Defined once, here: JAX considers two implementations equal only if their functions are.
chacha20_impl: Any = jax.extend.random.define_prng_impl(
    key_shape=(_KEY_WORDS,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="selcrypt_chacha20",
    tag="chacha20",
)
"""ChaCha20 for ``jax.random``. Make keys with `chacha20_key`.

``jax.random.key(seed, impl=chacha20_impl)`` works too, but only use it in tests: such a key has at
most 64 bits of entropy, and 32 without ``jax_enable_x64`` (then -1 and ``2**32 - 1`` are the
same seed, because JAX truncates the integer before this module sees it).

Drawing more than ``2**32`` blocks from one key (``2**36`` words of bits, ``2**33`` children) raises
``ValueError``. Without ``jax_enable_x64``, ``jax.random.bits(key, shape, "uint64")`` warns and
returns uint32 words, as it does for JAX's own implementations.
"""


@forgetting
def chacha20_key(secret: bytes) -> Array:
    """A typed ``jax.random`` key from 32 secret bytes.

    The key consists of exactly these bytes. The ``repr`` of a JAX key shows them: don't log it.

    Args:
        secret: 32 bytes from a cryptographic source (``secrets.token_bytes(32)``, a key
            derivation function).

    Returns:
        A scalar key array with the implementation ``chacha20_impl``.

    Raises:
        TypeError: ``secret`` is not ``bytes``, or the call is inside a compiled function.
        ValueError: ``secret`` is not 32 bytes long.

    Examples:
        >>> noise = jax.random.normal(chacha20_key(bytes(secret)), (3,))
    """
    if not isinstance(secret, bytes):
        raise TypeError(f"secret has type {type(secret).__name__} but expected bytes")
    if len(secret) != 4 * _KEY_WORDS:
        raise ValueError(f"secret has {counted(len(secret), 'byte')} but expected {4 * _KEY_WORDS}")
    words = jax.device_put(np.frombuffer(secret, "<u4").astype(np.uint32))
    if isinstance(words, Tracer):
        raise TypeError(
            "chacha20_key, ring_keys: expected a call outside compiled functions, got one inside: "
            "the key would be written into the program, and with it into JAX's cache on disk. Make "
            "the keys first, and pass them in as arguments."
        )
    return jax.random.wrap_key_data(words, impl=chacha20_impl)
