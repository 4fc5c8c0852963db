"""The runner: protections × keys × data × attacks × rates."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from .._ciphers.dprm import Cipher, encrypt
from .._keys.keys import level_key, ring_keys
from .._tree.names import is_array, named_leaves
from .._tree.rings import mask_counts
from ._attacks import ATTACKS, REFERENCES, Attack, Loot, applies, candidates, needs_data
from ._detection import detect
from ._file import Protected
from ._grid import SCRATCH, Grid
from ._records import CipherCheck
from ._strategies import EVERYTHING, everything, plain_strategy, strategy_masks, strategy_scores
from ._subject import Subject, check_subject, example_batches, place, quality
from ._twofiles import shared_keystream

# Attacks that need positions or plain weights are useless if everything is encrypted or sealed.
_ON_EVERYTHING = (
    "fine-tune all",
    "fine-tune all, batch statistics",
    "average normalisation, fine-tune all",
)


class Plan(NamedTuple):
    """A protection: how weights are selected, and the share of the groups that is encrypted."""

    strategy: str
    share: float

    def __str__(self) -> str:
        """For example ``"pss 8 %"``."""
        plain, plus, rest = self.strategy.partition("+")
        return f"{plain} {100 * self.share:.3g} %" + (f" + {rest}" if plus else "")


ARCHITECTURE = Plan(EVERYTHING, 1.0)


class Work(NamedTuple):
    """One cell: a unit of work whose result is kept.

    Attributes:
        name: name of the cell.
        cost: its duration, in training steps.
        run: computes its result, as JSON.
    """

    name: str
    cost: int
    run: Callable[[], Any]


class Audit:
    """The audit of one network.

    Args:
        name: name of the network.
        subject: the network.
        grid: the protections and attacks to try.
        cipher: `LosslessCipher()` by default.

    Raises:
        ValueError: the network is no better than guessing (attacks on it prove nothing), or none
            of the attacks applies to it.
    """

    def __init__(self, name: str, subject: Subject, grid: Grid, cipher: Cipher | None = None):
        self.name = name
        subject = check_subject(subject, name)
        self.subject = subject._replace(
            params=place(subject.params),
            base=place(subject.base),
            select=grid.select or subject.select,
        )
        self.grid = grid
        self.cipher = cipher
        if not any(applies(ATTACKS[attack], subject) for attack in grid.attacks):
            raise ValueError(
                f"{name}: attacks: expected some that apply to this network, got "
                f"{list(grid.attacks)}. Sign recovery needs the subject's chain, sibling "
                "regression also its siblings, and attacks with a base its base: add these to the "
                "subject, or choose other attacks."
            )
        self.clean = quality(subject, subject.params)
        if not subject.worthless < self.clean < math.inf:
            raise ValueError(
                f"{name}: expected a network that is better than guessing "
                f"({subject.worthless:.4g} {subject.unit}), got {self.clean:.4g}. An audit proves "
                "nothing if there is nothing to steal: train it, or check metric and weights."
            )
        # 0 is the owner's network; attackers train others to learn from. Importance for each.
        self.networks = {0: self.subject}
        self.scores: dict[tuple[int, str], PyTree] = {}

    # --- protections ---

    def masks(self, plan: Plan, network: int = 0) -> Sequence[PyTree]:
        """Nested masks of a strategy; importance is computed once per network."""
        subject = self._network(network)
        if plan == ARCHITECTURE:
            return everything(subject)
        place = network, plain_strategy(plan.strategy)
        if place not in self.scores:
            seed = self.grid.seed + network
            self.scores[place] = strategy_scores(subject, plan.strategy, seed)
        scores, grid = self.scores[place], self.grid
        return strategy_masks(
            subject, plan.strategy, scores, plan.share, grid.levels, grid.scope, grid.small
        )

    def _network(self, number: int) -> Subject:
        """The owner's network (0), or one that an attacker trained."""
        if number not in self.networks:
            key = jax.random.key(number)
            start = self.subject.fresh(key)
            loot = Loot(self.subject, start, False, key)
            reached = self._reached(
                SCRATCH, loot, max(self.grid.data), number, stops=[self.grid.steps[-1]]
            )
            trained = next((params for _, (params, *_) in reached), start)
            self.networks[number] = self.subject._replace(params=trained)
        return self.networks[number]

    def _reached(
        self,
        attack: str,
        loot: Loot,
        data: float,
        number: int,
        *,
        stops: Sequence[int],
        rate: float | None = None,
    ) -> Iterator[tuple[int, list[PyTree]]]:
        """See `candidates`: an attack with the data set of this number."""
        # An attack without data never asks for a batch.
        batch = example_batches(self.subject, data or 1.0, number)[1]
        rate = self.grid.rates[0] if rate is None else rate
        return candidates(ATTACKS[attack], loot, batch, rate=rate, stops=stops)

    def keys(self, number: int, levels: int) -> Any:
        """The audit's own keys, derived from its seed; released files have random keys."""
        text = f"selcrypt/audit/{self.grid.seed}/{number}"
        digest = hashlib.sha256(text.encode()).digest()
        return ring_keys(level_key(digest, digest[:16], levels=levels))

    def protected(self, plan: Plan, number: int) -> Protected:
        """The file under the keys of this number."""
        file = self._encrypted(self.subject.params, self.masks(plan), number)
        return file.sealed() if self.is_sealed(plan) else file

    def is_sealed(self, plan: Plan) -> bool:
        """Whether the rest of the file is sealed."""
        return plan != ARCHITECTURE and self.grid.rest == "sealed"

    def _encrypted(self, params: PyTree, masks: Sequence[PyTree], number: int) -> Protected:
        keys = self.keys(number, len(masks))
        return Protected(encrypt(params, masks, keys, cipher=self.cipher), masks, keys, self.cipher)

    def check(self, plan: Plan) -> None:
        """Refuses an impossible protection, before anything is learned or attacked.

        Raises:
            ValueError: too few weights in a ring, no normalisation to encrypt, no file of scores,
                and the like.
        """
        subject, grid = self.subject, self.grid
        # The number of encrypted groups does not depend on the scores: random ones will do.
        from_file = plain_strategy(plan.strategy).startswith("scores:")
        try:
            scores = strategy_scores(subject, plan.strategy if from_file else "random", grid.seed)
            strategy_masks(
                subject, plan.strategy, scores, plan.share, grid.levels, grid.scope, grid.small
            )
        except ValueError as error:
            raise ValueError(f"{self.name}: {plan}: {error}") from None

    # --- cells ---

    def plans(self) -> list[Plan]:
        """All protections of the grid."""
        return [Plan(name, share) for name in self.grid.importance for share in self.grid.budget]

    def work(self, plans: Iterable[Plan]) -> Iterator[Work]:
        """The cells of protections."""
        keys, steps = self.grid.keys, self.grid.steps[-1]
        for plan in plans:
            at = self.at(plan)
            if plan != ARCHITECTURE:
                yield Work(f"{at}/levels", 1, partial(self._levels, plan))
                if self.grid.detection and not self.is_sealed(plan):
                    yield Work(f"{at}/detection", steps, partial(self._detection, plan))
            for level in (0, *self.holders(plan)):
                for attack, data, rate in self.attempts(plan, level):
                    run = partial(self._attempt, plan, level, attack, data, rate)
                    cost = keys * (steps if data else 1)
                    yield Work(self.attempt_at(plan, level, attack, data, rate), cost, run)

    def at(self, plan: Plan, level: int = 0) -> str:
        """The prefix of the names of cells."""
        at = f"{self.name}/{plan.strategy}/{plan.share:g}"
        return f"{at}/holder of {level}" if level else at

    def attempt_at(self, plan: Plan, level: int, attack: str, data: float, rate: float) -> str:
        """The name of the cell for an attack by the holder of a level."""
        return f"{self.at(plan, level)}/{attack}/{data:g}/{rate:g}"

    def holders(self, plan: Plan) -> range:
        """Levels whose holders attack the levels above them."""
        return range(1, self.grid.levels if self.grid.climbing and plan != ARCHITECTURE else 1)

    def attempts(self, plan: Plan, level: int = 0) -> list[tuple[str, float, float]]:
        """Attack, share of data and rate of everything that the holder of a level tries."""
        names, shares = self.grid.attacks, self.grid.data
        if plan == ARCHITECTURE:
            names = REFERENCES if self.grid.rest == "sealed" else (*_ON_EVERYTHING, *REFERENCES)
        elif level:  # only kernels are closed to key holders, who get the largest share of data
            shares = (max(shares),)
            names = [n for n in names if not (ATTACKS[n].chain or "normalisation" in n)]
        elif self.is_sealed(plan):
            names = [n for n in names if n in _ON_EVERYTHING or ATTACKS[n].base]
        return [
            (name, data, rate)
            for name in names
            if applies(ATTACKS[name], self.subject)
            for data in (shares if needs_data(ATTACKS[name]) else (0.0,))
            for rate in self._rates(ATTACKS[name])
        ]

    def _rates(self, attack: Attack) -> tuple[float, ...]:
        if attack.trains == "nothing":
            return (0.0,)
        # The search for an order has no rate.
        return self.grid.rates[:1] if attack.trains == "order" else self.grid.rates

    def _levels(self, plan: Plan) -> list[list[float]]:
        """Rows of the share of all weights and the metric for each key; level 0 first."""
        masks = self.masks(plan)
        counts = [mask_counts(self.subject.params, mask).values() for mask in masks]
        total = sum(count.total for count in counts[-1])
        shares = [sum(count.weights for count in each) / total for each in counts]
        if self.is_sealed(plan):  # level 1 opens all but the rings above it
            shares = [1 - (shares[-1] - share) for share in shares]
        rows = [[0.0], *([share] for share in shares)]
        for number in range(self.grid.keys):
            file = self.protected(plan, number)
            for level, row in enumerate(rows):
                row.append(quality(self.subject, file.opened(level)))
        return rows

    def _attempt(
        self, plan: Plan, level: int, attack: str, data: float, rate: float
    ) -> dict[str, list[float]]:
        """Number of steps → metric for each key, by the holder of a level; NaN if it diverged."""
        stops = list(self.grid.steps) if needs_data(ATTACKS[attack]) else [0]
        found: dict[str, list[float]] = {str(step): [] for step in stops}
        for number in range(self.grid.keys):
            file = self.protected(plan, number)
            key = jax.random.key(number)
            loot = Loot(self.subject, file.opened(level), file.closed(level), key, self.cipher)
            steps = self._reached(attack, loot, data, number, stops=stops, rate=rate)
            reached = {
                step: float(np.fmax.reduce([quality(self.subject, each) for each in tried]))
                for step, tried in steps
            }
            for step in stops:
                found[str(step)].append(reached.get(step, math.nan))
        return found

    def _detection(self, plan: Plan) -> dict[str, float]:
        """An attacker protects networks of their own, and learns to detect encrypted groups."""
        original = self.subject.params

        def only(tree: PyTree) -> dict[str, Any]:
            # Only leaves with several groups: those with one axis are encrypted whole, or not.
            shapes = {n: np.shape(leaf) for n, leaf in named_leaves(original).leaves.items()}
            leaves = named_leaves(tree).leaves
            return {name: leaves[name] for name, shape in shapes.items() if len(shape) > 1}

        def seen(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
            params, masks = self._network(number).params, self.masks(plan, number)
            return only(self._encrypted(params, masks, -number).params), only(masks[-1])

        file, mask = seen(0)
        chosen = [np.ravel(m) for m in mask.values() if is_array(m)]
        if not chosen or len(np.unique(np.concatenate(chosen))) < 2:
            return {}  # all are encrypted whole, or none is
        own = [seen(1), seen(2)]
        result = detect(file, mask, own, seed=self.grid.seed, original=only(original))
        return {"auc": result.auc, "baseline": float(result.baseline or math.nan)}

    def two_files(self, plan: Plan) -> list[CipherCheck]:
        """Whether keystreams repeat between two files of this network, or of it and a successor."""
        masks, params = self.masks(plan), self.subject.params
        loot = Loot(self.subject, params, False, jax.random.key(0))
        reached = self._reached("fine-tune all", loot, 1.0, 0, stops=[1])
        successor = next((trained for _, (trained, *_) in reached), params)
        first, *others = (
            self._encrypted(each, masks, number).params
            for number, each in enumerate([params, params, successor])
        )
        names = ("two files of one network", "a network and its fine-tuned successor")
        return [
            replace(
                shared_keystream(first, other, masks[-1], cipher=self.cipher),
                name=f"{self.name}: {name} share no keystream",
            )
            for other, name in zip(others, names, strict=True)
        ]
