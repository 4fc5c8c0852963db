"""The tensors of a checkpoint: encrypted, or decrypted and checked, on all cores."""

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

from .._ciphers.lossless import LosslessCipher
from .._io.buffers import new_buffer
from .._io.strict_json import show
from .._keys.keys import LevelKey
from .._tree.ahead import ahead
from .._tree.dtypes import SAFETENSORS
from .boxes import Rings
from .checks import Checker
from .envelope import Envelope
from .manifest import CHUNK, Rest, Tensor, byte_count

_BATCH = 1 << 27  # bytes that are held together where tensors pass through
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
    """Tensors of which parts can be read: a file, or arrays in memory."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fills the buffer with bytes of a tensor, from byte number ``start`` on."""
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
            from .rings import rewrite_tensor  # the start of NumPy

            found = rings[name]
            done[name] = rewrite_tensor(data, info, found, keys, cipher, inverse=False, what=name)
        window = None
        if rest == "sealed" and data:
            from .seal import seal_tensor

            window = seal_tensor(data, SAFETENSORS[info.dtype], name, keys[1])
        digests = tuple(_digest(data[i : i + CHUNK]) for i in range(0, len(data), CHUNK))
        return name, data, Tensor(info.dtype, tuple(info.shape), digests, window)

    # Read in this thread: hosts read in one order.
    read = ((name, source.read(name)) for name in source.tensors)
    for name, data, table[name] in ahead(encrypted, read, lambda item: len(item[1])):
        write(name, data)
    return table, {name: done[name] for name in rings if name in done}


def cipher_keys(key: LevelKey) -> dict[int, bytes]:
    """Level → the key of its ring's cipher, for levels 1 to that of the key."""
    return {lower.level: lower.cipher_key() for lower in key.all()}


class _Part(NamedTuple):
    """Bytes ``start`` to ``stop`` of a tensor."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Unlocked:
    """The tensors of a protected source as a level sees them, each checked before it is given.

    Args:
        source: the tensors as shipped.
        envelope: of the file; its signature and table are checked by the caller.
        key: of level m, or None for level 0.
        owner: whether the key comes from the owner's secret, for messages.

    Attributes:
        tensors: see `TensorSource`.
        envelope: of the file.
        rings: tensor → its rings that the key opens, with their levels.

    Raises:
        GrantError: a key of another model.
        IntegrityError: the file was altered, seen here or while reading.
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

    def changes(self, name: str) -> bool:
        """Whether the level sees other bytes in a tensor than were shipped."""
        return self._sealed or name in self.rings

    def read(self, name: str) -> memoryview:
        """See `TensorSource`."""
        ((_, data),) = self.load([name])
        return data

    def read_part(self, name: str, start: int, stop: int) -> memoryview:
        """Some bytes of a tensor; all of it is read where the key opens a ring in it."""
        if start == stop:
            return new_buffer(0)
        if name in self.rings:
            return self.read(name)[start:stop]
        first, size = start // CHUNK * CHUNK, self._size(name)
        part = _Part(name, first, min(-(-stop // CHUNK) * CHUNK, size))
        ((_, data),) = self._filled([[part]])
        return data[start - first : stop - first]

    def load(self, names: Collection[str]) -> Iterator[tuple[str, memoryview]]:
        """Some tensors, whole, which are all held at once."""
        return self._filled([[_Part(name, 0, self._size(name)) for name in names]])

    def pieces(self) -> Iterator[tuple[str, memoryview]]:
        """All tensors, in order, piece by piece: no more is held at once than must be."""
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
        """The parts, one after the other, a batch of them at work on all cores."""
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            for batch in batches:
                jobs = list(self._started(pool, batch))
                while jobs:
                    name, buffer, job = jobs.pop(0)
                    job.result()
                    yield name, buffer
                    del buffer  # not held any longer than it takes
        finally:
            pool.shutdown(cancel_futures=True)

    def _started(
        self, pool: ThreadPoolExecutor, batch: Sequence[_Part]
    ) -> Iterator[tuple[str, memoryview, Future[None]]]:
        """Parts that threads fill; a tensor with rings once all of it has been read."""
        step = _AT_ONCE * CHUNK
        loads = []
        for part in batch:
            buffer = new_buffer(part.size)
            starts = range(0, part.size, step)
            jobs = [
                pool.submit(self._fill, part.name, part.start + start, buffer[start : start + step])
                for start in starts
            ]
            loads.append((part.name, buffer, jobs))
        for name, buffer, jobs in loads:
            for job in jobs:
                job.result()
            yield name, buffer, pool.submit(self._open_rings, name, buffer)

    def _fill(self, name: str, start: int, buffer: memoryview) -> None:
        """Reads chunks, checks them and takes their seal off, while they are in the cache."""
        tensor = self.envelope.manifest.tensors[name]
        for offset in range(0, len(buffer), CHUNK):
            chunk, at = buffer[offset : offset + CHUNK], start + offset
            self._source.read_into(name, at, chunk)
            expected, actual = tensor.sha256[at // CHUNK], _digest(chunk)
            if actual != expected:
                raise Checker(f"{self.envelope.what}: tensor {show(name)}", "digest").error(
                    f"expected SHA-256 {expected[:16]}… from byte {at} on, as the manifest says, "
                    f"got {actual[:16]}…"
                )
            if self._sealed:
                from .seal import unseal_part

                unseal_part(chunk, tensor, name, self._keys[1], at)

    def _open_rings(self, name: str, buffer: memoryview) -> None:
        if name in self.rings:
            from .rings import rewrite_tensor

            info, rings = self.tensors[name], self.rings[name]
            cipher, what = self.envelope.manifest.cipher, self.envelope.what
            rewrite_tensor(buffer, info, rings, self._keys, cipher, inverse=True, what=what)


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Neighbours that are held in memory together; large ones alone."""
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
            raise Checker(f"{envelope.what}: tensor {show(name)}", "table").error(
                f"expected {show(expected.get(name))} as the manifest says, got "
                f"{show(actual.get(name))}"
            )
