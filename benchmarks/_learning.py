"""Section "pss": a step of learning importance, against a training step of the same network."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from _measure import Contender, measure
from _rows import Options, Row
from _steps import BUDGETS, Task, classification, denoising, pss_step, training_step

NOTES = {
    "pss": (
        'A step of PSS (objective "break", gates on all convolutions) and a plain training step '
        "(gradient and Adam), with the same loss on the same batch; ratios are relative to "
        "training. Single jitted steps, because XLA's CPU backend computes gradients inside loops "
        "slowly."
    )
}
BASELINE = "training"

TASKS: dict[str, Callable[[], Task]] = {
    "VGG19, batch of 64": partial(classification, 64),
    "DnCNN, 8 patches of 48×48": partial(denoising, (8, 48, 48, 1)),
    "VGG19, batch of 8": partial(classification, 8),
    "DnCNN, 1 patch of 16×16": partial(denoising, (1, 16, 16, 1)),
}
CASES = ("VGG19, batch of 64", "DnCNN, 8 patches of 48×48")
QUICK_CASES = ("VGG19, batch of 8", "DnCNN, 1 patch of 16×16")


def contenders(name: str) -> list[Contender]:
    """All contenders, for a task."""
    task = cache(TASKS[name])

    def step_of(make: Callable[[Task], Callable[[], Any]], what: str) -> Contender:
        step = cache(lambda: make(task()))
        # The types of a fresh state may differ from those after a step.
        return Contender(what, lambda step: step(), step, warm_ups=3)

    return [
        step_of(training_step, BASELINE),
        step_of(pss_step, "PSS, kernels"),
        step_of(partial(pss_step, granularity="weight"), "PSS, weights"),
        step_of(partial(pss_step, config=BUDGETS), "PSS, kernels, at budgets"),
    ]


def rows(options: Options) -> list[Row]:
    """The rows of the section."""
    found = []
    for name in QUICK_CASES if options.quick else CASES:
        found += measure("pss", name, contenders, name, baseline=BASELINE, options=options)
    return found
