"""Checks of the parts of a protected file, with errors that name the part and the field."""

import base64
import binascii
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from .._io.errors import IntegrityError, IntegrityReason
from .._io.strict_json import json_object, show

DAMAGED = "The file was damaged or altered: download it again from its owner."


class Rule(NamedTuple):
    """The valid values of a JSON field.

    Attributes:
        fits: whether a value is valid.
        expected: a description of valid values, for messages.
    """

    fits: Callable[[Any], bool]
    expected: str


TEXT = Rule(lambda value: isinstance(value, str), "text")
FLAG = Rule(lambda value: isinstance(value, bool), "true or false")
COUNT = Rule(lambda value: type(value) is int and value >= 0, "a whole number from 0")
COUNTS = Rule(lambda value: isinstance(value, list) and all(map(COUNT.fits, value)), "numbers")
LIST = Rule(lambda value: isinstance(value, list), "a list")
OBJECT = Rule(lambda value: isinstance(value, dict), "an object")


def one_of(*values: str) -> Rule:
    """One of several strings."""
    return Rule(lambda value: value in values, " or ".join(map(repr, values)))


def hex_of(size: int) -> Rule:
    """Bytes in lower-case hex."""
    pattern = re.compile(f"[0-9a-f]{{{2 * size}}}")
    return Rule(
        lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None,
        f"{2 * size} digits in hex",
    )


def or_null(rule: Rule) -> Rule:
    """A valid value of another rule, or null."""
    return Rule(lambda value: value is None or rule.fits(value), f"null or {rule.expected}")


class Checker(NamedTuple):
    """Checks one part of a file.

    Attributes:
        what: the part, for messages.
        reason: the reason that its errors give.
    """

    what: str
    reason: IntegrityReason

    def error(self, problem: str) -> IntegrityError:
        """The error for a problem."""
        return IntegrityError(f"{self.what}: {problem}. {DAMAGED}", reason=self.reason)

    def that(self, condition: bool, field: str, expected: str) -> None:
        """Raises an error for a field unless the condition holds."""
        if not condition:
            raise self.error(f"field {show(field)}: expected {expected}, got something else")

    def json(self, raw: bytes) -> dict[str, Any]:
        """Parses a JSON object."""
        try:
            return json_object(raw, self.what, DAMAGED)
        except ValueError as error:
            raise IntegrityError(str(error), reason=self.reason) from None

    def fields(self, value: Any, field: str, /, **rules: Rule) -> dict[str, Any]:
        """Refuses anything but an object with exactly these fields."""
        if not isinstance(value, dict) or value.keys() != rules.keys():
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            where = f"field {show(field)}: " if field else ""
            raise self.error(f"{where}expected an object with {list(rules)}, got {show(got)}")
        for name, rule in rules.items():
            self.that(rule.fits(value[name]), f"{field}: {name}" if field else name, rule.expected)
        return value

    def base64(self, text: str) -> bytes:
        """The bytes of base64 text in its only valid encoding."""
        try:
            data = binascii.a2b_base64(text, strict_mode=True)
        except ValueError:
            raise self.error("expected base64, got something else") from None
        # base64 would allow variants of the last character.
        if base64.b64encode(data[len(data) // 3 * 3 :]) != text[len(data) // 3 * 4 :].encode():
            raise self.error("expected base64, got something else")
        return data
