"""Runs the demo from the data to the pictures."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import PyTree
from rich.console import Console

from .. import PSSConfig
from .._io.atomic import writable_folder
from .._io.progress import bars
from . import DemoConfig
from ._report import Result, draw_curves, draw_photographs, table, write_json
from ._tiers import Tiers, learn, measurements, protect_and_measure
from ._train import Pictures, Subject, train_dncnn, train_vgg19


class _Plan(NamedTuple):
    """How much is done for one network."""

    name: str
    title: str
    train: Callable[..., Subject]
    settings: dict[str, Any]
    pss: PSSConfig
    budget: float
    budgets: tuple[float, ...]
    keys: int


_FULL = (
    _Plan(
        name="vgg19",
        title="VGG19, digits",
        train=train_vgg19,
        settings={"width": 0.25, "steps": 250},
        pss=PSSConfig(steps=150, penalty=3e-2),
        budget=0.00025,
        budgets=(0.0001, 0.00025, 0.001, 0.005, 0.02, 0.08),
        keys=3,
    ),
    _Plan(
        name="dncnn",
        title="DnCNN, photographs, σ = 25",
        train=train_dncnn,
        settings={"depth": 10, "width": 32, "steps": 300, "crop": 192},
        pss=PSSConfig(steps=150),
        budget=0.02,
        budgets=(0.001, 0.0025, 0.005, 0.01, 0.02, 0.08),
        keys=3,
    ),
)
_HASTY = {"pss": PSSConfig(steps=10), "budget": 0.05, "budgets": (0.02, 0.05), "keys": 1}
_QUICK = (
    _FULL[0]._replace(settings={"width": 0.0625, "steps": 60}, **_HASTY),
    _FULL[1]._replace(settings={"depth": 4, "width": 16, "steps": 60, "crop": 96}, **_HASTY),
)


def run(config: DemoConfig, console: Console | None) -> dict[str, Result]:
    """See `selcrypt_jax.demo.run`."""
    console = Console() if console is None else console
    writable_folder(config.out)

    plans = _QUICK if config.quick else _FULL
    results: dict[str, Result] = {}
    photographs: tuple[Pictures, list[PyTree], Tiers] | None = None
    with bars(console) as progress:
        # All of them from the start, so that one sees what is still to come.
        tasks = iter(
            [
                progress.add_task(f"{plan.title}: {what}", total=total, start=False)
                for plan in plans
                for what, total in (
                    ("train", plan.settings["steps"]),
                    ("learn importance", plan.pss.steps),
                    ("protect, measure", measurements(plan.budgets, plan.keys)),
                )
            ]
        )

        def advance() -> Callable[..., None]:
            task = next(tasks)
            progress.start_task(task)
            return lambda steps=1: progress.advance(task, steps)

        for plan in plans:
            start = time.perf_counter()
            subject = plan.train(**plan.settings, seed=config.seed, advance=advance())
            scores = learn(subject, plan.pss, seed=config.seed, advance=advance())
            tiers, opened = protect_and_measure(
                subject,
                scores,
                budget=plan.budget,
                budgets=plan.budgets,
                keys=plan.keys,
                seed=config.seed,
                advance=advance(),
            )
            results[plan.name] = Result(plan.title, tiers, time.perf_counter() - start)
            if subject.pictures is not None:
                photographs = (subject.pictures, opened, tiers)

    write_json(config.out / "tiers.json", results)
    draw_curves(config.out / "tiers.png", results)
    if photographs is not None:
        draw_photographs(config.out / "denoised.png", *photographs)
    for result in results.values():
        console.print(table(result))
    written = ", ".join(
        str(config.out / name) for name in ("tiers.json", "tiers.png", "denoised.png")
    )
    total = sum(result.seconds for result in results.values())
    console.print(f"Wrote {written} in {total:.0f} s.", soft_wrap=True, markup=False)
    return results
