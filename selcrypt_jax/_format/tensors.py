"""The tensors of a checkpoint, one after the other: encrypted, or decrypted and checked."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from .._ciphers.lossless import LosslessCipher
from .._io.strict_json import show
from .._keys.keys import LevelKey
from .._tree.dtypes import SAFETENSORS
from .envelope import DAMAGED, Envelope, IntegrityError, SealedRing, Tensor

Rings = Mapping[str, list[tuple[int, SealedRing]]]
"""Tensor → its rings, with their levels."""

_BATCH = 1 << 27  # bytes of tensors that are held together


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
    from .rings import rewrite_tensor

    keys = cipher_keys(key)
    table: dict[str, Tensor] = {}
    done = {}
    for name, info in source.tensors.items():
        digest = hashlib.sha256()
        if name in rings:
            data = source.read(name)
            done[name] = rewrite_tensor(
                data, info, rings[name], keys, cipher, inverse=False, what=what
            )
            pieces: Iterable[bytearray] = (data,)
        else:
            pieces = source.chunks(name)
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

    Raises:
        ValueError: a key of another model.
        IntegrityError: anything that is not as its owner made it, here or while reading.
    """

    def __init__(
        self,
        source: TensorSource,
        envelope: Envelope,
        key: LevelKey | None,
        *,
        owner: bool = False,
    ) -> None:
        self.tensors = source.tensors
        self._source, self._envelope = source, envelope
        self._keys = {} if key is None else cipher_keys(key)
        self.rings = {} if key is None else envelope.open(key, owner=owner)

    def read(self, name: str) -> bytearray:
        """See `TensorSource`."""
        return self._decrypt(name, self._load(name))

    def chunks(self, name: str, _: int = 0) -> Iterator[bytearray]:
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
                pass
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
            from .rings import rewrite_tensor

            rewrite_tensor(
                data,
                self.tensors[name],
                self.rings[name],
                self._keys,
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
