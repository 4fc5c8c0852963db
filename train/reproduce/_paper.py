"""Shared by the experiments: the paper's network and crops, keys, masks, results on disk."""

import json
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from flax import nnx
from rich.progress import Progress
from safetensors.numpy import load_file

import selcrypt_jax
from selcrypt_jax import (
    GaussianCipher,
    Secret,
    encrypt,
    importance,
    level_key,
    mask_counts,
    ring_keys,
)
from selcrypt_jax._tree.names import named_leaves
from selcrypt_jax.audit._cells import Cells
from selcrypt_jax.models import DnCNN
from selcrypt_jax.models._files import read_model
from selcrypt_jax.models._network import psnr

sys.path.append(str(Path(__file__).parent.parent))  # the scripts' own modules

LAYERS = {5: 2, 8: 3, 11: 4}  # PyTorch's place in the sequence → number of the convolution
CONVOLUTIONS = r"^convs/\d+/kernel$"

# Wong's palette, which colour-blind readers can tell apart.
COLOURS = {
    "PSS, published": "#000000",
    "PSS, budgets": "#D55E00",
    "PSS, break": "#F0A07A",
    "PSS, keep": "#E69F00",
    "random": "#999999",
    "descend": "#0072B2",
    "ascend": "#56B4E9",
    "mean": "#009E73",
    "l2": "#CC79A7",
    "taylor": "#882255",
    "fisher": "#AA9900",
}


@dataclass(frozen=True)
class Experiment:
    """Options of every experiment."""

    data: Path
    """Folder of the reference data."""

    out: Path = Path("docs/results")
    """Folder for the results; created if it does not exist."""


class Denoiser(NamedTuple):
    """A trained DnCNN and its test images.

    Attributes:
        graph: the network's graph, in evaluation mode.
        state: its weights and running statistics.
        clean: images ``[n, H, W, C]`` in [0, 1].
        noisy: the same images with noise, not clipped.
        quality: ``state -> PSNR in dB`` of each image; pixels are not clipped, as in the release.
    """

    graph: Any
    state: Any
    clean: jax.Array
    noisy: jax.Array
    quality: Callable[[Any], jax.Array]


def colour_denoiser(data: Path) -> Denoiser:
    """The paper's own network, and the crops that its release was measured on.

    Raises:
        SystemExit: they are missing.
    """
    folder = data / "dncnn_color_paper"
    if not folder.is_dir():
        raise SystemExit(f"{folder}: expected the paper's DnCNN, got no such folder. Set --data.")
    model = read_model(folder / "dncnn_color_sigma50.safetensors", DnCNN, eps=1e-4)
    with np.load(folder / "crops_sigma50.npz") as crops:
        clean, noisy = crops["clean_bgr_uint8"] / np.float32(255), crops["noisy_bgr"]
    return denoiser(model, clean, noisy)


def denoiser(model: DnCNN, clean: Any, noisy: Any) -> Denoiser:
    """A network with images, compiled."""
    graph, state = nnx.split(model)
    clean, noisy = jnp.asarray(clean), jnp.asarray(noisy)

    @jax.jit
    def quality(state: Any, clean: jax.Array, noisy: jax.Array) -> jax.Array:
        return psnr(nnx.merge(graph, state)(noisy), clean)

    return Denoiser(graph, state, clean, noisy, lambda state: quality(state, clean, noisy))


def published_scores(data: Path, state: Any) -> Any:
    """The release's log α of its three layers as a tree of scores."""
    folder = data / "dncnn_color_paper"
    published = load_file(folder / "dncnn_color_sigma50_importance.safetensors")
    scores = nnx.to_pure_dict(jax.tree.map(lambda _: False, state))
    for place, number in LAYERS.items():
        by_output = published[f"layer_{place}"].reshape(64, 64)  # [out, in]
        scores["convs"][number]["kernel"] = by_output.T[None, None]  # HWIO
    return scores


def closed_form(
    name: str, state: Any, select: str, *, loss_fn: Any, batches: Any, seed: int, **groups: Any
) -> Any:
    """Scores from a strategy of `selcrypt_jax.importance`; gradient strategies use the batches.

    Args:
        name: the strategy.
        state: the network's parameters.
        select: which leaves take part.
        loss_fn: the loss, for gradient strategies.
        batches: the data, for gradient strategies.
        seed: for "random".
        groups: granularity and layout, if not the defaults.
    """
    function = getattr(importance, name)
    if name in ("taylor", "fisher"):
        return function(loss_fn, state, batches, select=select, **groups)
    extra = {"key": jax.random.key(seed)} if name == "random" else {}
    return function(state, select=select, **extra, **groups)


def experiment_keys(seed: int, number: int, levels: int) -> Any:
    """Keys of the protection with this number; a shipped model has random keys."""
    secret = Secret(np.random.default_rng([seed, number]).bytes(32))
    return ring_keys(level_key(secret, number.to_bytes(16, "big"), levels=levels))


def without_a_key(state: Any, masks: Any, *, keys: int, seed: int, cipher: Any = None) -> list[Any]:
    """The public state, without a key, under each of several protections.

    By default it uses the Gaussian cipher, wrapped around, whose ciphertext has the same
    distribution as in the published release.
    """
    cipher = cipher or GaussianCipher.fit(state, masks, wrap=True)
    return [
        encrypt(state, masks, experiment_keys(seed, number, len(masks)), cipher=cipher)
        for number in range(keys)
    ]


def stacked(batch: Callable[[int], Any], numbers: range) -> Any:
    """The batches with these numbers, as `selcrypt_jax.pss` takes them: ``[batches, ...]``."""
    batches = [batch(number) for number in numbers]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


def convolution_weights(state: Any) -> int:
    """The number of weights in the kernels of all convolutions."""
    leaves = mask_counts(state, jax.tree.map(lambda _: False, state))
    return sum(count.total for name, count in leaves.items() if re.search(CONVOLUTIONS, name))


def kernels_of(state: Any, select: str) -> list[int]:
    """The number of kernels in each selected leaf."""
    leaves = named_leaves(state).leaves
    shapes = [leaf.shape for name, leaf in leaves.items() if re.search(select, name)]
    return [inputs * outputs for *_, inputs, outputs in shapes]


def draw(
    axes: Any, strategy: str, x: Sequence[float], y: Sequence[float], error: Sequence[float]
) -> None:
    """Plots the curve of a strategy, with logarithmic ``x``; PSS is highlighted."""
    learned = strategy.startswith("PSS")
    axes.errorbar(
        x, y, error, marker="o" if learned else "s", ms=4, lw=2 if learned else 1, capsize=2,
        color=COLOURS[strategy], label=strategy,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.grid(alpha=0.25)


def legend(figure: Any) -> None:
    """One legend for all panels, with PSS first."""
    labels: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    labels = dict(sorted(labels.items(), key=lambda item: not item[0].startswith("PSS")))
    figure.legend(labels.values(), labels.keys(), loc="outside right center", frameon=False)


def sweep(
    cells: Cells,
    work: Sequence[tuple[str, str, float]],
    measure: Callable[[str, str, float], dict[str, Any]],
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Measures each (panel, strategy, share), unless its cell is known: panel → strategy → rows."""
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with Progress() as progress:
        for panel, strategy, share in progress.track(work):
            cell = cells.get(
                f"{panel}/{strategy}/{share:g}",
                lambda each=(panel, strategy, share): measure(*each),
            )
            rows = results.setdefault(panel, {}).setdefault(strategy, [])
            rows.append({"share": share, **cell})
    return results


def draw_panels(
    results: Any,
    path: Path,
    *,
    metric: str,
    share_of: str,
    untouched: float,
    chance: float,
    ylim: tuple[float, float],
) -> None:
    """Draws what `sweep` measured: a metric against the share, one panel for each of the results.

    Args:
        results: panel → strategy → rows with ``share``, the metric and ``std``, as fractions.
        path: the picture.
        metric: the rows' entry to plot.
        share_of: begins the name of a panel's shares.
        untouched: the metric of the original.
        chance: the metric of guessing.
        ylim: both ends of the scale, in percent.
    """
    figure = matplotlib.figure.Figure(figsize=(2 + 4 * len(results), 4), layout="constrained")
    grid = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, panel in zip(grid, results, strict=True):
        for strategy, rows in results[panel].items():
            shares, quality, error = (
                [100 * row[name] for row in rows] for name in ("share", metric, "std")
            )
            draw(axes, strategy, shares, quality, error)
        axes.axhline(100 * untouched, color="grey", lw=0.8)
        axes.axhline(100 * chance, color="grey", lw=0.8, ls="--")
        axes.set(xlabel=f"% of {share_of} {panel}", ylim=ylim)
    figure.axes[0].set_ylabel(f"{metric} without a key / %")
    legend(figure)
    figure.savefig(path, dpi=150)


def provenance(script: str, config: Any) -> dict[str, Any]:
    """The command that reproduces a result, and the versions used."""
    options = [
        f"--{name.replace('_', '-')} {' '.join(value) if isinstance(value, tuple) else value}"
        for name, value in asdict(config).items()
        if name not in ("data", "out")
    ]
    if hasattr(config, "data"):
        options.insert(0, "--data DATA")
    return {
        "command": f"python train/reproduce/{Path(script).name} {' '.join(options)}",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "selcrypt_jax": selcrypt_jax.__version__,
        },
    }


def write_report(report: dict[str, Any], path: Path) -> None:
    """Writes JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
