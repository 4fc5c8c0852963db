"""The lossless cipher with tables that NumPy and OpenSSL make, and JAX that does what they say.

For arrays on CPUs, where XLA sorts a row at a time on one core, and for leaves on several devices,
each of which is sent its own part of the tables, or a bounded one. `_lossless` has the definition.
"""

import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from .._keys.chacha import chacha20_impl
from .._tree.groups import Ring
from .._tree.names import padded, unsigned, without_explicit_axes
from .engine_numpy import LeafTables, leaf_tables
from .engine_sharded import (
    axes_of,
    positions_in_shard,
    sharded_tables,
    shards_of,
    stream_tables,
)
from .lossless import LosslessCipher

T = TypeVar("T")


def on_host(leaves: Mapping[str, Array], keys: Key[Array, " keys"]) -> bool:
    """Whether NumPy and OpenSSL may make the tables.

    They can where ChaCha20 keys are known. On CPUs they take a tenth of the time of XLA's sort; for
    leaves on several devices each is sent its own part, or a bounded one. On one accelerator the
    tables would have to be moved, and are made where they are used. The bits are the same.
    """
    if isinstance(keys, Tracer) or jax.random.key_impl(keys) != chacha20_impl:
        return False
    for leaf in leaves.values():
        if isinstance(leaf, Tracer):
            return False
        if shards_of(leaf) == 1:
            if next(iter(leaf.devices())).platform != "cpu":
                return False
        elif not isinstance(leaf.sharding, NamedSharding):
            return False
    return True


def run_on_host(
    cipher: LosslessCipher,
    leaves: Mapping[str, Array],
    rings: Sequence[Ring],
    keys: Key[Array, " keys"],
    *,
    inverse: bool,
    donate: Collection[str],
) -> dict[str, Array]:
    """See `Cipher.run`; where `on_host` says so."""
    words = np.asarray(jax.random.key_data(keys)).astype("<u4")
    of_leaf: dict[str, list[tuple[np.ndarray, bytes]]] = {}
    for ring, key in zip(rings, words, strict=False):
        of_leaf.setdefault(ring.name, []).append((ring.mask, key.tobytes()))

    result = dict(leaves)
    here = []
    # Bits are moved, nothing is computed: a NaN in a leaf is not ours to report.
    with jax.debug_nans(False), jax.debug_infs(False):
        for name, own in of_leaf.items():
            if shards_of(leaves[name]) == 1:
                here.append(name)
            else:
                result[name] = _run_sharded(
                    cipher, leaves[name], own, inverse=inverse, donate=name in donate
                )

        def tables(name: str) -> tuple[str, LeafTables]:
            leaf = leaves[name]
            made = leaf_tables(
                leaf.shape,
                of_leaf[name],
                cipher=cipher,
                fine=cipher.fine_mask(leaf.dtype),
                dtype=unsigned(leaf),
                inverse=inverse,
            )
            return name, _padded_tables(made, leaf.size)

        for name, made in _in_turn(tables, here):
            move = _move_in_place if name in donate else _move
            leaf = leaves[name]
            options = {"inverse": inverse, "as_it_is": _moves_as_it_is(leaf)}
            result[name] = move(leaf, *jax.device_put(made), **options)
    return result


def _in_turn(function: Callable[[str], T], items: Sequence[str]) -> Iterator[T]:
    """The results in order, made on all processors, and few of them at a time.

    For tables take three times the room of what is selected.
    """
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[T]] = deque()
        for item in items:
            if len(waiting) > workers:
                yield waiting.popleft().result()
            waiting.append(pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()


def _run_sharded(
    cipher: LosslessCipher,
    leaf: Array,
    rings: Sequence[tuple[np.ndarray, bytes]],
    *,
    inverse: bool,
    donate: bool,
) -> Array:
    """A leaf on several devices, see `_lossless_sharded`."""
    fine = cipher.fine_mask(leaf.dtype)
    as_it_is = _moves_as_it_is(leaf)
    if not cipher.permute:
        tables = stream_tables(leaf, rings, cipher=cipher, fine=fine)
        mask_shards = _mask_shards_in_place if donate else _mask_shards
        return mask_shards(leaf, *tables, as_it_is=as_it_is, sharding=leaf.sharding)
    ours = donate
    for part in sharded_tables(leaf, rings, cipher=cipher, fine=fine, inverse=inverse):
        # NumPy's arrays and not JAX's: every process has the same ones.
        leaf = (_move_spread_in_place if ours else _move_spread)(
            leaf,
            *_padded_tables(part, leaf.size),
            inverse=inverse,
            as_it_is=as_it_is,
            sharding=leaf.sharding,
        )
        ours = True
    return leaf


def _padded_tables(tables: LeafTables, size: int) -> LeafTables:
    """Padded with positions out of bounds, so that few lengths are compiled."""
    if tables.positions is None:
        return tables
    count = len(tables.positions)
    room = padded(count) - count
    if not room:
        return tables
    behind = np.arange(count, count + room, dtype=np.int32)
    return LeafTables(
        np.concatenate([tables.positions, np.full(room, size, np.int32)]),
        None if tables.source is None else np.concatenate([tables.source, behind]),
        None if tables.mask is None else np.pad(tables.mask, (0, room)),
    )


def _move_leaf(
    leaf: Array,
    positions: Array | None,
    source: Array | None,
    mask: Array | None,
    *,
    inverse: bool,
    as_it_is: bool,
    gather: Callable[[Array], Array] = lambda ring: ring,
) -> Array:
    """Does with a leaf what its tables say, see `LeafTables`.

    Args:
        leaf: the array.
        positions: see `LeafTables`, as are the next two; out of bounds nothing happens.
        source: see there.
        mask: see there.
        inverse: whether to decrypt.
        as_it_is: see `_moves_as_it_is`.
        gather: of the part of the ring that a device has makes the ring.
    """
    word = unsigned(leaf)
    bits = (leaf if as_it_is else lax.bitcast_convert_type(leaf, word)).reshape(-1)
    ring = bits if positions is None else bits.at[positions].get(mode="fill", fill_value=0)
    ring = gather(lax.bitcast_convert_type(ring, word))
    if inverse and mask is not None:
        ring = ring ^ mask
    if source is not None:
        ring = ring.at[source].get(mode="promise_in_bounds")
    if not inverse and mask is not None:
        ring = ring ^ mask
    ring = lax.bitcast_convert_type(ring, bits.dtype)
    bits = ring if positions is None else bits.at[positions].set(ring, mode="drop")
    return lax.bitcast_convert_type(bits.reshape(leaf.shape), leaf.dtype)


def _move_whole_leaf(leaf: Array, *tables: Any, inverse: bool, as_it_is: bool) -> Array:
    """As `_move_leaf`, of a leaf on one device, which may be one of a mesh with explicit axes."""
    move = partial(_move_leaf, inverse=inverse, as_it_is=as_it_is)
    return without_explicit_axes(move, leaf)(leaf, *tables)


def _move_leaf_spread(
    leaf: Array,
    positions: Array,
    source: Array | None,
    mask: Array | None,
    *,
    inverse: bool,
    as_it_is: bool,
    sharding: NamedSharding,
) -> Array:
    """As `_move_leaf`, of a leaf on several devices.

    Each reads and writes the weights of the ring that are its own, and has all of the ring between.
    """
    axes = tuple(axis for part in sharding.spec for axis in axes_of(part))

    def gather(ring: Array) -> Array:
        return lax.psum(ring, axes) if axes else ring

    def move(shard: Array, positions: Array, *tables: Array | None) -> Array:
        own = positions_in_shard(positions, leaf.shape, shard.shape, sharding)
        return _move_leaf(shard, own, *tables, inverse=inverse, as_it_is=as_it_is, gather=gather)

    whole = PartitionSpec()
    moved: Any = jax.shard_map(
        move, mesh=sharding.mesh, in_specs=(sharding.spec, whole, whole, whole),
        out_specs=sharding.spec,
    )  # fmt: skip
    return moved(leaf, positions, source, mask)


def _mask_leaf_spread(
    leaf: Array, positions: Array, words: Array, *, as_it_is: bool, sharding: NamedSharding
) -> Array:
    """The stream form: each device masks what it has, see `stream_tables`."""

    def mask(shard: Array, positions: Array, words: Array) -> Array:
        tables = positions.reshape(-1), None, words.reshape(-1)
        return _move_leaf(shard, *tables, inverse=False, as_it_is=as_it_is)

    own = PartitionSpec(*sharding.mesh.axis_names)
    masked: Any = jax.shard_map(
        mask, mesh=sharding.mesh, in_specs=(sharding.spec, own, own), out_specs=sharding.spec,
        check_vma=False,  # replicas have tables of their own, which are the same
    )  # fmt: skip
    return masked(leaf, positions, words)


def _moves_as_it_is(leaf: Array) -> bool:
    """Whether a leaf may be moved without a view of its bits.

    XLA copies the whole leaf for such a view, and again on the way back. But a float that is moved
    as a float may lose its NaN payload, where a backend computes in another format: not float32 on
    a CPU.
    """
    return leaf.dtype == jnp.float32 and next(iter(leaf.devices())).platform == "cpu"


_OPTIONS = ("inverse", "as_it_is")
_move = jax.jit(_move_whole_leaf, static_argnames=_OPTIONS)
_move_in_place = jax.jit(_move_whole_leaf, static_argnames=_OPTIONS, donate_argnames="leaf")
_SPREAD = (*_OPTIONS, "sharding")
_move_spread = jax.jit(_move_leaf_spread, static_argnames=_SPREAD)
_move_spread_in_place = jax.jit(_move_leaf_spread, static_argnames=_SPREAD, donate_argnames="leaf")
_mask_shards = jax.jit(_mask_leaf_spread, static_argnames=("as_it_is", "sharding"))
_mask_shards_in_place = jax.jit(
    _mask_leaf_spread, static_argnames=("as_it_is", "sharding"), donate_argnames="leaf"
)
