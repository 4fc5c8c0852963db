"""PSS, the probabilistic selection strategy: learns importance with gates on a frozen network.

Every group of weights gets a hard-concrete gate. Only the gates' ``log α`` are learned, over all
leaves together (or leaf by leaf); the importance of a group is its ``log α``.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._tree.groups import Granularity, Layout
from .._tree.names import Selector, constants_move, listed
from .budget import AtBudgets, PSSBudgetState
from .closed import LossFn, batch_at
from .config import PSSBudgets, PSSConfig
from .frozen import Frozen, Leaves, PSSMetrics
from .gates import hard_concrete, probability_open

State = TypeVar("State")


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


class PSSLearner(NamedTuple):
    """Pure functions that learn importance, in the style of an optax transformation.

    Attributes:
        init: ``(params, batches, key=...) -> state``: a `PSSState`, or a `PSSBudgetState` if
            configured by `PSSBudgets`.
        run: ``(params, batches, state, steps) -> (state, PSSMetrics)``, jitted; step t uses batch t
            modulo the number of batches.
        scores: ``(state) -> scores``, a pytree of the structure of params.
        steps: the total number of steps in the configuration.

    Examples:
        >>> learner = pss_learner(loss_fn, params, config=PSSConfig(steps=4))
        >>> state = learner.init(params, batches, key=jax.random.key(0))
        >>> state, metrics = learner.run(params, batches, state, learner.steps)
        >>> masks = nested_masks(learner.scores(state), [0.02, 0.08])
    """

    init: Callable[..., Any]
    run: Callable[[PyTree, PyTree, Any, int], tuple[Any, PSSMetrics]]
    scores: Callable[[Any], PyTree]
    steps: int


def pss_learner(
    loss_fn: LossFn,
    params: PyTree,
    *,
    config: PSSConfig | PSSBudgets = PSSConfig(),
    select: Selector = None,
    granularity: Granularity = "kernel",
    layout: Layout = "HWIO",
) -> PSSLearner:
    """Makes the functions that `pss` runs in a loop; use them to checkpoint or to stop early.

    Args:
        loss_fn: ``(params, batch) -> scalar``, positive; params are trained and frozen.
        params: pytree, for its structure and shapes; `init` and `run` use the values passed to
            them.
        config: `PSSBudgets` if it is known how much will be encrypted, or `PSSConfig`.
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
    frozen = Frozen(loss_fn, params, select, granularity, layout)
    if isinstance(config, PSSBudgets):
        learn = AtBudgets(frozen, config)
        return PSSLearner(learn.init, _runner(frozen, learn.step), learn.scores, config.steps)
    names, shapes = frozen.names, frozen.shapes
    optimizer = config.optimizer or optax.adam(0.1, eps=max(config.penalty / 10, 1e-8))
    at_rest = 1.0 if config.objective == "keep" else 0.0

    def gates(log_alpha: dict[str, Array], key: PRNGKeyArray) -> dict[str, Array]:
        uniform = frozen.draw(jax.random.uniform, key, shapes) if config.sampled else {}
        return {
            name: hard_concrete(log_alpha[name], uniform=uniform.get(name), beta=config.beta)
            for name in names
        }

    @constants_move()
    def init(params: PyTree, batches: PyTree, *, key: PRNGKeyArray) -> PSSState:
        rest, broken = frozen.check(params, batches, key, positive=config.objective == "break")
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

    def step(leaves: Leaves, batches: PyTree, state: PSSState) -> tuple[PSSState, PSSMetrics]:
        batch = batch_at(batches, state.step)
        opt_state = state.opt_state
        active = {name: jnp.bool_(True) for name in names}
        if config.layerwise:
            turn = state.step // config.steps
            active = {name: turn == index for index, name in enumerate(names)}
            fresh = optimizer.init(state.log_alpha)
            first = state.step % config.steps == 0
            opt_state = jax.tree.map(lambda new, old: jnp.where(first, new, old), fresh, opt_state)
        gate_key, noise_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        instead = frozen.noise(leaves, noise_key) if config.objective == "break" else None

        def objective(log_alpha: dict[str, Array]) -> tuple[Array, tuple[Array, Array]]:
            changed, price = {}, jnp.float32(0)
            for name, gate in gates(log_alpha, gate_key).items():
                gate = jnp.where(active[name], gate, at_rest)
                wide = leaves[name].astype(jnp.float32)
                wide = wide * gate if instead is None else wide + gate * (instead[name] - wide)
                changed[name] = wide.astype(leaves[name].dtype)
                open_ = probability_open(log_alpha[name], beta=config.beta).sum()
                price += jnp.where(active[name], open_, 0)
            loss = target = frozen.loss(leaves, changed, batch)
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

    total = config.steps * (len(names) if config.layerwise else 1)
    return PSSLearner(
        init, _runner(frozen, step), lambda state: frozen.rebuild_only(state.log_alpha), total
    )


def _runner(
    frozen: Frozen, step: Callable[[Leaves, PyTree, State], tuple[State, PSSMetrics]]
) -> Callable[[PyTree, PyTree, State, int], tuple[State, PSSMetrics]]:
    """Runs many steps, compiled."""
    one_step = jax.jit(step)

    @partial(jax.jit, static_argnums=3)
    def scan(leaves: Leaves, batches: PyTree, state: State, steps: int) -> tuple[State, PSSMetrics]:
        return lax.scan(lambda state, _: step(leaves, batches, state), state, None, length=steps)

    @constants_move()
    def run(params: PyTree, batches: PyTree, state: State, steps: int) -> tuple[State, PSSMetrics]:
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}.")
        leaves = frozen.arrays(params)
        if jax.default_backend() != "cpu":
            return scan(leaves, batches, state, steps)
        # Inside loops, XLA's CPU backend does not rewrite the gradients of convolutions into its
        # fast form: they take 10 to 40 times as long there.
        history = []
        for _ in range(steps):
            state, metrics = one_step(leaves, batches, state)
            history.append(metrics)
        return state, jax.tree.map(lambda *values: jnp.stack(values), *history)

    return run


def _check_losses(loss: np.ndarray, config: PSSConfig | PSSBudgets, step: int) -> None:
    """Refuses the losses of the steps up to this one if nothing can be learned from them.

    Raises:
        ValueError: one is not finite, or negative where the logarithm is taken.
    """
    positive = isinstance(config, PSSBudgets) or config.objective == "break"
    bad = (loss < 0) & positive
    if isinstance(config, PSSConfig):  # at a budget, only a step is lost
        bad |= ~np.isfinite(loss)
    if bad.any():
        raise ValueError(
            f"loss_fn: expected a finite loss, got {loss[bad][0]} at step "
            f"{step - len(loss) + int(bad.argmax())}. Use a loss that cannot become negative, or, "
            'for the objective "keep", lower the optimiser\'s rate.'
        )


@constants_move()
def _warn_of_ignored(state: PSSState | PSSBudgetState) -> None:
    """Warns of leaves that the loss does not depend on: all of their groups learned the same."""
    if isinstance(state, PSSBudgetState):
        # A group that is not encrypted has a slope, unless the loss ignores it.
        tried = state.tried
        alike = {
            name: (slope == 0).all() & (tried[name] > 0).any() & (tried[name] == 0).any()
            for name, slope in state.slope.items()
        }
    else:
        alike = {name: jnp.ptp(leaf) == 0 for name, leaf in state.log_alpha.items()}
    ignored = [name for name, same in alike.items() if same]
    if ignored:
        warnings.warn(
            f"loss_fn: the loss does not depend on {listed(ignored)}, so nothing is learned of "
            "their importance. Exclude them with `select`, or use a loss that needs them.",
            stacklevel=4,  # past `constants_move`
        )


def pss(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    *,
    key: PRNGKeyArray,
    config: PSSConfig | PSSBudgets = PSSConfig(),
    select: Selector = None,
    granularity: Granularity = "kernel",
    layout: Layout = "HWIO",
    progress: Callable[[Any, PSSMetrics], None] | None = None,
) -> PyTree:
    """Learns which groups of weights matter, for a frozen, trained network.

    Args:
        loss_fn: ``(params, batch) -> scalar``, positive.
        params: pytree; not modified.
        batches: pytree of arrays ``[batches, ...]``; step t uses batch t modulo their number.
        key: typed key for gates and noise.
        config: `PSSBudgets` if it is known how much will be encrypted, or `PSSConfig`.
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
    finite = False
    for done in range(learner.steps // chunk):
        state, metrics = learner.run(params, batches, state, chunk)
        loss = np.asarray(metrics.loss)
        _check_losses(loss, config, int(state.step))
        finite |= bool(np.isfinite(loss).any())
        # After one or two steps, Adam may have moved all gates alike.
        if done == 0 and chunk > 2 and isinstance(config, PSSConfig) and not config.layerwise:
            _warn_of_ignored(state)
        if progress is not None:
            progress(state, metrics)
    if not finite:
        raise ValueError(
            "loss_fn: expected a finite loss, got none in all steps: the encrypted network "
            "overflows whatever is encrypted. Take smaller shares, or a wider dtype."
        )
    if isinstance(config, PSSBudgets):
        _warn_of_ignored(state)
    return learner.scores(state)
