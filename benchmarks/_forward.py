"""Section "forward": programs that unlock parameters themselves, against plain parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _measure import Contender, measure
from _rows import Options, Row
from _subjects import PERMUTING, SECRET, STREAM, vgg19, weights
from flax import nnx

from selcrypt_jax import Secret, encrypt, importance, level_key, nested_masks, ring_keys, unlocking
from selcrypt_jax.models import VGG19

NOTES = {
    "forward": (
        "A jitted forward pass with parameters in the clear, and with `unlocking`, which decrypts "
        "8 % of the kernels (or weights) in every call; ratios are relative to the former."
    )
}
BASELINE = "in the clear"
SHARE = 0.08


def vgg19_pass(batch: int) -> tuple[Any, Callable[[Any, Any], Any], Any]:
    """The parameters of VGG19, a function of them, and its input."""
    model = VGG19(rngs=nnx.Rngs(0))
    model.eval()
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    images = jnp.asarray(np.random.default_rng(0).random((batch, 32, 32, 3), np.float32))

    def apply(params: Any, x: Any) -> Any:
        model: Any = nnx.merge(graphdef, params, rest)
        return model(x)

    return vgg19(), apply, images


def block_pass(tokens: int, width: int, heads: int = 16) -> tuple[Any, Callable[..., Any], Any]:
    """A transformer block in float32: attention and a gated MLP."""
    hidden = 4 * width
    shapes = dict.fromkeys(("query", "key", "value", "output"), (width, width))
    shapes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    scale = width**-0.5
    params = {n: scale * weights(*shape).astype(jnp.float32) for n, shape in shapes.items()}

    def apply(params: Any, x: Any) -> Any:
        def split(name: str) -> Any:
            return (x @ params[name]).reshape(1, len(x), heads, -1)

        mixed = jax.nn.dot_product_attention(split("query"), split("key"), split("value"))
        x = x + mixed.reshape(x.shape) @ params["output"]
        return x + (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]

    return params, apply, weights(tokens, width).astype(jnp.float32)


PASSES: dict[str, tuple[Callable[[], Any], str | None]] = {
    "VGG19, batch of 64": (lambda: vgg19_pass(64), r"convs.*kernel$"),
    "VGG19, batch of 1": (lambda: vgg19_pass(1), r"convs.*kernel$"),
    "transformer block, 512 tokens": (lambda: block_pass(512, 1024), None),
    "transformer block, tiny": (lambda: block_pass(16, 64), None),
}


def contenders(case: str) -> list[Contender]:
    """All contenders."""
    make, select = PASSES[case]
    params, apply, x = make()
    masks = nested_masks(importance.l2(params, select=select), [SHARE])
    keys = ring_keys(level_key(Secret(SECRET), bytes(16), levels=1))
    expected = jax.jit(apply)(params, x)

    def check(found: Any) -> None:
        if not np.allclose(found, expected, rtol=1e-3, atol=1e-3):
            raise RuntimeError(f"{case}: not the output of the network in the clear.")

    plain = jax.jit(apply)
    found = [Contender(BASELINE, lambda given: plain(*given), lambda: (params, x), check=check)]
    for name, cipher in (("unlocking", PERMUTING), ("unlocking, stream form", STREAM)):
        protected = encrypt(params, masks, keys, cipher=cipher)
        forward = jax.jit(unlocking(apply, masks, cipher=cipher))
        found.append(
            Contender(
                name,
                lambda given, forward=forward: forward(*given),
                lambda protected=protected: (protected, keys, x),
                check=check,
            )
        )
    return found


def rows(options: Options) -> list[Row]:
    """The rows of the section."""
    found = []
    for case in PASSES:
        if options.quick == case.endswith("tiny"):
            found += measure("forward", case, contenders, case, baseline=BASELINE, options=options)
    return found
