"""DreamerV3's world model: its parts' sizes, what goes in and comes out, and prediction in open loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pywm.algos.dreamer_v3 import WIDTHS
from pywm.models import WorldModel
from pywm.nn import ImageDecoder, ImageEncoder, NormMLP
from pywm.ops import _native, _operands


def model_of(images: Any = None, vectors: Any = None, action: int = 3, **options: Any) -> WorldModel:
    sizes = {"deter": 32, "hidden": 16, "classes": 4, "stoch": 4, "units": 16, "depth": 4, "bins": 21}
    generator = torch.Generator().manual_seed(0)
    return WorldModel(images or {}, vectors or {}, action, **{**sizes, **options}, generator=generator)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("size", "images", "vectors", "action", "outputs", "total"),
    [
        ("size1m", {"obs": (3, 64, 64)}, {}, 18, 18, 688_004),
        ("size1m", {}, {"obs": (24,)}, 6, 12, 640_867),
        ("size12m", {"obs": (3, 64, 64)}, {}, 18, 18, 10_498_772),
        ("size12m", {}, {"obs": (24,)}, 6, 12, 9_738_019),
    ],
)
def test_all_parts_have_the_papers_number_of_parameters(
    size: str, images: Any, vectors: Any, action: int, outputs: int, total: int
) -> None:
    widths = WIDTHS[size]
    model = WorldModel(images, vectors, action, **widths)
    feat, units = model.rssm.config.feat, widths["units"]
    actor, critic = (NormMLP((feat, *[units] * 3), n) for n in (outputs, 255))
    assert count(model) + count(actor) + count(critic) == total


def test_a_perceptron_is_linear_norm_and_silu() -> None:
    net = NormMLP((5, 7, 6), 4, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype))
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    y = x
    for part in net.hidden:
        y = functional.linear(y, part.weight, part.bias)
        y = functional.silu(y / (y.square().mean(-1, keepdim=True) + 1e-4).sqrt() * part.scale)
    assert torch.allclose(net(x), functional.linear(y, net.out.weight, net.out.bias))
    assert NormMLP((5, 7), 4, out_scale=0.0).out.weight.abs().max() == 0
    with pytest.raises(ValueError, match=r"NormMLP: sizes is \(5,\), but the input's and a hidden width"):
        NormMLP((5,))


def test_a_perceptron_rounds_what_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where there are instructions, torch's own products round their sums, too.
    monkeypatch.setattr(_native, "has_bfloat16_instructions", lambda: False)
    seed = torch.Generator().manual_seed(0)
    net = NormMLP((5, 7), 4, operands="bfloat16", generator=seed)
    x = torch.randn(3, 2, 5, generator=seed, requires_grad=True)

    def rounded(y: Tensor) -> Tensor:
        return y.to(torch.bfloat16).float()

    with _operands.forced():
        got = net(x)
        grads = torch.autograd.grad(got.square().sum(), [x, *net.parameters()])
    [part], out = net.hidden, net.out
    y = functional.linear(rounded(x), rounded(part.weight)) + part.bias
    y = functional.silu(y / (y.square().mean(-1, keepdim=True) + 1e-4).sqrt() * part.scale)
    want = functional.linear(rounded(y), rounded(out.weight)) + out.bias
    assert torch.allclose(got, want, atol=1e-3)
    assert not torch.allclose(got, NormMLP.forward(_plain(net), x), atol=1e-6)
    for a, b in zip(grads, torch.autograd.grad(want.square().sum(), [x, *net.parameters()]), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()
    with pytest.raises(ValueError, match="NormMLP: operands is 'float16', but one of float32, bfloat16 was"):
        NormMLP((5, 7), operands="float16")


def _plain(net: NormMLP) -> NormMLP:
    other = copy.deepcopy(net)
    other.operands = "float32"
    return other


@pytest.mark.parametrize("shape", [(3, 32, 48), (1, 20, 33)])
def test_pictures_round_what_they_convolve(shape: tuple[int, int, int]) -> None:
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (30, *shape), generator=g, dtype=torch.uint8)
    feat = torch.randn(30, 44, generator=g)
    outputs: dict[str, list[Tensor]] = {}
    with _operands.forced():
        for operands in ("float32", "bfloat16"):
            seed = torch.Generator().manual_seed(0)
            encoder = ImageEncoder(shape, 2, operands=operands, generator=seed)
            decoder = ImageDecoder(shape, 32, 12, depth=2, units=8, operands=operands, generator=seed)
            parameters = [*encoder.parameters(), *decoder.parameters()]
            x, y = encoder(images), decoder(feat)
            # Norms make squares of their outputs constant; a random direction is not.
            g.manual_seed(2)
            loss = sum((z * torch.randn(z.shape, generator=g)).sum() for z in (x, y))
            outputs[operands] = [x, y, *torch.autograd.grad(loss, parameters)]
    # Behind a maximum a gradient jumps to another pixel.
    limits = [0.02] * 2 + [0.5] * len([*encoder.parameters()]) + [0.1] * len([*decoder.parameters()])
    for a, b, limit in zip(*outputs.values(), limits, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() <= limit * a.norm()
        if a.ndim > 1:
            assert not torch.equal(a, b)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 20, 33), (2, 16, 16), (3, 96, 80)])
def test_pictures_of_any_size_go_in_and_out(shape: tuple[int, int, int]) -> None:
    encoder = ImageEncoder(shape, 2)
    decoder = ImageDecoder(shape, 32, 12, depth=2, units=8)
    images = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    x = encoder(images)
    coarse = [-(-side // 16) for side in shape[1:]]
    assert x.shape == (3, encoder.size) == (3, 8 * coarse[0] * coarse[1])
    y = decoder(torch.randn(3, 44))
    assert y.shape == images.shape
    assert y.min() > 0
    assert y.max() < 1
    # Every pixel is seen, and the last row's too.
    images[0, :, -1, -1] ^= 128
    assert not torch.equal(encoder(images)[0], x[0])
    (x.sum() + y.square().sum()).backward()


def test_the_encoder_is_convolution_maximum_norm_and_silu() -> None:
    encoder = ImageEncoder((3, 32, 16), 2, generator=torch.Generator().manual_seed(0))
    images = torch.randint(0, 256, (2, 3, 32, 16), dtype=torch.uint8)
    x = images.float() / 255 - 0.5
    for conv in encoder.convs:
        x = functional.max_pool2d(functional.conv2d(x, conv.weight, conv.bias, padding=2), 2)
        x = x / (x.square().mean(1, keepdim=True) + 1e-4).sqrt() * conv.scale[:, None, None]
        x = functional.silu(x)
    assert torch.allclose(encoder(images), x.permute(0, 2, 3, 1).flatten(1), atol=1e-5)


def test_the_decoders_blocks_make_blocks_of_channels() -> None:
    decoder = ImageDecoder((3, 16, 16), 16, 4, depth=4, units=8)
    with torch.no_grad():
        for p in decoder.from_stoch.parameters():
            p.zero_()
    seen: list[Tensor] = []
    feat = torch.zeros(1, 20, requires_grad=True)
    level = decoder._level

    def record(x: Tensor, conv: Any) -> Tensor:
        seen.append(x)
        return level(x, conv)

    decoder._level = record  # type: ignore[method-assign]
    decoder(feat)
    # Channels 2 and 3 of the coarsest level come from the second block of the state; the norm is over all channels,
    # whose gradient at zero goes straight through.
    [grad] = torch.autograd.grad(seen[0][0, 2:4].sum(), feat)
    assert grad[0, 2:4].abs().min() > 0
    assert grad[0, :2].abs().max() == grad[0, 4:].abs().max() == 0


@pytest.mark.parametrize("shape", [(3, 32, 48), (1, 20, 33)])
def test_the_decoder_convolves_doubled_pictures_without_making_them(shape: tuple[int, int, int]) -> None:
    decoder = ImageDecoder(
        shape, 16, 4, depth=4, units=8, generator=torch.Generator().manual_seed(0)
    ).double()
    feat = torch.randn(5, 20, dtype=torch.float64, requires_grad=True)

    def outputs() -> list[Tensor]:
        y = decoder(feat)
        grads = torch.autograd.grad(y.square().sum(), [feat, *decoder.parameters()])
        return [y, *grads]

    got = outputs()
    with _native.disabled():
        want = outputs()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def rows(T: int = 9, B: int = 2, action: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    one_hot = functional.one_hot(torch.randint(action, (T, B), generator=g), action).float()
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0] = True
    return {"obs": torch.randn(T, B, 5, generator=g), "prev_action": one_hot, "is_first": first}


def test_open_loop_looks_at_the_context_only() -> None:
    model, data = model_of(vectors={"obs": (5,)}), rows()
    obs, rest = {"obs": data["obs"]}, (data["prev_action"], data["is_first"])
    found = model.open_loop(obs, *rest, 4, seed=3)
    assert found.obs["obs"].shape == (9, 2, 5)
    assert found.reward.shape == found.discount.shape == (9, 2)
    other = {"obs": torch.cat([obs["obs"][:4], torch.randn(5, 2, 5)])}
    again = model.open_loop(other, *rest, 4, seed=3)
    assert torch.equal(found.obs["obs"], again.obs["obs"])
    # It is the posterior's as far as it looks, and the actions count behind that.
    seen = model.observe(obs, *rest, seed=3)
    feat = torch.cat([seen.deter, seen.stoch.flatten(2)], -1)[:4]
    assert torch.allclose(model.predict(feat).obs["obs"], found.obs["obs"][:4], atol=1e-5)
    moved = data["prev_action"].roll(1, -1)
    changed = model.open_loop(obs, torch.cat([rest[0][:4], moved[4:]]), rest[1], 4, seed=3)
    assert torch.equal(changed.obs["obs"][:4], found.obs["obs"][:4])
    assert not torch.allclose(changed.obs["obs"][4:], found.obs["obs"][4:])
    assert model.open_loop(obs, *rest, 9).reward.shape == (9, 2)
    with pytest.raises(ValueError, match="context is 10, but 1 to 9, the rows, was expected"):
        model.open_loop(obs, *rest, 10)


def test_kernels_and_reference_have_the_same_loss_and_gradients() -> None:
    images, vectors = {"b": (3, 16, 20), "a": (1, 16, 20)}, {"x": (2,), "y": ()}
    data = rows()
    g = torch.Generator().manual_seed(2)
    obs = {
        key: torch.randint(0, 256, (9, 2, *s), generator=g, dtype=torch.uint8) for key, s in images.items()
    }
    obs |= {key: torch.randn(9, 2, *s, generator=g) for key, s in vectors.items()}
    reward, terminated = torch.randn(9, 2, generator=g), torch.rand(9, 2, generator=g) < 0.2

    def run() -> tuple[Tensor, list[Tensor]]:
        model = model_of(images, vectors)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05)
        loss = model.loss(obs, data["prev_action"], data["is_first"], reward, terminated, seed=5)
        assert set(loss.stats) == {f"loss/{k}" for k in ("a", "b", "x", "y", "reward", "proceed", "kl")}
        return loss.total, list(torch.autograd.grad(loss.total, list(model.parameters())))

    total, grads = run()
    with _native.disabled():
        want, want_grads = run()
    assert torch.allclose(total, want, rtol=1e-4)
    for a, b in zip(grads, want_grads, strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max().clamp(min=1e-3)


CHOICES = {"one": (4,), "pair": (2, 3), "bits": ()}
CHOSEN = {"one": (4,), "pair": (5,), "bits": (2, 3), "x": (2,)}


def chosen(T: int = 9, B: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)

    def one_hot(n: int) -> Tensor:
        return functional.one_hot(torch.randint(n, (T, B), generator=g), n).float()

    pair, bits = torch.cat([one_hot(2), one_hot(3)], -1), torch.rand(T, B, 2, 3, generator=g) < 0.5
    x = torch.randn(T, B, 2, generator=g)
    return {"one": one_hot(4), "pair": pair, "bits": bits.float(), "x": x}


def test_choices_are_categoricals_and_their_loss_the_likelihood() -> None:
    model, obs, data = model_of(vectors=CHOSEN, choices=CHOICES), chosen(), rows()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    zeros = torch.zeros(9, 2)
    loss = model.loss(obs, data["prev_action"], data["is_first"], zeros, zeros.bool(), seed=5)
    feat = loss.feat.detach()
    with torch.no_grad():
        says, x = model.predict_obs(feat), model.decode(feat)["x"]
    one, pair, bits = (says[key] for key in CHOICES)
    assert {key: x.shape[2:] for key, x in says.items()} == CHOSEN
    for p in (one, pair[..., :2], pair[..., 2:]):
        assert torch.allclose(p.sum(-1), torch.ones(9, 2))
    likely = {
        "one": (one * obs["one"]).sum(-1).log(),
        "pair": sum((pair * obs["pair"])[..., part].sum(-1).log() for part in (slice(2), slice(2, 5))),
        "bits": torch.where(obs["bits"] > 0.5, bits, 1 - bits).log().sum((-2, -1)),
        "x": -(x - obs["x"].sign() * obs["x"].abs().log1p()).square().sum(-1),
    }
    for key, log_p in likely.items():
        assert float(loss.stats[f"loss/{key}"]) == pytest.approx(-float(log_p.mean()), rel=1e-4), key


def test_choices_enter_as_they_are_and_vectors_as_symlogs() -> None:
    model, obs = model_of(vectors=CHOSEN, choices=CHOICES), chosen()
    plain = model_of(vectors=CHOSEN)
    x = obs["x"].sign() * obs["x"].abs().log1p()
    flat = torch.cat([obs["bits"].flatten(2), obs["one"], obs["pair"], x], -1)
    assert model.vector_encoder is not None
    assert torch.equal(model.encode(obs), model.vector_encoder(flat))
    assert not torch.allclose(model.encode(obs), plain.encode(obs))


def test_groups_of_equal_size_are_groups_all_the_same() -> None:
    models = [
        model_of(vectors={"a": (6,)}, choices={"a": (3, 3)}),
        model_of(vectors={"a": (3,), "b": (3,)}, choices={"a": (3,), "b": (3,)}),
    ]
    feat = torch.randn(4, 2, models[0].rssm.config.feat)
    with torch.no_grad():
        models[1].vector_decoder.load_state_dict(models[0].vector_decoder.state_dict())
        for i, part in enumerate(models[1].vector_outputs):
            part.weight.copy_(models[0].vector_outputs[0].weight[3 * i : 3 * i + 3])
    pair, single = (model.predict_obs(feat) for model in models)
    assert torch.allclose(pair["a"], torch.cat([single["a"], single["b"]], -1), atol=1e-6)


def test_observations_that_cannot_be_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"choices\['a'\] is \(2, 2\), but classes that fit its vector, \(5,\)"
    ):
        model_of(vectors={"a": (5,)}, choices={"a": (2, 2)})
    with pytest.raises(ValueError, match=r"choices\['b'\] is \(\), but .* which is missing"):
        model_of(vectors={"a": (5,)}, choices={"b": ()})
    with pytest.raises(ValueError, match="images and vectors are empty"):
        model_of()
    with pytest.raises(
        ValueError, match=r"images have the sizes \[\(16, 16\), \(16, 32\)\], but pictures of one"
    ):
        model_of({"a": (3, 16, 16), "b": (3, 16, 32)})
