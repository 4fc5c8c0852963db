"""Arrays that are spread over the processes of several hosts.

Every process runs the same program, as JAX wants it. What is needed as a whole passes through all
of them, one array at a time.
"""

from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from .names import unsigned


def is_spread(array: Any) -> bool:
    """Whether this process has only a part of an array."""
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def gathered(array: Any) -> np.ndarray:
    """The whole of an array, bit for bit, also where it is spread.

    Raises:
        ValueError: spread in a way that has no mesh.
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
    # Sent as integers: not every number goes through the communication of a CPU as it is.
    bits = unsigned(array)

    def as_bits(array: Array) -> Array:
        if array.dtype == bool:
            return array.astype(bits)
        return lax.bitcast_convert_type(array, bits)

    everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
    whole = jax.jit(as_bits, out_shardings=everywhere)(array)
    return np.asarray(whole.addressable_data(0)).view(array.dtype)


def put(array: np.ndarray, sharding: jax.sharding.Sharding) -> Array:
    """An array of which every process has the whole, as one that is spread."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def from_first(data: bytes) -> bytes:
    """What the first process has, in all of them."""
    if jax.process_count() == 1:
        return data
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    room = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        room[:] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(room)).astype(np.uint8).tobytes()


def the_same_everywhere(data: bytes) -> bool:
    """Whether all processes have the same bytes, of which there must be as many in each."""
    if jax.process_count() == 1:
        return True
    from jax.experimental import multihost_utils

    found = multihost_utils.process_allgather(np.frombuffer(data, np.uint8))
    return bool((found == found[:1]).all())
