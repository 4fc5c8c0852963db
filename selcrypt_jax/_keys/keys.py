"""Secrets, and the one-way chain of level keys that follows from them.

::

    K_M     = HKDF-SHA256(secret, salt = model id, info = "selcrypt/v1/top" ‖ M)
    K_{m-1} = HKDF-SHA256(K_m, info = "selcrypt/v1/down")
    cipher key of ring m = HKDF-SHA256(K_m, info = "selcrypt/v1/cipher")
    seal key of level m  = HKDF-SHA256(K_m, info = "selcrypt/v1/seal")

M is a 32-bit little-endian number. A level key gives all lower ones and no higher one. The model
id is random and new for each protection, so that no keystream is ever used twice.
"""

import hmac
import operator
import os
import unicodedata
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

if TYPE_CHECKING:  # keys alone must not cost the start of JAX
    from jaxtyping import PRNGKeyArray

KEY_BYTES = 32
MODEL_ID_BYTES = 16
_SALT_BYTES = 16
MAX_LEVELS = 2**16


class _Bytes:
    """32 secret bytes that are never printed."""

    __slots__ = ("_value",)
    _remedy = ""  # for messages

    def __init__(self, value: bytes) -> None:
        what = f"{type(self).__name__}: expected {KEY_BYTES} bytes"
        if not isinstance(value, bytes | bytearray | memoryview):
            # Not the value: a passphrase may have been passed for a key.
            raise TypeError(f"{what}, got {type(value).__name__}. {self._remedy}")
        self._value = bytes(value)
        if len(self._value) != KEY_BYTES:
            raise ValueError(f"{what}, got {len(self._value)}. {self._remedy}")

    def __bytes__(self) -> bytes:
        return self._value

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return hmac.compare_digest(self._value, other._value)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> NoReturn:
        # A pickle is the easiest way to leave a secret in a cache or a checkpoint.
        raise TypeError(f"cannot pickle {type(self).__name__}: write bytes(...) where it belongs")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(<{KEY_BYTES} bytes>)"


class Secret(_Bytes):
    """The owner's 32 random bytes, from which all keys of all their models follow.

    Args:
        value: 32 bytes, uniformly random. Use `Secret.generate` or `Secret.from_passphrase`.

    Raises:
        TypeError: not bytes.
        ValueError: not 32 of them.

    ``bytes(secret)`` gives them back, for storage.
    """

    __slots__ = ()
    _remedy = "Use Secret.generate(), Secret.from_passphrase(...) or read_secret(path)."

    @classmethod
    def generate(cls) -> "Secret":
        """A new secret from the operating system's random generator."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def from_passphrase(
        cls,
        passphrase: str,
        salt: bytes,
        *,
        iterations: int = 3,
        lanes: int = 4,
        memory_kib: int = 64 * 1024,
    ) -> "Secret":
        """Stretches a passphrase with Argon2id.

        Args:
            passphrase: any text, read in Unicode normal form C, so that the keyboard does not
                matter.
            salt: at least 16 random bytes, new for each secret (`os.urandom`); not secret, but
                to be kept, since there is no secret without it.
            iterations: passes over the memory.
            lanes: degree of parallelism.
            memory_kib: memory in KiB.

        Raises:
            TypeError: a passphrase that is no text.
            ValueError: an empty passphrase, or a salt that is too short.

        References:
            RFC 9106, section 4: the second recommended option is the default.
        """
        if not isinstance(passphrase, str):
            raise TypeError(f"passphrase: expected text, got {type(passphrase).__name__}.")
        if not passphrase.strip():
            raise ValueError("passphrase: expected some text, got an empty one.")
        if not isinstance(salt, bytes):
            raise TypeError(f"salt: expected random bytes, got {type(salt).__name__}.")
        if len(salt) < _SALT_BYTES:
            raise ValueError(
                f"salt: expected at least {_SALT_BYTES} random bytes, got {len(salt)}. "
                "Make one with os.urandom(16) and keep it."
            )
        kdf = Argon2id(
            salt=salt,
            length=KEY_BYTES,
            iterations=iterations,
            lanes=lanes,
            memory_cost=memory_kib,
        )
        return cls(kdf.derive(unicodedata.normalize("NFC", passphrase).encode()))


def new_model_id() -> bytes:
    """16 random bytes that name one protection of one model. Public; never to be used twice."""
    return os.urandom(MODEL_ID_BYTES)


class LevelKey(_Bytes):
    """What opens levels 1..`level` of one protected model: what a customer is given.

    `write_grant` and `read_grant` store one in a file.

    Args:
        value: 32 bytes, K_level of the chain.
        level: 1..M.
        model_id: of the protection that it belongs to.

    Raises:
        TypeError, ValueError: bytes of another number or type, or a level out of range.
    """

    __slots__ = ("level", "model_id")
    _remedy = "Use level_key(...) or read_grant(path).key."

    def __init__(self, value: bytes, *, level: int, model_id: bytes) -> None:
        super().__init__(value)
        level = operator.index(level)
        if not 1 <= level <= MAX_LEVELS:
            raise ValueError(f"level: expected 1..{MAX_LEVELS}, got {level}. Level 0 needs no key.")
        self.level = level
        self.model_id = _check_model_id(model_id)

    def lower(self, level: int) -> "LevelKey":
        """The key of a lower level of the same model.

        Raises:
            ValueError: a level that is higher than this one, or below 1.
        """
        if not 1 <= level <= self.level:
            remedy = (
                "A level key gives the lower levels only: ask the owner for one of that level."
                if level > self.level
                else "Level 0 needs no key: it is the protected model as it is."
            )
            raise ValueError(f"level: expected 1..{self.level}, got {level}. {remedy}")
        value = bytes(self)
        for _ in range(self.level - level):
            value = hkdf(value, b"down")
        return LevelKey(value, level=level, model_id=self.model_id)

    def all(self) -> "tuple[LevelKey, ...]":
        """The keys of levels 1 to this one."""
        value, values = bytes(self), [bytes(self)]
        for _ in range(self.level - 1):
            value = hkdf(value, b"down")
            values.append(value)
        return tuple(
            LevelKey(value, level=level, model_id=self.model_id)
            for level, value in enumerate(reversed(values), 1)
        )

    def cipher_key(self) -> bytes:
        """The 32 bytes that encrypt ring `level`."""
        return hkdf(bytes(self), b"cipher")

    def seal_key(self) -> bytes:
        """The 32 bytes that seal the positions of ring `level` in a file."""
        return hkdf(bytes(self), b"seal")

    def __eq__(self, other: object) -> bool:
        same = super().__eq__(other)
        if same is not True or not isinstance(other, LevelKey):
            return same
        return self.level == other.level and self.model_id == other.model_id

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"LevelKey(<{KEY_BYTES} bytes>, level={self.level}, model_id={self.model_id.hex()})"


def level_key(
    secret: Secret | bytes, model_id: bytes, *, level: int | None = None, levels: int
) -> LevelKey:
    """The key of one level: what its customer is given.

    Args:
        secret: the owner's.
        model_id: 16 bytes, see `new_model_id`.
        level: 1..levels; the top one by default.
        levels: M, how many levels the model has.

    Raises:
        TypeError, ValueError: a secret or model id of another type or length, or a level that
            does not exist.
    """
    secret = secret if isinstance(secret, Secret) else Secret(secret)
    levels = operator.index(levels)
    level = levels if level is None else operator.index(level)
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels: expected 1..{MAX_LEVELS}, got {levels}.")
    if not 1 <= level <= levels:
        raise ValueError(
            f"level: expected 1..{levels}, got {level}. Name one of these; level 0 needs no key."
        )
    model_id = _check_model_id(model_id)
    top = hkdf(bytes(secret), b"top" + levels.to_bytes(4, "little"), salt=model_id)
    return LevelKey(top, level=levels, model_id=model_id).lower(level)


def ring_keys(key: LevelKey) -> "tuple[PRNGKeyArray, ...]":
    """The `jax.random` keys (ChaCha20) of the rings that a level key opens.

    Args:
        key: of level m. The top level's key gives the keys of all rings, for `encrypt`.

    Returns:
        m typed keys, one for each ring.

    Raises:
        TypeError: not a `LevelKey`.

    Examples:
        >>> keys = ring_keys(level_key(secret, model_id, levels=3))
        >>> protected = encrypt(params, masks, keys)
    """
    from .chacha import chacha20_key

    if not isinstance(key, LevelKey):
        raise TypeError(
            f"key: expected a LevelKey, got {type(key).__name__}. Make one with level_key."
        )
    return tuple(chacha20_key(lower.cipher_key()) for lower in key.all())


class SigningKey(_Bytes):
    """The owner's Ed25519 key, which signs protected files.

    Args:
        value: 32 bytes, uniformly random, the seed of RFC 8032. Use `SigningKey.generate`.

    Raises:
        TypeError: not bytes.
        ValueError: not 32 of them.
    """

    __slots__ = ()
    _remedy = "Use SigningKey.generate() or read_signing_key(path)."

    @classmethod
    def generate(cls) -> "SigningKey":
        """A new key from the operating system's random generator."""
        return cls(os.urandom(KEY_BYTES))

    @property
    def public(self) -> bytes:
        """The 32 bytes of the public key, which name the owner."""
        return Ed25519PrivateKey.from_private_bytes(bytes(self)).public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """The 64 bytes of a signature."""
        return Ed25519PrivateKey.from_private_bytes(bytes(self)).sign(message)


def verify_signature(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether a signature is of this message and this key.

    Args:
        public: 32 bytes.
        message: what was signed.
        signature: 64 bytes.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def check_signing(signing: object) -> None:
    """Refuses what cannot sign: a path, a public key, a secret.

    Raises:
        TypeError: so it is.
    """
    if signing is not None and not isinstance(signing, SigningKey):
        raise TypeError(
            f"signing: expected a SigningKey, got {type(signing).__name__}. {SigningKey._remedy}"
        )


class Grant(NamedTuple):
    """What a customer is given.

    Attributes:
        key: of the level; it names the model.
        signer: the owner's public key, 32 bytes, which files must be signed with; or None.
    """

    key: LevelKey
    signer: bytes | None = None


def _check_model_id(model_id: bytes) -> bytes:
    if not isinstance(model_id, bytes):
        raise TypeError(
            f"model_id: expected {MODEL_ID_BYTES} bytes, got {type(model_id).__name__}. "
            "Make one with new_model_id()."
        )
    if len(model_id) != MODEL_ID_BYTES:
        raise ValueError(
            f"model_id: expected {MODEL_ID_BYTES} bytes, got {len(model_id)}. "
            "Make one with new_model_id()."
        )
    return model_id


def hkdf(key: bytes, domain: bytes, salt: bytes | None = None) -> bytes:
    return HKDF(
        algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=b"selcrypt/v1/" + domain
    ).derive(key)
