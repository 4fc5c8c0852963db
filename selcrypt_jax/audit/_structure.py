"""Attacks on encrypted normalisation: what the plain kernels around it reveal.

Backpropagation writes the same correlations into the kernels before and after a normalisation
layer, with the sign of its scale between them. So the product of the two kernels has, for each
channel, a direction that all channels share, up to that sign. The sizes of scales and biases depend
on the sizes and shapes of these kernels in much the same way in all networks of one architecture,
so a regression can learn them from siblings.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .._tree.groups import Layout


class Link(NamedTuple):
    """A convolution, the normalisation after it, and the next convolution, by names of leaves.

    Attributes:
        before: the kernel whose outputs are normalised.
        scale: the scale of the normalisation.
        after: the kernel that reads the result, with nothing in between that reorders channels.
        bias: the bias of the normalisation, if it has one.

    Examples:
        >>> link = Link("conv1/kernel", "norm1/scale", "conv2/kernel", "norm1/bias")
    """

    before: str
    scale: str
    after: str
    bias: str | None = None


def sign_leanings(before: np.ndarray, after: np.ndarray, layout: Layout) -> np.ndarray:
    """How strongly the kernels suggest either sign for each scale between two convolutions.

    For each channel c between them, ``C[c] = Σ_t after[t, c, :] ⊗ before[t, :, c]``, normalised.
    The first eigenvector of the matrix of their inner products has the signs of the scales, or
    the opposite signs throughout.

    Args:
        before: ``[h, w, inputs, channels]``, or as the layout says; zero where encrypted.
        after: ``[h, w, channels, outputs]``, with the same number of taps.
        layout: layout of both.

    Returns:
        A signed number for each channel.
    """
    return _shared(_by_tap(before, layout), _by_tap(after, layout))[1]


def _by_tap(kernel: np.ndarray, layout: Layout) -> np.ndarray:
    """``[taps, inputs, outputs]``, float64."""
    if layout == "OIHW":
        kernel = np.moveaxis(kernel, (1, 0), (-2, -1))
    return kernel.reshape(-1, *kernel.shape[-2:]).astype(np.float64)


def _shared(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each channel's product of kernels: norm, first eigenvector, mean |cosine|."""
    # Inner products of Σ_t before[t, :, c] ⊗ after[t, c, :] for all pairs of channels. The tensor
    # products themselves would take inputs × channels × outputs numbers: gigabytes.
    gram = np.zeros((before.shape[2],) * 2)
    for s, t in itertools.product(range(len(before)), repeat=2):
        gram += (before[s].T @ before[t]) * (after[s] @ after[t].T)
    sizes = np.sqrt(np.maximum(gram.diagonal(), 0))
    scale = np.where(sizes > 0, sizes, 1)
    gram = gram / scale / scale[:, None]
    return sizes, np.linalg.eigh(gram)[1][:, -1], np.abs(gram).mean(1)


def _statistics(before: np.ndarray, after: np.ndarray, depth: float) -> np.ndarray:
    """Statistics of the channels between two kernels: ``[channels, statistics]``.

    Args:
        before: ``[taps, inputs, channels]``, zero where encrypted.
        after: ``[taps, channels, outputs]``.
        depth: depth of the layer, in 0..1.
    """
    # A channel without any plain kernel divides by zero.
    with np.errstate(divide="ignore", invalid="ignore"):
        product, first, like = _shared(before, after)
        size, next_size = np.linalg.norm(before, axis=(0, 1)), np.linalg.norm(after, axis=(0, 2))
        total, next_total = before.sum((0, 1)), after.sum((0, 2))
        columns = [
            size,
            next_size,
            product,
            np.abs(first),
            like,
            product / (size * next_size),
            np.linalg.norm(before.sum(0), axis=0) / size,  # share that is constant over taps
            np.linalg.norm(after.sum(0), axis=1) / next_size,
            np.sign(first) * total / size,
            np.abs(total) / size,
            next_total / next_size,
            np.abs(next_total) / next_size,
            (before**4).sum((0, 1)) / size**4,  # kurtosis: few large weights or many small ones
            (after**4).sum((0, 2)) / next_size**4,
            (before != 0).mean((0, 1)),
            (after != 0).mean((0, 2)),
        ]
    table = np.nan_to_num(np.stack(columns, 1), posinf=0.0, neginf=0.0)
    spread = table.std(0)
    scaled = (table - table.mean(0)) / np.where(spread > 0, spread, 1)
    return np.concatenate([_ranks(table), scaled, np.full((len(table), 1), depth)], 1)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the first axis, in 0..1."""
    return values.argsort(0).argsort(0) / len(values)


def ranked_by_siblings(
    params: Mapping[str, Any],
    siblings: Sequence[Mapping[str, Any]],
    chain: Sequence[Link],
    hidden: Mapping[str, np.ndarray],
    layout: Layout,
) -> dict[str, np.ndarray]:
    """Predicts the ranking of a network's scales (by size) and biases within each layer.

    Args:
        params: parameters of a protected file, by name.
        siblings: other networks of the architecture, which the attacker has or has trained.
        chain: links whose normalisation is encrypted.
        hidden: name of a kernel → mask of its encrypted weights, if there are any.
        layout: layout of the kernels.

    Returns:
        Name of a scale or bias → a number for each channel: the higher, the larger it is likely to
        be.
    """
    from sklearn.ensemble import ExtraTreesRegressor  # of the extra "audit"

    def seen(network: Mapping[str, Any]) -> Iterator[np.ndarray]:
        """The statistics of each link, with encrypted kernels set to zero."""
        for number, link in enumerate(chain):
            kernels = (np.asarray(network[name]) for name in (link.before, link.after))
            masks = (hidden.get(name, False) for name in (link.before, link.after))
            taps = [
                _by_tap(np.where(mask, 0, kernel), layout)
                for kernel, mask in zip(kernels, masks, strict=True)
            ]
            yield _statistics(*taps, depth=number / len(chain))

    def learn(names: Sequence[str | None]) -> dict[str, np.ndarray]:
        rows, ranks = [], []
        for network in siblings:
            for name, table in zip(names, seen(network), strict=True):
                if name is not None:
                    values = np.asarray(network[name], np.float64)
                    rows.append(table)
                    ranks.append(_ranks(np.abs(values) if name in scales else values))
        if not rows:
            return {}
        trees = ExtraTreesRegressor(300, min_samples_leaf=3, random_state=0)
        trees.fit(np.concatenate(rows), np.concatenate(ranks))
        pairs = zip(names, seen(params), strict=True)
        return {name: trees.predict(table) for name, table in pairs if name is not None}

    scales = [link.scale for link in chain]
    return learn(scales) | learn([link.bias for link in chain])


def in_order(values: np.ndarray, ranking: np.ndarray) -> np.ndarray:
    """The same values, sorted into the order of the ranking."""
    ordered = np.empty_like(values)
    ordered[np.argsort(ranking, kind="stable")] = np.sort(values)
    return ordered


def with_signs(
    scale: np.ndarray, leanings: np.ndarray, ranking: np.ndarray | None = None
) -> np.ndarray:
    """Scales with the signs that the kernels suggest.

    Args:
        scale: as shipped: permuted, but the number of negative scales is visible.
        leanings: from `sign_leanings`; negated if that fits this number better.
        ranking: ranking of their sizes; without one, all get the average size.
    """
    negative = np.count_nonzero(scale < 0)
    if abs(np.count_nonzero(leanings > 0) - negative) < abs(
        np.count_nonzero(leanings < 0) - negative
    ):
        leanings = -leanings
    # Exactly that many are negative; often none is.
    signs = np.where(leanings.argsort(kind="stable").argsort() < negative, -1, 1)
    if ranking is not None:
        return (in_order(np.abs(scale), ranking) * signs).astype(scale.dtype)
    size = np.sqrt(np.square(scale.astype(np.float64)).mean())
    return (size * signs).astype(scale.dtype)


def check_chain(
    chain: Sequence[Link], shapes: Mapping[str, tuple[int, ...]], layout: Layout, what: str
) -> list[Link]:
    """Refuses links between leaves that do not fit each other.

    Args:
        chain: chain of a subject; a link may be any sequence of its names.
        shapes: shapes of all leaves.
        layout: layout of the kernels.
        what: the network, for messages.

    Raises:
        ValueError: a link does not fit.
    """
    if isinstance(chain, str | Link):
        raise ValueError(f"{what}: chain: expected a list of Link, got {chain!r}.")
    checked = []
    for each in chain:
        if isinstance(each, str) or not isinstance(each, Sequence) or not 3 <= len(each) <= 4:
            raise ValueError(
                f"{what}: chain: expected Link(before, scale, after, bias or None), got {each!r}."
            )
        checked.append(link := Link(*each))
        missing = [name for name in link if name is not None and name not in shapes]
        missing += [name for name in link[:3] if name is None]
        if missing:
            raise ValueError(
                f"{what}: chain: expected names of parameters, such as {list(shapes)[:3]}, got "
                f"{missing[0]!r}."
            )
        before, scale, after = (shapes[name] for name in link[:3])
        if link.bias is not None and shapes[link.bias] != scale:
            raise ValueError(
                f"{what}: chain: {link.bias!r}: expected shape {scale}, that of {link.scale!r}, "
                f"got {shapes[link.bias]}."
            )
        inputs, outputs = (-2, -1) if layout == "HWIO" else (1, 0)
        taps = slice(None, -2) if layout == "HWIO" else slice(2, None)
        fits = min(len(before), len(after)) > 1 and before[taps] == after[taps]
        if not fits or scale != (before[outputs],) or scale != (after[inputs],):
            raise ValueError(
                f"{what}: chain: expected two kernels with the same number of taps, and a scale "
                f"whose length is the number of outputs of the first and of inputs of the second "
                f"({layout}), got shapes {before}, {scale} and {after} for {link[:3]}. Correct the "
                "link, or set the subject's layout."
            )
    return checked
