"""The configuration of an audit: a TOML file, or the name of a built-in network."""

import contextlib
import dataclasses
import inspect
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._io.errors import quoted
from .._io.imported import blamed, imported
from ._builtin import BUILT_IN
from ._grid import Grid
from ._subject import Subject


@dataclass(frozen=True)
class SubjectConfig:
    """The recipe for a network.

    Attributes:
        name: the network's name in the report.
        make: a built-in name, or the import path ``module:function`` of a function that returns
            a `Subject`; the working folder is searched too.
        arguments: the function's arguments.
    """

    name: str
    make: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class AuditConfig:
    """The networks to audit, and the attacks on them."""

    subjects: tuple[SubjectConfig, ...]
    grid: Grid


_DEMO = ("demo-vgg19", "demo-dncnn", "demo-transformer")
# The demo's networks are trained for a few hundred steps: an attacker with much more data or time
# than this does not need the file.
_DEMO_GRID = Grid(
    importance=("pss", "pss+small"),
    budget=(0.02, 0.08),
    data=(0.01, 0.05),
    steps=(20, 100),
    rates=(1e-3, 3e-3),
    keys=2,
)


def read_config(config: str) -> AuditConfig:
    """Reads a configuration.

    Args:
        config: ``demo``, ``demo-vgg19``, ``demo-dncnn``, ``demo-transformer``, or the path of a
            TOML file: a table ``[subjects.NAME]`` for each network, with ``make`` and the
            function's arguments, and a table ``[grid]``, see `Grid`.

    Raises:
        ValueError: an entry is unknown or invalid.
        OSError: the file does not exist.
    """
    if config in ("demo", *_DEMO):
        names = _DEMO if config == "demo" else (config,)
        return AuditConfig(tuple(SubjectConfig(name, name, {}) for name in names), _DEMO_GRID)
    path = Path(config)
    if not path.is_file():
        raise FileNotFoundError(
            f"{config}: expected demo, {', '.join(_DEMO)} or a TOML file, got no such file. Write "
            "one as in docs/audit.md, or try selcrypt audit demo --quick."
        )
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected TOML as in docs/audit.md, got: {quoted(error)}. Correct it. "
            "(A checkpoint is not passed itself: the TOML file names it.)"
        ) from None
    _only_keys(str(path), content, ("subjects", "grid"))
    tables = content.get("subjects")
    if not isinstance(tables, dict) or not tables:
        raise ValueError(
            f"{path}: expected a table [subjects.NAME] for each network, got "
            f"{'none' if not tables else type(tables).__name__}. Add one, as in docs/audit.md."
        )
    subjects = []
    for name, table in tables.items():
        make = table.get("make") if isinstance(table, dict) else None
        if not isinstance(make, str):
            raise ValueError(
                f'{path}: [subjects.{name}]: expected make = "module:function" or one of '
                f"{', '.join(BUILT_IN)}, got {make!r}. Name a function that returns a Subject."
            )
        arguments = {key: value for key, value in table.items() if key != "make"}
        subjects.append(SubjectConfig(name, make, arguments))
    return AuditConfig(tuple(subjects), _grid(f"{path}: [grid]", content.get("grid", {})))


_RENAMED = {"strategies": "importance", "shares": "budget"}


def _only_keys(what: str, table: Mapping[str, Any], known: Any) -> None:
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise ValueError(
            f"{what}: expected only {', '.join(known)}, got {unknown[0]!r}. Rename or remove it."
        )


def _grid(what: str, table: Any) -> Grid:
    if not isinstance(table, dict):
        raise ValueError(
            f"{what}: expected a table, got {table!r}. Write its entries below a line [grid]."
        )
    defaults = dataclasses.asdict(Grid())
    for old, new in _RENAMED.items():
        if old in table:
            raise ValueError(f"{what}: {old!r} is now called {new!r}. Rename it.")
    _only_keys(what, table, defaults)
    values = {}
    for name, value in table.items():
        default = defaults[name]
        many = isinstance(default, tuple)
        kind = type(default[0] if many else default)
        kinds = (int, float) if kind is float else (kind,)
        parts = value if many and isinstance(value, list) else [value]
        if many != isinstance(value, list) or not all(type(part) in kinds for part in parts):
            raise ValueError(
                f"{what}: {name}: expected {'a list of ' if many else ''}{kind.__name__}, such as "
                f"{default!r}, got {value!r}. Change it, or leave it out for the default."
            )
        values[name] = tuple(value) if many else value
    try:
        return Grid(**values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def make_subject(config: SubjectConfig) -> Subject:
    """Makes a network: reads or trains it.

    Raises:
        ValueError: the function cannot be imported or called with these arguments, or it
            does not return a `Subject`.
    """
    where = f"[subjects.{config.name}]"
    function = BUILT_IN.get(config.make) or imported(f"{where}: make", config.make, tuple(BUILT_IN))
    try:
        with contextlib.suppress(ValueError):  # some built-in functions have no signature
            inspect.signature(function).bind(**config.arguments)
    except TypeError as error:
        raise ValueError(
            f"{where}: {config.make}: expected its arguments as entries, got: {quoted(error)}. "
            f"Add, rename or remove entries of {where}."
        ) from None
    subject = function(**config.arguments)
    if not isinstance(subject, Subject):
        raise ValueError(
            f"{where}: expected {config.make} to return a Subject, got {type(subject).__name__}. "
            "End the function with return Subject(...), see docs/audit.md."
        )
    if config.make in BUILT_IN:
        return subject
    own = {
        name: blamed(where, f"{name} of the Subject", function)
        for name in ("loss_fn", "metric", "batch", "fresh", "training_loss_fn")
        if (function := getattr(subject, name)) is not None
    }
    return subject._replace(**own)
