"""SimPLe's world model: its latent, its loss, and what it can hold on to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pywm.models.video import VIDEO_SIZES, VideoConfig, VideoModel, VideoWindow
from pywm.models.video.discrete import inv_exp, inv_lin

A = 3
SMALL: dict[str, Any] = {
    "shape": (1, 9, 10), "action": A, "hidden": 8, "levels": 2, "doublings": 1, "bits": 8, "group": 4, "units": 8,
    "posterior": (8, 8), "frames": 3, "warmup": 100, "dropout": 0.0, "middle_dropout": 0.0,
}  # fmt: skip


def model_of(**settings: Any) -> VideoModel:
    return VideoModel(VideoConfig(**{**SMALL, **settings}), torch.Generator().manual_seed(0))


def window_of(config: VideoConfig, B: int = 4, H: int = 3, seed: int = 0) -> VideoWindow:
    g = torch.Generator().manual_seed(seed)
    k = config.frames
    return VideoWindow(
        torch.randint(0, 256, (k + H, B, *config.shape), generator=g, dtype=torch.uint8),
        torch.eye(A)[torch.randint(0, A, (k + H - 1, B), generator=g)],
        torch.randint(0, 3, (H, B), generator=g, dtype=torch.uint8),
        torch.zeros(H, B, dtype=torch.bool),
        torch.ones(H, B, dtype=torch.bool),
    )


def gradients(model: VideoModel, window: VideoWindow, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model.loss(window, **{"updates": 1000, "seed": 1, **options}).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- schedules


def test_schedules_begin_low_and_end_at_one() -> None:
    assert [inv_lin(x, 100) for x in (0, 50, 100, 500)] == pytest.approx([0.01, 0.505, 1, 1])
    assert [inv_exp(x, 100) for x in (0, 50, 100, 500)] == pytest.approx([0.01, 0.1, 1, 1])
    assert (inv_lin(0, 0), inv_exp(0, 0)) == (1, 1)


# ---- latent


def test_bits_are_signs_after_the_warm_up_and_squashed_numbers_before() -> None:
    model = model_of()
    raw = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))
    bits, clean = model.discretise(raw, 100, torch.Generator().manual_seed(0))
    assert set(bits.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(clean, raw.sign())
    turned = float((bits != clean).float().mean())
    assert 0.05 < turned < 0.3  # a tenth, and what the noise turns over
    early, _ = model.discretise(raw, 0, torch.Generator().manual_seed(0))
    assert float((early.abs() == 1).float().mean()) < 0.1


def test_gradients_pass_straight_through_the_bits_to_the_encoder() -> None:
    model = model_of()
    raw = torch.randn(16, 8, requires_grad=True)
    bits, _ = model.discretise(raw, 100, torch.Generator().manual_seed(0))
    bits.sum().backward()
    assert bool((raw.grad != 0).all())
    found = gradients(model, window_of(model.config))
    for name in ("to_bits.weight", "target_convs.0.weight", "target_embed.weight", "predictor.out.weight"):
        assert float(found[name].abs().max()) > 0, name


def test_every_weight_is_learnt() -> None:
    for settings in ({"done": True}, {"reading": "recurrent"}, {"kind": "deterministic", "bits": 0}):
        model = model_of(
            shape=(1, 18, 17), **settings
        )  # the second convolution of the posterior leaves several places
        found = gradients(model, window_of(model.config))
        assert {name for name, _ in model.named_parameters()} == set(found)
        assert all(float(x.abs().max()) > 0 for x in found.values())


def test_examples_without_a_latent_do_not_see_the_bits() -> None:
    """Where the latent is masked, what it says changes nothing; where it is not, it does."""
    for use, changes in ((0.0, False), (1.0, True)):
        model = model_of(latent_use=use, latent_sampling=0.0, bit_flip=0.0)
        window = window_of(model.config)
        before = model.loss(window, updates=1000, seed=1).stats["loss/pixels"]
        with torch.no_grad():
            model.to_bits.weight.neg_()
            model.to_bits.bias.add_(3)
        after = model.loss(window, updates=1000, seed=1).stats["loss/pixels"]
        assert (not torch.equal(before, after)) == changes


def test_the_predictor_draws_what_it_has_learnt() -> None:
    model = model_of()
    with torch.no_grad():
        model.predictor.out.weight.zero_()
        model.predictor.out.bias.copy_(torch.tensor([0.75, 0.25] + [1e-9] * 14).log())
    uniform = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(4000, model.predictor.first[0].in_features)
    index = model.predictor.draw(x, uniform)
    assert index.max() == 1
    assert float(index.float().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(index == 1, uniform >= 0.75)
    signs = model._to_signs(index)
    assert torch.equal(model._to_index(signs), index)


# ---- loss


def test_the_cutoff_leaves_no_gradient_below_it() -> None:
    model = model_of(cutoff=0.03)
    logits = torch.zeros(2, 1, 256)
    logits[0, 0, 7], logits[1, 0, 7] = 20.0, 5.0
    logits.requires_grad_()
    loss = model.pixel_loss(logits, torch.full((2, 1), 7, dtype=torch.uint8))
    loss.sum().backward()
    assert loss[0] == 0
    assert loss[1] > 0
    assert bool((logits.grad[0] == 0).all())
    assert bool((logits.grad[1] != 0).all())


def test_squares_are_cut_off_too_and_truncation_gives_the_shade() -> None:
    model = model_of(pixels="l2", cutoff=2.0)
    numbers = torch.tensor([[7.5], [9.0], [10.5]], requires_grad=True)
    loss = model.pixel_loss(numbers, torch.full((3, 1), 7, dtype=torch.uint8))
    assert loss.flatten().tolist() == [0, 0, 5]
    frame = model._to_frame(torch.tensor([7.5, 7.99, 300.0, -3.0]).view(1, 2, 2, 1))
    assert frame.flatten().tolist() == [7, 7, 255, 0]


def test_what_is_beyond_the_end_of_an_episode_does_not_count() -> None:
    model = model_of(done=True)
    window = window_of(model.config)
    mask = window.mask.clone()
    mask[1:, 2] = False
    frames = window.frames.clone()
    frames[model.config.frames + 1 :, 2] = 0
    masked = window._replace(mask=mask)
    spoilt = masked._replace(frames=frames, reward=torch.where(mask, window.reward, 2))
    # Without samples of its own, of frames or bits, examples do not touch each other.
    options = {"updates": 0, "seed": 5}
    a, b = (model.loss(x, **options).stats["loss/model"] for x in (masked, spoilt))
    assert torch.equal(a, b)
    assert not torch.equal(a, model.loss(window, **options).stats["loss/model"])


@pytest.mark.parametrize("reading", ["stacked", "recurrent"])
def test_recomputing_activations_changes_nothing(reading: str) -> None:
    model = model_of(reading=reading, dropout=0.2, middle_dropout=0.2)
    window = window_of(model.config)
    plain, saving = (gradients(model, window, checkpoint_activations=x) for x in (False, True))
    assert all(torch.equal(x, saving[name]) for name, x in plain.items())


def test_a_seed_gives_the_same_loss_and_another_one_another() -> None:
    model = model_of()
    window = window_of(model.config)
    a, b, c = (model.loss(window, updates=500, seed=x).stats["loss/model"].item() for x in (1, 1, 2))
    assert a == b != c


def test_no_gradient_flows_through_its_own_frames() -> None:
    """With frames of its own each step is learnt by itself: only the last reward's loss reaches from the last step."""
    model = model_of(kind="deterministic", bits=0)
    window = window_of(model.config, H=2)
    full = model.loss(window, updates=10_000, seed=0)
    assert full.total.requires_grad
    state = model.begin(window.frames[:3].transpose(0, 1).flatten(1, 2))
    out, _ = model.step(state, window.action[2], torch.zeros(4, 0))
    assert not out.frame.requires_grad
    second = window._replace(
        frames=torch.cat([window.frames[:3], out.frame[None], window.frames[4:]]),
    )
    teacher = model.loss(second, updates=10_000, seed=0)
    # The second prediction sees the model's own first frame whatever the truth was.
    own = [x.stats["loss/reward"] for x in (full, teacher)]
    assert torch.equal(own[0], own[1])


# ---- shapes


@pytest.mark.parametrize("reading", ["stacked", "recurrent"])
@pytest.mark.parametrize("shape", [(1, 24, 24), (3, 21, 30)])
@pytest.mark.parametrize("pixels", ["softmax", "l2"])
def test_any_size_goes_in_and_comes_out(shape: tuple[int, int, int], reading: str, pixels: str) -> None:
    model = model_of(shape=shape, reading=reading, pixels=pixels, done=True)
    assert torch.isfinite(model.loss(window_of(model.config), updates=0, seed=0).stats["loss/model"])
    stack = torch.randint(0, 256, (2, 3 * shape[0], *shape[1:]), dtype=torch.uint8)
    state = model.begin(stack)
    predicted, after = model.step(state, torch.eye(A)[:2], torch.rand(2, 2))
    assert predicted.frame.shape == (2, *shape)
    assert predicted.frame.dtype == torch.uint8
    assert torch.equal(after.frames[:, : 2 * shape[0]], stack[:, shape[0] :])
    assert torch.equal(after.frames[:, 2 * shape[0] :], predicted.frame)
    assert set(predicted.reward.tolist()) <= {-1.0, 0.0, 1.0}
    assert (after.memory is None) == (reading == "stacked")
    again, _ = model.step(state, torch.eye(A)[:2], torch.rand(2, 2))
    assert again.frame.shape == predicted.frame.shape


@pytest.mark.parametrize(
    "settings", [{"done": True}, {"reading": "recurrent"}, {"pixels": "l2", "cutoff": 1.0}]
)
def test_rounded_products_change_little(settings: dict[str, Any]) -> None:
    model = model_of(**settings)
    window = window_of(model.config)
    exact = gradients(model, window, updates=0)
    loss = model.loss(window, updates=0, seed=1).stats["loss/model"]
    model.rounds = True
    rounded = gradients(model, window, updates=0)
    assert model.loss(window, updates=0, seed=1).stats["loss/model"] == pytest.approx(loss.item(), rel=0.05)
    assert all(x.dtype == torch.float32 for x in rounded.values())
    assert any(not torch.equal(x, exact[name]) for name, x in rounded.items())
    state = model.begin(torch.randint(0, 256, (2, 3, 9, 10), dtype=torch.uint8))
    _, after = model.step(state, torch.eye(A)[:2], torch.rand(2, 2))
    assert after.memory is None or after.memory.dtype == torch.float32


def test_the_memory_comes_from_all_frames_of_the_context() -> None:
    model = model_of(reading="recurrent")
    stack = torch.randint(0, 256, (1, 3, 9, 10), dtype=torch.uint8)
    other = stack.clone()
    other[:, 0] = 255 - other[:, 0]
    a, b = model.begin(stack).memory, model.begin(other).memory
    assert not torch.equal(a, b)


def test_the_papers_size_is_the_papers() -> None:
    model = VideoModel(VideoConfig((3, 105, 80), 6, **VIDEO_SIZES["paper"]))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert 70 < millions < 95  # about 74, without injection of the latent at each level
    assert model._sizes == [(105, 80), (53, 40), (27, 20), (14, 10), (7, 5), (4, 3), (2, 2)]
    assert [conv.out_channels for conv in model.down] == [192, 384, 768, 768, 768, 768]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 7}, "VideoConfig: bits is 7, but a multiple of group was expected"),
        ({"shape": (0, 8, 8)}, r"VideoConfig: shape is \(0, 8, 8\), but"),
        ({"dropout": 1.0}, "VideoConfig: dropout is 1.0, but a share below 1 was expected"),
        ({"frames": 0}, "VideoConfig: frames is 0, but at least 1 was expected"),
    ],
)
def test_impossible_shapes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoConfig(**{**SMALL, **settings})


# ---- what it can hold on to


def test_two_pixels_survive_fifty_steps() -> None:
    """A ball of two pixels in a still picture is there after 50 predictions of predictions.

    A ball that is lost costs the mean over all pixels next to nothing: the cut-off leaves it to be all there is to learn.
    """
    shape = (1, 6, 6)
    config = VideoConfig(**{**SMALL, "shape": shape, "levels": 1, "warmup": 30, "frames": 1})
    model = VideoModel(config, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    places = [(y, x) for y in range(6) for x in range(5)]
    balls = torch.zeros(len(places), *shape, dtype=torch.uint8)
    for b, (y, x) in enumerate(places):
        balls[b, 0, y, x : x + 2] = 200
    B, H = len(places), 1
    stay = torch.eye(A)[torch.zeros(B, dtype=torch.long)]
    window = VideoWindow(
        balls.expand(1 + H, B, *shape),
        stay.expand(H, B, A),
        torch.ones(H, B, dtype=torch.uint8),
        torch.zeros(H, B, dtype=torch.bool),
        torch.ones(H, B, dtype=torch.bool),
    )
    for i in range(150):
        optimizer.zero_grad()
        model.loss(window, updates=i, seed=i).total.backward()
        optimizer.step()
    state = model.begin(balls)
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        predicted, state = model.step(state, stay, torch.rand(B, config.groups, generator=rng))
    kept = (predicted.frame == balls).flatten(1).all(1).float().mean()
    assert float(kept) > 0.8
