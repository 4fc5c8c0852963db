"""VGG19 at batch 64 on the local device, with `conv3x3` and with ``lax`` convolutions everywhere.

Run: ``python benchmarks/bench_models.py [repeats]``. Prints medians in milliseconds.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from selcrypt_jax import models


def lax_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution that `conv3x3` replaces on small maps."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def median_ms(function: Callable, *arguments: Any, repeats: int) -> float:
    """The median time of a compiled call."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main(repeats: int = 5) -> None:
    """Times the forward pass, and forward plus backward, for both convolutions."""
    model = models.VGG19(rngs=nnx.Rngs(0))
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    images = jax.random.uniform(jax.random.key(0), (64, 32, 32, 3))
    labels = jnp.arange(64) % 10

    def forward(params: nnx.State, images: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, rest, copy=True)(images)

    def loss(params: nnx.State, images: jax.Array) -> jax.Array:
        logits = forward(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    print(f"VGG19, width 1, batch 64, {jax.devices()[0].device_kind}, median of {repeats}")
    for name, conv in (("conv3x3", models.conv3x3), ("lax", lax_conv)):
        with mock.patch("selcrypt_jax.models._conv.conv3x3", conv):
            # New functions, so that jit does not reuse those traced with the other convolution.
            run = jax.jit(lambda params, images: forward(params, images))
            train = jax.jit(lambda params, images: jax.value_and_grad(loss)(params, images))
            forwards = median_ms(run, params, images, repeats=repeats)
            both = median_ms(train, params, images, repeats=repeats)
        print(f"{name:>8}: forward {forwards:8.0f} ms, forward + backward {both:8.0f} ms")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
