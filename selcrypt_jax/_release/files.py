"""Protects checkpoints on disk, tensor by tensor."""

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from .._calibrate.levels import Calibration, calibrate_levels
from .._calibrate.targets import Targets
from .._ciphers.lossless import LosslessCipher
from .._format.envelope import check_unprotected
from .._format.manifest import Rest
from .._format.unlocked import check_original
from .._io.arrays import as_array
from .._io.companions import Companions
from .._io.places import check_output
from .._io.safetensors import SafetensorsFile
from .._keys.keys import Secret
from .._keys.signing import SigningKey
from .._masks.levels import LevelsLike
from .._masks.options import STRATEGIES, Select, check_options
from .._masks.scores import NamedTensors, scores_for
from .._tree.groups import Layout
from .checkpoint import AnyPath, Checkpoint, open_original
from .choose import Plan, check_like, check_rest, choose_like, plain_change, random_keys
from .outputs import Job, Protection, checkpoint_outputs
from .signers import AnySigner
from .size import check_header


class Selected(NamedTuple):
    """What was selected in a protected checkpoint.

    Attributes:
        model_id: 16 bytes that identify the protection.
        layout: the layout of the kernels, given or inferred from their shapes; None for given
            scores.
        groups: tensor → how many of its groups are graded into levels.
        untouched: dtype → how many weights are in tensors without any encrypted weight; empty with
            a sealed rest.
        calibration: the quality of the file's levels, if `Targets` were requested.
        plain_change: share of the change from `Select.base` that is plain in the file: of squared
            changes within a tensor, averaged over the weights; None without a base.
        new: tensors that the base lacks in this shape, so that all of their weights count as
            changed; or that the earlier release of `like` lacks, so that none of their weights is
            graded.
        similar: messages about tensors that are similar to another one (a moving average, a copy in
            another dtype) but in which less is encrypted; and about those that hold much of another
            one in another order.
        random_keys: tensors that are, or look like, random keys: level 1 opens them.
        whole: those of `groups` that are encrypted whole and opened by one level, such as small
            tensors.
        beside: the files ``copied`` along with the weights, and those ``left_out`` and why; None
            without `copy_config`.

    Examples:
        >>> selected = protect_file("plain.safetensors", "public.safetensors", secret=secret)
        >>> sum(selected.groups.values()) > 0
        True
    """

    model_id: bytes
    layout: Layout | None
    groups: Mapping[str, int]
    untouched: Mapping[str, int]
    calibration: Calibration | None = None
    plain_change: float | None = None
    new: tuple[str, ...] = ()
    similar: tuple[str, ...] = ()
    random_keys: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    beside: Companions | None = None


def protect_file(
    path: AnyPath,
    output: AnyPath,
    *,
    secret: Secret,
    levels: LevelsLike | Targets | None = None,
    selection: Select | None = None,
    like: AnyPath | None = None,
    old_signer: AnySigner | None = None,
    signing: SigningKey | None = None,
    cipher: LosslessCipher | None = None,
    rest: Rest = "sealed",
    copy_config: bool = False,
    force: bool = False,
) -> Selected:
    """Protects a checkpoint for release, tensor by tensor.

    The output has the same names, dtypes and shapes, and loads in every program that reads
    safetensors. In all copies of a tensor, such as tied weights that were saved twice, the same
    weights are encrypted, whether the copies were selected or not. A copy may be transposed or
    reshaped, be part of a larger tensor, or be a moving average in which at least a quarter of the
    weights are unchanged. `Selected.similar` says how much stays open in tensors that are only
    similar.

    Args:
        path: a safetensors file; or the index or the folder of a checkpoint in several files; or
            the folder of an Orbax checkpoint; or an ONNX model or a Flax msgpack file.
        output: path of the new file, or of the new folder for a checkpoint in a folder.
        secret: the owner's secret.
        levels: a number of levels, 5 by default, each of which opens an equal part of
            ``selection.budget``; or the share of the groups that each level opens, ascending, the
            last one being the share that is encrypted; or `Levels`, such as `PaperLevels`; or
            `Targets`, the quality of the levels. Rings that are too small to hide in are merged
            upwards, leaf by leaf. With targets the whole checkpoint is in memory, otherwise one
            tensor at a time.
        selection: what is encrypted, see `Select`; ``Select()`` by default.
        like: an earlier release of this network, instead of `levels` and `selection`: the same
            weights are graded, and opened by the same levels. Weights change little between
            versions, so a weight that is encrypted in one and plain in the next is as good as
            plain. Tensors that the earlier release lacks are sealed, or stay plain with a plain
            rest; see `Selected.new`.
        old_signer: the public key that the earlier release is signed with, or its file, if it is
            not that of `signing`; ``"unsigned"`` if it was never signed and this is your own copy.
        signing: the key that signs the file; its public half identifies the owner.
        cipher: `LosslessCipher()` by default.
        rest: what happens to the weights that no level grades. ``"sealed"``: every tensor is
            masked as a whole under the key of level 1, so that the file is useless without a
            grant and reveals only names, shapes, dtypes and the range of exponents of each tensor.
            ``"plain"``: they stay as they are, and anyone can run level 0, as in the paper. Plain
            weights help an attacker: see docs/security.md.
        copy_config: also copy the other files of a folder: configuration, tokenizer, and everything
            else that cannot be weights, including subfolders. Links that lead out of the folder,
            hidden files and keys are left out. Look at `Selected.beside` before you publish the
            folder: these files are not encrypted.
        force: replace an existing file.

    Returns:
        What was selected.

    Raises:
        ValueError: not a checkpoint, or one that is already protected; nothing to select; a leaf
            that is too small to hide in; positions that need more space than the header has;
            targets for which no release was found.
        TypeError: an argument of another type; a metric that does not return a number.
        OSError: a file that cannot be read or written. Then there is no output.

    Examples:
        >>> protect_file("plain.safetensors", "public.safetensors", secret=secret).layout
        'OIHW'
        >>> random = Select("random", budget=0.3)
        >>> done = protect_file(
        ...     "plain.safetensors", "other.safetensors", secret=secret, levels=3, selection=random
        ... )
        >>> done = protect_file(
        ...     "plain.safetensors", "next.safetensors", secret=secret, like="other.safetensors"
        ... )
    """
    cipher = LosslessCipher() if cipher is None else cipher
    check_like(like, old_signer, levels=levels, selection=selection)
    levels = 5 if levels is None else levels
    selection = Select() if selection is None else selection
    with open_original(path) as checkpoint, ExitStack() as stack:
        files = list(checkpoint.files.values())
        check_plain(checkpoint)
        beside = checkpoint.companions() if copy_config else None
        check_rest(rest)
        check_options(selection, cipher)
        check_scores(selection, checkpoint, output)
        what = str(checkpoint.path)
        plan = None
        if like is None:
            plan = Plan(
                checkpoint, levels, selection, cipher, rest,
                stack=stack, metadata=files[0].metadata or {}, what=what,
            )  # fmt: skip
        counted = plan if selection.scope == "leaf" else None
        for file in files:
            shapes = counted.scores.shapes if counted else {}
            here = [shape for name, shape in shapes.items() if name in file.tensors]
            check_header(file.tensors, here, counted and counted.levels, str(file.path))
        # Before the selection, which takes most of the time.
        with checkpoint_outputs(checkpoint, output, force=force, beside=beside) as create:
            try:
                if plan is None:
                    assert like is not None
                    chosen = choose_like(
                        like, checkpoint, files,
                        secret=secret, signing=signing, old_signer=old_signer,
                        cipher=cipher, rest=rest, what=what,
                    )  # fmt: skip
                else:
                    chosen = plan.choose(lambda: read_params(checkpoint), secret, files)
            except ValueError as error:
                if plan is None or plan.targets is not None or str(error).startswith(what):
                    raise
                raise ValueError(f"{what}: {error}") from None
            change, lacking = plain_change(checkpoint, selection, chosen.rings, rest, what)
            protection = Protection.new(
                secret, chosen.levels, cipher, rest, signing, chosen.model_id
            )
            for name, file in checkpoint.files.items():
                here = {t: chosen.rings[t] for t in file.tensors if t in chosen.rings}
                job = Job(file, file.metadata, here, checkpoint.shard(name), str(file.path))
                create(name).protected(job, protection)
    untouched: Counter[str] = Counter()
    for name, info in checkpoint.tensors.items():
        if rest == "plain" and name not in chosen.rings:
            untouched[info.dtype] += math.prod(info.shape)
    return Selected(
        protection.key.model_id,
        chosen.layout,
        {name: sum(ring.groups for _, ring in found) for name, found in chosen.rings.items()},
        +untouched,
        chosen.calibration,
        change,
        lacking or chosen.unknown,
        tuple(map(str, chosen.similar)),
        tuple(name for file in files for name in random_keys(file)),
        tuple(
            name
            for name, ((_, ring), *more) in chosen.rings.items()
            if not more and ring.groups == math.prod(ring.mask_shape)
        ),
        beside,
    )


def calibrate_file(
    path: AnyPath,
    targets: Targets,
    *,
    seed: int,
    keys: int,
    selection: Select,
    cipher: LosslessCipher,
) -> Calibration:
    """`calibrate_levels` for a checkpoint on disk, which has to fit into memory."""
    with open_original(path) as checkpoint, ExitStack() as stack:
        for file in checkpoint.files.values():
            check_unprotected(file.metadata, str(file.path))
            check_original(file.metadata, str(file.path))
        check_scores(selection, checkpoint)
        metadata = next(iter(checkpoint.files.values())).metadata or {}
        scores, _ = scores_for(
            checkpoint, selection, stack, metadata=metadata, what=str(checkpoint.path)
        )
        order = {name: scores.of(name) for name in scores.shapes}
        params = read_params(checkpoint)
    return calibrate_levels(
        params,
        targets,
        key=jax.random.key(seed),
        keys=keys,
        selection=replace(selection, importance=order, granularity=None, layout=None),
        cipher=cipher,
    )


def check_plain(checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint that is protected, unlocked below the top level, or malformed.

    Malformed is what the safetensors library refuses.
    """
    for file in checkpoint.files.values():
        check_unprotected(file.metadata, str(file.path))
        check_original(file.metadata, str(file.path))
        if isinstance(file, SafetensorsFile):
            file.ask_stock_reader()


def check_scores(selection: Select, checkpoint: Checkpoint, output: AnyPath | None = None) -> None:
    """Refuses scores from the output, or from the checkpoint itself."""
    if (scores := selection.scores_file) is None:
        return
    if output is not None:
        check_output(output, scores)
    for file in checkpoint.files.values():
        if scores.exists() and file.path.exists() and scores.samefile(file.path):
            raise ValueError(
                f"{scores}: expected scores, got the checkpoint itself. Save scores under the "
                f"names of its tensors, or name a strategy: {', '.join(STRATEGIES)}."
            )


def read_params(source: NamedTensors) -> dict[str, Any]:
    """All tensors; JAX arrays on the device if JAX has their dtype, otherwise NumPy arrays."""
    params: dict[str, Any] = {}
    for name, info in source.tensors.items():
        array = as_array(source.read(name), info.dtype, info.shape)
        same = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
        params[name] = jax.device_put(array) if same else array
    return params
