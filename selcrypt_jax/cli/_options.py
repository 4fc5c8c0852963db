"""Options that several commands share."""

import getpass
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from tyro.conf import FlagCreatePairsOff, UseAppendAction, arg

from .._io.companions import Companions
from .._io.places import check_output
from .._keys.grant import Grant
from .._keys.keys import Secret
from .._keys.material import MAX_PASSPHRASE, forgetting, passphrase_bytes
from .._keys.signing import SigningKey
from ._text import printable

_MOST = 4 * MAX_PASSPHRASE  # bytes to read; normal form C may be shorter

Flat = arg(name="")
"""For a parameter whose fields become options of the command itself."""

Switch = Annotated[bool, FlagCreatePairsOff, arg(help_behavior_hint="")]
"""A flag, off by default. The help shows no default for it."""
AsJson = Annotated[Switch, arg(name="json")]

_T = TypeVar("_T")
Maybe = Annotated[_T | None, arg(help_behavior_hint="")]
"""An option with the default None, which the help does not show."""

Output = Annotated[Path, arg(aliases=["-o"])]
AnyGrantFile = Annotated[Path | None, arg(aliases=["-g"], help_behavior_hint="")]


@dataclass(frozen=True)
class Writing:
    """How results are written.

    Attributes:
        force: Replace an existing output file (but never a folder).
        as_json: Print JSON.
    """

    force: Switch = False
    as_json: AsJson = False

    def say(self, result: dict[str, Any], *lines: str) -> None:
        """Prints the result as JSON, or the lines."""
        print(json.dumps(result, indent=2) if self.as_json else "\n".join(map(printable, lines)))


def beside_as_dict(beside: Companions | None) -> dict[str, Any]:
    """The files copied along with the weights, for JSON; empty if none were requested."""
    if beside is None:
        return {}
    return {"copied": list(beside.copied), "left_out": beside.left_out}


def beside_as_text(beside: Companions | None) -> list[str]:
    """The files copied along with the weights, as lines of text."""
    if beside is None:
        return []
    lines = [f"Also copied: {', '.join(beside.copied) or 'nothing'}."]
    reasons: dict[str, list[str]] = {}
    for name, reason in beside.left_out.items():
        reasons.setdefault(reason, []).append(name)
    return lines + [f"Left out: {', '.join(names)} ({why})." for why, names in reasons.items()]


@dataclass(frozen=True)
class Printing:
    """How results are printed.

    Attributes:
        as_json: Print JSON.
    """

    as_json: AsJson = False


@dataclass(frozen=True)
class OwnerSecret:
    """The owner's secret.

    Attributes:
        secret: Your secret.key.
        passphrase_file: A file that holds the passphrase of your keys, if they have one. Without
            it you are asked.
    """

    secret: Path
    passphrase_file: Maybe[Path] = None

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

    signing: Maybe[Path] = None

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
        identity: Your age or SSH private key, for a grant that is encrypted to you.
        passphrase_file: A file that holds the grant's passphrase, if it has one. Without it you
            are asked.
    """

    identity: UseAppendAction[tuple[Path, ...]] = ()
    passphrase_file: Maybe[Path] = None

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
        passphrase: Lock the output with a passphrase, for which you are asked.
        new_passphrase_file: Lock the output with the passphrase in this file.
    """

    passphrase: Switch = False
    new_passphrase_file: Maybe[Path] = None

    def read(self) -> Callable[[], str] | None:
        """Asks for the new passphrase; returns a function that gives it, or None.

        A function, because crash reporters print local variables.
        """
        if self.new_passphrase_file is None and not self.passphrase:
            return None
        words = self._words()
        return lambda: words

    @forgetting
    def _words(self) -> str:
        if self.new_passphrase_file is not None:
            return _passphrase_in(self.new_passphrase_file)
        if not _somebody():
            raise ValueError(
                "passphrase: there is no terminal to ask for it. Put it into a file, and pass that "
                "with --new-passphrase-file."
            )
        first = _typed("New passphrase: ")
        passphrase_bytes(first)  # before it is typed again
        if _typed("Repeat it: ") != first:
            raise ValueError(
                "passphrase: expected the same one twice, got two different ones; nothing was "
                "written. Try again."
            )
        return first


def ask(file: Path | None, what: Path) -> Callable[[], str]:
    """Asks for a passphrase when it is needed. It is never an argument: other users see those."""

    def words() -> str:
        if file is not None:
            return _passphrase_in(file)
        if not _somebody():
            raise ValueError(
                f"{what}: locked with a passphrase, and there is no terminal to ask for it. Use "
                "--passphrase-file."
            )
        return _typed(printable(f"Passphrase of {what}: "))

    return words


def _somebody() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


@forgetting
def _typed(prompt: str) -> str:
    try:
        return getpass.getpass(prompt)
    except UnicodeDecodeError:  # its message shows part of the passphrase
        raise ValueError(
            "passphrase: expected text in the encoding of the locale, got other bytes. Set LANG to "
            "the terminal's locale, or put the passphrase into a UTF-8 file."
        ) from None


@forgetting
def _passphrase_in(file: Path) -> str:
    with file.open("rb") as opened:
        data = opened.read(_MOST + 1)  # it may be /dev/zero
    if len(data) > _MOST:
        raise ValueError(
            f"{file}: expected one line with a passphrase, got more than {_MOST} bytes. Put "
            "nothing else into the file."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(
            f"{file}: expected a passphrase in UTF-8, got something else. Save it as UTF-8 text."
        ) from None
    # Not splitlines(), which recognises more line ends than other programs do.
    lines = text.removesuffix("\n").split("\n")
    if len(lines) > 1:
        raise ValueError(
            f"{file}: expected one line with a passphrase, got {len(lines)} lines. Put nothing "
            "else into the file."
        )
    words = lines[0].removesuffix("\r")
    try:
        passphrase_bytes(words)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return words


def spare(out: Path, *inputs: Path | None) -> None:
    """Refuses an output that would replace an input, such as a key, even with --force."""
    check_output(out, *(path for path in inputs if path is not None))
