"""Protected files: what they restore, who can open what, and that they are ordinary files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 - teaches NumPy bfloat16 and float8
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_same, octets

from selcrypt_jax import (
    Grant,
    GrantError,
    IntegrityError,
    LosslessCipher,
    PaperLevels,
    Protected,
    Secret,
    Select,
    SigningKey,
    VerifyKey,
    encrypt,
    importance,
    inspect_file,
    issue_grant,
    level_key,
    nested_masks,
    open_model,
    protect,
    protect_file,
    ring_keys,
    rotate_file,
    unlock,
    unlock_file,
    verify_file,
)
from selcrypt_jax._format.boxes import SealedRing
from selcrypt_jax._format.envelope import Envelope
from selcrypt_jax._format.rings import ring_groups, seal_mask
from selcrypt_jax._io.safetensors import SafetensorsFile, header
from selcrypt_jax._masks.levels import as_levels
from selcrypt_jax._masks.scores import guess_layout
from selcrypt_jax._masks.selection import merged_counts
from selcrypt_jax._release.size import check_header
from selcrypt_jax._tree.dtypes import SAFETENSORS

SECRET = Secret(bytes(range(32)))
SIGNING = SigningKey(bytes(32))
THREE = [0.1, 0.2, 0.3]

NUMBERS = [code for code, d in SAFETENSORS.items() if d.bits >= 8 and d.kind != "other"]
WHOLE = [code for code in NUMBERS if SAFETENSORS[code].kind == "integer"]


def mask_of(ring: SealedRing, level: int) -> np.ndarray:
    mask = np.zeros(ring.mask_shape, bool)
    mask.reshape(-1)[ring_groups(ring, level, "p")] = True
    return mask


def write(path: Path, tensors: dict[str, Any], metadata: Any = None) -> Path:
    """Tensors as arrays, or as (dtype code, shape, bytes) where NumPy has no such array."""
    codes = {dtype.name: code for code, dtype in SAFETENSORS.items()}
    parts = {
        name: t if isinstance(t, tuple) else (codes[str(t.dtype)], t.shape, t.tobytes())
        for name, t in tensors.items()
    }
    head = header([(name, code, shape) for name, (code, shape, _) in parts.items()], metadata)
    path.write_bytes(head + b"".join(data for _, _, data in parts.values()))
    return path


def read(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with SafetensorsFile(path) as file:
        return {n: (t.dtype, t.shape, bytes(file.read(n))) for n, t in file.tensors.items()}


def key_of(path: Path, level: int, levels: int = 3, secret: Secret = SECRET) -> Grant:
    model_id = bytes.fromhex(inspect_file(path).model_id)
    return Grant(level_key(secret, model_id, level=level, levels=levels), SIGNING.public)


def make(tmp_path: Path, tensors: dict[str, Any], metadata: Any = None, **options: Any):
    source = write(tmp_path / "model.safetensors", tensors, metadata)
    names = {field.name for field in dataclasses.fields(Select)} & options.keys()
    selection = Select(**{name: options.pop(name) for name in names})
    options = {"secret": SECRET, "signing": SIGNING, "levels": THREE, "rest": "plain", **options}
    protect_file(source, tmp_path / "public.safetensors", selection=selection, **options)
    return source, tmp_path / "public.safetensors"


def kernels(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "conv/kernel": rng.standard_normal((3, 3, 16, 32)).astype(np.float32),
        "conv/bias": rng.standard_normal(32).astype(np.float32),
        "dense/kernel": rng.standard_normal((64, 40)).astype(np.float16),
        "steps": np.array(7, np.int64),
    }


# --- what comes back ----------------------------------------------------------------------------


@pytest.mark.parametrize("code", NUMBERS)
@pytest.mark.parametrize("layout", ["HWIO", "OIHW"])
def test_every_dtype_comes_back_bit_for_bit(tmp_path, code, layout):
    dtype = SAFETENSORS[code]
    shape = (3, 3, 24, 40) if layout == "HWIO" else (40, 24, 3, 3)
    patterns = np.random.default_rng(0).integers(0, 256, (*shape, dtype.bits // 8), np.uint8)
    some = patterns.tobytes()[: 5 * dtype.bits // 8]
    tensors = {"w": (code, shape, patterns.tobytes()), "plain": (code, (5,), some)}
    source, public = make(
        tmp_path, tensors, {"format": "pt"}, layout=layout, select="w", importance="random"
    )
    unlock_file(public, tmp_path / "out.safetensors", key_of(public, 3))
    assert (tmp_path / "out.safetensors").read_bytes() == source.read_bytes()
    shipped = read(public)
    assert {n: t[:2] for n, t in shipped.items()} == {n: t[:2] for n, t in read(source).items()}
    assert shipped["w"][2] != tensors["w"][2]
    assert shipped["plain"] == read(source)["plain"]


def test_odd_tensors_pass_through(tmp_path):
    odd = {
        "empty": np.zeros((0, 3), np.float32),
        "empty kernel": np.zeros((0, 3, 3, 64), np.float32),
        "scalar": np.float32(2).reshape(()),
        "counter": np.array(2**53 + 1, np.int64),
        "wide": np.array([0.1, 1e-300]),
        "flags": np.array([True, False]),
        "complex": np.array([1 + 2j], np.complex64),
        "packed": ("F4", (2, 8), bytes(range(8))),
        "scales": ("F8_E8M0", (3, 4), bytes(range(12))),
        "é": np.ones(2, np.float32),
        "e\u0301": np.zeros(2, np.float32),
        'quote" and\nline': np.ones(1, np.float32),
        "": np.ones(3, np.int8),
    }
    source, public = make(tmp_path, {**kernels(), **odd}, layout="HWIO")
    assert all(read(public)[name] == read(source)[name] for name in odd)
    unlock_file(public, tmp_path / "out.safetensors", key_of(public, 3))
    assert (tmp_path / "out.safetensors").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "note": 'ü "x"\n'}])
def test_metadata_of_the_caller_stays_and_comes_back(tmp_path, metadata):
    source, public = make(tmp_path, kernels(), metadata, layout="HWIO")
    with SafetensorsFile(public) as file:
        assert metadata is None or metadata.items() <= file.metadata.items()
    unlock_file(public, tmp_path / "out.safetensors", key_of(public, 3))
    assert (tmp_path / "out.safetensors").read_bytes() == source.read_bytes()


def test_a_file_of_the_stock_library_comes_back_as_it_was(tmp_path):
    safetensors.numpy.save_file(kernels(), tmp_path / "stock.safetensors", {"format": "np"})
    protect_file(tmp_path / "stock.safetensors", tmp_path / "p", secret=SECRET, levels=THREE)
    unlock_file(tmp_path / "p", tmp_path / "out", Grant(key_of(tmp_path / "p", 3).key))
    assert (tmp_path / "out").read_bytes() == (tmp_path / "stock.safetensors").read_bytes()


# --- who gets what ------------------------------------------------------------------------------


def test_one_file_five_grants_five_results(tmp_path):
    source, public = make(tmp_path, kernels(), layout="HWIO", levels=[0.1, 0.2, 0.3, 0.4, 0.5])
    original = read(source)
    wrong = []
    for level in range(6):
        out = tmp_path / f"{level}.safetensors"
        if level:
            unlock_file(public, out, key_of(public, level, 5))
        else:
            out.write_bytes(public.read_bytes())
        got = read(out)
        wrong.append(
            sum(a != b for n in got for a, b in zip(got[n][2], original[n][2], strict=True))
        )
    assert wrong == sorted(wrong, reverse=True)
    assert len(set(wrong)) == 6
    assert wrong[-1] == 0


def test_the_ciphertext_is_that_of_encrypt(tmp_path):
    """The JAX engine, given the masks from the boxes."""
    source, public = make(tmp_path, kernels(), layout="HWIO")
    grant = key_of(public, 3)
    with SafetensorsFile(public) as file:
        rings = Envelope.from_metadata(file.metadata, "p").open(grant.key)
    original = safetensors.numpy.load_file(source)
    original.pop("steps")  # 64 bits
    masks = []
    for level in (1, 2, 3):
        mask: dict[str, Any] = dict.fromkeys(original, False)
        for name, found in rings.items():
            for m, ring in found:
                if m <= level:
                    mask[name] = mask[name] | mask_of(ring, m)
        masks.append(mask)
    expected = encrypt(original, masks, ring_keys(grant.key))
    shipped = safetensors.numpy.load_file(public)
    for name, leaf in original.items():
        assert octets(shipped[name]) == octets(expected[name]), name
        assert name not in rings or octets(shipped[name]) != octets(leaf)


def test_a_level_opens_no_box_above_it(tmp_path):
    _, public = make(tmp_path, kernels(), layout="HWIO")
    with SafetensorsFile(public) as file:
        envelope = Envelope.from_metadata(file.metadata, "public")
    for level in (1, 2):
        key = key_of(public, level).key
        assert {m for found in envelope.open(key).values() for m, _ in found} == set(
            range(1, level + 1)
        )
        with pytest.raises(ValueError, match=f"expected 1..{level}, got {level + 1}"):
            key.lower(level + 1)
        # The best that a holder of this key could try: to call it a key of the level above.
        forged = type(key)(bytes(key), level=level + 1, model_id=key.model_id)
        with pytest.raises(
            IntegrityError, match=f"box of level {level + 1}: does not open|box of level"
        ):
            envelope.open(forged)


def test_a_grant_of_another_model_is_refused_by_name(tmp_path):
    _, public = make(tmp_path, kernels(), layout="HWIO")
    old = key_of(public, 3)
    rotate_file(public, secret=SECRET, signing=SIGNING)
    new = inspect_file(public).model_id
    with pytest.raises(
        ValueError, match=f"is model {new}, but the grant is for model {old.key.model_id.hex()}"
    ):
        unlock_file(public, tmp_path / "out", old)
    assert not (tmp_path / "out").exists()


def test_a_wrong_secret_opens_nothing(tmp_path):
    _, public = make(tmp_path, kernels(), layout="HWIO")
    with pytest.raises(IntegrityError, match="box of level 1: does not open: the key is not"):
        unlock_file(public, tmp_path / "out", key_of(public, 3, secret=Secret.generate()))
    with pytest.raises(GrantError, match="does not open") as caught:
        rotate_file(public, secret=Secret.generate(), signing=SIGNING)
    assert caught.value.reason == "secret"


def test_rotate_changes_everything_but_the_model(tmp_path):
    source, public = make(tmp_path, kernels(), {"note": "x"}, layout="HWIO", small=0)
    before = read(public)
    rotate_file(public, tmp_path / "new", secret=SECRET, signing=SIGNING)
    after = read(tmp_path / "new")
    assert read(public) == before
    assert after["conv/kernel"][2] != before["conv/kernel"][2]
    assert after["conv/bias"] == before["conv/bias"]
    assert inspect_file(tmp_path / "new").levels == inspect_file(public).levels
    unlock_file(tmp_path / "new", tmp_path / "out", key_of(tmp_path / "new", 3))
    assert (tmp_path / "out").read_bytes() == source.read_bytes()
    with pytest.raises(ValueError, match=r"is signed by .* expected a signing key"):
        rotate_file(public, secret=SECRET)
    assert read(public) == before


# --- an ordinary file ---------------------------------------------------------------------------


def test_stock_readers_open_it(tmp_path):
    source, public = make(tmp_path, kernels(), {"format": "np"}, layout="HWIO")
    stock = safetensors.numpy.load_file(public)
    for name, leaf in safetensors.numpy.load_file(source).items():
        assert (stock[name].shape, stock[name].dtype) == (leaf.shape, leaf.dtype)
    with safetensors.safe_open(public, framework="flax") as file:
        assert file.get_tensor("conv/kernel").shape == (3, 3, 16, 32)
        assert file.metadata()["format"] == "np"


def test_verify_and_inspect_tell_what_there_is(tmp_path):
    group = LosslessCipher(unit="group")
    source, public = make(tmp_path, kernels(), layout="HWIO", cipher=group, small=0)
    found = verify_file(public, signer=SIGNING.public)
    assert found == inspect_file(public)
    assert found.signer == SIGNING.public.hex()
    assert found.cipher == LosslessCipher(unit="group")
    assert found.tensors == 4
    assert found.weights == sum(np.size(leaf) for leaf in kernels().values())
    assert found.file_bytes == public.stat().st_size
    assert found.file_bytes - source.stat().st_size == pytest.approx(found.manifest_bytes, rel=0.1)
    # 30 % of 512 kernels and of 2560 weights
    assert [level.groups for level in found.levels] == [51 + 256, 51 + 256, 51 + 256]
    assert found.levels[2].share == pytest.approx((153 * 9 + 768) / found.weights)
    opened = inspect_file(public, key_of(public, 2))
    assert [level.opens for level in opened.levels] == [True, True, False]
    assert verify_file(public, grant=key_of(public, 2)) == opened
    with pytest.raises(IntegrityError, match="expected a file signed by 0000"):
        verify_file(public, signer=VerifyKey(bytes(32)))


def test_an_unsigned_file_is_verified_with_a_grant_only(tmp_path):
    _, public = make(tmp_path, kernels(), layout="HWIO", signing=None)
    grant = Grant(key_of(public, 1).key)
    with pytest.raises(ValueError, match="is not signed, so anyone who altered it"):
        verify_file(public)
    assert verify_file(public, grant=grant).signer is None
    with pytest.raises(IntegrityError, match="got one without a signature"):
        verify_file(public, grant=key_of(public, 1))


# --- checkpoints in several files ---------------------------------------------------------------


def sharded(folder: Path, metadata: Any = None) -> dict[str, bytes]:
    folder.mkdir()
    parts = [kernels(0), {f"second/{n}": leaf for n, leaf in kernels(1).items()}]
    weight_map = {}
    for number, tensors in enumerate(parts, 1):
        name = f"model-{number:05}-of-00002.safetensors"
        write(folder / name, tensors, metadata)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("scope", ["leaf", "model"])
def test_a_checkpoint_in_several_files(tmp_path, scope):
    before = sharded(tmp_path / "model", {"format": "np"})
    public = tmp_path / "public"
    protect_file(
        tmp_path / "model",
        public,
        secret=SECRET,
        levels=THREE,
        selection=Select(layout="HWIO", scope=scope),
        signing=SIGNING,
    )
    assert {path.name for path in public.iterdir()} == set(before)
    found = verify_file(public, signer=SIGNING.public)
    assert (found.files, found.tensors) == (2, 8)
    grant = key_of(public / "model.safetensors.index.json", 3)
    unlock_file(public, tmp_path / "out", grant)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    # one shard alone is a protected file too
    one = "model-00002-of-00002.safetensors"
    unlock_file(public / one, tmp_path / one, grant)
    assert (tmp_path / one).read_bytes() == before[one]
    rotate_file(public, tmp_path / "rotated", secret=SECRET, signing=SIGNING)
    unlock_file(tmp_path / "rotated", tmp_path / "again", key_of(tmp_path / "rotated", 3))
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before
    with pytest.raises(ValueError, match="checkpoint in a folder, expected a new folder"):
        rotate_file(public, secret=SECRET, signing=SIGNING)
    with pytest.raises(ValueError, match="is file 2 of 2 of a checkpoint, expected all of them"):
        rotate_file(public / one, secret=SECRET, signing=SIGNING)

    # a shard of another protection, and shards under each other's names
    (public / one).write_bytes((tmp_path / "rotated" / one).read_bytes())
    with pytest.raises(
        IntegrityError, match=r"shards of one protection, but .* differ in model_id"
    ):
        verify_file(public)


def test_shards_cannot_be_left_out(tmp_path):
    sharded(tmp_path / "model")
    public = tmp_path / "public"
    protect_file(
        tmp_path / "model",
        public,
        secret=SECRET,
        levels=THREE,
        selection=Select(layout="HWIO"),
        signing=SIGNING,
    )
    index = public / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {n: f for n, f in content["weight_map"].items() if "00001" in f}
    index.write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match=r"expected shard \(1, 1\), got \(1, 2\)"):
        verify_file(public)


# --- Orbax --------------------------------------------------------------------------------------


def test_an_orbax_checkpoint(tmp_path):
    import orbax.checkpoint as ocp

    params = {
        "conv": {"kernel": jnp.asarray(kernels()["conv/kernel"], jnp.bfloat16)},
        "layers": [jnp.asarray(kernels()["dense/kernel"]), np.arange(3.0)],
        "steps": 7,
        "nothing": None,
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", params)
    protect_file(
        tmp_path / "model",
        tmp_path / "public",
        secret=SECRET,
        levels=THREE,
        selection=Select(layout="HWIO"),
        signing=SIGNING,
    )
    assert verify_file(tmp_path / "public", signer=SIGNING.public).tensors == 4
    with ocp.PyTreeCheckpointer() as checkpointer:
        shipped = checkpointer.restore(tmp_path / "public")
    assert octets(shipped["conv"]["kernel"]) != octets(params["conv"]["kernel"])
    for level in (2, 3):
        unlock_file(tmp_path / "public", tmp_path / f"{level}", key_of(tmp_path / "public", level))
    with ocp.StandardCheckpointer() as checkpointer:
        lower = checkpointer.restore(tmp_path / "2", params)
        assert octets(lower["conv"]["kernel"]) != octets(params["conv"]["kernel"])
        assert_same(checkpointer.restore(tmp_path / "3", params), params)
    assert not (tmp_path / "3" / "selcrypt.json").exists()
    rotate_file(tmp_path / "public", tmp_path / "new", secret=SECRET, signing=SIGNING)
    unlock_file(tmp_path / "new", tmp_path / "4", key_of(tmp_path / "new", 3))
    with ocp.StandardCheckpointer() as checkpointer:
        assert_same(checkpointer.restore(tmp_path / "4", params), params)

    with pytest.raises(FileExistsError, match="the output already exists"):
        unlock_file(tmp_path / "public", tmp_path / "4", key_of(tmp_path / "public", 3))
    with pytest.raises(ValueError, match="is already a protected file"):
        protect_file(tmp_path / "public", tmp_path / "5", secret=SECRET, levels=THREE)
    (tmp_path / "outer").mkdir()
    (tmp_path / "model").rename(tmp_path / "outer" / "default")
    with pytest.raises(ValueError, match=r"folder of \['default'\]\. Name one of them"):
        verify_file(tmp_path / "outer")
    with ocp.PyTreeCheckpointer() as checkpointer:
        changed = jax.tree.map(lambda leaf: -leaf, shipped)
        checkpointer.save(tmp_path / "changed", changed)
    text = (tmp_path / "public" / "selcrypt.json").read_bytes()
    (tmp_path / "changed" / "selcrypt.json").write_bytes(text)
    with pytest.raises(IntegrityError, match="expected SHA-256"):
        verify_file(tmp_path / "changed")


# --- trees in memory ----------------------------------------------------------------------------


def tree() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "conv": {"kernel": jnp.asarray(rng.standard_normal((3, 3, 16, 32)), jnp.bfloat16)},
        "dense": [rng.standard_normal((64, 40)).astype(np.float32), jnp.zeros(40)],
        "activation": jax.nn.relu,
    }


@pytest.mark.parametrize("form", ["masks", "scores"])
def test_a_tree_goes_there_and_back_without_a_disk(form):
    params = tree()
    scores = importance.l2(params)
    given: dict[str, Any] = {"masks": nested_masks(scores, THREE)}
    if form == "scores":
        given = {"levels": THREE, "selection": Select(scores, small=0)}
    protected = protect(
        params, **given, secret=SECRET, signing=SIGNING, rest="plain", metadata={"a": "b"}
    )
    assert jax.tree.structure(protected.params) == jax.tree.structure(params)
    assert protected.params["dense"][1] is params["dense"][1]
    assert isinstance(protected.params["dense"][0], np.ndarray)
    assert isinstance(protected.params["conv"]["kernel"], jax.Array)
    assert octets(protected.params["conv"]["kernel"]) != octets(params["conv"]["kernel"])
    envelope = Envelope.from_metadata(protected.metadata, "params")
    keys = [
        level_key(SECRET, envelope.manifest.model_id, level=level, levels=3) for level in (1, 2, 3)
    ]
    assert_same(unlock(protected, keys[2]), params)
    lower = [unlock(protected, Grant(key, SIGNING.public)) for key in keys]
    assert len({octets(p["conv"]["kernel"]) for p in lower}) == 3
    if form == "masks":
        model = protected.params
        expected = encrypt(params, given["masks"], ring_keys(keys[2]))
        assert octets(model["conv"]["kernel"]) == octets(expected["conv"]["kernel"])
    changed = Protected(
        {**protected.params, "dense": [protected.params["dense"][0], jnp.ones(40)]},
        protected.metadata,
    )
    with pytest.raises(IntegrityError, match="tensor 'dense/1': expected SHA-256"):
        unlock(changed, keys[2])


@pytest.mark.parametrize(
    ("params", "layout"),
    [
        (nnx.state(nnx.Conv(16, 32, (3, 3), rngs=nnx.Rngs(0))), "HWIO"),
        (eqx.nn.MLP(16, 8, 64, 2, key=jax.random.key(0)), "OIHW"),
    ],
    ids=["nnx", "equinox"],
)
def test_any_tree_can_be_saved(tmp_path, params, layout):
    scores = importance.l2(params, layout=layout)
    protected = protect(
        params,
        secret=SECRET,
        levels=THREE,
        selection=Select(importance=scores, small=0),
        signing=SIGNING,
    )
    protected.save(tmp_path / "model.safetensors")
    assert verify_file(tmp_path / "model.safetensors", signer=SIGNING.public).tensors == len(
        [leaf for leaf in jax.tree.leaves(params) if eqx.is_array(leaf)]
    )
    assert_same(unlock(protected, key_of(tmp_path / "model.safetensors", 3)), params)


def test_wide_leaves_need_no_x64():
    params = {"w": np.random.default_rng(0).standard_normal((64, 64))}
    protected = protect(params, ({"w": True},), secret=SECRET)
    assert protected.params["w"].dtype == np.float64
    model_id = Envelope.from_metadata(protected.metadata, "").manifest.model_id
    assert_same(unlock(protected, level_key(SECRET, model_id, level=1, levels=1)), params)


# --- which groups -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "weights", "expected"),
    [
        ([3, 6, 9, 12, 15], 9, [0, 6, 6, 6, 15]),  # 27 weights have 93 bits of order, 54 have 237
        ([6, 12, 18], 9, [6, 12, 18]),
        ([1, 2, 3], 9, [0, 0, 3]),  # too little altogether: for the cipher to judge
        ([0, 0, 40], 1, [0, 0, 40]),
        ([40, 41, 80], 1, [40, 40, 80]),
        ([40, 80, 81], 1, [40, 40, 81]),
        ([40, 40, 80], 1, [40, 40, 80]),
        ([0, 0, 0], 9, [0, 0, 0]),
    ],
)
def test_small_rings_are_merged_upwards(counts, weights, expected):
    assert merged_counts(counts, weights, LosslessCipher()) == expected
    assert merged_counts(counts, weights, LosslessCipher(permute=False)) == counts


def test_kernels_are_told_from_layout():
    class Info:
        def __init__(self, *shape: int):
            self.shape = shape

    torch = {"a": Info(64, 3, 3, 3), "b": Info(128, 64, 3, 3), "c": Info(10, 512)}
    flax = {"a": Info(3, 3, 3, 64), "b": Info(3, 3, 64, 128), "c": Info(512, 10)}
    assert guess_layout(torch, list(torch), {}, "kernel") == "OIHW"
    assert guess_layout(flax, list(flax), {}, "kernel") == "HWIO"
    assert guess_layout({"c": Info(512, 10)}, ["c"], {}, "kernel") == "HWIO"
    assert guess_layout({"c": Info(512, 10)}, ["c"], {"format": "pt"}, "kernel") == "OIHW"
    assert guess_layout({"a": Info(3, 3, 3, 3)}, ["a"], {"format": "pt"}, "kernel") == "OIHW"
    assert guess_layout({"c": Info(512, 10)}, ["c"], {}, "weight") == "HWIO"
    with pytest.raises(ValueError, match="layout: cannot tell"):
        guess_layout({"c": Info(512, 10)}, ["c"], {}, "filter")
    with pytest.raises(ValueError, match="layout: cannot tell"):
        guess_layout({"a": Info(3, 3, 3, 3)}, ["a"], {}, "kernel")
    with pytest.raises(ValueError, match="'b' looks like HWIO"):
        guess_layout({"a": Info(64, 3, 3, 3), "b": Info(3, 3, 64, 128)}, ["a", "b"], {}, "kernel")


def test_given_scores_decide(tmp_path):
    source = write(tmp_path / "m", kernels())
    scores = np.zeros((1, 1, 16, 32), np.float32)
    scores[..., :8] = 1
    write(tmp_path / "scores", {"conv/kernel": scores})
    protect_file(
        source,
        tmp_path / "p",
        secret=SECRET,
        levels=[0.25],
        selection=Select(importance=tmp_path / "scores"),
        rest="plain",
    )
    changed = np.frombuffer(read(tmp_path / "p")["conv/kernel"][2], np.float32).reshape(
        3, 3, 16, 32
    )
    assert (changed[..., 8:] == kernels()["conv/kernel"][..., 8:]).all()
    assert (changed[..., :8] != kernels()["conv/kernel"][..., :8]).mean() > 0.99
    assert read(tmp_path / "p")["dense/kernel"] == read(source)["dense/kernel"]


def test_given_scores_can_be_selected_from(tmp_path):
    source = write(tmp_path / "m", kernels())
    scores = {"conv/kernel": np.ones((1, 1, 16, 32)), "dense/kernel": np.ones((64, 40))}
    write(tmp_path / "scores", scores)
    chosen = protect_file(
        source,
        tmp_path / "p",
        secret=SECRET,
        levels=[0.5],
        selection=Select(importance=tmp_path / "scores", select="conv", small=0),
    )
    assert chosen.groups == {"conv/kernel": 256}
    assert chosen.layout is None
    assert chosen.model_id.hex() == inspect_file(tmp_path / "p").model_id


@pytest.mark.parametrize("scope", ["leaf", "model"])
def test_the_selection_is_that_of_nested_masks(tmp_path, scope):
    """With ties among the scores, in leaves of several sizes."""
    rng = np.random.default_rng(0)
    tensors = {f"w{n}": rng.standard_normal((50, n)).astype(np.float32) for n in (20, 8, 90)}
    scores = {n: rng.integers(0, 9, leaf.shape).astype(np.float32) for n, leaf in tensors.items()}
    source = write(tmp_path / "m", tensors)
    write(tmp_path / "s", scores)
    protect_file(
        source,
        tmp_path / "p",
        secret=SECRET,
        levels=THREE,
        selection=Select(importance=tmp_path / "s", scope=scope),
        rest="plain",
    )
    key = level_key(SECRET, bytes.fromhex(inspect_file(tmp_path / "p").model_id), level=3, levels=3)
    expected = nested_masks(scores, THREE, scope=scope)
    with SafetensorsFile(tmp_path / "p") as file:
        rings = Envelope.from_metadata(file.metadata, "p").open(key)
    for name in tensors:
        below = np.zeros_like(expected[0][name])
        for level, ring in rings[name]:
            below = below | mask_of(ring, level)
            assert (below == expected[level - 1][name]).all(), (name, level)


def test_positions_that_need_too_much_room_are_refused_before_the_work():
    shapes = [(10_000, 10_000)] * 12
    fifths = as_levels([0.016, 0.032, 0.048, 0.064, 0.08])
    with pytest.raises(ValueError, match=r"at most 100 MB, .* 118.4 MB positions .*larger groups"):
        check_header({}, shapes, fifths, "model.safetensors")
    check_header({}, shapes, as_levels([0.01]), "model.safetensors")


def test_levels_of_the_paper(tmp_path):
    _, public = make(
        tmp_path, kernels(), layout="HWIO", levels=PaperLevels(0.3, levels=5), signing=None
    )
    assert len(inspect_file(public).levels) == 5


# --- bad input ----------------------------------------------------------------------------------

BAD = {
    "select nothing": ({"select": "nope"}, "matches no leaf. There are: 'conv/bias', 'conv/k"),
    "select a bool": ({"select": "flag"}, "'flag': expected an array of floats or integers"),
    "budget selects nothing": (
        {"levels": [1e-6]}, "level 1 adds no groups to those below it, expected at least one"),
    "too small to hide in": ({"levels": [0.002]}, "tensor 'dense/kernel', level 1: too small"),
    "a level too many": ({"levels": [0.1, 0.1]}, "level 2 adds no groups"),
    "share above 1": ({"levels": [1.5]}, "expected a share of the groups"),
    "packed": ({"select": "packed"}, "dtype of 8 bits or more, got float4_e2m1fn"),
    "importance": ({"importance": "fisher", "layout": None}, "importance: expected l2, random"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_choices_are_refused(tmp_path, options, message):
    tensors = {**kernels(), "flag": np.ones((8, 8), bool), "packed": ("F4", (64, 64), bytes(2048))}
    with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
        make(tmp_path, tensors, **{"layout": "HWIO", **options})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_twice_is_refused(tmp_path):
    _, public = make(tmp_path, kernels(), layout="HWIO")
    with pytest.raises(ValueError, match=r"is already a protected file.*rotate"):
        protect_file(public, tmp_path / "x", secret=SECRET, levels=THREE)
    write(tmp_path / "clash", kernels(), {"selcrypt.x": "mine"})
    with pytest.raises(ValueError, match=r"metadata: .'selcrypt\.x'. are names"):
        protect_file(tmp_path / "clash", tmp_path / "x", secret=SECRET, levels=THREE)
    with pytest.raises(ValueError, match="is not a protected file"):
        verify_file(write(tmp_path / "plain", kernels()))


def test_bad_scores_are_refused(tmp_path):
    source = write(tmp_path / "m", kernels())
    for scores, message in [
        ({"nope": np.ones(3, np.float32)}, "expected scores for tensors of the checkpoint"),
        ({"conv/kernel": np.ones((16, 32), np.float32)}, "expected scores that broadcast"),
        ({"conv/kernel": np.full((1, 1, 16, 32), np.nan, np.float32)}, "got NaN in 512 of 512"),
        ({"conv/kernel": np.ones((1, 1, 16, 32), bool)}, "got BOOL. Save scores, not masks"),
    ]:
        write(tmp_path / "scores", scores)
        with pytest.raises((ValueError, TypeError), match=message):
            protect_file(
                source,
                tmp_path / "p",
                secret=SECRET,
                levels=[0.25],
                selection=Select(importance=tmp_path / "scores"),
            )


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jnp.zeros((9, 9), jnp.int4), "params 'w': expected .* one of .*, got int4"),
        (np.zeros(3, "complex128"), "got complex128"),
    ],
)
def test_leaves_that_a_file_cannot_hold_are_refused(leaf, message):
    with pytest.raises(ValueError, match=message):
        protect({"w": leaf, "v": jnp.ones((40, 40))}, ({"w": False, "v": True},), secret=SECRET)


def test_arguments_of_another_type_are_named(tmp_path):
    _, public = make(tmp_path, kernels(), layout="HWIO")
    with pytest.raises(TypeError, match=r"grant: expected a Grant, .* got Secret"):
        open_model(public, SECRET)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="level: expected none without a grant, got 2"):
        open_model(public, level=2)
    with pytest.raises(TypeError, match=r"signer: expected a VerifyKey or the path .* got bytes"):
        verify_file(public, signer=b"x")
    with pytest.raises(FileNotFoundError, match="nothing"):
        verify_file(public, signer="nothing")
    with pytest.raises(TypeError, match="metadata: expected a mapping from str to str"):
        protect({"v": jnp.ones((40, 40))}, (True,), secret=SECRET, metadata={"step": 3})
    with pytest.raises(TypeError, match="params: 'v': expected a concrete array, got a tracer"):
        jax.jit(lambda v: protect({"v": v}, (True,), secret=SECRET).params)(jnp.ones((40, 40)))
    with pytest.raises(TypeError, match=r"scores '0/v': expected an array of numbers"):
        protect(
            {"v": jnp.ones(99)},
            secret=SECRET,
            levels=[0.5],
            selection=Select(importance=[{"v": np.True_}], small=0),
        )


def test_the_path_of_a_key_file_does(tmp_path):
    source, public = make(tmp_path, kernels(), layout="HWIO")
    grant = issue_grant(public, level=3, secret=SECRET, signer=SIGNING.public)
    grant.write(tmp_path / "g")
    SIGNING.public.write(tmp_path / "pub")
    unlock_file(public, tmp_path / "out", tmp_path / "g")
    assert (tmp_path / "out").read_bytes() == source.read_bytes()
    assert verify_file(public, signer=tmp_path / "pub", grant=tmp_path / "g").levels[2].opens
    arrays = open_model(public, tmp_path / "g", level=1)
    assert octets(arrays["conv/bias"]) == kernels()["conv/bias"].tobytes()


@pytest.mark.parametrize("kind", ["numpy", "jax", "abstract"])
def test_a_model_opens_into_a_tree(tmp_path, kind):
    like: Any = {"conv": {"kernel": np.zeros((3, 3, 16, 32), np.float32)}, "name": "x"}
    like["layers"] = [np.zeros((64, 40), "bfloat16")]
    values = {
        "conv/kernel": kernels()["conv/kernel"],
        "layers/0": kernels()["dense/kernel"].astype("bfloat16"),
    }
    _, public = make(tmp_path, values, layout="HWIO")
    convert = {
        "numpy": np.asarray,
        "jax": jnp.asarray,
        "abstract": lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    }[kind]
    like = jax.tree.map(lambda x: x if isinstance(x, str) else convert(x), like)
    opened = open_model(public, key_of(public, 3), like=like)
    assert opened["name"] == "x"
    assert octets(opened["conv"]["kernel"]) == octets(values["conv/kernel"])
    assert octets(opened["layers"][0]) == octets(values["layers/0"])
    assert isinstance(opened["conv"]["kernel"], np.ndarray if kind == "numpy" else jax.Array)
    with pytest.raises(ValueError, match="a tree that lacks 'layers/0' and also has 'other'"):
        open_model(public, like={"conv": like["conv"], "other": np.zeros(2)})
    like["layers"] = [np.zeros((64, 40), np.float32)]
    with pytest.raises(ValueError, match=r"'layers/0': expected BF16\[64, 40\].*got F32"):
        open_model(public, like=like)


def test_nothing_selected_is_refused():
    with pytest.raises(ValueError, match="expected masks that select something"):
        protect({"v": jnp.ones((40, 40))}, (False,), secret=SECRET)


def test_a_newer_version_says_so(tmp_path):
    _, public = make(tmp_path, kernels(), layout="HWIO")
    with SafetensorsFile(public) as file:
        metadata = {**file.metadata}
    metadata["selcrypt"] = metadata["selcrypt"].replace("selcrypt-v1", "selcrypt-v2")
    with pytest.raises(ValueError, match=r"got selcrypt-v2\. .*update selcrypt-jax"):
        Envelope.from_metadata(metadata, "f")


@pytest.mark.parametrize("share", [0, 1, 2, 7, 50, 100])
def test_positions_are_bounded(share):
    mask = np.random.default_rng(0).random((100, 1000)) < share / 100
    mask[50, :] = False
    mask[99, 999] = True
    ring = seal_mask("w", mask)
    assert (mask_of(ring, 1) == mask).all()
    bomb = ring._replace(mask_shape=(2, 2), groups=4)
    with pytest.raises(IntegrityError, match="expected the positions of 4 groups out of 4"):
        ring_groups(bomb, 1, "f")


@given(st.integers(1, 3000), st.sampled_from([1e-3, 0.01, 0.2, 0.9]), st.integers(0, 99))
def test_positions_come_back(size, share, seed):
    mask = np.random.default_rng(seed).random(size) < share
    mask[seed % size] = True
    assert (mask_of(seal_mask("w", mask), 1) == mask).all()


def test_positions_take_less_than_a_byte_each():
    rng = np.random.default_rng(0)
    for share in (0.01, 0.016, 0.08):
        ring = seal_mask("w", rng.random(1 << 20) < share)
        # No code can do better than this, which is 1.01 bytes each at 1 %.
        least = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
        assert len(ring.positions) < 1.02 * least / 8 * (1 << 20), share
        assert len(ring.positions) < 1.02 * ring.groups


# --- small tensors ------------------------------------------------------------------------------


def test_small_tensors_are_encrypted_whole(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "first.weight": rng.standard_normal((8, 1, 3, 3)),
        "norm.weight": rng.standard_normal(64),
        "norm.bias": rng.standard_normal(64),
        "tiny": rng.standard_normal(5),
        "body.weight": rng.standard_normal((64, 64, 3, 3)),
    }
    tensors = {name: leaf.astype(np.float32) for name, leaf in tensors.items()}
    tensors["steps"] = np.arange(3)
    source, public = tmp_path / "model.safetensors", tmp_path / "public.safetensors"
    safetensors.numpy.save_file(tensors, source, {"format": "pt"})
    chosen = protect_file(
        source,
        public,
        secret=SECRET,
        levels=THREE,
        rest="plain",
        signing=SIGNING,
    )
    assert chosen.groups.keys() == {"first.weight", "norm.weight", "norm.bias", "body.weight"}
    file = safetensors.numpy.load_file(public)
    for name in ("first.weight", "norm.weight", "norm.bias"):
        assert (file[name] != tensors[name]).mean() > 0.9
    for name in ("tiny", "steps"):
        np.testing.assert_array_equal(file[name], tensors[name])
    opened = open_model(public, key_of(public, 1))
    for name in tensors:
        same = name != "body.weight"
        assert np.array_equal(opened[name], tensors[name]) == same
    top = open_model(public, key_of(public, 3))
    for name in tensors:
        np.testing.assert_array_equal(top[name], tensors[name])

    protect_file(
        source,
        tmp_path / "2",
        secret=SECRET,
        levels=THREE,
        selection=Select(select="body", small=0),
        rest="plain",
    )
    np.testing.assert_array_equal(
        safetensors.numpy.load_file(tmp_path / "2")["norm.bias"], tensors["norm.bias"]
    )
    chosen = protect_file(
        source,
        tmp_path / "3",
        rest="plain",
        secret=SECRET,
        levels=THREE,
        selection=Select(select="body|bias"),
    )
    assert chosen.groups.keys() == {"norm.bias", "body.weight"}
    with pytest.raises(ValueError, match=r"small: expected a share of all weights in \[0, 1\]"):
        protect_file(
            source,
            tmp_path / "4",
            rest="plain",
            secret=SECRET,
            levels=THREE,
            selection=Select(small=2),
        )
    assert not (tmp_path / "4").exists()


# --- what bit users -------------------------------------------------------------------------------


def test_a_tensor_that_is_small_is_not_too_small(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "body.weight": rng.standard_normal((128, 128), np.float32),
        "head.weight": rng.standard_normal((1, 64), np.float32),  # 8 % of it hide nothing
    }
    path = write(tmp_path / "m", tensors, {"format": "pt"})
    chosen = protect_file(path, tmp_path / "p", secret=SECRET, levels=[0.08])
    assert chosen.groups == {"body.weight": 1310, "head.weight": 64}
    with pytest.raises(ValueError, match=r"head\.weight.*too small to hide in"):
        protect_file(path, tmp_path / "q", secret=SECRET, levels=[0.08], selection=Select(small=0))


def test_pytorch_says_the_layout_itself(tmp_path):
    # A class token looks like a kernel whose spatial axes come first.
    tensors = {"cls_token": np.ones((1, 1, 64), np.float32)}
    tensors["fc.weight"] = np.random.default_rng(0).standard_normal((64, 32), np.float32)
    path = write(tmp_path / "m", tensors, {"format": "pt"})
    chosen = protect_file(
        path, tmp_path / "p", secret=SECRET, levels=[0.5], selection=Select(granularity="filter")
    )
    assert chosen.layout == "OIHW"


@pytest.mark.usefixtures("same_draws")
@pytest.mark.parametrize("select", [None, "embed"])
def test_copies_have_the_same_selection(tmp_path, select):
    # What is encrypted in one copy and plain in the other would be plain.
    rng = np.random.default_rng(0)
    tied = rng.standard_normal((64, 32), np.float32)
    other = np.concatenate([tied[:1], rng.standard_normal((63, 32), np.float32)])
    tensors = {"embed": tied, "head": tied.copy(), "other": other}  # one that starts alike
    path = write(tmp_path / "m", tensors)
    protect_file(
        path,
        tmp_path / "p",
        secret=SECRET,
        levels=[0.04, 0.08],
        selection=Select(layout="OIHW", select=select, small=0, importance="random"),
        rest="plain",
    )
    public = safetensors.numpy.load_file(tmp_path / "p")
    hidden = {name: public[name] != tensor for name, tensor in tensors.items()}
    assert hidden["embed"].sum() == round(0.08 * 64 * 32 - 0.5)
    assert (hidden["embed"] == hidden["head"]).all()
    assert (hidden["embed"] != hidden["other"]).any()
    assert octets(public["embed"]) != octets(public["head"])  # each under its own keys
    grant = issue_grant(tmp_path / "p", level=2, secret=SECRET, signer="unsigned")
    assert_same(open_model(tmp_path / "p", grant), tensors)


def test_true_stands_for_all_arrays_of_a_tree():
    params = {"w": np.random.default_rng(0).standard_normal((32, 32)), "act": np.tanh}
    params["w"] = params["w"].astype(np.float32)
    released = protect(params, (True,), secret=SECRET)
    assert released.params["act"] is np.tanh
    key = level_key(SECRET, released.model_id, level=1, levels=1)
    assert octets(unlock(released, key)["w"]) == octets(params["w"])


def test_a_state_has_its_names_in_orbax(tmp_path):
    model = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    released = protect(state, nested_masks(importance.l2(state), [0.5]), secret=SECRET)
    released.save_orbax(tmp_path / "ours")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", state)
    protect_file(tmp_path / "plain", tmp_path / "theirs", secret=SECRET, levels=[0.5])
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        grant = issue_grant(path, level=1, secret=SECRET, signer="unsigned")
        assert set(open_model(path, grant)) == {"bias", "kernel"}
        for opened in (
            open_model(path, grant, like=state),
            unlock(Protected.load_orbax(path, state), grant),
        ):
            assert octets(opened["kernel"].get_value()) == octets(model.kernel.get_value())
    with pytest.raises(ValueError, match=r"expected a tree with 'bias', 'kernel', got one with"):
        Protected.load_orbax(tmp_path / "ours", {"kernel": state["kernel"].get_value()})


@pytest.mark.parametrize(("name", "entry"), [("a\ud800", "b"), ("a", "b\udfff")])
def test_what_no_file_can_hold_is_refused_before_the_work(name, entry):
    params = {name: np.ones((64, 64), np.float32)}
    with pytest.raises(ValueError, match=r"lone surrogate in '[ab]\\ud[8f]"):
        protect(params, secret=Secret.generate(), levels=1, metadata={"note": entry})
