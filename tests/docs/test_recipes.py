"""The code in docs/recipes.md runs, and what the page says about each framework is true."""

import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
from flax import nnx
from safetensors.numpy import load_file, save_file
from strategies import assert_same, is_array, octets
from test_documents import run

from selcrypt_jax import (
    Secret,
    Select,
    importance,
    inspect_file,
    issue_grant,
    mask_counts,
    open_model,
    protect,
    protect_file,
)
from selcrypt_jax._tree.names import named_leaves
from selcrypt_jax.cli import main

TEXT = (Path(__file__).parent.parent.parent / "docs" / "recipes.md").read_text()
BLOCKS = {
    title: re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    for title, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
}
SECRET = Secret(bytes(range(32)))
FAST = {"A sharded Hugging Face folder", "An ONNX model", "Quantised weights"}


def recipes(slow: Callable[[str], bool]) -> list[Any]:
    """The titles, each with its pytest marks."""
    marks: dict[str, list[Any]] = {title: [] for title in BLOCKS}
    for title, found in marks.items():
        if slow(title):
            found.append(pytest.mark.slow)
    missing = pytest.mark.skipif(find_spec("silero_vad") is None, reason="needs silero-vad")
    marks["A real network: Silero VAD"].append(missing)
    lacks = any(find_spec(name) is None for name in ("onnx", "onnxruntime"))
    marks["An ONNX model"].append(pytest.mark.skipif(lacks, reason="needs onnx and onnxruntime"))
    return [pytest.param(title, marks=found) for title, found in marks.items()]


@pytest.fixture(scope="module")
def done() -> Iterator[dict[str, tuple[Path, types.ModuleType]]]:
    """Results of the blocks run so far: the folder, and the names."""
    found: dict[str, tuple[Path, types.ModuleType]] = {}
    yield found
    for _, module in found.values():
        sys.modules.pop(module.__name__)


@pytest.fixture
def recipe(done, tmp_path, monkeypatch) -> Callable[[str], dict[str, Any]]:
    """Runs a block once, under this suite's strict settings; returns its names, in its folder."""

    def execute(title: str) -> dict[str, Any]:
        if title not in done:
            module = types.ModuleType(f"recipe_{len(done)}")
            sys.modules[module.__name__] = module  # where its classes look for theirs
            done[title] = tmp_path, module
            monkeypatch.chdir(tmp_path)
            # optax and Haiku's moving averages mix dtypes themselves.
            loose = title == "Haiku" or title.startswith("Optax")
            with jax.numpy_dtype_promotion("standard" if loose else "strict"):
                exec(BLOCKS[title][0], module.__dict__)
        folder, module = done[title]
        monkeypatch.chdir(folder)
        return module.__dict__

    return execute


def changed(one: Any, other: Any) -> dict[str, float]:
    """The share of each leaf that differs."""
    others = named_leaves(other).leaves
    return {
        name: float(np.mean(np.asarray(leaf) != np.asarray(others[name])))
        for name, leaf in named_leaves(one).leaves.items()
        if is_array(leaf) and np.size(leaf)
    }


def whole(shares: dict[str, float]) -> set[str]:
    return {name for name, share in shares.items() if share > 0.9}


def test_each_recipe_has_one_block():
    assert [title for title, blocks in BLOCKS.items() if len(blocks) != 1] == []
    assert len(BLOCKS) == 15


@pytest.mark.parametrize("title", recipes(slow=lambda title: title not in FAST))
def test_a_reader_runs_it(title, tmp_path):
    check = "\nimport numpy\nassert not numpy.array_equal(forward(public), forward(original))"
    run(BLOCKS[title][0] + check, tmp_path)


@pytest.mark.parametrize("title", recipes(slow=lambda title: title not in FAST))
def test_the_top_level_is_the_original_and_level_0_runs(title, recipe):
    scope = recipe(title)
    original, public, opened = (scope[name] for name in ("original", "public", "opened"))
    assert_same(opened, original)
    before = jax.tree.map(lambda x: octets(x) if is_array(x) else x, original)
    assert jax.tree.structure(public) == jax.tree.structure(original)
    for name, leaf in named_leaves(original).leaves.items():
        other = named_leaves(public).leaves[name]
        if is_array(leaf):
            assert (other.shape, other.dtype) == (leaf.shape, leaf.dtype), name
        else:
            assert other is leaf, name
    assert max(changed(public, original).values()) > 0
    forward = scope["forward"]
    first, level0, top = (np.asarray(forward(tree)) for tree in (original, public, opened))
    assert level0.shape == first.shape
    assert not np.array_equal(level0, first)
    assert octets(top) == octets(first)
    # And nothing that the reader holds was overwritten by putting it into the network.
    after = jax.tree.map(lambda x: octets(x) if is_array(x) else x, original)
    assert jax.tree.leaves(after) == jax.tree.leaves(before)


# --- JAX ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nnx_takes_statistics_and_no_random_state(recipe):
    scope = recipe("Flax NNX")
    shares = changed(scope["public"], scope["original"])
    assert not any("dropout" in name for name in shares)
    assert whole(shares) >= {"norm/mean", "norm/var", "norm/scale"}
    assert type(scope["public"]["norm"]["mean"]) is nnx.BatchStat
    # All of the state has random state in it, which masks of the weights say nothing of; two
    # filters are two trees.
    everything = nnx.state(scope["model"])
    with pytest.raises(ValueError, match="'dropout/rngs/count': expected a mask"):
        protect(everything, scope["masks"], secret=SECRET)
    assert isinstance(nnx.state(scope["model"], nnx.Param, nnx.BatchStat), tuple)


@pytest.mark.slow
def test_linen_takes_both_collections(recipe):
    scope = recipe("Flax Linen, with BatchNorm")
    shares = changed(scope["public"], scope["original"])
    assert shares.keys() >= {"params/Conv_0/kernel", "batch_stats/BatchNorm_0/mean"}
    assert whole(shares) >= {"batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var"}
    assert 0.4 < shares["params/Conv_0/kernel"] < 0.6


@pytest.mark.slow
def test_equinox_is_oihw_and_has_statistics_beside_the_module(recipe):
    scope = recipe("Equinox")
    model, _ = scope["original"]
    assert model.conv.weight.shape == (16, 3, 3, 3)
    assert model.head.weight.shape == (10, 16)
    up = eqx.nn.ConvTranspose2d(8, 5, 2, key=jax.random.key(0))
    assert up.weight.shape == (5, 8, 2, 2)
    counts = mask_counts(scope["original"], scope["masks"][1])
    assert counts["0/conv/weight"] == (24, 24 * 9, 16 * 3 * 9)
    assert {"1/1/0", "1/1/1"} <= changed(scope["public"], scope["original"]).keys()
    assert counts["1/1/0"].weights == counts["1/1/1"].weights == 16


def test_equinox_shared_weights_are_one_leaf():
    class Tied(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self, key):
            embedding = eqx.nn.Embedding(16, 8, key=key)
            head = eqx.nn.Linear(8, 16, use_bias=False, key=key)
            self.shared = eqx.nn.Shared(
                (embedding, head), lambda pair: pair[1].weight, lambda pair: pair[0].weight
            )

    model = Tied(jax.random.key(0))
    arrays = [x for x in jax.tree.leaves(model) if is_array(x)]
    assert [x.shape for x in arrays] == [(16, 8)]
    public: Any = protect(model, (True,), secret=SECRET, rest="plain").params
    embedding, head = public.shared()
    assert octets(embedding.weight) == octets(head.weight)
    assert octets(head.weight) != octets(arrays[0])


@pytest.mark.slow
def test_haiku_names_and_axes(recipe):
    scope = recipe("Haiku")
    shapes = {name: leaf.shape for name, leaf in named_leaves(scope["original"]).leaves.items()}
    assert shapes["params/conv2_d/w"] == (3, 3, 3, 16)
    assert shapes["params/linear/w"] == (16, 10)
    up = hk.transform(lambda x: hk.Conv2DTranspose(5, 2)(x))
    params = jax.jit(up.init)(jax.random.PRNGKey(0), jnp.ones((1, 4, 4, 8)))
    assert params["conv2_d_transpose"]["w"].shape == (2, 2, 5, 8)
    counters = [name for name in shapes if name.endswith("counter")]
    counts = mask_counts(scope["original"], scope["masks"][1])
    assert counters
    assert not any(counts[name].weights for name in counters)
    assert counts["state/batch_norm/~/mean_ema/average"].weights == 16


def test_flax_transposed_convolution_is_hwio():
    up = nnx.ConvTranspose(8, 5, (2, 2), rngs=nnx.Rngs(0))
    assert up.kernel[...].shape == (2, 2, 8, 5)


@pytest.mark.slow
def test_optax_trains_what_the_level_sees_and_nothing_else(recipe):
    scope = recipe("Optax: train what a level may see")
    basic, tuned, frozen = scope["basic"], scope["tuned"], scope["frozen"]
    assert scope["losses"][-1] < scope["losses"][0]
    assert scope["whole"] == {"body": {"kernel": False, "bias": False}, "head": {"kernel": True}}
    for name, leaf in named_leaves(tuned).leaves.items():
        before = np.asarray(named_leaves(basic).leaves[name])
        hidden = np.broadcast_to(named_leaves(frozen).leaves[name], before.shape)
        leaf = np.asarray(leaf)
        assert octets(leaf[hidden]) == octets(before[hidden]), name
        assert hidden.all() or (leaf != before)[~hidden].mean() > 0.9, name
        # With the key of level 2 alone, the rest becomes what it was; what was trained stays.
        merged = np.asarray(named_leaves(scope["merged"]).leaves[name])
        original = np.asarray(named_leaves(scope["original"]).leaves[name])
        assert octets(merged) == octets(np.where(hidden, original, leaf)), name
    # No moments for what is hidden as a whole.
    adam = scope["state"][0].inner_state[0]
    assert [leaf.shape for leaf in jax.tree.leaves(adam.mu)] == [(32,), (16, 32)]


@pytest.mark.slow
def test_lora_adapters_alone(recipe):
    scope = recipe("LoRA adapters")
    assert named_leaves(scope["original"]).leaves.keys() == {"lora/lora_a", "lora/lora_b"}
    assert load_file("adapter.safetensors").keys() == {"lora/lora_a", "lora/lora_b"}
    assert min(changed(scope["public"], scope["original"]).values()) > 0.9
    params = named_leaves(nnx.state(scope["model"], nnx.Param)).leaves
    assert params.keys() == {"kernel", "bias", "lora/lora_a", "lora/lora_b"}


def test_an_adapter_file_of_peft(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    original = {
        name.format("A"): rng.normal(size=(8, 32)).astype(np.float32),
        name.format("B"): rng.normal(size=(16, 8)).astype(np.float32),
    }
    save_file(original, "adapter_model.safetensors", {"format": "pt"})
    main(["keygen", "-o", "keys"])
    arguments = "adapter_model.safetensors -o public.safetensors --secret keys/secret.key"
    assert main(["protect", *arguments.split(), "--budget", "1", "--levels", "1"]) == 0
    assert min(changed(load_file("public.safetensors"), original).values()) > 0.9


@pytest.mark.slow
def test_a_transformer_has_weights_and_whole_tokens(recipe):
    scope = recipe("A Flax transformer")
    original, masks = scope["original"], scope["masks"]
    leaves = named_leaves(original).leaves
    assert leaves["blocks/0/attention/query/kernel"].shape == (32, 4, 8)
    assert leaves["blocks/0/attention/out/kernel"].shape == (4, 8, 32)
    counts = mask_counts(original, masks[1])
    assert counts["blocks/0/attention/query/kernel"] == (512, 512, 1024)
    assert counts["embed/embedding"] == (32, 32 * 32, 64 * 32)
    rows = np.asarray(leaves["embed/embedding"]) != np.asarray(
        named_leaves(scope["public"]).leaves["embed/embedding"]
    )
    assert sorted(set(rows.mean(1) > 0.5)) == [False, True]
    assert set(rows[rows.mean(1) < 0.5].reshape(-1)) == {False}
    assert counts["norm/scale"].weights == 32
    assert sum("embed" in name for name in leaves) == 1  # tied
    # With kernels, a group is all inputs of an output.
    kernels = importance.l2(original, select="query/kernel")
    assert named_leaves(kernels).leaves["blocks/0/attention/query/kernel"].shape == (1, 4, 8)


@pytest.mark.slow
def test_protect_says_that_it_cannot_tell_the_layout_of_attention(recipe, capsys):
    scope = recipe("A Flax transformer")
    arrays = {name: np.asarray(x) for name, x in named_leaves(scope["original"]).leaves.items()}
    save_file(arrays, "plain.safetensors")
    main(["keygen", "-o", "keys"])
    command = ["protect", "plain.safetensors", "-o", "out", "--secret", "keys/secret.key"]
    assert main([*command, "--budget", "0.5", "--levels", "2"]) != 0
    assert "cannot tell where the output and input axes are" in capsys.readouterr().err
    options = ["--granularity", "weight", "--layout", "HWIO", "--budget", "0.5", "--levels", "2"]
    assert main([*command, *options]) == 0


# --- PyTorch --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pytorch_layouts_kernel_by_kernel(recipe):
    scope = recipe("A PyTorch state dict")
    groups = scope["chosen"].groups
    for name, kernels in {
        "stem.weight": 16 * 3,
        "depthwise.weight": 16,
        "grouped.weight": 24 * 4,
        "up.weight": 24 * 12,
        "audio.weight": 8 * 12,
        "video.weight": 12 * 8,
        "head.weight": 10 * 12,
    }.items():
        assert groups[name] == kernels // 2, name
        # Whole kernels, spatial weights and all.
        old, new = scope["original"][name], scope["public"][name]
        differ = (old != new).reshape(*old.shape[:2], -1).mean(2)
        assert ((differ == 0) | (differ > 0.5)).all(), name
        assert (differ > 0).mean() == pytest.approx(0.5, abs=0.02), name
    shares = changed(scope["public"], scope["original"])
    small = {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}
    assert small & whole(shares) <= small
    assert shares["norm.num_batches_tracked"] == 0
    assert scope["public"]["norm.num_batches_tracked"].dtype == np.int64
    with safetensors.safe_open("public.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"
    assert Path("opened.safetensors").read_bytes() == Path("model.safetensors").read_bytes()


def test_a_filter_of_a_transposed_convolution_is_an_input_channel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weight = np.random.default_rng(0).normal(size=(24, 12, 2, 2)).astype(np.float32)
    save_file({"up.weight": weight}, "model", {"format": "pt"})
    chosen = protect_file(
        "model",
        "public",
        secret=SECRET,
        levels=[0.5],
        selection=Select(granularity="filter", small=0),
        rest="plain",
    )
    assert chosen.layout == "OIHW"
    assert chosen.groups == {"up.weight": 12}
    differ = (load_file("public")["up.weight"] != weight).mean((1, 2, 3))  # by input channel
    assert sorted(differ > 0) == [False] * 12 + [True] * 12


TORCH = {
    "Conv2d(6, 8, 3)": (8, 6, 3, 3),
    "Conv2d(16, 16, 3, groups=16)": (16, 1, 3, 3),
    "Conv2d(8, 16, 3, groups=4)": (16, 2, 3, 3),
    "ConvTranspose2d(24, 12, 2)": (24, 12, 2, 2),
    "Conv1d(12, 8, 5)": (8, 12, 5),
    "Conv3d(8, 12, 3)": (12, 8, 3, 3, 3),
}


@pytest.mark.parametrize("metadata", [{"format": "pt"}, None])
@pytest.mark.parametrize("module", TORCH)
def test_protect_picks_the_layout_of_pytorch(module, metadata, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weight = np.random.default_rng(0).normal(size=TORCH[module]).astype(np.float32)
    save_file({"0.weight": weight, "1.weight": np.ones((3, 4), np.float32)}, "model", metadata)
    main(["keygen", "-o", "keys"])
    capsys.readouterr()
    command = "protect model -o public --secret keys/secret.key --select 0 --budget 1 --levels 1"
    assert main([*command.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "OIHW"


def test_protect_says_that_it_cannot_tell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weight = np.random.default_rng(0).normal(size=(9, 4, 3, 3)).astype(np.float32)
    long = np.random.default_rng(0).normal(size=(8, 1, 65)).astype(np.float32)
    save_file({"conv.weight": weight, "long.weight": long}, "model")  # a depthwise Conv1d
    with pytest.raises(ValueError, match=r"cannot tell.*'long.weight' looks like HWIO"):
        protect_file("model", "public", secret=SECRET, levels=[0.5])
    save_file({"conv.weight": weight, "long.weight": long}, "marked", {"format": "pt"})
    assert protect_file("marked", "public", secret=SECRET, levels=[0.5]).layout == "OIHW"


@pytest.mark.usefixtures("same_draws")
def test_tied_weights_that_are_stored_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weight = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    save_file({"embed.weight": weight, "lm_head.weight": weight.copy()}, "model", {"format": "pt"})
    strategies: list[Any] = ["l2", "random"]
    for strategy in strategies:
        public = f"public-{strategy}"
        protect_file(
            "model",
            public,
            secret=SECRET,
            levels=[0.5],
            selection=Select(small=0, importance=strategy),
        )
        found = load_file(public)
        one, two = found["embed.weight"], found["lm_head.weight"]
        assert (one != two).mean() > 0.4
        assert ((one == weight) == (two == weight)).all(), strategy
        opened = open_model(public, issue_grant(public, level=1, secret=SECRET, signer="unsigned"))
        assert octets(opened["embed.weight"]) == octets(opened["lm_head.weight"]) == octets(weight)


@pytest.mark.slow
def test_a_hugging_face_folder_keeps_its_files(recipe):
    recipe("A sharded Hugging Face folder")
    names = sorted(path.name for path in Path("llm").iterdir())
    for folder in ("public", "opened"):
        assert sorted(path.name for path in Path(folder).iterdir()) == names
        for name in ("model.safetensors.index.json", "config.json"):
            assert Path(folder, name).read_bytes() == Path("llm", name).read_bytes()
    for path in Path("opened").glob("*.safetensors"):
        assert path.read_bytes() == Path("llm", path.name).read_bytes()
    assert len(inspect_file("public").levels) == 2


@pytest.mark.slow
def test_quantised_weights_take_part_by_name_only(recipe):
    scope = recipe("Quantised weights")
    shares = changed(scope["public"], scope["original"])
    assert {"fc1.scale", "fc2.scale"} <= whole(shares)
    for name in ("fc1.weight", "fc2.weight"):
        old, new = scope["original"][name], scope["public"][name]
        assert 0.4 < shares[name] < 0.6
        assert new.dtype == np.int8
        assert sorted(old.reshape(-1)) == sorted(new.reshape(-1))  # the multiset stays
    # Without a name: scales of two axes alone, or a refusal.
    chosen = protect_file(
        "model.safetensors", "2", secret=SECRET, levels=[0.9], selection=Select(small=0)
    )
    assert chosen.groups.keys() <= {"fc1.scale", "fc2.scale"}
    flat = {n: x.reshape(-1) if "scale" in n else x for n, x in scope["original"].items()}
    save_file(flat, "flat")
    with pytest.raises(ValueError, match=r"select: expected floats.*with `select`"):
        protect_file("flat", "3", secret=SECRET, levels=[0.5])


def test_packed_codes_are_selected_at_random(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = np.random.default_rng(0).integers(0, 256, (64, 32), np.uint8)
    save_file({"qweight": codes}, "model")
    with pytest.raises(ValueError, match=r"packed codes\. Use importance\.random"):
        protect_file(
            "model", "public", secret=SECRET, levels=[0.5], selection=Select(select="qweight")
        )
    protect_file(
        "model",
        "public",
        secret=SECRET,
        levels=[0.5],
        selection=Select(select="qweight", importance="random"),
    )
    opened = open_model("public", issue_grant("public", level=1, secret=SECRET, signer="unsigned"))
    assert octets(opened["qweight"]) == octets(codes)


# --- ONNX and msgpack -----------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs onnx and onnxruntime")
def test_a_graph_of_onnx_holds_no_weights(recipe):
    scope = recipe("An ONNX model")
    graph = Path("graph.onnx").read_bytes()
    for name, array in scope["original"].items():
        assert octets(array) not in graph
        assert octets(array) in Path("model.onnx").read_bytes(), name
    shares = changed(scope["public"], scope["original"])
    assert 0 < shares["conv.weight"] < 1
    assert shares["axes"] == 0
    # Sealed, it does not load without a key.
    sealed = protect_file(
        "model.onnx", "sealed", secret=SECRET, levels=2, selection=Select(budget=0.8)
    )
    assert sealed.layout == "OIHW"
    opened = open_model("sealed", issue_grant("sealed", level=1, secret=SECRET, signer="unsigned"))
    assert octets(opened["axes"]) == octets(scope["original"]["axes"])
    with pytest.raises(Exception, match=r"axes|axis"):
        scope["forward"](open_model("sealed"))


@pytest.mark.slow
def test_msgpack_has_the_names_of_the_tree(recipe):
    recipe("A Flax msgpack file")
    assert set(open_model("public.safetensors")) == {
        f"params/layers_{n}/{name}" for n in (0, 2) for name in ("kernel", "bias")
    }


# --- Orbax ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_orbax_adds_a_step_for_a_state_that_names_do_not_have(recipe):
    scope = recipe("An Orbax checkpoint of NNX")
    assert {"conv/kernel", "norm/mean"} <= inspect_names("public")
    model = scope["model"]
    state = nnx.state(nnx.clone(model), nnx.Any(nnx.Param, nnx.BatchStat))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path("state").absolute(), state)
    protect_file("state", "state-public", secret=SECRET, levels=[0.25, 0.5])
    assert {"conv/kernel", "norm/mean"} <= inspect_names("state-public")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(Path("state-public").absolute(), state)
    nnx.update(model, restored)
    assert max(changed(nnx.state(model, nnx.Param), state).values()) > 0


def inspect_names(folder: str) -> set[str]:
    return set(open_model(folder))


def test_orbax_of_a_checkpoint_manager(tmp_path):
    params = {"kernel": np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)}
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, args=ocp.args.StandardSave(params))
    with pytest.raises(ValueError, match=r"Name one of them, such as .*default"):
        protect_file(tmp_path / "run" / "7", tmp_path / "p", secret=SECRET, levels=[0.5])
    folder = tmp_path / "run" / "7" / "default"
    protect_file(folder, tmp_path / "p", secret=SECRET, levels=[0.5])
    opened = open_model(
        tmp_path / "p", issue_grant(tmp_path / "p", level=1, secret=SECRET, signer="unsigned")
    )
    assert octets(opened["kernel"]) == octets(params["kernel"])


# --- a real network -------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("silero_vad") is None, reason="needs silero-vad")
@pytest.mark.slow
def test_silero_vad_level_by_level(recipe):
    scope = recipe("A real network: Silero VAD")
    original, levels = scope["original"], scope["levels"]
    total = sum(x.size for x in original.values())
    shares = [sum((x != w[n]).sum() for n, x in original.items()) / total for w in levels]
    assert total == 309_633
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.05
    assert shares[-1] == 0
    for w in levels:
        assert octets(w["stft_conv.weight"]) == octets(original["stft_conv.weight"])
        assert octets(w["conv1.bias"]) == octets(original["conv1.bias"])


def test_a_state_shares_its_variables_with_the_model():
    """Why the recipes put weights into a copy."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(jnp.zeros_like, state))
    kernel: Any = state["kernel"]
    assert not kernel[...].any()
