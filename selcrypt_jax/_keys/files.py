"""Reads and writes keys and grants as short text files. See FORMAT.md, "Grants and keys"."""

import base64
import os
import re
import stat
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from .._io.atomic import new_file
from .._io.errors import GrantError
from .material import KEY_BYTES, SALT_BYTES, KeyMaterial, forgetting, hkdf, stretched
from .text import MAX_BYTES, Kind, checksum, damaged, parse

AnyPath = str | os.PathLike[str]
Passphrase = str | Callable[[], str] | None
"""A passphrase, or a function that asks for it."""

_NONCE_BYTES, _TAG_BYTES = 12, 16
_COSTS = {"iterations": 3, "lanes": 4, "memory_kib": 65536}
_KDF = "argon2id iterations={iterations} lanes={lanes} memory-kib={memory_kib}"
_LIMITS = {"iterations": 16, "lanes": 16, "memory_kib": 1 << 20}
_MOST_WORK = 1 << 21  # KiB times iterations: about three seconds
# A line that is 32 bytes as base64, also URL-safe, or in hex; or a line of a key file, however
# damaged. Not any line break: the names of files may have one.
_KEY_ITSELF = re.compile(
    r"(^|\s)([a-z0-9+/_-]{43}=|[0-9a-f]{64})$|^(age-secret-key-|-----begin)"
    r"|^(selcrypt-[a-z-]+-v\d+|key: \S+|sealed: \S+)\s",
    re.IGNORECASE | re.MULTILINE,
)


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
    fields, canonical = parse(data if inner is None else inner, str(path), kind)
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
