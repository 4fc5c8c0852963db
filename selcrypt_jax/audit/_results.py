"""An audit's results from its cells: the best attacks, and their advantage."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .._tree.rings import mask_counts
from ._advantage import Advantage, advantage
from ._attacks import ATTACKS, REFERENCES
from ._records import NARROW, Attempt, Best, Holder, Level, Protection, SubjectReport
from ._run import ARCHITECTURE, Audit, Plan


class Results:
    """The results of an audit.

    Args:
        audit: the audit.
        cells: name → result of each finished cell; read at each call.
    """

    def __init__(self, audit: Audit, cells: Mapping[str, Any]):
        self.audit = audit
        self.cells = cells

    def attempts(self, plan: Plan, level: int = 0) -> list[Attempt]:
        """The attacks on a protection by the holder of a level, from their cells."""
        found = []
        for attack, data, rate in self.audit.attempts(plan, level):
            cell = self.cells[self.audit.attempt_at(plan, level, attack, data, rate)]
            steps = {int(step): values for step, values in cell.items()}
            found.append(Attempt(attack, data, rate, steps))
        return found

    def best(
        self,
        attempts: Sequence[Attempt],
        shipped: Sequence[float] = (),
        baseline: Sequence[Best] = (),
        architecture: Sequence[Best] = (),
        references: Sequence[Attempt] = (),
    ) -> list[Best]:
        """The best result for each share of data and number of steps.

        An attacker may also do nothing. Zero steps: attacks that train nothing.

        Args:
            attempts: attacks on the file.
            shipped: the metric of the file as it is, one value per key; empty without a file.
            baseline: the results without the file, but with the base if there is one.
            architecture: the results with neither.
            references: the attempts of the baseline: an attacker may also ignore the file.
        """
        grid, clean = self.audit.grid, self.audit.clean
        nothing = np.full(grid.keys, float(self.audit.subject.worthless))

        def gain(best: Best, floor: np.ndarray) -> Advantage | None:
            # A floor close to the original leaves the result to chance, and one that is not
            # finite (the rate failed) says nothing.
            if not np.isfinite(floor).all() or not clean - np.mean(floor) > NARROW * (
                clean - self.audit.subject.worthless
            ):
                return None
            # Paired: the key's number also selects the attacker's data, with the file or without.
            return advantage(best.recovered, floor.tolist(), clean, seed=grid.seed, paired=True)

        def over(best: Best, floors: Sequence[Best]) -> Advantage | None:
            for floor in floors:
                if (floor.data, floor.steps) == (best.data, best.steps):
                    return gain(best, np.asarray(floor.recovered))
            return None

        listed = []
        for data in grid.data:
            for most in (0, *grid.steps):
                found = {}
                if len(shipped):
                    opened = np.asarray(shipped, float)
                    found["as shipped", 0.0] = np.where(np.isnan(opened), -math.inf, opened)
                # Guessing is always possible, even if everything else gives NaN.
                found["guessing", 0.0] = nothing
                for attempt in (*attempts, *references):
                    _add(found, attempt, data, most)
                names, values = list(found), np.stack(list(found.values()))
                (winner, rate) = Counter(names[i] for i in values.argmax(0)).most_common(1)[0][0]
                best = Best(data, most, values.max(0).tolist(), winner, None, None, rate)
                same: dict[tuple[str, float], np.ndarray] = {}
                for attempt in references:
                    if attempt.rate == rate > 0 and ATTACKS[winner].trains != "order":
                        _add(same, attempt, data, most)
                listed.append(
                    replace(
                        best,
                        advantage=over(best, baseline),
                        over_architecture=over(best, architecture),
                        same_recipe=gain(best, np.max(list(same.values()), 0)) if same else None,
                    )
                )
        return listed

    def report(self, plans: Iterable[Plan], seconds: float) -> SubjectReport:
        """All results for these protections."""
        baseline, audit, subject = self.baseline(), self.audit, self.audit.subject
        return SubjectReport(
            name=audit.name,
            title=subject.title,
            unit=subject.unit,
            clean=audit.clean,
            worthless=subject.worthless,
            weights=sum(count.total for count in mask_counts(subject.params, False).values()),
            examples=subject.examples,
            protections=[self.protection(plan, baseline) for plan in plans],
            baseline=baseline,
            seconds=round(seconds, 1),
            base=subject.base is not None,
            sealed=audit.grid.rest == "sealed",
            everything=self._everything(baseline),
        )

    def baseline(self, *, base: bool = True) -> list[Best]:
        """What an attacker reaches without the file, but with the base if there is one."""
        tried = self._references()
        return self.best([a for a in tried if base or not ATTACKS[a.attack].base])

    def _references(self) -> list[Attempt]:
        return [a for a in self.attempts(ARCHITECTURE) if a.attack in REFERENCES]

    def _everything(self, baseline: Sequence[Best]) -> list[Best]:
        """Results for a file in which everything is encrypted and leaves keep their histograms."""
        if self.audit.grid.rest == "sealed":
            return []
        return self.best(self.attempts(ARCHITECTURE), baseline=baseline)

    def protection(self, plan: Plan, baseline: Sequence[Best]) -> Protection:
        """The results for one protection, from its cells."""
        at = self.audit.at(plan)
        rows = self.cells[f"{at}/levels"]
        attempts, shipped = self.attempts(plan), rows[0][1:]
        has_base = self.audit.subject.base is not None
        architecture = self.baseline(base=False) if has_base else ()
        references = self._references()

        def best(attempts: Sequence[Attempt], opened: Sequence[float]) -> list[Best]:
            return self.best(attempts, opened, baseline, architecture, references)

        def holder(level: int) -> Holder:
            strongest = best(self.attempts(plan, level), rows[level][1:])[-1]
            reference, above = np.mean(baseline[-1].recovered), np.mean(rows[level + 1][1:])
            floor = np.fmax(np.mean(rows[level][1:]), reference)
            gain = (
                (np.mean(strongest.recovered) - floor) / (above - floor) if above > floor else None
            )
            return Holder(
                level, rows[level][1:], strongest, float(reference), float(above),
                None if gain is None else float(gain),
            )  # fmt: skip

        return Protection(
            name=str(plan) + (", sealed" if self.audit.is_sealed(plan) else ""),
            strategy=plan.strategy,
            share=rows[-1][0],
            shipped=shipped,
            levels=[Level(i, row[0], float(np.mean(row[1:]))) for i, row in enumerate(rows)],
            attempts=attempts,
            best=best(attempts, shipped),
            detection=self.cells.get(f"{at}/detection", {}),
            holders=[holder(level) for level in self.audit.holders(plan) if level + 1 < len(rows)],
        )


def _add(
    found: dict[tuple[str, float], np.ndarray], attempt: Attempt, data: float, most: int
) -> None:
    """Adds the best result of an attempt within a number of steps, by its name and rate."""
    for step, values in attempt.steps.items():
        if attempt.data in (0, data) and (step <= most or not attempt.rate):
            name = attempt.attack, attempt.rate
            found[name] = np.fmax(found.get(name, -math.inf), values)
