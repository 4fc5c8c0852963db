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
from ._attacks import ATTACKS, REFERENCES, Attack, Loot, applies, needs_data, run_attack
from ._detection import detect
from ._file import Protected
from ._grid import SCRATCH, Grid
from ._records import CipherCheck
from ._strategies import EVERYTHING, everything, plain_strategy, strategy_masks, strategy_scores
from ._subject import Subject, check_subject, example_batches, place, quality
from ._twofiles import shared_keystream

# Attacks that need places or plain weights are of no use where everything is encrypted or sealed.
_ON_EVERYTHING = (
    "train all",
    "train all, batch statistics",
    "average the normalisation, train all",
)


class Plan(NamedTuple):
    """A protection: how weights are selected, and the share of the groups that is encrypted."""

    strategy: str
    share: float

    def __str__(self) -> str:
        """As ``"pss 8 %"``."""
        plain, plus, rest = self.strategy.partition("+")
        return f"{plain} {100 * self.share:.3g} %" + (f" + {rest}" if plus else "")


ARCHITECTURE = Plan(EVERYTHING, 1.0)


class Work(NamedTuple):
    """One cell: what is done, and how long it takes in steps of training.

    Attributes:
        name: of the cell.
        cost: steps.
        run: gives its result, as JSON.
    """

    name: str
    cost: int
    run: Callable[[], Any]


class Audit:
    """Everything that is tried on one network.

    Args:
        name: of the network.
        subject: the network.
        grid: what is tried.
        cipher: `LosslessCipher()` unless given.

    Raises:
        ValueError: a network that is no better than knowing nothing: an attack on it proves
            nothing.
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
                f"{name}: attacks: expected some that this network gives cause to, got "
                f"{list(grid.attacks)}. Those with structure need a chain, those of siblings and "
                "of a base need them too: take others, or give the subject what they need."
            )
        self.clean = quality(subject, subject.params)
        if not subject.worthless < self.clean < math.inf:
            raise ValueError(
                f"{name}: expected a network that is better than knowing nothing "
                f"({subject.worthless:.4g} {subject.unit}), got {self.clean:.4g}. Without "
                "anything to steal an audit proves nothing: train it, or check metric and weights."
            )
        # The owner's, 0, and those that an attacker trains to learn from; importance in each.
        self.networks = {0: self.subject}
        self.scores: dict[tuple[int, str], PyTree] = {}

    # --- protections ---

    def masks(self, plan: Plan, network: int = 0) -> Sequence[PyTree]:
        """Nested masks of a strategy; learned importance is learned once a network."""
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
        """The owner's, or one that an attacker trained."""
        if number not in self.networks:
            key = jax.random.key(number)
            start = self.subject.fresh(key)
            loot = Loot(self.subject, start, False, key)
            reached = self._reached(
                SCRATCH, loot, max(self.grid.data), number, stops=[self.grid.steps[-1]]
            )
            trained = next((params for _, params in reached), start)
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
    ) -> Iterator[tuple[int, PyTree]]:
        """Steps and parameters of an attack with the data of this number."""
        # An attack without data looks at no batch.
        batch = example_batches(self.subject, data or 1.0, number)[1]
        rate = self.grid.rates[0] if rate is None else rate
        return run_attack(ATTACKS[attack], loot, batch, rate=rate, stops=stops)

    def keys(self, number: int, levels: int) -> Any:
        """Keys of the audit's own, from its seed; what is shipped has random ones."""
        text = f"selcrypt/audit/{self.grid.seed}/{number}"
        digest = hashlib.sha256(text.encode()).digest()
        return ring_keys(level_key(digest, digest[:16], levels=levels))

    def protected(self, plan: Plan, number: int) -> Protected:
        """The file under the keys of this number."""
        file = self._encrypted(self.subject.params, self.masks(plan), number)
        return file.sealed() if self.is_sealed(plan) else file

    def is_sealed(self, plan: Plan) -> bool:
        """Whether a seal lies over the rest of the file."""
        return plan != ARCHITECTURE and self.grid.rest == "sealed"

    def _encrypted(self, params: PyTree, masks: Sequence[PyTree], number: int) -> Protected:
        keys = self.keys(number, len(masks))
        return Protected(encrypt(params, masks, keys, cipher=self.cipher), masks, keys, self.cipher)

    def check(self, plan: Plan) -> None:
        """Refuses a protection that cannot be, before anything is learned or attacked.

        Raises:
            ValueError: too few weights to hide among each other, no normalisation to encrypt, no
                file of scores, and the like.
        """
        subject, grid = self.subject, self.grid
        # How many groups are encrypted is the same whatever they are worth.
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
        """How the names of cells begin."""
        at = f"{self.name}/{plan.strategy}/{plan.share:g}"
        return f"{at}/holder of {level}" if level else at

    def attempt_at(self, plan: Plan, level: int, attack: str, data: float, rate: float) -> str:
        """The name of the cell of an attack by the holder of a level."""
        return f"{self.at(plan, level)}/{attack}/{data:g}/{rate:g}"

    def holders(self, plan: Plan) -> range:
        """Levels whose holders attack the levels above."""
        return range(1, self.grid.levels if self.grid.climbing and plan != ARCHITECTURE else 1)

    def attempts(self, plan: Plan, level: int = 0) -> list[tuple[str, float, float]]:
        """Attack, share of data and rate, of all that the holder of a level tries."""
        names, shares = self.grid.attacks, self.grid.data
        if plan == ARCHITECTURE:
            names = REFERENCES if self.grid.rest == "sealed" else (*_ON_EVERYTHING, *REFERENCES)
        elif level:  # kernels alone are closed to them; in earnest, with all data
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
        # An order is looked for without a rate.
        return self.grid.rates[:1] if attack.trains == "order" else self.grid.rates

    def _levels(self, plan: Plan) -> list[list[float]]:
        """Rows of share of all weights, and metric by key; level 0 first."""
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
        """Of the holder of a level: number of steps → metric by key; NaN where training blew up."""
        stops = list(self.grid.steps) if needs_data(ATTACKS[attack]) else [0]
        found: dict[str, list[float]] = {str(step): [] for step in stops}
        for number in range(self.grid.keys):
            file = self.protected(plan, number)
            key = jax.random.key(number)
            loot = Loot(self.subject, file.opened(level), file.closed(level), key, self.cipher)
            steps = self._reached(attack, loot, data, number, stops=stops, rate=rate)
            reached = {step: quality(self.subject, params) for step, params in steps}
            for step in stops:
                found[str(step)].append(reached.get(step, math.nan))
        return found

    def _detection(self, plan: Plan) -> dict[str, float]:
        """An attacker protects other networks, and learns to tell what is encrypted."""
        original = self.subject.params

        def only(tree: PyTree) -> dict[str, Any]:
            # Leaves with groups to tell apart: of those with one axis all or nothing is encrypted.
            shapes = {n: np.shape(leaf) for n, leaf in named_leaves(original).leaves.items()}
            leaves = named_leaves(tree).leaves
            return {name: leaves[name] for name, shape in shapes.items() if len(shape) > 1}

        def seen(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
            params, masks = self._network(number).params, self.masks(plan, number)
            return only(self._encrypted(params, masks, -number).params), only(masks[-1])

        file, mask = seen(0)
        chosen = [np.ravel(m) for m in mask.values() if is_array(m)]
        if not chosen or len(np.unique(np.concatenate(chosen))) < 2:
            return {}  # all of them are encrypted as a whole, or none
        own = [seen(1), seen(2)]
        result = detect(file, mask, own, seed=self.grid.seed, original=only(original))
        return {"auc": result.auc, "baseline": float(result.baseline or math.nan)}

    def two_files(self, plan: Plan) -> list[CipherCheck]:
        """Whether keystreams repeat between files of this network, or of its successor."""
        masks, params = self.masks(plan), self.subject.params
        loot = Loot(self.subject, params, False, jax.random.key(0))
        reached = self._reached("train all", loot, 1.0, 0, stops=[1])
        successor = next((trained for _, trained in reached), params)
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
