"""Measures the quality of every level of a release."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from .._calibrate.network import check_finite, number_of
from .._calibrate.targets import check_metric
from .._keys.keys import Secret, level_key
from .checkpoint import AnyPath, open_checkpoint
from .files import read_params
from .use import inspection_of


class MeasuredLevel(NamedTuple):
    """The measured quality of a level.

    Attributes:
        level: 0 to M; level 0 is the file without a key, and level M the original.
        share: the encrypted weights that the level opens, as a share of all weights in the file.
        value: the metric. For level 0 of a sealed file it is meaningless, and may be NaN or
            infinite.
        worthless: whether the value is no better than the reference; None without one.

    Examples:
        >>> def size(params):
        ...     return len(params)
        >>> top = measure_levels("model.safetensors", size, secret=secret)[-1]
        >>> top.level, top.share
        (3, 1.0)
    """

    level: int
    share: float
    value: float
    worthless: bool | None = None


def measure_levels(
    path: AnyPath,
    evaluate: Callable[[dict[str, Any]], Any],
    *,
    secret: Secret,
    reference: float | None = None,
    lower_is_better: bool = False,
    progress: Callable[[MeasuredLevel], None] | None = None,
) -> tuple[MeasuredLevel, ...]:
    """Measures every level of a protected file: the quality that each customer gets.

    Every level is decrypted under the keys of the release, with the checks of `unlock_file`:
    signature, digests, decrypted weights. Levels are measured from the top down, one after the
    other, and each of them has to fit into memory.

    Args:
        path: protected file, or the index or folder of a protected checkpoint.
        evaluate: ``params -> number``: the metric, as in `Targets`. The params are a dict from the
            names of all tensors to arrays: JAX arrays, or NumPy arrays for dtypes that JAX lacks.
            Use data that the network was not trained on.
        secret: the owner's secret.
        reference: the metric that someone reaches without the file, from the architecture or a
            public base, with data of their own; see the audit's report. A level that is no better
            is worth nothing to them.
        lower_is_better: True for a loss.
        progress: called after each level.

    Returns:
        Levels 0 to M, in ascending order.

    Raises:
        ValueError: not a protected file; a metric or a reference that is not finite.
        TypeError: a metric that does not return a number.
        GrantError: the secret did not protect this file.
        IntegrityError: the file was altered.
        OSError: a file that cannot be read.

    Examples:
        >>> def mean(params):
        ...     return sum(float(abs(array).mean()) for array in params.values())
        >>> found = measure_levels("model.safetensors", mean, secret=secret)
        >>> [level.level for level in found]
        [0, 1, 2, 3]
    """
    check_metric(evaluate)
    if reference is not None and not math.isfinite(reference):
        raise ValueError(
            f"reference: expected a finite number, got {reference}. Give the metric that is "
            "reached without the file, or leave it out."
        )
    sign = -1 if lower_is_better else 1
    found: list[MeasuredLevel] = []
    with open_checkpoint(path) as checkpoint:
        envelopes = checkpoint.envelopes()
        manifest = next(iter(envelopes.values())).manifest
        checkpoint.check_whole(manifest)
        top = level_key(secret, manifest.model_id, levels=len(manifest.levels))
        shares = [0.0, *(level.share for level in inspection_of(checkpoint, envelopes).levels)]
        for level, share in reversed(list(enumerate(shares))):
            key = top.lower(level) if level else None
            files = checkpoint.unlocked(envelopes, key, owner=True).values()
            params = {name: array for file in files for name, array in read_params(file).items()}
            value = number_of(evaluate(params))
            if level or manifest.rest == "plain":
                check_finite(value, f"at level {level}")
            # NaN is no better either.
            worthless = None if reference is None else not sign * value > sign * reference
            found.append(MeasuredLevel(level, share, value, worthless))
            if progress is not None:
                progress(found[-1])
    return tuple(reversed(found))
