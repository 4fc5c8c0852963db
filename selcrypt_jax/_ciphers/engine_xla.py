"""The lossless cipher in XLA: any device, any sharding, any `jax.random` keys, and under ``jit``.

`lossless` defines the cipher.
"""

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Key, PRNGKeyArray

from .._keys.chacha import bits_from, chacha20_impl
from .._tree.groups import Ring, unit_positions
from .._tree.names import padded, unsigned, without_explicit_axes
from .blocks import BLOCK, INDEX_BITS, MASK, PERMUTATION, Form, block_count
from .keys import RingKeys, key_by_key

_AT_ONCE = 1 << 12  # blocks whose keystream is held in memory together: 16 M weights

# Blocks that are drawn and sorted together. On a CPU the state of a few stays in the cache; an
# accelerator needs many to be busy, and has a cost for each program that it starts.
_CPU_BATCH = 16
_ACCELERATOR_BATCH = 1 << 10


def run_in_xla(
    cipher: Form,
    leaves: Mapping[str, Array],
    rings: Sequence[Ring],
    keys: RingKeys,
    *,
    inverse: bool,
    donate: Collection[str],
) -> dict[str, Array]:
    """See `Cipher.run`."""
    result = dict(leaves)
    started = set(donate)
    plans = [_plan(cipher, i, r, leaves[r.name]) for i, r in enumerate(rings) if r.name in leaves]
    for batch in _batches(plans):
        permutations = _tables(batch, keys.array, "permutation") if cipher.permute else None
        masks = _tables(batch, keys.array, "mask")
        for plans in _alike(batch):
            (name, fine), leaf = (plans[0].name, plans[0].fine), result[plans[0].name]
            # After the first ring, the array is our own and may be overwritten.
            ours = name in started and not isinstance(leaf, Tracer)
            started.add(name)
            positions = np.stack([plan.positions for plan in plans])
            sizes = np.array([(plan.units, plan.weights // plan.units) for plan in plans], np.int32)
            # Bits are only moved, not computed with: a NaN in the leaf is no error here.
            with jax.debug_nans(False), jax.debug_infs(False):
                result[name] = (_rewrite_in_place if ours else _rewrite)(
                    leaf,
                    *jax.device_put((positions, sizes)),
                    None if permutations is None else [permutations[p.ring] for p in plans],
                    [masks[plan.ring] for plan in plans] if fine else None,
                    fine=fine,
                    inverse=inverse,
                    flat=leaf.ndim < 2 or _is_whole(leaf),
                )
    return result


def _is_whole(leaf: Array) -> bool:
    """Whether a leaf lies on one device. Under the caller's jit it may be spread over all."""
    if isinstance(leaf, Tracer):
        return jax.device_count() == 1
    return len(leaf.sharding.device_set) == 1


def _read(bits: Array, positions: Array, *, flat: bool) -> Array:
    """The values at flat positions; 0 out of bounds.

    Flat arrays are faster. But flattening a leaf that is sharded along an axis other than its
    first would gather it on each device.
    """
    if flat:
        return bits.reshape(-1).at[positions].get(mode="fill", fill_value=0)
    return bits.at[_indices(positions, bits.shape)].get(mode="fill", fill_value=0)


def _write(bits: Array, positions: Array, values: Array, *, flat: bool) -> Array:
    """Writes these values at flat positions, and nothing out of bounds. See `_read`."""
    if flat:
        return bits.reshape(-1).at[positions].set(values, mode="drop").reshape(bits.shape)
    return bits.at[_indices(positions, bits.shape)].set(values, mode="drop")


def _indices(positions: Array, shape: Sequence[int]) -> tuple[Array, ...]:
    """Indices axis by axis; out-of-bounds positions stay out of bounds, on the first axis."""
    indices = []
    for size in reversed(shape[1:]):
        indices.append(positions % size)
        positions = positions // size
    return positions, *reversed(indices)


class _Plan(NamedTuple):
    """A ring in a leaf, ready to run.

    ``positions`` are flat, group by group, padded with the size of the leaf, which is out of
    bounds: read as 0 and not written. Padding to a few sizes limits the number of compilations.
    """

    ring: int
    name: str
    positions: np.ndarray
    units: int
    weights: int
    fine: int
    dtype: Any


def _plan(cipher: Form, index: int, ring: Ring, leaf: Array) -> _Plan:
    groups = np.flatnonzero(ring.mask)
    positions = unit_positions(leaf.shape, ring.mask.shape, groups, cipher.unit)
    units = len(positions)
    room = np.full(BLOCK * padded(block_count(positions.size)), leaf.size, np.int32)
    room[: positions.size] = positions.ravel()
    fine = cipher.fine_mask(leaf.dtype)
    return _Plan(index, ring.name, room, units, positions.size, fine, leaf.dtype)


def _alike(plans: Sequence[_Plan]) -> Iterable[list[_Plan]]:
    """Plans for one leaf with tables of one size, so that one small program runs all of them."""
    groups: dict[Any, list[_Plan]] = {}
    for plan in plans:
        size = len(plan.positions), padded(block_count(plan.units))
        groups.setdefault((plan.name, size), []).append(plan)
    return groups.values()


def _batches(plans: Sequence[_Plan]) -> list[list[_Plan]]:
    """Runs of plans of equal width with a bounded number of blocks each."""
    batches: list[list[_Plan]] = []
    for width in sorted({plan.dtype.itemsize for plan in plans}):
        size = _AT_ONCE
        for plan in plans:
            if plan.dtype.itemsize != width:
                continue
            blocks = len(plan.positions) // BLOCK
            if size + blocks > _AT_ONCE:
                batches.append([])
                size = 0
            batches[-1].append(plan)
            size += blocks
    return batches


def _tables(
    plans: Sequence[_Plan], keys: Key[Array, " keys"], kind: Literal["permutation", "mask"]
) -> dict[int, Array]:
    """Ring → its blocks of a permutation or of mask words, ``[padded blocks, BLOCK]``.

    One compiled call makes the blocks of all rings, whatever their sizes.
    """
    wanted = [plan for plan in plans if kind == "permutation" or plan.fine]
    if not wanted:
        return {}
    counts = [plan.units if kind == "permutation" else plan.weights for plan in wanted]
    rows = [padded(block_count(count)) for count in counts]
    ends = np.cumsum(rows)
    columns = np.zeros((3, padded(int(ends[-1]))), np.int32)
    for plan, count, size, end in zip(wanted, counts, rows, ends, strict=True):
        block = np.arange(size)
        length = np.maximum(-(-(count - block) // block_count(count)), 0)
        columns[:, end - size : end] = np.broadcast_arrays(plan.ring, block, length)
    ring, block, length = jax.device_put(tuple(columns))
    if kind == "permutation":
        table = _permutation_blocks(keys, ring, block, length)
    else:
        table = _mask_blocks(keys, ring, block, dtype=unsigned(wanted[0]))
    return {
        plan.ring: _rows(table, jax.device_put(np.int32(end - size)), size)
        for plan, size, end in zip(wanted, rows, ends, strict=True)
    }


@partial(jax.jit, static_argnums=2)
def _rows(table: Array, start: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(table, start, size)


def _map_blocks(
    block: Callable[..., Array], keys: Key[Array, " keys"], ring: Array, *columns: Array
) -> Array:
    block = key_by_key(block, keys)

    def blocks(*columns: Array, at_once: int) -> Array:
        return lax.map(lambda row: block(keys[row[0]], *row[1:]), columns, batch_size=at_once)

    few, many = (partial(blocks, at_once=n) for n in (_CPU_BATCH, _ACCELERATOR_BATCH))
    return lax.platform_dependent(ring, *columns, cpu=few, default=many)


def _block_of_bits(key: PRNGKeyArray, block: Array, dtype: Any) -> Array:
    """Block number ``block`` of a key's random numbers; see `lossless`."""
    if jax.random.key_impl(key) == chacha20_impl:
        return bits_from(key, block, BLOCK, dtype)
    return jax.random.bits(jax.random.fold_in(key, block), (BLOCK,), dtype)


@jax.jit
def _permutation_blocks(
    keys: Key[Array, " keys"], ring: Array, block: Array, length: Array
) -> Array:
    def permutation(key: PRNGKeyArray, block: Array, length: Array) -> Array:
        index = jnp.arange(BLOCK, dtype=jnp.uint32)
        bits = _block_of_bits(jax.random.fold_in(key, PERMUTATION), block, jnp.uint32)
        bits = bits >> INDEX_BITS
        # Padding behind the end of a short block sorts last and so stays there.
        last = jnp.uint32(2 ** (32 - INDEX_BITS) - 1)
        bits = jnp.where(index < length.astype(jnp.uint32), bits, last)
        order = lax.sort(bits << INDEX_BITS | index, is_stable=False)
        return (order & (BLOCK - 1)).astype(jnp.uint16)

    return _map_blocks(permutation, keys, ring, block, length)


@partial(jax.jit, static_argnames="dtype")
def _mask_blocks(keys: Key[Array, " keys"], ring: Array, block: Array, *, dtype: Any) -> Array:
    def words(key: PRNGKeyArray, block: Array) -> Array:
        return _block_of_bits(jax.random.fold_in(key, MASK), block, dtype)

    return _map_blocks(words, keys, ring, block)


def _rewrite_leaf(
    leaf: Array,
    positions: Array,
    sizes: Array,
    permutations: Sequence[Array] | None,
    masks: Sequence[Array] | None,
    **options: Any,
) -> Array:
    """Encrypts or decrypts rings of one leaf, one after the other.

    Args:
        leaf: the array.
        positions: ``[rings, weights]``, see `_Plan`.
        sizes: ``[rings, 2]``: the numbers of units and of weights in each.
        permutations: one per ring, or None without permutation.
        masks: one per ring, or None if nothing is masked.
        options: see `_rewrite_ring`.
    """
    # Only on unsigned views: a float that is moved as a float may lose its NaN payload.
    bits = lax.bitcast_convert_type(leaf, unsigned(leaf))
    tables: Any = positions, sizes, *(t and jnp.stack(t) for t in (permutations, masks))
    rewrite = partial(_rewrite_ring, **options)
    if len(positions) == 1:
        bits = rewrite(bits, *jax.tree.map(operator.itemgetter(0), tables))
    else:
        bits, _ = lax.scan(lambda bits, ring: (rewrite(bits, *ring), None), bits, tables)
    return lax.bitcast_convert_type(bits, leaf.dtype)


def _rewrite_ring(
    bits: Array,
    positions: Array,
    sizes: Array,
    permutation: Array | None,
    mask: Array | None,
    *,
    fine: int,
    inverse: bool,
    flat: bool,
) -> Array:
    """Encrypts or decrypts one ring.

    Args:
        bits: the leaf's bits, as unsigned integers.
        positions: ``[weights]``, see `_Plan`.
        sizes: the numbers of units and of weights.
        permutation: see `_tables`; None without permutation.
        mask: see `_tables`; None if nothing is masked.
        fine: mask of the fine bits.
        inverse: whether to decrypt.
        flat: see `_read`.
    """
    source = positions
    if permutation is not None:
        units, size = sizes[0], sizes[1]
        number = jnp.arange(len(positions), dtype=jnp.int32)
        unit, within = number // size, number % size
        blocks = -(-units // BLOCK)
        block, place = unit % blocks, unit // blocks
        place = permutation.at[block, place].get(mode="clip").astype(jnp.int32)
        moved = (place * blocks + block) * size + within
        source = positions[jnp.where(unit < units, moved, number)]
    read, written = (positions, source) if inverse else (source, positions)
    if mask is not None:
        mask = mask.reshape(-1) & jnp.array(fine, bits.dtype)
    if permutation is None and mask is not None and not flat:
        # Without permutation, every device masks its own shard: nothing of the leaf is sent.
        return bits ^ _write(jnp.zeros_like(bits), positions, mask, flat=False)
    ring = _read(bits, read, flat=flat)
    return _write(bits, written, ring if mask is None else ring ^ mask, flat=flat)


def _rewrite_sharded(leaf: Array, *tables: Any, **options: Any) -> Array:
    return without_explicit_axes(partial(_rewrite_leaf, **options), leaf)(leaf, *tables)


_OPTIONS = ("fine", "inverse", "flat")
_rewrite = jax.jit(_rewrite_sharded, static_argnames=_OPTIONS)
_rewrite_in_place = jax.jit(_rewrite_sharded, static_argnames=_OPTIONS, donate_argnames="leaf")
