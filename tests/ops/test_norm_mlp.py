"""What DreamerV3's perceptrons in one call promise beyond the tests that the table of ops drives."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pywm.nn import NormMLP
from pywm.ops import _native, norm_mlp


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layers(
    *sizes: int, linear: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    pairs = list(itertools.pairwise(sizes))
    weights = [normal(b, a, dtype=dtype, seed=i) / a**0.5 for i, (a, b) in enumerate(pairs)]
    biases = [0.3 * normal(b, dtype=dtype, seed=20 + i) for i, (_, b) in enumerate(pairs)]
    scales = [1 + 0.3 * normal(b, dtype=dtype, seed=40 + i) for i, (_, b) in enumerate(pairs)]
    return weights, biases, scales[:-1] if linear else scales


def step_by_step(x: Tensor, weights: list[Tensor], biases: list[Tensor], scales: list[Tensor]) -> Tensor:
    """In torch's own functions."""
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = functional.linear(x, weight, bias)
        if i < len(scales):
            x = functional.silu(functional.rms_norm(x, x.shape[-1:], scales[i], 1e-4))
    return x


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    return list(torch.autograd.grad(y, inputs, weight))


def with_grad(*groups: list[Tensor]) -> list[Tensor]:
    return [x.requires_grad_() for group in groups for x in group]


# From rows that no weight is packed for, over pieces of all loops, to several blocks of rows and more than one thread.
@pytest.mark.parametrize("rows", [1, 4, 5, 48, 49, 700, 3000])
@pytest.mark.parametrize(
    "sizes", [(7, 64, 64, 255), (70, 33, 17, 1), (3, 130), (200, 96, 97, 98, 5)], ids=str
)
def test_equals_torchs_own_functions(rows: int, sizes: tuple[int, ...]) -> None:
    x, parts = normal(rows, sizes[0]), layers(*sizes)
    inputs = with_grad([x], *parts)
    got, want = norm_mlp(x, *parts), step_by_step(x, *parts)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 3, 50, 1000])
@pytest.mark.parametrize(("groups", "classes"), [(1, 1), (3, 5), (32, 4), (5, 255)])
@pytest.mark.parametrize("linear", [True, False])
def test_an_index_is_its_one_hot_vectors(rows: int, groups: int, classes: int, linear: bool) -> None:
    x, parts = normal(rows, 10), layers(10 + groups * classes, 65, 6, linear=linear)
    index = torch.randint(classes, (rows, groups), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    inputs = with_grad([x], *parts)
    before = _native.calls()
    got = norm_mlp(x, *parts, index=index)
    one_hot = functional.one_hot(index.long(), classes).flatten(-2).double()
    want = step_by_step(torch.cat([x, one_hot], -1), *parts)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    after = _native.calls()
    assert all(after[name][0] == before[name][0] + 1 for name in ("norm_mlp", "norm_mlp_backward"))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x, parts = normal(3000, 40, dtype=torch.float32), layers(64, 64, 64, 255, dtype=torch.float32)
            index = torch.full((3000, 6), 3, dtype=torch.uint8)
            inputs = with_grad([x], *parts)
            y = norm_mlp(x, *parts, index=index)
            found.append([y, *gradients(y, inputs)])
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_frozen_parts_and_unwanted_gradients() -> None:
    x, parts = normal(60, 8), layers(8, 16, 3)
    with_grad(*parts)
    full = gradients(norm_mlp(x, *parts), [p for part in parts for p in part])
    x.requires_grad_()
    for p in (p for part in parts for p in part):
        p.requires_grad_(False)
    (alone,) = gradients(norm_mlp(x, *parts), [x])
    assert alone.abs().sum() > 0
    parts[0][0].requires_grad_()
    torch.testing.assert_close(gradients(norm_mlp(x.detach(), *parts), [parts[0][0]])[0], full[0])


def test_more_layers_than_the_kernel_has_go_one_by_one() -> None:
    sizes = (4,) * 19
    x, parts = normal(9, 4), layers(*sizes)
    inputs = with_grad([x], *parts)
    got, want = norm_mlp(x, *parts), step_by_step(x, *parts)
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("classes", [3, 9])
def test_an_index_that_is_no_class_is_named(classes: int) -> None:
    x, parts = normal(6, 4), layers(4 + 2 * classes, 5, 2)
    index = torch.zeros(6, 2, dtype=torch.uint8)
    index[4, 1] = classes
    for disabled in (False, True):
        with (
            _native.disabled() if disabled else contextlib.nullcontext(),
            pytest.raises(ValueError, match=rf"index is {classes} in row 4, but 0 <="),
        ):
            norm_mlp(x, *parts, index=index)


def bad_calls():  # type: ignore[no-untyped-def]
    x, (w, b, s) = normal(6, 4), layers(4, 5, 2)
    index = torch.zeros(6, 2, dtype=torch.uint8)
    yield TypeError, "norm_mlp: x is a list", ([1.0], w, b, s), {}
    yield ValueError, r"norm_mlp: x is \(\), but \[..., I\] with I >= 1", (torch.zeros(()), w, b, s), {}
    yield TypeError, "norm_mlp: scales is a Tensor, but a list", (x, w, b, s[0]), {}
    yield ValueError, "norm_mlp: weights is empty", (x, [], [], []), {}
    yield ValueError, "norm_mlp: biases is a list of 1, but 2", (x, w, b[:1], s), {}
    yield ValueError, "norm_mlp: scales is a list of 0, but 2 or 1 was expected", (x, w, b, []), {}
    yield ValueError, r"norm_mlp: weights\[0\] is \(5, 4\), but \[out, 3\]", (x[:, :3], w, b, s), {}
    yield ValueError, r"norm_mlp: scales\[0\] is \(2,\), but \(5,\) was expected", (x, w, b, [s[0][:2]]), {}
    yield TypeError, r"norm_mlp: biases\[1\] is torch.float32, but x is", (x, w, [b[0], b[1].float()], s), {}
    yield ValueError, "norm_mlp: eps is 0.0, but", (x, w, b, s), {"eps": 0.0}
    yield TypeError, "norm_mlp: index is torch.int64, but", (x, w, b, s), {"index": index.long()}
    yield ValueError, r"norm_mlp: index is \(5, 2\), but \(6, 'S'\)", (x, w, b, s), {"index": index[:5]}
    yield ValueError, r"norm_mlp: weights\[0\] is \(5, 4\), but \[out, 4 \+ 2", (x, w, b, s), {"index": index}
    wide = [torch.zeros(5, 4 + 2 * 257), w[1]]
    yield (
        ValueError,
        "with 1 <= K <= 256 was expected",
        (x, [t.double() for t in wide], b, s),
        {"index": index},
    )


@pytest.mark.parametrize(("error", "message", "arguments", "options"), [*bad_calls()])
def test_bad_calls_say_what_is_wrong(error, message, arguments, options) -> None:  # type: ignore[no-untyped-def]
    for disabled in (False, True):
        with (
            _native.disabled() if disabled else contextlib.nullcontext(),
            pytest.raises(error, match=message),
        ):
            norm_mlp(*arguments, **options)


def test_the_module_takes_indices_unless_its_products_are_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    net = NormMLP((4 + 2 * 3, 16), 2, generator=generator)
    x, index = normal(5, 4, dtype=torch.float32), torch.ones(5, 2, dtype=torch.uint8)
    one_hot = functional.one_hot(index.long(), 3).flatten(-2).float()
    assert net.gathers
    torch.testing.assert_close(net(x, index), net(torch.cat([x, one_hot], -1)))
    with _native.disabled():
        assert not net.gathers
        torch.testing.assert_close(net(x, index), net(torch.cat([x, one_hot], -1)))
    rounded = NormMLP((4 + 2 * 3, 16), 2, operands="bfloat16", generator=generator)
    assert not rounded.gathers
    with pytest.raises(ValueError, match="NormMLP: index came, but none was expected"):
        rounded(x, index)
