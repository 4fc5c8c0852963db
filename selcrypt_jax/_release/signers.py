"""Who must have signed a file: as the caller says, as a grant says, as its owner knows."""

import os
from collections.abc import Iterable

from .._format.envelope import Envelope
from .._io.errors import GrantError, IntegrityError, check_type
from .._keys.files import AnyPath
from .._keys.signing import VerifyKey

AnySigner = VerifyKey | AnyPath
"""A public key, or the path of its file."""

UNSIGNED = "unsigned"
"""In place of a signer: a file of the owner's own that never was signed."""


def verify_key(signer: AnySigner | None) -> VerifyKey | None:
    """The public key of a signer, read if it is a path."""
    if isinstance(signer, str | os.PathLike):
        return VerifyKey.read(signer)
    remedy = "Pass the `public` of the owner's SigningKey, or the path of their signing.pub."
    expected = "signer: expected a VerifyKey or the path of its file"
    check_type(signer, VerifyKey | None, expected, remedy)
    return signer


def expected_signer(signer: AnySigner | None, of_grant: VerifyKey | None) -> VerifyKey | None:
    """The signer that a file must have; None if neither caller nor grant say.

    Args:
        signer: what the caller says.
        of_grant: what the grant says.

    Raises:
        GrantError: they say different things.
        TypeError, OSError: see `verify_key`.
    """
    public = verify_key(signer)
    if public is not None and of_grant is not None and public != of_grant:
        raise GrantError(
            f"grant: expects files signed by {of_grant.hex()}, got signer {public.hex()}. "
            "Use one of them.",
            reason="signer",
        )
    return public or of_grant


def check_owner(envelopes: Iterable[Envelope], signer: AnySigner | None, path: object) -> None:
    """Refuses a file that the owner did not sign, before they vouch for it.

    Args:
        envelopes: of the file or files, their signatures checked.
        signer: the owner's public key; `UNSIGNED`; None to take the file's own word.
        path: for messages.

    Raises:
        IntegrityError: another signer, or none.
    """
    if signer is None:
        return
    expected = None if signer == UNSIGNED else verify_key(signer)
    for envelope in envelopes:
        if (actual := envelope.manifest.signer) != expected:
            wanted, got = (
                "without a signature" if key is None else f"signed by {key.hex()}"
                for key in (expected, actual)
            )
            raise IntegrityError(
                f"{path}: expected a file {wanted}, got one {got}: a customer could have altered "
                "it. Take the copy that you wrote, and name the key that it was signed with "
                '(--signer signing.pub), or "unsigned" if it never was.',
                reason="signer",
            )
