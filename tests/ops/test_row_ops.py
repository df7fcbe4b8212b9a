"""What normalisation, recurrent gates and one-hot layers promise beyond the tests that the table of ops drives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pywm.ops import (
    _native,
    block_gru_gates,
    gru_block_reset,
    gru_block_update,
    gru_gates,
    layernorm_gru_gates,
    norm_act,
    one_hot_linear,
)

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def agree(a: Tensor, b: Tensor, inputs: list[Tensor], tolerance: float = 1e-10) -> None:
    """Both results and all their gradients are the same."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    weight = torch.linspace(-1, 1.5, a.numel(), dtype=a.dtype).view_as(a)
    for got, want in zip(
        torch.autograd.grad(a, inputs, weight, retain_graph=True),
        torch.autograd.grad(b, inputs, weight),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# ---- normalisation ---------------------------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("D", [1, 7, 64, 1000, 3072])
def test_norms_are_those_of_torch(D: int, dtype: torch.dtype) -> None:
    x, scale, shift = (normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(9, D), (D,), (D,)]))
    rms = functional.rms_norm(x, (D,), scale, 1e-2)
    agree(norm_act(x, scale, act="none", eps=1e-2), rms, [x, scale], 10 * TOLERANCE[dtype])
    layer = functional.layer_norm(x, (D,), scale, shift, 1e-2)
    ours = norm_act(x, scale, shift, norm="layer", act="none", eps=1e-2)
    agree(ours, layer, [x, scale, shift], 10 * TOLERANCE[dtype])


def test_a_layer_of_dreamer_v3() -> None:
    x, scale = normal(4, 5, 16), normal(16, seed=1)
    agree(norm_act(x, scale), functional.silu(functional.rms_norm(x, (16,), scale, 1e-4)), [x, scale])


def test_far_from_zero_the_variance_is_not_lost() -> None:
    x = 1000 + normal(3, 512, dtype=torch.float32).detach()
    one, zero = torch.ones(512), torch.zeros(512)
    want = functional.layer_norm(x.double(), (512,), eps=1e-4).float()
    torch.testing.assert_close(norm_act(x, one, zero, norm="layer", act="none"), want, rtol=1e-3, atol=1e-3)


def test_a_shift_needs_a_layer_norm() -> None:
    x, one = torch.ones(2, 3), torch.ones(3)
    with pytest.raises(
        ValueError, match="norm_act: shift is a tensor, but None was expected, as norm is rms"
    ):
        norm_act(x, one, one)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm": "batch"}, "norm is 'batch', but one of rms, layer was expected"),
        ({"act": "gelu"}, "act is 'gelu', but one of none, tanh, silu, elu, relu was expected"),
        ({"eps": 0.0}, r"eps is 0.0, but a number in \(0, inf\) was expected"),
        ({"scale": torch.ones(4)}, r"scale is \(4,\), but \(3,\) was expected, as x is \(2, 3\)"),
        ({"x": torch.ones(())}, r"x is \(\), but \[..., D\] with D >= 1 was expected"),
    ],
)
def test_wrong_normalisations_say_what_is_wrong(changed: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"x": torch.ones(2, 3), "scale": torch.ones(3)}
    with pytest.raises(ValueError, match=f"norm_act: {message}"):
        norm_act(**{**arguments, **changed})  # type: ignore[arg-type]


# ---- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "D"), [(1, 1), (7, 5), (3, 700)])
def test_gru_gates_are_those_of_torch(N: int, D: int) -> None:
    cell = torch.nn.GRUCell(4, D, dtype=torch.float64)
    x, h = normal(N, 4), normal(N, D, seed=1)
    ours = gru_gates(
        functional.linear(x, cell.weight_ih, cell.bias_ih),
        functional.linear(h, cell.weight_hh, cell.bias_hh),
        h,
    )
    agree(ours, cell(x, h), [x, h, *cell.parameters()])


def test_blocks_hold_their_gates_side_by_side() -> None:
    gates, deter = normal(3, 24), normal(3, 8, seed=1)
    parts = []
    for k in range(2):
        reset, candidate, update = gates[:, 12 * k : 12 * (k + 1)].split(4, -1)
        h = deter[:, 4 * k : 4 * (k + 1)]
        u = torch.sigmoid(update - 1)
        parts.append(u * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - u) * h)
    agree(block_gru_gates(gates, deter, blocks=2), torch.cat(parts, -1), [gates, deter])
    same = block_gru_gates(gates.view(1, 3, 24), deter.view(1, 3, 8), blocks=2)
    assert torch.equal(same[0], block_gru_gates(gates, deter, blocks=2))


@pytest.mark.parametrize("D", [1, 5, 512, 700])
def test_one_mean_and_variance_for_all_gates(D: int) -> None:
    pre, deter = normal(4, 3 * D), normal(4, D, seed=1)
    scale, shift = normal(3 * D, seed=2), normal(3 * D, seed=3)
    q = functional.layer_norm(pre, (3 * D,), scale, shift, 1e-3)
    want = block_gru_gates(q, deter, blocks=1)
    agree(layernorm_gru_gates(pre, scale, shift, deter), want, [pre, scale, shift, deter], 1e-8)


def test_planets_cell() -> None:
    x, h = normal(5, 3), normal(5, 4, seed=1)
    w_gates, w_candidate = normal(8, 7, seed=2), normal(4, 7, seed=3)
    gates = functional.linear(torch.cat([x, h], -1), w_gates)
    reset, update = gates.sigmoid().split(4, -1)
    candidate = functional.linear(torch.cat([x, reset * h], -1), w_candidate)
    want = update * h + (1 - update) * candidate.tanh()
    mine = functional.linear(torch.cat([x, gru_block_reset(gates, h)], -1), w_candidate)
    agree(gru_block_update(gates, mine, h), want, [x, h, w_gates, w_candidate])


def test_saturated_gates_keep_or_replace_the_state() -> None:
    deter = normal(2, 3, dtype=torch.float32).detach()
    gates = torch.zeros(2, 9)
    gates[:, 6:] = 1e4
    assert torch.equal(block_gru_gates(gates, deter, blocks=1), torch.zeros(2, 3))
    gates[:, 6:] = -1e4
    assert torch.equal(block_gru_gates(gates, deter, blocks=1), deter)


def test_closed_gates_let_nothing_pass_however_large() -> None:
    """σ(-100) is 0, and not a tiny number that huge states would get through; 0·infinity is NaN."""
    closed = torch.tensor([[-100.0, 0.0], [-1e4, 0.0], [-math.inf, 0.0], [-100.0, 0.0], [0.0, 0.0]])
    deter = torch.tensor([[3e38], [-3e38], [3e38], [math.inf], [2.0]])
    want = torch.tensor([[0.0], [0.0], [0.0], [math.nan], [1.0]])
    torch.testing.assert_close(gru_block_reset(closed, deter), want, equal_nan=True)
    # Reset gate, candidate, update gate: half of the state stays, and of the candidate nothing may come.
    gates = torch.tensor([[-100.0, 3e38, 1.0], [-math.inf, -3e38, 1.0]])
    got = block_gru_gates(gates, torch.ones(2, 1), blocks=1)
    torch.testing.assert_close(got, torch.full((2, 1), 0.5))


@pytest.mark.parametrize("blocks", [0, -1, 3, 10**30])
def test_blocks_divide_the_state(blocks: int) -> None:
    with pytest.raises(ValueError, match=r"block_gru_gates: blocks is .*, but a divisor of 8 was expected"):
        block_gru_gates(torch.zeros(2, 24), torch.zeros(2, 8), blocks=blocks)


# ---- one-hot layers --------------------------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("M", "U", "S", "K"), [(1, 1, 1, 1), (5, 70, 4, 32), (90, 130, 3, 32), (33, 9, 2, 256)]
)
def test_equals_the_dense_layer(M: int, U: int, S: int, K: int, biased: bool, dtype: torch.dtype) -> None:
    index = torch.randint(K, (M, S), generator=torch.Generator().manual_seed(0))
    weight, bias = normal(U, S * K, dtype=dtype), normal(U, dtype=dtype, seed=1) if biased else None
    dense = functional.linear(functional.one_hot(index, K).flatten(-2).to(dtype), weight, bias)
    inputs = [weight] if bias is None else [weight, bias]
    agree(one_hot_linear(index.to(torch.uint8), weight, bias), dense, inputs, 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("wants_gradient", [False, True])
@pytest.mark.parametrize("rows", [4, 40])
def test_an_index_that_is_no_class_is_named(rows: int, wants_gradient: bool, reference: bool) -> None:
    index = torch.zeros(rows, 3, dtype=torch.uint8)
    index[2, 1] = 5
    weight = torch.zeros(6, 15, requires_grad=wants_gradient)
    message = "one_hot_linear: index is 5 in row 2, but 0 <= index < 5 was expected"
    if not reference:
        with pytest.raises(ValueError, match=message):
            one_hot_linear(index, weight)
    else:
        with _native.disabled(), pytest.raises(ValueError, match=message):
            one_hot_linear(index, weight)


def test_only_bytes_are_indices() -> None:
    with pytest.raises(
        TypeError, match=r"one_hot_linear: index is torch.int64, but one of uint8 was expected"
    ):
        one_hot_linear(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 15))
    with pytest.raises(
        ValueError, match=r"weight is \(4, 16\), but \[U, 3 \* K\] with U, K >= 1 was expected"
    ):
        one_hot_linear(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(4, 16))


# ---- all of them -----------------------------------------------------------------------------------------------------


def calls(M: int, D: int) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """One call of every op with M rows of D, and its inputs."""
    f32 = torch.float32
    x, wide, double = normal(M, D, dtype=f32), normal(M, 3 * D, dtype=f32), normal(M, 2 * D, dtype=f32)
    scale, shift = normal(D, dtype=f32), normal(D, dtype=f32)
    scales, shifts = normal(3 * D, dtype=f32), normal(3 * D, dtype=f32)
    weight, bias = normal(D, 12, dtype=f32), normal(D, dtype=f32)
    index = torch.randint(4, (M, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return {
        "norm_act": (norm_act(x, scale, shift, norm="layer"), [x, scale, shift]),
        "block_gru_gates": (block_gru_gates(wide, x, blocks=1), [wide, x]),
        "layernorm_gru_gates": (layernorm_gru_gates(wide, scales, shifts, x), [wide, scales, shifts, x]),
        "gru_gates": (gru_gates(wide, wide, x), [wide, x]),
        "gru_block_reset": (gru_block_reset(double, x), [double, x]),
        "gru_block_update": (gru_block_update(double, x, x), [double, x]),
        "one_hot_linear": (one_hot_linear(index, weight, bias), [weight, bias]),
    }


def test_no_rows_give_zero_gradients() -> None:
    for name, (y, inputs) in calls(0, 4).items():
        assert y.shape == (0, 4), name
        for x, grad in zip(inputs, torch.autograd.grad(y.sum(), inputs), strict=True):
            assert grad.shape == x.shape, name
            assert not grad.any(), name


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = calls(1000, 300)
            results.append([torch.autograd.grad(y.square().sum(), inputs) for y, inputs in found.values()])
        for one, two in zip(*results, strict=True):
            for a, b in zip(one, two, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["norm_act", "layernorm_gru_gates", "one_hot_linear"])
def test_sums_over_many_rows_are_exact_enough(name: str) -> None:
    """As many rows as a batch of images has pixels."""
    y, inputs = calls(20_000, 8)[name]
    got = torch.autograd.grad(y.square().sum(), inputs)
    exact, wide = (
        {
            "norm_act": lambda x, scale, shift: norm_act(x, scale, shift, norm="layer"),
            "layernorm_gru_gates": layernorm_gru_gates,
        }.get(name),
        [x.detach().double().requires_grad_() for x in inputs],
    )
    if exact is None:
        index = torch.randint(4, (20_000, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        exact = lambda weight, bias: one_hot_linear(index, weight, bias)  # noqa: E731
    want = torch.autograd.grad(exact(*wide).square().sum(), wide)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
