"""Releases whose levels give what their owner wants: calibrated under their own keys."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import jax
from jaxtyping import PyTree

from .._calibrate.levels import Calibration, calibrated, checked_targets
from .._calibrate.network import Release
from .._calibrate.search import Evaluation, Search
from .._ciphers.lossless import LosslessCipher
from .._io.arrays import as_array
from .._io.atomic import check_output
from .._keys.keys import Secret, SigningKey
from .._masks.ranks import Scope
from .._tree.groups import Granularity, Layout
from .._tree.names import Selector, named_leaves
from .checkpoint import AnyPath, Checkpoint, Protection, checkpoint_outputs, open_checkpoint
from .plan import Strategy
from .protect import (
    Protected,
    Selection,
    alike_tensors,
    check_checkpoint,
    check_release,
    checkpoint_scores,
    protected_tree,
    rings_of_masks,
    selection,
    write_protected,
)


def protect_calibrated(
    eval_fn: Callable[[PyTree], Any],
    params: PyTree,
    scores: PyTree,
    targets: Sequence[float | None],
    *,
    secret: Secret,
    tolerance: float | None = None,
    evaluations: int | None = None,
    scope: Scope = "leaf",
    budget: float = 1.0,
    small: float = 0.0,
    select: Selector = None,
    higher_is_better: bool = True,
    progress: Callable[[Evaluation], None] | None = None,
    signing: SigningKey | None = None,
    cipher: LosslessCipher | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[Protected, Calibration]:
    """Protects parameters for release, such that each level of it gives what is asked for.

    `calibrate_levels` finds masks that give the targets in the mean over keys, and a release has
    one key, with which a level may be far off. Here the release itself is measured, under its own
    keys: from the top level down, counts of groups near the right one are tried until a level is
    within the tolerance. What is measured is what `unlock` gives, bit for bit.

    Encrypted are the most important groups. Levels take from the beginning of the order; where that
    leaves a lower level too little to lose, its ring has groups from the end as well.

    Args:
        eval_fn: ``params -> number``: the metric, on data that were not used for training. It has
            to give the same number for the same params.
        params: see `protect`.
        scores: importance, see `nested_masks`; the smaller its steps, the finer the levels.
        targets: see `calibrate_levels`.
        secret: the owner's.
        tolerance: how far a level may be from its target; see `calibrate_levels`.
        evaluations: how many may be taken at most, each of one call of `eval_fn`. By default 8 a
            target and 8 more. Four targets need about 20 where keys make a difference of three
            tolerances (standard deviation), 25 where it is five, and 40 where it is eight; some
            networks need twice as many.
        scope: see `nested_masks`.
        budget: largest share of the groups that may be encrypted, in (0, 1].
        small: share of all weights that small leaves may have, see `calibrate_levels`.
        select: small leaves that may be taken.
        higher_is_better: False for a loss: the targets then descend.
        progress: called after each evaluation.
        signing: see `protect`.
        cipher: see `protect`.
        metadata: see `protect`.

    Returns:
        The release, and what its levels give. ``values`` are its own, and ``spreads`` zero.
        ``fractions`` are shares of the groups that levels open, for information: no others make
        the same release.

    Raises:
        ValueError: targets that do not ascend, or that no release was found for, with what is
            reachable; a metric that is flat or not finite; what `protect` refuses.
        TypeError: an `eval_fn` that gives no number; what `protect` refuses.

    Examples:
        >>> released, found = protect_calibrated(psnr_of, params, scores, [20, 24], secret=secret)
        >>> released.save("model.safetensors")
    """
    check_release(params, metadata)
    found, model_id = _calibrated(
        eval_fn,
        params,
        scores,
        targets,
        secret=secret,
        tolerance=tolerance,
        evaluations=evaluations,
        scope=scope,
        budget=budget,
        small=small,
        select=select,
        higher_is_better=higher_is_better,
        progress=progress,
        cipher=cipher,
    )
    released = protected_tree(
        params,
        found.masks,
        secret=secret,
        signing=signing,
        cipher=cipher,
        metadata=metadata,
        model_id=model_id,
    )
    return released, found


def protect_file_calibrated(
    path: AnyPath,
    output: AnyPath,
    eval_fn: Callable[[Mapping[str, Any]], Any],
    targets: Sequence[float | None],
    *,
    secret: Secret,
    tolerance: float | None = None,
    evaluations: int | None = None,
    importance: AnyPath | None = None,
    strategy: Strategy | None = None,
    granularity: Granularity | None = None,
    layout: Layout | None = None,
    select: Selector = None,
    scope: Scope = "leaf",
    budget: float = 1.0,
    small: float | None = None,
    higher_is_better: bool = True,
    progress: Callable[[Evaluation], None] | None = None,
    signing: SigningKey | None = None,
    cipher: LosslessCipher | None = None,
    force: bool = False,
) -> tuple[Selection, Calibration]:
    """Protects a checkpoint for release, such that each level of it gives what is asked for.

    As `protect_calibrated`, and as `protect_file`, but the whole checkpoint is in memory.

    Args:
        path: see `protect_file`.
        output: see there.
        eval_fn: the metric, a function of a dict from the names of all tensors to arrays.
        targets: see `protect_calibrated`.
        secret: the owner's.
        tolerance: see `protect_calibrated`.
        evaluations: see there.
        importance: see `protect_file`.
        strategy: see there.
        granularity: see there.
        layout: see there.
        select: see there.
        scope: see there.
        budget: largest share of the groups that may be encrypted, in (0, 1].
        small: see `protect_file`; by default 0.02 if the first target is None, else 0, since with
            small tensors level 0 is hard to steer.
        higher_is_better: see `protect_calibrated`.
        progress: see there.
        signing: see `protect_file`.
        cipher: see there.
        force: see there.

    Returns:
        What was chosen, and what the levels of the file give.

    Raises:
        ValueError: see `protect_calibrated` and `protect_file`.
        TypeError: an `eval_fn` that gives no number.
        OSError: what cannot be read or written. There is no output then.
    """
    cipher = LosslessCipher() if cipher is None else cipher
    if small is None:
        small = 0.02 if list(targets[:1]) == [None] else 0.0
    with open_checkpoint(path) as checkpoint, ExitStack() as stack:
        check_checkpoint(checkpoint)
        if importance is not None:
            check_output(output, importance)
        scores, layout = checkpoint_scores(
            checkpoint, stack, importance, strategy, granularity, layout, select
        )
        with checkpoint_outputs(checkpoint, output, force=force) as create:
            params = read_params(checkpoint)
            found, model_id = _calibrated(
                eval_fn,
                params,
                dict.fromkeys(params, False) | {n: scores.of(n) for n in scores.shapes},
                targets,
                secret=secret,
                tolerance=tolerance,
                evaluations=evaluations,
                scope=scope,
                budget=budget,
                small=small,
                select=select,
                higher_is_better=higher_is_better,
                progress=progress,
                cipher=cipher,
                alike=alike_tensors(checkpoint, params),
            )
            rings = rings_of_masks(named_leaves(params), found.masks, cipher)
            protection = Protection.new(secret, len(found.masks), cipher, signing, model_id)
            write_protected(checkpoint, create, rings, protection)
    return selection(checkpoint, protection, layout, rings), found


def read_params(checkpoint: Checkpoint) -> dict[str, Any]:
    """All tensors; on the device at once, unless JAX has no such dtype."""
    params: dict[str, Any] = {}
    for name, info in checkpoint.tensors.items():
        array = as_array(checkpoint.read(name), info.dtype, info.shape)
        same = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
        params[name] = jax.device_put(array) if same else array
    return params


def _calibrated(
    eval_fn: Callable[[PyTree], Any],
    params: PyTree,
    scores: PyTree,
    targets: Sequence[float | None],
    *,
    secret: Secret,
    tolerance: float | None,
    evaluations: int | None,
    scope: Scope,
    budget: float,
    small: float,
    select: Selector,
    higher_is_better: bool,
    progress: Callable[[Evaluation], None] | None,
    cipher: LosslessCipher | None,
    alike: Sequence[Sequence[str]] = (),
) -> tuple[Calibration, bytes]:
    """What to encrypt, and under which model id, which must not be used for anything else.

    So it is not shown: a caller who had it could encrypt other weights with the same keys.
    """
    sign = 1.0 if higher_is_better else -1.0
    wanted = checked_targets(targets, sign)
    if evaluations is not None and evaluations < 1:
        raise ValueError(f"evaluations: expected at least 1, got {evaluations}.")
    network = Release(
        eval_fn, params, scores, scope, small, select, cipher, sign,
        secret=secret, levels=len(wanted), alike=alike,
    )  # fmt: skip
    search = Search(network, wanted, budget, tolerance, progress, evaluations)
    return calibrated(search, network), network.model_id
