"""The target quality of the levels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Evaluation(NamedTuple):
    """One step of the search.

    Attributes:
        number: 1, 2, and so on.
        level: the level that was tried; M for the untouched network.
        share: the share of the groups that the level opens; for the lowest level, the share that
            is encrypted.
        value: its quality, averaged over keys; or in the release that is sought.
    """

    number: int
    level: int
    share: float
    value: float


@dataclass(frozen=True)
class Targets:
    """The quality that levels should have, for `protect`, `protect_file` and `calibrate_levels`.

    Attributes:
        targets: the quality of levels 0 to M-1, from the worst to the best; level M gives the
            original. With a sealed rest they are those of levels 1 to M-1, since level 0 is
            useless. The first may be None, "as bad as it gets": then the whole budget is encrypted,
            which is all groups unless `Select.budget` limits it.
        evaluate: ``params -> number``: the metric, on data that were not used for training. It must
            give the same number for the same params. For a checkpoint on disk the params are a
            dict from the names of all tensors to arrays.
        tolerance: how far a level may be from its target. By default 2 % of the distance from the
            first target to the untouched network.
        evaluations: how often `evaluate` may be called for a release. By default 8 times per target
            plus 8, and up to four times as often while a level has values on both sides of its
            target. Four targets need about 20 if the standard deviation over keys is three
            tolerances, 25 if it is five, and 40 if it is eight; some networks need twice as many.
        lower_is_better: True for a loss: the targets then descend.
        progress: called after each evaluation.

    Examples:
        >>> targets = Targets([21, 25], psnr_of, tolerance=1)
        >>> weights = Select(granularity="weight", budget=0.9)
        >>> released = protect(params, secret=secret, levels=targets, selection=weights)
        >>> released.calibration.exact
        True
    """

    targets: Sequence[float | None]
    evaluate: Callable[[Any], Any]
    tolerance: float | None = None
    evaluations: int | None = None
    lower_is_better: bool = False
    progress: Callable[[Evaluation], None] | None = None

    @property
    def sign(self) -> float:
        """The factor that turns the metric into one where higher is better."""
        return -1.0 if self.lower_is_better else 1.0

    @property
    def small(self) -> float:
        """The default share of small tensors: with them level 0 is hard to steer."""
        return 0.02 if list(self.targets[:1]) == [None] else 0.0


def check_metric(evaluate: object) -> None:
    """Refuses a metric that cannot be called.

    Raises:
        TypeError: it cannot.
    """
    if not callable(evaluate):
        raise TypeError(f"evaluate: expected a function of params, got {type(evaluate).__name__}.")


def checked_targets(asked: Targets) -> list[float | None]:
    """The targets, signed so that higher is better.

    Raises:
        TypeError: they are not a list of numbers, or the metric cannot be called.
        ValueError: there are none, or they are not in order.
    """
    if not isinstance(asked, Targets):
        raise TypeError(
            f"targets: expected Targets, got {type(asked).__name__}. Pass the metric too: "
            "Targets([20, 24, 28], psnr)."
        )
    if asked.evaluations is not None and asked.evaluations < 1:
        raise ValueError(f"evaluations: expected at least 1, got {asked.evaluations}.")
    check_metric(asked.evaluate)
    targets, sign = asked.targets, asked.sign
    if isinstance(targets, str) or not hasattr(targets, "__len__"):
        raise TypeError(
            "targets: expected a number for each level but the top one, got "
            f"{type(targets).__name__}. Pass a list, such as [20, 24, 28]."
        )
    if not len(targets):
        raise ValueError(
            "targets: expected a number for each level but the top one, got none. Pass at least "
            "one."
        )
    wanted: list[float | None] = []
    for level, target in enumerate(targets):
        if target is None and level == 0 and len(targets) > 1:
            wanted.append(None)
            continue
        if target is None or isinstance(target, str) or not math.isfinite(target):
            raise ValueError(
                f"targets[{level}]: expected a finite number, got {target!r}. Only the first may "
                'be None ("any"), as bad as it gets, and only if another one follows.'
            )
        wanted.append(sign * float(target))
        below = wanted[level - 1] if level else None
        if below is not None and sign * target < below:
            order = "ascending" if sign > 0 else "descending (lower is better)"
            raise ValueError(
                f"targets[{level}]: expected {order} targets, from the worst to the best, got "
                f"{target} after {targets[level - 1]}. Sort them."
            )
    return wanted
