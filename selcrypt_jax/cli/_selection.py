"""Options of the commands that select weights: the fields of `Select` and `Targets`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Suppress, arg

from .._calibrate.targets import Evaluation, Targets
from .._io.imported import imported
from .._io.progress import Pace
from .._masks.options import Select
from .._tree.groups import Granularity, Layout
from ._help import one_line_each
from ._options import Maybe, Switch
from ._text import note

Unit = Literal["weight", "group"]
Levels = int | tuple[float, ...] | None


@one_line_each
@dataclass(frozen=True)
class Selection(Select):
    __doc__ = Select.__doc__

    importance: str = "l2"
    budget: Maybe[float] = None
    granularity: Maybe[Granularity] = None
    layout: Maybe[Layout] = None
    select: Maybe[str] = None
    small: Maybe[float] = None
    base: Maybe[Path] = None

    def flags(self) -> list[str]:
        """The options that differ from their defaults, as they are written on a command line."""
        words = []
        for option in fields(Select):
            value = getattr(self, option.name)
            if value != option.default:
                words += [f"--{option.name}", str(value)]
        return words


@one_line_each
@dataclass(frozen=True)
class Goal(Targets):
    """The quality of the levels.

    Attributes:
        targets: The quality of levels 1, 2, ... (with --rest plain: 0, 1, ...), from worst to
            best; one more level gives the original. The first may be "any": as bad as the
            budget makes it. The checkpoint has to fit into memory.
        evaluate: With targets: import path module:function of your metric, which takes a dict from
            tensor names to arrays; the working folder is searched too. Use data that the network
            was not trained on.
        tolerance: With targets: how far a level may be from its target. By default 2 % of the way
            from the first target to the original.
        evaluations: With targets: how often the metric may be called. By default 8 times per target
            plus 8, and up to four times as often while a level has values on both sides of its
            target.
        lower_is_better: With targets: the metric is a loss; targets then descend.
    """

    # As typed on the command line.
    targets: Annotated[tuple[str, ...], arg(help_behavior_hint="")] = ()  # pyright: ignore
    evaluate: Maybe[str] = None  # pyright: ignore
    tolerance: Maybe[float] = None
    evaluations: Maybe[int] = None
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
    """Reports progress on stderr: every step on a terminal, one now and then in a log.

    Args:
        text: step → its text.
    """
    due = Pace()

    def say(step: Any) -> None:
        if sys.stderr is not None and (sys.stderr.isatty() or due()):
            note(text(step))

    return say


@contextmanager
def naming(metric: str | None) -> Iterator[None]:
    """Makes errors about the metric's results name the metric.

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
    """Refuses options that conflict with --like, by their names on the command line.

    Raises:
        ValueError: there are some.
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
            f"like: expected no {names} with it, since the earlier release decides what is "
            "encrypted and which level opens it. Leave out one or the other."
        )


def levels_of(levels: Levels, goal: Goal) -> Any:
    """The levels argument of `protect_file`."""
    if goal.targets:
        if levels is not None:
            raise ValueError(
                "targets: expected no levels with them, since targets determine the levels, got "
                "both. Leave out one or the other."
            )
        return goal.read()
    alone = [o.name for o in fields(Goal) if getattr(goal, o.name) != o.default]
    if alone:
        names = ", ".join("--" + name.replace("_", "-") for name in alone)
        raise ValueError(f"{names}: expected targets too, got none. Add --targets.")
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
