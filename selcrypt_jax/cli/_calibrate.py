"""Levels of a given quality: the command that finds them, and the way of `selcrypt protect`."""

import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from .._ciphers.lossless import LosslessCipher
from ._commands import Json

if TYPE_CHECKING:
    from rich.console import Console

    from .._calibrate.levels import Calibration
    from .._calibrate.search import Evaluation
    from .._release.protect import Selection


def calibrate(
    file: Positional[Path],
    evaluate: Positional[str],
    targets: tuple[str, ...],
    tolerance: float | None = None,
    keys: int = 16,
    seed: int = 0,
    lower_is_better: bool = False,
    importance: Path | None = None,
    strategy: Literal["l2", "ascend", "descend", "mean"] | None = None,
    budget: float = 1.0,
    granularity: Literal["kernel", "filter", "weight"] | None = None,
    layout: Literal["OIHW", "HWIO"] | None = None,
    select: str | None = None,
    scope: Literal["leaf", "model"] = "leaf",
    small: float | None = None,
    unit: Literal["weight", "group"] = "weight",
    as_json: Json = False,
) -> None:
    """Finds what each level has to open so that it gives the quality that you name.

    Encrypts the checkpoint in memory in up to 8 ways a level, under new keys each time, measures
    what is left, and prints the shares for selcrypt protect. Writes nothing.

      selcrypt calibrate model.safetensors mine:psnr --targets 20 24 28

    These are means over keys, for planning. A file has one key, with which a level may be far off:
    selcrypt protect --targets makes a file whose own levels are as you say.

    Args:
        file: The checkpoint, as for selcrypt protect.
        evaluate: Import path module:function of your metric, a function of a dict from the names of
            the tensors to arrays; the working folder is searched. Let it measure on data that the
            network was not trained on.
        targets: What levels 0, 1, ... shall give, from the worst to the best; one more level gives
            the original. The first may be "any": as bad as the budget makes it.
        tolerance: How far a level may be from its target. By default 2 % of the way from the first
            target to the original.
        keys: How many encryptions a value is the mean of, at most; three where they agree.
        seed: Of the keys that are tried.
        lower_is_better: Whether your metric is a loss; targets then descend.
        importance: Scores, as for selcrypt protect.
        strategy: As for selcrypt protect. To plan with random ones, which are others each time,
            save scores (selcrypt_jax.importance.random).
        budget: Largest share of the groups that may be encrypted.
        granularity: As for selcrypt protect.
        layout: As for selcrypt protect.
        select: As for selcrypt protect.
        scope: As for selcrypt protect.
        small: As for selcrypt protect; by default 0.02 if the first target is "any", else 0, since
            without the small tensors level 0 is hard to steer.
        unit: As for selcrypt protect.
        as_json: Print JSON.
    """
    from .._format.envelope import check_unprotected
    from .._io.imported import imported
    from .._release.calibrated import read_params
    from .._release.protect import checkpoint_scores, open_checkpoint

    wanted = [_number(text, level) for level, text in enumerate(targets)]
    if small is None:
        small = 0.02 if wanted[:1] == [None] else 0.0
    metric = imported("evaluate", evaluate)
    with open_checkpoint(file) as checkpoint, ExitStack() as stack:
        for part in checkpoint.files.values():
            check_unprotected(part.metadata, str(part.path))
        scores, _ = checkpoint_scores(
            checkpoint, stack, importance, strategy, granularity, layout, select
        )
        params = read_params(checkpoint)
        order = dict.fromkeys(params, False) | {n: scores.of(n) for n in scores.shapes}

    import jax

    from .._calibrate.levels import calibrate_levels

    with _metric_errors(evaluate):
        found = calibrate_levels(
            metric,
            params,
            order,
            wanted,
            key=jax.random.key(seed),
            keys=keys,
            tolerance=tolerance,
            scope=scope,
            budget=budget,
            small=small,
            select=select,
            cipher=LosslessCipher(unit=unit),
            higher_is_better=not lower_is_better,
            progress=_say if sys.stderr.isatty() else None,
        )
    options = {
        "importance": importance,
        "strategy": strategy,
        "granularity": granularity,
        "layout": layout,
        "select": select,
        "scope": scope,
        "small": small,
        "unit": unit,
    }
    protect = ["--fractions", *map(repr, found.fractions)]
    for name, value in options.items():
        if value is not None:
            protect += [f"--{name}", str(value)]
    _print(file, found, wanted, protect, as_json)


def _number(text: str, level: int) -> float | None:
    if text == "any":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"targets: expected a number for level {level}, got {text!r}. Only level 0 may be "
            '"any".'
        ) from None


def protect_to_targets(
    file: Path,
    out: Path,
    targets: Sequence[str],
    *,
    evaluate: str,
    tolerance: float | None,
    evaluations: int | None,
    lower_is_better: bool | None,
    options: dict[str, Any],
) -> tuple["Selection", dict[str, Any]]:
    """`selcrypt protect` with targets: what was chosen, and what its levels give."""
    from .._io.imported import imported
    from .._release.calibrated import protect_file_calibrated

    wanted = [_number(text, level) for level, text in enumerate(targets)]
    metric = imported("evaluate", evaluate)
    with _metric_errors(evaluate):
        chosen, found = protect_file_calibrated(
            file,
            out,
            metric,
            wanted,
            tolerance=tolerance,
            evaluations=evaluations,
            higher_is_better=not lower_is_better,
            progress=_say if sys.stderr.isatty() else None,
            **options,
        )
    return chosen, _as_dict(found, wanted, spreads=False)


@contextmanager
def _metric_errors(evaluate: str) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        if not str(error).startswith("eval_fn"):
            raise
        raise ValueError(f"{evaluate}: {error}") from None


def _say(step: "Evaluation") -> None:
    print(
        f"{step.number}: level {step.level}, {step.fraction:.4%} of the groups: {step.value:.6g}",
        file=sys.stderr,
    )


def _as_dict(
    found: "Calibration", targets: Sequence[float | None], *, spreads: bool
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for level, (fraction, target, value, spread) in enumerate(
        zip(
            (0.0, *found.fractions),
            (*targets, None),
            (*found.values, found.untouched),
            (*(None if math.isnan(s) else s for s in found.spreads), 0.0),
            strict=True,
        )
    ):
        row = {"level": level, "fraction": fraction, "target": target, "value": value}
        rows.append(row | {"spread": spread} if spreads else row)
    return {
        "levels": rows,
        "untouched": found.untouched,
        "exact": found.exact,
        "evaluations": found.evaluations,
        "calls": found.calls,
    }


def print_levels(found: dict[str, Any], console: "Console") -> None:
    """The table of what levels give."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    spreads = "spread" in found["levels"][0]
    for title in ("level", "opens", "target", "gives", *(["± over keys"] if spreads else [])):
        table.add_column(title, justify="right")
    for row in found["levels"]:
        numbers = ("target", "value", *(["spread"] if spreads else []))
        texts = ["" if row[name] is None else f"{row[name]:.4g}" for name in numbers]
        table.add_row(str(row["level"]), f"{row['fraction']:.4%}", *texts)
    console.print(table)


def _print(
    file: Path,
    found: "Calibration",
    targets: Sequence[float | None],
    protect: list[str],
    as_json: bool,
) -> None:
    result = _as_dict(found, targets, spreads=True)
    if as_json:
        more = {"fractions": list(found.fractions), "protect": protect}
        print(json.dumps(result | more, indent=2))
        return
    from rich.console import Console

    print_levels(result, Console(highlight=False, soft_wrap=True))
    print(
        f"\n{found.evaluations} evaluations, {found.calls} calls. To protect it so:\n\n"
        f"  selcrypt protect {shlex.quote(str(file))} -o public.safetensors "
        f"--secret keys/secret.key {shlex.join(protect)}"
    )
