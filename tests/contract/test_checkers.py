"""Every public function runs under each of JAX's own checkers, with the same result."""

from typing import Any

import jax
import numpy as np
import pytest
from strategies import JAX_CHECKERS
from test_ciphers import KEYS, MASKS, assert_near, back, cipher, forth, protected
from test_ciphers import MEMBERS as CIPHERS
from test_ciphers import PARAMS as CIPHER_PARAMS
from test_importance import MEMBERS as IMPORTANCE
from test_importance import REST, WEIGHTS, loss

import selcrypt_jax as sj
from selcrypt_jax import importance

pytestmark = pytest.mark.filterwarnings("ignore:.*is no better than with noise")

CHECKERS = JAX_CHECKERS | {
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
}
# Each program is compiled again under each flag: those that found something are always tried.
FAST = {"debug_infs", "debug_key_reuse", "transfer_guard", "enable_x64"}
every_checker = pytest.mark.parametrize(
    "checker", [pytest.param(c, marks=[] if c in FAST else [pytest.mark.slow]) for c in CHECKERS]
)
LONG = {"pss keep", "pss break"}
LONG_CIPHERS = {name for name in CIPHERS if name.startswith("gaussian")}


@every_checker
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in IMPORTANCE]
)
def test_importance(name, checker):
    # Half of it on the device, half on the host.
    params = {**WEIGHTS, "dense": jax.device_put(WEIGHTS["dense"]), **REST}
    scores = IMPORTANCE[name].scores
    expected = scores(params, loss)
    with CHECKERS[checker]():
        found = scores(params, loss)
    for leaf in WEIGHTS:
        np.testing.assert_allclose(found[leaf], expected[leaf], rtol=2e-4, atol=1e-6)


@every_checker
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in LONG_CIPHERS else []) for n in CIPHERS],
)
def test_ciphers(name, checker):
    if (name, checker) == ("a user's own", "enable_x64"):
        pytest.skip("JAX draws other random signs")
    expected = protected(name)
    made = cipher(name)
    with CHECKERS[checker]():
        CIPHERS[name].make(CIPHER_PARAMS, MASKS)
        public = forth(name)(CIPHER_PARAMS, KEYS)
        opened = back(name)(public, KEYS)
    assert_near(name, public, expected)
    assert_near(name, opened, CIPHER_PARAMS)
    assert made is cipher(name)


SECRET = sj.Secret(bytes(range(32)))


def masks_and_counts() -> Any:
    params = jax.device_put(CIPHER_PARAMS)
    masks = sj.nested_masks(importance.l2(params), [0.3, 0.6], params=params)
    masks = sj.with_small_leaves(params, masks, small=0.5)
    return sj.mask_counts(params, masks[-1])


def released() -> Any:
    params = jax.device_put(CIPHER_PARAMS)
    release = sj.protect(params, secret=SECRET, levels=2)
    return sj.unlock(release, sj.level_key(SECRET, release.model_id, levels=2))


def files(tmp: Any) -> Any:
    release = sj.protect(jax.device_put(CIPHER_PARAMS), secret=SECRET, levels=2)
    release.save(tmp / "m", force=True)
    grant = sj.issue_grant(tmp / "m", level=2, secret=SECRET, signer="unsigned")
    sj.verify_file(tmp / "m", grant=grant)
    return sj.open_model(tmp / "m", grant, like=jax.device_put(CIPHER_PARAMS))


@every_checker
def test_masks_and_releases(checker, tmp_path):
    with CHECKERS[checker]():
        masks_and_counts()
        for found in (released(), files(tmp_path)):
            for name, leaf in CIPHER_PARAMS.items():
                np.testing.assert_array_equal(np.asarray(jax.device_get(found[name])), leaf)
