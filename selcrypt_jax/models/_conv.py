"""The 3×3 convolution of both networks, fast on small maps too."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float


def conv3x3(x: Float[Array, "n h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "n h w o"]:
    """3×3 convolution, stride 1, zero padding (``SAME``).

    Equals ``lax.conv_general_dilated`` up to rounding. Maps with fewer than nine positions, on
    which XLA's CPU convolution is some 50 times too slow, use one matrix product instead.

    Args:
        x: input, [N, H, W, I].
        kernel: weights, [3, 3, I, O] (HWIO), of the same dtype.

    Returns:
        Output, [N, H, W, O].

    Examples:
        >>> y = conv3x3(images, jnp.zeros((3, 3, 3, 8)))
        >>> assert y.shape == (*images.shape[:3], 8)
    """
    _, h, w, i = x.shape
    o = kernel.shape[-1]
    if h == w == 1:
        # All other taps see only padding.
        return x @ kernel[1, 1]
    # XLA's CPU backend is extremely slow if the map is smaller than the kernel. Other platforms are
    # at their best with matrix products: a branch on the platform would gain nothing.
    if h * w < 9:
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, a : a + h, b : b + w] for a in range(3) for b in range(3)]
        # The order of the patch is that of the kernel's axes: the reshape copies no weights.
        return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(9 * i, o)
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Conv3x3(nnx.Module):
    """A layer of `conv3x3`, with or without a bias.

    Attributes:
        kernel: [3, 3, I, O], initialised He-normal.
        bias: [O], initialised to zero; None if ``use_bias`` is false.

    Args:
        in_features: channels of the input, I.
        out_features: channels of the output, O.
        use_bias: whether there is a bias.
        rngs: its ``params`` stream draws the kernel.

    References:
        He et al., Delving deep into rectifiers, ICCV 2015 (the initial weights).

    Examples:
        >>> layer = Conv3x3(3, 8, rngs=nnx.Rngs(0))
        >>> assert layer(images).shape[-1] == 8
    """

    def __init__(
        self, in_features: int, out_features: int, *, use_bias: bool = True, rngs: nnx.Rngs
    ):
        init = nnx.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, in_features, out_features)))
        self.bias = nnx.data(nnx.Param(jnp.zeros(out_features)) if use_bias else None)

    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n h w o"]:
        """[N, H, W, I] → [N, H, W, O]."""
        y = conv3x3(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[None, None, None]
