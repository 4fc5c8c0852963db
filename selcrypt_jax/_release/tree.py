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
from .._format.unlocked import check_original
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
from .checkpoint import AnyPath, of_one_file
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
from .outputs import Job, Protection
from .signers import AnySigner, expected_signer
from .twins import with_twins
from .use import AnyGrant, grant_key


@dataclass(frozen=True)
class Protected:
    """Protected parameters, and the metadata for a file of them.

    Attributes:
        params: a tree like the one that was protected; it runs at level 0.
        metadata: manifest, boxes and signature, see FORMAT.md, plus the caller's own entries. A
            safetensors file that holds ``params`` under the names of their leaves, and these
            entries as its metadata, is a protected file.
        calibration: the measured levels, if `Targets` were requested.
        plain_change: share of the change from `Select.base` that is plain, see `Selected`.

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
        """The 16 bytes that identify this protection, for `level_key`."""
        return Envelope.from_metadata(self.metadata, "metadata").manifest.model_id

    def save(self, path: AnyPath, *, force: bool = False) -> None:
        """Writes a protected safetensors file, without leaves that are not arrays.

        Args:
            path: path of the file.
            force: replace an existing file.

        Raises:
            OSError: it cannot be written. Then there is no file, or the old one.
        """
        source = source_of_tree(named_leaves(self.params))
        layout = [(name, info.dtype, info.shape) for name, info in source.tensors.items()]
        with new_file(path, force=force) as file:
            file.write(header(layout, self.metadata))
            for name in source.tensors:
                file.write(source.read(name))

    def save_orbax(self, path: AnyPath) -> None:
        """Writes a protected Orbax checkpoint, as `selcrypt protect` does.

        With several hosts, each process writes its own part: all have to call this, with the path
        of a shared folder.

        Args:
            path: path of the folder, which must not exist.

        Raises:
            ValueError: there are leaves that a file cannot hold.
            OSError: it cannot be written. Then there is no folder.
        """
        from .._io.orbax import save_tree

        save_tree(path, self.params, self.metadata)

    @classmethod
    def load_orbax(cls, path: AnyPath, like: PyTree) -> "Protected":
        """Reads a checkpoint that `save_orbax` or `selcrypt protect` wrote, for `unlock`.

        Args:
            path: path of the folder.
            like: a tree with its structure, shapes and dtypes, of arrays or
                ``jax.ShapeDtypeStruct``; the result has the shardings of `like`. With several
                hosts, each process reads its own part.

        Raises:
            ValueError: the folder is not a protected checkpoint, or `like` does not fit.
            IntegrityError: the signature is wrong, or dtypes or shapes were changed. The bytes of
                the parameters are checked by `unlock`.
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
        params: any pytree; its arrays are protected, other leaves are passed through. So are typed
            random keys, as in a model with dropout: they are never written to a file.
        masks: M nested masks (`nested_masks`), instead of `levels` and `selection`. A ring with
            too few weights to hide is then refused. Weights selected in one leaf are encrypted in
            all of its copies, as in `protect_file`.
        secret: the owner's secret.
        levels: as in `protect_file`; 5 by default.
        selection: as in `protect_file`; ``Select()`` by default. ``Select(importance=scores)``
            takes scores as a pytree.
        like: as in `protect_file`: the file or Orbax folder of an earlier release. With a plain
            rest, leaves that it lacks stay plain, and a warning names them.
        old_signer: as in `protect_file`.
        signing: the key that signs the release; its public half identifies the owner.
        cipher: `LosslessCipher()` by default.
        rest: as in `protect_file`.
        metadata: the caller's own entries for the file.

    Returns:
        Protected parameters with their metadata. With a plain rest, leaves without a ring are the
        same objects.

    Raises:
        ValueError: masks or scores do not fit, a ring has too few weights to hide, a file cannot
            hold a dtype, metadata uses a reserved name, or targets are out of reach.
        TypeError: parameters, masks or scores are traced.

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
                f"like: {like} lacks {listed(chosen.unknown)}, which stay plain. Protect with a "
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
                "masks: expected masks that select something, got none: the result would be "
                "plaintext. Make masks with nested_masks, or leave them out."
            )
        for ring in rings:
            if is_random_key(tree.leaves[ring.name]):
                raise ValueError(
                    f"masks: {ring.name!r}: expected False for random keys, which are not "
                    "parameters and are never written to a file, got a mask that selects some. "
                    "Pass False there."
                )
            cipher.check(ring, tree.leaves[ring.name])
        spread = with_twins(sealed(rings), [source], cipher, rest, given=True)
        chosen = Chosen(spread.rings, len(masks), similar=spread.similar)
    for name in random_keys(source):
        warnings.warn(
            f"params: {name!r} looks like random keys, which level 1 opens. Leave it out of the "
            "tree if anything made with them has to stay secret.",
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
    """Refuses parameters and metadata that cannot be released.

    Raises:
        ValueError: metadata uses a reserved name, or is that of a level.
        TypeError: parameters are traced, or metadata is not text.
    """
    metadata_ok = metadata is None or isinstance(metadata, Mapping)
    if not metadata_ok or not all(isinstance(t, str) for p in (metadata or {}).items() for t in p):
        raise TypeError(
            "metadata: expected a mapping from str to str, got other types. Convert values with "
            "str or json.dumps."
        )
    check_unprotected(metadata, "metadata")
    check_original(metadata, "params")
    leaves = named_leaves(params).leaves
    for text in (*leaves, *(metadata or {}), *(metadata or {}).values()):
        if text.encode(errors="replace").decode() != text:
            raise ValueError(
                f"params, metadata: expected names and entries in valid Unicode, got a lone "
                f"surrogate in {text!r}, which no file can hold. Rename it."
            )
    for name, leaf in leaves.items():
        if isinstance(leaf, Tracer):
            raise TypeError(
                f"params: {name!r}: expected a concrete array, got a tracer. A release consists of "
                "bytes: call protect outside of jit, or use encrypt inside it."
            )


def _agreed(envelope: Envelope, entries: Mapping[str, str]) -> dict[str, str]:
    """The metadata of the first process, for all: each seals its boxes under its own nonces."""
    manifest = envelope.manifest
    shipped = repr((manifest.tensors, manifest.levels, manifest.signer, manifest.metadata))
    if not the_same_everywhere(hashlib.sha256(shipped.encode()).digest()):
        raise ValueError(
            "protect: expected the same parameters, masks, secret and signing key in all "
            "processes, got different ones. The result is unusable: read them from one source."
        )
    return json.loads(from_first(json.dumps(entries).encode()))


def unlock(protected: Protected, grant: AnyGrant, *, signer: AnySigner | None = None) -> PyTree:
    """Decrypts the parameters that a grant opens; at the top level they are the original ones.

    Args:
        protected: from `protect`.
        grant: a grant, a level key, or the path of a grant file.
        signer: as in `unlock_file`.

    Returns:
        A tree like ``protected.params``. Leaves in which the key opens nothing are the same
        objects.

    Raises:
        GrantError: the key is for another model, or the grant names another signer.
        IntegrityError: parameters or metadata were altered.

    Examples:
        >>> released = protect(params, masks, secret=secret)
        >>> key = level_key(secret, released.model_id, level=1, levels=len(masks))
        >>> basic = unlock(released, key)
    """
    key, of_grant = grant_key(grant)
    if not isinstance(protected, Protected):
        raise TypeError(
            f"protected: expected a Protected, got {type(protected).__name__}. For the result of "
            "encrypt use decrypt; for a file use open_model or unlock_file."
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
    """An array from its bytes; a JAX array with the sharding of ``like`` if that is one."""
    info = source.tensors[name]
    array = as_array(data, info.dtype, info.shape)
    return put(array, like.sharding) if isinstance(like, jax.Array) else array
