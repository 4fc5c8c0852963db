"""Protecting pytrees in memory and checkpoints on disk."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jaxtyping import PyTree

from .._ciphers.lossless import LosslessCipher
from .._format.boxes import Rings, SealedRing
from .._format.envelope import Envelope, check_unprotected
from .._format.rings import seal_mask
from .._format.tensors import Unlocked, check_table
from .._io.arrays import ArraySource, as_array
from .._io.atomic import check_output, new_file
from .._io.safetensors import SafetensorsFile, header
from .._keys.keys import Secret, new_model_id
from .._keys.signing import SigningKey
from .._masks.levels import Levels, as_levels
from .._masks.ranks import Scope, Scores
from .._tree.groups import Granularity, Layout
from .._tree.hosts import (
    from_first,
    gathered,
    is_spread,
    put,
    the_same_everywhere,
)
from .._tree.names import NamedLeaves, Selector, is_array, named_leaves
from .._tree.rings import split_rings
from .checkpoint import (
    AnyPath,
    Checkpoint,
    Job,
    Output,
    Protection,
    checkpoint_outputs,
    open_checkpoint,
)
from .plan import (
    Strategy,
    check_room,
    choose_tensors,
    given_scores,
    guess_layout,
    plan_rings,
    small_rings,
    strategy_scores,
)
from .use import AnyGrant, grant_key


@dataclass(frozen=True)
class Protected:
    """Protected parameters, and what a file of them needs in its metadata.

    Attributes:
        params: a tree like the one that was protected; it runs at level 0.
        metadata: manifest, boxes and signature, see FORMAT.md, beside the caller's own entries.
            Whatever writes ``params`` to a safetensors file under the names of their leaves, and
            these as its metadata, writes a protected file.
    """

    params: PyTree
    metadata: Mapping[str, str]

    @property
    def model_id(self) -> bytes:
        """16 bytes that name this protection, for `level_key`."""
        return Envelope.from_metadata(self.metadata, "metadata").manifest.model_id

    def save(self, path: AnyPath, *, force: bool = False) -> None:
        """Writes a protected safetensors file; leaves that are no arrays are not in it.

        Args:
            path: of the file.
            force: replace an existing file.

        Raises:
            OSError: it cannot be written. There is no file then, or the old one.
        """
        source = _source(named_leaves(self.params))
        layout = [(name, info.dtype, info.shape) for name, info in source.tensors.items()]
        with new_file(path, force=force) as file:
            file.write(header(layout, self.metadata))
            for name in source.tensors:
                file.write(source.read(name))

    def save_orbax(self, path: AnyPath) -> None:
        """Writes a protected Orbax checkpoint, as `selcrypt protect` makes it from one.

        On several hosts each process writes what it has; all have to call this, with the path of a
        folder that they share.

        Args:
            path: of the folder; there must be nothing of this name.

        Raises:
            ValueError: leaves that a file cannot hold.
            OSError: it cannot be written. There is no folder then.
        """
        from .._io.orbax import save_tree

        save_tree(path, self.params, self.metadata)

    @classmethod
    def load_orbax(cls, path: AnyPath, like: PyTree) -> "Protected":
        """Reads what `save_orbax` or `selcrypt protect` wrote; for `unlock`.

        Args:
            path: of the folder.
            like: a tree with its structure, shapes and dtypes, of arrays or of
                ``jax.ShapeDtypeStruct``; arrays are placed as those of `like`. On several hosts
                each process reads its own part.

        Raises:
            ValueError: no protected checkpoint, or a `like` that does not fit.
            OSError: it cannot be read.
        """
        from .._io.orbax import load_tree

        return cls(*load_tree(path, like))


class Selection(NamedTuple):
    """What was chosen for a protected checkpoint.

    Attributes:
        model_id: 16 bytes that name the protection.
        layout: of the kernels, given or told from their shapes; None for given scores.
        groups: tensor → how many of its groups are encrypted.
        untouched: dtype → how many weights lie in tensors of which nothing is encrypted.
    """

    model_id: bytes
    layout: Layout | None
    groups: Mapping[str, int]
    untouched: Mapping[str, int]


def protect(
    params: PyTree,
    masks: Sequence[PyTree] | PyTree,
    *,
    secret: Secret,
    fractions: Sequence[float] | Levels | None = None,
    scope: Scope = "leaf",
    signing: SigningKey | None = None,
    cipher: LosslessCipher | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Protected:
    """Protects parameters for release: encrypts them, seals the masks, signs.

    The ciphertext is that of `encrypt` under a new model id.

    Args:
        params: any pytree; its arrays are protected, other leaves pass through.
        masks: M nested masks (`nested_masks`); or, with `fractions`, scores of importance.
        secret: the owner's.
        fractions: shares of the groups that level 1..M may decrypt; see `nested_masks`. Rings in
            which too little is to be guessed are merged upwards, leaf by leaf.
        scope: of `fractions`: ``"leaf"`` or ``"model"``.
        signing: signs the file; its public half names the owner.
        cipher: `LosslessCipher()` unless given.
        metadata: the caller's own entries for the file.

    Returns:
        Protected parameters with their metadata. What no ring touches are the same objects.

    Raises:
        ValueError: masks or scores that do not fit, a ring that is too small to hide in, a dtype
            that a file cannot hold, metadata under names of ours.
        TypeError: traced masks or scores.

    Examples:
        >>> released = protect(params, masks, secret=secret, signing=signing)
        >>> released.save("public.safetensors")
    """
    return protected_tree(
        params,
        masks,
        secret=secret,
        fractions=fractions,
        scope=scope,
        signing=signing,
        cipher=cipher,
        metadata=metadata,
    )


def check_release(params: PyTree, metadata: Mapping[str, str] | None) -> None:
    """Refuses what cannot be released.

    Raises:
        ValueError: metadata under names of ours.
        TypeError: traced parameters, or metadata that are no text.
    """
    metadata_ok = metadata is None or isinstance(metadata, Mapping)
    if not metadata_ok or not all(isinstance(t, str) for p in (metadata or {}).items() for t in p):
        raise TypeError(
            "metadata: expected text for text, as a file holds it, got something else. Turn values "
            "into text with str or json.dumps."
        )
    check_unprotected(metadata, "metadata")
    for name, leaf in named_leaves(params).leaves.items():
        if isinstance(leaf, Tracer):
            raise TypeError(
                f"params {name!r}: expected a concrete array, got a traced one. What is released "
                "is bytes: call protect outside of jit, or use encrypt there."
            )


def protected_tree(
    params: PyTree,
    masks: Sequence[PyTree] | PyTree,
    *,
    secret: Secret,
    fractions: Sequence[float] | Levels | None = None,
    scope: Scope = "leaf",
    signing: SigningKey | None,
    cipher: LosslessCipher | None,
    metadata: Mapping[str, str] | None,
    model_id: bytes | None = None,
) -> Protected:
    """See `protect`; under a model id that has not been used, if one is given."""
    check_release(params, metadata)
    cipher = LosslessCipher() if cipher is None else cipher
    tree = named_leaves(params)
    source = _source(tree)
    if fractions is None:
        rings = rings_of_masks(tree, masks, cipher)
        levels = len(masks)
    else:
        scores = named_leaves(masks, "scores").leaves
        given = {name: gathered(leaf) for name, leaf in scores.items() if is_array(leaf)}
        found = given_scores(ArraySource(given, "scores"), source.tensors, None, "scores")
        rings = plan_rings(source.tensors, found, fractions, scope=scope, cipher=cipher)
        levels = _levels_of(rings)
    together = any(is_spread(leaf) for leaf in tree.leaves.values())
    if together and model_id is None:
        model_id = from_first(new_model_id())
    protection = Protection.new(secret, levels, cipher, signing, model_id)
    leaves: dict[str, Any] = {}

    def keep(name: str, data: bytearray) -> None:
        if name in rings:
            leaves[name] = _leaf(data, source, name, tree.leaves[name])

    envelope = protection.encrypt(Job(source, metadata, rings, None, "params"), keep)
    entries = envelope.entries()
    if together:
        entries = _agreed(envelope, entries)
    return Protected(tree.rebuild(leaves), entries)


def _agreed(envelope: Envelope, entries: Mapping[str, str]) -> dict[str, str]:
    """The metadata of the first process, whose boxes are sealed under nonces of its own."""
    manifest = envelope.manifest
    shipped = repr((manifest.tensors, manifest.levels, manifest.signer, manifest.metadata))
    if not the_same_everywhere(hashlib.sha256(shipped.encode()).digest()):
        raise ValueError(
            "protect: expected the same parameters, masks, secret and signing key in all "
            "processes, got different ones. Nothing of it can be used: read them from one place."
        )
    return json.loads(from_first(json.dumps(entries).encode()))


def unlock(protected: Protected, grant: AnyGrant) -> PyTree:
    """The parameters that a key opens; at the top level the original ones.

    Args:
        protected: from `protect`.
        grant: a grant, a level key, or the path of a grant file.

    Returns:
        A tree like ``protected.params``. What no opened ring touches are the same objects.

    Raises:
        ValueError: a key of another model.
        IntegrityError: parameters or metadata are not what was protected.
    """
    key, signer = grant_key(grant)
    if not isinstance(protected, Protected):
        raise TypeError(
            f"protected: expected a Protected, got {type(protected).__name__}. For what encrypt "
            "returned use decrypt; for a file use open_model or unlock_file."
        )
    envelope = Envelope.from_metadata(protected.metadata, "params")
    envelope.check_signature(signer)
    tree = named_leaves(protected.params)
    source = _source(tree)
    check_table(source, envelope)
    plain = Unlocked(source, envelope, key)
    leaves = {}
    for name in source.tensors:
        data = plain.read(name)
        if name in plain.rings:
            leaves[name] = _leaf(data, source, name, tree.leaves[name])
    return tree.rebuild(leaves)


def protect_file(
    path: AnyPath,
    output: AnyPath,
    *,
    secret: Secret,
    fractions: Sequence[float] | Levels,
    importance: AnyPath | None = None,
    strategy: Strategy | None = None,
    granularity: Granularity | None = None,
    layout: Layout | None = None,
    select: Selector = None,
    scope: Scope = "leaf",
    small: float = 0.02,
    signing: SigningKey | None = None,
    cipher: LosslessCipher | None = None,
    force: bool = False,
) -> Selection:
    """Protects a checkpoint for release, tensor by tensor.

    The output has the same names, dtypes and shapes, and runs at level 0 in every program that
    reads safetensors. Of tensors that are bit for bit alike, such as tied weights that were saved
    twice, the same weights are encrypted, whether they take part or not.

    Args:
        path: a safetensors file; or the index, or the folder, of a checkpoint in several files.
        output: path of the new file, or of the new folder for a checkpoint in several files.
        secret: the owner's.
        fractions: shares of the groups that level 1..M may decrypt; see `nested_masks`. Rings in
            which too little is to be guessed are merged upwards, leaf by leaf.
        importance: a safetensors file with scores, under the names of the tensors that take part;
            in place of `strategy`, `granularity` and `layout`.
        strategy: how importance is judged without data, ``"l2"`` by default; see
            `selcrypt_jax.importance`. l2 and descend take the largest weights, which stay large:
            where they are can be guessed, though not what they were.
        granularity: ``"kernel"`` (the default), ``"filter"`` or ``"weight"``.
        layout: ``"HWIO"``, ``"OIHW"``, or None to tell it from the shapes and the metadata.
        select: which tensors take part; None for floats with two axes or more, or for all that
            have scores.
        scope: ``"leaf"`` or ``"model"``; see `nested_masks`.
        small: share of all weights. The smallest tensors that together have no more are encrypted
            as a whole, beside `fractions`; level 1 opens them. Normalisation parameters, biases,
            the first and the last layer are among them; see `with_small_leaves`. 0 for none.
        signing: signs the file; its public half names the owner.
        cipher: `LosslessCipher()` unless given.
        force: replace an existing file.

    Returns:
        What was chosen.

    Raises:
        ValueError: no checkpoint, or one that is protected already; nothing to select; a leaf
            that is too small to hide in; positions that take more room than a file has.
        OSError: what cannot be read or written. There is no output then.
    """
    cipher = LosslessCipher() if cipher is None else cipher
    with open_checkpoint(path) as checkpoint, ExitStack() as stack:
        check_checkpoint(checkpoint)
        tensors = checkpoint.tensors
        if importance is not None:
            check_output(output, importance)
        scores, layout = checkpoint_scores(
            checkpoint, stack, importance, strategy, granularity, layout, select
        )
        if scope == "leaf":
            for file in checkpoint.files.values():
                here = [shape for name, shape in scores.shapes.items() if name in file.tensors]
                check_room(here, as_levels(fractions), str(file.path))
        # Before the work of choosing, which is the most of it.
        with checkpoint_outputs(checkpoint, output, force=force) as create:
            whole = small_rings(tensors, small, select, cipher)
            # What is encrypted as a whole needs no place in the order, unless there is no other.
            ordered = {n: shape for n, shape in scores.shapes.items() if n not in whole}
            scores = scores._replace(shapes=ordered or scores.shapes)
            try:
                rings = plan_rings(tensors, scores, fractions, scope=scope, cipher=cipher)
            except ValueError as error:
                raise ValueError(f"{checkpoint.path}: {error}") from None
            rings |= whole
            rings |= _rings_of_copies(checkpoint, rings)
            protection = Protection.new(secret, _levels_of(rings), cipher, signing)
            write_protected(checkpoint, create, rings, protection)
    return selection(checkpoint, protection, layout, rings)


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint that is protected already, or that the safetensors library refuses."""
    for file in checkpoint.files.values():
        check_unprotected(file.metadata, str(file.path))
        if isinstance(file, SafetensorsFile):
            file.ask_stock_reader()


def write_protected(
    checkpoint: Checkpoint,
    create: Callable[[str], AbstractContextManager[Output]],
    rings: Rings,
    protection: Protection,
) -> None:
    """Encrypts and writes all files, see `checkpoint_outputs`."""
    for name, file in checkpoint.files.items():
        here = {tensor: rings[tensor] for tensor in file.tensors if tensor in rings}
        job = Job(file, file.metadata, here, checkpoint.shard(name), str(file.path))
        with create(name) as out:
            out.protected(job, protection)


def selection(
    checkpoint: Checkpoint, protection: Protection, layout: Layout | None, rings: Rings
) -> Selection:
    """What was chosen."""
    groups = {name: sum(ring.groups for _, ring in found) for name, found in rings.items()}
    untouched: Counter[str] = Counter()
    for name, info in checkpoint.tensors.items():
        if name not in rings:
            untouched[info.dtype] += math.prod(info.shape)
    return Selection(protection.key.model_id, layout, groups, +untouched)


def _rings_of_copies(checkpoint: Checkpoint, rings: Rings) -> Rings:
    """The same rings for tensors that are bit for bit alike, as tied weights that were saved twice.

    What is encrypted in one and plain in the other would be plain.
    """
    found: Rings = {}
    for copies in alike_tensors(checkpoint, rings):
        first = next((name for name in copies if name in rings), None)
        if first is not None:
            found |= {
                name: [(level, ring._replace(tensor=name)) for level, ring in rings[first]]
                for name in copies
            }
    return found


def alike_tensors(checkpoint: Checkpoint, among: Container[str]) -> list[list[str]]:
    """Names of tensors that are bit for bit alike, where some of them may be encrypted.

    Args:
        checkpoint: that has them.
        among: what may be encrypted.
    """
    like: dict[Any, list[str]] = {}
    sources = {name: file for file in checkpoint.files.values() for name in file.tensors}
    for name, info in checkpoint.tensors.items():
        if math.prod(info.shape):
            like.setdefault((info.dtype, tuple(info.shape)), []).append(name)
    found: list[list[str]] = []
    for names in like.values():
        if len(names) == 1 or not any(name in among for name in names):
            continue
        starts: dict[bytes, list[str]] = {}
        for name in names:
            file = sources[name]
            few = file.chunks(name, 64) if isinstance(file, SafetensorsFile) else file.chunks(name)
            starts.setdefault(bytes(next(iter(few))[:64]), []).append(name)
        for alike in starts.values():  # most are told apart by how they start
            digests: dict[bytes, list[str]] = {}
            for name in alike if len(alike) > 1 else ():
                digest = hashlib.sha256()
                for piece in sources[name].chunks(name):
                    digest.update(piece)
                digests.setdefault(digest.digest(), []).append(name)
            found += [copies for copies in digests.values() if len(copies) > 1]
    return found


def checkpoint_scores(
    checkpoint: Checkpoint,
    stack: ExitStack,
    importance: AnyPath | None,
    strategy: Strategy | None,
    granularity: Granularity | None,
    layout: Layout | None,
    select: Selector,
) -> tuple[Scores, Layout | None]:
    """Scores from a file of their own, or by a strategy; and the layout, given or told.

    Args: see `protect_file`; ``stack`` closes the file.
    """
    tensors = checkpoint.tensors
    if importance is not None:
        _check_unused(strategy=strategy, granularity=granularity, layout=layout)
        given = stack.enter_context(SafetensorsFile(importance))
        if any(os.path.samefile(importance, file.path) for file in checkpoint.files.values()):
            raise ValueError(
                f"{importance}: expected scores, got the checkpoint itself. Save scores under the "
                "names of its tensors, or leave importance out, for a strategy without data."
            )
        return given_scores(given, tensors, select, str(importance)), None
    granularity = granularity or "kernel"
    try:
        names = choose_tensors(tensors, select)
        metadata = next(iter(checkpoint.files.values())).metadata or {}
        layout = layout or guess_layout(tensors, names, metadata, granularity)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    return strategy_scores(checkpoint, names, strategy or "l2", granularity, layout), layout


def _check_unused(**options: object) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"importance: expected scores alone, got {', '.join(given)} too, which the scores "
            "decide. Leave them out."
        )


def _source(tree: NamedLeaves) -> ArraySource:
    return ArraySource({name: leaf for name, leaf in tree.leaves.items() if is_array(leaf)})


def _leaf(data: bytes | bytearray, source: ArraySource, name: str, like: Any) -> Any:
    """An array from its bytes, of the kind and where ``like`` is."""
    info = source.tensors[name]
    array = as_array(data, info.dtype, info.shape)
    return put(array, like.sharding) if isinstance(like, jax.Array) else array


def _levels_of(rings: Rings) -> int:
    return max(level for found in rings.values() for level, _ in found)


def rings_of_masks(
    tree: NamedLeaves, masks: Sequence[PyTree], cipher: LosslessCipher
) -> dict[str, list[tuple[int, SealedRing]]]:
    """The rings of nested masks, checked and sealed."""
    found = split_rings(tree, masks)
    if not found:
        raise ValueError(
            "masks: expected something to be selected, got nothing: the result would be plaintext. "
            "Make masks with nested_masks, or pass scores and fractions."
        )
    rings: dict[str, list[tuple[int, SealedRing]]] = {}
    for ring in found:
        cipher.check(ring, tree.leaves[ring.name])
        sealed = seal_mask(ring.name, ring.mask)
        rings.setdefault(ring.name, []).append((ring.level, sealed))
    return rings
