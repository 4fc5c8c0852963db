"""PSS and training steps, compared with PyTorch's on the same processor if it is installed.

Run: ``python benchmarks/bench_training.py [repeats]``. Our steps and PyTorch's run in turns, so
other load affects both. Prints medians.

- PSS and training (Adam, evaluation mode) of VGG19, full width, batch 64, 32×32: all convolutions
  have gates. PSS once with a price ("break", sampled), once at three budgets.
- PSS and training (Adam) of DnCNN, 17×64, 16 grey patches of 40×40.
"""

import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _steps import BUDGETS, classification, denoising, noisy_images, pss_step, training_step
from flax import nnx

from selcrypt_jax.models import DnCNN

PATCHES = (16, 40, 40, 1)
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def dncnn_training() -> Callable[[], Any]:
    """The training step of DnCNN, in training mode, with Adam."""
    model, (clean, noisy) = DnCNN(rngs=nnx.Rngs(0)), noisy_images(PATCHES)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adam(1e-3)

    @partial(jax.jit, donate_argnums=0)
    def update(carry: Any) -> tuple[Any, jax.Array]:
        params, rest, state = carry

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graph, params, rest, copy=True)
            value = jnp.square(model(noisy) - clean).mean()
            return value, nnx.split(model, nnx.Param, ...)[2]

        (value, rest), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), rest, state), value

    carry = jax.tree.map(jnp.copy, (params, rest, optimizer.init(params)))

    def step() -> Any:
        nonlocal carry
        carry, value = update(carry)
        return jax.block_until_ready(value)

    return step


# --- the same in PyTorch ------------------------------------------------------------------------


def torch_dncnn(torch: Any) -> tuple[Any, Any, Any]:
    """The network as in its authors' PyTorch ports, and a batch."""
    layers = [torch.nn.Conv2d(1, 64, 3, padding=1, bias=False), torch.nn.ReLU()]
    for _ in range(15):
        layers += [
            torch.nn.Conv2d(64, 64, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(64),
            torch.nn.ReLU(),
        ]
    layers.append(torch.nn.Conv2d(64, 1, 3, padding=1, bias=False))
    n, h, w, c = PATCHES
    clean = torch.rand(n, c, h, w)
    return torch.nn.Sequential(*layers), clean, clean + 0.1 * torch.randn(n, c, h, w)


def torch_training(torch: Any) -> Callable[[], Any]:
    """Like `dncnn_training`."""
    net, clean, noisy = torch_dncnn(torch)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step() -> Any:
        optimizer.zero_grad()
        loss = torch.square(noisy - net(noisy) - clean).mean()
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def torch_pss(torch: Any) -> Callable[[], Any]:
    """Like `pss_step`: sampled hard-concrete gates, noise in place of selected weights, Adam."""
    net, clean, noisy = torch_dncnn(torch)
    net.eval().requires_grad_(False)
    kernels = {n: p for n, p in net.named_parameters() if p.ndim == 4}
    alphas = {
        n: torch.full((*p.shape[:2], 1, 1), -3.5, requires_grad=True) for n, p in kernels.items()
    }
    optimizer = torch.optim.Adam(alphas.values(), lr=0.1)

    def step() -> Any:
        optimizer.zero_grad()
        changed, price = {}, 0.0
        for name, weight in kernels.items():
            alpha = alphas[name]
            u = torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6)
            s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + alpha) / BETA)
            gate = (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
            noise = weight.mean() + weight.std() * torch.randn_like(weight)
            changed[name] = weight + gate * (noise - weight)
            price = price + torch.sigmoid(alpha - BETA * 2.3979).sum()
        output = torch.func.functional_call(net, changed, (noisy,))
        loss = -torch.log(torch.square(noisy - output - clean).mean()) + 1e-2 * price
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def main(repeats: int = 10) -> None:
    """Measures everything."""
    denoiser, classifier = denoising(PATCHES), classification(64)
    steps = {
        "DnCNN, PSS": pss_step(denoiser),
        "DnCNN, PSS, budgets": pss_step(denoiser, config=BUDGETS),
        "DnCNN, training": dncnn_training(),
        "VGG19, PSS": pss_step(classifier),
        "VGG19, PSS, budgets": pss_step(classifier, config=BUDGETS),
        "VGG19, training": training_step(classifier),
    }
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        print("PyTorch is not installed: measuring only our own steps")
    else:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        steps["DnCNN, PSS, PyTorch"] = torch_pss(torch)
        steps["DnCNN, training, PyTorch"] = torch_training(torch)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        examples = 64 if name.startswith("VGG19") else PATCHES[0]
        print(f"{name:26} {1e3 * seconds:8.0f} ms a step {examples / seconds:8.1f} images/s")
    for kind in ("PSS", "training"):
        theirs = medians.get(f"DnCNN, {kind}, PyTorch")
        if theirs:
            print(f"DnCNN, {kind}: {medians[f'DnCNN, {kind}'] / theirs:.2f} of PyTorch's time")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
