"""Trains the two networks of the demo: a digit classifier and a denoiser."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..models import VGG19, DnCNN
from ._data import digits, test_photographs, training_patches

SIGMA = 25 / 255  # of the noise, for pixels in [0, 1]


class Pictures(NamedTuple):
    """Test photographs ``[n, h, w, 1]`` in [0, 1], and how parameters denoise them."""

    clean: Float[Array, "n h w 1"]
    noisy: Float[Array, "n h w 1"]
    denoise: Callable[[PyTree], Float[Array, "n h w 1"]]


class Subject(NamedTuple):
    """A trained network, and how to judge it.

    Attributes:
        name: for files and tables.
        graphdef: of the network, in evaluation mode.
        params: its parameters and running statistics.
        rest: its other state.
        loss: ``(network, batch) -> scalar``.
        loss_fn: the same of its params, for PSS.
        batches: arrays ``[batches, ...]`` for `loss_fn`, from the training data.
        examples: the training data, arrays ``[examples, ...]`` as in a batch.
        metric: ``params -> float`` on test data; higher is better.
        unit: of the metric.
        worthless: the metric of knowing nothing: chance, or the noisy image left as it is.
        pictures: of a denoiser; ``None`` for a classifier.
    """

    name: str
    graphdef: nnx.GraphDef
    params: PyTree
    rest: PyTree
    loss: "ModelLoss"
    loss_fn: Callable[[PyTree, Any], Float[Array, ""]]
    batches: PyTree
    examples: PyTree
    metric: Callable[[PyTree], float]
    unit: str
    worthless: float
    pictures: Pictures | None = None


ModelLoss = Callable[[Any, Any], Float[Array, ""]]


def _fit(
    model: nnx.Module,
    loss: ModelLoss,
    sample: Callable[[PRNGKeyArray], Any],
    *,
    steps: int,
    rate: float,
    key: PRNGKeyArray,
    advance: Callable[[Array], None],
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Adam with a cosine schedule; returns the graph, the parameters and the other state."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(rate / 10, rate, steps // 10, steps))

    # Step by step and not in a scan: inside of loops, XLA's CPU backend does not rewrite the
    # gradients of convolutions into its fast form (40 times slower).
    @partial(jax.jit, donate_argnums=0)
    def step(
        carry: tuple[PyTree, PyTree, optax.OptState], key: PRNGKeyArray
    ) -> tuple[tuple[PyTree, PyTree, optax.OptState], Array]:
        params, rest, opt_state = carry

        def objective(params: nnx.State) -> tuple[Array, nnx.State]:
            model = nnx.merge(graphdef, params, rest, copy=True)
            value = loss(model, sample(key))
            _, _, updated = nnx.split(model, nnx.Param, ...)
            return value, updated

        (value, rest), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), rest, opt_state), value

    carry: Any = jax.tree.map(jnp.copy, (params, rest, optimizer.init(params)))
    value = jnp.nan
    for key_of_step in jax.random.split(key, steps):
        carry, value = step(carry, key_of_step)
        advance(value)
    if not jnp.isfinite(value):
        raise FloatingPointError(f"training: the loss became {value}; try another --seed.")
    return graphdef, carry[0], carry[1]


def train_vgg19(
    *, width: float, steps: int, seed: int, advance: Callable[[Array], None] = lambda loss: None
) -> Subject:
    """VGG19 on the digits of scikit-learn, 32×32.

    Args:
        width: factor on the number of channels.
        steps: of 32 images each.
        seed: of everything.
        advance: called after each step, with its loss.
    """
    batch_size = 32
    train, test = digits(seed)
    images, labels = jnp.asarray(train.images), jnp.asarray(train.labels)
    start, fit, draw = jax.random.split(jax.random.key(seed), 3)
    model = VGG19(
        in_channels=1,
        width=width,
        dropout=0.1,
        rngs=nnx.Rngs(params=start, dropout=jax.random.fold_in(start, 1)),
    )

    def sample(key: PRNGKeyArray) -> tuple[Array, Array]:
        which, shift = jax.random.split(key)
        which = jax.random.randint(which, (batch_size,), 0, len(images))
        # Moved by up to two pixels, which the digits' margin allows.
        down, right = jax.random.randint(shift, (2, batch_size), -2, 3)
        return jax.vmap(lambda image, y, x: jnp.roll(image, (y, x), (0, 1)))(
            images[which], down, right
        ), labels[which]

    def cross_entropy(model: VGG19, batch: tuple[Array, Array]) -> Array:
        logits = model(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    graphdef, params, rest = _fit(
        model, cross_entropy, sample, steps=steps, rate=1e-3, key=fit, advance=advance
    )
    graphdef, params, rest = _evaluating(graphdef, params, rest)

    @jax.jit
    def accuracy(params: PyTree) -> Array:
        logits = nnx.merge(graphdef, params, rest)(jnp.asarray(test.images))
        return 100 * (logits.argmax(-1) == jnp.asarray(test.labels)).mean()

    return Subject(
        name="vgg19",
        graphdef=graphdef,
        params=params,
        rest=rest,
        loss=cross_entropy,
        loss_fn=lambda params, batch: cross_entropy(nnx.merge(graphdef, params, rest), batch),
        batches=jax.vmap(sample)(jax.random.split(draw, 16)),
        examples=(images, labels),
        metric=lambda params: float(accuracy(params)),
        unit="%",
        worthless=10.0,
    )


def train_dncnn(
    *,
    depth: int,
    width: int,
    steps: int,
    crop: int,
    seed: int,
    advance: Callable[[Array], None] = lambda loss: None,
) -> Subject:
    """DnCNN on photographs of scikit-image, σ = 25.

    Args:
        depth: number of layers.
        width: channels.
        steps: of 16 patches of 40×40 pixels each.
        crop: side of the test photographs, in pixels.
        seed: of everything.
        advance: called after each step, with its loss.
    """
    patches = jnp.asarray(training_patches(4096, 40, seed))
    start, fit, draw, noise = jax.random.split(jax.random.key(seed), 4)
    model = DnCNN(depth=depth, width=width, rngs=nnx.Rngs(start))

    def sample(key: PRNGKeyArray) -> tuple[Array, Array]:
        which, noise = jax.random.split(key)
        clean = patches[jax.random.randint(which, (16,), 0, len(patches))]
        return clean + SIGMA * jax.random.normal(noise, clean.shape), clean

    def squared_error(model: DnCNN, batch: tuple[Array, Array]) -> Array:
        noisy, clean = batch
        return jnp.square(model(noisy) - clean).mean()

    graphdef, params, rest = _fit(
        model, squared_error, sample, steps=steps, rate=2e-3, key=fit, advance=advance
    )
    graphdef, params, rest = _evaluating(graphdef, params, rest)
    clean = jnp.asarray(test_photographs(crop))
    noisy = clean + SIGMA * jax.random.normal(noise, clean.shape)

    @jax.jit
    def denoised(params: PyTree) -> Array:
        return nnx.merge(graphdef, params, rest)(noisy)

    def mean_psnr(images: Array) -> float:
        return float(jnp.mean(psnr(images, clean)))

    return Subject(
        name="dncnn",
        graphdef=graphdef,
        params=params,
        rest=rest,
        loss=squared_error,
        loss_fn=lambda params, batch: squared_error(nnx.merge(graphdef, params, rest), batch),
        batches=jax.vmap(sample)(jax.random.split(draw, 16)),
        examples=patches,
        metric=lambda params: mean_psnr(denoised(params)),
        unit="dB",
        worthless=mean_psnr(noisy),
        pictures=Pictures(clean, noisy, denoised),
    )


def psnr(images: Float[Array, "n h w c"], clean: Float[Array, "n h w c"]) -> Float[Array, " n"]:
    """Peak signal-to-noise ratio in dB of images in [0, 1], not clipped."""
    error = jnp.square(images - clean).mean((1, 2, 3))
    return -10 * jnp.log10(error)


def _evaluating(
    graphdef: nnx.GraphDef, params: nnx.State, rest: nnx.State
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The network in evaluation mode: running statistics, which join the parameters, no dropout."""
    model = nnx.merge(graphdef, params, rest)
    model.eval()
    parts: Any = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)
    return parts
