"""Options that several commands share."""

import getpass
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import UseAppendAction, arg

from .._io.atomic import check_output
from .._keys.grant import Grant
from .._keys.keys import Secret
from .._keys.signing import SigningKey

Flat = arg(name="")
"""For a parameter whose fields are options of the command itself."""

Output = Annotated[Path, arg(aliases=["-o"])]
AnyGrantFile = Annotated[Path | None, arg(aliases=["-g"])]


@dataclass(frozen=True)
class Writing:
    """How results are written.

    Attributes:
        force: Replace an existing output file. (A folder is never replaced.)
        as_json: Print JSON.
    """

    force: bool = False
    as_json: Annotated[bool, arg(name="json")] = False

    def say(self, result: dict[str, Any], text: str) -> None:
        """Prints the result as JSON, or the text."""
        print(json.dumps(result, indent=2) if self.as_json else text)


@dataclass(frozen=True)
class Printing:
    """How results are printed.

    Attributes:
        as_json: Print JSON.
    """

    as_json: Annotated[bool, arg(name="json")] = False


@dataclass(frozen=True)
class OwnerSecret:
    """The owner's secret.

    Attributes:
        secret: Your secret.key.
        passphrase_file: The passphrase of your keys, if they have one and nobody is there to type
            it.
    """

    secret: Path
    passphrase_file: Path | None = None

    def read_secret(self) -> Secret:
        """Reads it; asks for a passphrase if it has one."""
        return Secret.read(self.secret, passphrase=ask(self.passphrase_file, self.secret))

    @property
    def files(self) -> list[Path | None]:
        """Files that no output may replace."""
        return [self.secret, self.passphrase_file]


@dataclass(frozen=True)
class OwnerKeys(OwnerSecret):
    """The owner's keys.

    Attributes:
        signing: Your signing.key.
    """

    signing: Path | None = None

    def read_signing(self) -> SigningKey | None:
        """Reads the signing key, if there is one."""
        if self.signing is None:
            return None
        return SigningKey.read(self.signing, passphrase=ask(self.passphrase_file, self.signing))

    @property
    def files(self) -> list[Path | None]:
        """Files that no output may replace."""
        return [*super().files, self.signing]


@dataclass(frozen=True)
class Opening:
    """How a grant is opened.

    Attributes:
        identity: Your age or SSH private key, for a grant that is sealed to you. May be given
            several times.
        passphrase_file: The grant's passphrase, if it has one and nobody is there to type it.
    """

    identity: UseAppendAction[tuple[Path, ...]] = ()
    passphrase_file: Path | None = None

    def read(self, path: Path | None) -> Grant | None:
        """Reads a grant, if there is one."""
        if path is None:
            return None
        passphrase = ask(self.passphrase_file, path)
        return Grant.read(path, identities=self.identity, passphrase=passphrase)


@dataclass(frozen=True)
class Locking:
    """How a new file of keys is locked.

    Attributes:
        passphrase: Lock it with a passphrase; you are asked for it.
        new_passphrase_file: Lock it with the passphrase in this file.
    """

    passphrase: bool = False
    new_passphrase_file: Path | None = None

    def read(self) -> str | None:
        """The new passphrase, or None."""
        if self.new_passphrase_file is not None:
            return _passphrase_in(self.new_passphrase_file)
        if not self.passphrase:
            return None
        if not sys.stdin.isatty():
            raise ValueError(
                "passphrase: there is nobody to ask for it. Put it into a file, and name that "
                "(--new-passphrase-file)."
            )
        first = getpass.getpass("New passphrase: ")
        if not first.strip():
            raise ValueError(
                "passphrase: expected some text, got an empty one; nothing was written. Try again."
            )
        if getpass.getpass("Once more: ") != first:
            raise ValueError(
                "passphrase: expected it twice alike, got two; nothing was written. Try again."
            )
        return first


def ask(file: Path | None, what: Path) -> Callable[[], str]:
    """Asks for a passphrase once it is needed. Never an argument: other users see those."""

    def words() -> str:
        if file is not None:
            return _passphrase_in(file)
        if not sys.stdin.isatty():
            raise ValueError(
                f"{what}: is locked with a passphrase, and there is nobody to ask for it. Use "
                "--passphrase-file."
            )
        return getpass.getpass(f"Passphrase of {what}: ")

    return words


def _passphrase_in(file: Path) -> str:
    try:
        lines = file.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(
            f"{file}: expected a passphrase in UTF-8, got something else. Save it as UTF-8 text."
        ) from None
    if len(lines) != 1 or not lines[0].strip():
        raise ValueError(
            f"{file}: expected one line with a passphrase, got {len(lines)} lines. Put nothing "
            "else into the file."
        )
    return lines[0]


def spare(out: Path, *inputs: Path | None) -> None:
    """Keys are inputs too: even with --force an output replaces none of them."""
    check_output(out, *(path for path in inputs if path is not None))
