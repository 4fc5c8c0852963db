"""Reads untrusted JSON strictly: it has one meaning, or it is refused."""

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import quoted

DAMAGED = "It was damaged or altered: download it again."
"""The remedy for JSON that no program of ours wrote."""

# An empty list takes three bytes, and 72 in memory. A tensor has three lists and objects in the 51
# bytes or more of its entry, so this bound refuses no valid header. It limits JSON to about twelve
# times its own size in memory; headers of tensors take seven times theirs.
_BYTES_PER_CONTAINER = 16
_MANY_CONTAINERS = 100_000
_SURROGATE = re.compile(r"\\u[dD]")
_NO_BRACKETS = bytes(set(range(256)) - set(b'"[{'))


def json_object(raw: bytes | bytearray, what: str, remedy: str = DAMAGED) -> dict[str, Any]:
    """Parses an object in JSON.

    Args:
        raw: UTF-8.
        what: the document, for messages.
        remedy: the remedy, for messages.

    Raises:
        ValueError: not JSON, or not an object; a repeated key in an object (parsers disagree on
            which one counts); NaN or Infinity; lone surrogates, which are not text; nesting that is
            too deep; so many lists and objects that they would take far more memory than the text.
    """
    _check_brackets(raw, what)
    try:
        text = raw.decode()
        value = json.loads(
            text, object_pairs_hook=_unique, parse_int=_parse_int, parse_constant=_refuse
        )
        if _SURROGATE.search(text):  # only an escape can encode one
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what}: expected Unicode, got a lone surrogate. {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{what}: expected UTF-8 JSON, each key once, got: {quoted(error)}. {remedy}"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected a JSON object, got {show(value)}. {remedy}")
    return value


def check_json(raw: bytes | bytearray, what: str) -> None:
    """Refuses JSON that other parsers cannot parse safely; its keys are not checked.

    Raises:
        ValueError: not JSON; nested too deeply, or with too many lists and objects.
    """
    _check_brackets(raw, what)
    try:
        json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: expected JSON, got: {quoted(error)}. {DAMAGED}") from None


def show(value: object) -> str:
    """A value for an error message, truncated if long."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} that is nested too deeply to show"
    return text if len(text) <= 200 else f"{text[:200]}…"


def listing(names: Sequence[object], most: int = 6) -> str:
    """Names for an error message: the first ones whole, and how many more there are."""
    text = f"[{', '.join(map(show, names[:most]))}]"
    return text + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_brackets(raw: bytes | bytearray, what: str) -> None:
    most = _MANY_CONTAINERS + len(raw) // _BYTES_PER_CONTAINER
    # First counts brackets including those in strings, since that takes next to no time.
    if _many_brackets(raw, most) and (actual := _brackets_outside_strings(raw)) > most:
        raise ValueError(
            f"{what}: expected at most {most} lists and objects in {len(raw)} bytes of JSON, got "
            f"{actual}. It was crafted to exhaust memory: download it again from its owner."
        )


def _many_brackets(raw: bytes | bytearray, most: int) -> bool:
    # One after the other, since bytes.count is ten times slower for rare characters.
    for bracket in b"[", b"{":
        at = raw.find(bracket)
        while at >= 0 and most >= 0:
            most -= 1
            at = raw.find(bracket, at + 1)
    return most < 0


def _brackets_outside_strings(raw: bytes | bytearray) -> int:
    """The count is exact up to the first byte that JSON cannot have there, where a parser stops."""
    raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    return len(b"".join(raw.translate(None, _NO_BRACKETS).split(b'"')[::2]))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{show(key)} twice")
        result[key] = value
    return result


def _parse_int(text: str) -> int | float:
    # As serde_json reads them: "-0" and numbers of more than 64 bits are not integers.
    return float(text) if text == "-0" or len(text) > 20 else int(text)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
