"""What a thief does with data: trains the protected network, or parts of it, until it works."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .._importance import LossFn
from .._masks import checked_mask
from .._tree import AnyArray, is_array, named_leaves


class Checkpoint(NamedTuple):
    """Where the thief is.

    Attributes:
        step: steps taken.
        params: as they are then.
        loss: of the last batch.
    """

    step: int
    params: PyTree
    loss: float


def fine_tune(
    params: PyTree,
    loss_fn: LossFn,
    batch: Callable[[int], Any],
    *,
    stops: Sequence[int],
    optimizer: optax.GradientTransformation,
    trainable: PyTree | bool = True,
) -> Iterator[Checkpoint]:
    """Trains what the thief believes to be encrypted, or everything.

    Args:
        params: protected parameters; not changed.
        loss_fn: ``(params, batch) -> scalar``.
        batch: number of the step, from 1 → a batch of the data that the thief has.
        stops: numbers of steps after which he stops to look, ascending.
        optimizer: any optax transformation.
        trainable: a mask that fits the parameters; weights that it does not select stay as they
            are. ``True``: all floats.

    Yields:
        A checkpoint at each stop. Training ends early where the loss is not finite: that rate
        has failed, and what was reached before it counts.

    Raises:
        ValueError: stops that do not ascend from 1, or a mask that does not fit or that selects
            nothing.
    """
    steps = list(stops)
    if not steps or steps[0] < 1 or steps != sorted(set(steps)):
        raise ValueError(f"stops: expected ascending numbers of steps from 1, got {steps}.")
    tree = named_leaves(params)
    floats = {
        name: leaf
        for name, leaf in tree.leaves.items()
        if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    if trainable is True:
        masks = dict.fromkeys(floats, np.asarray(True))
    else:
        whole = checked_mask(tree, trainable, "trainable")
        masks = {name: whole[name] for name in floats if whole[name].any()}
    if not masks:
        raise ValueError("trainable: expected to select floats, got a mask that selects none.")
    chosen = {name: jnp.asarray(floats[name]) for name in masks}
    arrays = {n: leaf for n, leaf in tree.leaves.items() if is_array(leaf) and n not in chosen}
    passive = {n: leaf for n, leaf in tree.leaves.items() if not is_array(leaf)}

    @partial(jax.jit, donate_argnums=0)
    def step(carry: Any, rest: dict[str, AnyArray], batch: Any) -> tuple[Any, Array]:
        leaves, state = carry

        def loss_of(leaves: dict[str, Array]) -> Array:
            return loss_fn(tree.rebuild(leaves | rest | passive), batch)

        loss, gradients = jax.value_and_grad(loss_of)(leaves)
        gradients = {name: jnp.where(masks[name], g, 0) for name, g in gradients.items()}
        with jax.numpy_dtype_promotion("standard"):  # optax itself mixes dtypes
            updates: Any
            updates, state = optimizer.update(gradients, state, leaves)
        # Once more: decay and momentum of an optimizer must not move what stays.
        moved = {n: leaf + jnp.where(masks[n], updates[n], 0) for n, leaf in leaves.items()}
        return (moved, state), loss

    carry = jax.tree.map(jnp.copy, (chosen, optimizer.init(chosen)))
    number = 0
    for stop in steps:
        losses = []
        while number < stop:
            number += 1
            carry, loss = step(carry, arrays, batch(number))
            losses.append(loss)
        values = np.array(jax.device_get(losses))
        if not np.isfinite(values).all():
            return
        yield Checkpoint(number, tree.rebuild(jax.tree.map(jnp.copy, carry[0])), float(values[-1]))
