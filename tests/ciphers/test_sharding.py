"""Leaves on several devices: the same bits as on one, and no device holds a whole leaf."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from strategies import octets, payload, two_rings

from selcrypt_jax import LosslessCipher, Secret, decrypt, encrypt, level_key, ring_keys

KEYS = ring_keys(level_key(Secret(bytes(range(32))), bytes(16), levels=2))
CIPHERS = {
    "weight": LosslessCipher(),
    "group": LosslessCipher(unit="group"),
    "stream": LosslessCipher(permute=False),
    "stream, group": LosslessCipher(permute=False, unit="group"),
}
PARAMS = {
    "conv": payload(0, (3, 3, 16, 32), "float32"),
    "dense": payload(1, (64, 48), "bfloat16"),
    "bytes": payload(2, (24, 16), "int8"),
    "vector": payload(3, (1024,), "float32"),
    "whole": payload(4, (30, 7), "float32"),
}
SHAPES = {"conv": (1, 1, 16, 32), "dense": (64, 48), "bytes": (24, 16), "vector": (1024,)}
MASKS = tuple(
    {**{n: rings[level] for n, rings in found.items()}, "whole": np.full((30, 7), level == 1)}
    for found in [{n: two_rings(i, shape) for i, (n, shape) in enumerate(SHAPES.items())}]
    for level in range(2)
)
SPECS = {
    "conv": P(None, None, "a", "b"),
    "dense": P("b", "a"),
    "bytes": P(None, ("a", "b")),
    "vector": P(("b", "a")),
    "whole": P(),
}
MESHES = {"8": (8, 1), "4 × 2": (4, 2), "2 × 4": (2, 4)}


def spread(mesh_shape, kind):
    mesh = jax.make_mesh(mesh_shape, ("a", "b"), axis_types=(kind,) * 2)
    return {n: jax.device_put(leaf, NamedSharding(mesh, SPECS[n])) for n, leaf in PARAMS.items()}


def assert_like(actual, expected, placed):
    for name, leaf in expected.items():
        assert octets(actual[name]) == octets(leaf), name
        assert actual[name].sharding.is_equivalent_to(placed[name].sharding, leaf.ndim), name


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("cipher", CIPHERS)
def test_the_bits_of_one_device(cipher, mesh, kind):
    cipher = CIPHERS[cipher]
    expected = encrypt(PARAMS, MASKS, KEYS, cipher=cipher)
    given = spread(MESHES[mesh], kind)
    protected = encrypt(given, MASKS, KEYS, cipher=cipher)
    assert_like(protected, expected, given)
    lower = decrypt(protected, MASKS[:1], KEYS[:1], cipher=cipher)
    assert_like(lower, decrypt(expected, MASKS[:1], KEYS[:1], cipher=cipher), given)
    opened = decrypt(protected, MASKS, KEYS, cipher=cipher, donate=True)
    assert_like(opened, PARAMS, given)
    assert all(leaf.is_deleted() for leaf in protected.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("cipher", CIPHERS.values(), ids=CIPHERS)
def test_the_bits_of_one_device_under_jit(cipher, kind):
    given = spread((4, 2), kind)
    function = jax.jit(lambda params, keys: encrypt(params, MASKS, keys, cipher=cipher))
    assert_like(function(given, KEYS), encrypt(PARAMS, MASKS, KEYS, cipher=cipher), given)


COLLECTIVE = re.compile(
    r"= (\S+) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def sent(text):
    """The number of elements that devices send each other in a compiled program."""
    sizes = []
    for shapes in COLLECTIVE.findall(text):
        for dims in re.findall(r"\[([\d,]*)\]", shapes):
            sizes.append(int(np.prod([int(n) for n in dims.split(",") if n])))
    return sizes


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(P("a"), marks=pytest.mark.slow),
        P(None, "a"),
        pytest.param(P("a", "b"), marks=pytest.mark.slow),
        pytest.param(P(None, ("a", "b")), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_no_leaf_is_gathered_under_jit(spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    leaf = jnp.asarray(np.random.default_rng(0).standard_normal((256, 512), np.float32))
    mask = np.random.default_rng(1).random(leaf.shape) < 0.05
    params = {"w": jax.device_put(leaf, NamedSharding(mesh, spec))}

    def compiled(cipher, masks):
        function = jax.jit(lambda params, keys: encrypt(params, masks, keys, cipher=cipher))
        return function.lower(params, KEYS[:1]).compile().as_text()

    # In the stream form nothing is sent at all, however much is selected.
    assert sent(compiled(LosslessCipher(permute=False), ({"w": True},))) == []
    # What is permuted goes through all devices; what stays does not.
    sizes = sent(compiled(LosslessCipher(), ({"w": mask},)))
    assert sizes
    assert max(sizes) <= 1.25 * max(mask.sum(), 2 * 4096)


@pytest.mark.parametrize("permute", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_keys_of_another_implementation(permute):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
    given = {"w": jax.device_put(PARAMS["dense"], NamedSharding(mesh, P(None, "a")))}
    masks, keys = ({"w": MASKS[1]["dense"]},), jax.random.split(jax.random.key(0), 1)
    cipher = LosslessCipher(permute=permute)
    protected = encrypt(given, masks, keys, cipher=cipher)
    assert_like(protected, encrypt({"w": PARAMS["dense"]}, masks, keys, cipher=cipher), given)
    assert_like(decrypt(protected, masks, keys, cipher=cipher), {"w": PARAMS["dense"]}, given)


@pytest.mark.parametrize("permute", [True, False])
def test_a_mesh_of_one_device(permute):
    # What jax.make_mesh gives on a machine with one device, explicit axes by default.
    mesh = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    given = {"w": jax.device_put(PARAMS["dense"], NamedSharding(mesh, P(None, "a")))}
    masks, keys = ({"w": MASKS[1]["dense"]},), KEYS[:1]
    cipher = LosslessCipher(permute=permute)
    expected = encrypt({"w": PARAMS["dense"]}, masks, keys, cipher=cipher)
    protected = encrypt(given, masks, keys, cipher=cipher)
    assert_like(protected, expected, given)
    opened = decrypt(protected, masks, keys, cipher=cipher, donate=True)
    assert_like(opened, {"w": PARAMS["dense"]}, given)


def test_a_leaf_that_does_not_divide_is_no_array():
    # Uneven shards are JAX's to refuse: there is no such array that could be given to us.
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"divi(de|sible)"):
        jax.device_put(np.zeros((7, 3), np.float32), NamedSharding(mesh, P("a")))
