"""Errors about arguments, and errors that programs can distinguish by a one-word reason."""

import functools
from typing import Any, Literal

IntegrityReason = Literal[
    "manifest", "metadata", "signer", "signature", "model", "table", "box", "ring", "digest",
    "plaintext", "shard",
]  # fmt: skip
GrantReason = Literal[
    "kind", "damaged", "passphrase", "recipient", "model", "level", "secret", "signer"
]


def check_type(value: object, kind: Any, expected: str, remedy: str) -> None:
    """Refuses an argument of another type; the message omits the value: it may be a secret.

    Args:
        value: the argument's value.
        kind: a type, or a union of types.
        expected: the argument's name and expected type.
        remedy: the remedy.

    Raises:
        TypeError: the value has another type.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{expected}, got {type(value).__name__}. {remedy}")


def extra(name: str) -> str:
    """How to install an extra, for messages: from a copy of the repository, as README has it."""
    return f"Install the extra: pip install '.[{name}]' in your copy of the repository"


def counted(number: int, noun: str) -> str:
    """A number of things, for messages: ``1 key``, ``1,200 keys``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def quoted(error: BaseException) -> str:
    """An error's text, to be put into a sentence: one line, without a full stop at its end."""
    return " ".join(str(error).split()).rstrip(". ") or type(error).__name__


def described(error: BaseException, place: str = "") -> str:
    """An error's type, the place given, and its text as `quoted` has it, if it has any."""
    name = type(error).__name__
    return f"{name}{place}" + (f": {quoted(error)}" if str(error).strip() else "")


class _ReasonedError(ValueError):
    reason: str

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), reason=self.reason), self.args


class IntegrityError(_ReasonedError):
    """A protected file was altered: it is not as its owner made it.

    Attributes:
        reason: which check failed, in the order in which a file is checked:

            - ``"manifest"``: the manifest is malformed;
            - ``"metadata"``: a metadata entry is missing, unknown or changed;
            - ``"signer"``: the file is not signed, or by another signer than the one expected;
            - ``"signature"``: the signature does not match the manifest and the boxes;
            - ``"model"``: the model id is not the one expected;
            - ``"table"``: names, dtypes or shapes differ from the manifest;
            - ``"shard"``: a shard belongs to another protection or is missing, or there are other
              weights beside the shards;
            - ``"box"``: a sealed box does not open;
            - ``"ring"``: a box opens, but its content does not match the tensors;
            - ``"digest"``: a tensor's bytes are not the ones that were shipped;
            - ``"plaintext"``: the decrypted weights are not the ones that were encrypted.

    Examples:
        >>> try:
        ...     verify_file("model.safetensors", signer=SigningKey.generate().public)
        ... except IntegrityError as error:
        ...     assert error.reason == "signer"
    """

    def __init__(self, message: str, *, reason: IntegrityReason) -> None:
        super().__init__(message, reason=reason)


class GrantError(_ReasonedError):
    """A grant or key does not open the file it was used on.

    Attributes:
        reason: one of

            - ``"kind"``: the file holds no key, one of another kind, or one of a later version;
            - ``"damaged"``: the file was truncated or mistyped;
            - ``"passphrase"``: the file is locked, and the passphrase is missing or wrong;
            - ``"recipient"``: the file is sealed, and the private key is missing, malformed or not
              the recipient's;
            - ``"model"``: the grant is for another model, or for the model before its rotation;
            - ``"level"``: the grant is for a lower level than requested, or the model has no such
              level;
            - ``"secret"``: the secret is not the one that protected the file;
            - ``"signer"``: the grant requires another signer than the caller does.

    Examples:
        >>> try:
        ...     open_model("model.safetensors", "alice.grant", level=3)
        ... except GrantError as error:
        ...     assert error.reason == "level"
    """

    def __init__(self, message: str, *, reason: GrantReason) -> None:
        super().__init__(message, reason=reason)
