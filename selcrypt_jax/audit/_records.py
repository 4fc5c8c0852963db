"""What an audit found out, as it is written to ``audit.json``."""

from dataclasses import dataclass, field
from typing import Any

from ._advantage import Advantage

NARROW = 0.05
"""Share of the way from knowing nothing to the original within which nothing is told apart."""


@dataclass(frozen=True)
class Level:
    """What a key holder gets.

    Attributes:
        level: 0 without a key, up to M.
        share: of all weights that the level decrypts.
        metric: mean over keys.
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
        steps: number of steps → metric, one value a key.
    """

    attack: str
    data: float
    rate: float
    steps: dict[int, list[float]]


@dataclass(frozen=True)
class Best:
    """The best that an attacker reaches within a number of steps, over attacks, rates and stops.

    Attributes:
        data: share of the training data that the attacker has.
        steps: at most.
        recovered: metric, one value a key.
        attack: the one that was best for most keys.
        advantage: over an attacker without the file, see `SubjectReport.baseline`; None for the
            baseline itself, and where that comes so near to the original that there is hardly
            anything to steal.
        over_architecture: the same, over an attacker with the architecture alone, where there is a
            base.
        rate: learning rate with which it was reached; 0 if nothing was trained.
        same_recipe: the advantage over an attacker without the file who trains at that rate too,
            in place of their best.
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
    """What a key holder reaches who attacks the levels above their own.

    Attributes:
        level: that the key opens.
        opened: its metric, one value a key.
        best: of all attacks, with the most data and steps; the holder may also train without the
            file.
        reference: what an attacker without the file reaches with the same data and steps, mean over
            keys.
        above: metric of the next level, mean over keys.
        gain: how much of the way to the next level it takes them, from the better of their own
            level and the reference; None where that is as good as the next level.
    """

    level: int
    opened: list[float]
    best: Best
    reference: float
    above: float
    gain: float | None

    @property
    def is_worthless(self) -> bool:
        """Whether anyone with that data reaches as much without the file."""
        return not sum(self.opened) / len(self.opened) > self.reference


@dataclass(frozen=True)
class Protection:
    """One way to protect the network, attacked.

    Attributes:
        name: for tables, as ``"pss 8 %"``.
        strategy: how weights were selected.
        share: of all weights that are encrypted.
        shipped: metric without a key, one value a key.
        levels: what keys give, level 0 first; empty if it was not measured.
        attempts: all attacks.
        best: for each share of data and number of steps.
        detection: ``{"auc", "baseline"}``: how well encrypted groups are told from others, and
            how well the same groups are before encryption; empty if it was not tried.
        holders: of levels 1 to M-1; empty if it was not tried.
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
        name: of it.
        holds: whether it does, against the attacks that were tried; None where that was not tried
            or is in doubt.
        why: in words.
    """

    name: str
    holds: bool | None
    why: str


@dataclass(frozen=True)
class SubjectReport:
    """A network and all that was tried on it.

    Attributes:
        name: short.
        title: network, data.
        unit: of the metric, "dB" or "%".
        clean: metric of the original.
        worthless: metric of knowing nothing.
        weights: number of parameters, running statistics included.
        examples: in the training data.
        protections: from the smallest share to the largest, strategy by strategy.
        baseline: the best that is reached without the file: from fresh weights, or from the base.
        seconds: that it took.
        base: whether the attacker has a base, see `Subject`.
        everything: what is reached with a file in which everything is encrypted by the cipher of
            the rings, which keeps the histogram of each leaf; empty for a sealed rest.
        ways: to publish it, the most useful first.
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
    """One property of a cipher, tried on chosen weights.

    Attributes:
        name: what must hold.
        passed: whether it did; None where it does not apply.
        found: what was measured.
        expected: what a good cipher gives, in words.
    """

    name: str
    passed: bool | None
    found: float
    expected: str


@dataclass(frozen=True)
class KeySearch:
    """What it costs to guess a key.

    Attributes:
        key: which one, as ``"random secret"``.
        bits: its entropy.
        guesses_per_second: on one core of this machine, measured.
        years: to try half of them on one core.
    """

    key: str
    bits: float
    guesses_per_second: float
    years: float


@dataclass(frozen=True)
class AuditReport:
    """``audit.json``.

    Attributes:
        version: of the library.
        settings: the configuration.
        subjects: the networks.
        cipher: checks of the cipher.
        keys: cost of guessing keys.
        advice: target, protection and share of the smallest budget that meets the target, if it
            was asked for; see `advise`.
    """

    version: str
    settings: dict[str, Any]
    subjects: list[SubjectReport]
    cipher: list[CipherCheck]
    keys: list[KeySearch]
    advice: list[dict[str, Any]] = field(default_factory=list)
