"""Uses protected files: issue grants, unlock, inspect, verify.

Files are checked in this order: signature, boxes, and then for every tensor digest, decryption,
plaintext digest. The output appears under its name only after all checks.
"""

import math
import operator
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from .._ciphers.lossless import LosslessCipher
from .._format.envelope import Envelope
from .._format.manifest import Rest
from .._format.unlocked import unlocked_entries
from .._io.companions import Companions
from .._io.errors import IntegrityError, check_type
from .._io.safetensors import SafetensorsFile
from .._io.strict_json import show
from .._keys.grant import Grant
from .._keys.keys import MODEL_ID_BYTES, LevelKey, Secret, level_key
from .._keys.signing import VerifyKey
from .checkpoint import AnyPath, Checkpoint, open_checkpoint
from .outputs import checkpoint_outputs
from .signers import AnySigner, check_owner, expected_signer, owner_key

AnyGrant = Grant | LevelKey | AnyPath
"""A grant, a level key, or the path of a grant file."""


def grant_key(grant: AnyGrant, level: int | None = None) -> tuple[LevelKey, VerifyKey | None]:
    """The level key, and the signer that the grant requires.

    Args:
        grant: see `AnyGrant`.
        level: a level lower than the grant's.

    Raises:
        TypeError: the grant has another type.
        GrantError, OSError: the file does not hold a grant, or the level is above the grant's.
    """
    if isinstance(grant, str | os.PathLike):
        grant = Grant.read(grant)
    if isinstance(grant, LevelKey):
        grant = Grant(grant)
    expected = "grant: expected a Grant, a LevelKey or the path of a grant file"
    check_type(grant, Grant, expected, "The owner makes one with issue_grant.")
    return (grant.key if level is None else grant.key.lower(level)), grant.signer


def issue_grant(path: AnyPath, *, level: int, secret: Secret, signer: AnySigner) -> Grant:
    """Issues a grant: a key that opens the levels of a protected file up to a given one.

    Args:
        path: protected file, or the index or folder of a protected checkpoint in several files.
        level: the highest level that the grant opens.
        secret: the owner's secret.
        signer: the owner's public key, or its file; ``"unsigned"`` if the file was never signed and
            this is your own copy. A customer of the top level can seal an altered file, and sign it
            or not: the grant would vouch for it. (Customers of lower levels cannot, since all boxes
            are opened here.)

    Returns:
        A grant for this file only; if the file is signed, its signer must have signed whatever the
        grant opens. See `Grant.write`.

    Raises:
        ValueError: not a protected file, or a level that it does not have.
        TypeError: no signer.
        GrantError: the secret did not protect this file.
        IntegrityError: another owner's file, or one that was altered.
        OSError: a file that cannot be read.

    Examples:
        >>> secret = Secret.read("keys/secret.key")
        >>> grant = issue_grant(
        ...     "model.safetensors", level=1, secret=secret, signer="keys/signing.pub"
        ... )
        >>> grant.write("bob.grant")
    """
    owner = owner_key(signer)
    with open_checkpoint(path) as checkpoint:
        envelopes = checkpoint.envelopes()
        manifest = next(iter(envelopes.values())).manifest
        levels = len(manifest.levels)
        if not 1 <= operator.index(level) <= levels:
            raise ValueError(
                f"{checkpoint.path}: level: expected 1..{levels}, got {level}. Name "
                "one of these; level 0, the file as it is, needs no key."
            )
        key = level_key(secret, manifest.model_id, levels=levels)
        # Another secret would open nothing. And a customer who altered the manifest, which all
        # boxes are bound to, can only seal the boxes of their own levels again.
        checkpoint.unlocked(envelopes, key, owner=True)
        check_owner(envelopes.values(), owner, checkpoint.path)
    return Grant(key.lower(level), manifest.signer)


def unlock_file(
    path: AnyPath,
    output: AnyPath,
    grant: AnyGrant,
    *,
    level: int | None = None,
    signer: AnySigner | None = None,
    exact_bytes: bool = False,
    copy_config: bool = False,
    force: bool = False,
) -> Companions | None:
    """Writes the checkpoint that a grant opens; at the top level it is the original.

    Only its owner may read a new file or folder: it is worth as much as the grant. A file that is
    replaced keeps its permissions.

    Args:
        path: protected file, or the index or folder of a protected checkpoint in several files.
        output: path of the new file, or of the new folder for a checkpoint in several files.
        grant: a grant, a level key, or the path of a grant file.
        level: a level lower than the grant's.
        signer: the owner's public key, or its file: refuse a file that is unsigned or signed by
            anyone else. A grant of a signed file enforces this by itself; a level key does not.
        exact_bytes: leave out the metadata entry ``selcrypt-unlocked``, which names the level and
            the model of a file below the top level. A file without metadata never gets it: some
            loaders refuse metadata that names no framework.
        copy_config: also copy the other files of a folder: configuration, tokenizer, and everything
            else that cannot be weights, including subfolders. Links that lead out of the folder,
            hidden files and keys are left out. Only the weights are signed and checked, not these
            files.
        force: replace an existing file.

    Returns:
        With `copy_config`, the files ``copied``, and those ``left_out`` and why; otherwise None.

    Raises:
        ValueError: not a protected file; or `copy_config` for a file by itself.
        GrantError: the grant does not open it, or requires another signer.
        IntegrityError: the file was altered.
        OSError: a file that cannot be read or written. Then there is no output.

    Examples:
        >>> unlock_file("model.safetensors", "unlocked.safetensors", "alice.grant", level=1)
    """
    key, of_grant = grant_key(grant, level)
    expected = expected_signer(signer, of_grant)
    with open_checkpoint(path) as checkpoint:
        beside = checkpoint.companions() if copy_config else None
        plain = checkpoint.unlocked(checkpoint.envelopes(expected), key)
        with checkpoint_outputs(
            checkpoint, output, force=force, private=True, beside=beside
        ) as create:
            for name, source in plain.items():
                own = source.envelope.own
                # Some loaders refuse metadata that name no framework, and take a file without any.
                bare = own is None and isinstance(checkpoint.files[name], SafetensorsFile)
                if not exact_bytes and not bare:
                    own = unlocked_entries(own, source.envelope.manifest, key.level)
                create(name).plain(source, own)
    return beside


class LevelReport(NamedTuple):
    """The weights that one level adds to the level below.

    Attributes:
        level: 1..M.
        groups: number of groups in the ring.
        weights: number of weights in them.
        share: the encrypted weights that the key of this level opens, as a share of all weights in
            the file. In a sealed file level 1 opens all weights but the rings above it.
        opens: whether the grant opens it; None without a grant.
    """

    level: int
    groups: int
    weights: int
    share: float
    opens: bool | None


class Inspection(NamedTuple):
    """A protected file's description of itself.

    Attributes:
        path: the file's path.
        model_id: 32 hex digits.
        signer: the public key in hex, or None. The signature over the manifest has been checked;
            whether the tensors match the manifest, only `verify_file` checks.
        cipher: the parameters of the rings' cipher.
        rest: ``"sealed"``: the file cannot be used without a grant; ``"plain"``: anyone can run
            level 0, in which only the rings are encrypted.
        levels: one report per level.
        tensors: the number of tensors.
        weights: the number of weights in them.
        file_bytes: the total size of all files.
        manifest_bytes: how much of it is manifest, boxes and signature.
        files: the number of files.

    Examples:
        >>> found = inspect_file("model.safetensors")
        >>> shares = [level.share for level in found.levels]
    """

    path: str
    model_id: str
    signer: str | None
    cipher: LosslessCipher
    rest: Rest
    levels: tuple[LevelReport, ...]
    tensors: int
    weights: int
    file_bytes: int
    manifest_bytes: int
    files: int


def inspection_of(
    checkpoint: Checkpoint, envelopes: Mapping[str, Envelope], key: LevelKey | None = None
) -> Inspection:
    """The description of open files, whose envelopes have been checked."""
    manifests = [envelope.manifest for envelope in envelopes.values()]
    first = manifests[0]
    weights = sum(math.prod(t.shape) for m in manifests for t in m.tensors.values())
    levels, total = [], 0
    by_level = list(zip(*(m.levels for m in manifests), strict=True))
    rings = [sum(size.weights for size in sizes) for sizes in by_level]
    if first.rest == "sealed":
        rings[0] = weights - sum(rings[1:])
    for number, (sizes, ring) in enumerate(zip(by_level, rings, strict=True), 1):
        total += ring
        opens = None if key is None else number <= key.level
        groups = sum(size.groups for size in sizes)
        levels.append(LevelReport(number, groups, ring, total / max(weights, 1), opens))
    return Inspection(
        path=str(checkpoint.path),
        model_id=first.model_id.hex(),
        signer=None if first.signer is None else first.signer.hex(),
        cipher=first.cipher,
        rest=first.rest,
        levels=tuple(levels),
        tensors=sum(len(m.tensors) for m in manifests),
        weights=weights,
        file_bytes=sum(file.size for file in checkpoint.files.values()),
        manifest_bytes=sum(
            len(key.encode()) + len(value.encode())
            for envelope in envelopes.values()
            for key, value in envelope.entries().items()
            if key not in (envelope.own or {})
        ),
        files=len(checkpoint.files),
    )


def inspect_file(path: AnyPath, grant: AnyGrant | None = None) -> Inspection:
    """A protected file's description of itself; does not read its tensors.

    Args:
        path: protected file, or the index or folder of a protected checkpoint in several files.
        grant: also report what this grant opens; its boxes are opened to check that it does.

    Raises:
        ValueError: not a protected file.
        GrantError: the grant does not open it.
        IntegrityError: an altered manifest, signature or box.

    Examples:
        >>> found = inspect_file("model.safetensors", "alice.grant")
        >>> assert [level.opens for level in found.levels] == [True, True, False]
    """
    key, signer = (None, None) if grant is None else grant_key(grant)
    with open_checkpoint(path) as checkpoint:
        envelopes = checkpoint.envelopes(signer)
        checkpoint.unlocked(envelopes, key)
        return inspection_of(checkpoint, envelopes, key)


def verify_file(
    path: AnyPath,
    *,
    signer: AnySigner | None = None,
    model_id: bytes | str | None = None,
    grant: AnyGrant | None = None,
) -> Inspection:
    """Checks the signature and every digest; with a grant, also everything that it opens.

    In the folder of a checkpoint, weights that do not belong to it are refused too, since some
    programs load a stray ``model.safetensors`` in place of what its index names.

    Args:
        path: protected file, or the index or folder of a protected checkpoint.
        signer: the owner's public key, or its file. Without it, the signer named in the file is
            accepted.
        model_id: the model id of the expected release, 16 bytes or their hex. Without it, an
            earlier release by the same owner passes too: its signature is valid.
        grant: a grant, a level key, or the path of a grant file.

    Raises:
        ValueError: not a protected file; or an unsigned one without a grant, which proves nothing;
            or a malformed model id.
        GrantError: the grant does not open it, or requires another signer.
        IntegrityError: the file was altered, or is another release.

    Examples:
        >>> found = verify_file("model.safetensors", signer="keys/signing.pub")
    """
    key, of_grant = (None, None) if grant is None else grant_key(grant)
    expected, wanted = expected_signer(signer, of_grant), _as_hex(model_id)
    with open_checkpoint(path) as checkpoint:
        envelopes = checkpoint.envelopes(expected)
        checkpoint.check_no_others()
        manifest = next(iter(envelopes.values())).manifest
        if wanted not in (None, actual := manifest.model_id.hex()):
            raise IntegrityError(
                f"{checkpoint.path}: expected model {wanted}, got model {actual}. It is another "
                "release: get the current one from its owner.",
                reason="model",
            )
        if manifest.signer is None and key is None:
            raise ValueError(
                f"{checkpoint.path}: is not signed, so anyone who altered it could have made "
                "its digests fit. Verify it with a grant, or have it signed by its owner."
            )
        for name, plain in checkpoint.unlocked(envelopes, key).items():
            file = checkpoint.files[name]
            if isinstance(file, SafetensorsFile):
                file.ask_stock_reader()
            for _ in plain.pieces():
                pass
        return inspection_of(checkpoint, envelopes, key)


def _as_hex(model_id: bytes | str | None) -> str | None:
    if model_id is None:
        return None
    text = model_id.strip().lower() if isinstance(model_id, str) else bytes(model_id).hex()
    if not re.fullmatch(f"[0-9a-f]{{{2 * MODEL_ID_BYTES}}}", text):
        raise ValueError(
            f"model_id: expected {2 * MODEL_ID_BYTES} digits in hex, got {show(model_id)}. Copy it "
            "from where the owner published it, or from selcrypt inspect."
        )
    return text
