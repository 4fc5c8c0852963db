"""Settings for learning importance."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import optax

from .._tree.shares import check_share
from .gates import BETA


@dataclass(frozen=True)
class PSSConfig:
    """Settings for learning importance with `pss`.

    Attributes:
        objective: ``"keep"`` (the paper): gates select the weights that stay, the others are zero;
            groups whose gates must stay open are important. ``"break"``: gates select the weights
            that are *encrypted*, that is, replaced by noise like the leaf's weights; groups that
            break the network are important.
        steps: gradient steps; per leaf, if `layerwise`.
        penalty: λ, the cost of an open gate in units of the (log) loss: about the change in the
            loss for which a gate is worth it. The more gates, the smaller: 1e-2 for some tens of
            thousands, 1e-4 for the 2 million of VGG19.
        optimizer: any optax transformation that works from gradients alone (not ``lbfgs``). If
            ``None``, Adam with rate 0.1 and ε = λ/10, about the size of the penalty's own gradient:
            with a far smaller ε, every gate would move by the rate, however little depends on it,
            and gates would be ranked by the certainty of their gradients, not by their size.
        initial_log_alpha: where gates start; by default almost all open (2.5) for ``"keep"``,
            almost all closed (−3.5) for ``"break"``.
        cap: for ``"break"``: the loss at which the network counts as broken. Without one,
            thousands of kernels that are worthless alone are opened together. By default four
            times the loss with all selected leaves replaced by noise.
        sampled: sample the gates (the paper's text), or use the median gate (its release).
        layerwise: one leaf at a time, the others' gates at rest (the release), or all together.
        clamp: bounds of log α.
        beta: temperature of the gates.

    Examples:
        >>> config = PSSConfig("break", steps=20, penalty=1e-3)
        >>> scores = pss(loss_fn, params, batches, key=jax.random.key(0), config=config)

    References:
        Tian, Zhou, Duan, CVPR 2021, section 3.1. Its release:
        ``PSSConfig("keep", steps=..., penalty=1e-4, initial_log_alpha=1.0, sampled=False,
        layerwise=True, optimizer=optax.sgd(0.1, momentum=0.9, nesterov=True))``, 130 epochs.
    """

    objective: Literal["keep", "break"] = "break"
    steps: int = 100
    penalty: float = 1e-2
    optimizer: optax.GradientTransformation | None = None
    initial_log_alpha: float | None = None
    cap: float | None = None
    sampled: bool = True
    layerwise: bool = False
    clamp: tuple[float, float] = (math.log(0.01), math.log(100))
    beta: float = BETA

    def __post_init__(self) -> None:
        if self.objective not in ("keep", "break"):
            raise ValueError(f"objective: expected 'keep' or 'break', got {self.objective!r}.")
        if operator.index(self.steps) < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}.")
        if not self.penalty >= 0:
            raise ValueError(f"penalty: expected at least 0, got {self.penalty}.")
        if not self.beta > 0:
            raise ValueError(f"beta: expected more than 0, got {self.beta}.")
        low, high = self.clamp
        if not low <= self.start <= high:
            raise ValueError(
                f"clamp: expected bounds around the start, log α = {self.start}, got {self.clamp}."
            )
        if not isinstance(self.optimizer, optax.GradientTransformation | None):
            raise TypeError(
                f"optimizer: expected an optax transformation, such as optax.adam(0.1), got "
                f"{type(self.optimizer).__name__}."
            )
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"cap: expected a positive loss, got {self.cap}.")

    @property
    def start(self) -> float:
        """The initial log α of the gates."""
        if self.initial_log_alpha is not None:
            return self.initial_log_alpha
        return 2.5 if self.objective == "keep" else -3.5


@dataclass(frozen=True)
class PSSBudgets:
    """Settings for learning with `pss` when it is known how much will be encrypted.

    Learns which groups do the most damage *together*, for each budget. The scores rank the groups
    of the smallest budget first, then those that the next one adds: one run serves all levels.

    Attributes:
        shares: shares of the groups that will be encrypted, ascending, each in (0, 1]: those
            that are later passed to `nested_masks`.
        scope: whether they hold in every ``"leaf"`` or over the whole ``"model"``, as there.
        steps: gradient steps, in equal parts for each budget.

    Examples:
        >>> config = PSSBudgets((0.02, 0.08), scope="model", steps=40)
        >>> scores = pss(loss_fn, params, batches, key=jax.random.key(0), config=config)
        >>> masks = nested_masks(scores, config.shares, scope=config.scope)
    """

    shares: Sequence[float]
    scope: Literal["leaf", "model"] = "leaf"
    steps: int = 200

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        if not 1 <= len(self.shares) <= 127:  # counted in int8
            raise ValueError(
                f"shares: expected 1 to 127 shares, got {len(self.shares)}. Pass (0.02, 0.08)."
            )
        for index, share in enumerate(self.shares):
            check_share(f"shares[{index}]", share)
        if list(self.shares) != sorted(set(self.shares)):
            raise ValueError(f"shares: expected ascending shares, got {self.shares}. Sort them.")
        if self.scope not in ("leaf", "model"):
            raise ValueError(f"scope: expected 'leaf' or 'model', got {self.scope!r}.")
        if operator.index(self.steps) < len(self.shares):
            raise ValueError(
                f"steps: expected at least one per budget, {len(self.shares)}, got {self.steps}."
            )
