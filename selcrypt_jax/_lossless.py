"""The lossless cipher: bits that carry the distribution are moved about, the others masked.

On the bit patterns of a ring's weights in a leaf, in C order (with ``unit="group"``: group by
group, in C order of the mask)::

    c = π(x) XOR (k AND F)          x = π⁻¹(c XOR (k AND F))

with a keyed permutation π, a keystream k, and the dtype's *fine bits* F. Integer arithmetic only,
so every device, every sharding and every engine gives the same bits.

How π and k are made (``B`` = 1024, ``n`` units, ``b = ceil(n / B)`` blocks):

- block r holds the units ``r, r + b, r + 2b, …``: a sample spread over the whole ring. The units
  of a block are sorted by 22 random bits, ties by position: bits of
  ``fold_in(fold_in(key, 0), r)``, the upper 22 of 32. That a pair ties with probability 2⁻²² is
  a bias of 2⁻²³ in its order; the information in it is under 2⁻²⁵ bits a block.
- weight number i of the ring is masked with number ``i mod B`` of the bits of
  ``fold_in(fold_in(key, 1), i div B)``, of the width of the dtype.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Key, PRNGKeyArray

from ._masks import Ring
from ._tree import group_positions, padded, without_explicit_axes

BLOCK = 1024
_INDEX_BITS = 10
_PERMUTATION, _MASK = 0, 1  # domains of the key of a ring in a leaf
_MINIMUM_HIDING = 128  # bits
_COARSE_MANTISSA = 3  # top mantissa bits that are moved and not masked: eighths of an octave
_AT_ONCE = 1 << 14  # blocks whose keystream is held in memory together: 16 M weights


@dataclass(frozen=True)
class LosslessCipher:
    """The default cipher: exact on every dtype, with no side data.

    Attributes:
        unit: what the permutation moves: ``"weight"``, single weights; ``"group"``, whole groups
            of the mask, so that a kernel still looks like one.
        permute: ``False`` is the *stream* form: no permutation, and by default the sign and the
            whole mantissa are masked. It keeps the histogram of octaves of |w| only.
        fine_bits: how many of the lowest bits are masked. By default all mantissa bits but the
            top three (20 of float32, 4 of bfloat16, 7 of float16, none of float8), none of an
            integer's; without `permute`: sign and mantissa, and all bits of an integer.

    With the defaults the signed histogram in eighths of an octave is kept exactly, in every ring
    of every leaf and in every block of up to 1,024 of its units; given that histogram nothing
    else leaks. A lossless cipher in place that keeps the whole histogram can only be a
    permutation, so this is what there is.

    How much a ring hides depends on its size in each leaf. `check` refuses less than 128 bits,
    masked bits included; but masked bits move a weight by less than an eighth, so what a thief
    has to guess *roughly* is the order alone: 18 bits for one 3×3 kernel, 237 for six. Give a
    leaf dozens of weights a ring, rather than one kernel.

    Equal weights cannot hide among each other: of an int8 leaf of zeros nothing changes, and a
    BatchNorm scale of ones stays within an eighth of one. The size check does not see values.

    Masking may turn a number into NaN or back where the largest exponent holds both (float8
    e4m3fn), or Inf into NaN in the stream form. Encrypted weights may then not run; they
    decrypt to the same bits all the same.
    """

    unit: Literal["weight", "group"] = "weight"
    permute: bool = True
    fine_bits: int | None = None

    def __post_init__(self) -> None:
        if self.unit not in ("weight", "group"):
            raise ValueError(f"unit: expected 'weight' or 'group', got {self.unit!r}.")
        if self.fine_bits is not None and operator.index(self.fine_bits) < 0:
            raise ValueError(f"fine_bits: expected at least 0, got {self.fine_bits}.")

    def fine_mask(self, dtype: Any) -> int:
        """The fine bits F of a dtype.

        Raises:
            ValueError: more `fine_bits` than the dtype has, or a dtype of less than eight bits.
        """
        dtype = jnp.dtype(dtype)
        if jnp.issubdtype(dtype, jnp.floating):
            info = jnp.finfo(dtype)
            width, mantissa = info.bits, info.nmant
            signed = float(info.min) < 0
            stream = (1 << mantissa) - 1 | (signed << (width - 1))
            default, most = max(mantissa - _COARSE_MANTISSA, 0), mantissa
        else:
            width = jnp.iinfo(dtype).bits
            stream = (1 << width) - 1
            default, most = 0, width
        if width < 8:
            raise ValueError(f"expected a dtype of 8 bits or more, got {dtype}")
        if self.fine_bits is None:
            return (1 << default) - 1 if self.permute else stream
        if self.fine_bits > most:
            raise ValueError(
                f"fine_bits: expected at most {most} for {dtype}, got {self.fine_bits}"
            )
        return (1 << self.fine_bits) - 1

    def check(self, ring: Ring, leaf: Any) -> None:
        """Refuses dtypes without a cipher, and rings with less than 128 bits to hide in."""
        what = f"params {ring.name!r}, ring {ring.level}"
        try:
            fine = self.fine_mask(leaf.dtype)
        except ValueError as error:
            raise ValueError(
                f"{what}: {error}. Set its mask to False or change fine_bits."
            ) from None
        groups = int(ring.mask.sum())
        weights = groups * (math.prod(leaf.shape) // ring.mask.size)
        units = groups if self.unit == "group" else weights
        arrangements = _arrangements(units) if self.permute else 0.0
        if not arrangements and not fine & _coarse_mask(leaf.dtype):
            raise ValueError(
                f"{what}: expected a cipher that changes more than fine bits, got {self}, which "
                f"has {units} {self.unit} to permute and masks none of sign, exponent and top "
                "three mantissa bits: every weight would stay within an eighth. Use unit='weight' "
                "or a mask with more groups, or leave fine_bits out."
            )
        hiding = arrangements + weights * fine.bit_count()
        if hiding < _MINIMUM_HIDING:
            raise ValueError(
                f"{what}: too small to hide in: {weights} weights of {leaf.dtype} give "
                f"{hiding:.0f} bits ({arrangements:.0f} of order, {weights * fine.bit_count()} "
                f"masked), expected at least {_MINIMUM_HIDING}. Select more groups in this leaf, "
                "use fewer levels, larger groups or unit='weight', or set its mask to False."
            )

    def run(
        self,
        leaves: Mapping[str, Array],
        rings: Sequence[Ring],
        keys: Key[Array, " keys"],
        *,
        inverse: bool,
    ) -> dict[str, Array]:
        """See `Cipher.run`."""
        result = dict(leaves)
        started: set[str] = set()
        for batch in _batches([self._plan(i, r, leaves[r.name]) for i, r in enumerate(rings)]):
            permutations = _tables(batch, keys, "permutation") if self.permute else None
            masks = _tables(batch, keys, "mask")
            for plan in batch:
                leaf = result[plan.name]
                # From its second ring on, the array is ours to overwrite.
                ours = plan.name in started and not isinstance(leaf, Tracer)
                started.add(plan.name)
                sizes = np.int32(plan.units), np.int32(plan.weights // plan.units)
                positions, units, size = jax.device_put((plan.positions, *sizes))
                # Bits are moved, nothing is computed: a NaN in the leaf is not ours to report.
                with jax.debug_nans(False), jax.debug_infs(False):
                    result[plan.name] = (_rewrite_in_place if ours else _rewrite)(
                        leaf,
                        positions,
                        None if permutations is None else permutations[plan.ring],
                        masks.get(plan.ring),
                        units,
                        size,
                        fine=plan.fine,
                        inverse=inverse,
                    )
        return result

    def _plan(self, index: int, ring: Ring, leaf: Array) -> "_Plan":
        positions = group_positions(leaf.shape, ring.mask)
        if self.unit == "weight":  # in C order: only the set matters, not the shape of its mask
            positions = np.sort(positions, axis=None)
        units = len(positions)
        room = np.full(BLOCK * padded(_blocks(positions.size)), leaf.size, np.int32)
        room[: positions.size] = positions.ravel()
        return _Plan(
            index, ring.name, room, units, positions.size, self.fine_mask(leaf.dtype), leaf.dtype
        )


class _Plan(NamedTuple):
    """A ring in a leaf, ready to run.

    ``positions`` are flat ones, group by group, padded with the size of the leaf, which is out of
    bounds: read as 0 and not written. Padding to few sizes keeps the number of compilations low.
    """

    ring: int
    name: str
    positions: np.ndarray
    units: int
    weights: int
    fine: int
    dtype: Any


def _coarse_mask(dtype: Any) -> int:
    """The bits that say roughly what a weight is: all but the low mantissa bits of a float."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return (1 << jnp.iinfo(dtype).bits) - 1
    info = jnp.finfo(dtype)
    return (1 << info.bits) - (1 << max(info.nmant - _COARSE_MANTISSA, 0))


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _arrangements(units: int) -> float:
    """log2 of the number of permutations of ``units`` units in their blocks."""
    blocks = _blocks(units)
    size, larger = divmod(units, blocks)
    return (larger * math.lgamma(size + 2) + (blocks - larger) * math.lgamma(size + 1)) / math.log(
        2
    )


def _batches(plans: Sequence[_Plan]) -> list[list[_Plan]]:
    """Runs of plans of a width with a bounded number of blocks each."""
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


def _unsigned(itemsize: int) -> Any:
    return jnp.dtype(f"uint{8 * itemsize}")


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
    rows = [padded(_blocks(count)) for count in counts]
    ends = np.cumsum(rows)
    ring = np.zeros(padded(int(ends[-1])), np.int32)
    block = np.zeros(len(ring), np.uint32)
    length = np.zeros(len(ring), np.int32)
    for plan, count, size, end in zip(wanted, counts, rows, ends, strict=True):
        here = slice(end - size, end)
        blocks = _blocks(count)
        ring[here] = plan.ring
        block[here] = np.arange(size)
        length[here] = np.maximum(-(-(count - np.arange(size)) // blocks), 0)
    ring, block, length = jax.device_put((ring, block, length))
    if kind == "permutation":
        table = _permutation_blocks(keys, ring, block, length)
    else:
        table = _mask_blocks(keys, ring, block, dtype=_unsigned(wanted[0].dtype.itemsize))
    return {
        plan.ring: _rows(table, jax.device_put(np.int32(end - size)), size)
        for plan, size, end in zip(wanted, rows, ends, strict=True)
    }


@partial(jax.jit, static_argnums=2)
def _rows(table: Array, start: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(table, start, size)


def key_by_key(draw: Callable[..., Any], keys: Key[Array, " keys"]) -> Callable[..., Any]:
    """``draw(key, ...)`` that under ``vmap`` still gives every key its own bits.

    XLA's generator draws for a batch of keys from the first one alone, so that its bits would
    depend on which other rings are in the batch: it takes one key after the other.
    """
    if jax.random.key_impl(keys) in ("rbg", "unsafe_rbg"):
        return jax.custom_batching.sequential_vmap(draw)
    return draw


def _map_blocks(
    block: Callable[..., Array], keys: Key[Array, " keys"], ring: Array, *columns: Array
) -> Array:
    block = key_by_key(block, keys)
    # A few blocks at a time: their state stays in the cache, and memory is bounded.
    return lax.map(lambda row: block(keys[row[0]], *row[1:]), (ring, *columns), batch_size=64)


@jax.jit
def _permutation_blocks(
    keys: Key[Array, " keys"], ring: Array, block: Array, length: Array
) -> Array:
    def permutation(key: PRNGKeyArray, block: Array, length: Array) -> Array:
        index = jnp.arange(BLOCK, dtype=jnp.uint32)
        key = jax.random.fold_in(jax.random.fold_in(key, _PERMUTATION), block)
        bits = jax.random.bits(key, (BLOCK,), jnp.uint32) >> _INDEX_BITS
        # What lies behind the end of a short block sorts last and so stays there.
        bits = jnp.where(index < length.astype(jnp.uint32), bits, jnp.uint32(2**22 - 1))
        order = lax.sort(bits << _INDEX_BITS | index, is_stable=False)
        return (order & (BLOCK - 1)).astype(jnp.uint16)

    return _map_blocks(permutation, keys, ring, block, length)


@partial(jax.jit, static_argnames="dtype")
def _mask_blocks(keys: Key[Array, " keys"], ring: Array, block: Array, *, dtype: Any) -> Array:
    def words(key: PRNGKeyArray, block: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(key, _MASK), block)
        return jax.random.bits(key, (BLOCK,), dtype)

    return _map_blocks(words, keys, ring, block)


def _rewrite_leaf(
    leaf: Array,
    positions: Array,
    permutation: Array | None,
    mask: Array | None,
    units: Array,
    size: Array,
    *,
    fine: int,
    inverse: bool,
) -> Array:
    """Encrypts or decrypts one ring: ``units`` units of ``size`` weights each."""
    # On unsigned views only: a float that is moved as a float may lose its NaN payload.
    unsigned = _unsigned(leaf.dtype.itemsize)
    bits = lax.bitcast_convert_type(leaf, unsigned).reshape(-1)
    source = positions
    if permutation is not None:
        number = jnp.arange(len(positions), dtype=jnp.int32)
        unit, within = number // size, number % size
        blocks = -(-units // BLOCK)
        block, place = unit % blocks, unit // blocks
        place = permutation.at[block, place].get(mode="clip").astype(jnp.int32)
        moved = (place * blocks + block) * size + within
        source = positions[jnp.where(unit < units, moved, number)]
    read, written = (positions, source) if inverse else (source, positions)
    ring = bits.at[read].get(mode="fill", fill_value=0)
    if mask is not None:
        ring = ring ^ (mask.reshape(-1) & jnp.array(fine, unsigned))
    bits = bits.at[written].set(ring, mode="drop")
    return lax.bitcast_convert_type(bits.reshape(leaf.shape), leaf.dtype)


def _rewrite_sharded(leaf: Array, *tables: Array | None, fine: int, inverse: bool) -> Array:
    rewrite = partial(_rewrite_leaf, fine=fine, inverse=inverse)
    return without_explicit_axes(rewrite, leaf)(leaf, *tables)


_rewrite = jax.jit(_rewrite_sharded, static_argnames=("fine", "inverse"))
_rewrite_in_place = jax.jit(
    _rewrite_sharded, static_argnames=("fine", "inverse"), donate_argnames="leaf"
)
