r"""Learns which weights of a trained network matter (PSS), and writes their scores.

Examples::

    python train/importance.py vgg19 --weights vgg19.safetensors --data tfds/ --out ...
    python train/importance.py dncnn --weights dncnn.safetensors --images photographs/ \
        --out scores.safetensors
    python train/importance.py custom --weights mine.safetensors --loss my_module:loss_fn \
        --batches my_module:batches --out ...

Scores are saved under the tensors' names and in their layout, for ``selcrypt protect
--importance``. Metrics go to standard output, one JSON object per line: the loss with the gates
applied, and the expected number of open gates.

References:
    Tian, Zhou, Duan, CVPR 2021, section 3.1.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from _loop import Row, Run, check_numbers, check_output, exits, train, write_tensors
from _tasks import CustomTask, DncnnTask, Vgg19Task

from selcrypt_jax import PSSBudgets, PSSBudgetState, PSSConfig, PSSState, pss_learner
from selcrypt_jax._importance.gates import probability_open
from selcrypt_jax._tree.names import named_leaves
from selcrypt_jax.models import to_torch, torch_names

State = PSSState | PSSBudgetState


@dataclass(frozen=True, kw_only=True)
class Config(Run):
    """How importance is learned."""

    shares: tuple[float, ...] | None = None
    """Shares of the groups that will be encrypted, ascending: learns which ones do the most damage
    at each. Without them, gates have a price (--objective, --penalty, --cap, --sampled)."""

    scope: Literal["leaf", "model"] = "model"
    """Whether the shares hold in every tensor, or over the whole model."""

    objective: Literal["break", "keep"] = "break"
    """What counts as important: groups that break the network when encrypted ("break"), or, as in
    the paper, groups that it needs to work ("keep")."""

    steps: int = 100
    """Gradient steps."""

    penalty: float | None = None
    """Price of an open gate, λ: about the change in the loss ("keep") or its logarithm ("break")
    that makes a gate worth opening. Use less with more gates, such as 1e-4 for VGG19. By default
    1e-3 for "break", 1e-5 for "keep"."""

    rate: float = 0.1
    """Learning rate of Adam."""

    cap: float | None = None
    """For "break": the loss at which the network counts as broken."""

    sampled: bool = True
    """Sample the gates, or use their medians."""

    select: str | None = None
    """Tensors that take part: a regular expression matched anywhere in their names in the file. By
    default the kernels of convolutions; for your own network, floats with two axes or more."""

    granularity: Literal["kernel", "filter", "weight"] = "kernel"
    """The group of weights that shares a gate."""

    every: int = 10
    """Steps between measurements, and between checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Vgg19(Vgg19Task, Config):
    """Learns the importance of VGG19's weights on CIFAR."""


@dataclass(frozen=True, kw_only=True)
class Dncnn(DncnnTask, Config):
    """Learns the importance of DnCNN's weights on patches of images."""


@dataclass(frozen=True, kw_only=True)
class Custom(CustomTask, Config):
    """Learns the importance of the weights of a network of your own."""


@exits()
def main(config: Vgg19 | Dncnn | Custom) -> None:
    """Learns; see `Config`."""
    check_numbers(config)
    check_output(config.out, config.weights)
    task = config.task(config.seed)
    names = None if task.model is None else torch_names(task.model)
    layout = config.layout if isinstance(config, Custom) else "HWIO"

    def selected(name: str, leaf: Any) -> bool:  # by the name in the file
        if names is None:
            return re.search(config.select or "", name) is not None
        if config.select is None:
            return name in names and leaf.ndim == 4
        return name in names and re.search(config.select, names[name]) is not None

    penalty = config.penalty
    if penalty is None:
        penalty = 1e-3 if config.objective == "break" else 1e-5
    try:
        re.compile(config.select or "")
    except re.error as error:
        raise ValueError(
            f"--select: expected a regular expression, got {config.select!r}: {error}."
        ) from None
    how: PSSConfig | PSSBudgets
    if config.shares is not None:
        how = PSSBudgets(config.shares, config.scope, steps=config.steps)
    else:
        how = PSSConfig(
            config.objective,
            steps=config.steps,
            penalty=penalty,
            optimizer=optax.adam(config.rate, eps=max(penalty / 10, 1e-8)),
            cap=config.cap,
            sampled=config.sampled,
        )
    learner = pss_learner(
        task.loss_fn,
        task.params,
        config=how,
        select=None if names is None and config.select is None else selected,
        granularity=config.granularity,
        layout=layout,
    )
    state = learner.init(task.params, _one(task.batch(1)), key=jax.random.key(config.seed))

    def step(state: State, batch: Any, _: jax.Array) -> tuple[State, jax.Array]:
        # The state has its own key, from which the noise of each step is derived.
        state, metrics = learner.run(task.params, _one(batch), state, 1)
        (loss,) = metrics.loss
        if config.shares is not None:  # an encrypted network may overflow, and learning goes on
            loss = jnp.where(jnp.isfinite(loss), loss, jnp.finfo(loss.dtype).max)
        return state, loss

    def measure(number: int, state: State, rows: list[Row]) -> Row:
        """The number of groups in finished budgets, or the expected number of open gates."""
        if isinstance(state, PSSBudgetState):
            return {"included": float(sum((a > 0).sum() for a in state.included.values()))}
        return {"open": float(sum(probability_open(a).sum() for a in state.log_alpha.values()))}

    state, _ = train(
        state,
        step,
        task.batch,
        key=jax.random.key(config.seed),
        steps=config.steps,
        every=config.every,
        measure=measure,
        checkpoints=config.checkpoints,
        config=config,
    )
    scores = learner.scores(state)
    if task.model is not None:
        tensors = to_torch(task.model, scores)
    else:
        named = named_leaves(scores).leaves
        tensors = {name: np.asarray(a) for name, a in named.items() if a is not False}
    settings = {"penalty": f"{penalty:g}"}
    goal = config.objective
    if config.shares is not None:
        settings, goal = {"scope": config.scope}, ", ".join(map("{:g}".format, config.shares))
    metadata = {
        "importance": f"PSS, {goal}, {config.granularity}",
        "steps": str(config.steps),
        **settings,
        "seed": str(config.seed),
    }
    write_tensors(tensors, config.out, metadata)


def _one(batch: Any) -> Any:
    """A pytree of one batch, ``[1, ...]``."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], batch)


if __name__ == "__main__":
    main(
        tyro.cli(
            Annotated[Vgg19, tyro.conf.subcommand("vgg19")]
            | Annotated[Dncnn, tyro.conf.subcommand("dncnn")]
            | Annotated[Custom, tyro.conf.subcommand("custom")],
            description=__doc__,
        )
    )
