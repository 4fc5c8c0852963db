r"""Measures the quality of a protected file at every level.

Examples::

    python train/evaluate.py vgg19 --file public.safetensors --secret keys/secret.key --data tfds/
    python train/evaluate.py dncnn --file public.safetensors --secret keys/secret.key \
        --images set12/ --sigma 25 --out results/

Measures accuracy for VGG19, PSNR and SSIM for DnCNN. With a grant instead of the secret, it
measures up to the grant's level; with neither, only level 0. An unprotected .safetensors file has
one row. A metric that is not a finite number is null: a level may be that broken. Rows go to
standard output, one JSON object per line, and a table to standard error. With ``--out``, it also
writes them as ``levels.json``, ``levels.md`` and ``levels.png``.
"""

import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import matplotlib.figure
import tyro
from _images import checked_sigma
from _loop import check_output, exits
from _tasks import accuracy_of, denoising_of
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from selcrypt_jax import Grant, Secret, inspect_file, level_key, open_model
from selcrypt_jax.models import VGG19, DnCNN
from selcrypt_jax.models._files import (
    is_protected,
    read_cifar,
    read_images,
    read_model,
    read_tensors,
)

UNITS = {"accuracy": "accuracy", "psnr": "PSNR / dB", "ssim": "SSIM"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The file to open, and the key to use."""

    file: Path
    """The protected file (or multi-file checkpoint), in PyTorch's names and layout."""

    secret: Path | None = None
    """The owner's secret: opens every level."""

    passphrase_file: Path | None = None
    """File with the passphrase of a locked secret, in its first line."""

    grant: Path | None = None
    """A grant: opens its levels."""

    out: Path | None = None
    """Folder for levels.json, levels.md and levels.png; created if it does not exist."""


@dataclass(frozen=True, kw_only=True)
class Vgg19(Config):
    """Accuracy of VGG19 on CIFAR's test images."""

    data: Path
    """Folder with the prepared data: TFDS's ``data_dir``."""

    dataset: Literal["cifar10", "cifar100"] = "cifar10"
    """Which data set."""

    tests: int | None = None
    """Number of test images; all by default."""


@dataclass(frozen=True, kw_only=True)
class Dncnn(Config):
    """PSNR and SSIM of DnCNN on noisy images."""

    images: Path
    """Folder of images, or of a data set prepared by TFDS (its split "test")."""

    sigma: float = 25.0
    """Standard deviation of the noise, for pixels in 0..255."""

    eps: float = 1e-5
    """ε of BatchNorm."""

    bgr: bool = False
    """The network expects BGR channels, as do the weights published with the paper."""

    tests: int | None = None
    """Number of images; all by default."""

    seed: int = 0
    """Seed for the noise, which is the same at every level."""


def levels_of(config: Config) -> list[tuple[int | None, Any]]:
    """Level → its tensors; or None → the tensors of an unprotected file."""
    if config.secret is not None and config.grant is not None:
        raise ValueError("--secret, --grant: expected one of them, got both.")
    if config.file.suffix == ".safetensors" and not is_protected(config.file):
        if config.secret is not None or config.grant is not None:
            raise ValueError(f"{config.file}: expected a protected file, got a plain one.")
        tensors = read_tensors(config.file)
        for name, tensor in tensors.items():
            if not jnp.isfinite(tensor).all():
                raise ValueError(
                    f"{config.file}: {name!r}: expected finite weights, got NaN or Inf."
                )
        return [(None, tensors)]
    if config.secret is not None:
        found = inspect_file(config.file)
        highest = len(found.levels)
        passphrase = None
        if config.passphrase_file is not None:
            passphrase = config.passphrase_file.read_text(encoding="utf-8").partition("\n")[0]
        secret = Secret.read(config.secret, passphrase=passphrase)
        grant = level_key(secret, bytes.fromhex(found.model_id), levels=highest)
    else:
        grant = None if config.grant is None else Grant.read(config.grant)
        highest = 0 if grant is None else grant.key.level
    opened: list[tuple[int | None, Any]] = [(0, open_model(config.file))]
    for level in range(1, highest + 1):
        opened.append((level, open_model(config.file, grant, level=level)))
    return opened


def measured(config: Vgg19 | Dncnn) -> list[dict[str, Any]]:
    """One row per level."""
    kind = VGG19 if isinstance(config, Vgg19) else DnCNN
    rows = []
    quality = None
    opened = levels_of(config)
    console, hidden = Console(stderr=True), not sys.stderr.isatty()
    for level, tensors in track(opened, "levels", console=console, transient=True, disable=hidden):
        eps = config.eps if isinstance(config, Dncnn) else 1e-5
        model = read_model(config.file, kind, eps=eps, tensors=tensors)
        graph, params = nnx.split(model)
        quality = quality or measure_of(config, graph, model)
        found = quality(params)
        row = {"level": level} | {n: x if math.isfinite(x) else None for n, x in found.items()}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def measure_of(config: Vgg19 | Dncnn, graph: Any, model: Any) -> Any:
    """``params -> metrics`` on the test data."""
    if isinstance(config, Vgg19):
        return accuracy_of(graph, *read_cifar(config.data / config.dataset, "test", config.tests))
    sigma, _ = checked_sigma((config.sigma,))
    images = read_images(config.images, split="test", channels=model.channels, most=config.tests)
    if config.bgr:
        images = [image[..., ::-1] for image in images]
    return denoising_of(graph, images, sigma, jax.random.key(config.seed))


def name_of(level: int | None) -> str:
    """The name of a level in tables."""
    return "not protected" if level is None else "0, no key" if level == 0 else str(level)


def number(name: str, value: float | None) -> str:
    """A metric with its unit."""
    if value is None:
        return "not finite"
    return f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.{2 + (name == 'ssim')}f}"


def write(config: Config, rows: list[dict[str, Any]], out: Path) -> None:
    """Writes the three files."""
    metrics = [name for name in rows[0] if name != "level"]
    lines = [
        f"| level | {' | '.join(UNITS[name] for name in metrics)} |",
        "|---" * (1 + len(metrics)) + "|",
    ]
    for row in rows:
        cells = " | ".join(number(name, row[name]) for name in metrics)
        lines.append(f"| {name_of(row['level'])} | {cells} |")
    figure = matplotlib.figure.Figure(figsize=(4.5 * len(metrics), 3.5), layout="constrained")
    for name, axes in zip(metrics, figure.subplots(1, len(metrics), squeeze=False)[0], strict=True):
        scale = 100 if name == "accuracy" else 1
        places = range(len(rows))
        values = [math.nan if row[name] is None else scale * row[name] for row in rows]
        axes.plot(places, values, "o-", color="#D55E00")
        axes.set_xticks(places, [name_of(row["level"]) for row in rows])
        axes.set(xlabel="level", ylabel=UNITS[name] + (" / %" if name == "accuracy" else ""))
        axes.grid(alpha=0.3)
    figure.suptitle(config.file.name)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    (out / "levels.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (out / "levels.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "levels.png").write_bytes(picture.getvalue())


@exits()
def main(config: Vgg19 | Dncnn) -> None:
    """Measures; see `Config`."""
    if config.out is not None:
        for name in ("levels.json", "levels.md", "levels.png"):
            check_output(config.out / name)
    rows = measured(config)
    metrics = [name for name in rows[0] if name != "level"]
    table = Table("level", *(UNITS[name] for name in metrics), title=config.file.name)
    for row in rows:
        table.add_row(name_of(row["level"]), *(number(name, row[name]) for name in metrics))
    Console(stderr=True).print(table)
    if config.out is not None:
        write(config, rows, config.out)


if __name__ == "__main__":
    main(
        tyro.cli(
            Annotated[Vgg19, tyro.conf.subcommand("vgg19")]
            | Annotated[Dncnn, tyro.conf.subcommand("dncnn")],
            description=__doc__,
        )
    )
