"""PSS, the probabilistic selection strategy: learns importance with gates on a frozen network.

Every group of weights gets a hard-concrete gate. Only the gates' ``log α`` are learned, over all
leaves together (or leaf by leaf); the importance of a group is its ``log α``.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._tree.groups import Granularity, Layout, group_shape
from .._tree.names import (
    AnyArray,
    Selector,
    check_key,
    constants_move,
    named_leaves,
    select_differentiable,
)
from .closed import LossFn, batch_count, checked_loss
from .config import PSSConfig
from .gates import hard_concrete, probability_open


class PSSState(NamedTuple):
    """The whole state of learning: a pytree that can be saved and restored.

    Attributes:
        log_alpha: name → log α of the leaf's groups.
        opt_state: state of the optimiser.
        step: number of steps taken.
        key: the noise of step t comes from ``fold_in(key, t)``, so a resumed run equals an
            uninterrupted one.
        cap: log of the loss at which the network counts as broken.

    Examples:
        >>> learner = pss_learner(loss_fn, params, config=PSSConfig(steps=4))
        >>> state = learner.init(params, batches, key=jax.random.key(0))
        >>> saved = state._replace(key=jax.random.key_data(state.key))  # plain arrays, to be saved
        >>> state = saved._replace(key=jax.random.wrap_key_data(saved.key))
        >>> state, metrics = learner.run(params, batches, state, 2)
    """

    log_alpha: dict[str, Float[Array, "..."]]
    opt_state: optax.OptState
    step: Int[Array, ""]
    key: PRNGKeyArray
    cap: Float[Array, ""]


class PSSMetrics(NamedTuple):
    """The metrics of each step, ``[steps]``.

    Attributes:
        loss: task loss with the gates in place.
        open: expected number of open gates.
    """

    loss: Float[Array, " steps"]
    open: Float[Array, " steps"]


class PSSLearner(NamedTuple):
    """Pure functions that learn importance, in the style of an optax transformation.

    Attributes:
        init: ``(params, batches, key=...) -> PSSState``.
        run: ``(params, batches, state, steps) -> (PSSState, PSSMetrics)``, jitted; step t uses
            batch t modulo the number of batches.
        scores: ``(state) -> scores``, a pytree of the structure of params.
        steps: the total number of steps in the configuration.

    Examples:
        >>> learner = pss_learner(loss_fn, params, config=PSSConfig(steps=4))
        >>> state = learner.init(params, batches, key=jax.random.key(0))
        >>> state, metrics = learner.run(params, batches, state, learner.steps)
        >>> masks = nested_masks(learner.scores(state), [0.02, 0.08])
    """

    init: Callable[..., PSSState]
    run: Callable[[PyTree, PyTree, PSSState, int], tuple[PSSState, PSSMetrics]]
    scores: Callable[[PSSState], PyTree]
    steps: int


def pss_learner(
    loss_fn: LossFn,
    params: PyTree,
    *,
    config: PSSConfig = PSSConfig(),
    select: Selector = None,
    granularity: Granularity = "kernel",
    layout: Layout = "HWIO",
) -> PSSLearner:
    """Makes the functions that `pss` runs in a loop; use them to checkpoint or to stop early.

    Args:
        loss_fn: ``(params, batch) -> scalar``, positive; params are trained and frozen.
        params: pytree, for its structure and shapes; `init` and `run` use the values passed to
            them.
        config: see `PSSConfig`.
        select: leaves with gates: a regular expression, a function ``(name, leaf) -> bool``, or
            ``None`` for floats with two axes or more.
        granularity: ``"kernel"``, ``"filter"`` or ``"weight"``: the unit that shares a gate.
        layout: ``"HWIO"`` or ``"OIHW"``.

    Returns:
        Functions to start, to learn for some steps, and to read the scores.

    Raises:
        ValueError: nothing is selected, or a selected leaf has no gradients.

    Examples:
        >>> learner = pss_learner(loss_fn, params, config=PSSConfig(steps=4))
        >>> state = learner.init(params, batches, key=jax.random.key(0))
        >>> for _ in range(2):
        ...     state, metrics = learner.run(params, batches, state, 2)
        >>> scores = learner.scores(state)
    """
    tree = named_leaves(params)
    shapes = {
        name: group_shape(leaf.shape, granularity, layout)
        for name, leaf in select_differentiable(params, select).items()
    }
    names = list(shapes)
    optimizer = config.optimizer or optax.adam(0.1, eps=max(config.penalty / 10, 1e-8))
    at_rest = 1.0 if config.objective == "keep" else 0.0
    taken = tree.arrays.keys()

    def arrays(params: PyTree) -> dict[str, AnyArray]:
        return {n: leaf for n, leaf in named_leaves(params).leaves.items() if n in taken}

    def task_loss(leaves: dict[str, AnyArray], changed: dict[str, AnyArray], batch: Any) -> Array:
        loss = loss_fn(tree.rebuild(leaves | changed), batch)
        return checked_loss(loss).astype(jnp.float32)

    # One draw for all leaves: it compiles in a fraction of the time of one draw per leaf.
    def draw(
        sample: Callable[..., Array], key: PRNGKeyArray, shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, Array]:
        order = sorted(shapes)  # not the container's order: equal paths give equal noise
        ends = np.cumsum([math.prod(shapes[name]) for name in order])
        parts = jnp.split(sample(key, (int(ends[-1]),), jnp.float32), ends[:-1])
        return {n: part.reshape(shapes[n]) for n, part in zip(order, parts, strict=True)}

    def noise(leaves: dict[str, AnyArray], key: PRNGKeyArray) -> dict[str, AnyArray]:
        """Normal noise with each leaf's mean and standard deviation."""
        normal = draw(jax.random.normal, key, {name: leaves[name].shape for name in names})
        wide = {name: leaves[name].astype(jnp.float32) for name in names}
        return {name: wide[name].mean() + wide[name].std() * normal[name] for name in names}

    def gates(log_alpha: dict[str, Array], key: PRNGKeyArray) -> dict[str, Array]:
        uniform = draw(jax.random.uniform, key, shapes) if config.sampled else {}
        return {
            name: hard_concrete(log_alpha[name], uniform=uniform.get(name), beta=config.beta)
            for name in names
        }

    @jax.jit
    def rest_and_broken(leaves: dict[str, AnyArray], batch: Any, key: PRNGKeyArray) -> Array:
        everything = {n: leaf.astype(leaves[n].dtype) for n, leaf in noise(leaves, key).items()}
        return jnp.stack([task_loss(leaves, {}, batch), task_loss(leaves, everything, batch)])

    @constants_move()
    def init(params: PyTree, batches: PyTree, *, key: PRNGKeyArray) -> PSSState:
        check_key(key)
        leaves = arrays(params)
        for name in names:
            if not bool(jnp.isfinite(leaves[name]).all()):
                raise ValueError(
                    f"params {name!r}: expected finite weights, got NaN or Inf. Nothing can be "
                    "learned from such a network: go back to its last good checkpoint."
                )
        batch_count(batches)
        first = jax.tree.map(lambda leaf: leaf[0], batches)
        rest, broken = rest_and_broken(leaves, first, jax.random.fold_in(key, 2**32 - 1))
        if not bool(jnp.isfinite(rest)) or (config.objective == "break" and not rest > 0):
            raise ValueError(
                f"loss_fn: expected a finite, positive loss of the untouched network, got "
                f"{float(rest)} on the first batch."
            )
        if rest >= broken:
            warnings.warn(
                f"loss_fn: the network's loss on the first batch, {float(rest):.3g}, is no better "
                f"than with noise in place of the selected leaves, {float(broken):.3g}. Is it "
                "trained, and are the batches like its training data?",
                stacklevel=2,
            )
        cap = float(jnp.finfo(jnp.float32).max)  # unused; finite, so that no arithmetic fails
        if config.objective == "break":
            # Noise may also make a loss overflow; the network is broken well before that.
            broken = jnp.where(jnp.isfinite(broken), broken, 100 * rest)
            cap = config.cap or 4 * float(jnp.maximum(broken, rest))
        log_alpha = {n: jnp.full(shape, config.start, jnp.float32) for n, shape in shapes.items()}
        # With the dtypes that steps return, so that one compilation serves all calls of `run`.
        return PSSState(
            log_alpha, optimizer.init(log_alpha), jnp.int32(0), key, jnp.float32(math.log(cap))
        )

    def step(
        leaves: dict[str, AnyArray], batches: PyTree, state: PSSState
    ) -> tuple[PSSState, PSSMetrics]:
        count = batch_count(batches)
        batch = jax.tree.map(lambda leaf: leaf[state.step % count], batches)
        opt_state = state.opt_state
        active = {name: jnp.bool_(True) for name in names}
        if config.layerwise:
            turn = state.step // config.steps
            active = {name: turn == index for index, name in enumerate(names)}
            fresh = optimizer.init(state.log_alpha)
            first = state.step % config.steps == 0
            opt_state = jax.tree.map(lambda new, old: jnp.where(first, new, old), fresh, opt_state)
        gate_key, noise_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        instead = noise(leaves, noise_key) if config.objective == "break" else None

        def objective(log_alpha: dict[str, Array]) -> tuple[Array, tuple[Array, Array]]:
            changed, price = {}, jnp.float32(0)
            for name, gate in gates(log_alpha, gate_key).items():
                gate = jnp.where(active[name], gate, at_rest)
                wide = leaves[name].astype(jnp.float32)
                wide = wide * gate if instead is None else wide + gate * (instead[name] - wide)
                changed[name] = wide.astype(leaves[name].dtype)
                open_ = probability_open(log_alpha[name], beta=config.beta).sum()
                price += jnp.where(active[name], open_, 0)
            loss = target = task_loss(leaves, changed, batch)
            if config.objective == "break":
                # Logarithm: damage multiplies a network's loss, group by group.
                target = -jnp.minimum(jnp.log(loss + jnp.finfo(jnp.float32).tiny), state.cap)
            return target + config.penalty * price, (loss, price)

        gradients, (loss, price) = jax.grad(objective, has_aux=True)(state.log_alpha)
        # optax itself mixes dtypes; strict promotion is meant for the user's code.
        with jax.numpy_dtype_promotion("standard"):
            updates: Any
            updates, opt_state = optimizer.update(gradients, opt_state, state.log_alpha)
        # Momentum left over from a leaf's turn must not keep moving it.
        moved = {
            name: jnp.clip(
                state.log_alpha[name] + jnp.where(active[name], updates[name], 0), *config.clamp
            )
            for name in names
        }
        state = state._replace(log_alpha=moved, opt_state=opt_state, step=state.step + 1)
        return state, PSSMetrics(loss, price)

    one_step = jax.jit(step)

    @partial(jax.jit, static_argnums=3)
    def scan(
        leaves: dict[str, AnyArray], batches: PyTree, state: PSSState, steps: int
    ) -> tuple[PSSState, PSSMetrics]:
        return lax.scan(lambda state, _: step(leaves, batches, state), state, None, length=steps)

    @constants_move()
    def run(
        params: PyTree, batches: PyTree, state: PSSState, steps: int
    ) -> tuple[PSSState, PSSMetrics]:
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}.")
        leaves = arrays(params)
        if jax.default_backend() != "cpu":
            return scan(leaves, batches, state, steps)
        # Inside loops, XLA's CPU backend does not rewrite the gradients of convolutions into its
        # fast form: they take 10 to 40 times as long there.
        history = []
        for _ in range(steps):
            state, metrics = one_step(leaves, batches, state)
            history.append(metrics)
        return state, jax.tree.map(lambda *values: jnp.stack(values), *history)

    total = config.steps * (len(names) if config.layerwise else 1)
    return PSSLearner(init, run, lambda state: tree.rebuild_only(state.log_alpha), total)


def pss(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    *,
    key: PRNGKeyArray,
    config: PSSConfig = PSSConfig(),
    select: Selector = None,
    granularity: Granularity = "kernel",
    layout: Layout = "HWIO",
    progress: Callable[[PSSState, PSSMetrics], None] | None = None,
) -> PyTree:
    """Learns which groups of weights matter, for a frozen, trained network.

    Args:
        loss_fn: ``(params, batch) -> scalar``, positive.
        params: pytree; not modified.
        batches: pytree of arrays ``[batches, ...]``; step t uses batch t modulo their number.
        key: typed key for gates and noise.
        config: see `PSSConfig`.
        select: leaves with gates: a regular expression, a function ``(name, leaf) -> bool``, or
            ``None`` for floats with two axes or more.
        granularity: ``"kernel"``, ``"filter"`` or ``"weight"``: the unit that shares a gate.
        layout: ``"HWIO"`` or ``"OIHW"``.
        progress: called from time to time with the state and the metrics of the steps since
            the last call.

    Returns:
        Scores (log α, one float per group), a pytree of the structure of ``params`` with ``False``
        for leaves that are not selected; for `nested_masks`.

    Raises:
        ValueError: nothing selected; weights or a loss that are not finite, with the step.

    Examples:
        >>> scores = pss(loss_fn, params, batches, key=jax.random.key(0))
        >>> masks = nested_masks(scores, [0.02, 0.05, 0.08], scope="model")

    References:
        Tian, Zhou, Duan, CVPR 2021, section 3.1, equations 3 to 8.
    """
    learner = pss_learner(
        loss_fn, params, config=config, select=select, granularity=granularity, layout=layout
    )
    state = learner.init(params, batches, key=key)
    # A divisor of the number of steps, so that all calls have one length and compile once.
    most = max(learner.steps // 20, 1)
    chunk = max(n for n in range(1, most + 1) if learner.steps % n == 0)
    for _ in range(learner.steps // chunk):
        state, metrics = learner.run(params, batches, state, chunk)
        loss = np.asarray(metrics.loss)
        bad = ~np.isfinite(loss) | ((loss < 0) if config.objective == "break" else False)
        if bad.any():
            raise ValueError(
                f"loss_fn: expected a finite loss, got {loss[bad][0]} at step "
                f"{int(state.step) - chunk + int(bad.argmax())}. Lower the optimiser's rate; for "
                "the objective 'break', use a loss that cannot become negative."
            )
        if progress is not None:
            progress(state, metrics)
    return learner.scores(state)
