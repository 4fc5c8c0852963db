"""The NumPy engine on JAX arrays: leaves on a CPU, or sharded over several devices or hosts.

A leaf is copied to this host, rewritten there and handed back, so no device ever holds more than
its shard. In the stream form nothing is sent between hosts. Permuted weights are exchanged, in
bounded parts, and then every host computes the same permutation.
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

_ALIGNMENT = 64  # bytes: XLA uses memory with this alignment without a copy
_EXCHANGED = 1 << 20  # weights that hosts exchange at a time


def on_host(leaf: Array) -> bool:
    """Whether this engine handles a leaf, given that ChaCha20 keys are known.

    On CPUs it takes a tenth of the time of XLA's sort. A leaf on a single accelerator stays there.
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
    # Hosts must exchange leaves in the same order. Other leaves run on all cores, the largest
    # first, so that none is left over for a single core at the end.
    alone = [name for name in leaves if is_spread(leaves[name])]
    together = sorted(leaves.keys() - set(alone), key=lambda name: -leaves[name].size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for names, mapped in ((alone, map), (together, pool.map)):
            for name, bits in zip(names, mapped(rewritten, names), strict=True):
                # In this thread: JAX's configuration is thread-local.
                result[name] = handed(bits.view(leaves[name].dtype), leaves[name])
                if name in donate:
                    leaves[name].delete()
    return result


def copied(leaf: Array) -> np.ndarray:
    """The bits of a leaf, or of this process's part of it, with zeros elsewhere."""
    word, size = unsigned(leaf), leaf.size * leaf.dtype.itemsize
    # Aligned, so that JAX can take over the memory. Zero pages use no memory until written.
    spread = is_spread(leaf)
    memory = (np.zeros if spread else np.empty)(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    bits = memory[start : start + size].view(word).reshape(leaf.shape)
    for shard in leaf.addressable_shards:
        if spread or shard.replica_id == 0:
            bits[shard.index] = jax.device_get(shard.data).view(word)
    return bits


def parts(leaf: Array) -> list[tuple[slice, ...]]:
    """The distinct parts of a leaf that this process holds; the whole leaf if it holds that."""
    if not is_spread(leaf):
        return [(slice(None),) * leaf.ndim]
    return list({repr(shard.index): shard.index for shard in leaf.addressable_shards}.values())


def _exchange(bits: np.ndarray, positions: np.ndarray) -> None:
    """Exchanges the bits at these positions; each process holds some of them, and zeros."""
    from jax.experimental import multihost_utils

    for start in range(0, len(positions), _EXCHANGED):
        here = positions[start : start + _EXCHANGED]
        # As bytes, which JAX never truncates, however it is configured.
        found = multihost_utils.process_allgather(bits[here].view(np.uint8))
        bits[here] = np.bitwise_or.reduce(np.asarray(found)).astype(np.uint8).view(bits.dtype)


def handed(array: np.ndarray, like: Array) -> Array:
    """Hands an array over to JAX, placed where ``like`` lies."""
    if like.committed:
        return put(array, like.sharding)
    (device,) = like.devices()
    with jax.default_device(device):  # an uncommitted array stays uncommitted
        return jax.device_put(array)
