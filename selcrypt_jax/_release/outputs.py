"""Checkpoints as outputs, protected or unlocked: all their files appear together."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from .._ciphers.lossless import LosslessCipher
from .._ciphers.windows import Window
from .._format.boxes import Rings, SealedRing
from .._format.envelope import Envelope, Own
from .._format.manifest import (
    NO_DIGEST,
    LevelSize,
    Manifest,
    Rest,
    Tensor,
    chunk_count,
    metadata_digest,
)
from .._format.tensors import TensorSource, Unlocked, Write, encrypt_tensors
from .._io.atomic import new_file, new_files, new_folder
from .._io.companions import Companions
from .._io.places import check_folder_name, check_output
from .._io.safetensors import header
from .._keys.files import AnyPath
from .._keys.keys import LevelKey, Secret, level_key, new_model_id
from .._keys.signing import SigningKey, check_signing
from .checkpoint import Checkpoint
from .size import header_length


@dataclass(frozen=True)
class Protection:
    """The part that all files of one protection share.

    Attributes:
        key: the top level's key; it names the model.
        cipher: see `LosslessCipher`.
        rest: what happens to weights that are in no ring.
        signing: the owner's signing key, or None.
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
        """A protection with its own model id, so that no keystream is used twice.

        If several processes protect together, they have agreed on a new id.
        """
        check_signing(signing)
        key = level_key(secret, model_id or new_model_id(), level=levels, levels=levels)
        return cls(key, cipher, rest, signing)

    def encrypt(self, job: "Job", write: Write) -> Envelope:
        """Encrypts the tensors of one file, in order; returns the file's envelope."""
        rings = self._separate(job.rings)
        found = encrypt_tensors(job.source, rings, self.key, self.cipher, self.rest, write)
        manifest, levels = self._manifest(job, *found)
        return Envelope.seal(manifest, job.metadata, levels, self.key, self.signing, job.what)

    def blank(self, job: "Job") -> Envelope:
        """An envelope of the largest possible size, before digests and windows are known."""
        tensors = {}
        for name, dtype, shape in layout(job.source):
            digests = (NO_DIGEST,) * chunk_count(dtype, shape)
            # The longest possible; most are shorter.
            window = Window(2**11, 11, True) if self.rest == "sealed" else None
            tensors[name] = Tensor(dtype, shape, digests, window)
        manifest, levels = self._manifest(job, tensors, self._separate(job.rings))
        return Envelope.blank(manifest, job.metadata, levels, job.what)

    def _separate(self, rings: Rings) -> Rings:
        """The rings with their own encryption: the seal encrypts those of level 1."""
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
    """One file of a checkpoint to protect.

    Attributes:
        source: its tensors, not encrypted.
        metadata: the caller's own entries, or None if the file has no metadata at all.
        rings: the rings to encrypt in them.
        shard: the number of this file, from 1, and the number of files; or None.
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
        """Writes the tensors as a level sees them, with these metadata."""
        self.file.write(header(layout(source), metadata))
        for _, piece in source.pieces():
            self.file.write(piece)


class _OrbaxOutput(NamedTuple):
    """One new checkpoint, for Orbax to write."""

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
        checkpoint: the input. The outputs have its file names and its kind (but a converted format
            becomes safetensors).
        output: path of the file, or of the folder for a checkpoint in a folder; None to replace the
            input, if that is a file.
        force: replace an existing file.
        private: only its owner may read a new output.
        beside: the other files of the folder to copy.

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
    if not as_file:
        alone = checkpoint.index is None and not checkpoint.in_orbax
        remedy = "The input is a folder, so the output is one: name a folder"
        check_folder_name(output, f"{remedy}, or {first.path} as the input" if alone else remedy)
    if checkpoint.in_orbax:
        from .._io.orbax import OrbaxCheckpoint, orbax_output

        assert isinstance(first, OrbaxCheckpoint)
        with orbax_output(output, first, private=private) as new:
            yield lambda _: _OrbaxOutput(*new)
    elif as_file:
        # Opened now, to report problems before the work.
        with new_file(output, force=force, private=private) as file:
            yield lambda _: _SafetensorsOutput(file)
    else:
        with new_folder(output, private=private) as folder:
            # All files get their names together, when the last one is written: until then, a killed
            # process leaves nothing behind.
            with new_files() as new_one:
                yield lambda name: _SafetensorsOutput(new_one(folder / name, private=private))
            if checkpoint.index is not None:
                (folder / checkpoint.index.path.name).write_bytes(checkpoint.index.text)
            if beside is not None:
                beside.copy_to(folder)
