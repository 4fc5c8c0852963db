"""The NumPy engine on JAX arrays: leaves on a CPU, and leaves spread over several devices or hosts.

A leaf is copied to this host, rewritten there and handed back, so that no device ever holds more
than its shard. In the stream form nothing passes between hosts. Permuted weights do, in bounded
parts, and every host then makes the same permutation.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from .._tree.groups import Ring, unit_places
from .._tree.hosts import is_spread, put
from .._tree.names import unsigned
from .blocks import Form
from .engine_numpy import leaf_key, rewrite_ring

_ALIGNMENT = 64  # bytes: XLA uses memory so aligned without a copy
_EXCHANGED = 1 << 20  # weights that hosts tell each other at a time


def on_host(leaf: Array) -> bool:
    """Whether this engine takes a leaf, given that ChaCha20 keys are known.

    On CPUs it takes a tenth of the time of XLA's sort. A leaf on one accelerator stays there.
    """
    if isinstance(leaf, Tracer):
        return False
    devices = leaf.sharding.device_set
    return len(devices) > 1 or next(iter(devices)).platform == "cpu"


def run_on_host(
    cipher: Form,
    leaves: Mapping[str, Array],
    rings: Sequence[Ring],
    secrets: Sequence[bytes],
    *,
    inverse: bool,
    donate: Collection[str],
) -> dict[str, Array]:
    """See `Cipher.run`; ``secrets`` as in `RingKeys`."""
    of_leaf: dict[str, list[tuple[np.ndarray, bytes]]] = {name: [] for name in leaves}
    for ring, secret in zip(rings, secrets, strict=True):
        if ring.name in of_leaf:
            of_leaf[ring.name].append((ring.mask, secret))

    def rewritten(name: str) -> np.ndarray:
        leaf, own = leaves[name], of_leaf[name]
        bits = copied(leaf)
        flat, fine = bits.reshape(-1), cipher.fine_mask(leaf.dtype)
        if cipher.permute and is_spread(leaf):
            for mask, _ in own:
                _exchange(flat, np.flatnonzero(np.broadcast_to(mask, leaf.shape)))
        for mask, secret in own:
            groups = None if mask.all() else np.flatnonzero(mask)
            places = unit_places(leaf.shape, mask.shape, groups, cipher.unit)
            key = leaf_key(secret, name)
            rewrite_ring(flat, places, key, cipher=cipher, fine=fine, inverse=inverse)
        return bits

    result = {}
    # Hosts must exchange leaf by leaf, in one order. Everything else has all cores, the largest
    # leaf first, so that no core is left with it at the end.
    alone = [name for name in leaves if is_spread(leaves[name])]
    together = sorted(leaves.keys() - set(alone), key=lambda name: -leaves[name].size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for names, mapped in ((alone, map), (together, pool.map)):
            for name, bits in zip(names, mapped(rewritten, names), strict=True):
                # In this thread: how JAX is configured is a thread's own.
                result[name] = handed(bits.view(leaves[name].dtype), leaves[name])
                if name in donate:
                    leaves[name].delete()
    return result


def copied(leaf: Array) -> np.ndarray:
    """The bits of a leaf, or of what this process has of it and zeros elsewhere."""
    word, size = unsigned(leaf), leaf.size * leaf.dtype.itemsize
    # Aligned, so that JAX takes the memory over. Pages of zeros take none until they are written.
    spread = is_spread(leaf)
    memory = (np.zeros if spread else np.empty)(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    bits = memory[start : start + size].view(word).reshape(leaf.shape)
    for shard in leaf.addressable_shards:
        if spread or shard.replica_id == 0:
            bits[shard.index] = jax.device_get(shard.data).view(word)
    return bits


def parts(leaf: Array) -> list[tuple[slice, ...]]:
    """The parts of a leaf that this process has, each once; the whole where it has that."""
    if not is_spread(leaf):
        return [(slice(None),) * leaf.ndim]
    return list({repr(shard.index): shard.index for shard in leaf.addressable_shards}.values())


def _exchange(bits: np.ndarray, positions: np.ndarray) -> None:
    """Gives every process the bits at these positions, of which each has some and zeros."""
    from jax.experimental import multihost_utils

    for start in range(0, len(positions), _EXCHANGED):
        here = positions[start : start + _EXCHANGED]
        # As bytes, which no configuration of JAX cuts.
        found = multihost_utils.process_allgather(bits[here].view(np.uint8))
        bits[here] = np.bitwise_or.reduce(np.asarray(found)).astype(np.uint8).view(bits.dtype)


def handed(array: np.ndarray, like: Array) -> Array:
    """An array that is JAX's from now on, where ``like`` lies."""
    if like.committed:
        return put(array, like.sharding)
    (device,) = like.devices()
    with jax.default_device(device):  # an array that is free to go anywhere stays so
        return jax.device_put(array)
