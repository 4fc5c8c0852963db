"""Key material: secret bytes that are never shown, and the functions that derive keys."""

import functools
import hmac
import unicodedata
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

P = ParamSpec("P")
R = TypeVar("R")

KEY_BYTES = 32
SALT_BYTES = 16
MAX_PASSPHRASE = 1000
"""Bytes of UTF-8: some terminals truncate a line after 1,023."""

# Control characters (line ends among them), lone surrogates, line and paragraph separators, and
# characters unassigned in this Python's Unicode, whose normal form may change.
_UNTYPED = frozenset({"Cc", "Cs", "Zl", "Zp", "Cn"})


def checked_bytes(value: object, size: int, name: str, remedy: str) -> bytes:
    """Checks for bytes of a given length.

    Raises:
        TypeError, ValueError: the value is not bytes, or has another length.
    """
    expected = f"{name}: expected {size} bytes"
    if not isinstance(value, bytes | bytearray | memoryview):
        # The message omits the value: a passphrase may have been passed as a key.
        raise TypeError(f"{expected}, got {type(value).__name__}. {remedy}")
    if len(bytes(value)) != size:
        raise ValueError(f"{expected}, got {len(bytes(value))}. {remedy}")
    return bytes(value)


def forgetting(function: Callable[P, R]) -> Callable[P, R]:
    """Drops the traceback below the function from its errors: secrets are local variables there.

    Crash reporters and verbose tracebacks print local variables. The arguments are dropped too.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BaseException as raised:
            error = raised
        del args, kwargs
        raise _without_frames(error)

    return called


def _without_frames(error: BaseException) -> BaseException:
    """The error and its causes, without tracebacks."""
    todo: list[BaseException | None] = [error]
    while todo:
        if (each := todo.pop()) is None:
            continue
        each.__traceback__ = None
        if each.__suppress_context__:
            each.__context__ = None  # it may hold the text that it could not parse
        todo += [each.__cause__, each.__context__]
    return error


class KeyMaterial:
    """32 secret bytes, which are never printed, pickled or hashed."""

    __slots__ = ("_value",)
    _remedy = ""  # for messages

    @forgetting
    def __init__(self, value: bytes) -> None:
        self._value = checked_bytes(value, KEY_BYTES, type(self).__name__, self._remedy)

    def __bytes__(self) -> bytes:
        return self._value

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return hmac.compare_digest(self._value, other._value)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> NoReturn:
        # A pickle is the easiest way to leak a secret into a cache or a checkpoint.
        raise TypeError(f"cannot pickle {type(self).__name__}: write bytes(...) to its own file")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(<{KEY_BYTES} bytes>)"


class DerivedKey(KeyMaterial):
    """A key derived from a level key, for one purpose."""

    __slots__ = ()


def hkdf(key: bytes, domain: bytes, salt: bytes | None = None) -> bytes:
    """32 bytes of HKDF-SHA256 (RFC 5869) under one of the package's domains."""
    kdf = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=b"selcrypt/v1/" + domain)
    return kdf.derive(key)


def stretched(
    passphrase: str, salt: bytes, *, iterations: int, lanes: int, memory_kib: int
) -> bytes:
    """32 bytes of Argon2id (RFC 9106); see `Secret.from_passphrase`."""
    words = passphrase_bytes(passphrase)
    if not isinstance(salt, bytes):
        raise TypeError(
            f"salt: expected random bytes, got {type(salt).__name__}. Use os.urandom(16)."
        )
    if len(salt) < SALT_BYTES:
        raise ValueError(
            f"salt: expected at least {SALT_BYTES} random bytes, got {len(salt)}. "
            "Make one with os.urandom(16) and keep it."
        )
    kdf = Argon2id(
        salt=salt, length=KEY_BYTES, iterations=iterations, lanes=lanes, memory_cost=memory_kib
    )
    return kdf.derive(words)


def passphrase_bytes(passphrase: str) -> bytes:
    """A passphrase in normal form C and UTF-8: one line that any terminal or file can hold.

    Raises:
        TypeError: it is not text.
        ValueError: it is empty or only spaces, too long, or has characters that cannot be typed.
    """
    if not isinstance(passphrase, str):
        raise TypeError(f"passphrase: expected text, got {type(passphrase).__name__}. Pass a str.")
    text = unicodedata.normalize("NFC", passphrase)
    actual = ""
    if not text.strip():
        actual = "an empty one"
    elif _UNTYPED & {unicodedata.category(character) for character in text}:
        actual = "a control character, a line end, or a code point that is not a character"
    elif (size := len(text.encode())) > MAX_PASSPHRASE:
        actual = f"{size} bytes"
    if actual:  # the message shows none of its characters
        raise ValueError(
            f"passphrase: expected one line of at most {MAX_PASSPHRASE} bytes of text, got "
            f"{actual}. Choose one that can be typed."
        )
    return text.encode()
