"""Protecting pytrees in memory, and unlocking them."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
from jax.core import Tracer
from jaxtyping import PyTree

from .._calibrate.levels import Calibration, Targets
from .._ciphers.lossless import LosslessCipher
from .._format.envelope import Envelope, check_unprotected
from .._format.manifest import Rest
from .._format.tensors import Unlocked, check_table
from .._format.unlocked import warn_if_unlocked
from .._io.arrays import ArraySource, as_array
from .._io.atomic import new_file
from .._io.safetensors import header
from .._keys.keys import Secret, new_model_id
from .._keys.signing import SigningKey
from .._masks.levels import LevelsLike
from .._masks.options import Select
from .._masks.scores import source_of_tree
from .._tree.hosts import from_first, is_spread, put, the_same_everywhere
from .._tree.names import is_random_key, listed, named_leaves
from .._tree.rings import split_rings
from .checkpoint import AnyPath, Job, Protection, of_one_file
from .choose import (
    Chosen,
    Plan,
    check_alone,
    check_like,
    check_rest,
    choose_like,
    plain_change,
    random_keys,
    sealed,
)
from .signers import AnySigner, expected_signer
from .twins import with_twins
from .use import AnyGrant, grant_key


@dataclass(frozen=True)
class Protected:
    """Protected parameters, and what a file of them needs in its metadata.

    Attributes:
        params: a tree like the one that was protected; it runs at level 0.
        metadata: manifest, boxes and signature, see FORMAT.md, beside the caller's own entries.
            Whatever writes ``params`` to a safetensors file under the names of their leaves, and
            these as its metadata, writes a protected file.
        calibration: what the levels give, if `Targets` were asked for.
        plain_change: share of what changed from `Select.base` that is plain, see `Selected`.

    Examples:
        >>> released = protect(params, masks, secret=secret)
        >>> released.save("released.safetensors")
        >>> released.save_orbax("released")
        >>> again = Protected.load_orbax("released", like=params)
    """

    params: PyTree
    metadata: Mapping[str, str]
    calibration: Calibration | None = None
    plain_change: float | None = None

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
        source = source_of_tree(named_leaves(self.params))
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
            IntegrityError: a wrong signature, or other dtypes and shapes than were protected. The
                bytes of the parameters are checked by `unlock`.
            OSError: it cannot be read.
        """
        from .._io.orbax import load_tree

        return cls(*load_tree(path, like, lambda file: of_one_file(file).envelopes()))


def protect(
    params: PyTree,
    masks: Sequence[PyTree] | None = None,
    *,
    secret: Secret,
    levels: LevelsLike | Targets | None = None,
    selection: Select | None = None,
    like: AnyPath | None = None,
    old_signer: AnySigner | None = None,
    signing: SigningKey | None = None,
    cipher: LosslessCipher | None = None,
    rest: Rest = "sealed",
    metadata: Mapping[str, str] | None = None,
) -> Protected:
    """Protects parameters for release: selects, encrypts, seals the masks, signs.

    The ciphertext is that of `encrypt` under a new model id.

    Args:
        params: any pytree; its arrays are protected, other leaves pass through. So do typed random
            keys, as of a model with dropout: nothing of them is written to a file.
        masks: M nested masks (`nested_masks`), in place of `levels` and `selection`. A ring that
            is too small to hide in is then refused. What they select in one leaf is encrypted in
            all of its copies, as in `protect_file`.
        secret: the owner's.
        levels: as in `protect_file`; 5 by default.
        selection: as in `protect_file`; ``Select()`` by default. ``Select(importance=scores)``
            takes scores as a pytree.
        like: as in `protect_file`: the file, or the Orbax folder, of an earlier release. Leaves
            that it did not have stay plain with a plain rest, and a warning names them.
        old_signer: as in `protect_file`.
        signing: signs the release; its public half names the owner.
        cipher: `LosslessCipher()` unless given.
        rest: as in `protect_file`.
        metadata: the caller's own entries for the file.

    Returns:
        Protected parameters with their metadata. With a plain rest, leaves without a ring are the
        same objects.

    Raises:
        ValueError: masks or scores that do not fit, a ring that is too small to hide in, a dtype
            that a file cannot hold, metadata under names of ours, targets out of reach.
        TypeError: traced parameters, masks or scores.

    Examples:
        >>> released = protect(params, masks, secret=secret, signing=signing)
        >>> learned = Select(scores, budget=0.3)
        >>> released = protect(params, secret=secret, levels=3, selection=learned)
        >>> targets = Targets([21, 25], psnr_of, tolerance=1)
        >>> by_weight = Select(granularity="weight", budget=0.9)
        >>> released = protect(params, secret=secret, levels=targets, selection=by_weight)
    """
    _check_release(params, metadata)
    check_rest(rest)
    cipher = LosslessCipher() if cipher is None else cipher
    tree = named_leaves(params)
    source = source_of_tree(tree)
    change = None
    check_like(like, old_signer, masks=masks, levels=levels, selection=selection)
    if like is not None:
        chosen = choose_like(
            like, source, [source],
            secret=secret, signing=signing, old_signer=old_signer,
            cipher=cipher, rest=rest, what="params",
        )  # fmt: skip
        if rest == "plain" and chosen.unknown:
            warnings.warn(
                f"{like} says nothing of {listed(chosen.unknown)}: left plain. Protect with a "
                'sealed rest (rest="sealed"), or without like.',
                stacklevel=2,
            )
    elif masks is None:
        with ExitStack() as stack:
            plan = Plan(
                source, 5 if levels is None else levels, selection or Select(), cipher, rest,
                stack=stack, metadata={"format": "jax"}, what="params",
            )  # fmt: skip
            chosen = plan.choose(lambda: params, secret, [source])
        change, _ = plain_change(source, plan.selection, chosen.rings, rest, "params")
    else:
        check_alone("masks", levels=levels, selection=selection)
        rings = split_rings(tree, masks)
        if not rings:
            raise ValueError(
                "masks: expected something to be selected, got nothing: the result would be "
                "plaintext. Make masks with nested_masks, or leave them out."
            )
        for ring in rings:
            if is_random_key(tree.leaves[ring.name]):
                raise ValueError(
                    f"masks: {ring.name!r}: expected False for random keys, which are no "
                    "parameters and are in no file, got a mask that selects some. Pass False there."
                )
            cipher.check(ring, tree.leaves[ring.name])
        spread = with_twins(sealed(rings), [source], cipher, rest, given=True)
        chosen = Chosen(spread.rings, len(masks), similar=spread.similar)
    for name in random_keys(source):
        warnings.warn(
            f"params: {name!r} looks like random keys, which level 1 opens. Leave it out of the "
            "tree if anything is to stay secret that was made with them.",
            stacklevel=2,
        )
    for similar in chosen.similar:
        warnings.warn(f"params: {similar}", stacklevel=2)
    together = any(is_spread(leaf) for leaf in tree.leaves.values())
    model_id = chosen.model_id
    if together and model_id is None:
        model_id = from_first(new_model_id())
    protection = Protection.new(secret, chosen.levels, cipher, rest, signing, model_id)
    leaves: dict[str, Any] = {}

    def keep(name: str, data: memoryview) -> None:
        if rest == "sealed" or name in chosen.rings:
            leaves[name] = _leaf(data, source, name, tree.leaves[name])

    envelope = protection.encrypt(Job(source, metadata, chosen.rings, None, "params"), keep)
    entries = envelope.entries()
    if together:
        entries = _agreed(envelope, entries)
    return Protected(tree.rebuild(leaves), entries, chosen.calibration, change)


def _check_release(params: PyTree, metadata: Mapping[str, str] | None) -> None:
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
    warn_if_unlocked(metadata, "params")
    leaves = named_leaves(params).leaves
    for text in (*leaves, *(metadata or {}), *(metadata or {}).values()):
        if text.encode(errors="replace").decode() != text:
            raise ValueError(
                f"params, metadata: expected names and entries of Unicode, got a lone surrogate in "
                f"{text!r}, which no file can hold. Rename it."
            )
    for name, leaf in leaves.items():
        if isinstance(leaf, Tracer):
            raise TypeError(
                f"params {name!r}: expected a concrete array, got a traced one. What is released "
                "is bytes: call protect outside of jit, or use encrypt there."
            )


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


def unlock(protected: Protected, grant: AnyGrant, *, signer: AnySigner | None = None) -> PyTree:
    """The parameters that a key opens; with the top level's key the original ones.

    Args:
        protected: from `protect`.
        grant: a grant, a level key, or the path of a grant file.
        signer: as in `unlock_file`.

    Returns:
        A tree like ``protected.params``. Leaves in which the key opens nothing are the same
        objects.

    Raises:
        GrantError: a key of another model, or a grant that asks for another signer.
        IntegrityError: parameters or metadata are not what was protected.

    Examples:
        >>> released = protect(params, masks, secret=secret)
        >>> key = level_key(secret, released.model_id, level=1, levels=len(masks))
        >>> basic = unlock(released, key)
    """
    key, of_grant = grant_key(grant)
    if not isinstance(protected, Protected):
        raise TypeError(
            f"protected: expected a Protected, got {type(protected).__name__}. For what encrypt "
            "returned use decrypt; for a file use open_model or unlock_file."
        )
    envelope = Envelope.from_metadata(protected.metadata, "params")
    envelope.check_signature(expected_signer(signer, of_grant))
    tree = named_leaves(protected.params)
    source = source_of_tree(tree)
    check_table(source, envelope)
    plain = Unlocked(source, envelope, key)
    leaves = {}
    for name in source.tensors:
        with source.held(name):
            data = plain.read(name)
        if plain.changes(name):
            leaves[name] = _leaf(data, source, name, tree.leaves[name])
    return tree.rebuild(leaves)


def _leaf(data: memoryview, source: ArraySource, name: str, like: Any) -> Any:
    """An array from its bytes, of the kind and where ``like`` is."""
    info = source.tensors[name]
    array = as_array(data, info.dtype, info.shape)
    return put(array, like.sharding) if isinstance(like, jax.Array) else array
