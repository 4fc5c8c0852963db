"""Protected checkpoints on disk, tensor by tensor: protect, unlock, verify, inspect, rotate.

A checkpoint is one ``.safetensors`` file, or several with an index. What is read is checked in
this order: signature, boxes, and then for every tensor digest, decryption, plaintext digest; the
output appears under its name when all of it has passed.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

from ._atomic import check_output, new_file, new_folder
from ._dtypes import SAFETENSORS
from ._envelope import (
    DAMAGED,
    NO_DIGEST,
    Envelope,
    IntegrityError,
    LevelSize,
    Manifest,
    SealedRing,
    Tensor,
    metadata_digest,
)
from ._json import show
from ._keys import Grant, LevelKey, Secret, SigningKey, level_key, new_model_id
from ._lossless import LosslessCipher
from ._safetensors import SafetensorsFile, header
from ._shards import ShardIndex, check_shards, find_shards

if TYPE_CHECKING:
    from ._orbax import OrbaxCheckpoint

Rings = Mapping[str, list[tuple[int, SealedRing]]]
"""Tensor → its rings, with their levels."""

AnyPath = str | os.PathLike[str]

_BATCH = 1 << 25  # bytes of tensors that are held together


class TensorSource(Protocol):
    """Named tensors as bytes: a file, or arrays in memory."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Name → anything with a ``dtype`` (safetensors' name) and a ``shape``, in order."""
        ...

    def read(self, name: str) -> bytearray:
        """The bytes of a tensor, little-endian, in C order; the caller may change them."""
        ...

    def chunks(self, name: str) -> Iterable[bytearray]:
        """The same, piece by piece."""
        ...


Write = Callable[[str, bytearray], object]


# --- tensors ------------------------------------------------------------------------------------


def encrypt_tensors(
    source: TensorSource,
    rings: Rings,
    key: LevelKey,
    cipher: LosslessCipher,
    write: Write,
    *,
    what: str,
) -> tuple[dict[str, Tensor], dict[str, list[tuple[int, SealedRing]]]]:
    """Reads tensors, encrypts their rings, and writes them in the order of the source.

    Returns:
        The table of the tensors as shipped, and the rings with the digests of their plaintext.
    """
    from ._rings import rewrite_tensor

    table: dict[str, Tensor] = {}
    done = {}
    for name, info in source.tensors.items():
        digest = hashlib.sha256()
        if name in rings:
            data = source.read(name)
            done[name] = rewrite_tensor(
                data, info, rings[name], key, cipher, inverse=False, what=what
            )
            pieces: Iterable[bytearray] = (data,)
        else:
            pieces = source.chunks(name)
        for piece in pieces:
            digest.update(piece)
            write(name, piece)
        table[name] = Tensor(info.dtype, tuple(info.shape), digest.hexdigest())
    return table, done


class Unlocked:
    """The tensors of a protected source as a level sees them, each checked before it is given.

    Args:
        source: the tensors as shipped.
        envelope: of the file; its signature is checked by the caller.
        key: of level m, or None for level 0.

    Raises:
        ValueError: a key of another model.
        IntegrityError: anything that is not as its owner made it, here or while reading.
    """

    def __init__(self, source: TensorSource, envelope: Envelope, key: LevelKey | None) -> None:
        check_table(source, envelope)
        self.tensors = source.tensors
        self._source, self._envelope, self._key = source, envelope, key
        self.rings = {} if key is None else envelope.open(key)

    def read(self, name: str) -> bytearray:
        """See `TensorSource`."""
        return self._decrypt(name, self._load(name))

    def chunks(self, name: str) -> Iterator[bytearray]:
        """See `TensorSource`. To be read to its end: the digest is known there."""
        if name in self.rings:
            yield self.read(name)
            return
        digest = hashlib.sha256()
        for piece in self._source.chunks(name):
            digest.update(piece)
            yield piece
        _check_digest(digest, self._envelope, name)

    def pieces(self) -> Iterator[tuple[str, bytearray]]:
        """All tensors, in order, piece by piece; as `chunks`, with all processors at work."""
        for batch in _batches(self.tensors):
            if len(batch) == 1:
                yield from ((batch[0], piece) for piece in self.chunks(batch[0]))
            else:
                yield from zip(batch, self._in_parallel(batch), strict=True)

    def _in_parallel(self, names: Sequence[str]) -> Iterator[bytearray]:
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            loaded = [pool.submit(self._load, name) for name in names]
            if self.rings:
                from . import _rings  # noqa: F401 - NumPy starts while the others read
            done = [
                pool.submit(lambda n, f: self._decrypt(n, f.result()), name, future)
                for name, future in zip(names, loaded, strict=True)
            ]
            del loaded
            while done:  # not held any longer than it takes
                yield done.pop(0).result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _load(self, name: str) -> bytearray:
        data = self._source.read(name)
        _check_digest(hashlib.sha256(data), self._envelope, name)
        return data

    def _decrypt(self, name: str, data: bytearray) -> bytearray:
        if name in self.rings:
            from ._rings import rewrite_tensor

            assert self._key is not None
            rewrite_tensor(
                data,
                self.tensors[name],
                self.rings[name],
                self._key,
                self._envelope.manifest.cipher,
                inverse=True,
                what=self._envelope.what,
            )
        return data


def _batches(tensors: Mapping[str, Any]) -> Iterator[list[str]]:
    """Neighbours that are held in memory together; large tensors alone."""
    batch: list[str] = []
    room = _BATCH
    for name, info in tensors.items():
        size = math.prod(info.shape) * SAFETENSORS[info.dtype].bits // 8
        if batch and size > room:
            yield batch
            batch, room = [], _BATCH
        batch.append(name)
        room -= size
    if batch:
        yield batch


def check_table(source: TensorSource, envelope: Envelope) -> None:
    """Checks names, dtypes and shapes against the manifest.

    Raises:
        IntegrityError: they differ.
    """
    expected = {n: (t.dtype, t.shape) for n, t in envelope.manifest.tensors.items()}
    actual = {n: (t.dtype, tuple(t.shape)) for n, t in source.tensors.items()}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            raise IntegrityError(
                f"{envelope.what}: tensor {show(name)}: expected {show(expected.get(name))} as the "
                f"manifest says, got {show(actual.get(name))}. {DAMAGED}"
            )


def _check_digest(digest: Any, envelope: Envelope, name: str) -> None:
    expected = envelope.manifest.tensors[name].sha256
    if digest.hexdigest() != expected:
        raise IntegrityError(
            f"{envelope.what}: tensor {show(name)}: expected SHA-256 {expected[:16]}… as the "
            f"manifest says, got {digest.hexdigest()[:16]}…. {DAMAGED}"
        )


# --- protections --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protection:
    """What all files of one protection share.

    Attributes:
        key: of the top level; it names the model.
        cipher: see `LosslessCipher`.
        signing: of the owner, or None.
        origin: for messages, where the checkpoint comes from.
    """

    key: LevelKey
    cipher: LosslessCipher
    signing: SigningKey | None

    @classmethod
    def new(
        cls, secret: Secret, levels: int, cipher: LosslessCipher, signing: SigningKey | None
    ) -> "Protection":
        """A protection with a model id of its own, so that no keystream is used twice."""
        key = level_key(secret, new_model_id(), level=levels, levels=levels)
        return cls(key, cipher, signing)

    def seal(
        self,
        tensors: Mapping[str, Tensor],
        rings: Rings,
        metadata: Mapping[str, str] | None,
        shard: tuple[int, int] | None,
        what: str,
    ) -> Envelope:
        """The envelope of one file."""
        levels: list[list[SealedRing]] = [[] for _ in range(self.key.level)]
        for name in rings:
            for level, ring in rings[name]:
                levels[level - 1].append(ring)

        def size(level: list[SealedRing]) -> LevelSize:
            weights = [ring.weights(tensors[ring.tensor].shape) for ring in level]
            return LevelSize(sum(ring.groups for ring in level), sum(weights))

        manifest = Manifest(
            model_id=self.key.model_id,
            cipher=self.cipher,
            levels=tuple(map(size, levels)),
            tensors=tensors,
            signer=None if self.signing is None else self.signing.public,
            metadata=None if metadata is None else metadata_digest(metadata),
            shard=shard,
        )
        return Envelope.seal(manifest, metadata, levels, self.key, self.signing, what)

    def encrypt(
        self,
        source: TensorSource,
        metadata: Mapping[str, str] | None,
        rings: Rings,
        shard: tuple[int, int] | None,
        write: Write,
        what: str,
    ) -> Envelope:
        """Encrypts the tensors of one file, in order; what has to go with them."""
        table, done = encrypt_tensors(source, rings, self.key, self.cipher, write, what=what)
        return self.seal(table, done, metadata, shard, what)


class Output(Protocol):
    """One file of a new checkpoint."""

    def protected(
        self,
        source: TensorSource,
        metadata: Mapping[str, str] | None,
        rings: Rings,
        protection: Protection,
        shard: tuple[int, int] | None,
        what: str,
    ) -> None:
        """Encrypts the tensors and writes them."""
        ...

    def plain(self, source: Unlocked, metadata: Mapping[str, str] | None) -> None:
        """Writes the tensors as a level sees them."""
        ...


class _SafetensorsOutput(NamedTuple):
    file: BinaryIO

    def protected(
        self,
        source: TensorSource,
        metadata: Mapping[str, str] | None,
        rings: Rings,
        protection: Protection,
        shard: tuple[int, int] | None,
        what: str,
    ) -> None:
        layout = _layout(source)

        def head(envelope: Envelope) -> bytes:
            entries = {**(metadata or {}), **envelope.entries()}
            try:
                return header(layout, entries)
            except ValueError as error:
                raise ValueError(
                    f"{what}: the positions of what is encrypted do not fit into the file: {error} "
                    "Select larger groups (granularity 'filter'), a smaller share or fewer tensors."
                ) from None

        # The header comes before the data but holds their digests. Its size is known, since these
        # all have the same length, so room is left for it.
        blank = {name: Tensor(dtype, shape, NO_DIGEST) for name, dtype, shape in layout}
        room = len(head(protection.seal(blank, rings, metadata, shard, what)))
        self.file.seek(room)
        envelope = protection.encrypt(
            source, metadata, rings, shard, lambda _, data: self.file.write(data), what
        )
        first = head(envelope)
        assert len(first) == room
        self.file.seek(0)
        self.file.write(first)

    def plain(self, source: Unlocked, metadata: Mapping[str, str] | None) -> None:
        self.file.write(header(_layout(source), metadata))
        for _, piece in source.pieces():
            self.file.write(piece)


def _layout(source: TensorSource) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, info.dtype, tuple(info.shape)) for name, info in source.tensors.items()]


class _OrbaxOutput(NamedTuple):
    data: dict[str, bytearray]
    metadata: dict[str, str]

    def protected(
        self,
        source: TensorSource,
        metadata: Mapping[str, str] | None,
        rings: Rings,
        protection: Protection,
        shard: tuple[int, int] | None,
        what: str,
    ) -> None:
        envelope = protection.encrypt(source, metadata, rings, shard, self._add, what)
        self.metadata.update(metadata or {}, **envelope.entries())

    def plain(self, source: Unlocked, metadata: Mapping[str, str] | None) -> None:
        for name in source.tensors:
            self.data[name] = source.read(name)
        self.metadata.update(metadata or {})

    def _add(self, name: str, data: bytearray) -> None:
        self.data[name] = data


# --- checkpoints --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: the file, the index, or the folder of an Orbax checkpoint.
        files: file name → file, in order.
        index: None for a checkpoint in one file.
    """

    path: Path
    files: "dict[str, SafetensorsFile | OrbaxCheckpoint]"
    index: ShardIndex | None

    @property
    def tensors(self) -> dict[str, Any]:
        """The tensors of all files."""
        return {name: info for file in self.files.values() for name, info in file.tensors.items()}

    def read(self, name: str) -> bytearray:
        """The bytes of a tensor, wherever it is."""
        return next(file for file in self.files.values() if name in file.tensors).read(name)

    def shard(self, name: str) -> tuple[int, int] | None:
        """Number of a file and of all files."""
        return None if self.index is None else (list(self.files).index(name) + 1, len(self.files))

    def envelopes(self, signer: bytes | None = None) -> dict[str, Envelope]:
        """The checked envelopes of all files.

        Raises:
            IntegrityError: a wrong signature, or files of different protections.
        """
        result = {
            name: Envelope.from_metadata(file.metadata, str(file.path))
            for name, file in self.files.items()
        }
        first = next(iter(result.values()))
        for name, envelope in result.items():
            envelope.check_signature(signer)
            check_table(self.files[name], envelope)
            manifest = envelope.manifest
            for field in ("model_id", "cipher", "signer"):
                if getattr(manifest, field) != getattr(first.manifest, field):
                    raise IntegrityError(
                        f"{self.path}: expected shards of one protection, but {envelope.what} and "
                        f"{first.what} differ in {field}. Get all of them together."
                    )
            if self.index is not None and (
                manifest.shard != self.shard(name)
                or len(manifest.levels) != len(first.manifest.levels)
            ):
                raise IntegrityError(
                    f"{envelope.what}: expected shard {self.shard(name)}, got {manifest.shard}. "
                    "Shards were left out, added or renamed."
                )
        return result


@contextmanager
def open_checkpoint(path: AnyPath) -> Iterator[Checkpoint]:
    """Opens a safetensors file, an index file, or a folder with one.

    Raises:
        ValueError, OSError: it is none, or damaged; see `SafetensorsFile` and `find_shards`.
    """
    if Path(path).is_dir():
        from ._orbax import OrbaxCheckpoint, is_orbax

        if is_orbax(path):
            yield Checkpoint(Path(path), {Path(path).name: OrbaxCheckpoint(path)}, None)
            return
    index = find_shards(path)
    with ExitStack() as stack:
        paths = {Path(path).name: Path(path)} if index is None else index.shards
        files = {n: stack.enter_context(SafetensorsFile(p)) for n, p in paths.items()}
        if index is not None:
            check_shards(index, files)
        yield Checkpoint(Path(path) if index is None else index.path, {**files}, index)


@contextmanager
def checkpoint_outputs(
    checkpoint: Checkpoint, output: AnyPath, *, force: bool, in_place: bool = False
) -> Iterator[Callable[[str], AbstractContextManager[Output]]]:
    """Opens outputs by file name; all of them appear together, or none.

    Args:
        checkpoint: the input; the outputs are of its kind, with its file names.
        output: path of the file, or of the folder.
        force: replace an existing file.
        in_place: the output takes the place of the input.

    Raises:
        ValueError, OSError: the output is an input, exists, or cannot be written.
    """
    inputs = [file.path for file in checkpoint.files.values()]
    if not in_place:
        check_output(output, *inputs, *([checkpoint.path.parent] if checkpoint.index else []))
    (first, *_) = checkpoint.files.values()

    @contextmanager
    def shard_output(stack: ExitStack, path: Path) -> Iterator[Output]:
        # All get their names together, when the last one is written: until then a process that
        # is killed leaves nothing of them behind.
        file = stack.enter_context(new_file(path))
        yield _SafetensorsOutput(file)
        file.flush()
        os.fsync(file.fileno())

    @contextmanager
    def folder_output(like: "OrbaxCheckpoint") -> Iterator[Output]:
        from ._orbax import orbax_output

        with orbax_output(output, like) as (data, metadata):
            yield _OrbaxOutput(data, metadata)

    if not isinstance(first, SafetensorsFile):
        yield lambda _: folder_output(first)
    elif checkpoint.index is None:
        # Opened now, since what is wrong with it is to be told before the work.
        with new_file(output, force=force) as file:
            yield lambda _: nullcontext(_SafetensorsOutput(file))
    else:
        with new_folder(output) as folder:
            with ExitStack() as stack:
                yield lambda name: shard_output(stack, folder / name)
            (folder / checkpoint.index.path.name).write_bytes(checkpoint.index.text)


def grant_key(grant: Grant | LevelKey, level: int | None = None) -> tuple[LevelKey, bytes | None]:
    """The level key, and the signer that the grant insists on."""
    key, signer = (grant.key, grant.signer) if isinstance(grant, Grant) else (grant, None)
    return (key if level is None else key.lower(level)), signer


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


# --- reports ------------------------------------------------------------------------------------


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
