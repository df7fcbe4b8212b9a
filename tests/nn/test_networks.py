"""Networks: shapes, initialisation, and the encoder of mixed observations."""

from __future__ import annotations

import pytest
import torch

from pywm.nn import MLP, Encoder, NatureCNN


def test_mlp_is_orthogonal_with_its_gains() -> None:
    mlp = MLP((64, 64, 3), out_gain=0.01, generator=torch.Generator().manual_seed(0))
    hidden, out = mlp.layers
    torch.testing.assert_close(hidden.weight @ hidden.weight.T, 2 * torch.eye(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.weight @ out.weight.T, 1e-4 * torch.eye(3), atol=1e-6, rtol=0)
    assert all(bool((layer.bias == 0).all()) for layer in mlp.layers)


def test_mlp_equals_its_formula() -> None:
    mlp = MLP((5, 7, 2), activation="relu", generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 3, 5)
    first, last = mlp.layers
    expected = (x @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    torch.testing.assert_close(mlp(x), expected)
    assert MLP((5, 2)).layers[0].weight.shape == (2, 5)


def test_mlp_uses_the_parameters_it_has_now() -> None:
    mlp, x = MLP((4, 8, 2)), torch.randn(3, 4)
    zeros = {name: torch.zeros_like(p) for name, p in mlp.named_parameters()}
    assert not torch.func.functional_call(mlp, zeros, (x,)).any()
    other = MLP((4, 8, 2))
    other.load_state_dict(mlp.state_dict(), assign=True)
    assert torch.equal(other(x), mlp(x))


def test_weights_follow_the_generator_and_not_the_global_one() -> None:
    torch.manual_seed(0)
    networks = [NatureCNN((1, 36, 36), width=4, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    weights = [torch.cat([p.flatten() for p in network.parameters()]) for network in networks]
    assert torch.equal(*weights)
    torch.manual_seed(1)
    other = NatureCNN((1, 36, 36), width=4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(weights[0], torch.cat([p.flatten() for p in other.parameters()]))


def test_bad_networks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"MLP: sizes is \(3,\)"):
        MLP((3,))
    with pytest.raises(ValueError, match="MLP: activation is 'gelu'"):
        MLP((3, 2), activation="gelu")
    with pytest.raises(ValueError, match=r"NatureCNN: shape is \(3, 8, 8\)"):
        NatureCNN((3, 8, 8))
    with pytest.raises(ValueError, match="Encoder: images and vectors are empty"):
        Encoder({}, {})


@pytest.mark.parametrize("side", [15, 16, 35, 36, 64, 84])
def test_cnn_takes_every_size_of_picture(side: int) -> None:
    cnn = NatureCNN((2, side, side + 1), width=8)
    x = torch.randint(0, 256, (3, 2, side, side + 1), dtype=torch.uint8)
    before = x.clone()
    assert cnn(x).shape == (3, 8)
    assert torch.equal(x, before)


def test_nature_network_has_its_known_size() -> None:
    convs = 4 * 32 * 64 + 32 + 32 * 64 * 16 + 64 + 64 * 64 * 9 + 64
    assert sum(p.numel() for p in NatureCNN((4, 84, 84)).parameters()) == convs + 7 * 7 * 64 * 512 + 512


def test_pixels_are_scaled_to_one() -> None:
    cnn = NatureCNN((1, 36, 36), width=4, generator=torch.Generator().manual_seed(0))
    x = torch.full((1, 1, 36, 36), 255, dtype=torch.uint8)
    y = torch.ones(1, 1, 36, 36)
    features = torch.relu(cnn.linear(_convolve(cnn, y).flatten(1)))
    torch.testing.assert_close(cnn(x), features)


def _convolve(cnn: NatureCNN, x: torch.Tensor) -> torch.Tensor:
    for conv in cnn.convs:
        x = torch.relu(conv(x))
    return x


def test_encoder_joins_pictures_and_vectors() -> None:
    encoder = Encoder({"camera.left": (3, 36, 36)}, {"speed": (2,), "grid": (2, 3)}, width=16)
    obs = {
        "camera.left": torch.zeros(5, 3, 36, 36, dtype=torch.uint8),
        "speed": torch.full((5, 2), 7.0),
        "grid": torch.ones(5, 2, 3, dtype=torch.uint8),
    }
    features = encoder(obs)
    assert features.shape == (5, encoder.size) == (5, 24)
    assert torch.equal(features[:, 16:18], obs["speed"])
    assert bool((features[:, 18:] == 1).all())


def test_encoder_of_one_vector_copies_nothing() -> None:
    encoder = Encoder({}, {"obs": (4,)})
    x = torch.randn(8, 4)
    assert encoder({"obs": x}).data_ptr() == x.data_ptr()
    assert not list(encoder.parameters())
    assert encoder.size == 4


def test_a_single_number_is_a_feature_like_any_other() -> None:
    encoder = Encoder({}, {"speed": (2,), "time": ()})
    assert encoder.size == 3
    obs = {"speed": torch.arange(8.0).view(4, 2), "time": torch.arange(4, dtype=torch.float64)}
    expected = torch.tensor([[0.0, 1, 0], [2, 3, 1], [4, 5, 2], [6, 7, 3]])
    assert torch.equal(encoder(obs), expected)
    alone = Encoder({}, {"time": ()})
    assert torch.equal(alone({"time": obs["time"]}), expected[:, 2:])
