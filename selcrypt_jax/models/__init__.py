"""The paper's two networks in Flax NNX, with conversion of weights from and to PyTorch."""

from ._conv import Conv3x3 as Conv3x3
from ._conv import conv3x3 as conv3x3
from ._dncnn import DnCNN as DnCNN
from ._torch import from_torch as from_torch
from ._torch import model_of as model_of
from ._torch import to_torch as to_torch
from ._torch import torch_names as torch_names
from ._vgg import VGG19 as VGG19
