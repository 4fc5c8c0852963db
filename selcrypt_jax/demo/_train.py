"""Trains the demo's networks: two digit classifiers and a denoiser."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..models import VGG19, DnCNN
from ..models._network import Network, accuracy, cross_entropy, psnr, squared_error
from ._data import chessboard, digits, test_photographs, training_patches
from ._transformer import VisionTransformer

SIGMA = 25 / 255  # standard deviation of the noise, for pixels in [0, 1]
SHIFTS = ((0, 0), (0, 2), (0, -2), (2, 0), (-2, 0))  # in pixels, as far as in training
ModelLoss = Callable[[Any, Any], Float[Array, ""]]
Scores = Callable[[PyTree], Float[np.ndarray, " n"]]
"""``params ->`` a score for each example of a set, in the metric's unit."""


class Pictures(NamedTuple):
    """Test photographs ``[n, h, w, 1]`` in [0, 1], and a function that denoises them."""

    clean: Float[Array, "n h w 1"]
    noisy: Float[Array, "n h w 1"]
    denoise: Callable[[PyTree], Float[Array, "n h w 1"]]


class Subject(NamedTuple):
    """A trained network, and the data and metrics to judge it.

    Attributes:
        network: the trained network.
        loss: ``(model, batch) -> scalar``.
        fresh: builds the network as it is before training, from ``rngs``.
        batches: arrays ``[batches, ...]`` for `loss`, from the training data.
        examples: the training data, arrays ``[examples, ...]`` as in a batch.
        metric: ``params -> float`` on test data; higher is better.
        unit: the metric's unit.
        worthless: the metric of chance, or of the unprocessed noisy image.
        calibration: scores on test data that levels may be calibrated on.
        held_out: scores on other test data, which have nothing in common with the former.
        without_file: ``(share, steps, advance) -> params``: the result of the same training from
            fresh weights, with that share of the training data.
        pictures: a denoiser's test photographs; ``None`` for a classifier.
    """

    network: Network
    loss: ModelLoss
    fresh: Callable[..., nnx.Module]
    batches: PyTree
    examples: PyTree
    metric: Callable[[PyTree], float]
    unit: str
    worthless: float
    calibration: Scores
    held_out: Scores
    without_file: Callable[..., PyTree]
    pictures: Pictures | None = None

    @property
    def params(self) -> PyTree:
        """Parameters and running statistics."""
        return self.network.params


def _fit(
    model: nnx.Module,
    loss: ModelLoss,
    sample: Callable[[PRNGKeyArray], Any],
    *,
    steps: int,
    rate: float,
    key: PRNGKeyArray,
    advance: Callable[[], None],
) -> Network:
    """Adam with a cosine schedule."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(rate / 10, rate, steps // 10, steps))

    # Step by step and not in a scan: inside of loops, XLA's CPU backend does not rewrite the
    # gradients of convolutions into its fast form (40 times slower).
    @partial(jax.jit, donate_argnums=0)
    def step(carry: Any, key: PRNGKeyArray) -> tuple[Any, Array]:
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
        advance()
    if not jnp.isfinite(value):
        raise FloatingPointError(f"training: the loss became {value}; try another --seed.")
    return Network.of(nnx.merge(graphdef, *carry[:2]))


def train_vgg19(
    *,
    width: float,
    steps: int,
    seed: int,
    trained_on: float = 0.8,
    advance: Callable[[], None] = lambda: None,
) -> Subject:
    """VGG19 on scikit-learn's digits, 32×32.

    Args:
        width: multiplier for the number of channels.
        steps: the number of steps, of 32 images each.
        seed: seed for everything.
        trained_on: share of the digits to train on; the others are test data.
        advance: called after each step.
    """
    fresh = partial(VGG19, in_channels=1, width=width, dropout=0.1)
    return _on_digits(
        fresh, steps=steps, rate=1e-3, seed=seed, trained_on=trained_on, advance=advance
    )


def train_transformer(*, steps: int, seed: int) -> Subject:
    """A vision transformer of 210,000 weights on the same digits; arguments as `train_vgg19`."""
    return _on_digits(VisionTransformer, steps=steps, rate=2e-3, seed=seed)


def _on_digits(
    fresh: Callable[..., nnx.Module],
    *,
    steps: int,
    rate: float,
    seed: int,
    trained_on: float = 0.8,
    advance: Callable[[], None] = lambda: None,
) -> Subject:
    batch_size = 32
    train, test = digits(seed, trained_on)
    images, labels = jnp.asarray(train.images), jnp.asarray(train.labels)
    start, fit, draw = jax.random.split(jax.random.key(seed), 3)

    def sample(key: PRNGKeyArray, count: int = len(images)) -> tuple[Array, Array]:
        which, shift = jax.random.split(key)
        which = jax.random.randint(which, (batch_size,), 0, count)
        # Shifted by up to two pixels, which the digits' margin allows.
        down, right = jax.random.randint(shift, (2, batch_size), -2, 3)
        return jax.vmap(lambda image, y, x: jnp.roll(image, (y, x), (0, 1)))(
            images[which], down, right
        ), labels[which]

    def loss(model: Any, batch: tuple[Array, Array]) -> Array:
        return cross_entropy(model, *batch)

    def trained(start: PRNGKeyArray, sample: Any, steps: int, advance: Any) -> Network:
        model = fresh(rngs=nnx.Rngs(params=start, dropout=jax.random.fold_in(start, 1)))
        return _fit(model, loss, sample, steps=steps, rate=rate, key=fit, advance=advance)

    network = trained(start, sample, steps, advance)
    share = accuracy(network, test.images, test.labels)
    # Alternating within each class, so that neither half has more of a difficult digit.
    order = np.argsort(test.labels, kind="stable")
    halves = [(test.images[half], test.labels[half]) for half in (order[::2], order[1::2])]
    return Subject(
        network=network,
        loss=loss,
        fresh=fresh,
        batches=jax.vmap(sample)(jax.random.split(draw, 16)),
        examples=(images, labels),
        metric=lambda params: 100 * share(params),
        unit="%",
        worthless=10.0,
        calibration=_shifted(network, *halves[0]),
        held_out=_shifted(network, *halves[1]),
        without_file=_again(trained, sample, len(images), start),
    )


def _again(
    trained: Callable[..., Network], sample: Any, examples: int, start: PRNGKeyArray
) -> Callable[..., PyTree]:
    """`Subject.without_file`."""

    def train(share: float, steps: int, advance: Callable[[], None] = lambda: None) -> PyTree:
        few = partial(sample, count=round(share * examples))
        return trained(jax.random.fold_in(start, 2), few, steps, advance).params

    return train


def _shifted(network: Network, images: np.ndarray, labels: np.ndarray) -> Scores:
    """Percentage of each digit's `SHIFTS` recognised: finer steps than right or wrong."""
    moved = [np.roll(images, shift, (1, 2)) for shift in SHIFTS]

    @jax.jit
    def right(params: PyTree, images: Array) -> Array:
        return network(params, images).argmax(-1) == labels

    return lambda params: 100 * np.mean([right(params, each) for each in moved], 0)


def train_dncnn(
    *,
    depth: int,
    width: int,
    steps: int,
    crop: int,
    seed: int,
    rate: float = 2e-3,
    advance: Callable[[], None] = lambda: None,
) -> Subject:
    """DnCNN on scikit-image's photographs, σ = 25.

    Args:
        depth: number of layers.
        width: number of channels.
        steps: the number of steps, of 16 patches of 40×40 pixels each.
        crop: side length of the test photographs, in pixels.
        seed: seed for everything.
        rate: Adam's highest learning rate.
        advance: called after each step.
    """
    patches = jnp.asarray(training_patches(4096, 40, seed))
    start, fit, draw, noise = jax.random.split(jax.random.key(seed), 4)

    fresh = partial(DnCNN, depth=depth, width=width)

    def sample(key: PRNGKeyArray, count: int = len(patches)) -> tuple[Array, Array]:
        which, noise = jax.random.split(key)
        clean = patches[jax.random.randint(which, (16,), 0, count)]
        return clean + SIGMA * jax.random.normal(noise, clean.shape), clean

    def loss(model: DnCNN, batch: tuple[Array, Array]) -> Array:
        return squared_error(model, *batch)

    def trained(start: PRNGKeyArray, sample: Any, steps: int, advance: Any) -> Network:
        model = fresh(rngs=nnx.Rngs(start))
        return _fit(model, loss, sample, steps=steps, rate=rate, key=fit, advance=advance)

    network = trained(start, sample, steps, advance)
    clean = jnp.asarray(test_photographs(crop))
    noisy = clean + SIGMA * jax.random.normal(noise, clean.shape)
    denoised = jax.jit(lambda params: network(params, noisy))

    @jax.jit
    def quality(params: PyTree, noisy: Array, clean: Array) -> Array:
        return psnr(network(params, noisy), clean)

    def scores(squares: np.ndarray, number: int) -> Scores:
        clean = jnp.asarray(squares)
        noisy = clean + SIGMA * jax.random.normal(jax.random.fold_in(noise, number), clean.shape)
        return lambda params: np.asarray(quality(params, noisy, clean))

    black, white = chessboard()
    return Subject(
        network=network,
        loss=loss,
        fresh=fresh,
        batches=jax.vmap(sample)(jax.random.split(draw, 16)),
        examples=patches,
        metric=lambda params: float(psnr(denoised(params), clean).mean()),
        unit="dB",
        worthless=float(psnr(noisy, clean).mean()),
        calibration=scores(black, 1),
        held_out=scores(white, 2),
        without_file=_again(trained, sample, len(patches), start),
        pictures=Pictures(clean, noisy, denoised),
    )
