"""The paper's two networks in Flax NNX, and their weights from and to PyTorch."""

from selcrypt_jax.models._conv import Conv3x3 as Conv3x3
from selcrypt_jax.models._conv import conv3x3 as conv3x3
from selcrypt_jax.models._dncnn import DnCNN as DnCNN
from selcrypt_jax.models._torch import from_torch as from_torch
from selcrypt_jax.models._torch import to_torch as to_torch
from selcrypt_jax.models._vgg import VGG19 as VGG19
