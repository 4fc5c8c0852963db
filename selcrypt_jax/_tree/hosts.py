"""Arrays sharded over the processes of several hosts.

Every process runs the same program, as JAX requires. An array that is needed whole is gathered in
every process, one array at a time.
"""

from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from .names import unsigned


def is_spread(array: Any) -> bool:
    """Whether this process holds only a part of an array."""
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def gathered(array: Any) -> np.ndarray:
    """The whole array, bit for bit, even if it is sharded over several hosts.

    Raises:
        ValueError: the array's sharding has no mesh.
    """
    if not is_spread(array):
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    if not isinstance(array.sharding, NamedSharding):
        raise ValueError(
            f"params: expected arrays on a mesh (NamedSharding), got {array.sharding}. Place them "
            "with jax.device_put."
        )
    # Sent as integers: CPU collectives do not preserve the bits of every float.
    bits = unsigned(array)

    def as_bits(array: Array) -> Array:
        if array.dtype == bool:
            return array.astype(bits)
        return lax.bitcast_convert_type(array, bits)

    everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
    whole = jax.jit(as_bits, out_shardings=everywhere)(array)
    return np.asarray(whole.addressable_data(0)).view(array.dtype)


def put(array: np.ndarray, sharding: jax.sharding.Sharding) -> Array:
    """Places an array that every process holds whole on a sharding."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def from_first(data: bytes) -> bytes:
    """The first process's bytes, in all processes."""
    if jax.process_count() == 1:
        return data
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    room = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        room[:] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(room)).astype(np.uint8).tobytes()


def the_same_everywhere(data: bytes) -> bool:
    """Whether all processes hold the same bytes; the length must be the same in each."""
    if jax.process_count() == 1:
        return True
    from jax.experimental import multihost_utils

    found = multihost_utils.process_allgather(np.frombuffer(data, np.uint8))
    return bool((found == found[:1]).all())
