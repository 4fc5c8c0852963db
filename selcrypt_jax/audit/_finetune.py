"""Attacks with data: fine-tune the protected network, or parts of it, until it works."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from .._importance.closed import LossFn, wide
from .._tree.names import NamedLeaves, is_array, named_leaves
from .._tree.rings import checked_mask

TrainingLossFn = Callable[[PyTree, Any], tuple[Float[Array, ""], PyTree]]
"""``(params, batch) -> (scalar, params)``: the loss in training mode, and the parameters with the
running statistics updated by the batch."""


def floats(tree: NamedLeaves) -> dict[str, Any]:
    """The floating-point arrays of a tree, by name."""
    return {
        name: leaf
        for name, leaf in tree.leaves.items()
        if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    }


_POWER = 7  # of the average: half of it comes from the last twelfth of the steps


class Checkpoint(NamedTuple):
    """See `fine_tune`."""

    step: int
    params: PyTree
    loss: float
    average: PyTree


def fine_tune(
    params: PyTree,
    loss_fn: LossFn | TrainingLossFn,
    batch: Callable[[int], Any],
    *,
    stops: Sequence[int],
    optimizer: optax.GradientTransformation,
    rate: float | Callable[[int], float] = 1.0,
    trainable: PyTree | bool = True,
    statistics: bool = False,
    rate_factors: Mapping[str, float] | None = None,
) -> Iterator[Checkpoint]:
    """Fine-tunes the weights that are believed to be encrypted, or all weights.

    Args:
        params: protected parameters; not modified.
        loss_fn: ``(params, batch) -> scalar``; with `statistics`, a `TrainingLossFn`.
        batch: step number, from 1 → a batch of the attacker's data.
        stops: steps after which to yield a checkpoint, ascending.
        optimizer: any optax transformation.
        rate: factor on its updates, or step number → factor. Calls that differ only in the rate,
            or in the values of parameters and masks, share one compiled step: pass
            ``optax.adam(1.0)`` and set the rate here.
        trainable: a mask that fits the parameters; weights that it does not select stay
            unchanged. ``True``: all floats.
        statistics: whether `loss_fn` also returns parameters with updated running statistics.
            These updates are kept, whatever is trainable.
        rate_factors: leaf name → another factor on its updates; 1 if not named.

    Yields:
        At each stop, a named tuple of the ``step``, the ``params``, the ``loss`` of the last
        batch, and the running ``average`` of the params, with running statistics, half of which
        comes from the last twelfth of the steps so far. Training ends as soon as a loss is not
        finite; earlier checkpoints remain valid.

    Raises:
        ValueError: the stops do not ascend from 1, or the mask does not fit or selects nothing.

    References:
        The average is that of Shamir and Zhang, *Stochastic gradient descent for non-smooth
        optimization*, ICML 2013: weights grow as a power of the step, so it needs no end.

    Examples:
        >>> adam = optax.adam(1e-3)
        >>> found = list(fine_tune(protected, loss_fn, batch, stops=[1, 3], optimizer=adam))
        >>> [checkpoint.step for checkpoint in found]
        [1, 3]
    """
    steps = list(stops)
    if not steps or steps[0] < 1 or steps != sorted(set(steps)):
        raise ValueError(f"stops: expected ascending step numbers from 1, got {steps}.")
    tree = named_leaves(params)
    arrays = {n: jnp.asarray(leaf) for n, leaf in tree.leaves.items() if is_array(leaf)}
    whole = checked_mask(tree, trainable, "trainable")
    masks = {name: whole[name] for name in floats(tree)}
    if not any(mask.any() for mask in masks.values()):
        raise ValueError("trainable: expected a mask that selects some floats, got one without.")
    chosen = {name: arrays.pop(name) for name in masks}
    factors = {name: np.float32((rate_factors or {}).get(name, 1.0)) for name in chosen}
    static = (loss_fn, optimizer, statistics, Structure.of(tree))
    average = jax.tree.map(wide, chosen)
    carry = jax.tree.map(jnp.copy, (chosen, arrays, optimizer.init(chosen), average))
    number = 0
    for stop in steps:
        losses = []
        while number < stop:
            number += 1
            now = rate(number) if callable(rate) else rate
            pace = np.float32(now), np.float32((_POWER + 1) / (number + _POWER))
            carry, loss = _step(carry, masks, factors, batch(number), pace, *static)
            losses.append(loss)
        values = np.array(jax.device_get(losses))
        if not np.isfinite(values).all():
            return
        leaves, rest, average = jax.tree.map(jnp.copy, (carry[0], carry[1], carry[3]))
        average = {n: mean.astype(leaves[n].dtype) for n, mean in average.items()}
        params, average = tree.rebuild(leaves | rest), tree.rebuild(average | rest)
        yield Checkpoint(number, params, float(values[-1]), average)


def warm_cosine(rate: float, steps: int) -> Callable[[int], float]:
    """A rate with linear warm-up over a twentieth of the steps, then cosine decay to zero."""
    warm = max(steps // 20, 1)

    def at(step: int) -> float:
        if step <= warm:
            return rate * step / warm
        return rate * (1 + math.cos(math.pi * (step - warm) / (steps - warm + 1))) / 2

    return at


class Same:
    """A leaf that is not an array, compared by identity, whatever its own ``__eq__`` says."""

    def __init__(self, leaf: Any):
        self.leaf = leaf

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.leaf is self.leaf

    def __hash__(self) -> int:
        return id(self.leaf)


@dataclass(frozen=True)
class Structure:
    """A tree without its arrays; hashable, so that equal structures share a compiled step."""

    treedef: Any
    leaves: tuple[tuple[str, Same | None], ...]

    @classmethod
    def of(cls, tree: NamedLeaves) -> "Structure":
        """The structure of a tree."""
        same = {name: None if is_array(leaf) else Same(leaf) for name, leaf in tree.leaves.items()}
        return cls(tree.treedef, tuple(same.items()))

    def rebuild(self, arrays: Mapping[str, Array]) -> PyTree:
        return self.treedef.unflatten(
            arrays[name] if same is None else same.leaf for name, same in self.leaves
        )


@partial(jax.jit, donate_argnums=0, static_argnums=(5, 6, 7, 8))
def _step(
    carry: Any,
    masks: dict[str, Array],
    factors: dict[str, Array],
    batch: Any,
    pace: tuple[Array, Array],
    loss_fn: Any,
    optimizer: optax.GradientTransformation,
    statistics: bool,
    structure: Structure,
) -> tuple[Any, Array]:
    leaves, rest, state, average = carry
    rate, newest = pace

    def loss_of(leaves: dict[str, Array]) -> Any:
        found = loss_fn(structure.rebuild(leaves | rest), batch)
        return found if statistics else (found, None)

    (loss, after), gradients = jax.value_and_grad(loss_of, has_aux=True)(leaves)
    gradients = {name: jnp.where(masks[name], g, 0) for name, g in gradients.items()}
    with jax.numpy_dtype_promotion("standard"):  # optax itself mixes dtypes
        updates: Any
        updates, state = optimizer.update(gradients, state, leaves)
    # Mask the updates too: weight decay and momentum must not move frozen weights.
    moved = {}
    for n, leaf in leaves.items():
        update = wide(jnp.where(masks[n], updates[n], 0))
        moved[n] = leaf + ((rate * factors[n]).astype(update.dtype) * update).astype(leaf.dtype)
    if after is not None:
        new = named_leaves(after).leaves
        moved = {n: jnp.where(new[n] != leaves[n], new[n], leaf) for n, leaf in moved.items()}
        rest = {n: new[n] for n in rest}
    average = {
        n: mean + newest.astype(mean.dtype) * (wide(moved[n]) - mean) for n, mean in average.items()
    }
    return (moved, rest, state, average), loss
