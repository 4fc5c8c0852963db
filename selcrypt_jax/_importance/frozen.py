"""A trained network whose weights stay as they are while importance is learned."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._tree.groups import Granularity, Layout, group_shape, inner_axes
from .._tree.names import (
    AnyArray,
    Selector,
    check_key,
    named_leaves,
    select_differentiable,
)
from .closed import LossFn, batch_at, loss_of

Leaves = dict[str, AnyArray]


class PSSMetrics(NamedTuple):
    """The metrics of each step, ``[steps]``.

    Attributes:
        loss: task loss with the gates in place.
        open: expected number of open gates.
    """

    loss: Float[Array, " steps"]
    open: Float[Array, " steps"]


class Frozen:
    """A network, its loss, and the groups of weights that are to be ranked.

    Attributes:
        names: the selected leaves.
        shapes: name → shape of the leaf's scores.
        axes: name → axes of the leaf that lie inside a group.
        rebuild_only: name → array, as a pytree with ``False`` for the other leaves.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        params: PyTree,
        select: Selector,
        granularity: Granularity,
        layout: Layout,
    ) -> None:
        self._loss_fn, self._tree = loss_fn, named_leaves(params)
        self._arrays = self._tree.arrays.keys()
        chosen = select_differentiable(params, select)
        self.names = list(chosen)
        self.shapes = {n: group_shape(a.shape, granularity, layout) for n, a in chosen.items()}
        self.axes = {n: inner_axes(a.shape, granularity, layout) for n, a in chosen.items()}
        self.rebuild_only = self._tree.rebuild_only

        @jax.jit  # once, and not for each state that is started
        def rest_and_broken(leaves: Leaves, batch: Any, key: PRNGKeyArray) -> Array:
            noise = self.noise(leaves, key)
            everything = {n: leaf.astype(leaves[n].dtype) for n, leaf in noise.items()}
            return jnp.stack([self.loss(leaves, {}, batch), self.loss(leaves, everything, batch)])

        self._rest_and_broken = rest_and_broken

    def arrays(self, params: PyTree) -> Leaves:
        """The arrays of these parameters, by name."""
        leaves = named_leaves(params).leaves
        return {name: leaf for name, leaf in leaves.items() if name in self._arrays}

    def loss(self, leaves: Leaves, changed: Mapping[str, AnyArray], batch: Any) -> Array:
        """The loss with some leaves replaced."""
        loss = loss_of(self._loss_fn, self._tree.rebuild({**leaves, **changed}), batch)
        return loss.astype(jnp.float32)

    def draw(
        self,
        sample: Callable[..., Array],
        key: PRNGKeyArray,
        shapes: dict[str, tuple[int, ...]],
    ) -> dict[str, Array]:
        """One draw for all leaves: it compiles in a fraction of the time of one per leaf."""
        order = sorted(shapes)  # not the container's order: equal paths give equal noise
        ends = np.cumsum([math.prod(shapes[name]) for name in order])
        parts = jnp.split(sample(key, (int(ends[-1]),), jnp.float32), ends[:-1])
        return {n: part.reshape(shapes[n]) for n, part in zip(order, parts, strict=True)}

    def noise(self, leaves: Leaves, key: PRNGKeyArray) -> dict[str, Array]:
        """Normal noise with each leaf's mean and standard deviation."""
        shapes = {name: leaves[name].shape for name in self.names}
        normal = self.draw(jax.random.normal, key, shapes)
        wide = {name: leaves[name].astype(jnp.float32) for name in self.names}
        return {n: wide[n].mean() + wide[n].std() * normal[n] for n in self.names}

    def check(
        self, params: PyTree, batches: PyTree, key: PRNGKeyArray, *, positive: bool
    ) -> tuple[Array, Array]:
        """Refuses a network that nothing can be learned from, and warns of one that is not trained.

        Args:
            params: the network.
            batches: the data.
            key: typed key, for the noise.
            positive: whether the loss must be positive, since its logarithm is taken.

        Returns:
            The loss on the first batch, as it is and with noise in place of the selected leaves.

        Raises:
            ValueError: weights or a loss that are not finite; a loss that is not positive.
        """
        check_key(key)
        leaves = self.arrays(params)
        for name in self.names:
            if not bool(jnp.isfinite(leaves[name]).all()):
                raise ValueError(
                    f"params {name!r}: expected finite weights, got NaN or Inf. Nothing can be "
                    "learned from such a network: go back to its last good checkpoint."
                )
        first = batch_at(batches, 0)
        rest, broken = self._rest_and_broken(leaves, first, jax.random.fold_in(key, 2**32 - 1))
        if not bool(jnp.isfinite(rest)) or (positive and not rest > 0):
            raise ValueError(
                f"loss_fn: expected a finite, positive loss of the untouched network, got "
                f"{float(rest)} on the first batch."
            )
        if rest >= broken:
            warnings.warn(
                f"loss_fn: the network's loss on the first batch, {float(rest):.3g}, is no better "
                f"than with noise in place of the selected leaves, {float(broken):.3g}. Is it "
                "trained, and are the batches like its training data?",
                stacklevel=4,
            )
        return rest, broken
