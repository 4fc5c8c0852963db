"""PSS at a budget: learns which groups to encrypt when their number is given.

Every step encrypts exactly as many groups as the budget has, chosen at random by how much damage
each is believed to do (Thompson sampling). One backward pass tells two things: of every group that
is encrypted, an unbiased sample of the damage that it does beside the others; and of every other
group, the slope of the loss if it was encrypted too. Damages are few and sure, slopes are many and
only of first order. So a regression learns from the damages what a group's slope and size say about
its damage, and that is the estimate for groups that were seldom tried.

References:
    Chen, Wang, Yuan, Combinatorial multi-armed bandit, ICML 2013 (feedback from each chosen arm).
    Russo, Van Roy, Kazerouni, Osband, Wen, A tutorial on Thompson sampling, 2018.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int8, PRNGKeyArray, PyTree

from .._tree.names import constants_move
from .._tree.shares import exact
from .closed import batch_at
from .config import PSSBudgets
from .frozen import Frozen, Leaves, PSSMetrics

PRIOR = 3.0  # what slope and size say about a group counts like this many damages of its own
RECENT = 0.9  # of the mean of slopes, a step
FORGET = 0.5  # of damages, from a budget to the next: other groups are encrypted beside them

_MOST = np.uint32(2**32 - 1)
Groups = dict[str, Float[Array, "..."]]


class PSSBudgetState(NamedTuple):
    """The whole state of learning at budgets: a pytree that can be saved and restored.

    Attributes:
        damage: name → estimated change of the log loss by encrypting the group.
        slope: name → mean first-order change, from steps in which the group was not encrypted.
        tried: name → number of steps in which the group was encrypted, less what was forgotten.
        included: name → number of finished budgets that include the group.
        moments: of the regression: ``[features, features]`` and ``[features]``.
        step: number of steps taken.
        key: the noise of step t comes from ``fold_in(key, t)``, so a resumed run equals an
            uninterrupted one.

    Examples:
        >>> learner = pss_learner(loss_fn, params, config=PSSBudgets((0.1, 0.5), steps=4))
        >>> state = learner.init(params, batches, key=jax.random.key(0))
        >>> state, metrics = learner.run(params, batches, state, learner.steps)
        >>> chosen = jax.tree.map(lambda budgets: budgets > 0, state.included)
    """

    damage: Groups
    slope: Groups
    tried: Groups
    included: dict[str, Int8[Array, "..."]]
    moments: tuple[Float[Array, "2 2"], Float[Array, " 2"]]
    step: Int[Array, ""]
    key: PRNGKeyArray


def budget_counts(frozen: Frozen, config: PSSBudgets) -> np.ndarray:
    """The number of groups at each budget: ``[budgets, leaves]``, or ``[budgets, 1]`` in all.

    Raises:
        ValueError: a budget without a group, or that adds none to the one before.
    """
    sizes = [math.prod(shape) for shape in frozen.shapes.values()]
    if config.scope == "model":
        sizes = [sum(sizes)]
    counts = np.array([[math.floor(exact(s) * size) for size in sizes] for s in config.shares])
    for number, share in enumerate(config.shares):
        fewer = counts[number - 1].sum() if number else 0
        if counts[number].sum() <= fewer:
            most = f"the {sizes[0]} of the model" if config.scope == "model" else f"any of {sizes}"
            raise ValueError(
                f"shares[{number}]: expected a budget that adds a group, got {share!r}: "
                f"{counts[number].sum()} of {most}, after {fewer}. Take a larger share"
                + (', or scope="model".' if config.scope == "leaf" else ".")
            )
    return counts


class AtBudgets:
    """Learning at budgets, one after the other; see `pss_learner`."""

    def __init__(self, frozen: Frozen, config: PSSBudgets) -> None:
        self.frozen, self.config = frozen, config
        self.counts = budget_counts(frozen, config)

    @constants_move()
    def init(self, params: PyTree, batches: PyTree, *, key: PRNGKeyArray) -> PSSBudgetState:
        """The state before the first step; groups are believed to matter by their size."""
        self.frozen.check(params, batches, key, positive=True)
        zeros = {n: jnp.zeros(shape, jnp.float32) for n, shape in self.frozen.shapes.items()}
        included = {name: leaf.astype(jnp.int8) for name, leaf in zeros.items()}
        moments = jnp.zeros((2, 2), jnp.float32), jnp.zeros(2, jnp.float32)
        damage = self._expected(self._sizes(self.frozen.arrays(params)), zeros, moments)
        return PSSBudgetState(damage, zeros, zeros, included, moments, jnp.int32(0), key)

    @constants_move()
    def scores(self, state: PSSBudgetState) -> PyTree:
        """The groups of the smallest budget first; among equals, by estimated damage."""
        total = sum(jnp.abs(leaf).sum() for leaf in state.damage.values())
        typical = total / sum(leaf.size for leaf in state.damage.values())
        return self.frozen.rebuild_only(
            {
                name: state.included[name].astype(jnp.float32)
                + leaf / (jnp.abs(leaf) + typical) / 2
                for name, leaf in state.damage.items()
            }
        )

    def step(
        self, leaves: Leaves, batches: PyTree, state: PSSBudgetState
    ) -> tuple[PSSBudgetState, PSSMetrics]:
        """A gradient step."""
        frozen, names = self.frozen, self.frozen.names
        batch = batch_at(batches, state.step)
        stage, heat, last = self._schedule(state.step)
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        doubt = frozen.draw(jax.random.normal, keys[0], frozen.shapes)
        depth = frozen.draw(jax.random.uniform, keys[1], frozen.shapes)
        noise = frozen.noise(leaves, keys[2])
        wide = {name: leaves[name].astype(jnp.float32) for name in names}

        sizes = self._sizes(leaves)
        expected = self._expected(sizes, state.slope, state.moments)
        # Doubt in proportion to what is expected: small groups seldom turn out to matter.
        trial = {
            name: state.damage[name]
            + heat * doubt[name] * jnp.abs(expected[name]) / jnp.sqrt(1 + state.tried[name] / PRIOR)
            for name in names
        }
        kept = {name: state.included[name] > 0 for name in names}
        chosen = self._best(trial, kept, stage)
        open_ = {name: chosen[name] & ~kept[name] for name in names}
        # The derivative by a gate that is uniform in (0, 1) has the damage as its mean.
        gates = {n: jnp.where(kept[n], 1, jnp.where(open_[n], depth[n], 0)) for n in names}
        mixed = {n: wide[n] + gates[n] * (noise[n] - wide[n]) for n in names}
        mixed = {name: leaf.astype(leaves[name].dtype) for name, leaf in mixed.items()}

        def objective(mixed: Leaves) -> tuple[Array, Array]:
            loss = frozen.loss(leaves, mixed, batch)
            # Logarithm: damage multiplies a network's loss, group by group.
            return jnp.log(jnp.maximum(loss, jnp.finfo(jnp.float32).tiny)), loss

        gradients, loss = jax.grad(objective, has_aux=True)(mixed)
        damage, slope, tried = {}, {}, {}
        for name in names:
            gradient = gradients[name].astype(jnp.float32)
            axes = frozen.axes[name]
            seen = (gradient * (noise[name] - wide[name])).sum(axes, keepdims=True)
            flat = (gradient * (wide[name].mean() - wide[name])).sum(axes, keepdims=True)
            # A loss that overflows has broken the network, and its gradients say nothing.
            open_[name] &= jnp.isfinite(seen)
            still = chosen[name] | ~jnp.isfinite(flat)
            rate = jnp.maximum(1 - RECENT, 1 / (state.step + 1).astype(jnp.float32))
            damage[name] = jnp.where(open_[name], seen, 0)
            slope[name] = state.slope[name] + jnp.where(still, 0, rate * (flat - state.slope[name]))
            tried[name] = state.tried[name] + open_[name].astype(jnp.float32)
        moments = self._moments(state, sizes, damage, open_)
        news = self._expected(sizes, slope, moments)
        for name in names:
            total = _total(state.damage[name], state.tried[name], expected[name])
            damage[name] = (PRIOR * news[name] + total + damage[name]) / (PRIOR + tried[name])
        state = PSSBudgetState(
            damage, slope, tried, state.included, moments, state.step + 1, state.key
        )
        state = lax.cond(last, lambda s: self._finish(s, news, stage), lambda s: s, state)
        encrypted = jnp.stack([leaf.sum() for leaf in chosen.values()]).sum()
        return state, PSSMetrics(loss, encrypted.astype(jnp.float32))

    def _schedule(self, step: Array) -> tuple[Array, Array, Array]:
        """The budget of a step, the doubt left in it, and whether it is the last one for it."""
        budgets, steps = len(self.counts), self.config.steps
        ends = [steps * number // budgets for number in range(budgets + 1)]
        starts = jnp.asarray(ends, jnp.int32)
        stage = jnp.clip(
            jnp.searchsorted(starts, step, side="right").astype(jnp.int32) - 1, 0, budgets - 1
        )
        start, end = starts[stage], starts[stage + 1]
        left = (end - step).astype(jnp.float32) / (end - start).astype(jnp.float32)
        return stage, left, step + 1 == end

    def _finish(self, state: PSSBudgetState, expected: Groups, stage: Array) -> PSSBudgetState:
        """Includes the best groups in this budget and all larger ones."""
        kept = {name: leaf > 0 for name, leaf in state.included.items()}
        best = self._best(state.damage, kept, stage)
        budgets = len(self.counts)
        included = {
            name: jnp.where(best[name] & ~kept[name], (budgets - stage).astype(jnp.int8), leaf)
            for name, leaf in state.included.items()
        }
        tried = {name: FORGET * leaf for name, leaf in state.tried.items()}
        damage = {}
        for name, leaf in state.damage.items():
            total = _total(leaf, state.tried[name], expected[name])
            damage[name] = (PRIOR * expected[name] + FORGET * total) / (PRIOR + tried[name])
        moments = (FORGET * state.moments[0], FORGET * state.moments[1])
        return state._replace(damage=damage, tried=tried, included=included, moments=moments)

    def _sizes(self, leaves: Leaves) -> Groups:
        """Squared norms of the groups."""
        return {
            name: jnp.square(leaves[name].astype(jnp.float32)).sum(axes, keepdims=True)
            for name, axes in self.frozen.axes.items()
        }

    def _moments(
        self, state: PSSBudgetState, sizes: Groups, damage: Groups, open_: dict[str, Array]
    ) -> tuple[Array, Array]:
        """The moments of the regression with the damages of one step."""
        square, cross = (RECENT * moment for moment in state.moments)
        for name in self.frozen.names:
            features = jnp.stack([state.slope[name], sizes[name]]).reshape(2, -1)
            features = jnp.where(open_[name].reshape(-1), features, 0)
            square += features @ features.T
            cross += features @ damage[name].reshape(-1)
        return square, cross

    def _expected(self, sizes: Groups, slope: Groups, moments: tuple[Array, Array]) -> Groups:
        """The damage that a group's slope and size let expect: least squares, not negative."""
        square, cross = moments
        scale = jnp.sqrt(jnp.maximum(jnp.diag(square), 1e-30))
        cross = cross / scale
        shared = square[0, 1] / scale[0] / scale[1]
        both = (cross - shared * cross[::-1]) / jnp.maximum(1 - shared**2, 1e-6)
        # Where one weight would be negative, the best is the better feature alone.
        better = jnp.where(cross >= cross.max(), jnp.maximum(cross, 0), 0)
        by_slope, by_size = jnp.where((both >= 0).all(), both, better) / scale
        # Before anything was seen, or if nothing fits: by size, as `l2` does.
        by_size = jnp.where((by_slope > 0) | (by_size > 0), by_size, 1e-6)
        return {n: by_slope * slope[n] + by_size * sizes[n] for n in self.frozen.names}

    def _best(self, values: Groups, kept: dict[str, Array], stage: Array) -> dict[str, Array]:
        """The most important groups of a budget, with those that are kept."""
        names = self.frozen.names
        bits = {name: jnp.where(kept[name], _MOST, _ordered(values[name])) for name in names}
        counts = jnp.asarray(self.counts, jnp.int32)[stage]
        if self.config.scope == "model":
            least = _least(list(bits.values()), counts[0])
            return {name: leaf >= least for name, leaf in bits.items()}
        return {name: bits[name] >= _least([bits[name]], counts[i]) for i, name in enumerate(names)}


def _total(damage: Array, tried: Array, expected: Array) -> Array:
    """The sum of a group's damages: what its estimate holds beyond the expectation."""
    return damage * (PRIOR + tried) - PRIOR * expected


def _ordered(values: Float[Array, "..."]) -> Array:
    """Floats as unsigned integers in the same order, below the largest one."""
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _least(leaves: list[Array], count: Array) -> Array:
    """The ``count``-th largest of all numbers, bit by bit: no sort, and no copy of the leaves."""

    def with_bit(index: Array, least: Array) -> Array:
        higher = least | (jnp.uint32(1 << 31) >> jnp.asarray(index, jnp.uint32))
        above = jnp.stack([(leaf >= higher).sum(dtype=jnp.int32) for leaf in leaves]).sum(
            dtype=jnp.int32
        )
        return jnp.where(above >= count, higher, least)

    return jnp.where(count > 0, lax.fori_loop(0, 32, with_bit, jnp.uint32(0)), _MOST)
