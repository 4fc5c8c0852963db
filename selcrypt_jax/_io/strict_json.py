"""JSON of unknown origin, read strictly: it has one meaning, or it is refused."""

import json
from typing import Any, NoReturn


def json_object(raw: bytes, what: str) -> dict[str, Any]:
    """Parses an object in JSON.

    Args:
        raw: UTF-8.
        what: for messages.

    Raises:
        ValueError: not JSON, or no object; a key twice in an object (parsers do not agree which
            one counts); NaN or Infinity; lone surrogates, which are no text; nested too deeply.
    """
    try:
        text = raw.decode()
        value = json.loads(
            text, object_pairs_hook=_unique, parse_int=_parse_int, parse_constant=_refuse
        )
        if "\\u" in text:  # only an escape can smuggle a surrogate in
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what}: expected Unicode, got a lone surrogate.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: expected UTF-8 JSON, each key once, got: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected a JSON object, got {show(value)}.")
    return value


def show(value: object) -> str:
    """A value for an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{show(key)} twice")
        result[key] = value
    return result


def _parse_int(text: str) -> int | float:
    # As serde_json reads them, to which "-0" and what needs more than 64 bits are no integers.
    return float(text) if text == "-0" or len(text) > 20 else int(text)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
