"""The results of an audit, as written to ``audit.json``."""

from dataclasses import dataclass, field
from typing import Any

from ._advantage import Advantage

NARROW = 0.05
"""Share of the way from guessing to the original below which differences are ignored."""


@dataclass(frozen=True)
class Level:
    """The quality that a key gives.

    Attributes:
        level: 0 without a key, up to M.
        share: share of all weights that the level decrypts.
        metric: averaged over keys.
    """

    level: int
    share: float
    metric: float


@dataclass(frozen=True)
class Attempt:
    """One attack with one learning rate, on files under different keys.

    Attributes:
        attack: its name, see `ATTACKS`.
        data: share of the training data that the attacker has; 0 if the attack needs none.
        rate: learning rate; 0 if nothing is trained.
        steps: number of steps → metric, one value per key.
    """

    attack: str
    data: float
    rate: float
    steps: dict[int, list[float]]


@dataclass(frozen=True)
class Best:
    """An attacker's best result within a number of steps, over attacks, rates and stops.

    Attributes:
        data: share of the training data that the attacker has.
        steps: the largest number of steps.
        recovered: metric, one value per key.
        attack: the attack that was best for most keys.
        advantage: advantage over an attacker without the file, see `SubjectReport.baseline`. None
            for the baseline itself, and if the baseline is so close to the original that there is
            hardly anything to steal.
        over_architecture: if there is a base, the advantage over an attacker with the
            architecture alone.
        rate: learning rate of the best result; 0 if nothing was trained.
        same_recipe: the advantage over an attacker without the file who trains at the same rate
            instead of their best one.
    """

    data: float
    steps: int
    recovered: list[float]
    attack: str
    advantage: Advantage | None
    over_architecture: Advantage | None = None
    rate: float = 0.0
    same_recipe: Advantage | None = None


@dataclass(frozen=True)
class Holder:
    """The result of a key holder who attacks the levels above their own.

    Attributes:
        level: the level that the key opens.
        opened: its metric, one value per key.
        best: the best of all attacks, with the most data and steps; the holder may also train
            without the file.
        reference: the metric of an attacker without the file, with the same data and steps,
            averaged over keys.
        above: metric of the next level, averaged over keys.
        gain: the share of the way to the next level that they get, from the better of their own
            level and the reference; None if that is as good as the next level.
    """

    level: int
    opened: list[float]
    best: Best
    reference: float
    above: float
    gain: float | None

    @property
    def is_worthless(self) -> bool:
        """Whether anyone with that data gets as far without the file."""
        return not sum(self.opened) / len(self.opened) > self.reference


@dataclass(frozen=True)
class Protection:
    """One way to protect the network, and the attacks on it.

    Attributes:
        name: name in tables, such as ``"pss 8 %"``.
        strategy: the strategy that selected the weights.
        share: share of all weights that are encrypted.
        shipped: metric without a key, one value per key.
        levels: the quality of each level, level 0 first; empty if not measured.
        attempts: all attacks.
        best: the best result for each share of data and number of steps.
        detection: ``{"auc", "baseline"}``: how well encrypted groups are told from others, and
            how well the same groups are told from others before encryption; empty if not tried.
        holders: results of key holders of levels 1 to M-1; empty if not tried.
    """

    name: str
    strategy: str
    share: float
    shipped: list[float]
    levels: list[Level]
    attempts: list[Attempt]
    best: list[Best]
    detection: dict[str, float] = field(default_factory=dict)
    holders: list[Holder] = field(default_factory=list)


@dataclass(frozen=True)
class Way:
    """A way to publish a network.

    Attributes:
        name: its name.
        holds: whether it holds against the attacks tried; None if they were not tried or are
            inconclusive.
        why: the reason, in words.
    """

    name: str
    holds: bool | None
    why: str


@dataclass(frozen=True)
class SubjectReport:
    """A network and all attacks on it.

    Attributes:
        name: short.
        title: network, data.
        unit: the metric's unit, "dB" or "%".
        clean: metric of the original.
        worthless: metric of guessing.
        weights: number of parameters, including running statistics.
        examples: the number of examples in the training data.
        protections: strategy by strategy, each from the smallest share to the largest.
        baseline: the best result without the file: from fresh weights, or from the base.
        seconds: how long the audit took.
        base: whether the attacker has a base, see `Subject`.
        everything: results for a file in which the rings' cipher encrypts everything; it
            preserves the histogram of each leaf. Empty for a sealed rest.
        ways: the ways to publish it, the most useful first.
        sealed: whether the rest of the file was sealed.
    """

    name: str
    title: str
    unit: str
    clean: float
    worthless: float
    weights: int
    examples: int
    protections: list[Protection]
    baseline: list[Best]
    seconds: float
    base: bool = False
    everything: list[Best] = field(default_factory=list)
    ways: list[Way] = field(default_factory=list)
    sealed: bool = False

    @property
    def alone(self) -> str:
        """What an attacker has without the file."""
        return "architecture or base" if self.base else "architecture"


@dataclass(frozen=True)
class CipherCheck:
    """One property of a cipher, tested on chosen weights.

    Attributes:
        name: the property.
        passed: whether it holds; None if it does not apply.
        found: the measured value.
        expected: what a good cipher gives, in words.
    """

    name: str
    passed: bool | None
    found: float
    expected: str


@dataclass(frozen=True)
class KeySearch:
    """The cost of guessing a key.

    Attributes:
        key: which key, such as ``"random secret"``.
        bits: its entropy.
        guesses_per_second: on one core of this machine, measured.
        years: the time to try half of all keys on one core.
    """

    key: str
    bits: float
    guesses_per_second: float
    years: float


@dataclass(frozen=True)
class AuditReport:
    """The content of ``audit.json``.

    Attributes:
        version: version of the library.
        settings: the configuration.
        subjects: the networks.
        cipher: checks of the cipher.
        keys: cost of guessing keys.
        advice: target, protection and share of the smallest budget that meets the target, if
            requested; see `advise`.
    """

    version: str
    settings: dict[str, Any]
    subjects: list[SubjectReport]
    cipher: list[CipherCheck]
    keys: list[KeySearch]
    advice: list[dict[str, Any]] = field(default_factory=list)
