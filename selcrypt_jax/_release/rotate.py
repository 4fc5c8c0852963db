"""Rotation: a protected file under new keys."""

from typing import NamedTuple

from .._io.companions import Companions
from .._keys.keys import Secret, level_key
from .._keys.signing import SigningKey, check_signing
from .checkpoint import AnyPath, open_checkpoint
from .outputs import Job, Protection, checkpoint_outputs
from .signers import AnySigner, verify_key


class Rotated(NamedTuple):
    """The result of a rotation.

    Attributes:
        model_id: 16 bytes that identify the new protection.
        beside: the files ``copied`` along with the weights, and those ``left_out`` and why; None
            without `copy_config`.

    Examples:
        >>> secret, signing = Secret.read("keys/secret.key"), SigningKey.read("keys/signing.key")
        >>> done = rotate_file("model.safetensors", "new.safetensors", secret=secret,
        ...                    signing=signing)
        >>> len(done.model_id)
        16
    """

    model_id: bytes
    beside: Companions | None = None


def rotate_file(
    path: AnyPath,
    output: AnyPath | None = None,
    *,
    secret: Secret,
    signing: SigningKey | None = None,
    old_signer: AnySigner | None = None,
    copy_config: bool = False,
    force: bool = False,
) -> Rotated:
    """Re-encrypts a protected file under a new model id and new keys; old grants do not open it.

    New keys change the quality of the levels below the top: measure them again (`measure_levels`).

    An old grant still opens old copies of the file. Anyone who can see the weights that are not
    graded (everyone if the rest is plain, holders of level 1 if it is sealed) can compare the two
    files, which reveals the positions of the graded weights. Many such files also reveal which
    level opens which weights.

    Args:
        path: protected file, or the index or folder of a protected checkpoint in several files.
        output: path of the new file; by default it replaces the old one. Required for a checkpoint
            in several files.
        secret: the owner's secret.
        signing: the key that signs the new file. Needed if the old file is signed; refused if it is
            not, since nothing then shows that the file is the owner's.
        old_signer: the public key that the old file is signed with, or its file, if it is not that
            of ``signing``.
        copy_config: also copy the other files of a folder, as in `unlock_file`.
        force: replace an existing file at ``output``.

    Returns:
        The new model id, and the files that were copied.

    Raises:
        ValueError: a signed file and no signing key, or the other way round; or `copy_config` for a
            file by itself.
        GrantError: the secret did not protect this file.
        IntegrityError: another signer, or the file was altered.
        OSError: a file that cannot be read or written. Then the old file is unchanged.

    Examples:
        >>> secret, signing = Secret.read("keys/secret.key"), SigningKey.read("keys/signing.key")
        >>> done = rotate_file("model.safetensors", "new.safetensors", secret=secret,
        ...                    signing=signing)
        >>> grant = issue_grant(
        ...     "new.safetensors", level=2, secret=secret, signer=signing.public
        ... )
    """
    check_signing(signing)
    with open_checkpoint(path) as checkpoint:
        envelopes = checkpoint.envelopes()
        manifest = next(iter(envelopes.values())).manifest
        levels = len(manifest.levels)
        if (manifest.signer is None) != (signing is None):
            raise ValueError(
                f"{checkpoint.path}: is signed by {manifest.signer.hex()}, expected a signing key "
                "for the new file, got none. Pass the owner's signing key (--signing)."
                if manifest.signer is not None
                else f"{checkpoint.path}: is not signed, so it may have been altered by anyone "
                "with a grant; expected no signing key, got one. To sign it, protect the original "
                "again."
            )
        if signing is not None:
            # Signing what somebody else signed would vouch for their changes.
            expected = verify_key(old_signer) or signing.public
            for envelope in envelopes.values():
                envelope.check_signature(expected)
        checkpoint.check_whole(manifest)
        key = level_key(secret, manifest.model_id, levels=levels)
        plain = checkpoint.unlocked(envelopes, key, owner=True)
        protection = Protection.new(secret, levels, manifest.cipher, manifest.rest, signing)
        if output is None and (checkpoint.index is not None or checkpoint.in_orbax):
            raise ValueError(
                f"{checkpoint.path}: is a checkpoint in a folder, expected a new folder for the "
                "output, got none. Name one."
            )
        beside = checkpoint.companions() if copy_config else None
        with checkpoint_outputs(checkpoint, output, force=force, beside=beside) as create:
            for name, source in plain.items():
                old = source.envelope
                job = Job(source, old.own, source.rings, checkpoint.shard(name), old.what)
                create(name).protected(job, protection)
    return Rotated(protection.key.model_id, beside)
