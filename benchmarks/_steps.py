"""PSS and training steps of both networks, for `bench_training` and the comparison."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from selcrypt_jax import PSSBudgets, PSSConfig, pss_learner
from selcrypt_jax.models import VGG19, DnCNN

CONVOLUTIONS = r"^convs/\d+/kernel$"


class Task(NamedTuple):
    """A loss ``(params, batch) -> scalar`` of a network in evaluation mode, and its arguments."""

    loss_fn: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any


def noisy_images(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Images without and with noise."""
    clean = jax.random.uniform(jax.random.key(0), shape)
    return clean, clean + 0.1 * jax.random.normal(jax.random.key(1), shape)


def classification(examples: int) -> Task:
    """VGG19, 32×32."""
    model = VGG19(rngs=nnx.Rngs(0))
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        logits = nnx.merge(graph, params, rest)(batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    images = jax.random.normal(jax.random.key(0), (examples, 32, 32, 3))
    return Task(loss_fn, params, {"image": images, "label": jnp.arange(examples) % 10})


def denoising(shape: tuple[int, ...]) -> Task:
    """DnCNN, 17 layers of 64 channels, on patches of the given shape."""
    model = DnCNN(rngs=nnx.Rngs(0))
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        clean, noisy = batch
        return jnp.square(nnx.merge(graph, params, rest)(noisy) - clean).mean()

    return Task(loss_fn, params, noisy_images(shape))


PRICE = PSSConfig(steps=1)
BUDGETS = PSSBudgets([0.001, 0.01, 0.1], "model", steps=3)


def pss_step(
    task: Task, granularity: Any = "kernel", config: PSSConfig | PSSBudgets = PRICE
) -> Callable[[], Any]:
    """A function whose calls are PSS steps."""
    learner = pss_learner(
        task.loss_fn,
        task.params,
        config=config,
        select=CONVOLUTIONS,
        granularity=granularity,
    )
    batches = jax.tree.map(lambda leaf: leaf[None], task.batch)
    state = learner.init(task.params, batches, key=jax.random.key(0))

    def step() -> Any:
        nonlocal state
        state, metrics = learner.run(task.params, batches, state, 1)
        return jax.block_until_ready(metrics)

    return step


def training_step(task: Task) -> Callable[[], Any]:
    """A function whose calls are training steps with Adam; the state is donated."""
    optimizer = optax.adam(1e-3)

    @partial(jax.jit, donate_argnums=0)
    def update(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        value, gradients = jax.value_and_grad(task.loss_fn)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    carry = jax.tree.map(jnp.copy, (task.params, optimizer.init(task.params)))

    def step() -> Any:
        nonlocal carry
        carry, value = update(carry, task.batch)
        return jax.block_until_ready(value)

    return step
