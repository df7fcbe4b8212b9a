"""One encoder for whatever an environment shows: images, vectors, or a dict of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pywm.nn.conv import NatureCNN

__all__ = ["Encoder"]


class Encoder(nn.Module):
    """Turn a dict of observations into one feature vector: a CNN an image key, vectors as they are.

    Without images it has no parameters, and the heads above it do all the work (PPO's separate 64-64 networks).

    Args:
        images: ``[C, height, width]`` of each image key.
        vectors: shape of each vector key.
        width: features of each image.
        generator: source of randomness of the initialisation.

    Attributes:
        size: number of features ``F``.
        passes: the key that is handed back as it is where it is the only one, a float32 vector; None otherwise.
    """

    def __init__(
        self,
        images: Mapping[str, Sequence[int]],
        vectors: Mapping[str, Sequence[int]],
        *,
        width: int = 512,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not images and not vectors:
            raise ValueError("Encoder: images and vectors are empty, but at least one key was expected")
        self.image_keys, self.vector_keys = tuple(images), tuple(vectors)
        # Module names may hold no dot, keys of a Dict space may: the networks are numbered.
        self.cnns = nn.ModuleList(
            NatureCNN(shape, width=width, generator=generator) for shape in images.values()
        )
        only = self.vector_keys[0] if len(vectors) == 1 and not images else None
        self.passes = only if only is not None and len(vectors[only]) == 1 else None
        self._single_numbers = frozenset(key for key, shape in vectors.items() if not len(shape))
        self.size = width * len(images) + sum(math.prod(shape) for shape in vectors.values())

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Map ``key -> [B, ...]`` to float32 features ``[B, F]``."""
        parts = [cnn(obs[key]) for key, cnn in zip(self.image_keys, self.cnns, strict=True)]
        for key in self.vector_keys:
            x = obs[key] if obs[key].dtype == torch.float32 else obs[key].float()
            parts.append(x.unsqueeze(1) if key in self._single_numbers else x.flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
