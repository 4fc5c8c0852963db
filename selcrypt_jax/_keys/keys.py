"""Secrets, and the one-way chain of level keys derived from them.

::

    K_M     = HKDF-SHA256(secret, salt = model id, info = "selcrypt/v1/top" ‖ M)
    K_{m-1} = HKDF-SHA256(K_m, info = "selcrypt/v1/down")
    cipher key of ring m = HKDF-SHA256(K_m, info = "selcrypt/v1/cipher")
    seal key of level m  = HKDF-SHA256(K_m, info = "selcrypt/v1/seal")

M is a 32-bit little-endian number. A level key gives all lower level keys and no higher one. The
model id is random and new for each protection, so no keystream is ever used twice.
"""

import operator
import os
from typing import TYPE_CHECKING

from .._io.errors import GrantError, check_type
from .files import StoredKey
from .material import KEY_BYTES, KeyMaterial, checked_bytes, forgetting, hkdf, stretched
from .text import SECRET

if TYPE_CHECKING:  # using keys alone must not import JAX
    from jaxtyping import PRNGKeyArray

MODEL_ID_BYTES = 16
MAX_LEVELS = 256


class Secret(StoredKey):
    """The owner's 32 random bytes, from which the keys of all their models are derived.

    Args:
        value: 32 bytes, uniformly random. Use `Secret.generate` or `Secret.from_passphrase`.

    Raises:
        TypeError: the value is not bytes.
        ValueError: it is not 32 bytes long.

    Examples:
        >>> secret = Secret.generate()
        >>> secret.write("owner.key", passphrase="correct horse battery staple")
        >>> assert Secret.read("owner.key", passphrase="correct horse battery staple") == secret
    """

    __slots__ = ()
    _kind = SECRET
    _remedy = "Use Secret.generate(), Secret.from_passphrase(...) or Secret.read(path)."

    @classmethod
    def generate(cls) -> "Secret":
        """A new secret from the operating system's random generator."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    @forgetting
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
            passphrase: one line of at most 1,000 bytes in UTF-8, without control characters. It is
                normalised to Unicode form C, so the keyboard does not matter; spaces count.
            salt: at least 16 random bytes, new for each secret (`os.urandom`). It is not secret,
                but without it the secret cannot be derived again.
            iterations: passes over the memory.
            lanes: degree of parallelism.
            memory_kib: memory in KiB.

        Raises:
            TypeError: the passphrase is not text.
            ValueError: the passphrase is empty, too long or cannot be typed, or the salt is too
                short.

        References:
            RFC 9106, section 4: the defaults are its second recommended option.
        """
        costs = {"iterations": iterations, "lanes": lanes, "memory_kib": memory_kib}
        return cls(stretched(passphrase, salt, **costs))


def new_model_id() -> bytes:
    """16 random bytes that identify one protection of one model. Public; never use one twice.

    Examples:
        >>> key = level_key(secret, new_model_id(), levels=3)
    """
    return os.urandom(MODEL_ID_BYTES)


class LevelKey(KeyMaterial):
    """The key of levels 1..`level` of one protected model; a `Grant` carries it.

    Args:
        value: 32 bytes, K_level of the chain.
        level: 1..M.
        model_id: the id of the protection that the key belongs to.

    Raises:
        TypeError, ValueError: bytes of another length or type, or a level out of range.

    Examples:
        >>> key = Grant.read("alice.grant").key
        >>> first = open_model("model.safetensors", key.lower(1))
    """

    __slots__ = ("level", "model_id")
    _remedy = "Use level_key(...) or Grant.read(path).key."

    @forgetting
    def __init__(self, value: bytes, *, level: int, model_id: bytes) -> None:
        super().__init__(value)
        self.level = operator.index(level)
        if not 1 <= self.level <= MAX_LEVELS:
            raise ValueError(
                f"level: expected 1..{MAX_LEVELS}, got {self.level}. Level 0 needs no key."
            )
        self.model_id = _checked_model_id(model_id)

    def lower(self, level: int) -> "LevelKey":
        """The key of a lower level of the same model.

        Raises:
            GrantError: the level is higher than this one, or below 1.
        """
        level = operator.index(level)
        if not 1 <= level <= self.level:
            remedy = (
                "A level key opens lower levels only: ask the owner for a key of that level."
                if level > self.level
                else "Level 0 needs no key: it is the protected model itself."
            )
            message = f"level: expected 1..{self.level}, got {level}. {remedy}"
            raise GrantError(message, reason="level")
        return self.all()[level - 1]

    def all(self) -> "tuple[LevelKey, ...]":
        """The keys of levels 1 to this one."""
        values = [bytes(self)]
        for _ in range(self.level - 1):
            values.append(hkdf(values[-1], b"down"))
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


@forgetting
def level_key(
    secret: Secret | bytes, model_id: bytes, *, level: int | None = None, levels: int
) -> LevelKey:
    """The key of one level, for a customer of that level.

    Args:
        secret: the owner's secret.
        model_id: 16 bytes, see `new_model_id`.
        level: 1..levels; the top one by default.
        levels: M, the number of levels of the model.

    Raises:
        TypeError, ValueError: the secret or model id has another type or length, or the level
            does not exist.

    Examples:
        >>> model_id = bytes.fromhex(inspect_file("model.safetensors").model_id)
        >>> key = level_key(Secret.read("keys/secret.key"), model_id, level=2, levels=3)
        >>> assert key == Grant.read("alice.grant").key
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
    model_id = _checked_model_id(model_id)
    top = hkdf(bytes(secret), b"top" + levels.to_bytes(4, "little"), salt=model_id)
    return LevelKey(top, level=levels, model_id=model_id).lower(level)


def ring_keys(key: LevelKey) -> "tuple[PRNGKeyArray, ...]":
    """The `jax.random` keys (ChaCha20) of the rings that a level key opens.

    Args:
        key: the key of level m. The top level's key gives the keys of all rings, for `encrypt`.

    Returns:
        m typed keys, one per ring.

    Raises:
        TypeError: the key is not a `LevelKey`, or the call is inside a compiled function.

    Examples:
        >>> keys = ring_keys(level_key(secret, model_id, levels=3))
        >>> protected = encrypt(params, masks, keys)
    """
    from .chacha import chacha20_key

    check_type(key, LevelKey, "key: expected a LevelKey", "Make one with level_key.")
    return tuple(chacha20_key(lower.cipher_key()) for lower in key.all())


def _checked_model_id(model_id: bytes) -> bytes:
    return checked_bytes(model_id, MODEL_ID_BYTES, "model_id", "Make one with new_model_id().")
