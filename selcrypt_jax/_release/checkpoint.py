"""Checkpoints on disk: one file, several with an index, or an Orbax folder; read and written."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from .._ciphers.lossless import LosslessCipher
from .._ciphers.windows import Window
from .._format.boxes import Rings, SealedRing
from .._format.envelope import MANIFEST, Envelope, Own
from .._format.manifest import (
    NO_DIGEST,
    LevelSize,
    Manifest,
    Rest,
    Tensor,
    chunk_count,
    metadata_digest,
)
from .._format.tensors import TensorSource, Unlocked, Write, check_table, encrypt_tensors
from .._format.unlocked import unlocked_level
from .._io.atomic import check_output, new_file, new_files, new_folder
from .._io.companions import Companions, companions
from .._io.errors import IntegrityError
from .._io.foreign import Kind, OtherFormatError
from .._io.safetensors import SafetensorsFile, header
from .._io.shards import ShardIndex, check_no_others, check_shards, find_shards
from .._keys.files import AnyPath
from .._keys.keys import LevelKey, Secret, level_key, new_model_id
from .._keys.signing import SigningKey, VerifyKey, check_signing
from .size import header_length

if TYPE_CHECKING:
    from .._io.converted import ConvertedFile
    from .._io.orbax import OrbaxCheckpoint

    File = SafetensorsFile | OrbaxCheckpoint | ConvertedFile


@dataclass(frozen=True)
class Protection:
    """What all files of one protection share.

    Attributes:
        key: of the top level; it names the model.
        cipher: see `LosslessCipher`.
        rest: what becomes of weights that are in no ring.
        signing: of the owner, or None.
    """

    key: LevelKey
    cipher: LosslessCipher
    rest: Rest
    signing: SigningKey | None

    @classmethod
    def new(
        cls,
        secret: Secret,
        levels: int,
        cipher: LosslessCipher,
        rest: Rest,
        signing: SigningKey | None,
        model_id: bytes | None = None,
    ) -> "Protection":
        """A protection with a model id of its own, so that no keystream is used twice.

        Where several processes protect together, they have agreed on a new one.
        """
        check_signing(signing)
        key = level_key(secret, model_id or new_model_id(), level=levels, levels=levels)
        return cls(key, cipher, rest, signing)

    def encrypt(self, job: "Job", write: Write) -> Envelope:
        """Encrypts the tensors of one file, in order; the envelope that has to go with them."""
        rings = self._separate(job.rings)
        found = encrypt_tensors(job.source, rings, self.key, self.cipher, self.rest, write)
        manifest, levels = self._manifest(job, *found)
        return Envelope.seal(manifest, job.metadata, levels, self.key, self.signing, job.what)

    def blank(self, job: "Job") -> Envelope:
        """As long as what `encrypt` returns can be, before digests and windows are known."""
        tensors = {}
        for name, dtype, shape in layout(job.source):
            digests = (NO_DIGEST,) * chunk_count(dtype, shape)
            # As long as any can be; most are shorter.
            window = Window(2**11, 11, True) if self.rest == "sealed" else None
            tensors[name] = Tensor(dtype, shape, digests, window)
        manifest, levels = self._manifest(job, tensors, self._separate(job.rings))
        return Envelope.blank(manifest, job.metadata, levels, job.what)

    def _separate(self, rings: Rings) -> Rings:
        """The rings that are encrypted by themselves: level 1 opens its own with the seal."""
        if self.rest == "plain":
            return rings
        above = {n: [(m, ring) for m, ring in found if m > 1] for n, found in rings.items()}
        return {name: found for name, found in above.items() if found}

    def _manifest(
        self, job: "Job", tensors: Mapping[str, Tensor], rings: Rings
    ) -> tuple[Manifest, list[list[SealedRing]]]:
        """The manifest of a file, and its rings by level."""
        levels: list[list[SealedRing]] = [[] for _ in range(self.key.level)]
        for level, ring in itertools.chain.from_iterable(rings.values()):
            levels[level - 1].append(ring)
        manifest = Manifest(
            model_id=self.key.model_id,
            cipher=self.cipher,
            rest=self.rest,
            levels=tuple(
                LevelSize(
                    sum(ring.groups for ring in found),
                    sum(ring.weights(tensors[ring.tensor].shape) for ring in found),
                )
                for found in levels
            ),
            tensors=tensors,
            signer=None if self.signing is None else self.signing.public,
            metadata=None if job.metadata is None else metadata_digest(job.metadata),
            shard=job.shard,
        )
        return manifest, levels


class Job(NamedTuple):
    """One file of a checkpoint that is to be protected.

    Attributes:
        source: its tensors in the clear.
        metadata: the caller's own, or None if the file has none at all.
        rings: what is encrypted in them.
        shard: number of the file and of all files, or None.
        what: the file, for messages.
    """

    source: TensorSource
    metadata: Mapping[str, str] | None
    rings: Rings
    shard: tuple[int, int] | None
    what: str


class _SafetensorsOutput(NamedTuple):
    """One new file."""

    file: BinaryIO

    def protected(self, job: Job, protection: Protection) -> None:
        """Encrypts the tensors and writes them."""
        # The header comes before the data but holds their digests, so its place is left free.
        tensors = layout(job.source)
        length = header_length(tensors, protection.blank(job), job.what)
        self.file.seek(length)
        envelope = protection.encrypt(job, lambda _, data: self.file.write(data))
        head = header(tensors, envelope.entries(), size=length)
        self.file.seek(0)
        self.file.write(head)

    def plain(self, source: Unlocked, metadata: Own) -> None:
        """Writes the tensors as a level sees them, and entries of the metadata."""
        self.file.write(header(layout(source), metadata))
        for _, piece in source.pieces():
            self.file.write(piece)


class _OrbaxOutput(NamedTuple):
    """The same, to be written by Orbax."""

    data: dict[str, memoryview]
    metadata: dict[str, str]

    def protected(self, job: Job, protection: Protection) -> None:
        self.metadata.update(protection.encrypt(job, self.data.__setitem__).entries())

    def plain(self, source: Unlocked, metadata: Own) -> None:
        self.data.update((name, source.read(name)) for name in source.tensors)
        self.metadata.update(metadata or {})


def layout(source: TensorSource) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of all tensors, for `header`."""
    return [(name, info.dtype, tuple(info.shape)) for name, info in source.tensors.items()]


Output = _SafetensorsOutput | _OrbaxOutput


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: the file, the index, or the folder of an Orbax checkpoint.
        files: file name → file, in order.
        index: None for a checkpoint in one file.
        folder: that holds nothing but this checkpoint, if that is what was named, or it has an
            index; None for a file that was named by itself.
    """

    path: Path
    files: "dict[str, File]"
    index: ShardIndex | None
    folder: Path | None = None

    @property
    def in_orbax(self) -> bool:
        """Whether it is an Orbax checkpoint, the one kind that is a folder and not files in one."""
        return self.folder == self.path

    @property
    def tensors(self) -> dict[str, Any]:
        """The tensors of all files."""
        return {name: info for file in self.files.values() for name, info in file.tensors.items()}

    def read(self, name: str) -> memoryview:
        """The bytes of a tensor, wherever it is."""
        return next(file for file in self.files.values() if name in file.tensors).read(name)

    def shard(self, name: str) -> tuple[int, int] | None:
        """Number of a file and of all files."""
        return None if self.index is None else (list(self.files).index(name) + 1, len(self.files))

    def envelopes(self, signer: VerifyKey | None = None) -> dict[str, Envelope]:
        """The checked envelopes of all files.

        Raises:
            IntegrityError: a wrong signature, or files of different protections.
        """
        for file in self.files.values():
            if MANIFEST not in (file.metadata or {}) and (level := unlocked_level(file.metadata)):
                raise ValueError(
                    f"{file.path}: is not a protected file: it is {level}. Expected what selcrypt "
                    "protect wrote: name that."
                )
        result = {
            name: Envelope.from_metadata(file.metadata, str(file.path))
            for name, file in self.files.items()
        }
        first = next(iter(result.values()))
        for name, envelope in result.items():
            envelope.check_signature(signer)
            check_table(self.files[name], envelope)
            manifest = envelope.manifest
            for field in ("model_id", "cipher", "rest", "signer"):
                if getattr(manifest, field) != getattr(first.manifest, field):
                    raise IntegrityError(
                        f"{self.path}: expected shards of one protection, but {envelope.what} and "
                        f"{first.what} differ in {field}. Get all of them together.",
                        reason="shard",
                    )
            expected = manifest.shard if self.index is None else self.shard(name)
            if manifest.shard != expected or len(manifest.levels) != len(first.manifest.levels):
                raise IntegrityError(
                    f"{envelope.what}: expected shard {expected}, got {manifest.shard}. Shards "
                    "were left out, added or renamed.",
                    reason="shard",
                )
        return result

    def check_no_others(self) -> None:
        """Refuses weights beside the checkpoint's, which some loaders prefer.

        Raises:
            IntegrityError: of some.
        """
        if self.folder is None:
            return
        index = set() if self.index is None else {self.index.path.name}
        try:
            check_no_others(self.folder, self.files.keys() | index)
        except ValueError as error:
            raise IntegrityError(str(error), reason="shard") from None

    def companions(self) -> Companions:
        """What lies beside its weights, for a copy of the folder.

        Raises:
            ValueError: it is no folder of safetensors files.
        """
        if self.folder is None or self.in_orbax:
            got = "an Orbax checkpoint" if self.in_orbax else "a file by itself"
            raise ValueError(
                f"{self.path}: copy_config: expected the folder of a model, got {got}. Name the "
                "folder, or copy the other files yourself."
            )
        index = set() if self.index is None else {self.index.path.name}
        return companions(self.folder, self.files.keys() | index)

    def check_whole(self, manifest: Manifest) -> None:
        """Refuses one file of several.

        Raises:
            ValueError: of them.
        """
        if manifest.shard is not None and self.index is None:
            raise ValueError(
                f"{self.path}: is file {manifest.shard[0]} of {manifest.shard[1]} of a checkpoint, "
                "expected all of them. Name the index, or the folder."
            )

    def unlocked(
        self, envelopes: Mapping[str, Envelope], key: LevelKey | None, *, owner: bool = False
    ) -> dict[str, Unlocked]:
        """All files as a level sees them, by name, their boxes opened; see `Unlocked`."""
        return {
            name: Unlocked(file, envelopes[name], key, owner=owner)
            for name, file in self.files.items()
        }


def of_one_file(file: "File") -> Checkpoint:
    """A checkpoint without an index."""
    folder = file.path if file.path.is_dir() else None
    return Checkpoint(file.path, {file.path.name: file}, None, folder)


@contextmanager
def open_checkpoint(path: AnyPath) -> Iterator[Checkpoint]:
    """Opens a safetensors file, an index file, or a folder with one of the two.

    Raises:
        ValueError, OSError: it is none, or damaged; see `SafetensorsFile` and `find_shards`.
    """
    if Path(path).is_dir():
        from .._io.orbax import OrbaxCheckpoint, is_orbax

        if is_orbax(path):
            yield of_one_file(OrbaxCheckpoint(path))
            return
    found = find_shards(path)
    with ExitStack() as stack:
        if isinstance(found, ShardIndex):
            files = {n: stack.enter_context(SafetensorsFile(p)) for n, p in found.shards.items()}
            check_shards(found, files)
            yield Checkpoint(found.path, {**files}, found, found.path.parent)
        else:
            file = stack.enter_context(SafetensorsFile(found))
            yield Checkpoint(
                found, {found.name: file}, None, Path(path) if found != Path(path) else None
            )


@contextmanager
def open_original(path: AnyPath) -> Iterator[Checkpoint]:
    """Opens what a release is made from: also an ONNX model, or a msgpack file of Flax.

    Raises:
        ValueError, OSError, ModuleNotFoundError: see `open_checkpoint` and `ConvertedFile`.
    """
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(open_checkpoint(path))
        except OtherFormatError as error:
            from .._io.converted import CONVERTED

            if error.kind not in CONVERTED or error.path != Path(path):  # one of several files
                raise
            opened = error.kind
        if isinstance(opened, Kind):  # no longer in the handler, to which errors would be chained
            from .._io.converted import ConvertedFile

            opened = of_one_file(ConvertedFile(path, opened))
        yield opened


@contextmanager
def checkpoint_outputs(
    checkpoint: Checkpoint,
    output: AnyPath | None,
    *,
    force: bool,
    private: bool = False,
    beside: Companions | None = None,
) -> Iterator[Callable[[str], Output]]:
    """Opens outputs by file name; all of them appear together, or none.

    Args:
        checkpoint: the input; the outputs are of its kind (safetensors in place of a format that is
            converted), with its file names.
        output: path of the file, or of the folder for a checkpoint in a folder; None to take the
            place of the input, a file.
        force: replace an existing file.
        private: only its owner may read a new output.
        beside: what else of a folder is copied.

    Raises:
        ValueError, OSError: the output is an input, exists, or cannot be written.
    """
    (first, *_) = checkpoint.files.values()
    inputs = getattr(first, "inputs", [file.path for file in checkpoint.files.values()])
    as_file = checkpoint.folder is None or (output is None and checkpoint.index is None)
    if output is None:
        output, force = checkpoint.path, True
    else:
        check_output(output, *inputs, *([checkpoint.folder] if checkpoint.folder else []))
    if checkpoint.in_orbax:
        from .._io.orbax import OrbaxCheckpoint, orbax_output

        assert isinstance(first, OrbaxCheckpoint)
        with orbax_output(output, first, private=private) as new:
            yield lambda _: _OrbaxOutput(*new)
    elif as_file:
        # Opened now, so that what is wrong with it is told before the work.
        with new_file(output, force=force, private=private) as file:
            yield lambda _: _SafetensorsOutput(file)
    else:
        with new_folder(output, private=private) as folder:
            # All files get their names together, when the last one is written: until then a
            # process that is killed leaves nothing of them behind.
            with new_files() as new_one:
                yield lambda name: _SafetensorsOutput(new_one(folder / name, private=private))
            if checkpoint.index is not None:
                (folder / checkpoint.index.path.name).write_bytes(checkpoint.index.text)
            if beside is not None:
                beside.copy_to(folder)
