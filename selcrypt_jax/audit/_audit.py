"""A whole audit: networks, attacks, report."""

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from .. import __version__
from .._io.places import writable_folder
from .._io.progress import bars
from ._cells import Cells
from ._cipher import check_cipher
from ._config import AuditConfig, SubjectConfig, make_subject
from ._grid import Grid
from ._keysearch import key_search
from ._records import Advantage, AuditReport, Best, CipherCheck, SubjectReport
from ._report import plain, write_report
from ._results import Results
from ._run import ARCHITECTURE, Audit, Plan
from ._strategies import plain_strategy
from ._ways import ways_to_publish, without_cipher
from ._words import TARGET

# Shares that the advice is chosen from, ascending.
BUDGETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.7)


def audit(
    config: AuditConfig,
    out: Path,
    *,
    quick: bool = False,
    target_advantage: float | None = None,
    console: Console | None = None,
) -> AuditReport:
    """Attacks networks, and writes ``audit.json``, plots and ``report.html``.

    Args:
        config: the networks, and the attacks on them.
        out: folder for the results, created if it does not exist. A run that was killed resumes
            there if its settings are the same.
        quick: a reduced grid, see `Grid.quick`.
        target_advantage: instead of trying the grid's shares, find for each strategy the smallest
            share that keeps the advantage of the grid's strongest attacker at or below this.
        console: where progress is printed; standard output by default.

    Returns:
        The results.

    Raises:
        ValueError: see `make_subject` and `Audit`.
        OSError: the folder cannot be created or written to; raised before anything is computed.
    """
    if target_advantage is not None and not 0 < target_advantage < 1:
        raise ValueError(f"target advantage: expected a number in (0, 1), got {target_advantage}.")
    console = Console() if console is None else console
    writable_folder(out)
    grid = config.grid.quick() if quick else config.grid

    kept = [_cells(out, described, grid) for described in config.subjects]
    with bars(console) as progress:
        found = [
            _audit_subject(described, grid, cells, target_advantage, progress)
            for described, cells in zip(config.subjects, kept, strict=True)
        ]
        task = progress.add_task("The cipher, and keys", total=1)
        checks, keys = check_cipher(seed=grid.seed), key_search()
        progress.advance(task)
    checks += [check for _, _, two_files in found for check in two_files]
    reports = [report for report, _, _ in found]
    if any(check.passed is False for check in checks):
        reports = [dataclasses.replace(each, ways=without_cipher(each.ways)) for each in reports]
    result = AuditReport(
        version=__version__,
        settings={
            "subjects": [plain(dataclasses.asdict(described)) for described in config.subjects],
            "grid": json.loads(json.dumps(dataclasses.asdict(grid))),
            "quick": quick,
            "target_advantage": target_advantage,
            "jax": jax.__version__,
            "backend": jax.default_backend(),
        },
        subjects=reports,
        cipher=checks,
        keys=keys,
        advice=[row for _, advice, _ in found for row in advice],
    )
    write_report(result, out)
    for cells in kept:
        cells.done()
    return result


def _cells(out: Path, described: SubjectConfig, grid: Grid) -> Cells:
    """The finished cells for these settings; cells for other settings keep their own file."""
    settings = {
        "version": __version__,
        "subject": plain(dataclasses.asdict(described)),
        # The list of shares does not matter: a cell is for one share.
        "grid": dataclasses.asdict(dataclasses.replace(grid, budget=(1.0,), importance=("l2",))),
        "files": _digests(described, grid),
    }
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Cells(out / f".audit-{digest}.jsonl", json.loads(text))


def _digests(described: SubjectConfig, grid: Grid) -> dict[str, str]:
    """Digests of the files that a network is made from: if they change, so does the network.

    Folders of data are assumed not to change.
    """
    values = [*described.arguments.values(), f"{described.make.partition(':')[0]}.py"]
    for name in grid.importance:
        values.append(plain_strategy(name).removeprefix("scores:"))
    texts = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in values)
    paths = {Path(text) for text in texts if isinstance(text, str) and text}
    found = {}
    for path in sorted(paths):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _audit_subject(
    described: SubjectConfig,
    grid: Grid,
    cells: Cells,
    target: float | None,
    progress: Progress,
) -> tuple[SubjectReport, list[dict[str, Any]], list[CipherCheck]]:
    start = time.perf_counter()
    task = progress.add_task(f"{described.name}: read or train", total=None)
    audit = Audit(described.name, make_subject(described), grid)
    progress.update(task, total=1, completed=1)

    def carry_out(plans: Iterable[Plan], title: str) -> None:
        missing = [cell for cell in audit.work(plans) if cell.name not in cells.found]
        task = progress.add_task(
            f"{described.name}: {title}", total=sum(cell.cost for cell in missing)
        )
        for cell in missing:
            cells.get(cell.name, cell.run)
            progress.advance(task, cell.cost)

    # Refuse all invalid input before the first hour of training.
    plans, advice = audit.plans() if target is None else [], []
    for plan in plans or [Plan(strategy, BUDGETS[-1]) for strategy in grid.importance]:
        audit.check(plan)
    carry_out([ARCHITECTURE], "from the architecture alone")
    if target is None:
        carry_out(plans, "attack")
    else:
        for strategy in grid.importance:
            found, tried = advise(audit, cells, strategy, target, carry_out)
            advice.append({"subject": described.name, **found})
            plans += sorted(tried)
    two_files = audit.two_files(max(plans, key=lambda plan: plan.share))
    report = Results(audit, cells.found).report(plans, time.perf_counter() - start)
    ways = ways_to_publish(report, target or TARGET, rest=grid.rest)
    return dataclasses.replace(report, ways=ways), advice, two_files


def advise(
    audit: Audit,
    cells: Cells,
    strategy: str,
    target: float,
    carry_out: Callable[[Iterable[Plan], str], None],
) -> tuple[dict[str, Any], dict[Plan, Best]]:
    """The smallest share of `BUDGETS` that meets a target, by bisection.

    Assumes that encrypting more gives an attacker less. The advantage is that of the strongest
    attacker (most data, most steps), averaged over keys.

    Returns:
        The advice: ``strategy``, ``target``, ``protection``, ``share`` of the groups, and
        ``advantage``, the last three None if no share meets the target; and the protections tried.
    """
    results = Results(audit, cells.found)
    baseline = results.baseline()
    tried: dict[Plan, Best] = {}

    def gain(share: float) -> Advantage | None:
        plan = Plan(strategy, share)
        try:
            audit.protected(plan, 0)
        except ValueError:  # too few weights in a ring
            return None
        carry_out([plan], str(plan))
        rows = results.protection(plan, baseline).best
        tried[plan] = max(rows, key=lambda row: (row.data, row.steps))
        return tried[plan].advantage

    low, high, best = 0, len(BUDGETS), None
    while low < high:
        middle = (low + high) // 2
        found = gain(BUDGETS[middle])
        if found is None and tried:
            break  # even without the file, an attacker comes too close to the original
        if found is not None and found.mean <= target:
            high, best = middle, found
        else:
            low = middle + 1
    met = None if best is None else Plan(strategy, BUDGETS[high])
    return {
        "strategy": strategy,
        "target": target,
        "protection": met and str(met),
        "share": met and met.share,
        "advantage": best and best._asdict(),
    }, tried
