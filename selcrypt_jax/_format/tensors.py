"""Encrypts the tensors of a checkpoint, or decrypts and checks them, on all cores."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple, Protocol, runtime_checkable

from .._ciphers.lossless import LosslessCipher
from .._io.buffers import new_buffer
from .._io.strict_json import show
from .._keys.keys import LevelKey
from .._keys.material import DerivedKey
from .._tree.ahead import ahead
from .._tree.dtypes import SAFETENSORS
from .boxes import Rings
from .checks import Checker
from .envelope import Envelope
from .manifest import CHUNK, Rest, Tensor, byte_count

_BATCH = 1 << 27  # bytes that are in memory together when tensors are streamed
_AT_ONCE = 4  # chunks that a thread takes


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors as bytes."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Name → anything with a ``dtype`` (safetensors' name) and a ``shape``, in order."""
        ...

    def read(self, name: str) -> memoryview:
        """The bytes of a tensor, little-endian, in C order; the caller may change them."""
        ...


@runtime_checkable
class StoredTensors(TensorSource, Protocol):
    """Tensors that can be read in parts: a file, or arrays in memory."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fills the buffer with bytes of a tensor, from byte ``start`` on."""
        ...


Write = Callable[[str, memoryview], object]


def encrypt_tensors(
    source: TensorSource,
    rings: Rings,
    key: LevelKey,
    cipher: LosslessCipher,
    rest: Rest,
    write: Write,
) -> tuple[dict[str, Tensor], Rings]:
    """Reads tensors, encrypts their rings, seals them, and writes them in the order of the source.

    Returns:
        The table of the tensors as shipped, and the rings with the digests of their plaintext.
    """
    keys = cipher_keys(key)
    table, done = {}, {}

    def encrypted(given: tuple[str, memoryview]) -> tuple[str, memoryview, Tensor]:
        name, data = given
        info = source.tensors[name]
        if name in rings:
            from .rings import rewrite_tensor  # imports NumPy

            found = rings[name]
            done[name] = rewrite_tensor(data, info, found, keys, cipher, inverse=False, what=name)
        window = None
        if rest == "sealed" and data:
            from .seal import seal_tensor

            window = seal_tensor(data, SAFETENSORS[info.dtype], name, keys[1])
        digests = tuple(_digest(data[i : i + CHUNK]) for i in range(0, len(data), CHUNK))
        return name, data, Tensor(info.dtype, tuple(info.shape), digests, window)

    # Read in this thread: all hosts must read in the same order.
    read = ((name, source.read(name)) for name in source.tensors)
    for name, data, table[name] in ahead(encrypted, read, lambda item: len(item[1])):
        write(name, data)
    return table, {name: done[name] for name in rings if name in done}


def cipher_keys(key: LevelKey) -> dict[int, DerivedKey]:
    """Level → the cipher key of its ring, from level 1 to the key's own."""
    return {lower.level: DerivedKey(lower.cipher_key()) for lower in key.all()}


class _Part(NamedTuple):
    """Bytes ``start`` to ``stop`` of a tensor."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class _Load:
    """A part that threads read and decrypt.

    Attributes:
        part: see `_Part`.
        buffer: its bytes.
        starts: the offsets of its pieces, which are the jobs.
        sealed: the offsets of chunks that were read, and are still sealed.
        jobs: the number of jobs at work on it.
        done: whether it is decrypted for the level.
    """

    def __init__(self, part: _Part) -> None:
        self.part, self.buffer = part, new_buffer(part.size)
        self.starts = range(part.start, part.stop, _AT_ONCE * CHUNK)
        self.sealed: list[int] = []
        self.jobs: list[Future[None]] = []
        self.done = False
        self._left, self._lock = len(self.starts), Lock()

    def chunk(self, start: int) -> memoryview:
        """The chunk that starts at this byte of the tensor."""
        return self.buffer[start - self.part.start :][:CHUNK]

    def count_down(self) -> bool:
        """Records that a piece was read; returns whether it was the last one."""
        with self._lock:
            self._left -= 1
            return not self._left


class Unlocked:
    """The tensors of a protected source as a level sees them, each checked before it is returned.

    Args:
        source: the tensors as shipped.
        envelope: the file's envelope; the caller checks its signature and table.
        key: the key of level m, or None for level 0.
        owner: whether the key is derived from the owner's secret, for messages.

    Attributes:
        tensors: see `TensorSource`.
        envelope: the file's envelope.
        rings: tensor → its rings that the key opens, with their levels.

    Raises:
        GrantError: a key of another model.
        IntegrityError: the file was altered; raised here or while reading.
    """

    def __init__(
        self,
        source: StoredTensors,
        envelope: Envelope,
        key: LevelKey | None,
        *,
        owner: bool = False,
    ) -> None:
        self.tensors = source.tensors
        self._source, self.envelope = source, envelope
        self._keys = {} if key is None else cipher_keys(key)
        self.rings: Rings = {} if key is None else envelope.open(key, owner=owner)
        self._sealed = bool(self._keys) and envelope.manifest.rest == "sealed"
        self._ready = False

    def changes(self, name: str) -> bool:
        """Whether the level sees other bytes of a tensor than were shipped."""
        return self._sealed or name in self.rings

    def read(self, name: str) -> memoryview:
        """See `TensorSource`."""
        ((_, data),) = self.load([name])
        return data

    def read_part(self, name: str, start: int, stop: int) -> memoryview:
        """Some bytes of a tensor; reads all of it if the key opens a ring in it."""
        if start == stop:
            return new_buffer(0)
        if name in self.rings:
            return self.read(name)[start:stop]
        first, size = start // CHUNK * CHUNK, self._size(name)
        part = _Part(name, first, min(-(-stop // CHUNK) * CHUNK, size))
        ((_, data),) = self._filled([[part]])
        return data[start - first : stop - first]

    def load(self, names: Collection[str]) -> Iterator[tuple[str, memoryview]]:
        """Whole tensors, all in memory at once; large ones first."""
        parts = [_Part(name, 0, self._size(name)) for name in names]
        # Otherwise a large one might start last, and leave the other cores idle.
        return self._filled([sorted(parts, key=lambda part: -part.size)])

    def pieces(self) -> Iterator[tuple[str, memoryview]]:
        """All tensors, in order, piece by piece, with as little in memory at once as possible."""
        parts = []
        for name in self.tensors:
            size = self._size(name)
            step = size if name in self.rings else _BATCH
            starts = range(0, size, max(step, 1))
            parts += [_Part(name, start, min(start + step, size)) for start in starts]
        return self._filled(_batches(parts))

    def _size(self, name: str) -> int:
        info = self.tensors[name]
        return byte_count(info.dtype, info.shape)

    def _filled(self, batches: Iterable[Sequence[_Part]]) -> Iterator[tuple[str, memoryview]]:
        """The parts, one after the other, with a batch of them at work on all cores."""
        cores = os.cpu_count() or 1
        pool = ThreadPoolExecutor(cores)
        try:
            for batch in batches:
                loads = [_Load(part) for part in batch]
                pieces = deque((load, start) for load in loads for start in load.starts)
                if not self._ready:
                    early = [pool.submit(self._read_on, pieces) for _ in range(max(cores - 1, 1))]
                    self._start_numpy()
                    for job in early:
                        job.result()
                for load, start in pieces:
                    load.jobs.append(pool.submit(self._fill, load, start))
                for load in loads:
                    for job in load.jobs:
                        job.result()
                    if not load.done:  # all of it was read before NumPy was imported
                        load.jobs = [pool.submit(self._finish, load)]
                while loads:
                    load = loads.pop(0)
                    for job in load.jobs:
                        job.result()
                    yield load.part.name, load.buffer
                    del load  # free it as soon as possible
        finally:
            pool.shutdown(cancel_futures=True)

    def _start_numpy(self) -> None:
        """Imports NumPy in the main thread while others read; in those, all would wait for it."""
        if self._sealed or self.rings:
            from . import rings, seal  # noqa: F401
        self._ready = True

    def _read_on(self, pieces: "deque[tuple[_Load, int]]") -> None:
        """Reads pieces without NumPy, until it is imported."""
        while pieces and not self._ready:
            self._fill(*pieces.popleft())

    def _fill(self, load: "_Load", first: int) -> None:
        """Reads chunks and checks them; the thread that reads the last one finishes the part."""
        for start in range(first, min(first + _AT_ONCE * CHUNK, load.part.stop), CHUNK):
            chunk = load.chunk(start)
            self._source.read_into(load.part.name, start, chunk)
            expected = self.envelope.manifest.tensors[load.part.name].sha256[start // CHUNK]
            if (actual := _digest(chunk)) != expected:
                what = f"{self.envelope.what}: tensor {show(load.part.name)}"
                raise Checker(what, "digest").error(
                    f"expected SHA-256 {expected[:16]}… from byte {start} on, as the manifest "
                    f"says, got {actual[:16]}…"
                )
            if self._ready:  # while it is in the cache
                self._unseal(load, start)
            else:
                load.sealed.append(start)
        if load.count_down() and self._ready:
            self._finish(load)

    def _unseal(self, load: "_Load", start: int) -> None:
        if self._sealed:
            from .seal import unseal_part

            name = load.part.name
            tensor = self.envelope.manifest.tensors[name]
            unseal_part(load.chunk(start), tensor, name, self._keys[1], start)

    def _finish(self, load: "_Load") -> None:
        for start in load.sealed:
            self._unseal(load, start)
        if (name := load.part.name) in self.rings:
            from .rings import rewrite_tensor

            info, rings = self.tensors[name], self.rings[name]
            cipher, what = self.envelope.manifest.cipher, self.envelope.what
            rewrite_tensor(load.buffer, info, rings, self._keys, cipher, inverse=True, what=what)
        load.done = True


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Adjacent parts that are in memory together; large ones alone."""
    batch: list[_Part] = []
    left = _BATCH
    for part in parts:
        if batch and part.size > left:
            yield batch
            batch, left = [], _BATCH
        batch.append(part)
        left -= part.size
    if batch:
        yield batch


def _digest(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def check_table(source: TensorSource, envelope: Envelope) -> None:
    """Checks names, dtypes and shapes against the manifest.

    Raises:
        IntegrityError: they differ.
    """
    expected = {n: (t.dtype, t.shape) for n, t in envelope.manifest.tensors.items()}
    actual = {n: (t.dtype, tuple(t.shape)) for n, t in source.tensors.items()}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            wanted = "no such tensor, since the manifest has none"
            if name in expected:
                wanted = f"{_kind(*expected[name])}, as the manifest says"
            found = _kind(*actual[name]) if name in actual else "no such tensor"
            raise Checker(f"{envelope.what}: tensor {show(name)}", "table").error(
                f"expected {wanted}, got {found}"
            )


def _kind(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype} of shape {show(tuple(shape))}"
