"""The tensors of a checkpoint, one after the other: encrypted, or decrypted and checked."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

from .._ciphers.lossless import LosslessCipher
from .._io.strict_json import show
from .._keys.keys import LevelKey
from .._tree.dtypes import SAFETENSORS
from .boxes import Rings
from .checks import Checker
from .envelope import Envelope
from .manifest import Tensor

_BATCH = 1 << 27  # bytes of tensors that are held together


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors as bytes: a file, or arrays in memory."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Name → anything with a ``dtype`` (safetensors' name) and a ``shape``, in order."""
        ...

    def read(self, name: str) -> bytearray:
        """The bytes of a tensor, little-endian, in C order; the caller may change them."""
        ...

    def chunks(self, name: str, size: int = ..., /) -> Iterable[bytearray]:
        """The same, piece by piece, of about that many bytes."""
        ...


Write = Callable[[str, bytearray], object]


def encrypt_tensors(
    source: TensorSource, rings: Rings, key: LevelKey, cipher: LosslessCipher, write: Write
) -> tuple[dict[str, Tensor], Rings]:
    """Reads tensors, encrypts their rings, and writes them in the order of the source.

    Returns:
        The table of the tensors as shipped, and the rings with the digests of their plaintext.
    """
    keys = cipher_keys(key)
    table, done = {}, {}
    for name, info in source.tensors.items():
        pieces: Iterable[bytearray]
        if name in rings:
            from .rings import rewrite_tensor  # the start of NumPy

            data, found = source.read(name), rings[name]
            done[name] = rewrite_tensor(data, info, found, keys, cipher, inverse=False, what=name)
            pieces = (data,)
        else:
            pieces = source.chunks(name)
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
            write(name, piece)
        table[name] = Tensor(info.dtype, tuple(info.shape), digest.hexdigest())
    return table, done


def cipher_keys(key: LevelKey) -> dict[int, bytes]:
    """Level → the key of its ring's cipher, for levels 1 to that of the key."""
    return {lower.level: lower.cipher_key() for lower in key.all()}


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
        self, source: TensorSource, envelope: Envelope, key: LevelKey | None, *, owner: bool = False
    ) -> None:
        self.tensors = source.tensors
        self._source, self.envelope = source, envelope
        self._keys = {} if key is None else cipher_keys(key)
        self.rings: Rings = {} if key is None else envelope.open(key, owner=owner)

    def read(self, name: str) -> bytearray:
        """See `TensorSource`."""
        return self._decrypt(name, lambda: self._load(name))

    def chunks(self, name: str, _: int = 0) -> Iterator[bytearray]:
        """See `TensorSource`. Read it to its end: the digest is known only there."""
        if name in self.rings:
            yield self.read(name)
            return
        digest = hashlib.sha256()
        for piece in self._source.chunks(name):
            digest.update(piece)
            yield piece
        _check_digest(digest, self.envelope, name)

    def pieces(self) -> Iterator[tuple[str, bytearray]]:
        """All tensors, in order, piece by piece; as `chunks`, with all processors at work."""
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            for batch in _batches(self.tensors):
                if len(batch) == 1:
                    yield from ((batch[0], piece) for piece in self.chunks(batch[0]))
                    continue
                loads = [pool.submit(self._load, name) for name in batch]
                jobs = [
                    pool.submit(self._decrypt, name, load.result)
                    for name, load in zip(batch, loads, strict=True)
                ]
                del loads
                for name in batch:
                    yield name, jobs.pop(0).result()  # not held any longer than it takes
        finally:
            pool.shutdown(cancel_futures=True)

    def _load(self, name: str) -> bytearray:
        data = self._source.read(name)
        _check_digest(hashlib.sha256(data), self.envelope, name)
        return data

    def _decrypt(self, name: str, loaded: Callable[[], bytearray]) -> bytearray:
        data = loaded()
        if name in self.rings:
            from .rings import rewrite_tensor

            info, rings = self.tensors[name], self.rings[name]
            cipher, what = self.envelope.manifest.cipher, self.envelope.what
            rewrite_tensor(data, info, rings, self._keys, cipher, inverse=True, what=what)
        return data


def _batches(tensors: Mapping[str, Any]) -> Iterator[list[str]]:
    """Neighbours that are held in memory together; large tensors alone."""
    batch: list[str] = []
    left = _BATCH
    for name, info in tensors.items():
        size = math.prod(info.shape) * SAFETENSORS[info.dtype].bits // 8
        if batch and size > left:
            yield batch
            batch, left = [], _BATCH
        batch.append(name)
        left -= size
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
            raise Checker(f"{envelope.what}: tensor {show(name)}", "table").error(
                f"expected {show(expected.get(name))} as the manifest says, got "
                f"{show(actual.get(name))}"
            )


def _check_digest(digest: Any, envelope: Envelope, name: str) -> None:
    expected, actual = envelope.manifest.tensors[name].sha256, digest.hexdigest()
    if actual != expected:
        raise Checker(f"{envelope.what}: tensor {show(name)}", "digest").error(
            f"expected SHA-256 {expected[:16]}… as the manifest says, got {actual[:16]}…"
        )
