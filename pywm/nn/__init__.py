"""Network parts: multilayer perceptrons, convolutional encoders and decoders, encoders of whole observations."""

from pywm.nn.conv import NatureCNN
from pywm.nn.encoder import Encoder
from pywm.nn.image import ImageDecoder, ImageEncoder
from pywm.nn.layer import NormMLP
from pywm.nn.mlp import MLP, orthogonal_

__all__ = ["MLP", "Encoder", "ImageDecoder", "ImageEncoder", "NatureCNN", "NormMLP", "orthogonal_"]
