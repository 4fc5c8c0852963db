"""Decides what a release encrypts: from options to sealed rings, alike for files and trees."""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import NamedTuple, get_args

import numpy as np
from jaxtyping import PyTree

from .._calibrate.levels import Calibration, release_levels
from .._calibrate.network import Given
from .._calibrate.targets import Targets, checked_targets
from .._ciphers.lossless import LosslessCipher
from .._format.boxes import Rings, SealedRing
from .._format.manifest import NO_DIGEST, Rest
from .._format.rings import ring_groups, seal_mask
from .._format.tensors import StoredTensors
from .._io.errors import IntegrityError
from .._keys.keys import Secret, level_key
from .._keys.signing import SigningKey, VerifyKey
from .._masks.change import Base, is_counted
from .._masks.levels import Levels, LevelsLike, as_levels
from .._masks.options import Select, check_options
from .._masks.scores import NamedTensors, scores_for, whole_leaves
from .._masks.selection import leaves_of_tensors, select_rings
from .._tree.ahead import ahead
from .._tree.dtypes import SAFETENSORS
from .._tree.groups import Layout, Ring, unit_places
from .checkpoint import AnyPath, open_checkpoint
from .signers import UNSIGNED, AnySigner, verify_key
from .twins import Scattered, Similar, twins_of, with_twins


class Chosen(NamedTuple):
    """What to encrypt.

    Attributes:
        rings: tensor → its sealed rings.
        levels: M, the number of levels.
        layout: the layout of the kernels; None where it was not needed.
        calibration: the quality of the levels, if they were searched for.
        model_id: the model id of the search, if there was one. It must not be used for anything
            else, so callers of the package never see it before the release is made.
        unknown: tensors that the earlier release did not have, and so says nothing about.
        similar: tensors that resemble others, but in which less is encrypted.
    """

    rings: Rings
    levels: int
    layout: Layout | None = None
    calibration: Calibration | None = None
    model_id: bytes | None = None
    unknown: tuple[str, ...] = ()
    similar: tuple[Similar | Scattered, ...] = ()


class Plan:
    """A request to encrypt something; its options are checked here, before any work.

    Args:
        source: the tensors.
        levels: see `protect_file`.
        selection: see `protect_file`.
        cipher: see `protect_file`.
        rest: see `protect_file`.
        stack: closes the file of the scores.
        metadata: the checkpoint's metadata; may imply the layout.
        what: the checkpoint or tree, for messages.

    Raises:
        ValueError, TypeError, OSError: options that do not fit the tensors or each other.
    """

    def __init__(
        self,
        source: NamedTensors,
        levels: LevelsLike | Targets,
        selection: Select,
        cipher: LosslessCipher,
        rest: Rest,
        *,
        stack: ExitStack,
        metadata: Mapping[str, str],
        what: str,
    ) -> None:
        check_options(selection, cipher)
        self.source, self.selection, self.cipher = source, selection, cipher
        self.rest: Rest = rest
        self.targets: Targets | None = None
        self.levels: Levels | None = None
        if isinstance(levels, Targets):
            checked_targets(levels)
            self.targets = levels
        else:
            self.levels = as_levels(levels, selection.budget)
        self.layout: Layout | None
        self.scores, self.layout = scores_for(
            source, selection, stack, metadata=metadata, what=what
        )
        default = 0.02 if self.targets is None else self.targets.small
        self.whole = whole_leaves(source.tensors, self.scores, selection, cipher, default=default)

    def choose(
        self, params: Callable[[], PyTree], secret: Secret, files: Iterable[StoredTensors]
    ) -> Chosen:
        """Selects what to encrypt, or searches for levels that meet their targets.

        Args:
            params: returns all tensors as a pytree, for the search.
            secret: the owner's secret, for the search.
            files: the files that hold the tensors.

        Raises:
            ValueError: leaves that cannot be encrypted; levels that add nothing; targets that
                cannot be reached.
        """
        tensors, scope, files = self.source.tensors, self.selection.scope, list(files)
        if self.targets is not None:
            given = Given(
                params(), self.scores, self.selection, self.whole, self.cipher, self.targets
            )
            source = {name: file for file in files for name in file.tensors}
            found, calibration, model_id = release_levels(
                given, secret=secret, twins=twins_of(source, tensors), sealed=self.rest == "sealed"
            )
            spread = with_twins(sealed(found), files, self.cipher, self.rest, given=True)
            levels = len(calibration.levels) + (self.rest == "sealed")
            return Chosen(
                spread.rings, levels, self.layout, calibration, model_id, similar=spread.similar
            )
        assert self.levels is not None
        selected = select_rings(
            self.scores, self.levels, scope=scope, leaves=leaves_of_tensors(tensors),
            cipher=self.cipher, whole=self.whole,
        )  # fmt: skip
        rings = sealed(selected)
        levels = max(level for found in rings.values() for level, _ in found)
        spread = with_twins(rings, files, self.cipher, self.rest, given=False)
        return Chosen(spread.rings, levels, self.layout, similar=spread.similar)


def choose_like(
    path: AnyPath,
    source: NamedTensors,
    files: Iterable[StoredTensors],
    *,
    secret: Secret,
    signing: SigningKey | None,
    old_signer: AnySigner | None,
    cipher: LosslessCipher,
    rest: Rest,
    what: str,
) -> Chosen:
    """The selection of an earlier release.

    Args:
        path: the earlier release's path; its tensors are not read.
        source: the tensors to protect.
        files: the files that hold them.
        secret: the owner's secret, which must have protected the earlier release too.
        signing: the owner's signing key. If given, it must have signed the earlier release, since a
            grant holder could have changed its positions.
        old_signer: see `protect_file`.
        cipher: the new release's cipher.
        rest: the new release's rest.
        what: the checkpoint or tree, for messages.

    Raises:
        ValueError: the release is of another network, or encrypts too few weights of a tensor.
        GrantError: another secret protected it.
        IntegrityError: it has another signer, or was altered.
        OSError: it cannot be read.
    """
    with open_checkpoint(path) as old:
        envelopes = old.envelopes()
        manifest = next(iter(envelopes.values())).manifest
        old.check_whole(manifest)
        _check_old_signer(manifest.signer, signing, old_signer, str(path))
        if manifest.rest == "sealed" and rest == "plain":
            raise ValueError(
                f"like: {path}: has a sealed rest, expected a plain one: weights that only its "
                "level 1 opens would be plain in the new file. Seal the new file too."
            )
        key = level_key(secret, manifest.model_id, levels=len(manifest.levels))
        rings: dict[str, list[tuple[int, SealedRing]]] = {}
        for file in old.unlocked(envelopes, key, owner=True).values():
            for name, found in file.rings.items():
                shape, after = tuple(file.tensors[name].shape), source.tensors.get(name)
                if after is None or tuple(after.shape) != shape:
                    got = "no such tensor" if after is None else f"shape {list(after.shape)}"
                    raise ValueError(
                        f"{what}: tensor {name!r}: expected shape {list(shape)}, as in "
                        f"{path}, which encrypts some of it, got {got}. Name an earlier release of "
                        "this network."
                    )
                dtype = SAFETENSORS[after.dtype]
                for level, ring in found:
                    where, weights = f"{what}: tensor {name!r}, level {level}", ring.weights(shape)
                    cipher.check_size(where, dtype, groups=ring.groups, weights=weights)
                rings[name] = [(m, ring._replace(sha256=NO_DIGEST)) for m, ring in found]
        spread = with_twins(rings, files, cipher, rest, given=True)
        known = {*spread.rings, *(name for file in old.files.values() for name in file.tensors)}
        unknown = tuple(name for name in source.tensors if name not in known)
        return Chosen(spread.rings, len(manifest.levels), unknown=unknown, similar=spread.similar)


def _check_old_signer(
    actual: VerifyKey | None, signing: SigningKey | None, given: AnySigner | None, path: str
) -> None:
    """Checks who signed the earlier release.

    Raises:
        IntegrityError: another signer did.
    """
    if given == UNSIGNED:
        expected = None
    elif given is None and signing is None:
        return
    else:
        expected = verify_key(given) or (signing and signing.public)
    if actual != expected:
        wanted = "without a signature" if expected is None else f"signed by {expected.hex()}"
        got = "one without a signature" if actual is None else f"one signed by {actual.hex()}"
        raise IntegrityError(
            f"{path}: like: expected an earlier release {wanted}, got {got}: a grant holder "
            "can change what a file encrypts, unless you signed it. Name the key that signed it "
            '(--old-signer signing.pub); or "unsigned", if it was never signed and this is your '
            "own copy.",
            reason="signer",
        )


def plain_change(
    source: NamedTensors, selection: Select, rings: Rings, rest: Rest, what: str
) -> tuple[float | None, tuple[str, ...]]:
    """The share of the change from `Select.base` that is plain, and what the base lacks.

    The share is one of squared changes within a tensor, since each tensor has its own scale. It is
    then averaged over the tensors that changed, weighted by their size.

    Args:
        source: the tensors before encryption.
        selection: the options. Without a base, the result is None and no tensors.
        rings: what is encrypted.
        rest: the release's rest; if sealed, nothing is plain.
        what: the checkpoint or tree, for messages.

    Raises:
        ValueError: nothing has changed.
    """
    if selection.base is None:
        return None, ()
    weights = plain = 0.0
    with ExitStack() as stack:
        base = Base(selection.base, source.tensors, stack)
        for name, info in source.tensors.items():
            if not is_counted(info):
                continue
            squares = np.square(base.change(name, info, source.read(name)).astype(np.float64))
            total, hidden = squares.sum(), 0.0
            if not total:
                continue
            for level, ring in rings.get(name, ()):
                groups = ring_groups(ring, level, what)
                places = unit_places(squares.shape, ring.mask_shape, groups, "weight")
                hidden += squares.reshape(-1, places.size)[places.runs].sum()
            weights += squares.size
            plain += squares.size * (1 - hidden / total)
    if not weights:
        raise ValueError(
            f"{what}: expected a network that was fine-tuned from the base, got the base itself: "
            "no weight has changed, so there is nothing to protect. Check the two files, or leave "
            "the base out."
        )
    return (float(plain / weights) if rest == "plain" else 0.0), tuple(base.lacking)


def sealed(rings: Iterable[Ring]) -> dict[str, list[tuple[int, SealedRing]]]:
    """The rings, with their masks packed."""
    found: dict[str, list[tuple[int, SealedRing]]] = {}

    def seal(ring: Ring) -> tuple[int, SealedRing]:
        return ring.level, seal_mask(ring.name, ring.mask)

    for level, ring in ahead(seal, rings, lambda ring: ring.mask.nbytes):
        found.setdefault(ring.tensor, []).append((level, ring))
    return found


# The last step of a name, such as dropout_rng, rng_key or seed0.
_KEYS = re.compile(r"(^|[/._])(p?rng|key|seed|secret)s?(_[^/._]*|\d*)$", re.IGNORECASE)
_WORDS = {"U32": (2, 4, 8), "U8": (16, 32)}  # lengths of keys


def random_keys(source: NamedTensors) -> tuple[str, ...]:
    """Names of tensors that are, or look like, random keys, which a release would give away."""
    known = getattr(source, "random_keys", {})

    def looks_like_some(name: str) -> bool:
        info = source.tensors[name]
        words = tuple(info.shape)[-1:]
        return bool(_KEYS.search(name)) and words in [(n,) for n in _WORDS.get(info.dtype, ())]

    return tuple(name for name in source.tensors if name in known or looks_like_some(name))


def check_alone(option: str, **others: object) -> None:
    """Refuses options that conflict with another one, which determines them.

    Args:
        option: the name of the option that determines them.
        others: their values; None for those that were not given.

    Raises:
        ValueError: one of them was given.
    """
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"{option}: expected no {name} with it, since {option} determines it, got both. "
                f"Leave out {name} or {option}."
            )


def check_like(like: AnyPath | None, old_signer: AnySigner | None, **others: object) -> None:
    """Refuses options that conflict with `like`, and without `like` the one that needs it.

    Raises:
        ValueError: there is such an option.
    """
    if like is not None:
        check_alone("like", **others)
    elif old_signer is not None:
        raise ValueError("old_signer: expected only with like, got no like. Leave it out.")


def check_rest(rest: object) -> None:
    """Checks the value of the option `rest`.

    Raises:
        ValueError: it is not a `Rest`.
    """
    if rest not in get_args(Rest):
        raise ValueError(f"rest: expected 'sealed' or 'plain', got {rest!r}.")
