"""The paper's Gaussian cipher, to reproduce its figures. Not lossless: see `GaussianCipher`."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Key, PyTree

from .._tree.groups import Ring, group_positions
from .._tree.names import named_leaves, padded, without_explicit_axes
from .._tree.rings import split_rings
from .keys import RingKeys

# The distance of the bounds from the range of w + r (with wrap: of w, and then as a fraction of
# it). With smaller margins, a weight at the edge becomes an infinite quantile; a fraction of 1e-5
# still gives quantiles of ±4.4 σ.
_MARGIN = 1e-5
_LEAST = 2.0**-23


class GaussianStats(NamedTuple):
    """The side data that decryption of a ring in a leaf needs.

    Attributes:
        mean: μ of the leaf.
        std: σ of the leaf.
        low: h, just below the range of w + r; with `GaussianCipher.wrap`, of w.
        high: f, just above it.
    """

    mean: float
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class GaussianCipher:
    """``c = μ + σ·Φ⁻¹((w + r − h) / (f − h))`` with ``r`` uniform in [0, 1) from the key.

    It hides weights whose range is well below 1, as in neural networks: ``r`` is added to ``w``, so
    weights much larger than 1 keep their order.

    The encrypted weights look like draws from a normal distribution with the leaf's mean and
    deviation. The inverse ``w = Φ((c − μ)/σ)·(f − h) + h − r`` is exact only to rounding
    (about 1e-6 absolute in float32; bfloat16 is too coarse for it), and the rounding depends on
    the device. Use `LosslessCipher` for anything but reproducing the paper.

    Attributes:
        stats: side data by (leaf name, level). Make it with `fit`, and keep it: decryption needs
            it. It reveals the range of the selected weights.
        wrap: our variant, not the paper's: ``c = μ + σ·Φ⁻¹(((w − h)/(f − h) + r) mod 1)``. With the
            paper's formula, ``w + r`` is far from uniform unless the range of ``w`` is small
            compared with 1: on the paper's own DnCNN, ``c`` has less than half the standard
            deviation that it should. Modulo 1, the sum is uniform, and ``c`` is normal and
            independent of ``w``.

    Examples:
        >>> cipher = GaussianCipher.fit(params, masks)
        >>> gaussian = encrypt(params, masks, keys, cipher=cipher)
        >>> restored = decrypt(gaussian, masks, keys, cipher=cipher)  # to about 1e-6

    References:
        Tian, Zhou, Duan, CVPR 2021, equations 9 to 12.
    """

    stats: Mapping[tuple[str, int], GaussianStats]
    wrap: bool = False

    @classmethod
    def fit(
        cls, params: PyTree, masks: Sequence[PyTree], *, wrap: bool = False
    ) -> "GaussianCipher":
        """Computes the side data from the weights that are to be encrypted.

        Args:
            params: concrete parameters.
            masks: as for `encrypt`.
            wrap: see `wrap`.

        Raises:
            ValueError: masks that do not fit; a leaf that is constant, not finite or not a float.
        """
        tree = named_leaves(params)
        stats = {}
        for ring in split_rings(tree, masks):
            leaf = np.asarray(jax.device_get(tree.leaves[ring.name]))
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(
                    f"params {ring.name!r}: expected floats for the Gaussian cipher, got "
                    f"{leaf.dtype}. Use LosslessCipher()."
                )
            values = leaf.astype(np.float64)
            selected = values.ravel()[group_positions(leaf.shape, ring.mask)]
            mean, std = float(values.mean()), float(values.std())
            if not (math.isfinite(std) and std > 0):
                raise ValueError(
                    f"params {ring.name!r}: expected finite weights that differ, got a standard "
                    f"deviation of {std}. Use LosslessCipher()."
                )
            low, high = float(selected.min()), float(selected.max())
            margin = _MARGIN * ((high - low or std) if wrap else 1)
            above = high + margin + (not wrap)  # r reaches up to 1 higher
            stats[ring.name, ring.level] = GaussianStats(mean, std, low - margin, above)
        return cls(stats, wrap)

    def check(self, ring: Ring, leaf: Any) -> None:
        """Refuses rings that `fit` has not seen."""
        if (ring.name, ring.level) not in self.stats:
            raise ValueError(
                f"params {ring.name!r}, ring {ring.level}: the Gaussian cipher has no side data "
                "for it. Make it with GaussianCipher.fit(params, masks), with these masks."
            )

    def run(
        self,
        leaves: Mapping[str, Array],
        rings: Sequence[Ring],
        keys: RingKeys,
        *,
        inverse: bool,
        donate: Collection[str] = (),
    ) -> dict[str, Array]:
        """See `Cipher.run`; ``donate`` is ignored."""
        result = dict(leaves)
        for index, ring in enumerate(rings):
            leaf = result[ring.name]
            found = group_positions(leaf.shape, ring.mask).ravel()
            # Padded to one of a few lengths, to avoid a compilation for every mask; positions past
            # the end of the leaf are not written.
            positions = np.full(padded(found.size), leaf.size, found.dtype)
            positions[: found.size] = found
            stats = np.array(self.stats[ring.name, ring.level], np.float32)
            tables = jax.device_put((positions, stats, np.int32(index)))
            # Each ring takes a different key from it, which JAX's checker of key reuse cannot see.
            own = jax.random.clone(keys.array)
            result[ring.name] = _rewrite(leaf, own, *tables, inverse=inverse, wrap=self.wrap)
        return result


def _rewrite_leaf(
    leaf: Array,
    keys: Key[Array, " keys"],
    positions: Array,
    stats: Array,
    index: Array,
    *,
    inverse: bool,
    wrap: bool,
) -> Array:
    mean, std, low, high = stats
    flat = leaf.reshape(-1)
    values = flat.at[positions].get(mode="clip").astype(jnp.float32)
    r = jax.random.uniform(keys[index], values.shape, jnp.float32)
    size = high - low
    if inverse:
        level = ndtr((values - mean) / std)
        values = ((level - r) % 1) * size + low if wrap else level * size + low - r
    else:
        level = ((values - low) / size + r) % 1 if wrap else (values + r - low) / size
        # Not 0 or 1, whose quantiles are infinite; the margin is larger than the change.
        level = jnp.clip(level, _LEAST, 1 - _LEAST)
        values = mean + std * ndtri(level)
    return flat.at[positions].set(values.astype(leaf.dtype), mode="drop").reshape(leaf.shape)


@partial(jax.jit, static_argnames=("inverse", "wrap"))
def _rewrite(leaf: Array, *rest: Array, inverse: bool, wrap: bool) -> Array:
    rewrite = partial(_rewrite_leaf, inverse=inverse, wrap=wrap)
    return without_explicit_axes(rewrite, leaf)(leaf, *rest)
