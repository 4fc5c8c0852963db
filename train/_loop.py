"""A training loop that can be killed at any time and resumes bit for bit."""

import contextlib
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import save

from selcrypt_jax.models import VGG19, DnCNN, to_torch
from selcrypt_jax.models._files import read_model

Row = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Options of every script that trains or learns scores."""

    out: Path
    """The .safetensors file to write, in PyTorch's names and layout."""

    checkpoints: Path | None = None
    """Folder for checkpoints. A run that finds some there resumes from the last one, with the same
    result as an uninterrupted run."""

    seed: int = 0
    """Seed for weights, noise and the order of the data."""


def train(
    carry: Any,
    step: Callable[[Any, Any, jax.Array], tuple[Any, jax.Array]],
    batch: Callable[[int], Any],
    *,
    key: jax.Array,
    steps: int,
    every: int,
    measure: Callable[[int, Any, list[Row]], Row],
    checkpoints: Path | None,
    config: Any,
    best: Path | None = None,
) -> tuple[Any, list[Row]]:
    """Runs ``steps`` steps.

    A step must depend only on its number: then a run that resumes from a checkpoint gives the same
    result as an uninterrupted one. On several devices, the batch is split and the weights are
    copied.

    Args:
        carry: weights, optimizer state and the like; JAX arrays.
        step: ``(carry, batch, key) -> carry, loss``, jitted; it may donate the carry.
        batch: step number → arrays ``[examples, ...]``.
        key: each step's key is folded from it and the step number.
        steps: how many, at least 1.
        every: steps between measurements, and between checkpoints.
        measure: ``(number, carry, rows so far) -> row``; may write the best weights to a file.
        checkpoints: folder to resume from and to write to; None keeps nothing.
        config: the dataclass of the command line; a run resumes only with the same one.
        best: file that `measure` writes the best weights to. Without it a run does not resume,
            because the earlier best weights would be lost.

    Returns:
        The last carry, and one row per measurement, including those before a restart. Each row is
        printed as JSON.

    Raises:
        SystemExit: the loss or the weights are not finite (nothing is kept); the checkpoints are
            damaged or from other settings.
    """
    split, copied = _shardings()
    carry = jax.device_put(carry, copied)
    settings = _settings(config, best)
    rows: list[Row] = []
    first = 1
    manager = None
    if checkpoints is not None:
        manager = _manager(checkpoints)
        latest = manager.latest_step()
        if latest is not None:
            carry, rows = _restore(manager, latest, carry, settings, checkpoints)
            first = latest + 1
            if best is not None and not best.is_file():
                raise SystemExit(
                    f"{best}: expected the best weights of the run that wrote {checkpoints}, got "
                    "no such file. Restore it, or start over with another --checkpoints."
                )
    for row in rows:
        print(json.dumps(row), flush=True)
    losses: list[jax.Array] = []
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("steps", total=steps, completed=first - 1)
        for number in range(first, steps + 1):
            examples = jax.tree.map(partial(_place, split=split, copied=copied), batch(number))
            carry, loss = step(carry, examples, jax.random.fold_in(key, number))
            losses.append(loss)
            progress.update(task, advance=1)
            if number % every and number != steps:
                continue
            values = np.array(jax.device_get(losses))
            losses = []
            finite = np.isfinite(values)
            if not finite.all() or _has_nan(carry):
                wrong = number - len(values) + 1 + int(np.argmin(finite))
                what = (
                    f"step {number}: expected finite weights, got NaN"
                    if finite.all()
                    else f"step {wrong}: expected a finite loss, got {values[~finite][0]}"
                )
                raise SystemExit(
                    f"{what}. Nothing was kept. Use a lower --rate"
                    + (f", and start over: not in {checkpoints}." if checkpoints else ".")
                )
            row = {"step": number, "loss": float(values[-1]), **measure(number, carry, rows)}
            rows.append(row)
            print(json.dumps(row), flush=True)
            if manager is not None:
                _save(manager, number, carry, rows, settings)
    if manager is not None:
        manager.close()
    return carry, rows


def gradient_step(
    graph: Any,
    optimizer: optax.GradientTransformation,
    loss: Callable[[Any, Any, jax.Array], jax.Array],
) -> Callable[[Any, Any, jax.Array], tuple[Any, jax.Array]]:
    """A step for `train`, whose carry is ``params, rest, optimizer state``.

    Args:
        graph: the network's graph, split into ``nnx.Param`` and the rest.
        optimizer: the optimizer for the parameters.
        loss: ``(model, batch, key) -> scalar``; its changes to the model, such as
            to running statistics, are kept.
    """

    # Not in a scan: XLA's CPU backend computes the gradients of convolutions in loops slowly.
    @partial(jax.jit, donate_argnums=0)
    def step(carry: Any, batch: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, rest, state = carry

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graph, params, rest, copy=True)
            value = loss(model, batch, key)
            _, _, updated = nnx.split(model, nnx.Param, ...)
            return value, updated

        (value, rest), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), rest, state), value

    return step


def train_model(
    model: VGG19 | DnCNN,
    config: Any,
    *,
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
    loss: Callable[[Any, Any, jax.Array], jax.Array],
    batch: Callable[[int], Any],
    quality: Callable[[Any], Callable[[Any], Row]],
    best: str,
    metadata: dict[str, str],
    key: jax.Array,
) -> None:
    """Trains one of our networks, and writes its best weights under PyTorch's names.

    Args:
        model: the model, in training mode.
        config: the dataclass of the command line, with out, steps, rate, every and checkpoints.
        optimizer: made from the schedule: warm-up over a twentieth of the steps, then a cosine.
        loss: ``(model, batch, key) -> scalar``.
        batch: step number → arrays ``[examples, ...]``.
        quality: graph of the network in evaluation mode → ``params -> metrics``.
        best: the metric that decides which weights are best; higher is better.
        metadata: further metadata of the file, besides that metric and the step.
        key: see `train`.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    transformation = optimizer(
        optax.warmup_cosine_decay_schedule(0.0, config.rate, config.steps // 20, config.steps)
    )
    model.eval()
    metrics = quality(nnx.split(model, nnx.Param, ...)[0])

    def measure(number: int, carry: Any, rows: list[Row]) -> Row:
        """Measures quality on test data; writes the best weights."""
        params, rest, _ = carry
        row = metrics(nnx.merge_state(params, rest))
        if row[best] > max((row[best] for row in rows), default=-math.inf):
            about = metadata | {best: f"{row[best]:.4f}", "step": str(number)}
            tensors = to_torch(nnx.merge(graph, params, rest, copy=True))
            write_tensors(tensors, config.out, about)
        return row

    train(
        jax.tree.map(jnp.copy, (params, rest, transformation.init(params))),
        gradient_step(graph, transformation, loss),
        batch,
        key=key,
        steps=config.steps,
        every=config.every,
        measure=measure,
        checkpoints=config.checkpoints,
        config=config,
        best=config.out,
    )


def started(model: Any, path: Path | None) -> Any:
    """The network with the weights of a checkpoint; unchanged without one.

    Raises:
        ValueError: the checkpoint has another architecture.
    """
    if path is None:
        return model
    kinds = (nnx.Param, nnx.BatchStat)
    found = nnx.state(read_model(path, type(model)), kinds)
    shapes = [
        jax.tree.map(jnp.shape, nnx.to_pure_dict(s)) for s in (nnx.state(model, kinds), found)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"--start: {path}: expected the network that the other options describe, got another. "
            "Give the options that it was trained with."
        )
    nnx.update(model, found)
    return model


@contextlib.contextmanager
def exits() -> Iterator[None]:
    """Ends a script with a message instead of a traceback if its input is wrong."""
    try:
        yield
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise SystemExit(text) from error
    except (ModuleNotFoundError, TypeError, ValueError) as error:
        raise SystemExit(str(error)) from error


def write_tensors(tensors: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Writes a .safetensors file, whole or not at all.

    Raises:
        SystemExit: a tensor is not finite, or the path cannot be written.
    """
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise SystemExit(
                f"{path}: expected finite numbers to write, got NaN or Inf in {name!r}. Nothing "
                "was written. Use a lower --rate."
            )
    path = path.resolve()
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(save(dict(tensors), metadata))
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise SystemExit(f"{path}: {error.strerror}") from error


def check_output(path: Path, *inputs: Path) -> None:
    """Refuses, before any work, an output path that cannot or must not be written.

    Args:
        path: the output; its folder is created if it does not exist.
        inputs: files that the output must not replace.

    Raises:
        SystemExit: if it is one of these.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out: {path.parent}: {error.strerror}") from error
    if path.exists() and not path.is_file():
        raise SystemExit(f"--out: {path}: expected a file to write, got something else there.")
    if not os.access(path.resolve().parent, os.W_OK):
        raise SystemExit(f"--out: {path.parent}: no permission to write there.")
    for given in inputs:
        if path.exists() and given.exists() and path.samefile(given):
            raise SystemExit(
                f"--out: {path}: is also an input, which would be lost. Choose another name."
            )


def check_numbers(config: Any) -> None:
    """Refuses numbers on the command line that no step can run with.

    Raises:
        SystemExit: one is out of range.
    """
    values = asdict(config)
    for name, least in (("steps", 1), ("every", 1), ("patch", 1), ("seed", 0)):
        if values.get(name, least) < least:
            raise SystemExit(f"--{name}: expected at least {least}, got {values[name]}.")
    if not 0 < values["rate"] < math.inf:
        raise SystemExit(f"--rate: expected a number above 0, got {values['rate']:g}.")
    if not 0 <= values.get("decay", 0) < math.inf:
        raise SystemExit(f"--decay: expected a number of at least 0, got {values['decay']:g}.")
    devices = jax.device_count()
    batch = values.get("batch", devices)
    if batch < 1 or batch % devices:
        raise SystemExit(
            f"--batch: expected at least 1, and a multiple of the {devices} "
            f"device{'s' * (devices != 1)}, got {batch}."
        )


def _shardings() -> tuple[NamedSharding, NamedSharding]:
    """The shardings of batches and weights."""
    # Auto: with explicit axes, JAX refuses to index, reshape or scan arrays on several devices, and
    # users' losses do that.
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())


def _place(array: Any, *, split: NamedSharding, copied: NamedSharding) -> jax.Array:
    # In users' arrays, the first axis need not be the examples.
    shared = np.ndim(array) and not np.shape(array)[0] % split.mesh.size
    return jax.device_put(array, split if shared else copied)


@jax.jit
def _any_nan(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isnan(leaf).any() for leaf in leaves]).any()


def _has_nan(carry: Any) -> bool:
    """Whether the last step broke weights, which its loss, computed before, cannot show."""
    floats = [x for x in jax.tree.leaves(carry) if jnp.issubdtype(x.dtype, jnp.floating)]
    return bool(_any_nan(floats))


def _arrays(carry: Any) -> dict[str, jax.Array]:
    # Leaves by number, and keys by their data: Orbax sees a plain dict whatever the containers.
    return {
        str(index): jax.random.key_data(leaf)
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for index, leaf in enumerate(jax.tree.leaves(carry))
    }


def _settings(config: Any, best: Path | None) -> dict[str, str]:
    """The settings that the result depends on; not how often it is saved."""
    free = {"checkpoints", "every"} | (set() if best else {"out"})
    settings = {name: str(value) for name, value in asdict(config).items() if name not in free}
    script = Path(inspect.getfile(type(config))).name
    return settings | {"script": script, "devices": str(jax.device_count())}


def _manager(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(folder.absolute(), options=options)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--checkpoints: {folder}: expected a folder for checkpoints: {error}"
        ) from error


def _save(
    manager: ocp.CheckpointManager,
    number: int,
    carry: Any,
    rows: list[Row],
    settings: dict[str, str],
) -> None:
    items = ocp.args.Composite(
        carry=ocp.args.StandardSave(_arrays(carry)),  # pyright: ignore[reportCallIssue]
        rows=ocp.args.JsonSave({"rows": rows, "settings": settings}),  # pyright: ignore[reportCallIssue]
    )
    manager.save(number, args=items)


def _restore(
    manager: ocp.CheckpointManager,
    number: int,
    carry: Any,
    settings: dict[str, str],
    folder: Path,
) -> tuple[Any, list[Row]]:
    damaged = (
        f"{folder / str(number)}: expected a checkpoint of this script, got a damaged one or "
        "something else. Remove that folder to resume from the previous one, if there is one."
    )

    def restore(**items: Any) -> Any:
        try:
            return manager.restore(number, args=ocp.args.Composite(**items))
        except Exception as error:  # the type depends on the missing or half-written part
            raise SystemExit(f"{damaged} ({type(error).__name__}: {str(error)[:200]})") from error

    rows: Any = restore(rows=ocp.args.JsonRestore())["rows"]  # pyright: ignore[reportCallIssue]
    if not isinstance(rows, dict) or rows.keys() != {"rows", "settings"}:
        raise SystemExit(damaged)
    then = rows["settings"]
    changed = [
        f"--{name.replace('_', '-')} was {then.get(name)} and is {settings.get(name)}"
        for name in sorted(then.keys() | settings.keys())
        if then.get(name) != settings.get(name)
    ]
    if then.get("script") != settings["script"]:
        changed = [f"they are from {then.get('script')}"]
    if changed:
        raise SystemExit(
            f"{folder}: the checkpoints are from a run with other settings: {'; '.join(changed)}. "
            "Use another folder, or the original settings."
        )
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(carry))
    found = restore(carry=ocp.args.StandardRestore(like))  # pyright: ignore[reportCallIssue]
    leaves, structure = jax.tree.flatten(carry)
    new = [
        jax.random.wrap_key_data(found.carry[str(index)], impl=jax.random.key_impl(leaf))
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else found.carry[str(index)]
        for index, leaf in enumerate(leaves)
    ]
    return structure.unflatten(new), rows["rows"]
