"""Which groups of a checkpoint belong to which ring, leaf by leaf."""

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from .._ciphers.lossless import MINIMUM_HIDING, LosslessCipher, order_bits
from .._format.boxes import SealedRing
from .._format.rings import seal_mask
from .._importance import closed as _importance
from .._io.arrays import as_array
from .._io.safetensors import MAX_HEADER
from .._keys.chacha import chacha20_key
from .._masks.levels import Levels, as_levels
from .._masks.masks import checked_score, smallest
from .._masks.ranks import Scope, Scores, ranked
from .._tree.dtypes import SAFETENSORS
from .._tree.groups import Granularity, Layout, group_shape
from .._tree.names import Selector, listed, select_leaves

Strategy = Literal["l2", "random", "ascend", "descend", "mean"]
"""The ways to judge importance that need no data."""

MAX_WEIGHTS = 2**31 - 1  # in a leaf: positions are 32-bit numbers


class _Leaf:
    """Shape and dtype of a tensor that need not be read; no pytree, as a NamedTuple would be."""

    def __init__(self, dtype: str, shape: Sequence[int]) -> None:
        self.dtype, self.shape = np.dtype(SAFETENSORS[dtype].name), tuple(shape)
        self.ndim = len(shape)


class NamedTensors(Protocol):
    """Tensors with dtype (safetensors' name) and shape, to be read one by one."""

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    def read(self, name: str) -> bytearray: ...


def choose_tensors(tensors: Mapping[str, Any], select: Selector) -> list[str]:
    """Names of the tensors that take part.

    Args:
        tensors: by name, with dtype and shape.
        select: see `selcrypt_jax.importance`; None takes floats with a mantissa and two axes or
            more. (Of float4 and of scales alone, as in float8_e8m0fnu, there is nothing to hide.)

    Raises:
        ValueError: nothing is selected, or something that is no number.
    """
    leaves = {name: _Leaf(info.dtype, info.shape) for name, info in tensors.items()}
    if select is None:
        chosen = [name for name in tensors if _by_default(tensors[name])]
        if not chosen:
            kinds = [f"{name} ({leaf.dtype}{list(leaf.shape)})" for name, leaf in leaves.items()]
            raise ValueError(
                "select: expected floats of 8 bits or more with two axes or more, got "
                f"{listed(kinds)}. Say with `select` which tensors to protect."
            )
    else:
        chosen = select_leaves(leaves, select)
    return [name for name in tensors if name in chosen]


def _by_default(info: Any) -> bool:
    dtype = SAFETENSORS[info.dtype]
    return dtype.kind == "float" and dtype.bits >= 8 and dtype.mantissa > 0 and len(info.shape) > 1


def guess_layout(
    tensors: Mapping[str, Any],
    names: Sequence[str],
    metadata: Mapping[str, str],
    granularity: Granularity,
) -> Layout:
    """Where the output and input axes of kernels are.

    The metadata's ``format`` says so for PyTorch. Else shapes do: spatial axes are short and lie
    behind them in PyTorch, before them in JAX. Without a leaf of three axes or more the metadata
    have the last word.

    Raises:
        ValueError: the leaves do not agree, or nothing tells.
    """
    if metadata.get("format") == "pt":
        return "OIHW"
    votes: dict[Layout, str] = {}
    for name in names:
        shape = tensors[name].shape
        if len(shape) < 3:
            continue
        first, last = math.prod(shape[:-2]), math.prod(shape[2:])
        if first != last:
            votes["HWIO" if first < last else "OIHW"] = name
    if len(votes) == 1:
        return next(iter(votes))
    if metadata.get("format") in ("np", "flax", "jax"):
        return "HWIO"
    flat = all(len(tensors[name].shape) < 3 for name in names)
    if granularity == "weight" or (granularity == "kernel" and not votes and flat):
        return "HWIO"  # a kernel of two axes is one weight in either
    raise ValueError(
        "layout: cannot tell where the output and input axes are"
        + "".join(f"; {name!r} looks like {layout}" for layout, name in votes.items())
        + ". Say it (--layout): OIHW as in PyTorch, or HWIO as in JAX and TensorFlow."
    )


def strategy_scores(
    source: NamedTensors,
    names: Sequence[str],
    strategy: Strategy,
    granularity: Granularity,
    layout: Layout,
) -> Scores:
    """Scores that need no data."""
    if strategy not in ("l2", "random", "ascend", "descend", "mean"):
        raise ValueError(
            "strategy: expected l2, random, ascend, descend or mean, which need no data, got "
            f"{strategy!r}. Learned scores come from a file: --importance scores.safetensors."
        )
    options: dict[str, Any] = {
        "select": lambda *_: True,
        "granularity": granularity,
        "layout": layout,
    }
    if strategy == "random":
        options["key"] = chacha20_key(os.urandom(32))  # not to be repeated by a thief
    function = getattr(_importance, strategy)

    def scores(name: str) -> np.ndarray:
        info = source.tensors[name]
        leaf = as_array(source.read(name), info.dtype, info.shape)
        return np.asarray(function({name: leaf}, **options)[name])

    shapes = {name: group_shape(source.tensors[name].shape, granularity, layout) for name in names}
    return Scores(shapes, scores)


def given_scores(
    given: NamedTensors, tensors: Mapping[str, Any], select: Selector, what: str
) -> Scores:
    """Scores from a file of their own.

    Args:
        given: the scores.
        tensors: of the checkpoint.
        select: takes some of them only; None all of them.
        what: the scores, for messages.

    Raises:
        ValueError: names that the checkpoint lacks, or shapes that do not broadcast.
    """
    unknown = [name for name in given.tensors if name not in tensors]
    if unknown or not given.tensors:
        raise ValueError(
            f"{what}: expected scores for tensors of the checkpoint ({listed(tensors)}), got "
            f"{listed(unknown)}. Save them under the same names."
        )
    for name, info in given.tensors.items():
        shape = tensors[name].shape
        if SAFETENSORS[info.dtype].kind == "other":
            raise ValueError(
                f"{what}: {name!r}: expected numbers, the higher the more important, got "
                f"{info.dtype}. Save scores, not masks."
            )
        if len(info.shape) != len(shape) or any(
            m not in (1, n) for m, n in zip(info.shape, shape, strict=True)
        ):
            raise ValueError(
                f"{what}: {name!r}: expected scores that broadcast against shape "
                f"{tuple(shape)}, axis by axis of size 1 or the tensor's, got shape "
                f"{tuple(info.shape)}. They are of another model or layout: score this one."
            )

    def scores(name: str) -> np.ndarray:
        info = given.tensors[name]
        return as_array(given.read(name), info.dtype, info.shape)

    names = list(given.tensors)
    if select is not None:
        names = choose_tensors({name: tensors[name] for name in names}, select)
    return Scores({name: tuple(given.tensors[name].shape) for name in names}, scores)


def plan_rings(
    tensors: Mapping[str, Any],
    scores: Scores,
    fractions: Sequence[float] | Levels,
    *,
    scope: Scope,
    cipher: LosslessCipher,
) -> dict[str, list[tuple[int, SealedRing]]]:
    """Selects groups, puts them into rings, and checks that these can be encrypted.

    As `nested_masks`, but one leaf after the other, and **rings in which too little is to be
    guessed are merged upwards**: masked fine bits move a weight by less than an eighth, so a ring
    of a leaf needs 128 bits of order alone. What a leaf would give to a low level in a smaller
    ring, that level then does not get.

    Args:
        tensors: by name, with dtype and shape.
        scores: of those that take part.
        fractions: see `nested_masks`.
        scope: see `nested_masks`.
        cipher: see `LosslessCipher`.

    Returns:
        Tensor → its rings with their levels.

    Raises:
        ValueError: leaves that cannot be encrypted; levels that add nothing.
    """
    levels = as_levels(fractions)
    if scope not in ("leaf", "model"):
        raise ValueError(f"scope: expected 'leaf' or 'model', got {scope!r}.")

    for name in scores.shapes:  # before any of them is read
        try:
            cipher.fine_mask(SAFETENSORS[tensors[name].dtype])
        except ValueError as error:
            raise ValueError(f"tensor {name!r}: {error}. Leave it out with `select`.") from None

    def of(name: str) -> np.ndarray:
        array = checked_score(name, scores.of(name))
        assert array is not None
        return array

    checked = Scores(scores.shapes, of)
    rings: dict[str, list[tuple[int, SealedRing]]] = {}
    added: list[int] = []
    refused: dict[str, str] = {}
    for name, ranks, counts in ranked(checked, levels.counts, scope):
        info = tensors[name]
        added = added or [0] * len(counts)
        if not ranks.size or not math.prod(info.shape):
            continue
        weights = math.prod(info.shape) // ranks.size
        if math.prod(info.shape) > MAX_WEIGHTS:
            refused[name] = (
                f"tensor {name!r}: expected at most {MAX_WEIGHTS} weights in a tensor, got "
                f"{math.prod(info.shape)}. Split it, or leave it out with `select`."
            )
            continue
        below = 0
        for level, count in enumerate(merged_counts(counts, weights, cipher), 1):
            if count == below:
                continue
            ring = seal_mask(name, (ranks >= below) & (ranks < count))
            try:
                cipher.check_size(
                    f"tensor {name!r}, level {level}",
                    SAFETENSORS[info.dtype],
                    groups=ring.groups,
                    weights=ring.groups * weights,
                )
            except ValueError as error:
                refused.setdefault(name, str(error))
            rings.setdefault(name, []).append((level, ring))
            added[level - 1] += ring.groups
            below = count
    if refused:
        more = f" The same for {listed(list(refused)[1:])}." if len(refused) > 1 else ""
        raise ValueError(next(iter(refused.values())) + more)
    for level, groups in enumerate(added, 1):
        if not groups:
            raise ValueError(
                f"level {level} adds no groups to those below it, expected at least one in "
                f"{listed(scores.shapes)}. Encrypt a larger share, use fewer levels, a finer "
                "granularity or scope 'model', or select larger tensors."
            )
    return rings


def check_room(shapes: Iterable[Sequence[int]], levels: Levels, what: str) -> None:
    """Refuses positions that would not fit into a file's header, before they are computed.

    Args:
        shapes: of the scores of each tensor that takes part.
        levels: the shares.
        what: the checkpoint's file, for messages.

    Raises:
        ValueError: they need more than the 100 MB that the format allows.
    """
    bits = 0.0
    for size in map(math.prod, shapes):
        counts = (0, *levels.counts(size))
        for below, count in itertools.pairwise(counts):
            share = (count - below) / max(size, 1)
            if 0 < share < 1:
                bits -= size * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
    estimate = bits / 8 * 4 / 3  # no coding takes less; base64 takes a third more
    if estimate > MAX_HEADER:
        raise ValueError(
            f"{what}: the positions of what is encrypted would take {estimate / 1e6:,.0f} MB, and "
            f"a header has room for {MAX_HEADER / 1e6:,.0f} MB. Select larger groups "
            "(--granularity filter), a smaller share, fewer tensors, or split the checkpoint."
        )


def small_rings(
    tensors: Mapping[str, Any], share: float, select: Selector, cipher: LosslessCipher
) -> dict[str, list[tuple[int, SealedRing]]]:
    """Rings of level 1 that are small tensors as a whole, see `small_leaves`.

    Args:
        tensors: by name, with dtype and shape.
        share: of all weights that they may have together.
        select: see `choose_tensors`; None takes all floats.
        cipher: see `LosslessCipher`.

    Returns:
        Tensor → its ring. Those that the cipher refuses as too small are not among them.
    """
    floats = {
        name: info.shape
        for name, info in tensors.items()
        if SAFETENSORS[info.dtype].kind == "float"
    }
    chosen = floats if select is None else choose_tensors(tensors, select)
    rings = {}
    for name in smallest(floats, share):
        info = tensors[name]
        if name in chosen and cipher.hides(SAFETENSORS[info.dtype], info.shape):
            rings[name] = [(1, seal_mask(name, np.ones(info.shape, bool)))]
    return rings


def merged_counts(counts: Sequence[int], weights: int, cipher: LosslessCipher) -> list[int]:
    """The counts of a leaf's levels once rings of few orders have moved up."""
    if not cipher.permute:
        return list(counts)
    result: list[int] = []
    kept = 0
    for count in counts:
        if not is_few(count - kept, weights, cipher):
            kept = count
        result.append(kept)
    if kept < counts[-1]:
        # What is left at the top cannot stand alone: the ring below goes up with it.
        below = max((count for count in result if count < kept), default=0)
        result = [below if count == kept else count for count in result]
        result[-1] = counts[-1]
    return result


def settled_counts(counts: Sequence[int], weights: int, cipher: LosslessCipher) -> list[int]:
    """As `merged_counts`, decided from the top down: lower levels have no say in higher ones.

    A ring of few orders moves down here, and what would be left below it up.
    """
    result = [counts[-1]]
    for count in reversed(counts[:-1]):
        above = result[0]
        if is_few(count, weights, cipher):
            count = 0
        elif is_few(above - count, weights, cipher):
            count = above
        result.insert(0, count)
    return result


def is_few(groups: int, weights: int, cipher: LosslessCipher) -> bool:
    """Whether a ring of so many groups, of so many weights each, has too few orders."""
    units = 1 if cipher.unit == "group" else weights
    return cipher.permute and order_bits(groups * units) < MINIMUM_HIDING
