"""The lossless cipher on leaves that are spread over several devices, or hosts.

No device ever holds such a leaf. The stream form is done shard by shard, with nothing sent between
devices; the permuting form in chunks of whole permutation blocks, whose weights pass through every
device, one bounded chunk after the other. The bits are those of one device.
"""

import math
import operator
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from .._tree.groups import unit_positions
from .._tree.names import padded, unsigned
from .engine_numpy import LeafTables, leaf_chunks, mask_words
from .lossless import BLOCK, LosslessCipher

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
        dtype=unsigned(leaf),
        inverse=inverse,
        most=min(max(shard // _ROOM, BLOCK), _CHUNK),
    )


def stream_tables(
    leaf: Array,
    rings: Sequence[tuple[np.ndarray, bytes]],
    *,
    cipher: LosslessCipher,
    fine: int,
) -> tuple[Array, Array]:
    """What the stream form does, for each device with its own shard.

    Args:
        leaf: the array, for its shape, dtype and sharding.
        rings: disjoint masks, each with the key of the ring in this leaf.
        cipher: see `LosslessCipher`.
        fine: ``cipher.fine_mask(dtype)``.

    Returns:
        Positions in the shard and what is masked there, ``[*mesh, weights]``, a row on each device.
    """
    sharding: Any = leaf.sharding
    mesh, shard_shape = sharding.mesh, sharding.shard_shape(leaf.shape)
    here = {
        _shard_number(shard.index, leaf.shape, shard_shape) for shard in leaf.addressable_shards
    }
    dtype = unsigned(leaf)
    parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {number: [] for number in here}
    most = np.zeros(math.prod(map(operator.floordiv, leaf.shape, shard_shape)), np.int64)
    for mask, key in rings:
        positions = unit_positions(leaf.shape, [mask], cipher.unit)[0].reshape(-1)
        shards, local = _in_shards(positions, leaf.shape, shard_shape)
        most += np.bincount(shards, minlength=len(most))
        own = np.flatnonzero(np.isin(shards, list(here)))
        words = mask_words(key, own, len(positions), dtype, fine)
        for number in here:
            which = shards[own] == number
            parts[number].append((local[own[which]], words[which]))
    room = padded(int(most.max()))
    # Of a device that has more room than weights the rest is out of bounds.
    found = {
        number: (
            _filled([p for p, _ in part], room, np.int32, math.prod(shard_shape)),
            _filled([w for _, w in part], room, dtype, 0),
        )
        for number, part in parts.items()
    }
    indices = sharding.devices_indices_map(leaf.shape)
    one_each = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))

    def row(index: Any, which: int) -> np.ndarray:
        place = tuple(part.start or 0 for part in index[:-1])
        number = _shard_number(indices[mesh.devices[place]], leaf.shape, shard_shape)
        return found[number][which].reshape(*[1] * mesh.devices.ndim, room)

    positions, words = (
        jax.make_array_from_callback((*mesh.devices.shape, room), one_each, partial(row, which=i))
        for i in range(2)
    )
    return positions, words


def _filled(parts: Sequence[np.ndarray], room: int, dtype: Any, fill: int) -> np.ndarray:
    rest = np.full(room - sum(map(len, parts)), fill, dtype)
    return np.concatenate([*parts, rest])


def _shard_number(index: Any, shape: Sequence[int], shard_shape: Sequence[int]) -> int:
    """The number of a shard among all of them, in C order."""
    number = 0
    for part, size, width in zip(index, shape, shard_shape, strict=True):
        number = number * (size // width) + (part.start or 0) // width
    return number


def _in_shards(
    positions: np.ndarray, shape: Sequence[int], shard_shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The number of the shard that each flat position lies in, and where it lies there."""
    shards, local = np.zeros_like(positions), np.zeros_like(positions)
    shards_so_far = stride = 1
    rest = positions
    for size, width in zip(reversed(shape), reversed(shard_shape), strict=True):
        rest, index = np.divmod(rest, np.int32(size))
        if width < size:
            shard, index = np.divmod(index, np.int32(width))
            shards += shard * np.int32(shards_so_far)
            shards_so_far *= size // width
        local += index * np.int32(stride)
        stride *= width
    return shards, local
