"""Keys and grants as short text files. See FORMAT.md, "Grants and keys"."""

import base64
import hashlib
import os
import re
import stat
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from .._io.atomic import new_file
from .._keys.keys import KEY_BYTES, MAX_LEVELS, Grant, LevelKey, Secret, SigningKey, hkdf

AnyPath = str | os.PathLike[str]
Passphrase = str | Callable[[], str] | None

_MAX_BYTES = 1 << 16
_SALT_BYTES = 16
_NONCE_BYTES = 12
_AGE = (b"-----BEGIN AGE ENCRYPTED FILE-----", b"age-encryption.org/")


class _Kind(NamedTuple):
    """A kind of file.

    Attributes:
        name: in its first line, before the version.
        called: in messages.
        made: what it is called where its owner has it, for messages.
        private: whether it holds a secret.
        fields: the ones in the clear; ``key`` comes after them.
        comment: what its owner should know.
    """

    name: str
    called: str
    made: str
    private: bool
    fields: tuple[str, ...]
    comment: str


_SECRET = _Kind(
    "selcrypt-secret", "a secret", "the secret.key that selcrypt keygen made", True, (),
    "All grants of your models come from this. Keep it secret, and keep a copy of it.",
)  # fmt: skip
_SIGNING = _Kind(
    "selcrypt-signing-key", "a signing key (private)",
    "the signing.key that selcrypt keygen made", True, (),
    "Whoever has this can sign models in your name: keep it secret.",
)  # fmt: skip
_VERIFY = _Kind(
    "selcrypt-verify-key", "a verify key (public)",
    "the signing.pub that selcrypt keygen made", False, (),
    "For everybody: shows that a model is signed by its owner.",
)  # fmt: skip
_GRANT = _Kind(
    "selcrypt-grant", "a grant",
    "the file that selcrypt grant made", True, ("model-id", "level", "signer"),
    "Opens a level of one model, and those below it: keep it secret.",
)  # fmt: skip
_KINDS = {kind.name: kind for kind in (_SECRET, _SIGNING, _VERIFY, _GRANT)}
_OPTIONAL = {"signer"}
_LOCK = ("kdf", "salt", "sealed")
_SPACES = " \t\r"
_DAMAGED = "The file is cut off, damaged or mistyped: take another copy, or ask for it again."


def write_secret(
    path: AnyPath, secret: Secret, *, passphrase: str | None = None, force: bool = False
) -> None:
    """Writes the owner's secret to a file that only they may read.

    Args:
        path: of the file, in a folder that exists.
        secret: the owner's.
        passphrase: locks the file (Argon2id, ChaCha20-Poly1305).
        force: replace an existing file; what was protected with it can never be opened again.

    Raises:
        FileExistsError: there is such a file, and no `force`.
        OSError: it cannot be written.
    """
    _check_type(secret, Secret, "secret", "Pass Secret(...).")
    _write(path, _text(_SECRET, {}, bytes(secret), passphrase), _SECRET, force)


def read_secret(path: AnyPath, *, passphrase: Passphrase = None) -> Secret:
    """Reads the owner's secret.

    Args:
        path: of the file; a pipe works.
        passphrase: or a function that asks for it, called if the file is locked.

    Raises:
        ValueError: not such a file, a damaged one, or a wrong passphrase.
        OSError: it cannot be read.
    """
    return Secret(_load(path, _SECRET, passphrase)[1])


def write_signing_key(
    path: AnyPath, key: SigningKey, *, passphrase: str | None = None, force: bool = False
) -> None:
    """Writes the owner's signing key; arguments and errors as `write_secret`."""
    _check_type(key, SigningKey, "key", "Pass SigningKey(...).")
    _write(path, _text(_SIGNING, {}, bytes(key), passphrase), _SIGNING, force)


def read_signing_key(path: AnyPath, *, passphrase: Passphrase = None) -> SigningKey:
    """Reads the owner's signing key; arguments and errors as `read_secret`."""
    return SigningKey(_load(path, _SIGNING, passphrase)[1])


def write_verify_key(path: AnyPath, public: bytes, *, force: bool = False) -> None:
    """Writes the public half of a signing key, for everybody.

    Args:
        path: of the file.
        public: 32 bytes, `SigningKey.public`.
        force: replace an existing file.

    Raises:
        ValueError: not 32 bytes.
        FileExistsError: there is such a file, and no `force`.
        OSError: it cannot be written.
    """
    _check_public(public, "public")
    _write(path, _text(_VERIFY, {}, public, None), _VERIFY, force)


def read_verify_key(path: AnyPath) -> bytes:
    """The 32 bytes of an owner's public key; errors as `read_secret`."""
    return _load(path, _VERIFY, None)[1]


def write_grant(
    path: AnyPath,
    grant: Grant,
    *,
    passphrase: str | None = None,
    recipients: Sequence[str] = (),
    force: bool = False,
) -> None:
    """Writes a grant to a file that only its owner may read.

    Args:
        path: of the file, in a folder that exists.
        grant: see `Grant`.
        passphrase: locks the file (Argon2id, ChaCha20-Poly1305).
        recipients: seals the file to these age (``age1...``) or SSH public keys, so that it can
            travel in the open. Needs the extra ``age``.
        force: replace an existing file.

    Raises:
        ValueError: something that is no recipient.
        FileExistsError: there is such a file, and no `force`.
        ModuleNotFoundError: recipients, and the extra ``age`` is not installed.
        OSError: it cannot be written.
    """
    _check_type(
        grant, Grant, "grant", "Pass what issue_grant returns, or Grant(level_key, signer)."
    )
    _check_type(grant.key, LevelKey, "grant.key", "Make one with level_key.")
    fields = {"model-id": grant.key.model_id.hex(), "level": str(grant.key.level)}
    if grant.signer is not None:
        _check_public(grant.signer, "grant.signer")
        fields["signer"] = grant.signer.hex()
    text = _text(_GRANT, fields, bytes(grant.key), passphrase)
    if recipients:
        pyrage = _pyrage()
        keys = [_recipient(pyrage, text) for text in recipients]
        text = pyrage.encrypt(text, keys, armored=True)
    _write(path, text, _GRANT, force)


def read_grant(
    path: AnyPath, *, passphrase: Passphrase = None, identities: Sequence[AnyPath] = ()
) -> Grant:
    """Reads a grant.

    Args:
        path: of the file; a pipe works.
        passphrase: or a function that asks for it, called if the file is locked.
        identities: files with age or SSH private keys, for a grant that is sealed to one of them.

    Raises:
        ValueError: not such a file, a damaged one, a wrong passphrase, or sealed to others.
        ModuleNotFoundError: it is sealed, and the extra ``age`` is not installed.
        OSError: it cannot be read.
    """
    fields, value = _load(path, _GRANT, passphrase, identities)
    try:
        model_id, level = _hex(fields["model-id"], "model-id"), _level(fields["level"])
        signer = _hex(fields["signer"], "signer") if "signer" in fields else None
        if signer is not None and len(signer) != KEY_BYTES:
            raise ValueError(f"signer: expected {KEY_BYTES} bytes, got {len(signer)}")
        return Grant(LevelKey(value, level=level, model_id=model_id), signer)
    except ValueError as error:
        text = str(error).removesuffix(".")
        raise ValueError(f"{path}: {text}. The grant is damaged: ask for it again.") from None


def _check_type(value: object, expected: type, name: str, remedy: str) -> None:
    # bytes(32) is 32 zeros: without this check, a number would be written as a key.
    if not isinstance(value, expected):
        raise TypeError(
            f"{name}: expected a {expected.__name__}, got {type(value).__name__}. {remedy}"
        )


def _check_public(public: bytes, name: str) -> None:
    remedy = "Pass the `public` of a SigningKey."
    _check_type(public, bytes, name, remedy)
    if len(public) != KEY_BYTES:
        raise ValueError(f"{name}: expected {KEY_BYTES} bytes, got {len(public)}. {remedy}")


def _hex(text: str, field: str) -> bytes:
    # fromhex() takes upper case and spaces, too.
    if not re.fullmatch("(?:[0-9a-f]{2})+", text):
        raise ValueError(f"{field}: expected hex in lower case, got something else")
    return bytes.fromhex(text)


def _level(text: str) -> int:
    # Not int() alone, which takes 0_2 and other scripts' digits, and shows what it refuses.
    if not (re.fullmatch("[1-9][0-9]{0,8}", text) and int(text) <= MAX_LEVELS):
        raise ValueError(f"level: expected a number 1..{MAX_LEVELS}, got something else")
    return int(text)


# --- text ---------------------------------------------------------------------------------------


def _text(kind: _Kind, fields: Mapping[str, str], value: bytes, passphrase: str | None) -> bytes:
    lines = [f"{kind.name}-v1", *(f"{name}: {text}" for name, text in fields.items())]
    if passphrase is None:
        lines.append(f"key: {base64.b64encode(value).decode()}")
    else:
        salt, nonce = os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
        lines += [
            "kdf: argon2id iterations=3 lanes=4 memory-kib=65536",
            f"salt: {base64.b64encode(salt).decode()}",
        ]
        aead = _lock(passphrase, salt, {"iterations": 3, "lanes": 4, "memory-kib": 65536})
        sealed = nonce + aead.encrypt(nonce, value, "\n".join(lines).encode())
        lines.append(f"sealed: {base64.b64encode(sealed).decode()}")
    lines.append(f"checksum: {_checksum(lines)}")
    return "\n".join([lines[0], f"# {kind.comment}", *lines[1:], ""]).encode()


def _checksum(lines: Sequence[str]) -> str:
    """Tells a typing error from a wrong key."""
    return hashlib.sha256(b"selcrypt/v1/file\0" + "\n".join(lines).encode()).hexdigest()[:16]


def _lock(passphrase: str, salt: bytes, costs: Mapping[str, int]) -> ChaCha20Poly1305:
    stretched = Secret.from_passphrase(
        passphrase,
        salt,
        iterations=costs["iterations"],
        lanes=costs["lanes"],
        memory_kib=costs["memory-kib"],
    )
    return ChaCha20Poly1305(hkdf(bytes(stretched), b"file"))


def _parse(
    data: bytes, what: str, kind: _Kind, passphrase: Passphrase
) -> tuple[dict[str, str], bytes]:
    """The fields, and the 32 bytes. No message shows a line: it may be a secret."""
    lines = _lines(data, what, kind.called, f"Name {kind.made}.")
    _check_kind(lines[0] if lines else "", what, kind)
    fields: dict[str, str] = {}
    known = (*kind.fields, "key", *(_LOCK if kind.private else ()), "checksum")
    for number, line in enumerate(lines[1:], 2):
        name, colon, text = (part.strip(_SPACES) for part in line.partition(":"))
        if line.startswith("selcrypt-") and not colon:
            raise ValueError(f"{what}: expected one key in a file, got another. Split them.")
        if not colon or name not in known:
            raise ValueError(
                f"{what}: line {number} (comments not counted): expected 'name: value' with one "
                f"of the names {', '.join(known)}, got something else. {_DAMAGED}"
            )
        if name in fields:
            raise ValueError(f"{what}: field {name!r}: expected it once, got it twice. {_DAMAGED}")
        fields[name] = text
    locked = "sealed" in fields
    needed = {*kind.fields, "checksum", *(_LOCK if locked else ("key",))} - _OPTIONAL
    missing = sorted(needed - set(fields))
    if missing:
        raise ValueError(
            f"{what}: expected the fields {', '.join(sorted(needed))}, got no "
            f"{', '.join(missing)}. {_DAMAGED}"
        )
    if (locked and "key" in fields) or (not locked and set(_LOCK) & set(fields)):
        raise ValueError(
            f"{what}: expected the fields {', '.join(sorted(needed))}, got "
            f"{', '.join(sorted(fields)) or 'none'}. {_DAMAGED}"
        )
    order = [name for name in known if name in fields and name != "checksum"]
    canonical = [f"{kind.name}-v1", *(f"{name}: {fields[name]}" for name in order)]
    if fields["checksum"] != _checksum(canonical):
        raise ValueError(f"{what}: the checksum does not fit. {_DAMAGED}")
    if not locked:
        value = _base64(fields["key"], what, "key", KEY_BYTES)
        return fields, value
    return fields, _unlock(fields, canonical, what, passphrase)


def _unlock(
    fields: Mapping[str, str], canonical: Sequence[str], what: str, passphrase: Passphrase
) -> bytes:
    name, *pairs = fields["kdf"].split()
    limits = {"iterations": 16, "lanes": 16, "memory-kib": 1 << 20}
    costs = {key: text for key, _, text in (pair.partition("=") for pair in pairs)}
    if (
        name != "argon2id"
        or set(costs) != set(limits)
        or not all(text.isascii() and text.isdigit() and len(text) < 9 for text in costs.values())
        or not all(1 <= int(costs[key]) <= limit for key, limit in limits.items())
        or int(costs["memory-kib"]) < 8 * int(costs["lanes"])
    ):
        raise ValueError(
            f"{what}: field 'kdf': expected argon2id with at most {limits}, got something else. "
            "The file is damaged, or from another version."
        )
    salt = _base64(fields["salt"], what, "salt", _SALT_BYTES)
    sealed = _base64(fields["sealed"], what, "sealed", _NONCE_BYTES + KEY_BYTES + 16)
    if passphrase is None:
        raise ValueError(
            f"{what}: is locked with a passphrase, got none. Pass it: "
            "--passphrase-file FILE, or passphrase=... of the function that reads it (read_grant)."
        )
    words = passphrase if isinstance(passphrase, str) else passphrase()
    aead = _lock(words, salt, {key: int(text) for key, text in costs.items()})
    try:
        return aead.decrypt(
            sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], "\n".join(canonical[:-1]).encode()
        )
    except InvalidTag:
        raise ValueError(
            f"{what}: wrong passphrase. Use the one that it was locked with, letter by letter."
        ) from None


def _lines(data: bytes, what: str, expected: str, remedy: str) -> list[str]:
    actual, text = "", ""
    if len(data) > _MAX_BYTES:
        actual = f"more than {_MAX_BYTES} bytes"
    elif data.startswith((b"\xff\xfe", b"\xfe\xff")) or (
        len(data) > 1 and not (any(data[:64:2]) and any(data[1:64:2]))
    ):
        actual, remedy = "UTF-16", "Save it as UTF-8."
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            actual = f"{len(data)} bytes of something else"
    if actual:
        raise ValueError(f"{what}: expected UTF-8 text, {expected}, got {actual}. {remedy}")
    # Not splitlines() and strip(), which know more ends of lines and spaces than FORMAT.md does.
    lines = (line.strip(_SPACES) for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def _check_kind(first: str, what: str, kind: _Kind) -> None:
    name, _, version = first.rpartition("-v")
    if name == kind.name and version == "1":
        return
    if name in _KINDS and version.isascii() and version.isdigit():
        if name == kind.name:
            raise ValueError(
                f"{what}: expected version 1, got version {version[:9]}. Update selcrypt-jax."
            )
        actual = _KINDS[name].called
    elif first.startswith("AGE-SECRET-KEY-"):
        actual = "an age identity (for --identity)"
    elif first.startswith("-----BEGIN AGE"):
        actual = "something sealed with age, which only a grant can be"
    elif first.startswith("-----BEGIN"):
        actual = "a PEM file"
    elif first.startswith(("age1", "ssh-")):
        actual = "the public key of a recipient"
    else:
        actual = "no file of selcrypt's" if first else "an empty file"
    raise ValueError(
        f"{what}: expected {kind.called}, which begins with {kind.name}-v1, got {actual}. Name "
        f"{kind.made}."
    )


def _base64(text: str, what: str, field: str, size: int) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        data = b""
    # Of a content there is one encoding: others differ in bits that say nothing.
    if len(data) != size or base64.b64encode(data).decode() != text:
        raise ValueError(
            f"{what}: field {field!r}: expected {size} bytes in base64, got something else. "
            f"{_DAMAGED}"
        )
    return data


# --- files --------------------------------------------------------------------------------------


def _write(path: AnyPath, data: bytes, kind: _Kind, force: bool) -> None:
    try:
        with new_file(path, force=force, private=kind.private) as file:
            file.write(data)
    except FileExistsError:
        raise FileExistsError(
            f"{path}: exists already, and {kind.called} is not overwritten. Name another file; "
            "with force=True (--force) it is replaced, and what only it could open is lost."
        ) from None


def _load(
    path: AnyPath, kind: _Kind, passphrase: Passphrase, identities: Sequence[AnyPath] = ()
) -> tuple[dict[str, str], bytes]:
    """The fields and the 32 bytes of a key file."""
    _check_path(path)
    data, open_to_others = _read(path)
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    if kind is _GRANT and start.startswith(_AGE):
        data, open_to_others = _unseal(start, str(path), identities), False
    found = _parse(data, str(path), kind, passphrase)
    if kind.private and open_to_others:
        warnings.warn(
            f"{path}: others may read this file, which holds {kind.called}. Run: chmod 600 {path}",
            stacklevel=3,
        )
    return found


def _read(path: AnyPath) -> tuple[bytes, bool]:
    """Its content, and whether others than its owner may read it. Once, since it may be a pipe."""
    with open(path, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        open_to_others = os.name == "posix" and stat.S_ISREG(mode) and bool(mode & 0o077)
        return file.read(_MAX_BYTES + 1), open_to_others


# --- age ----------------------------------------------------------------------------------------


def _pyrage() -> Any:
    try:
        import pyrage
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "grants that are sealed with age need pyrage, which is not installed. Install the "
            "extra: pip install 'selcrypt-jax[age]'",
            name=error.name,
        ) from error
    return pyrage


def _recipient(pyrage: Any, text: str) -> Any:
    kind = pyrage.ssh if text.startswith("ssh-") else pyrage.x25519
    try:
        return kind.Recipient.from_str(text.strip())
    except pyrage.RecipientError:
        # Not the text: it may be a private key that was passed by mistake.
        raise ValueError(
            "recipient: expected an age (age1...) or SSH (ssh-ed25519 ...) public key, got "
            "something else. Copy it again, whole and in one line."
        ) from None


def _check_path(path: AnyPath) -> None:
    """Refuses a key in the place of its file, before a message shows it."""
    text = os.fspath(path)
    if isinstance(text, str) and re.fullmatch("AGE-SECRET-KEY-.*|[A-Za-z0-9+/]{43}=", text.strip()):
        raise ValueError(
            "key: expected the path of a file, got a key itself. Save it in a file that only you "
            "can read, and name that."
        )


def _unseal(data: bytes, what: str, identities: Sequence[AnyPath]) -> bytes:
    if not identities:
        raise ValueError(
            f"{what}: is sealed to somebody's age or SSH key, expected that private key, got "
            "none. Pass it: --identity FILE, or read_grant(path, identities=[FILE])."
        )
    for path in identities:
        _check_path(path)
    pyrage = _pyrage()
    keys = [key for path in identities for key in _identities(pyrage, Path(path))]
    try:
        return pyrage.decrypt(data, keys)
    except pyrage.DecryptError:
        raise ValueError(
            f"{what}: is not sealed to the keys in {', '.join(map(str, identities))}, or damaged. "
            "Name another identity, or send the owner your public key and ask for a new grant."
        ) from None


def _identities(pyrage: Any, path: Path) -> list[Any]:
    data = path.read_bytes()
    try:
        if data.lstrip().startswith(b"-----BEGIN"):
            return [pyrage.ssh.Identity.from_buffer(data)]
        lines = _lines(data, str(path), "a private key", "Name the file with your private key.")
        found = [pyrage.x25519.Identity.from_str(line) for line in lines]
    except pyrage.IdentityError:
        found = []
    if not found:
        raise ValueError(
            f"{path}: expected an age identity (AGE-SECRET-KEY-1...) or an SSH private key without "
            "a passphrase, got something else. Name the file with your private key."
        )
    return found
