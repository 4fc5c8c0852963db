"""Section "transform": encrypting and decrypting a tree in memory."""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any

import numpy as np
from _measure import Contender, measure
from _rows import Options, Row
from _subjects import LARGE, LEVELS, PERMUTING, STREAM, Case, Subject, bits_of, check_bits
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from selcrypt_jax import LosslessCipher, decrypt, encrypt
from selcrypt_jax._ciphers.engine_numpy import leaf_key, rewrite_ring
from selcrypt_jax._tree.groups import unit_places, unit_positions
from selcrypt_jax._tree.names import named_leaves

NOTES = {
    "transform": (
        "Encrypting and decrypting a tree in memory. GB/s divides the bytes of the whole tree by "
        "the time, whatever the share: how fast a model is opened. Ratios are relative to "
        "AES-256-GCM. The peers decrypt the whole tree leaf by leaf; cryptography holds the GIL "
        "meanwhile, so threads would not help them. Inputs that a run uses up are copied "
        "beforehand, untimed, and the NumPy engine gets its rings precomputed. Gather and scatter: "
        "NumPy reads and writes the selected weights once, in place, the minimum for any cipher. "
        "Peaks are above the memory held before, which includes the input; first calls are from "
        "fresh processes."
    )
}
SHARES = (0.01, 0.08, 0.3, 1.0)
BASELINE = "AES-256-GCM"
MOST_JITTED = 0.1  # share of the large tree: the positions are constants in the program

Buffers = Mapping[str, np.ndarray]


class OnHost:
    """Contenders that work on the bits of a tree with NumPy and OpenSSL; buffers by leaf name."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.pool = ThreadPoolExecutor(os.cpu_count())

    def on_all_cores(self, function: Callable[[str], Any], names: Iterable[str]) -> None:
        """Calls a function for every leaf, and drops each result at once."""

        def call(name: str) -> None:
            function(name)

        for _ in self.pool.map(call, names):
            pass

    @cached_property
    def original(self) -> Buffers:
        """The bits of all leaves."""
        return {name: bits_of(leaf) for name, leaf in self.subject.leaves.items()}

    @cached_property
    def copies(self) -> Buffers:
        """The bits of all leaves in writable memory."""
        return {name: leaf.copy() for name, leaf in self.original.items()}

    def encrypted(self, cipher: LosslessCipher) -> Buffers:
        """Copies of the leaves that have encrypted weights, which may be used up."""
        leaves = named_leaves(self.subject.protected(cipher)).leaves
        return {name: bits_of(leaves[name]).copy() for name in self.subject.rings}

    def rewrite(self, cipher: LosslessCipher, buffers: Buffers) -> Buffers:
        """Decrypts with the NumPy engine, in place."""

        def leaf(name: str) -> None:
            like = self.subject.leaves[name]
            for mask, secret in self.subject.rings[name]:
                places = unit_places(like.shape, mask.shape, np.flatnonzero(mask), cipher.unit)
                rewrite_ring(
                    buffers[name],
                    places,
                    leaf_key(secret, name),
                    cipher=cipher,
                    fine=cipher.fine_mask(like.dtype),
                    inverse=True,
                )

        self.on_all_cores(leaf, buffers)
        return buffers

    def positions(self) -> tuple[Buffers, Buffers]:
        """Writable leaves, and the positions of their selected weights, as NumPy indices."""
        found = {}
        for name, rings in self.subject.rings.items():
            shape = self.subject.leaves[name].shape
            mask = functools.reduce(np.logical_or, (mask for mask, _ in rings))
            groups = np.flatnonzero(mask)
            positions = unit_positions(shape, mask.shape, groups, "weight")
            found[name] = positions.astype(np.intp).reshape(-1)
        return self.copies, found

    def touch(self, given: tuple[Buffers, Buffers]) -> Buffers:
        """Reads the selected weights and writes them back."""
        leaves, positions = given

        def leaf(name: str) -> None:
            leaves[name][positions[name]] = leaves[name][positions[name]]

        self.on_all_cores(leaf, positions)
        return leaves

    def copy(self, given: tuple[Buffers, Buffers]) -> Buffers:
        """Copies every leaf into memory that is already allocated."""
        source, target = given
        for name, leaf in source.items():
            np.copyto(target[name], leaf)
        return target

    def check(self, found: Buffers) -> None:
        """Raises unless the leaves equal the originals."""
        check_bits(found, self.original)


class Sealed:
    """A tree in which every leaf is encrypted and authenticated as a whole."""

    def __init__(self, host: OnHost, aead: AESGCM | ChaCha20Poly1305):
        self.host = host
        self.aead: Any = aead

    @cached_property
    def leaves(self) -> dict[str, tuple[bytes, bytes]]:
        """Name → nonce and ciphertext."""
        nonces = (number.to_bytes(12, "big") for number in range(2**32))
        return {
            name: (nonce, self.aead.encrypt(nonce, leaf.view(np.uint8), name.encode()))
            for nonce, (name, leaf) in zip(nonces, self.host.original.items(), strict=False)
        }

    def unseal(self, leaves: Mapping[str, tuple[bytes, bytes]]) -> Buffers:
        """Decrypts every leaf."""
        return {
            name: np.frombuffer(self.aead.decrypt(nonce, data, name.encode()), np.uint8)
            for name, (nonce, data) in leaves.items()
        }

    def buffers(self) -> tuple[Mapping[str, tuple[bytes, bytes]], Buffers]:
        """The ciphertexts, and memory for all leaves."""
        return self.leaves, {name: leaf.view(np.uint8) for name, leaf in self.host.copies.items()}

    def unseal_into(self, given: tuple[Mapping[str, tuple[bytes, bytes]], Buffers]) -> Buffers:
        """Decrypts every leaf into memory that is already allocated."""
        leaves, target = given
        for name, (nonce, data) in leaves.items():
            self.aead.decrypt_into(nonce, data, name.encode(), target[name])
        return target


def ours(case: Case, subject: Subject, host: OnHost) -> list[Contender]:
    """The contenders in JAX and on the NumPy engine."""
    jitted = subject.jitted()

    def donated(name: str, cipher: LosslessCipher) -> Contender:
        return Contender(
            name,
            lambda given: decrypt(*given, cipher=cipher, donate=True),
            lambda: subject.given_up(cipher),
            size=lambda: subject.size,
            check=subject.check,
        )

    def in_numpy(name: str, cipher: LosslessCipher) -> Contender:
        return Contender(
            name,
            partial(host.rewrite, cipher),
            lambda: host.encrypted(cipher),
            size=lambda: subject.size,
            check=host.check,
            compiled=False,
        )

    too_large = case.tree == LARGE and case.share > MOST_JITTED
    return [
        Contender(
            "encrypt",
            lambda given: encrypt(*given),
            lambda: (subject.params, subject.masks, subject.keys),
            size=lambda: subject.size,
            check=lambda found: subject.check(decrypt(found, subject.masks, subject.keys)),
        ),
        Contender(
            "decrypt",
            lambda given: decrypt(*given),
            subject.given,
            size=lambda: subject.size,
            check=subject.check,
        ),
        donated("decrypt, donated", PERMUTING),
        Contender(
            "decrypt, jit, donated",
            lambda given: jitted(given[0], given[2]),
            subject.given_up,
            size=lambda: subject.size,
            check=subject.check,
            missing="not run: its positions would be gigabytes of constants" if too_large else "",
        ),
        donated("decrypt, stream, donated", STREAM),
        in_numpy("NumPy engine, in place", PERMUTING),
        in_numpy("NumPy engine, stream, in place", STREAM),
    ]


def peers(subject: Subject, host: OnHost) -> list[Contender]:
    """Authenticated encryption of the whole tree, and the limits that memory sets."""
    aes, chacha = Sealed(host, AESGCM(bytes(32))), Sealed(host, ChaCha20Poly1305(bytes(32)))

    def peer(name: str, run: Callable[[Any], Any], prepare: Callable[[], Any]) -> Contender:
        return Contender(
            name,
            run,
            prepare,
            size=lambda: subject.size,
            check=host.check,
            compiled=False,
        )

    into = peer("AES-256-GCM, into buffers", aes.unseal_into, aes.buffers)
    if not hasattr(aes.aead, "decrypt_into"):
        into = Contender(into.name, missing="this version of cryptography has no decrypt_into")
    return [
        peer(BASELINE, aes.unseal, lambda: aes.leaves),
        into,
        peer("ChaCha20-Poly1305", chacha.unseal, lambda: chacha.leaves),
        peer("memcpy", host.copy, lambda: (host.original, host.copies)),
        peer("gather and scatter", host.touch, host.positions),
    ]


def contenders(case: Case) -> list[Contender]:
    """All contenders."""
    subject = Subject(case)
    host = OnHost(subject)
    return [*ours(case, subject, host), *peers(subject, host)]


def rows(options: Options) -> list[Row]:
    """The rows of the section."""
    if options.quick:
        cases = [Case("VGG19, a sixteenth", 0.08, LEVELS)]
        cases += [Case("transformer, tiny", 0.3, 1)] if options.large else []
    else:
        cases = [Case("VGG19", share, LEVELS) for share in SHARES]
        cases += [Case(LARGE, share, 1) for share in SHARES] if options.large else []
    found = []
    for case in cases:
        title = f"{case.tree}, {case.share:.0%}"
        found += measure("transform", title, contenders, case, baseline=BASELINE, options=options)
    return found
