"""Errors of arguments, and those that programs tell apart: with a reason in one word."""

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
    """Refuses an argument of another type; the message does not show it, for it may be a secret.

    Args:
        value: of the argument.
        kind: type, or union of types.
        expected: the argument and what it should be.
        remedy: what to do about it.

    Raises:
        TypeError: it is of another type.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{expected}, got {type(value).__name__}. {remedy}")


class _ReasonedError(ValueError):
    reason: str

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), reason=self.reason), self.args


class IntegrityError(_ReasonedError):
    """A protected file is not as its owner made it.

    Attributes:
        reason: what did not fit, in the order in which a file is checked:

            - ``"manifest"``: the manifest is malformed;
            - ``"metadata"``: an entry of the metadata is missing, unknown or changed;
            - ``"signer"``: signed by nobody, or by another signer than the one expected;
            - ``"signature"``: the signature does not fit the manifest and the boxes;
            - ``"model"``: another model id than the one expected;
            - ``"table"``: other names, dtypes or shapes than in the manifest;
            - ``"shard"``: a shard of another protection, one that is missing, or other weights
              beside them;
            - ``"box"``: a sealed box does not open;
            - ``"ring"``: a box opens, but its content does not fit the tensors;
            - ``"digest"``: a tensor has other bytes than it was shipped with;
            - ``"plaintext"``: weights were decrypted to others than were encrypted.

    Examples:
        >>> try:
        ...     verify_file("model.safetensors", signer=SigningKey.generate().public)
        ... except IntegrityError as error:
        ...     assert error.reason == "signer"
    """

    def __init__(self, message: str, *, reason: IntegrityReason) -> None:
        super().__init__(message, reason=reason)


class GrantError(_ReasonedError):
    """A grant or key does not open what it was used on.

    Attributes:
        reason: one of

            - ``"kind"``: the file holds no key, one of another kind, or one of a later version;
            - ``"damaged"``: the file was cut off or mistyped;
            - ``"passphrase"``: locked, and the passphrase is missing or wrong;
            - ``"recipient"``: sealed, and the private key is missing, malformed or another's;
            - ``"model"``: for another model, or for the model before its rotation;
            - ``"level"``: for a lower level than the one asked for, or one the model does not have;
            - ``"secret"``: the secret is not the one that protected the file;
            - ``"signer"``: the grant asks for another signer than the caller does.

    Examples:
        >>> try:
        ...     open_model("model.safetensors", "alice.grant", level=3)
        ... except GrantError as error:
        ...     assert error.reason == "level"
    """

    def __init__(self, message: str, *, reason: GrantReason) -> None:
        super().__init__(message, reason=reason)
