"""VGG19 for 32×32 images, with the paper's head."""

import itertools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ._conv import Conv3x3
from ._images import checked_images

WIDTHS = (64, 64, 128, 128, *(256,) * 4, *(512,) * 8)
HEAD_WIDTH = 512
# Indices of the convolutions before a 2×2 pooling.
POOLED = (1, 3, 7, 11, 15)
SIZE = 32


def _max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h//2 w//2 c"]:
    # On CPUs the gradient of these maxima takes less than a tenth of the time of nnx.max_pool's.
    # If values tie, they share it.
    top = jnp.maximum(x[:, ::2, ::2], x[:, ::2, 1::2])
    return jnp.maximum(top, jnp.maximum(x[:, 1::2, ::2], x[:, 1::2, 1::2]))


class VGG19(nnx.Module):
    """VGG19: 16 convolutions in five stages, then dense layers of 512, 512 and ``classes``.

    Parameters are ``convs/0/kernel`` ... ``convs/15/bias``, ``norms/0/scale`` ...
    ``norms/15/bias`` (running statistics: ``mean``, ``var``) and ``head/0/kernel`` ...
    ``head/2/bias``. Like every NNX module, it starts in training mode: ``model.eval()`` turns
    dropout off and makes BatchNorm use its running statistics, ``model.train()`` switches back.

    Args:
        classes: number of classes.
        in_channels: channels of the images.
        width: multiplier for the number of channels of every hidden layer (rounded, at least 1).
        batch_norm: whether BatchNorm (ε = 1e-5) follows each convolution.
        dropout: probability that an input of the first or second dense layer is set to 0.
        rngs: streams ``params`` and, for dropout, ``dropout``.

    Raises:
        ValueError: ``classes``, ``in_channels``, ``width`` or ``dropout`` out of range.

    References:
        Simonyan and Zisserman, Very deep convolutional networks for large-scale image
        recognition, ICLR 2015, configuration E. Tian et al., Probabilistic selective encryption
        of convolutional neural networks for hierarchical services, CVPR 2021 (the head).

    Examples:
        >>> model = VGG19(classes=10, width=1 / 32, rngs=nnx.Rngs(0))
        >>> model.eval()
        >>> logits = model(jnp.zeros((1, 32, 32, 3)))
    """

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        batch_norm: bool = True,
        dropout: float = 0.5,
        *,
        rngs: nnx.Rngs,
    ):
        if classes < 1 or in_channels < 1:
            raise ValueError(
                "VGG19: expected classes and in_channels of at least 1, got "
                f"classes={classes}, in_channels={in_channels}."
            )
        if not width > 0:
            raise ValueError(f"VGG19: expected width > 0, got {width}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"VGG19: expected 0 <= dropout < 1, got {dropout}.")
        widths = [max(1, round(channels * width)) for channels in WIDTHS]
        hidden = max(1, round(HEAD_WIDTH * width))
        self.in_channels = in_channels
        pairs = itertools.pairwise([in_channels, *widths])
        self.convs = nnx.List([Conv3x3(*pair, rngs=rngs) for pair in pairs])
        self.norms = nnx.List(
            [nnx.BatchNorm(c, momentum=0.9, rngs=rngs) if batch_norm else None for c in widths]
        )
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        init = nnx.initializers.he_normal()
        pairs = itertools.pairwise([widths[-1], hidden, hidden, classes])
        self.head = nnx.List([nnx.Linear(*pair, kernel_init=init, rngs=rngs) for pair in pairs])

    def __call__(self, images: Float[Array, "n 32 32 c"]) -> Float[Array, "n classes"]:
        """Classifies images.

        Args:
            images: [N, 32, 32, C], floats; pixels in [0, 1], normalised as in training.

        Returns:
            Logits, [N, classes].

        Raises:
            ValueError: the images have another size or number of channels.
            TypeError: the images do not have the weights' dtype.
        """
        x = checked_images(
            images, channels=self.in_channels, dtype=self.convs[0].kernel.dtype, model="VGG19"
        )
        if x.shape[1:3] != (SIZE, SIZE):
            raise ValueError(
                f"VGG19: expected images of {SIZE}×{SIZE} pixels, [N, {SIZE}, {SIZE}, "
                f"{self.in_channels}], got shape {x.shape}. Resize or crop them."
            )
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv(x)
            x = nnx.relu(x if norm is None else norm(x))
            if index in POOLED:
                x = _max_pool(x)
        # Five poolings leave a 1×1 map, so flattening is the same in NHWC and NCHW.
        x = x[:, 0, 0]
        for dense in self.head[:-1]:
            x = nnx.relu(dense(self.dropout(x)))
        return self.head[-1](x)
