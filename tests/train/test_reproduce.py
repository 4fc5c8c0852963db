"""The paper's experiments, cut short, against the figures of its release."""

import importlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import safetensors
from flax import nnx

from selcrypt_jax import PSSConfig
from selcrypt_jax.models import VGG19
from selcrypt_jax.models._files import read_cifar, read_model

TRAIN = Path(__file__).parent.parent.parent / "train"
DATA = Path(os.environ.get("SELCRYPT_DATA", "")).absolute()
needs_data = pytest.mark.skipif(
    "SELCRYPT_DATA" not in os.environ, reason="SELCRYPT_DATA is not set"
)


@pytest.fixture
def script(monkeypatch):
    """Imports a script, for JAX as a user has it: without strict promotion."""
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("grain")
    monkeypatch.syspath_prepend(str(TRAIN))
    monkeypatch.syspath_prepend(str(TRAIN / "reproduce"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield importlib.import_module


def test_the_audits_picture_is_drawn_from_its_figures(script, tmp_path):
    picture = script("audit_picture")
    shutil.copy(TRAIN.parent / "docs" / "results" / "audit.json", tmp_path)
    picture.main(picture.Config(tmp_path))
    assert (tmp_path / "audit.png").stat().st_size > 10_000


def test_a_sentence_encoder_whose_heads_are_rows_is_the_same_encoder(script):
    minilm = script("minilm_strategies")
    rng, width = np.random.default_rng(0), minilm.WIDTH
    params = {}

    def add(name, *shape):
        params[f"{name}.weight"] = rng.normal(0, 0.1, shape).astype(np.float32)
        params[f"{name}.bias"] = rng.normal(0, 0.1, shape[:1]).astype(np.float32)

    for name, rows in (("word", 50), ("position", minilm.LENGTH), ("token_type", 2)):
        add(f"embeddings.{name}_embeddings", rows, width)
    add("embeddings.LayerNorm", width)
    for number in range(minilm.LAYERS):
        layer = f"encoder.layer.{number}"
        for part in minilm.ATTENTION:
            add(f"{layer}.attention.self.{part}", width, width)
        for part, rows, columns in (
            ("attention.output.dense", width, width),
            ("intermediate.dense", 8, width),
            ("output.dense", width, 8),
        ):
            add(f"{layer}.{part}", rows, columns)
        for part in ("attention.output", "output"):
            add(f"{layer}.{part}.LayerNorm", width)
    params = jax.tree.map(jax.numpy.asarray, params)
    rows = minilm.by_head(params)
    jax.tree.map(np.testing.assert_array_equal, minilm.flat(rows), params)

    texts = rng.integers(50, size=(4, minilm.LENGTH)), np.ones((4, minilm.LENGTH), bool)
    found = minilm.embed(params, *map(jax.numpy.asarray, texts))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    # A head's rows are those whose change the head alone sees: its values, and what it puts out.
    layer = "encoder.layer.0.attention"
    head = 3
    without_values = dict(rows)
    for part in ("value.weight", "value.bias"):
        name = f"{layer}.self.{part}"
        split = rows[name].reshape(minilm.HEADS, -1)
        without_values[name] = split.at[head].set(0).reshape(rows[name].shape)
    name = f"{layer}.output.dense.weight"
    without_output = {**rows, name: rows[name].at[head].set(0)}
    np.testing.assert_allclose(
        minilm.embed(without_values, *texts), minilm.embed(without_output, *texts), atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.data
@needs_data
def test_levels_of_dncnn_are_near_those_of_the_release(script, tmp_path):
    levels = script("dncnn_levels")
    levels.main(levels.Config(DATA, tmp_path, keys=1))
    report = json.loads((tmp_path / "dncnn_levels.json").read_text())
    np.testing.assert_allclose(report["untouched"], [27.84, 39.59, 27.03, 25.53], atol=0.01)
    assert report["selected_weights"] == 2214
    for name in ("gaussian", "lossless"):
        found = [entry["mean"] for entry in report[name]["psnr"]]
        # A single key: its spread is about 2 dB at the levels in between.
        np.testing.assert_allclose(found[1:5], report["release"][1:5], atol=5)
        np.testing.assert_allclose(found[::5], report["release"][::5], atol=0.6)
    assert report["lossless"]["bit_identical_weights_at_the_top"] == [2214, 2214]
    assert (tmp_path / "dncnn_levels.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.data
@needs_data
def test_strategies_of_dncnn_are_near_those_of_the_release(script, tmp_path, monkeypatch):
    strategies = script("dncnn_strategies")
    monkeypatch.setattr(strategies, "KERNELS_A_LAYER", (82,))
    monkeypatch.setattr(strategies, "KERNELS_IN_ALL", (246,))
    monkeypatch.setattr(strategies, "CLOSED_FORM", ("descend", "l2"))
    monkeypatch.setattr(strategies, "OBJECTIVES", {"break": PSSConfig("break", steps=10)})
    monkeypatch.setattr(strategies, "STEPS", 10)
    monkeypatch.setattr(strategies, "BATCHES", 2)
    strategies.main(strategies.Config(DATA, tmp_path, keys=2, other_keys=2, seeds=1))
    report = json.loads((tmp_path / "dncnn_strategies_colour.json").read_text())
    assert report["conv_weights"] == 556_416
    assert report["noisy"] == pytest.approx(14.16, abs=0.01)
    three = report["db_without_a_key"]["each of three layers"]
    assert three["PSS, published"]["82"]["mean"] == pytest.approx(13.77, abs=1)
    assert three["descend"]["82"]["mean"] == pytest.approx(16.81, abs=4)
    everywhere = report["db_without_a_key"]["all layers"]
    assert list(everywhere) == ["PSS, budgets", "PSS, break", "descend", "l2"]
    # Ten steps find already what hurts more than weights by size.
    for learned in ("PSS, budgets", "PSS, break"):
        assert everywhere[learned]["246"]["mean"] < everywhere["descend"]["246"]["mean"]
    assert (tmp_path / "dncnn_strategies_colour.png").stat().st_size > 10_000
    assert not (tmp_path / ".dncnn_strategies_colour.jsonl").exists()


@pytest.mark.slow
@pytest.mark.data
@needs_data
def test_strategies_of_vgg19_are_near_the_measured_ones(script, tmp_path, monkeypatch):
    strategies = script("vgg19_strategies")
    panel = strategies.Selection(
        strategies.FOUR_LAYERS, "leaf", (0.08,), ("PSS, budgets", "random", "l2")
    )
    monkeypatch.setattr(strategies, "SELECTIONS", {"of each of four layers": panel})
    monkeypatch.setattr(strategies, "STEPS", 4)
    monkeypatch.setattr(strategies, "BATCHES", 2)
    strategies.main(strategies.Config(DATA, tmp_path, panels=("four",), keys=1, tests=500))
    report = json.loads((tmp_path / "vgg19_strategies.json").read_text())
    found = report["accuracy_without_a_key"]["of each of four layers"]
    assert found["l2"][0]["kernels"] == 13_448  # the release takes one more in each
    assert found["l2"][0]["share_of_conv_weights"] == pytest.approx(0.00605, abs=1e-5)
    assert found["l2"][0]["accuracy"] == pytest.approx(0.374, abs=0.1)
    assert found["random"][0]["accuracy"] == pytest.approx(0.778, abs=0.06)
    assert found["PSS, budgets"][0]["accuracy"] < found["l2"][0]["accuracy"]
    assert (tmp_path / "vgg19_strategies.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.data
@needs_data
def test_cost_of_pss(script, tmp_path, monkeypatch):
    cost = script("pss_cost")
    recipes = {
        "break": PSSConfig("break", steps=2),
        "keep": PSSConfig("keep", steps=2, penalty=1e-5),
        "release, layer by layer": PSSConfig(
            "keep", steps=1, layerwise=True, sampled=False, optimizer=optax.sgd(0.1)
        ),
    }
    monkeypatch.setattr(cost, "RECIPES", recipes)
    monkeypatch.setattr(cost, "STOPS", (1, 2))
    monkeypatch.setattr(cost, "BATCHES", 2)
    cost.main(cost.Config(DATA, tmp_path, keys=1))
    report = json.loads((tmp_path / "pss_cost.json").read_text())
    assert [row["step"] for row in report["curves"]["break"]] == [1, 2]
    assert report["release_recipe"]["steps_with_epochs_of_these_batches"] == 130 * 2 * 17
    assert (tmp_path / "pss_cost.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.data
@needs_data
def test_vgg19_has_the_accuracy_that_its_file_says(script):
    path = DATA / "vgg19_cifar10.safetensors"
    graph, params = nnx.split(read_model(path, VGG19))
    tests = read_cifar(DATA / "tfds" / "cifar10", "test")
    found = script("_tasks").accuracy_of(graph, *tests)(params)
    with safetensors.safe_open(path, framework="np") as file:
        expected = float(file.metadata()["test_accuracy_percent_float32"])
    assert 100 * found["accuracy"] == pytest.approx(expected, abs=0.1)


@pytest.mark.slow
@pytest.mark.data
@needs_data
def test_order_of_pss(script, tmp_path, monkeypatch):
    order = script("pss_order")
    monkeypatch.setattr(order, "STEPS", 12)
    monkeypatch.setattr(order, "KERNELS_IN_ALL", (10, 62))
    order.main(order.Config(DATA, tmp_path))
    report = json.loads((tmp_path / "pss_order.json").read_text())
    assert [row["step"] for row in report["settled"]] == [4, 8, 12]
    assert all(0 <= share <= 1 for row in report["settled"] for share in row["share"])
    assert report["settled"][-1]["share"] == [1, 1]
    # A budget keeps what it has once it is finished.
    assert report["settled"][1]["share"][0] == 1
    counts = np.array(list(report["selected"].values()))
    assert counts.sum(0)[:2].tolist() == [10, 62]
    assert (counts[:, 0] <= counts[:, 1]).all()
    assert (tmp_path / "pss_order.png").stat().st_size > 10_000
