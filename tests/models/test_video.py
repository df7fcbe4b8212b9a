"""The video model: sizes, the multiplicative action, gradients through its own predictions, the curriculum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pywm.models.video import PROFILES, ActionConditional, Curriculum, Phase
from pywm.types import State

SMALL = (3, 32, 32)


def model_of(shape: tuple[int, int, int] = SMALL, actions: int = 4, **options: Any) -> ActionConditional:
    return ActionConditional(shape, actions, generator=torch.Generator().manual_seed(0), **options)


def window(rows: int, B: int = 2, shape: tuple[int, int, int] = SMALL) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (rows, B, *shape), dtype=torch.uint8, generator=generator)
    index = torch.randint(0, 4, (rows - 1, B), generator=generator)
    return frames, torch.nn.functional.one_hot(index, 4).float()


def test_whole_screens_have_the_papers_sizes() -> None:
    model = model_of((3, 210, 160), 18)
    assert model.sizes == [(3, 210, 160), (64, 102, 78), (128, 50, 38), (128, 24, 18), (128, 11, 8)]
    assert [tuple(c.weight.shape) for c in model.convs] == [
        (64, 12, 8, 8),
        (128, 64, 6, 6),
        (128, 128, 6, 6),
        (128, 128, 4, 4),
    ]
    assert (model.encode_out.in_features, model.encode_out.out_features) == (11264, 2048)
    assert tuple(model.factor_action.weight.shape) == (2048, 18)
    assert tuple(model.factor_code.weight.shape) == tuple(model.factor_out.weight.shape) == (2048, 2048)
    assert tuple(model.deconvs[-1].weight.shape) == (64, 3, 8, 8)
    code = torch.zeros(1, 2048)
    with torch.no_grad():
        assert model.decode(code).shape == (1, 3, 210, 160)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sides", [sides for sides in PROFILES if max(sides) < 100])
def test_every_profile_gives_back_its_pictures(
    sides: tuple[int, int], channels: int, recurrent: bool
) -> None:
    model = model_of((channels, *sides), recurrent=recurrent)
    for i, deconv in enumerate(reversed(model.deconvs)):
        assert deconv.weight.shape[0] == model.sizes[i + 1][0]
    frames, action = window(model.context + 2, 1, (channels, *sides))
    out = model.predict(frames[: model.context], action)
    assert out.shape == (2, 1, channels, *sides)
    assert 0 <= float(out.min()) <= float(out.max()) <= 1


def test_initial_weights_are_the_papers() -> None:
    model = model_of(recurrent=True)
    for p, bound in (
        (model.factor_code.weight, 1.0),
        (model.factor_action.weight, 0.1),
        (model.lstm.weight_hh, 0.08),
        (model.convs[1].weight, math.sqrt(3 / (64 * 4))),
    ):
        assert 0.97 * bound < float(p.detach().abs().max()) <= bound
    assert not model.factor_out.bias.any()
    same, other = model_of(recurrent=True), ActionConditional(SMALL, 4, recurrent=True)
    assert torch.equal(model.decode_in.weight, same.decode_in.weight)
    assert not torch.equal(model.decode_in.weight, other.decode_in.weight)


@torch.no_grad()
def test_the_action_multiplies() -> None:
    model = model_of()
    code = torch.rand(3, 256)
    actions = torch.eye(4)[:3]
    b = model.factor_out.bias.uniform_(-1, 1)
    want = (
        model.factor_out.weight @ ((model.factor_code.weight @ code[1]) * model.factor_action.weight[:, 1])
        + b
    )
    assert torch.allclose(model.transform(code, actions)[1], want, atol=1e-4)
    # Without a code, or without an action, nothing but the bias is left; twice the action counts twice.
    assert torch.allclose(model.transform(0 * code, actions), b.expand(3, -1))
    assert torch.allclose(model.transform(code, 0 * actions), b.expand(3, -1))
    once, twice = (model.transform(code, k * actions) - b for k in (1, 2))
    assert torch.allclose(twice, 2 * once, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("recurrent", [False, True])
def test_only_the_baseline_is_blind_to_actions(recurrent: bool) -> None:
    model, blind = (model_of(recurrent=recurrent, action_blind=flag) for flag in (False, True))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in blind.parameters())
    frames, action = window(model.context + 3)
    other = action.roll(1, -1)
    seen, changed = (model.predict(frames[: model.context], a) for a in (action, other))
    assert not torch.allclose(seen, changed, atol=1e-6)
    assert torch.equal(*(blind.predict(frames[: model.context], a) for a in (action, other)))


@torch.no_grad()
@pytest.mark.parametrize("recurrent", [False, True])
def test_the_k_steps_are_single_steps_over_the_models_own_frames(recurrent: bool) -> None:
    model = model_of(recurrent=recurrent)
    model.set_mean(torch.full(SMALL, 0.25))
    T = model.context
    frames, action = window(T + 3)
    x = model.normalize(frames)
    assert torch.allclose(x * 255 + 0.25 * 255, frames.float(), atol=1e-3)
    together = model(x[:T], action)
    seen = x[:T]
    for k in range(3):
        [next_] = model(seen, action[: T + k])
        assert torch.allclose(next_, together[k], atol=1e-4)
        seen = torch.cat([seen, next_[None]])
    # The action of a step leads to its frame, not to the ones before.
    other = action.clone()
    other[T] = action[T].roll(1, -1)
    changed = model(x[:T], other)
    assert torch.equal(changed[0], together[0])
    assert not torch.allclose(changed[1], together[1], atol=1e-6)


@torch.no_grad()
def test_the_loss_is_half_the_squared_error_of_a_predicted_frame() -> None:
    model = model_of()
    frames, action = window(model.rows(3), 5)
    x = model.normalize(frames)
    predicted = model(x[:4], action)
    want = sum(float((predicted[k, b] - x[4 + k, b]).square().sum()) for k in range(3) for b in range(5)) / (
        2 * 3 * 5
    )
    assert float(model.loss(frames, action, 3)) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("recurrent", [False, True])
def test_the_gradient_of_the_last_step_goes_through_the_first(recurrent: bool) -> None:
    model = model_of(recurrent=recurrent)
    T = model.context
    frames, action = window(T + 3)
    seen: list[Tensor] = []
    draw = model.decode

    def decode(code: Tensor) -> Tensor:
        seen.append(draw(code))
        seen[-1].retain_grad()
        return seen[-1]

    model.decode = decode  # type: ignore[method-assign]
    x = model.normalize(frames)
    model(x[:T], action)[2].square().sum().backward()
    assert len(seen) == 3
    assert all(float(y.grad.abs().max()) > 0 for y in seen)
    assert all(float(p.grad.abs().max()) > 0 for p in model.convs.parameters())


def test_the_lstm_learns_single_steps_from_ten_places_and_longer_ones_from_the_end() -> None:
    model = model_of(recurrent=True)
    assert [model.rows(K) for K in (1, 3, 5)] == [21, 14, 16]
    assert [model_of().rows(K) for K in (1, 3, 5)] == [5, 7, 9]
    frames, action = window(21)
    x = model.normalize(frames)
    with torch.no_grad():
        errors = [model(x[: 11 + i], action[: 11 + i])[0] - x[11 + i] for i in range(10)]
    want = sum(float(e.square().sum()) for e in errors) / (2 * 10 * 2)
    assert float(model.loss(frames, action, 1).detach()) == pytest.approx(want, rel=1e-4)


def test_gradients_into_the_lstm_are_clipped() -> None:
    model = model_of(recurrent=True)
    grads: list[Tensor] = []
    remember = model.lstm.forward

    def watch(*args: Any) -> Any:
        out = remember(*args)
        if out[1].requires_grad:
            out[0].register_hook(lambda g: grads.append(g))
        return out

    model.lstm.forward = watch  # type: ignore[method-assign]
    frames, action = window(model.rows(1))
    (1000 * model.loss(frames, action, 1)).backward()
    assert max(float(g.abs().max()) for g in grads) > 0.1  # what arrives, before it is cut
    assert all(torch.isfinite(p.grad).all() for p in model.lstm.parameters())
    free = float(model.lstm.weight_hh.grad.norm())
    model.zero_grad()
    (1e6 * model.loss(frames, action, 1)).backward()
    assert float(model.lstm.weight_hh.grad.norm()) < 100 * free


@pytest.mark.parametrize("K", [1, 3])
def test_training_lowers_the_loss(K: int) -> None:
    model = model_of()
    frames, action = window(model.rows(K), 4)
    frames = frames // 64 * 64
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        loss = model.loss(frames, action, K)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"shape is \(3, 40, 40\), but .* one of 210 x 160, 84 x 84, 64 x 64, 32 x 32"
    ):
        model_of((3, 40, 40))
    with pytest.raises(ValueError, match="actions is 0, but 1 or more was expected"):
        model_of(actions=0)
    model = model_of()
    frames, action = window(5)
    with pytest.raises(ValueError, match=r"frames is \(3, 2, 3, 32, 32\).* with T from 4 on"):
        model.predict(frames[:3], action)
    with pytest.raises(ValueError, match=r"action is \(3, 2, 4\), but \[3 \+ K, 2, 4\] was expected"):
        model.predict(frames[:4], action[:3])
    with pytest.raises(ValueError, match="have 5 and 4 rows, but 7 and 6 were expected for a horizon of 3"):
        model.loss(frames, action, 3)
    with pytest.raises(ValueError, match=r"mean is \(3, 8, 8\), but \(3, 32, 32\) was expected"):
        model.set_mean(torch.zeros(3, 8, 8))


# ---- the curriculum ------------------------------------------------------------------------------------------------------


def test_phases_follow_after_their_updates() -> None:
    curriculum = Curriculum([(1, 1e-3, 8, 3), (3, 1e-4, 4, 2)])
    assert (curriculum.total, curriculum.most_left) == (5, 5)
    seen = []
    while not curriculum.finished:
        seen.append(curriculum.phase)
        curriculum.step(1.0)
    assert seen == [Phase(1, 1e-3, 8, 3)] * 3 + [Phase(3, 1e-4, 4, 2)] * 2
    assert curriculum.most_left == 0


def test_a_phase_ends_early_on_a_plateau() -> None:
    def length(losses: list[float]) -> int:
        curriculum = Curriculum([(1, 1e-3, 8, 100), (3, 1e-4, 4, 2)], advance="plateau", window=5, patience=2)
        return next(i + 1 for i in range(len(losses)) if curriculum.step(losses[i]))

    assert length([1.0] * 100) == 15  # the first window is the best; two more are not better
    assert length([0.97**i for i in range(100)]) == 100
    assert length([0.97**i for i in range(20)] + [0.5] * 80) == 35


def test_doubling_ends_with_the_horizon() -> None:
    assert [p.horizon for p in Curriculum.doubling(8, 1e-3, 4, 10).phases] == [1, 2, 4, 8]
    assert [p.horizon for p in Curriculum.doubling(5, 1e-3, 4, 10).phases] == [1, 2, 4, 5]
    assert [p.horizon for p in Curriculum.doubling(1, 1e-3, 4, 10).phases] == [1]


@pytest.mark.parametrize("steps", [0, 7, 12, 16])
def test_it_continues_where_it_stood(steps: int) -> None:
    def build() -> Curriculum:
        return Curriculum([(1, 1e-3, 8, 9), (3, 1e-4, 4, 7)], advance="plateau", window=3, patience=2)

    whole = build()
    losses = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.2]
    for loss in losses[:steps]:
        whole.step(loss)
    part = build()
    part.load_state(whole.state())
    for loss in losses[steps:]:
        assert part.step(loss) == whole.step(loss)
    assert part.state() == whole.state()
    assert whole.finished
    with pytest.raises(ValueError, match="index is 2 and updates is 1, but expected a place in 2 phases"):
        part.load_state(State({}, {**whole.state().data, "updates": 1}))


@pytest.mark.parametrize(
    ("phases", "options", "message"),
    [
        ([], {}, "phases is empty"),
        (
            [(1, 1e-3, 8)],
            {},
            r"phases\[0\] is \(1, 0.001, 8\), but expected \(horizon, lr, batch_size, updates\)",
        ),
        ([(1, 1e-3, 8, 5), (0, 1e-3, 8, 5)], {}, r"horizon of phases\[1\] is 0"),
        ([(1, 0.0, 8, 5)], {}, r"lr of phases\[0\] is 0.0, but expected a positive number"),
        ([(1, 1e-3, 8, 5)], {"advance": "never"}, "advance is 'never'"),
        ([(1, 1e-3, 8, 5)], {"window": 0}, "window is 0, but expected 1 or more"),
        ([(1, 1e-3, 8, 5)], {"tolerance": 1.0}, "tolerance is 1.0"),
    ],
)
def test_an_impossible_curriculum_is_refused(phases: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curriculum(phases, **options)
