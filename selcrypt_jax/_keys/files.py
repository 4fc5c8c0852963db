"""Keys and grants as short text files. See FORMAT.md, "Grants and keys"."""

import base64
import hashlib
import os
import re
import stat
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from .._io.atomic import new_file
from .._io.errors import GrantError, counted
from .material import KEY_BYTES, SALT_BYTES, KeyMaterial, forgetting, hkdf, stretched

AnyPath = str | os.PathLike[str]
Passphrase = str | Callable[[], str] | None
"""A passphrase, or a function that asks for it."""

MAX_BYTES = 1 << 16
_NONCE_BYTES, _TAG_BYTES = 12, 16
_COSTS = {"iterations": 3, "lanes": 4, "memory_kib": 65536}
_KDF = "argon2id iterations={iterations} lanes={lanes} memory-kib={memory_kib}"
_LIMITS = {"iterations": 16, "lanes": 16, "memory_kib": 1 << 20}
_MOST_WORK = 1 << 21  # KiB times iterations: about three seconds
_SPACES = " \t\r"
_SEALED = "-----BEGIN AGE ENCRYPTED FILE-----"
# A line that is 32 bytes as base64, also URL-safe, or in hex; or a line of a key file, however
# damaged. Not any line break: the names of files may have one.
_KEY_ITSELF = re.compile(
    r"(^|\s)([a-z0-9+/_-]{43}=|[0-9a-f]{64})$|^(age-secret-key-|-----begin)"
    r"|^(selcrypt-[a-z-]+-v\d+|key: \S+|sealed: \S+)\s",
    re.IGNORECASE | re.MULTILINE,
)


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


class StoredKey(KeyMaterial):
    """Key material that is stored in a text file."""

    __slots__ = ()
    _kind: ClassVar[Kind]

    @classmethod
    @forgetting
    def read(cls, path: AnyPath, *, passphrase: Passphrase = None) -> Self:
        """Reads what `write` wrote.

        Args:
            path: the file's path; a pipe works too, and is waited for.
            passphrase: the passphrase, or a function that asks for it, called only if the file is
                locked.

        Raises:
            GrantError: the file is of another kind or damaged, or the passphrase is wrong.
            OSError: the file cannot be read.
        """
        return cls(read_key_file(path, cls._kind, passphrase)[1])

    @forgetting
    def write(self, path: AnyPath, *, passphrase: Passphrase = None, force: bool = False) -> None:
        """Writes a file that only its owner may read.

        Args:
            path: the file's path, in a folder that exists.
            passphrase: locks the file (Argon2id, ChaCha20-Poly1305); or a function that returns it.
            force: replace an existing file. Without a copy of the old key, everything that needs it
                is lost.

        Raises:
            FileExistsError: the file exists, and `force` is not set.
            OSError: the file cannot be written.
        """
        write_key_file(path, self._kind, bytes(self), passphrase=passphrase, force=force)


# --- writing ------------------------------------------------------------------------------------


def write_key_file(
    path: AnyPath,
    kind: Kind,
    value: bytes,
    fields: Mapping[str, str] | None = None,
    *,
    passphrase: Passphrase = None,
    sealed: Callable[[bytes], bytes] = bytes,
    force: bool,
) -> None:
    """Writes a key file, whole or not at all; a private one is readable by its owner only.

    Args:
        path: the file's path.
        kind: the kind of key.
        value: 32 bytes.
        fields: plaintext fields.
        passphrase: locks the file.
        sealed: seals the file's text to a recipient.
        force: replace an existing file.
    """
    data = sealed(key_text(kind, value, fields, passphrase=passphrase))
    try:
        with new_file(path, force=force, private=kind.private, keep=False) as file:
            file.write(data)
    except FileExistsError:
        raise FileExistsError(
            f"{path}: already exists, and {kind.called} is not overwritten. Name another file; "
            f"with force=True (--force) it is replaced{kind.lost}."
        ) from None


def key_text(
    kind: Kind,
    value: bytes,
    fields: Mapping[str, str] | None = None,
    *,
    passphrase: Passphrase = None,
) -> bytes:
    """The text of a key file; see `write_key_file`."""
    lines = [f"{kind.name}-v1", *(f"{name}: {text}" for name, text in (fields or {}).items())]
    if passphrase is None:
        lines.append(f"key: {_encoded(value)}")
    else:
        salt, nonce = os.urandom(SALT_BYTES), os.urandom(_NONCE_BYTES)
        lines += [f"kdf: {_KDF.format(**_COSTS)}", f"salt: {_encoded(salt)}"]
        lock = _lock(passphrase, salt, _COSTS)
        locked = nonce + lock.encrypt(nonce, value, "\n".join(lines).encode())
        lines.append(f"sealed: {_encoded(locked)}")
    lines.append(f"checksum: {checksum(lines)}")
    return "\n".join([lines[0], f"# {kind.comment}", *lines[1:], ""]).encode()


def checksum(lines: Sequence[str]) -> str:
    """Distinguishes a typing error from a wrong key."""
    return hashlib.sha256(b"selcrypt/v1/file\0" + "\n".join(lines).encode()).hexdigest()[:16]


def _lock(
    passphrase: str | Callable[[], str], salt: bytes, costs: Mapping[str, int]
) -> ChaCha20Poly1305:
    passphrase = passphrase() if callable(passphrase) else passphrase
    return ChaCha20Poly1305(hkdf(stretched(passphrase, salt, **costs), b"file"))


def _encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()


# --- reading ------------------------------------------------------------------------------------


def read_key_file(
    path: AnyPath,
    kind: Kind,
    passphrase: Passphrase = None,
    unsealed: Callable[[bytes], bytes | None] = lambda _: None,
) -> tuple[dict[str, str], bytes]:
    """The fields and the 32 bytes of a key file.

    Args:
        path: the file's path.
        kind: the expected kind.
        passphrase: the passphrase, or a function that asks for it.
        unsealed: opens a file that is sealed to a recipient, and returns None for any other.

    Raises:
        GrantError: see `StoredKey.read`.
        OSError: the file cannot be read.
    """
    check_path(path, kind.name.removeprefix("selcrypt-").replace("-", " "), private=kind.private)
    with open(path, "rb") as file:  # once, since it may be a pipe
        mode = os.fstat(file.fileno()).st_mode
        data = file.read(MAX_BYTES + 1)
    inner = unsealed(data)
    fields, canonical = _parse(data if inner is None else inner, str(path), kind)
    if "sealed" in fields:
        value = _unlocked(fields, canonical, str(path), passphrase)
    else:
        value = _decoded(fields["key"], str(path), "key", KEY_BYTES)
    exposed = os.name == "posix" and stat.S_ISREG(mode) and mode & 0o077
    if kind.private and inner is None and exposed:
        warnings.warn(
            f"{path}: others may read this file, which holds {kind.called}. Run: chmod 600 {path}",
            stacklevel=4,  # past `forgetting`
        )
    return fields, value


def check_path(path: AnyPath, what: str, *, private: bool = True) -> None:
    """Refuses a key or grant that was passed instead of its file, before a message shows it."""
    text = os.fspath(path)
    if isinstance(text, str) and _KEY_ITSELF.search(text.strip()):
        remedy = "Save it in a file that only you can read, and name that file."
        raise ValueError(
            f"{what}: expected the path of a file, got its text or a key. "
            + (remedy if private else "Name the file, such as the owner's signing.pub.")
        )


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


def _parse(data: bytes, what: str, kind: Kind) -> tuple[dict[str, str], list[str]]:
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


def _unlocked(
    fields: Mapping[str, str], canonical: Sequence[str], what: str, passphrase: Passphrase
) -> bytes:
    pattern = _KDF.format(**{name: rf"(?P<{name}>[0-9]{{1,8}})" for name in _LIMITS})
    found = re.fullmatch(pattern, fields["kdf"])
    costs = {name: int(text) for name, text in found.groupdict().items()} if found else {}
    if (
        not costs
        or not all(1 <= costs[name] <= limit for name, limit in _LIMITS.items())
        or costs["memory_kib"] < 8 * costs["lanes"]
        or costs["memory_kib"] * costs["iterations"] > _MOST_WORK
    ):
        limits = f"{_KDF.format(**_LIMITS)}, and iterations times memory-kib {_MOST_WORK}"
        raise damaged(what, f"field 'kdf': expected at most {limits}, got something else")
    salt = _decoded(fields["salt"], what, "salt", SALT_BYTES)
    sealed = _decoded(fields["sealed"], what, "sealed", _NONCE_BYTES + KEY_BYTES + _TAG_BYTES)
    if passphrase is None:
        raise GrantError(
            f"{what}: is locked with a passphrase, got none. Pass it: --passphrase-file FILE, or "
            "read(path, passphrase=...).",
            reason="passphrase",
        )
    lock = _lock(passphrase, salt, costs)
    nonce, text = sealed[:_NONCE_BYTES], "\n".join(canonical[:-1])
    try:
        return lock.decrypt(nonce, sealed[_NONCE_BYTES:], text.encode())
    except InvalidTag:
        raise GrantError(
            f"{what}: wrong passphrase. Type exactly the one that the file was locked with.",
            reason="passphrase",
        ) from None


def _decoded(text: str, what: str, field: str, size: int) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        data = b""
    # Each value has one encoding: any other differs only in bits that carry no data.
    if len(data) != size or _encoded(data) != text:
        raise damaged(what, f"field {field!r}: expected {size} bytes in base64, got something else")
    return data


def damaged(what: AnyPath, problem: str) -> GrantError:
    """The error for a damaged or mistyped key file."""
    return GrantError(
        f"{what}: {problem}. The file is truncated, damaged or mistyped: use another copy, or ask "
        "for it again.",
        reason="damaged",
    )
