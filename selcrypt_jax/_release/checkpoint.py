"""Checkpoints on disk, as inputs: one file, several with an index, or an Orbax folder."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._format.envelope import MANIFEST, Envelope
from .._format.manifest import Manifest
from .._format.tensors import Unlocked, check_table
from .._format.unlocked import unlocked_level
from .._io.companions import Companions, companions
from .._io.errors import IntegrityError
from .._io.foreign import Kind, OtherFormatError
from .._io.safetensors import SafetensorsFile
from .._io.shards import ShardIndex, check_no_others, check_shards, find_shards
from .._keys.files import AnyPath
from .._keys.keys import LevelKey
from .._keys.signing import VerifyKey

if TYPE_CHECKING:
    from .._io.converted import ConvertedFile
    from .._io.orbax import OrbaxCheckpoint

    File = SafetensorsFile | OrbaxCheckpoint | ConvertedFile


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: the file, the index, or the folder of an Orbax checkpoint.
        files: file name → file, in order.
        index: None for a checkpoint in one file.
        folder: the folder that the caller named or that holds the index, and nothing but this
            checkpoint; None for a file that was named by itself.
    """

    path: Path
    files: "dict[str, File]"
    index: ShardIndex | None
    folder: Path | None = None

    @property
    def in_orbax(self) -> bool:
        """Whether it is an Orbax checkpoint, the one kind that is a folder rather than files."""
        return self.folder == self.path

    @property
    def tensors(self) -> dict[str, Any]:
        """The tensors of all files."""
        return {name: info for file in self.files.values() for name, info in file.tensors.items()}

    def read(self, name: str) -> memoryview:
        """The bytes of a tensor, whichever file holds it."""
        return next(file for file in self.files.values() if name in file.tensors).read(name)

    def shard(self, name: str) -> tuple[int, int] | None:
        """The number of a file, from 1, and the number of files."""
        return None if self.index is None else (list(self.files).index(name) + 1, len(self.files))

    def envelopes(self, signer: VerifyKey | None = None) -> dict[str, Envelope]:
        """The checked envelopes of all files.

        Raises:
            IntegrityError: a wrong signature, or files of different protections.
        """
        for file in self.files.values():
            if MANIFEST not in (file.metadata or {}) and (level := unlocked_level(file.metadata)):
                raise ValueError(
                    f"{file.path}: is not a protected file: it is {level}. Expected a file written "
                    "by selcrypt protect: name that one."
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
        """Refuses other weights in the checkpoint's folder, which some loaders prefer.

        Raises:
            IntegrityError: there are some.
        """
        if self.folder is None:
            return
        index = set() if self.index is None else {self.index.path.name}
        try:
            check_no_others(self.folder, self.files.keys() | index)
        except ValueError as error:
            raise IntegrityError(str(error), reason="shard") from None

    def companions(self) -> Companions:
        """The other files of the checkpoint's folder.

        Raises:
            ValueError: it is not a folder of safetensors files.
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
        """Refuses a single file of a checkpoint in several files.

        Raises:
            ValueError: it is one.
        """
        if manifest.shard is not None and self.index is None:
            raise ValueError(
                f"{self.path}: is file {manifest.shard[0]} of {manifest.shard[1]} of a checkpoint, "
                "expected all of them. Name the index, or the folder."
            )

    def unlocked(
        self, envelopes: Mapping[str, Envelope], key: LevelKey | None, *, owner: bool = False
    ) -> dict[str, Unlocked]:
        """All files by name, with their boxes opened, as a level sees them; see `Unlocked`."""
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
        ValueError, OSError: it is not a checkpoint, or damaged; see `SafetensorsFile` and
            `find_shards`.
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
    """Opens a checkpoint to protect, which may also be an ONNX model or a Flax msgpack file.

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
        if isinstance(opened, Kind):  # outside the handler, so that errors are not chained
            from .._io.converted import ConvertedFile

            opened = of_one_file(ConvertedFile(path, opened))
        yield opened
