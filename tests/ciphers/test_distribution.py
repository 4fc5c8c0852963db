"""Encrypted weights look like the original ones in another order."""

import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import scipy.stats
from strategies import bits

from selcrypt_jax import (
    GaussianCipher,
    LosslessCipher,
    PaperLevels,
    chacha20_key,
    encrypt,
    importance,
    nested_masks,
)

KEYS = [chacha20_key(bytes(range(32)))]


def eighths(values: np.ndarray) -> dict:
    """The signed histogram in eighths of an octave."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    eighth = np.floor((np.abs(mantissa) - 0.5) * 16)
    columns = np.stack([np.signbit(values), exponent, eighth])
    found, counts = np.unique(columns, axis=1, return_counts=True)
    return dict(zip(map(tuple, found.T), counts.tolist(), strict=True))


def ks(a: np.ndarray, b: np.ndarray) -> float:
    return scipy.stats.ks_2samp(a.ravel(), b.ravel(), method="asymp").pvalue


def assert_distribution_kept(leaf: np.ndarray, mask: np.ndarray, unit: str) -> None:
    cipher = LosslessCipher(unit=unit)
    protected = np.asarray(encrypt({"w": leaf}, ({"w": mask},), KEYS, cipher=cipher)["w"])
    selected = np.broadcast_to(mask, leaf.shape)
    assert ks(protected, leaf) >= 0.9
    assert ks(protected[selected], leaf[selected]) >= 0.9
    assert eighths(protected[selected]) == eighths(leaf[selected])
    assert (bits(protected) == bits(leaf))[selected].sum() <= 3


CONV = np.random.default_rng(0).standard_t(3, (3, 3, 64, 64)).astype(np.float32) * 0.03


@pytest.mark.parametrize("unit", ["weight", "group"])
@pytest.mark.parametrize("fraction", [0.02, 0.08, 0.3])
def test_distribution_is_kept(fraction, unit):
    (mask,) = nested_masks(importance.l2({"w": CONV}), [fraction])
    assert_distribution_kept(CONV, mask["w"], unit)


def test_the_distribution_test_can_fail():
    masks = nested_masks(importance.l2({"w": CONV}), [0.3])
    cipher = GaussianCipher.fit({"w": CONV}, masks)
    protected = np.asarray(encrypt({"w": CONV}, masks, KEYS, cipher=cipher)["w"])
    assert ks(protected, CONV) < 1e-3


@pytest.mark.data
@pytest.mark.skipif("SELCRYPT_DATA" not in os.environ, reason="SELCRYPT_DATA is not set")
@pytest.mark.parametrize("layer", [5, 8, 11])
@pytest.mark.parametrize("levels", [PaperLevels(0.02), PaperLevels(0.08), PaperLevels(0.3)])
def test_distribution_is_kept_on_the_papers_network(levels, layer):
    folder = Path(os.environ["SELCRYPT_DATA"]) / "dncnn_color_paper"
    network = safetensors.numpy.load_file(folder / "dncnn_color_sigma50.safetensors")
    learned = safetensors.numpy.load_file(folder / "dncnn_color_sigma50_importance.safetensors")
    leaf = network[f"dncnn.{layer}.weight"]
    masks = nested_masks({"w": learned[f"layer_{layer}"].reshape(64, 64, 1, 1)}, levels)
    assert_distribution_kept(leaf, masks[-1]["w"], "weight")
