"""The grant: a level key, the signer that files must have, and the grant's file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .._io.errors import check_type
from .age import sealed, unsealed
from .files import AnyPath, Passphrase, read_key_file, write_key_file
from .keys import MAX_LEVELS, MODEL_ID_BYTES, LevelKey
from .material import KEY_BYTES, forgetting
from .signing import VerifyKey
from .text import GRANT, damaged


@dataclass(frozen=True)
class Grant:
    """What a customer receives to open one level of one protected model.

    Attributes:
        key: the level's key; it names the model.
        signer: the owner, who must have signed the files that the grant opens; or None.

    Raises:
        TypeError: the key or the signer has another type.

    Examples:
        >>> grant = issue_grant(
        ...     "model.safetensors", level=1, secret=secret, signer="keys/signing.pub"
        ... )
        >>> grant.write("bob.grant", passphrase="correct horse battery staple")
        >>> assert Grant.read("bob.grant", passphrase="correct horse battery staple") == grant
    """

    key: LevelKey
    signer: VerifyKey | None = None

    def __post_init__(self) -> None:
        check_type(self.key, LevelKey, "key: expected a LevelKey", "Make one with level_key.")
        remedy = "Pass the `public` of the owner's SigningKey, or VerifyKey.read(path)."
        check_type(self.signer, VerifyKey | None, "signer: expected a VerifyKey", remedy)

    @classmethod
    @forgetting
    def read(
        cls, path: AnyPath, *, passphrase: Passphrase = None, identities: Sequence[AnyPath] = ()
    ) -> "Grant":
        """Reads what `write` wrote.

        Args:
            path: the file's path; a pipe works too, and is waited for.
            passphrase: the passphrase, or a function that asks for it, called only if the file is
                locked.
            identities: files with age or SSH private keys, for a grant that is sealed to one of
                them.

        Raises:
            GrantError: the file is of another kind, damaged or sealed to other keys, or the
                passphrase is wrong.
            ModuleNotFoundError: the file is sealed, and the extra ``age`` is not installed.
            OSError: the file cannot be read.
        """
        fields, value = read_key_file(
            path, GRANT, passphrase, lambda data: unsealed(data, str(path), identities)
        )
        model_id = _unhexed(path, "model-id", fields["model-id"], MODEL_ID_BYTES)
        level, signer = fields["level"], fields.get("signer")
        # Not int() alone, which accepts 0_2 and digits of other scripts, and whose errors show the
        # text.
        if not (re.fullmatch("[1-9][0-9]{0,8}", level) and int(level) <= MAX_LEVELS):
            raise damaged(path, f"level: expected a number 1..{MAX_LEVELS}, got something else")
        if signer is not None:
            signer = VerifyKey(_unhexed(path, "signer", signer, KEY_BYTES))
        return cls(LevelKey(value, level=int(level), model_id=model_id), signer)

    @forgetting
    def write(
        self,
        path: AnyPath,
        *,
        passphrase: Passphrase = None,
        recipients: Sequence[str] = (),
        force: bool = False,
    ) -> None:
        """Writes a file that only its owner may read.

        Args:
            path: the file's path, in a folder that exists.
            passphrase: locks the file (Argon2id, ChaCha20-Poly1305); or a function that returns it.
            recipients: seals the file to these age (``age1...``) or SSH public keys, so that it can
                be sent over an open channel. Needs the extra ``age``.
            force: replace an existing file.

        Raises:
            ValueError: one of the recipients is not a public key.
            FileExistsError: the file exists, and `force` is not set.
            ModuleNotFoundError: there are recipients, and the extra ``age`` is not installed.
            OSError: the file cannot be written.
        """
        fields = {"model-id": self.key.model_id.hex(), "level": str(self.key.level)}
        if self.signer is not None:
            fields["signer"] = self.signer.hex()
        write_key_file(
            path, GRANT, bytes(self.key), fields, passphrase=passphrase, force=force,
            sealed=lambda text: sealed(text, recipients) if recipients else text,
        )  # fmt: skip


def _unhexed(path: AnyPath, field: str, text: str, size: int) -> bytes:
    # fromhex() also accepts upper case and spaces.
    if not re.fullmatch(f"[0-9a-f]{{{2 * size}}}", text):
        raise damaged(path, f"{field}: expected {size} bytes in lower-case hex, got something else")
    return bytes.fromhex(text)
