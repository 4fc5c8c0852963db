"""One owner's protected files, signed and unsigned, for tests that alter them."""

import os
import random

import pytest
from protected_files import KINDS, SECRET, SIGNING, World, checkpoint, protected, released

from selcrypt_jax import rotate_file


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, World]:
    worlds = {}
    with pytest.MonkeyPatch.context() as patch:
        # The same ids and nonces in every run, so that a seed of the fuzzer means something.
        patch.setattr(os, "urandom", random.Random(0).randbytes)
        for kind in KINDS:
            signing = SIGNING if kind == "signed" else None
            folder = tmp_path_factory.mktemp(kind)
            plain = checkpoint(0)
            model, again, other = (
                released(protected(folder, parts, signing), signing)
                for parts in (plain, plain, checkpoint(1))
            )
            (folder / "model").write_bytes(model.parts.to_bytes())
            rotate_file(folder / "model", secret=SECRET, signing=signing)
            rotated = released(folder / "model", signing)
            worlds[kind] = World(kind, plain, model, again, other, rotated)
    return worlds


@pytest.fixture(params=KINDS)
def world(request, files, tmp_path) -> World:
    world = files[request.param]
    world.folder = tmp_path
    return world
