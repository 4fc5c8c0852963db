"""Files sealed to a recipient's age or SSH key; needs the extra ``age``."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._io.errors import GrantError, extra
from .files import check_path
from .text import MAX_BYTES, text_lines

_STARTS = (b"-----BEGIN AGE ENCRYPTED FILE-----", b"age-encryption.org/")


def sealed(data: bytes, recipients: Sequence[str]) -> bytes:
    """Seals a file to age (``age1...``) or SSH public keys.

    Raises:
        ValueError: one of them is not a recipient.
        ModuleNotFoundError: the extra ``age`` is not installed.
    """
    pyrage = _pyrage()
    keys = []
    for text in recipients:
        kind = pyrage.ssh if text.startswith("ssh-") else pyrage.x25519
        try:
            keys.append(kind.Recipient.from_str(text.strip()))
        except pyrage.RecipientError:
            # The message omits the text: it may be a private key that was passed by mistake.
            raise ValueError(
                "recipient: expected an age (age1...) or SSH (ssh-ed25519 ...) public key, got "
                "something else. Copy it again, whole and on one line."
            ) from None
    return pyrage.encrypt(data, keys, armored=True)


def unsealed(data: bytes, what: str, identities: Sequence[str | os.PathLike[str]]) -> bytes | None:
    """Opens what `sealed` made; None if the data are not sealed.

    Raises:
        GrantError: the data are sealed to other keys, or damaged.
        ModuleNotFoundError: the extra ``age`` is not installed.
    """
    data = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not data.startswith(_STARTS):
        return None
    if not identities:
        raise GrantError(
            f"{what}: is sealed to an age or SSH key, expected the matching private key, got none. "
            "Pass it: --identity FILE, or Grant.read(path, identities=[FILE]).",
            reason="recipient",
        )
    for path in identities:
        check_path(path, "identity")
    pyrage = _pyrage()
    keys = [key for path in identities for key in _identities(pyrage, Path(path))]
    try:
        return pyrage.decrypt(data, keys)
    except pyrage.DecryptError:
        raise GrantError(
            f"{what}: is not sealed to any key in {', '.join(map(str, identities))}, or is "
            "damaged. Name another identity, or send the owner your public key and ask for a new "
            "grant.",
            reason="recipient",
        ) from None


def _identities(pyrage: Any, path: Path) -> list[Any]:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        if data.lstrip().startswith(b"-----BEGIN"):
            return [pyrage.ssh.Identity.from_buffer(data)]
        lines = text_lines(data, str(path), "a private key", "Name the file with your private key.")
        found = [pyrage.x25519.Identity.from_str(line) for line in lines]
    except pyrage.IdentityError:
        found = []
    if not found:
        raise GrantError(
            f"{path}: expected an age identity (AGE-SECRET-KEY-1...) or an SSH private key without "
            "a passphrase, got something else. Name the file with your private key.",
            reason="recipient",
        )
    return found


def _pyrage() -> Any:
    try:
        import pyrage
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"grants that are sealed with age need pyrage, which is not installed. {extra('age')}.",
            name=error.name,
        ) from error
    return pyrage
