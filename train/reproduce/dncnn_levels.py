"""The paper's levels of DnCNN, on its own weights, its own importance and its own images.

Example::

    python train/reproduce/dncnn_levels.py --data DATA --out docs/results

Encrypts 82 of 4,096 kernels in each of three layers, as the published release does, and measures
PSNR at every level under many keys: with the Gaussian cipher, wrapped around, whose ciphertext has
the same distribution as in the release; with the Gaussian cipher as printed in the paper; and with
the lossless cipher. Writes ``dncnn_levels.json`` and ``dncnn_levels.png``.

References:
    Tian, Zhou, Duan, CVPR 2021, section 4.2 and figure 5; and its published release.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import numpy as np
import tyro
from _paper import (
    Experiment,
    colour_denoiser,
    experiment_keys,
    provenance,
    published_scores,
    write_report,
)
from rich.progress import track

from selcrypt_jax import (
    GaussianCipher,
    LosslessCipher,
    PaperLevels,
    decrypt,
    encrypt,
    mask_counts,
    nested_masks,
)
from selcrypt_jax.models._network import psnr

LEVELS = 5


@dataclass(frozen=True)
class Config(Experiment):
    """The location of the data, and the number of keys."""

    keys: int = 20
    """Number of protections under different keys, to average over."""

    seed: int = 0
    """Seed for the keys. (A shipped model has random keys.)"""


def main(config: Config) -> None:
    """Runs the experiment; see `Config`."""
    subject = colour_denoiser(config.data)
    state = subject.state
    masks = nested_masks(published_scores(config.data, state), PaperLevels(0.02, levels=LEVELS))
    selected = sum(count.weights for count in mask_counts(state, masks[-1]).values())
    untouched = np.asarray(subject.quality(state))
    results: dict[str, Any] = {}
    for name, cipher in {
        "gaussian": GaussianCipher.fit(state, masks, wrap=True),
        "as printed": GaussianCipher.fit(state, masks),
        "lossless": LosslessCipher(),
    }.items():
        figures = np.zeros((config.keys, LEVELS + 1, len(untouched)))
        exact = []
        for number in track(range(config.keys), f"{name} cipher"):
            keys = experiment_keys(config.seed, number, LEVELS)
            protected = encrypt(state, masks, keys, cipher=cipher)
            opened = protected
            for level in range(LEVELS + 1):
                opened = decrypt(protected, masks[:level], keys[:level], cipher=cipher)
                figures[number, level] = subject.quality(opened)
            exact.append(selected - changed_weights(opened, state))
        results[name] = {
            "psnr": [
                {
                    "level": level,
                    "mean": float(figures[:, level].mean()),
                    "std_over_keys": float(figures[:, level].mean(1).std()),
                    "by_crop": figures[:, level].mean(0).tolist(),
                }
                for level in range(LEVELS + 1)
            ],
            "bit_identical_weights_at_the_top": [min(exact), max(exact)],
        }

    path = config.data / "dncnn_color_paper" / "release_reference.json"
    release = json.loads(path.read_text())
    published = [
        release["levels"][str(level)]["psnr_mean_over_20_keys_and_4_crops"]
        for level in range(LEVELS + 1)
    ]
    report = {
        **provenance(__file__, config),
        "noisy": psnr(subject.noisy, subject.clean).tolist(),
        "untouched": untouched.tolist(),
        "selected_weights": selected,
        "release": published,
        **results,
    }
    write_report(report, config.out / "dncnn_levels.json")
    plot(report, config.out / "dncnn_levels.png")
    for name in results:
        row = " ".join(f"{entry['mean']:6.2f}" for entry in results[name]["psnr"])
        print(
            f"{name:10} {row}  bit-identical: {results[name]['bit_identical_weights_at_the_top']}"
        )
    print(f"{'release':10} {' '.join(f'{value:6.2f}' for value in published)}")


def changed_weights(opened: Any, state: Any) -> int:
    """The number of weights whose bits differ from the original."""
    pairs = zip(jax.tree.leaves(opened), jax.tree.leaves(state), strict=True)
    return sum(int((np.asarray(a).view("u4") != np.asarray(b).view("u4")).sum()) for a, b in pairs)


def plot(report: dict[str, Any], path: Path) -> None:
    """Plots PSNR against level, for both ciphers and the release."""
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    levels = range(LEVELS + 1)
    labels = {
        "gaussian": "Gaussian cipher",
        "as printed": "Gaussian cipher, as printed",
        "lossless": "lossless cipher",
    }
    for (name, label), marker in zip(labels.items(), "o^s", strict=True):
        entries = report[name]["psnr"]
        axes.errorbar(
            levels,
            [entry["mean"] for entry in entries],
            [entry["std_over_keys"] for entry in entries],
            marker=marker, capsize=3, label=label,
        )  # fmt: skip
    axes.plot(levels, report["release"], "k--", label="published release")
    axes.axhline(np.mean(report["noisy"]), color="grey", lw=0.8, label="noisy input")
    axes.set(xlabel="level", ylabel="PSNR / dB", title="DnCNN, 0.40 % of the weights encrypted")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Config))
