"""Options of the commands that select weights: the fields of `Select` and `Targets`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Suppress

from .._calibrate.targets import Evaluation, Targets
from .._io.imported import imported
from .._io.progress import Pace
from .._masks.options import Select
from ._options import Switch
from ._text import note

Unit = Literal["weight", "group"]
Levels = int | tuple[float, ...] | None


@dataclass(frozen=True)
class Selection(Select):
    """What is encrypted."""

    importance: str = "l2"
    select: str | None = None
    base: Path | None = None

    def flags(self) -> list[str]:
        """The options that differ from their defaults, as they are written on a command line."""
        words = []
        for option in fields(Select):
            value = getattr(self, option.name)
            if value != option.default:
                words += [f"--{option.name}", str(value)]
        return words


@dataclass(frozen=True)
class Goal(Targets):
    """The quality of the levels.

    Attributes:
        targets: The quality of levels 1, 2, ... (with --rest plain: 0, 1, ...), from the worst to
            the best; one more level gives the original. The first may be "any": as bad as the
            budget makes it. The checkpoint has to fit into memory.
        evaluate: With targets: import path module:function of your metric, a function of a dict
            from the names of the tensors to arrays; the working folder is searched. Let it measure
            on data that the network was not trained on.
        tolerance: With targets: how far a level may be from its target. By default 2 % of the way
            from the first target to the original.
        evaluations: With targets: how often the metric may be called; 8 times a target and 8 more
            by default, and up to four times as often while values lie on both sides of a target.
        lower_is_better: With targets: the metric is a loss; targets then descend.
    """

    # As they are typed.
    targets: tuple[str, ...] = ()  # pyright: ignore
    evaluate: str | None = None  # pyright: ignore
    lower_is_better: Switch = False
    progress: Suppress[Callable[[Evaluation], None] | None] = None

    def read(self) -> Targets:
        """The targets as numbers, and the metric imported."""
        if self.evaluate is None:
            raise ValueError(
                "targets: expected a metric to measure them by, got none. Add --evaluate "
                "module:function."
            )
        numbers = [_number(text) for text in self.targets]
        return Targets(
            numbers,
            imported("evaluate", self.evaluate),
            self.tolerance,
            self.evaluations,
            self.lower_is_better,
            said(
                lambda e: f"{e.number}: level {e.level}, {e.share:.4%} of the groups: {e.value:.6g}"
            ),
        )


def said(text: Callable[[Any], str]) -> Callable[[Any], None]:
    """Reports steps of long work on stderr: every step on a terminal, one now and then in a log.

    Args:
        text: of a step.
    """
    due = Pace()

    def say(step: Any) -> None:
        if sys.stderr is not None and (sys.stderr.isatty() or due()):
            note(text(step))

    return say


@contextmanager
def naming(metric: str | None) -> Iterator[None]:
    """Errors of the metric's results name the metric.

    Args:
        metric: its import path.
    """
    try:
        yield
    except TypeError as error:
        if not str(error).startswith("evaluate"):
            raise
        raise ValueError(f"{metric}: {error}") from None


def check_like_alone(levels: Levels, goal: Goal, selection: Selection) -> None:
    """Refuses options beside --like, by the names under which they were typed.

    Raises:
        ValueError: of some.
    """
    given = ["levels"] if levels is not None else []
    for chosen in (goal, selection):
        default = type(chosen)()
        given += [
            o.name for o in fields(chosen) if getattr(chosen, o.name) != getattr(default, o.name)
        ]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(
            f"like: expected no {names} beside it, since the earlier release decides what is "
            "encrypted and which level opens it. Leave that out, or --like."
        )


def levels_of(levels: Levels, goal: Goal) -> Any:
    """What `protect_file` takes as its levels."""
    if goal.targets:
        if levels is not None:
            raise ValueError(
                "targets: expected no levels beside them, since they decide those, got some. Leave "
                "one of the two out."
            )
        return goal.read()
    alone = [o.name for o in fields(Goal) if getattr(goal, o.name) != o.default]
    if alone:
        names = ", ".join(name.replace("_", "-") for name in alone)
        raise ValueError(f"{names}: is of use with targets only, got none. Add --targets.")
    return 5 if levels is None else levels


def _number(text: str) -> float | None:
    if text == "any":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f'targets: expected numbers, of which the first may be "any", got {text!r}. Give one '
            "for each level but the top one."
        ) from None
