"""The signer that a file must have: named by the caller, by a grant, or known to its owner."""

import os
from collections.abc import Iterable

from .._format.envelope import Envelope
from .._io.errors import GrantError, IntegrityError, check_type
from .._keys.files import AnyPath
from .._keys.signing import VerifyKey

AnySigner = VerifyKey | AnyPath
"""A public key, or the path of its file."""

UNSIGNED = "unsigned"
"""In place of a signer: the owner's own file, which was never signed."""


def verify_key(signer: AnySigner | None) -> VerifyKey | None:
    """The public key of a signer, read from its file if given as a path."""
    if isinstance(signer, str | os.PathLike):
        return VerifyKey.read(signer)
    remedy = "Pass the `public` of the owner's SigningKey, or the path of their signing.pub."
    expected = "signer: expected a VerifyKey or the path of its file"
    check_type(signer, VerifyKey | None, expected, remedy)
    return signer


def expected_signer(signer: AnySigner | None, of_grant: VerifyKey | None) -> VerifyKey | None:
    """The signer that a file must have; None if neither the caller nor the grant names one.

    Args:
        signer: the signer that the caller names.
        of_grant: the signer that the grant names.

    Raises:
        GrantError: they name different signers.
        TypeError, OSError: see `verify_key`.
    """
    public = verify_key(signer)
    if public is not None and of_grant is not None and public != of_grant:
        raise GrantError(
            f"grant: expected its signer, {of_grant.hex()}, got {public.hex()}. Check both with "
            "the owner, and leave signer out or correct it.",
            reason="signer",
        )
    return public or of_grant


def owner_key(signer: AnySigner) -> VerifyKey | None:
    """The owner's public key; None for `UNSIGNED`, which has to be said.

    Raises:
        TypeError, OSError: see `verify_key`; or None.
    """
    if signer is None:
        raise TypeError(
            "signer: expected the owner's public key, the path of its file, or 'unsigned', got "
            "None. Name your signing.pub; 'unsigned' only for your own copy of a file that you "
            "never signed."
        )
    return None if signer == UNSIGNED else verify_key(signer)


def check_owner(envelopes: Iterable[Envelope], expected: VerifyKey | None, path: object) -> None:
    """Refuses a file that the owner did not sign, before they vouch for it.

    Args:
        envelopes: envelopes of the file or files, with signatures already checked.
        expected: the owner's public key; None if they never signed it.
        path: the file, for messages.

    Raises:
        IntegrityError: the file has another signer, or none.
    """
    for envelope in envelopes:
        if (actual := envelope.manifest.signer) != expected:
            wanted, got = (
                "without a signature" if key is None else f"signed by {key.hex()}"
                for key in (expected, actual)
            )
            raise IntegrityError(
                f"{path}: expected a file {wanted}, got one {got}: a customer could have altered "
                "it. Use the copy that you wrote, and name the key that signed it "
                '(--signer signing.pub), or "unsigned" if it was never signed.',
                reason="signer",
            )
