"""The paper's levels of DnCNN, on its own weights, its own importance and its own images.

Example::

    python train/reproduce/dncnn_levels.py --data DATA --out docs/results

Encrypts 82 of 4,096 kernels in each of three layers, as the published release does, and measures
PSNR at every level under many keys: with the Gaussian cipher, wrapped around, whose ciphertext has
the distribution that the release gives it; with the same as the paper prints it; and with the
lossless one. Writes ``dncnn_levels.json`` and ``dncnn_levels.png``.

References:
    Tian, Zhou, Duan, CVPR 2021, section 4.2 and figure 5; and its published release.
"""

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import tyro
from flax import nnx
from rich.progress import track
from safetensors.numpy import load_file

import selcrypt_jax
from selcrypt_jax import (
    GaussianCipher,
    LosslessCipher,
    PaperLevels,
    Secret,
    decrypt,
    encrypt,
    level_keys,
    mask_counts,
    nested_masks,
)
from selcrypt_jax.models import DnCNN, from_torch

mpl.use("Agg")
from matplotlib import pyplot as plt

LAYERS = {5: 2, 8: 3, 11: 4}  # PyTorch's place in the sequence → number of the convolution
LEVELS = 5


@dataclass(frozen=True)
class Config:
    """Where the data are and how many keys to try."""

    data: Path
    """Folder that holds ``dncnn_color_paper``."""

    out: Path = Path("docs/results")
    """Folder for the results; made if it does not exist."""

    keys: int = 20
    """Protections under different keys, over which is averaged."""

    seed: int = 0
    """Seed of the keys. (A model that is shipped has random ones.)"""


def load(folder: Path) -> tuple[Any, Any, jax.Array, jax.Array]:
    """The network's graph and state, and the clean and noisy crops."""
    if not folder.is_dir():
        raise SystemExit(f"{folder}: expected the paper's DnCNN, got no such folder. Set --data.")
    model = DnCNN(channels=3, eps=1e-4, first_bias=True, rngs=nnx.Rngs(0))
    weights = load_file(folder / "dncnn_color_sigma50.safetensors")
    nnx.update(model, from_torch(model, weights))
    model.eval()
    with np.load(folder / "crops_sigma50.npz") as crops:
        clean, noisy = crops["clean_bgr_uint8"] / np.float32(255), crops["noisy_bgr"]
    return *nnx.split(model), jnp.asarray(clean), jnp.asarray(noisy)


def published_scores(folder: Path, state: Any) -> Any:
    """The release's log α of its three layers as a tree of scores."""
    published = load_file(folder / "dncnn_color_sigma50_importance.safetensors")
    scores = nnx.to_pure_dict(jax.tree.map(lambda _: False, state))
    for place, number in LAYERS.items():
        by_output = published[f"layer_{place}"].reshape(64, 64)  # [out, in]
        scores["convs"][number]["kernel"] = by_output.T[None, None]  # HWIO
    return scores


def main(config: Config) -> None:
    """Runs the experiment; see `Config`."""
    folder = config.data / "dncnn_color_paper"
    graph, state, clean, noisy = load(folder)
    masks = nested_masks(published_scores(folder, state), PaperLevels(0.02, levels=LEVELS))
    selected = sum(count.weights for count in mask_counts(state, masks[-1]).values())

    @jax.jit
    def quality(state: Any) -> jax.Array:
        """PSNR in dB of each crop; pixels are not clipped, as in the release."""
        error = jnp.square(nnx.merge(graph, state)(noisy) - clean).mean((1, 2, 3))
        return -10 * jnp.log10(error)

    untouched = np.asarray(quality(state))
    results: dict[str, Any] = {}
    for name, cipher in {
        "gaussian": GaussianCipher.fit(state, masks, wrap=True),
        "as printed": GaussianCipher.fit(state, masks),
        "lossless": LosslessCipher(),
    }.items():
        figures = np.zeros((config.keys, LEVELS + 1, len(untouched)))
        exact = []
        for number in track(range(config.keys), f"{name} cipher"):
            secret = Secret(np.random.default_rng([config.seed, number]).bytes(32))
            keys = level_keys(secret, number.to_bytes(16, "big"), levels=LEVELS)
            protected = encrypt(state, masks, keys, cipher=cipher)
            opened = protected
            for level in range(LEVELS + 1):
                opened = decrypt(protected, masks[:level], keys[:level], cipher=cipher)
                figures[number, level] = quality(opened)
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

    release = json.loads((folder / "release_reference.json").read_text())
    published = [
        release["levels"][str(level)]["psnr_mean_over_20_keys_and_4_crops"]
        for level in range(LEVELS + 1)
    ]
    report = {
        "command": f"python train/reproduce/{Path(__file__).name} --data DATA "
        f"--keys {config.keys} --seed {config.seed}",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "selcrypt_jax": selcrypt_jax.__version__,
        },
        "keys": config.keys,
        "seed": config.seed,
        "noisy": (-10 * jnp.log10(jnp.square(noisy - clean).mean((1, 2, 3)))).tolist(),
        "untouched": untouched.tolist(),
        "selected_weights": selected,
        "release": published,
        **results,
    }
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "dncnn_levels.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(report, config.out / "dncnn_levels.png")
    for name in results:
        row = " ".join(f"{entry['mean']:6.2f}" for entry in results[name]["psnr"])
        print(
            f"{name:10} {row}  bit-identical: {results[name]['bit_identical_weights_at_the_top']}"
        )
    print(f"{'release':10} {' '.join(f'{value:6.2f}' for value in published)}")


def changed_weights(opened: Any, state: Any) -> int:
    """How many weights have not their own bits."""
    pairs = zip(jax.tree.leaves(opened), jax.tree.leaves(state), strict=True)
    return sum(int((np.asarray(a).view("u4") != np.asarray(b).view("u4")).sum()) for a, b in pairs)


def plot(report: dict[str, Any], path: Path) -> None:
    """PSNR against level, for both ciphers and the release."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
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
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Config))
