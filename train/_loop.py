"""A training loop that can be killed at any time and goes on where it was, bit for bit."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import save_file

Row = dict[str, float]


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
) -> tuple[Any, list[Row]]:
    """Runs ``steps`` steps.

    What a step does must depend on its number alone: then a run that goes on from a checkpoint
    gives what an unbroken one gives. Over several devices the batch is split, and weights are
    copied.

    Args:
        carry: weights, optimizer state and the like; JAX arrays.
        step: ``(carry, batch, key) -> carry, loss``, jitted; it may donate the carry.
        batch: number of the step → arrays ``[examples, ...]``.
        key: the step's key is folded from it and the number.
        steps: how many, from 1.
        every: steps between two measurements, and checkpoints.
        measure: ``(number, carry, rows so far) -> row``; may write the best weights to a file.
        checkpoints: folder to go on from and to write to; None keeps nothing.
        config: the dataclass of the command line; a run does not go on with another one.

    Returns:
        The last carry, and a row a measurement, of those before a restart too. Each is printed
        as JSON.

    Raises:
        SystemExit: a loss that is not finite; the last checkpoint is from before. Or checkpoints
            of other settings.
    """
    if every < 1:
        raise SystemExit(f"--every: expected at least 1, got {every}.")
    split, copied = _shardings()
    carry = jax.device_put(carry, copied)
    settings = _settings(config)
    rows: list[Row] = []
    first = 1
    manager = None
    if checkpoints is not None:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        manager = ocp.CheckpointManager(checkpoints.absolute(), options=options)
        latest = manager.latest_step()
        if latest is not None:
            carry, rows = _restore(manager, latest, carry, settings, checkpoints)
            first = latest + 1
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
            if not np.isfinite(values).all():
                wrong = number - len(values) + 1 + int(np.argmin(np.isfinite(values)))
                raise SystemExit(
                    f"step {wrong}: expected a finite loss, got {values[~np.isfinite(values)][0]}. "
                    "Lower --rate. The last checkpoint is from before."
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
    """A step for `train` on a carry of ``params, rest, optimizer state``.

    Args:
        graph: of the network, split into ``nnx.Param`` and the rest.
        optimizer: of the parameters.
        loss: ``(model, batch, key) -> scalar``; what it changes in the model, as statistics, stays.
    """

    # Not in a scan: XLA's CPU backend is slow at the gradients of convolutions inside of loops.
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


def write_tensors(tensors: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Writes a .safetensors file; it is whole, or the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    save_file(dict(tensors), new, metadata)
    new.replace(path)


def _shardings() -> tuple[NamedSharding, NamedSharding]:
    """How batches and weights lie on the devices."""
    # Auto: with explicit axes, JAX refuses to index, reshape or scan what lies on several devices,
    # and losses of a user's own do that.
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())


def _place(array: Any, *, split: NamedSharding, copied: NamedSharding) -> jax.Array:
    # Arrays of a user's own need not have a first axis of examples.
    shared = np.ndim(array) and not np.shape(array)[0] % split.mesh.size
    return jax.device_put(array, split if shared else copied)


def check_batch(batch: int) -> None:
    """Refuses a batch that the devices cannot share.

    Raises:
        SystemExit: so it is.
    """
    if batch < 1 or batch % jax.device_count():
        raise SystemExit(
            f"--batch: expected a multiple of the {jax.device_count()} devices, got {batch}."
        )


def _arrays(carry: Any) -> dict[str, jax.Array]:
    # By number, and keys by their data: whatever containers there are, Orbax sees a plain dict.
    return {
        str(index): jax.random.key_data(leaf)
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for index, leaf in enumerate(jax.tree.leaves(carry))
    }


def _settings(config: Any) -> dict[str, str]:
    """What the result depends on; not where it is written, or how often."""
    free = {"out", "checkpoints", "every"}
    return {name: str(value) for name, value in asdict(config).items() if name not in free}


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
    record: Any = manager.restore(
        number,
        args=ocp.args.Composite(rows=ocp.args.JsonRestore()),  # pyright: ignore[reportCallIssue]
    )["rows"]
    then = record.get("settings", {})
    changed = [
        f"--{name.replace('_', '-')} was {then.get(name)} and is {settings.get(name)}"
        for name in sorted(then.keys() | settings.keys())
        if then.get(name) != settings.get(name)
    ]
    if changed:
        raise SystemExit(
            f"{folder}: the checkpoints are of a run with other settings: {'; '.join(changed)}. "
            "Use another folder, or the settings that they were made with."
        )
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(carry))
    found: Any = manager.restore(
        number,
        args=ocp.args.Composite(
            carry=ocp.args.StandardRestore(like),  # pyright: ignore[reportCallIssue]
        ),
    )
    leaves, structure = jax.tree.flatten(carry)
    new = [
        jax.random.wrap_key_data(found.carry[str(index)], impl=jax.random.key_impl(leaf))
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else found.carry[str(index)]
        for index, leaf in enumerate(leaves)
    ]
    return structure.unflatten(new), record["rows"]
