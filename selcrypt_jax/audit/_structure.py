"""An attack on encrypted normalisation: what the plain kernels around it tell.

Backpropagation writes the same correlations into the kernels before and after a normalisation
layer, with the sign of its scale between them. So for each channel the product of the two kernels
has a direction that all channels share, up to that sign.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .._tree.groups import Layout


class Link(NamedTuple):
    """A convolution, the normalisation behind it, and the next convolution, by names of leaves.

    Attributes:
        before: kernel whose outputs are normalised.
        scale: of the normalisation.
        after: kernel that gets them, without anything between that moves channels.

    Examples:
        >>> link = Link("conv1/kernel", "norm1/scale", "conv2/kernel")
    """

    before: str
    scale: str
    after: str


def scale_signs(before: np.ndarray, after: np.ndarray, layout: Layout) -> np.ndarray:
    """The signs of the scales between two convolutions, all of them right or all of them wrong.

    For each channel c between them ``C[c] = Σ_t after[t, c, :] ⊗ before[t, :, c]``, normalised; the
    signs are those of the first eigenvector of all their scalar products.

    Args:
        before: ``[h, w, inputs, channels]``, or as the layout says; what is encrypted in it zero.
        after: ``[h, w, channels, outputs]``, with as many taps.
        layout: of both.

    Returns:
        1 or -1 for each channel.
    """
    if layout == "OIHW":
        before, after = (np.moveaxis(kernel, (1, 0), (-2, -1)) for kernel in (before, after))
    one, other = (
        kernel.reshape(-1, *kernel.shape[-2:]).astype(np.float64) for kernel in (before, after)
    )
    products = np.einsum("tic,tco->cio", one, other)
    flat = products.reshape(len(products), -1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True) + np.finfo(float).tiny
    first = np.linalg.eigh(flat @ flat.T)[1][:, -1]
    return np.where(first < 0, -1, 1)


def with_signs(scale: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Scales of their average size with these signs.

    Args:
        scale: as shipped: in another order, but how many are negative can be seen.
        signs: by `scale_signs`; turned over where that fits the number better.
    """
    negative = np.count_nonzero(scale < 0)
    if abs(np.count_nonzero(signs > 0) - negative) < abs(np.count_nonzero(signs < 0) - negative):
        signs = -signs
    size = np.sqrt(np.square(scale.astype(np.float64)).mean())
    return (size * signs).astype(scale.dtype)


def check_chain(chain: Sequence[Link], shapes: dict[str, tuple[int, ...]], what: str) -> None:
    """Refuses links between leaves that do not fit each other.

    Raises:
        ValueError: of one.
    """
    for link in chain:
        missing = [name for name in link if name not in shapes]
        if missing:
            raise ValueError(
                f"{what}: chain: expected names of parameters, got {missing[0]!r}. They are "
                f"{list(shapes)[:3]} and so on."
            )
        before, scale, after = (shapes[name] for name in link)
        if len(scale) != 1 or len(before) != len(after) or before[:-2] != after[:-2]:
            raise ValueError(
                f"{what}: chain: expected two kernels with as many taps and a scale between them, "
                f"got shapes {before}, {scale} and {after}."
            )
