"""``audit.json``, written and read back."""

import dataclasses
import json
import math
import os
import re
import types
import typing
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from .._io.strict_json import json_object, show
from ._records import Advantage, AuditReport

_REMEDY = "Pass the audit.json that an audit of this version wrote, or run the audit again."
_WORDS = {str: "text", int: "an integer", float: "a number or null", bool: "true or false"}


def report_bytes(report: AuditReport) -> bytes:
    """The content of ``audit.json``.

    Raises:
        TypeError: settings or advice that JSON cannot express.
    """
    content = json.dumps(
        plain(dataclasses.asdict(report)), allow_nan=False, indent=1, ensure_ascii=False
    )
    return f"{content}\n".encode()


def read_report(path: str | os.PathLike[str]) -> AuditReport:
    """Reads an ``audit.json``.

    Args:
        path: of the file.

    Returns:
        What was written, but for numbers that were not finite, which are NaN, and for tuples in
        the settings, which are lists.

    Raises:
        OSError: there is no such file, or it is closed to us.
        ValueError: it is not JSON, or not of an audit.
    """
    name = os.fspath(path)
    try:
        value = json_object(Path(path).read_bytes(), name)
    except ValueError as error:
        raise ValueError(f"{error} {_REMEDY}") from None
    return _read(AuditReport, value, name)


def plain(value: Any) -> Any:
    """As JSON has it: no tuples, no NaN."""
    if isinstance(value, Advantage):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _read(kind: Any, value: Any, where: str) -> Any:
    """A value of a type that occurs in the records."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or (origin is types.UnionType and value is None):
        return value
    if origin is types.UnionType:
        return _read(args[0], value, where)
    if origin is list and isinstance(value, list):
        return [_read(args[0], each, f"{where}[{i}]") for i, each in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {
            _key(args[0], key, where): _read(args[1], each, f"{where}[{show(key)}]")
            for key, each in value.items()
        }
    if kind in _WORDS:
        if kind is float and value is None:
            return math.nan
        if type(value) is kind or (kind is float and type(value) is int):
            return kind(value)
    elif origin is None and isinstance(value, dict):
        return _read_record(kind, value, where)
    expected = _WORDS.get(kind, "a list" if origin is list else "an object")
    raise _wrong(where, expected, show(value))


def _key(kind: type, key: str, where: str) -> Any:
    if kind is int and not re.fullmatch(r"0|[1-9][0-9]{0,15}", key):
        raise _wrong(where, "numbers of steps as keys", show(key))
    return kind(key)


def _read_record(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    # What need not be measured has a default, and may be missing.
    optional = {"detection", "climbing", "advice"}
    if value.keys() - hints.keys() or hints.keys() - value.keys() - optional:
        raise _wrong(where, f"the keys {', '.join(hints)}", ", ".join(value) or "none")
    return kind(
        **{name: _read(hints[name], each, f"{where}: {name}") for name, each in value.items()}
    )


def _wrong(where: str, expected: str, got: str) -> ValueError:
    return ValueError(f"{where}: expected {expected}, got {got}. {_REMEDY}")


# --- words and numbers ----------------------------------------------------------------------------
