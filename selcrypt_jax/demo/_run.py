"""Runs the demo, from data to pictures."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxtyping import PyTree
from rich.console import Console

from .. import PSSBudgets
from .._io.errors import counted
from .._io.places import writable_folder
from .._io.progress import bars
from . import DemoConfig
from ._draw import draw_paper, draw_photographs, draw_tiers
from ._paper import learn, measurements, protect_and_measure
from ._report import Result, paper_table, tier_table, warning, write_json
from ._tiers import Goal, tiers_by_target, train_without_file
from ._train import Pictures, Subject, train_dncnn, train_vgg19


class _Plan(NamedTuple):
    """The amount of work for one network."""

    name: str
    title: str
    train: Callable[..., Subject]
    settings: dict[str, Any]
    goal: Goal
    learning: int  # steps, for all budgets together
    budget: float
    budgets: tuple[float, ...]
    keys: int


_FULL = (
    _Plan(
        name="vgg19",
        title="VGG19, digits",
        train=train_vgg19,
        settings={"width": 0.25, "steps": 250, "trained_on": 0.5},
        # All but the first layer, which is small: no level below the top would open it.
        goal=Goal((10, 40, 60, 80), tolerance=1, select=r"^convs/[1-9]\d*/kernel$", steps=100),
        learning=90,
        budget=0.00025,
        budgets=(0.0001, 0.00025, 0.001, 0.005, 0.02, 0.08),
        keys=3,
    ),
    _Plan(
        name="dncnn",
        title="DnCNN, photographs, σ = 25",
        train=train_dncnn,
        settings={"depth": 10, "width": 32, "steps": 400, "crop": 192, "rate": 1.2e-2},
        # All but the outer layers, which are small: a few of their weights change a lot at once.
        # The tolerance suits level 0, whose mean PSNR has a standard error of 0.02 dB.
        goal=Goal((20.5, 22.8, 25, 27.5), tolerance=0.03, select="^convs/[1-8]/kernel$", steps=100),
        learning=90,
        budget=0.02,
        budgets=(0.001, 0.0025, 0.005, 0.01, 0.02, 0.08),
        keys=3,
    ),
)
_HASTY = {"learning": 10, "budget": 0.05, "budgets": (0.02, 0.05), "keys": 1}
_QUICK = (
    _FULL[0]._replace(
        settings={"width": 0.125, "steps": 200, "trained_on": 0.5},
        goal=_FULL[0].goal._replace(targets=(10, 35, 55, 75), tolerance=1.5),
        **_HASTY,
    ),
    _FULL[1]._replace(
        settings={"depth": 5, "width": 24, "steps": 100, "crop": 96, "rate": 1.2e-2},
        goal=Goal((20.5, 22, 23.5, 25), tolerance=0.03, select="^convs/[1-3]/kernel$", steps=100),
        **_HASTY,
    ),
)


def run(config: DemoConfig, console: Console | None) -> dict[str, Result]:
    """See `selcrypt_jax.demo.run`."""
    console = Console() if console is None else console
    writable_folder(config.out)

    plans = _QUICK if config.quick else _FULL
    results: dict[str, Result] = {}
    photographs: tuple[Pictures, list[PyTree]] | None = None
    with bars(console) as progress:
        # All bars are shown from the start, so that users see what is still to come.
        tasks = iter(
            [
                progress.add_task(f"{plan.title}: {what}", total=total, start=False)
                for plan in plans
                for what, total in (
                    ("train", plan.settings["steps"]),
                    ("train without the file", plan.goal.steps),
                    ("search for the tiers", None),
                    ("learn importance", plan.learning),
                    ("the paper's levels", measurements(plan.budgets, plan.keys)),
                )
            ]
        )

        def advance() -> Callable[..., None]:
            task = next(tasks)
            progress.start_task(task)
            return lambda steps=1: progress.advance(task, steps)

        @contextmanager
        def evaluations(plan: _Plan) -> Iterator[Callable[[], None]]:
            """Counts evaluations: how many a search takes is not known in advance."""
            task, count = next(tasks), 0
            progress.start_task(task)

            def advance() -> None:
                nonlocal count
                count += 1
                text = f"{plan.title}: search for the tiers, {counted(count, 'evaluation')}"
                progress.update(task, completed=count, description=text)

            yield advance
            progress.update(task, total=count)

        for plan in plans:
            start = time.perf_counter()
            subject = plan.train(**plan.settings, seed=config.seed, advance=advance())
            without_file = train_without_file(subject, plan.goal, advance=advance())
            with evaluations(plan) as evaluated:
                tiers, opened = tiers_by_target(subject, plan.goal, without_file, advance=evaluated)
            budgets = PSSBudgets(plan.budgets, "model", steps=plan.learning)
            scores = learn(subject, budgets, seed=config.seed, advance=advance())
            paper = protect_and_measure(
                subject,
                scores,
                budget=plan.budget,
                budgets=plan.budgets,
                keys=plan.keys,
                seed=config.seed,
                advance=advance(),
            )
            results[plan.name] = Result(plan.title, tiers, paper, time.perf_counter() - start)
            if subject.pictures is not None:
                photographs = (subject.pictures, opened)

    write_json(config.out / "tiers.json", results)
    draw_tiers(config.out / "tiers.png", results)
    draw_paper(config.out / "paper.png", results)
    if photographs is not None:
        draw_photographs(config.out / "denoised.png", *photographs)
    for result in results.values():
        console.print(tier_table(result))
        console.print(warning(result), markup=False)
    console.print("\nThe paper's levels open 68, 76, 84, 92 and 100 % of the encrypted kernels:")
    for result in results.values():
        console.print(paper_table(result))
    names = ("tiers.json", "tiers.png", "denoised.png", "paper.png")
    written = ", ".join(str(config.out / name) for name in names)
    total = sum(result.seconds for result in results.values())
    console.print(f"Wrote {written} in {total:.0f} s.", soft_wrap=True, markup=False)
    return results
