"""The text of key files and grants: their kinds and fields, and what is wrong with a text."""

import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple

from .._io.errors import GrantError, counted

MAX_BYTES = 1 << 16
_SPACES = " \t\r"
_SEALED = "-----BEGIN AGE ENCRYPTED FILE-----"


class Kind(NamedTuple):
    """A kind of key file.

    Attributes:
        name: the name on its first line, before the version.
        called: its name in messages.
        made: the name that its owner knows it by, for messages.
        comment: the comment in the file, for its owner.
        private: whether it holds a secret.
        fields: the plaintext fields; ``key`` comes after them.
        optional: those of them that may be missing.
        lost: the consequence of replacing a file of this kind, for messages.
    """

    name: str
    called: str
    made: str
    comment: str
    private: bool = True
    fields: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()
    lost: str = ""


SECRET = Kind(
    "selcrypt-secret", "a secret", "the secret.key that selcrypt keygen made",
    "All grants of your models come from this. Keep it secret, and keep a copy of it.",
    lost=", and without a copy of the old one no model that it protected can be granted again",
)  # fmt: skip
SIGNING = Kind(
    "selcrypt-signing-key", "a signing key (private)",
    "the signing.key that selcrypt keygen made",
    "This signs models in your name: keep it secret.",
    lost=", and without a copy of the old one its models cannot be rotated or signed again",
)  # fmt: skip
VERIFY = Kind(
    "selcrypt-verify-key", "a verify key (public)",
    "the signing.pub that selcrypt keygen made",
    "Public: shows that a model is signed by its owner.", private=False,
)  # fmt: skip
GRANT = Kind(
    "selcrypt-grant", "a grant", "the file that selcrypt grant made",
    "Opens a level of one model, and those below it: keep it secret.",
    fields=("model-id", "level", "signer"), optional=frozenset({"signer"}),
)  # fmt: skip
_OTHERS = {
    **{f"{kind.name}-v": kind.called for kind in (SECRET, SIGNING, VERIFY, GRANT)},
    "AGE-SECRET-KEY-": "an age identity (for --identity)",
    "-----BEGIN": "a PEM file",
    "-----BEGIN AGE": "something sealed with age, which only a grant can be",
    "age1": "the public key of a recipient",
    "ssh-": "the public key of a recipient",
}
"""What else a file may start with; if two entries match, the later one counts."""


def checksum(lines: Sequence[str]) -> str:
    """Distinguishes a typing error from a wrong key."""
    return hashlib.sha256(b"selcrypt/v1/file\0" + "\n".join(lines).encode()).hexdigest()[:16]


def text_lines(data: bytes, what: str, expected: str, remedy: str) -> list[str]:
    """The lines of a key file without comments and blank lines."""
    actual, text = "", ""
    if len(data) > MAX_BYTES:
        actual = f"more than {MAX_BYTES} bytes"
    elif data.startswith((b"\xff\xfe", b"\xfe\xff")):
        actual, remedy = "UTF-16", "Save it as UTF-8."
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            actual = f"{counted(len(data), 'byte')} of something else"
    if actual:
        message = f"{what}: expected UTF-8 text, {expected}, got {actual}. {remedy}"
        raise GrantError(message, reason="kind")
    # Not splitlines() and strip(), which accept more line ends and spaces than FORMAT.md does.
    lines = (line.strip(_SPACES) for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def parse(data: bytes, what: str, kind: Kind) -> tuple[dict[str, str], list[str]]:
    """The fields, and the lines that the checksum covers. No message shows a line of the file."""
    lines = text_lines(data, what, kind.called, f"Name {kind.made}.")
    _check_kind(lines, what, kind)
    if any(line.startswith("selcrypt-") for line in lines[1:]):
        message = f"{what}: expected one key per file, got more than one. Split the file."
        raise GrantError(message, reason="kind")
    pairs = [[part.strip(_SPACES) for part in line.partition(":")[::2]] for line in lines[1:]]
    fields = dict(pairs)
    locked = kind.private and "sealed" in fields
    known = (*kind.fields, *(("kdf", "salt", "sealed") if locked else ("key",)), "checksum")
    needed = sorted({*known} - kind.optional)
    missing = [name for name in needed if name not in fields]
    if missing or not fields.keys() <= {*known} or len(fields) < len(pairs):
        got = f"no {', '.join(missing)}" if missing else "unknown or repeated ones too"
        if not missing:
            _check_lines([name for name, _ in pairs], what, kind)
        raise damaged(what, f"expected the fields {', '.join(needed)}, got {got}")
    order = [name for name in known if name in fields and name != "checksum"]
    canonical = [f"{kind.name}-v1", *(f"{name}: {fields[name]}" for name in order)]
    if fields["checksum"] != checksum(canonical):
        raise damaged(what, "the checksum does not match")
    return fields, canonical


def _check_kind(lines: Sequence[str], what: str, kind: Kind) -> None:
    first = lines[0] if lines else ""
    name, _, version = first.rpartition("-v")
    start = f"{kind.name}-v1"
    if first == start:
        return
    if name == kind.name and version.isdecimal():
        problem = f"expected version 1, got version {version[:9]}. Update selcrypt-jax."
    elif first.startswith(start):
        problem = (
            f"expected one field per line, got {kind.called} whose line breaks were lost. Copy it "
            "again with its line breaks, or ask for the file itself instead of its text."
        )
    else:
        actual = "a file that is not selcrypt's" if first else "an empty file"
        for begin, text in _OTHERS.items():
            if first.startswith(begin):
                actual = text
        remedy = f"Name {kind.made}."
        marks = (start, _SEALED) if kind is GRANT else (start,)
        if any(mark in line for mark in marks for line in lines):
            actual = "other text or a > before it"
            remedy = 'Keep only its own lines, without "> " and without the text around them.'
        problem = f"expected {kind.called}, which begins with {start}, got {actual}. {remedy}"
    raise GrantError(f"{what}: {problem}", reason="kind")


def _check_lines(names: Sequence[str], what: str, kind: Kind) -> None:
    """Names the lines that a mail program folded, or that are not the file's.

    Args:
        names: the names of the fields, in order; of other lines, any text, which may be secret.
        what: the file, for messages.
        kind: the expected kind.
    """
    known = {*kind.fields, "kdf", "salt", "sealed", "key", "checksum"}
    folded: list[str] = []
    last = "comment"  # directly below the first line
    for name in names:
        if name in known:
            last = name
        elif last not in folded:
            folded.append(last)
    if folded == ["checksum"]:  # too short to be folded
        raise GrantError(
            f"{what}: expected nothing below the checksum, got other text. Keep only the lines "
            f"from {kind.name}-v1 to the checksum.",
            reason="damaged",
        )
    if folded:
        raise GrantError(
            f"{what}: expected one field per line, got broken lines: {', '.join(folded)}. Join "
            "each with the lines below it that have no name, or ask for the file itself instead of "
            "its text.",
            reason="damaged",
        )


def damaged(what: str | os.PathLike[str], problem: str) -> GrantError:
    """The error for a damaged or mistyped key file."""
    return GrantError(
        f"{what}: {problem}. The file is truncated, damaged or mistyped: use another copy, or ask "
        "for it again.",
        reason="damaged",
    )
