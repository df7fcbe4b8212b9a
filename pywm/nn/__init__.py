"""Network parts: multilayer perceptrons, convolutional encoders, encoders of whole observations."""

from pywm.nn.conv import NatureCNN
from pywm.nn.encoder import Encoder
from pywm.nn.mlp import MLP, orthogonal_

__all__ = ["MLP", "Encoder", "NatureCNN", "orthogonal_"]
