"""Undoing the permutation, for an attacker who knows which weights are encrypted.

The cipher keeps the weights of a ring, up to their fine bits, in another order. With data, an
attacker can search for the original order. It is one of n!, but an approximate order may do.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .._importance.closed import LossFn, batch_at, batch_count, loss_of
from .._tree.groups import group_positions
from .._tree.names import is_array, listed, named_leaves
from .._tree.rings import split_rings
from ._finetune import Structure

_ADAM = optax.adam(0.1)  # for weights in standard deviations of their ring
_STEPS = 50  # gradient steps before each assignment

Unit = Literal["weight", "group"]
_ByLeaf = dict[str, Array]


class Unshuffled(NamedTuple):
    """See `unshuffle`."""

    params: PyTree
    loss: float
    trials: int


def unshuffle(
    params: PyTree,
    mask: PyTree,
    loss_fn: LossFn,
    batches: PyTree,
    *,
    trials: int,
    unit: Unit = "weight",
) -> Unshuffled:
    """Searches for an order of the selected weights in which the network works.

    Each round takes 50 Adam steps on the selected weights, first from their mean and then from the
    last order. It then assigns the existing values to positions by rank, which gives the nearest
    order in the least-squares sense. Groups are assigned by the Hungarian method. The best order
    of all rounds is kept, or the file's own if none is better.

    Args:
        params: protected parameters; not modified.
        mask: a mask of one encrypted ring, see `nested_masks`. Units are permuted within each
            leaf. If there are several rings, call it for one after the other.
        loss_fn: ``(params, batch) -> scalar``. Calls with the same function and the same number
            of weights share a compiled step.
        batches: pytree of arrays ``[batches, ...]``: the attacker's data.
        trials: the budget: evaluations of the loss or its gradient on one batch.
        unit: the unit that the cipher permutes, see `LosslessCipher`.

    Returns:
        A named tuple of ``params``, with the selected weights of each leaf in the best order;
        ``loss``, its loss averaged over the batches; and ``trials``, the number spent. Leaves with
        fewer than two units are passed through.

    Raises:
        ValueError: the mask does not fit, selects no leaf with two units or more, or selects
            integers; or there are too few trials to use each batch twice.

    Examples:
        >>> found = unshuffle(protected, masks[-1], loss_fn, batches, trials=20)
        >>> assert found.trials <= 20
    """
    if unit not in get_args(Unit):
        raise ValueError(f"unit: expected one of {get_args(Unit)}, got {unit!r}.")
    count = batch_count(batches)
    if trials < 2 * count + 1:
        raise ValueError(
            f"trials: expected at least {2 * count + 1} (one step, and {count} "
            f"batch{'es' * (count != 1)} before and after it), got {trials}."
        )
    tree = named_leaves(params)
    arrays = {n: jnp.asarray(leaf) for n, leaf in tree.leaves.items() if is_array(leaf)}
    positions: _ByLeaf = {}  # flat, [units, weights in a unit]
    for ring in split_rings(tree, (mask,)):
        found = group_positions(arrays[ring.name].shape, ring.mask)
        found = found.reshape(-1, 1) if unit == "weight" else found
        if len(found) > 1:
            positions[ring.name] = jnp.asarray(found)
    if not positions:
        raise ValueError(
            f"mask: expected a leaf with two or more {unit}s, got none: there is no order to find."
        )
    whole = [n for n in positions if not jnp.issubdtype(arrays[n].dtype, jnp.floating)]
    if whole:
        raise ValueError(
            f"mask: expected floats, which have gradients, got integers in {listed(whole)}. Remove "
            "these from the mask."
        )
    known = {n: arrays[n].reshape(-1)[where] for n, where in positions.items()}
    fixed = {"loss_fn": loss_fn, "structure": Structure.of(tree)}

    def mean_loss(values: _ByLeaf) -> float:
        losses = [
            _loss(values, positions, arrays, batch_at(batches, i), **fixed) for i in range(count)
        ]
        return float(np.nan_to_num(np.mean(losses), nan=np.inf))

    mean = {n: values.astype(jnp.float32).mean() for n, values in known.items()}
    std = {n: jnp.maximum(v.astype(jnp.float32).std(), 1e-12) for n, v in known.items()}
    best, least, used = known, mean_loss(known), count
    point = {n: jnp.zeros(values.shape, jnp.float32) for n, values in known.items()}
    while used + count < trials:
        carry = point, _ADAM.init(point)
        for number in range(used, min(used + _STEPS, trials - count)):
            carry = _gradient_step(
                carry, mean, std, positions, arrays, batch_at(batches, number), **fixed
            )
            used += 1
        wanted = jax.device_get(carry[0])
        values = {n: v[_nearest(wanted[n], np.asarray(v, np.float32))] for n, v in known.items()}
        loss, used = mean_loss(values), used + count
        if loss < least:
            best, least = values, loss
        point = {n: (v.astype(jnp.float32) - mean[n]) / std[n] for n, v in values.items()}
    leaves = _assembled(best, positions, arrays)
    return Unshuffled(tree.rebuild({n: leaves[n] for n in positions}), least, used)


def _assembled(values: _ByLeaf, positions: _ByLeaf, arrays: _ByLeaf) -> _ByLeaf:
    """All leaves, with these values at their positions."""
    leaves = dict(arrays)
    for name, where in positions.items():
        flat = leaves[name].reshape(-1)
        flat = flat.at[where].set(values[name].astype(flat.dtype))
        leaves[name] = flat.reshape(arrays[name].shape)
    return leaves


@partial(jax.jit, static_argnames=("loss_fn", "structure"))
def _loss(
    values: _ByLeaf,
    positions: _ByLeaf,
    arrays: _ByLeaf,
    batch: Any,
    *,
    loss_fn: LossFn,
    structure: Structure,
) -> Array:
    return loss_of(loss_fn, structure.rebuild(_assembled(values, positions, arrays)), batch)


@partial(jax.jit, static_argnames=("loss_fn", "structure"))
def _gradient_step(
    carry: Any,
    mean: _ByLeaf,
    std: _ByLeaf,
    positions: _ByLeaf,
    arrays: _ByLeaf,
    batch: Any,
    *,
    loss_fn: LossFn,
    structure: Structure,
) -> Any:
    point, state = carry

    def loss(point: _ByLeaf) -> Array:
        values = {name: mean[name] + std[name] * u for name, u in point.items()}
        return _loss(values, positions, arrays, batch, loss_fn=loss_fn, structure=structure)

    gradient = jax.grad(loss)(point)
    with jax.numpy_dtype_promotion("standard"):  # optax itself mixes dtypes
        updates: Any
        updates, state = _ADAM.update(gradient, state, point)
    return {name: u + updates[name] for name, u in point.items()}, state


def _nearest(wanted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The order of ``values``, ``[units, weights]``, that is nearest to the wanted values."""
    wanted = np.nan_to_num(wanted)  # after divergence, any order will do
    if values.shape[1] > 1:
        from scipy.optimize import linear_sum_assignment  # JAX itself needs SciPy

        return linear_sum_assignment(wanted @ values.T, maximize=True)[1]
    order = np.empty(len(values), np.int32)
    order[wanted[:, 0].argsort()] = values[:, 0].argsort()
    return order
