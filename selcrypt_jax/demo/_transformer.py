"""A small vision transformer, since results for convolutions need not hold for attention."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Block(nnx.Module):
    """Attention and a two-layer perceptron, each after a normalisation (Xiong et al. 2020)."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "n t w"]) -> Float[Array, "n t w"]:
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (part.reshape(split) for part in jnp.split(self.qkv(self.norm1(x)), 3, -1))
        x = x + self.out(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class VisionTransformer(nnx.Module):
    """Classifies images by patches of 8×8 pixels (Dosovitskiy et al., arXiv 2010.11929).

    Args:
        size: side length of an image, in pixels.
        width: width of the residual stream.
        depth: number of blocks.
        heads: number of attention heads.
        classes: number of classes.
        rngs: its ``params`` stream draws the weights.
    """

    def __init__(
        self,
        size: int = 32,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        classes: int = 10,
        *,
        rngs: nnx.Rngs,
    ):
        tokens = (size // 8) ** 2
        self.patches = nnx.Conv(1, width, (8, 8), strides=8, rngs=rngs)
        start = 0.02 * jax.random.normal(rngs.params(), (tokens, width))
        self.positions = nnx.Param(start)
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: Float[Array, "n h w 1"]) -> Float[Array, "n classes"]:
        patches = self.patches(images)
        x = patches.reshape(len(images), -1, patches.shape[-1]) + self.positions[None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))
