"""The lossless cipher on leaves that are spread over several devices, or hosts.

No device ever holds such a leaf. The stream form is done shard by shard, with nothing sent between
devices; the permuting form in chunks of whole permutation blocks, whose weights pass through every
device, one bounded chunk after the other. The bits are those of one device.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array

from ._groups import unit_positions
from ._lossless import BLOCK, LosslessCipher
from ._lossless_numpy import LeafTables, leaf_chunks, mask_words

_CHUNK = 1 << 20  # weights that pass through all devices together
_ROOM = 32  # a chunk and its tables take about as much as this part of a shard, sixteen times


def shards_of(leaf: Array) -> int:
    """How many devices hold a part of it."""
    return len(leaf.sharding.device_set)


def axes_of(part: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a `PartitionSpec`."""
    return () if part is None else part if isinstance(part, tuple) else (part,)


def positions_in_shard(
    positions: Array,
    shape: Sequence[int],
    shard_shape: Sequence[int],
    sharding: NamedSharding,
) -> Array:
    """Flat positions in a leaf as those in the shard of this device, inside of `jax.shard_map`.

    Args:
        positions: in the leaf; further ones than it has are out of bounds.
        shape: of the leaf.
        shard_shape: of its shards.
        sharding: of the leaf.

    Returns:
        Positions in the shard; those in others are out of bounds.
    """
    size = math.prod(shard_shape)
    local = jnp.zeros_like(positions)
    inside = positions < math.prod(shape)
    stride = 1
    spec = [*sharding.spec, *[None] * len(shape)]
    for axis in reversed(range(len(shape))):
        index = positions % shape[axis]
        positions = positions // shape[axis]
        if axes := axes_of(spec[axis]):
            index = index - lax.axis_index(axes) * shard_shape[axis]
            inside = inside & (index >= 0) & (index < shard_shape[axis])
        local = local + index * stride
        stride *= shard_shape[axis]
    return jnp.where(inside, local, size)


def sharded_tables(
    leaf: Array,
    rings: Sequence[tuple[np.ndarray, bytes]],
    *,
    cipher: LosslessCipher,
    fine: int,
    inverse: bool,
) -> Iterator[LeafTables]:
    """Tables for the permuting form, a bounded chunk after the other.

    Args:
        leaf: the array, for its shape, dtype and sharding.
        rings: disjoint masks, each with the key of the ring in this leaf.
        cipher: see `LosslessCipher`.
        fine: ``cipher.fine_mask(dtype)``.
        inverse: whether to decrypt.
    """
    shard = int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
    yield from leaf_chunks(
        leaf.shape,
        rings,
        cipher=cipher,
        fine=fine,
        dtype=np.dtype(f"u{leaf.dtype.itemsize}"),
        inverse=inverse,
        most=min(max(shard // _ROOM, BLOCK), _CHUNK),
    )


def stream_by_shard(
    leaf: Array,
    rings: Sequence[tuple[np.ndarray, bytes]],
    *,
    cipher: LosslessCipher,
    fine: int,
    move: Any,
) -> Array:
    """The stream form, which is its own inverse.

    Args:
        leaf: the array.
        rings: disjoint masks, each with the key of the ring in this leaf.
        cipher: see `LosslessCipher`.
        fine: ``cipher.fine_mask(dtype)``.
        move: ``(shard, positions, None, mask) -> shard``, on the device of the shard.
    """
    dtype = np.dtype(f"u{leaf.dtype.itemsize}")
    selected = []
    for mask, key in rings:
        positions, _ = unit_positions(leaf.shape, [mask], cipher.unit)
        selected.append((positions.reshape(-1), key))
    known: dict[Any, LeafTables] = {}  # replicas have the same tables
    parts = []
    for shard in leaf.addressable_shards:
        bounds = tuple(s.indices(size)[:2] for s, size in zip(shard.index, leaf.shape, strict=True))
        if bounds not in known:
            known[bounds] = _tables_of_shard(selected, leaf.shape, bounds, dtype, fine)
        tables = known[bounds]
        parts.append(
            move(shard.data, tables.positions, None, tables.mask)
            if len(tables.positions)
            else shard.data
        )
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def _tables_of_shard(
    selected: Sequence[tuple[np.ndarray, bytes]],
    shape: Sequence[int],
    bounds: Sequence[tuple[int, int]],
    dtype: np.dtype,
    fine: int,
) -> LeafTables:
    """Those of the selected weights that lie in a shard, by their positions in it."""
    found, words = [], []
    for positions, key in selected:
        numbers = np.arange(len(positions))
        rest = positions
        local = np.zeros(len(positions), np.int32)
        stride = 1
        # From the last axis on, and only with what is still inside.
        for axis in reversed(range(len(shape))):
            start, stop = bounds[axis]
            rest, index = np.divmod(rest, np.int32(shape[axis]))
            if stop - start < shape[axis]:
                inside = (index >= start) & (index < stop)
                numbers, rest, local = numbers[inside], rest[inside], local[inside]
                index = index[inside] - np.int32(start)
            local += index * np.int32(stride)
            stride *= stop - start
        found.append(local)
        words.append(mask_words(key, numbers, len(positions), dtype, fine))
    return LeafTables(np.concatenate(found), None, np.concatenate(words))
