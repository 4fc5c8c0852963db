"""Ed25519 (RFC 8032): the owner's signing key, and the public key that checks its signatures."""

import os
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .._io.errors import check_type
from .files import AnyPath, StoredKey, read_key_file, write_key_file
from .material import KEY_BYTES, checked_bytes
from .text import SIGNING, VERIFY


@dataclass(frozen=True, repr=False)
class VerifyKey:
    """The public half of a `SigningKey`: it names the owner and checks their signatures.

    Attributes:
        value: 32 bytes, the public key of RFC 8032.

    Raises:
        TypeError: the value is not bytes.
        ValueError: it is not 32 bytes long.

    Examples:
        >>> public = VerifyKey.read("keys/signing.pub")
        >>> assert verify_file("model.safetensors", signer=public).signer == public.hex()
    """

    value: bytes

    def __post_init__(self) -> None:
        remedy = "Use the `public` of a SigningKey, or VerifyKey.read(path)."
        object.__setattr__(self, "value", checked_bytes(self.value, KEY_BYTES, "VerifyKey", remedy))

    @classmethod
    def read(cls, path: AnyPath) -> "VerifyKey":
        """Reads what `write` wrote.

        Args:
            path: the file's path; a pipe works too, and is waited for.

        Raises:
            GrantError: the file is of another kind, or damaged.
            OSError: the file cannot be read.
        """
        return cls(read_key_file(path, VERIFY)[1])

    def write(self, path: AnyPath, *, force: bool = False) -> None:
        """Writes a file that anyone may read.

        Args:
            path: the file's path, in a folder that exists.
            force: replace an existing file.

        Raises:
            FileExistsError: the file exists, and `force` is not set.
            OSError: the file cannot be written.
        """
        write_key_file(path, VERIFY, self.value, force=force)

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Whether a 64-byte signature was made by this key for this message."""
        try:
            Ed25519PublicKey.from_public_bytes(self.value).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True

    def hex(self) -> str:
        """The 64 hex digits that identify the owner in reports."""
        return self.value.hex()

    def __bytes__(self) -> bytes:
        return self.value

    def __repr__(self) -> str:
        return f"VerifyKey({self.hex()})"


class SigningKey(StoredKey):
    """The owner's Ed25519 key, which signs protected files.

    Args:
        value: 32 bytes, uniformly random, the seed of RFC 8032. Use `SigningKey.generate`.

    Raises:
        TypeError: the value is not bytes.
        ValueError: it is not 32 bytes long.

    Examples:
        >>> signing = SigningKey.generate()
        >>> signing.write("owner.key")
        >>> signing.public.write("owner.pub")
        >>> assert SigningKey.read("owner.key").public == VerifyKey.read("owner.pub")
        >>> assert signing.public.verify(b"text", signing.sign(b"text"))
    """

    __slots__ = ()
    _kind = SIGNING
    _remedy = "Use SigningKey.generate() or SigningKey.read(path)."

    @classmethod
    def generate(cls) -> "SigningKey":
        """A new key from the operating system's random generator."""
        return cls(os.urandom(KEY_BYTES))

    @property
    def public(self) -> VerifyKey:
        """The public key, which identifies the owner."""
        return VerifyKey(self._private().public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        """The signature of a message, 64 bytes."""
        return self._private().sign(message)

    def _private(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(bytes(self))


def check_signing(signing: object) -> None:
    """Refuses an object that cannot sign: a path, a public key, a secret.

    Raises:
        TypeError: it is neither a `SigningKey` nor None.
    """
    check_type(signing, SigningKey | None, "signing: expected a SigningKey", SigningKey._remedy)
