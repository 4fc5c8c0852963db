"""What is done with protected files: unlock, rotate, inspect, verify.

What is read is checked in this order: signature, boxes, and then for every tensor digest,
decryption, plaintext digest; the output appears under its name when all of it has passed.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from ._checkpoint import AnyPath, Checkpoint, Protection, checkpoint_outputs, open_checkpoint
from ._envelope import Envelope
from ._keys import Grant, LevelKey, Secret, SigningKey, level_key
from ._lossless import LosslessCipher
from ._safetensors import SafetensorsFile
from ._tensors import Unlocked


def grant_key(grant: Grant | LevelKey, level: int | None = None) -> tuple[LevelKey, bytes | None]:
    """The level key, and the signer that the grant insists on."""
    key, signer = (grant.key, grant.signer) if isinstance(grant, Grant) else (grant, None)
    return (key if level is None else key.lower(level)), signer


def issue_grant(path: AnyPath, *, level: int, secret: Secret) -> Grant:
    """What a customer is given to open a level of a protected file.

    Args:
        path: protected file, or checkpoint in several files.
        level: the highest level that the grant opens.
        secret: the owner's.

    Returns:
        A grant for this file, and for files of its signer only, if it has one. See `write_grant`.

    Raises:
        ValueError: no protected file, or a level that it does not have.
        IntegrityError: another owner's file, or one that is not as its owner made it.
        OSError: a file that cannot be read.
    """
    with open_checkpoint(path) as checkpoint:
        envelopes = list(checkpoint.envelopes().values())
        manifest = envelopes[0].manifest
        key = level_key(secret, manifest.model_id, level=level, levels=len(manifest.levels))
        for envelope in envelopes:
            envelope.open(key)  # a grant of another secret would open nothing
    return Grant(key, manifest.signer)


def unlock_file(
    path: AnyPath,
    output: AnyPath,
    grant: Grant | LevelKey,
    *,
    level: int | None = None,
    force: bool = False,
) -> None:
    """Writes the checkpoint that a grant opens; at the top level it is the original.

    Args:
        path: protected file, or the index or folder of a protected checkpoint in several files.
        output: path of the new file, or of the new folder for a checkpoint in several files.
        grant: a grant (`read_grant`), or a level key.
        level: a lower level than that of the grant.
        force: replace an existing file.

    Raises:
        ValueError: no protected file, or a grant that is not for it.
        IntegrityError: it is not what its owner made.
        OSError: what cannot be read or written. There is no output then.
    """
    key, signer = grant_key(grant, level)
    with open_checkpoint(path) as checkpoint:
        envelopes = checkpoint.envelopes(signer)
        for envelope in envelopes.values():
            envelope.check_key(key)
        with checkpoint_outputs(checkpoint, output, force=force) as create:
            for name, file in checkpoint.files.items():
                with create(name) as out:
                    out.plain(Unlocked(file, envelopes[name], key), envelopes[name].own)


def rotate_file(
    path: AnyPath,
    output: AnyPath | None = None,
    *,
    secret: Secret,
    signing: SigningKey | None = None,
    force: bool = False,
) -> bytes:
    """Gives a protected file a new model id, new keys and new ciphertext; old grants end with it.

    Who still has the old file can open that one, of course.

    Args:
        path: protected file, or checkpoint in several files.
        output: where to write it; by default it takes the place of the old file. A checkpoint in
            several files needs one.
        secret: the owner's.
        signing: signs the new file; needed if the old one is signed.
        force: replace an existing file at ``output``.

    Returns:
        The new model id.

    Raises:
        ValueError: another secret, or a signed file and no signing key.
        IntegrityError: it is not what its owner made.
        OSError: what cannot be read or written. The old file is as it was then.
    """
    with open_checkpoint(path) as checkpoint:
        envelopes = checkpoint.envelopes()
        manifest = next(iter(envelopes.values())).manifest
        levels = len(manifest.levels)
        if manifest.signer is not None and signing is None:
            raise ValueError(
                f"{checkpoint.path}: is signed by {manifest.signer.hex()}, expected a signing key "
                "for the new file, got none. Pass the owner's signing key."
            )
        key = level_key(secret, manifest.model_id, level=levels, levels=levels)
        protection = Protection.new(secret, levels, manifest.cipher, signing)
        in_place = output is None
        if in_place and (checkpoint.index is not None or checkpoint.path.is_dir()):
            raise ValueError(
                f"{checkpoint.path}: is a checkpoint in a folder, expected a new folder for the "
                "output, got none. Name one."
            )
        with checkpoint_outputs(
            checkpoint,
            checkpoint.path if in_place else output,
            force=force or in_place,
            in_place=in_place,
        ) as create:
            for name, file in checkpoint.files.items():
                plain = Unlocked(file, envelopes[name], key)
                with create(name) as out:
                    out.protected(
                        plain,
                        envelopes[name].own,
                        plain.rings,
                        protection,
                        checkpoint.shard(name),
                        str(file.path),
                    )
    return protection.key.model_id


class LevelReport(NamedTuple):
    """What one level adds to the one below.

    Attributes:
        level: 1..M.
        groups: number of groups in the ring.
        weights: number of weights in them.
        share: of all weights of the file, up to and including this level.
        opens: whether the grant opens it; None without one.
    """

    level: int
    groups: int
    weights: int
    share: float
    opens: bool | None


class Inspection(NamedTuple):
    """What a protected file says of itself.

    Attributes:
        path: of the file.
        model_id: in hex.
        signer: public key in hex, or None. Only `verify_file` checks the signature.
        cipher: of the rings, its parameters.
        levels: one report a level.
        tensors: how many there are.
        weights: how many numbers they hold.
        file_bytes: size of all files together.
        manifest_bytes: how much of it is manifest, boxes and signature.
        files: how many.
    """

    path: str
    model_id: str
    signer: str | None
    cipher: LosslessCipher
    levels: tuple[LevelReport, ...]
    tensors: int
    weights: int
    file_bytes: int
    manifest_bytes: int
    files: int


def _report(
    checkpoint: Checkpoint, envelopes: Mapping[str, Envelope], grant: Grant | LevelKey | None
) -> Inspection:
    manifests = [envelope.manifest for envelope in envelopes.values()]
    first = manifests[0]
    weights = sum(math.prod(t.shape) for m in manifests for t in m.tensors.values())
    opened = 0
    if grant is not None:
        opened = grant_key(grant)[0].level
    levels, total = [], 0
    for number, sizes in enumerate(zip(*(m.levels for m in manifests), strict=True), 1):
        ring = sum(size.weights for size in sizes)
        total += ring
        opens = None if grant is None else number <= opened
        groups = sum(size.groups for size in sizes)
        levels.append(LevelReport(number, groups, ring, total / max(weights, 1), opens))
    return Inspection(
        path=str(checkpoint.path),
        model_id=first.model_id.hex(),
        signer=None if first.signer is None else first.signer.hex(),
        cipher=first.cipher,
        levels=tuple(levels),
        tensors=sum(len(m.tensors) for m in manifests),
        weights=weights,
        file_bytes=sum(file.size for file in checkpoint.files.values()),
        manifest_bytes=sum(
            len(key.encode()) + len(value.encode())
            for envelope in envelopes.values()
            for key, value in envelope.entries().items()
        ),
        files=len(checkpoint.files),
    )


def inspect_file(path: AnyPath, grant: Grant | LevelKey | None = None) -> Inspection:
    """What a protected file says of itself; its tensors are not read.

    Args:
        path: protected file, or checkpoint in several files.
        grant: also tells what this one opens; its boxes are opened to be sure.

    Raises:
        ValueError: no protected file, or a grant that is not for it.
        IntegrityError: a manifest, a signature or a box that is not as its owner made it.
    """
    with open_checkpoint(path) as checkpoint:
        key, signer = (None, None) if grant is None else grant_key(grant)
        envelopes = checkpoint.envelopes(signer)
        if key is not None:
            for envelope in envelopes.values():
                envelope.open(key)
        return _report(checkpoint, envelopes, grant)


def verify_file(
    path: AnyPath, *, signer: bytes | None = None, grant: Grant | LevelKey | None = None
) -> Inspection:
    """Checks the signature and every digest; with a grant, also all that it opens.

    Args:
        path: protected file, or checkpoint in several files.
        signer: public key of the owner (`read_verify_key`). Without it the file's own word is
            taken for who signed it.
        grant: a grant, or a level key.

    Raises:
        ValueError: no protected file; or one that is not signed, of which nothing can be said
            without a grant.
        IntegrityError: it is not what its owner made.
    """
    with open_checkpoint(path) as checkpoint:
        key, insisted = (None, None) if grant is None else grant_key(grant)
        if signer is not None and insisted is not None and signer != insisted:
            raise ValueError(
                f"grant: expects files signed by {insisted.hex()}, got signer {signer.hex()}. "
                "Use one of them."
            )
        envelopes = checkpoint.envelopes(signer or insisted)
        manifest = next(iter(envelopes.values())).manifest
        if manifest.signer is None and key is None:
            raise ValueError(
                f"{checkpoint.path}: is not signed, so whoever altered it could have made its "
                "digests fit. Verify it with a grant, or have it signed by its owner."
            )
        for name, file in checkpoint.files.items():
            if isinstance(file, SafetensorsFile):
                file.ask_stock_reader()
            for _ in Unlocked(file, envelopes[name], key).pieces():
                pass
        return _report(checkpoint, envelopes, grant)
