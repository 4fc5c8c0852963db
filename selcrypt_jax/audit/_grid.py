"""The grid of an audit: the protections and attacks that it tries."""

import math
from dataclasses import dataclass, replace
from typing import get_args

from .._format.manifest import Rest
from .._masks.ranks import Scope
from ._attacks import ATTACKS, REFERENCES
from ._strategies import check_strategy

SCRATCH = "from scratch"


@dataclass(frozen=True)
class Grid:
    """The protections and attacks that an audit tries.

    Attributes:
        importance: selection strategies, see `check_strategy`.
        budget: shares of the selected leaves' groups to encrypt.
        data: shares of the training data that the attacker has.
        steps: numbers of training steps after which the attacker evaluates the metric.
        rates: learning rates of Adam.
        attacks: names from `ATTACKS`; by default all.
        keys: number of keys to average over; with each, the attacker has different data.
        levels: number of permission levels.
        scope: whether the budget holds in every leaf ("leaf") or over the whole model ("model").
        rest: what happens to the other weights, "plain" or "sealed", see `protect_file`.
        select: a regular expression for the leaves whose groups are selected; empty: the
            subject's own.
        small: share of all weights that "+small" encrypts whole, see `Select`.
        detection: whether to try to detect which groups are encrypted.
        climbing: whether key holders attack the levels above their own.
        seed: the seed of everything, including the audit's own keys.
    """

    importance: tuple[str, ...] = ("l2", "pss", "l2+small")
    budget: tuple[float, ...] = (0.02, 0.08, 0.3)
    data: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2)
    steps: tuple[int, ...] = (50, 200, 1000)
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 6e-3, 1.2e-2)
    attacks: tuple[str, ...] = tuple(name for name in ATTACKS if name not in REFERENCES)
    keys: int = 3
    levels: int = 5
    scope: Scope = "leaf"
    rest: Rest = "plain"
    select: str = ""
    small: float = 0.02
    detection: bool = True
    climbing: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.importance:
            check_strategy(name)
        for name in self.attacks:
            if name not in ATTACKS:
                raise ValueError(f"attacks: expected some of {list(ATTACKS)}, got {name!r}.")
        for name in ("importance", "budget", "data", "steps", "rates", "attacks"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name}: expected at least one, got none.")
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: expected no duplicates, got {list(values)}.")
        # Ascending, so that the last ones are the largest share and the strongest attacker.
        for name in ("budget", "data"):
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))
        if not 0 < self.small < 1:
            raise ValueError(f"small: expected a share in (0, 1), got {self.small}.")
        for name in ("budget", "data"):
            for value in getattr(self, name):
                if not 0 < value <= 1:
                    raise ValueError(f"{name}: expected shares in (0, 1], got {value}.")
        steps = list(self.steps)
        if steps != sorted(set(steps)) or steps[0] < 1:
            raise ValueError(f"steps: expected ascending numbers from 1, got {steps}.")
        if not all(rate > 0 and math.isfinite(rate) for rate in self.rates):
            raise ValueError(f"rates: expected positive numbers, got {list(self.rates)}.")
        if self.rest not in get_args(Rest):
            raise ValueError(f"rest: expected one of {get_args(Rest)}, got {self.rest!r}.")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope: expected one of {get_args(Scope)}, got {self.scope!r}.")
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}.")
        for name in ("keys", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}.")

    def quick(self) -> "Grid":
        """A reduced grid: the strongest attacks, one key, few steps."""
        return replace(
            self,
            budget=tuple(share for share in self.budget if share <= 0.1)[-1:] or self.budget[:1],
            data=self.data[:1],
            steps=tuple(step for step in self.steps if step <= 200) or self.steps[:1],
            rates=(1e-3,) if 1e-3 in self.rates else self.rates[:1],
            attacks=tuple(name for name in self.attacks if name in _QUICK) or self.attacks,
            keys=1,
        )


_QUICK = (
    "zero-fill",
    "resample",
    "prune largest",
    "re-estimate statistics",
    "fine-tune all, batch statistics",
    "average and zero-fill",
    "average and zero-fill, fine-tune all",
    "fine-tune normalisation",
    "sign recovery, fine-tune all",
    "rank matching, re-estimate statistics",
    "rank matching, fine-tune all",
)
