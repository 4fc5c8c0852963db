"""Undoing the permutation: an attacker knows where encrypted weights are, and which they are.

The cipher keeps the weights of a ring up to their fine bits, in another order. With data, that
order can be searched for: weight by weight it is one of n!, but a network forgives much.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._importance.closed import LossFn, batch_count
from .._tree.groups import group_positions
from .._tree.names import is_array, listed, named_leaves
from .._tree.rings import split_rings
from ._finetune import Structure

_ADAM = optax.adam(0.1)  # of weights in standard deviations of their ring
_STEPS = 50  # along the gradient before each assignment

Method = Literal["assign", "swap"]
Unit = Literal["weight", "group"]
_Orders = dict[str, Array]


class Unshuffled(NamedTuple):
    """What was found.

    Attributes:
        params: as protected, with the selected weights of each leaf in another order.
        loss: of those, mean over the batches.
        trials: evaluations of the loss, or of its gradient, on one batch.
    """

    params: PyTree
    loss: float
    trials: int


class _Table(NamedTuple):
    """The selected weights of a leaf: flat positions and values, ``[units, weights in a unit]``."""

    positions: Array
    values: Array


def unshuffle(
    params: PyTree,
    mask: PyTree,
    loss_fn: LossFn,
    batches: PyTree,
    *,
    key: PRNGKeyArray,
    trials: int,
    unit: Unit = "weight",
    method: Method = "assign",
) -> Unshuffled:
    """Looks for an order of the selected weights in which the network works.

    *assign*: goes along the gradient with respect to the selected weights, first from their mean
    and then from the last order, for 50 steps of Adam; then gives the values that there are to the
    places, smallest to smallest, which is the nearest order by squares. Groups are given to their
    places by the Hungarian method. The best order of all rounds is kept, or the file's own.

    *swap*: exchanges two units of a leaf at random and keeps that where the loss of the batch
    falls; batch after batch, each for the same number of trials.

    Args:
        params: protected parameters; not changed.
        mask: where one ring is encrypted; one that fits, see `nested_masks`. In each leaf, units
            are exchanged among themselves. For several rings one after the other.
        loss_fn: ``(params, batch) -> scalar``. Calls with the same one and with as many weights
            share a compiled step.
        batches: pytree of arrays ``[batches, ...]``: the data that the attacker has.
        key: typed; draws the swaps.
        trials: how many evaluations of the loss or its gradient may be spent.
        unit: what the cipher moves, see `LosslessCipher`.
        method: see above. One can go on from what the other has found.

    Returns:
        The parameters found in the end, and what they cost. Leaves without a unit to exchange
        are passed through.

    Raises:
        ValueError: a mask that does not fit or selects no two units of a leaf; with "assign",
            leaves that are no floats; too few trials to look at each batch twice.
    """
    for name, value, known in (("unit", unit, Unit), ("method", method, Method)):
        if value not in get_args(known):
            raise ValueError(f"{name}: expected one of {get_args(known)}, got {value!r}.")
    count = batch_count(batches)
    if trials < 2 * count + 1:
        raise ValueError(
            f"trials: expected at least {2 * count + 1}, for {count} batches before and after one "
            f"step, got {trials}."
        )
    tree = named_leaves(params)
    arrays = {n: jnp.asarray(leaf) for n, leaf in tree.leaves.items() if is_array(leaf)}
    tables = {}
    for ring in split_rings(tree, (mask,)):
        positions = group_positions(arrays[ring.name].shape, ring.mask)
        if unit == "weight":
            positions = positions.reshape(-1, 1)
        if len(positions) > 1:
            values = arrays[ring.name].reshape(-1)[positions]
            tables[ring.name] = _Table(jnp.asarray(positions), values)
    if not tables:
        raise ValueError(
            f"mask: expected two {unit}s or more in some leaf, got none. There is no order to find."
        )
    whole = [n for n in tables if not jnp.issubdtype(arrays[n].dtype, jnp.floating)]
    if method == "assign" and whole:
        raise ValueError(
            f"mask: expected floats, which have gradients, got integers in {listed(whole)}. Use "
            "method='swap'."
        )
    structure = Structure.of(tree)
    game = _Game(loss_fn, structure, arrays, tables, batches, count)
    search = _swap if method == "swap" else _assign
    orders, used = search(game, key, trials)
    leaves = _assembled(arrays, tables, {n: t.values[orders[n]] for n, t in tables.items()})
    found = tree.rebuild({name: leaves[name] for name in tables})
    return Unshuffled(found, game.mean_loss(orders), used)


class _Game(NamedTuple):
    """What is the same in all trials."""

    loss_fn: LossFn
    structure: Structure
    arrays: dict[str, Array]
    tables: dict[str, _Table]
    batches: PyTree
    total: int

    def batch(self, number: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[number % self.total], self.batches)

    def start(self) -> _Orders:
        return {n: jnp.arange(len(t.values), dtype=jnp.int32) for n, t in self.tables.items()}

    def swap(self, orders: _Orders, pairs: Any, loss: Any, number: int) -> tuple[_Orders, Array]:
        fixed = self.tables, self.arrays, self.batch(number)
        static = {"loss_fn": self.loss_fn, "structure": self.structure}
        return _swap_step(orders, pairs, loss, *fixed, **static)

    def loss(self, orders: _Orders, number: int) -> Array:
        """Of one batch: what a swap with itself costs."""
        nothing = {name: np.zeros(2, np.int32) for name in self.tables}
        return self.swap(orders, nothing, np.float32(np.inf), number)[1]

    def mean_loss(self, orders: _Orders) -> float:
        return float(np.mean([self.loss(orders, number) for number in range(self.total)]))


def _assembled(
    arrays: Mapping[str, Array], tables: Mapping[str, _Table], values: Mapping[str, Array]
) -> dict[str, Array]:
    """All leaves, with these values at the places of the tables."""
    leaves = dict(arrays)
    for name, table in tables.items():
        flat = leaves[name].reshape(-1)
        flat = flat.at[table.positions].set(values[name].astype(flat.dtype))
        leaves[name] = flat.reshape(arrays[name].shape)
    return leaves


def _swap(game: _Game, key: PRNGKeyArray, trials: int) -> tuple[_Orders, int]:
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    names = list(game.tables)
    units = np.array([len(game.tables[name].values) for name in names])
    ends = np.linspace(0, trials, game.total + 1).astype(int)
    orders = game.start()
    for number in range(game.total):
        loss = game.loss(orders, number)
        for leaf in rng.choice(
            len(names), ends[number + 1] - ends[number] - 1, p=units / sum(units)
        ):
            # A leaf that is not drawn exchanges a unit with itself: one step for all leaves.
            pairs = {name: np.zeros(2, np.int32) for name in names}
            pairs[names[leaf]] = rng.choice(units[leaf], 2, replace=False).astype(np.int32)
            orders, loss = game.swap(orders, pairs, loss, number)
    return orders, trials


@partial(jax.jit, static_argnames=("loss_fn", "structure"))
def _swap_step(
    orders: _Orders,
    pairs: dict[str, Array],
    loss: Array,
    tables: dict[str, _Table],
    arrays: dict[str, Array],
    batch: Any,
    *,
    loss_fn: LossFn,
    structure: Structure,
) -> tuple[_Orders, Array]:
    """The better of two orders, and its loss."""
    swapped = {n: order.at[pairs[n]].set(order[pairs[n][::-1]]) for n, order in orders.items()}
    values = {name: table.values[swapped[name]] for name, table in tables.items()}
    new = loss_fn(structure.rebuild(_assembled(arrays, tables, values)), batch)
    new = jnp.where(jnp.isnan(new), jnp.inf, new).astype(jnp.float32)
    better = new < loss
    orders = {n: jnp.where(better, swapped[n], order) for n, order in orders.items()}
    return orders, jnp.minimum(new, loss)


def _assign(game: _Game, key: PRNGKeyArray, trials: int) -> tuple[_Orders, int]:
    del key  # nothing is drawn
    known: dict[str, np.ndarray] = {}  # values in standard deviations of their ring
    scales: dict[str, Array] = {}
    for name, table in game.tables.items():
        wide = np.asarray(table.values, np.float32)
        mean, std = wide.mean(), max(wide.std(), np.float32(1e-12))
        known[name], scales[name] = (wide - mean) / std, jnp.stack([mean, std])
    best = game.start()
    least, used = game.mean_loss(best), game.total
    point = {name: np.zeros_like(values) for name, values in known.items()}
    while used + game.total < trials:
        carry = point, _ADAM.init(jax.tree.map(jnp.asarray, point))
        for number in range(used, min(used + _STEPS, trials - game.total)):
            carry = _gradient_step(
                carry, scales, game.tables, game.arrays, game.batch(number),
                loss_fn=game.loss_fn, structure=game.structure,
            )  # fmt: skip
            used += 1
        wanted = jax.device_get(carry[0])
        orders = {name: _nearest(wanted[name], values) for name, values in known.items()}
        loss, used = game.mean_loss(orders), used + game.total
        if loss < least:
            best, least = orders, loss
        point = {name: values[np.asarray(orders[name])] for name, values in known.items()}
    return best, used


@partial(jax.jit, static_argnames=("loss_fn", "structure"))
def _gradient_step(
    carry: Any,
    scales: dict[str, Array],
    tables: dict[str, _Table],
    arrays: dict[str, Array],
    batch: Any,
    *,
    loss_fn: LossFn,
    structure: Structure,
) -> Any:
    point, state = carry

    def loss(point: dict[str, Array]) -> Array:
        values = {name: scales[name][0] + scales[name][1] * u for name, u in point.items()}
        return loss_fn(structure.rebuild(_assembled(arrays, tables, values)), batch)

    gradient = jax.grad(loss)(point)
    with jax.numpy_dtype_promotion("standard"):  # optax itself mixes dtypes
        updates: Any
        updates, state = _ADAM.update(gradient, state, point)
    return {name: u + updates[name] for name, u in point.items()}, state


def _nearest(wanted: np.ndarray, values: np.ndarray) -> Array:
    """The order in which ``values``, ``[units, weights]``, are nearest to what is wanted."""
    wanted = np.nan_to_num(wanted)  # a rate that failed is a guess that fails
    order = np.empty(len(values), np.int32)
    if values.shape[1] == 1:
        order[wanted[:, 0].argsort()] = values[:, 0].argsort()
    else:
        from scipy.optimize import linear_sum_assignment  # JAX itself needs SciPy

        order[:] = linear_sum_assignment(wanted @ values.T, maximize=True)[1]
    return jnp.asarray(order)
