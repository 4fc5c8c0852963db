"""Tiers by target: a release whose levels give what was promised, measured on held-out data."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from .. import Secret, Select, Targets, level_key, protect, unlock
from ._paper import same_bits, selected
from ._train import Subject

NAMES = ("public", "free", "basic", "pro", "full")  # of levels 0 to 4
DATA = 0.05  # share of the training data used for training without the file


class Goal(NamedTuple):
    """The targets of a release's levels.

    Attributes:
        targets: the quality of levels 0 to 3; level 4 gives the original.
        tolerance: how far a level may be from its target on the calibration data.
        select: pattern of the names of the kernels to encrypt weights in.
        steps: the number of steps of training without the file.
    """

    targets: tuple[float, ...]
    tolerance: float
    select: str
    steps: int


class Measured(NamedTuple):
    """A mean over examples, and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, scores: np.ndarray) -> "Measured":
        """Computes both from the examples' scores."""
        return cls(float(scores.mean()), float(scores.std(ddof=1) / math.sqrt(len(scores))))


class Tier(NamedTuple):
    """The measured quality of one level of the release.

    Attributes:
        name: one of `NAMES`.
        target: its target; None for the top level.
        calibration: its quality on the data used by the search.
        held_out: its quality on data that the search did not see.
        difference_error: standard error of the difference between these two means. The target is
            met on one sample and judged on the other, so the spread over both counts.
    """

    name: str
    target: float | None
    calibration: Measured
    held_out: Measured
    difference_error: float


class Tiers(NamedTuple):
    """A release and the measured quality of its levels.

    Attributes:
        unit: the unit of the metrics.
        worthless: the metric of chance, or of the noisy image, on the held-out data.
        tiers: levels 0 to 4. Level 0 needs no key: the rest of the file is plain.
        sealed: the quality of level 0 on the held-out data if the rest of the file is sealed.
        without_file: the quality that training from fresh weights reaches there.
        steps: the number of steps of that training.
        examples: the number of its training examples.
        calibrated_on: the number of examples in the calibration data.
        held_out: the number of examples in the held-out data.
        tolerance: the tolerance of the search.
        evaluations: the number of evaluations that the search took.
        fraction: share of the convolution weights that is encrypted.
        top_bit_exact: whether the top level restores every bit of the original.
    """

    unit: str
    worthless: float
    tiers: tuple[Tier, ...]
    sealed: Measured
    without_file: Measured
    steps: int
    examples: int
    calibrated_on: int
    held_out: int
    tolerance: float
    evaluations: int
    fraction: float
    top_bit_exact: bool

    @property
    def pointless(self) -> list[str]:
        """Tiers that are no better than training without the file."""
        return [t.name for t in self.tiers if t.held_out.mean <= self.without_file.mean]


def train_without_file(subject: Subject, goal: Goal, advance: Callable[[], None]) -> PyTree:
    """Parameters from the network's own recipe, from fresh weights, few steps and little data."""
    return subject.without_file(DATA, goal.steps, advance)


def tiers_by_target(
    subject: Subject, goal: Goal, without_file: PyTree, *, advance: Callable[[], Any]
) -> tuple[Tiers, list[PyTree]]:
    """Protects a network so that its levels meet their targets, and opens every level.

    Args:
        subject: the trained network.
        goal: the targets of its levels.
        without_file: the parameters from `train_without_file`.
        advance: called after each evaluation of the search.

    Returns:
        The measurements; and the parameters at level 0 with a sealed rest, and at levels 0 to 4.

    Raises:
        ValueError: no release met the targets.
    """
    secret = Secret.generate()
    released = protect(
        subject.params,
        secret=secret,
        rest="plain",
        levels=Targets(
            goal.targets,
            lambda params: subject.calibration(params).mean(),
            tolerance=goal.tolerance,
            evaluations=400,  # it took 20 to 85; the next network may take more
            progress=lambda _: advance(),
        ),
        # Single weights: with kernels, keys differ by many times this tolerance.
        selection=Select("random", select=goal.select, granularity="weight"),
    )
    found, top = released.calibration, len(goal.targets)
    assert found is not None
    keys = [level_key(secret, released.model_id, level=m, levels=top) for m in range(1, top + 1)]
    opened = [released.params, *(unlock(released, key) for key in keys)]
    # For comparison only: publishing the same weights in two forms would give them away.
    sealed = protect(subject.params, found.masks, secret=secret, rest="sealed").params
    scores = [(subject.calibration(params), subject.held_out(params)) for params in opened]
    rows = []
    for name, target, both in zip(NAMES, [*goal.targets, None], scores, strict=True):
        seen, held_out = map(Measured.of, both)
        rows.append(Tier(name, target, seen, held_out, math.hypot(seen.error, held_out.error)))
    return Tiers(
        unit=subject.unit,
        worthless=subject.worthless,
        tiers=tuple(rows),
        sealed=Measured.of(subject.held_out(sealed)),
        without_file=Measured.of(subject.held_out(without_file)),
        steps=goal.steps,
        examples=round(DATA * len(jax.tree.leaves(subject.examples)[0])),
        calibrated_on=len(scores[0][0]),
        held_out=len(scores[0][1]),
        tolerance=goal.tolerance,
        evaluations=found.evaluations,
        fraction=selected(subject.params, found.masks[-1])[1],
        top_bit_exact=same_bits(subject.params, opened[-1]),
    ), [sealed, *opened]
