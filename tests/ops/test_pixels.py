"""What the ops on pixels promise beside their gradients: losses cut off, stacks, areas, starts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional

from pywm.ops import (
    _native,
    philox_uniform,
    pixel_cross_entropy,
    reference,
    resize_area,
    sample_starts,
    stack_frames,
)


@contextlib.contextmanager
def kernels(name: str, device: str, count: int = 1) -> Iterator[None]:
    column = 0 if device == "cpu" else 1
    before = _native.calls()[name][column]
    yield
    assert _native.calls()[name][column] - before == count


def bytes_of(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=g, dtype=torch.uint8)


# ---- pixel_cross_entropy ---------------------------------------------------------------------------------------------


def pixels(rows: int, K: int, dtype: torch.dtype = torch.float32, sure: float = 0.0):
    g = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, K, generator=g, dtype=dtype)
    target = torch.randint(K, (rows,), generator=g).to(torch.uint8)
    logits[torch.arange(rows), target.long()] += sure
    return logits, target


def test_is_torchs_loss_less_the_cutoff(device):
    logits, target = pixels(300, 256)
    logits[::3] *= 10
    logits[torch.arange(0, 300, 2), target[::2].long()] += 20
    got = pixel_cross_entropy(logits.to(device), target.to(device), cutoff=0.5)
    want = (functional.cross_entropy(logits.double(), target.long(), reduction="none") - 0.5).relu()
    assert 0 < int((want == 0).sum()) < 300
    torch.testing.assert_close(got.cpu(), want.float(), rtol=1e-5, atol=1e-5)


def test_the_gradient_is_exactly_zero_where_the_loss_is_cut_off(device):
    logits, target = pixels(200, 256, sure=9.0)
    logits = logits.to(device).requires_grad_()
    loss = pixel_cross_entropy(logits, target.to(device))
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    zero = (grad == 0).all(-1)
    assert torch.equal(zero, loss == 0)
    assert 20 < int(zero.sum()) < 180
    assert (grad[~zero] != 0).all()


def test_all_below_the_cutoff_gives_no_gradient_at_all(device):
    logits, target = pixels(50, 256, sure=30.0)
    logits = logits.to(device).requires_grad_()
    loss = pixel_cross_entropy(logits, target.to(device))
    (grad,) = torch.autograd.grad(loss.mean(), logits)
    assert not loss.any()
    assert not grad.any()


@pytest.mark.parametrize("offset", [-1e4, 1e4, 1e6])
def test_logits_that_are_all_large_lose_nothing(offset, device):
    logits, target = pixels(60, 256)
    shifted = (logits.double() + offset).float()
    exact = shifted.double().requires_grad_()
    want = reference.pixel_cross_entropy(exact, target, 0.03)
    leaf = shifted.to(device).requires_grad_()
    loss = pixel_cross_entropy(leaf, target.to(device))
    torch.testing.assert_close(loss.detach().cpu(), want.detach().float(), rtol=1e-5, atol=1e-5)
    (got,), (grad,) = torch.autograd.grad(loss.sum(), leaf), torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(got.cpu(), grad.float(), rtol=1e-5, atol=1e-6)


def test_a_target_of_probability_zero_has_an_infinite_loss_and_a_finite_gradient(device):
    logits, target = pixels(4, 256)
    logits[1, target[1].long()] = -math.inf
    leaf = logits.to(device).requires_grad_()
    loss = pixel_cross_entropy(leaf, target.to(device))
    assert loss.isinf().tolist() == [False, True, False, False]
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    softmax = logits.softmax(-1)
    softmax[torch.arange(4), target.long()] -= 1
    torch.testing.assert_close(grad.cpu(), softmax)


def test_nothing_is_as_large_as_the_logits_but_their_gradient():
    """What autograd keeps: the logits, the targets and the losses."""
    logits, target = pixels(64, 256)
    kept = []

    def note(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        pixel_cross_entropy(logits.requires_grad_(), target).mean()
    assert sum(x.data_ptr() == logits.data_ptr() for x in kept) == 1
    own = sum(x.numel() * x.element_size() for x in kept if x.data_ptr() != logits.data_ptr())
    assert own <= 0.02 * logits.numel() * logits.element_size()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3, 257)}, ValueError, r"logits is \(3, 257\), but \[..., K\] with 1 <= K <= 256"),
        ({"logits": torch.zeros(3, 0)}, ValueError, r"logits is \(3, 0\)"),
        ({"logits": torch.zeros(())}, ValueError, r"logits is \(\)"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, TypeError, "target is torch.int64, but one of uint8"),
        ({"target": torch.zeros(4, dtype=torch.uint8)}, ValueError, r"target is \(4,\), but \(3,\) was expected"),
        ({"target": torch.tensor([0, 7, 9], dtype=torch.uint8)}, ValueError, "target is 7 in row 1, but 0 <= target < 5"),
        ({"cutoff": -0.1}, ValueError, "cutoff is -0.1, but a number in"),
        ({"cutoff": math.inf}, ValueError, "cutoff is inf"),
        ({"cutoff": None}, TypeError, "cutoff is a NoneType"),
    ],
)  # fmt: skip
def test_bad_pixels_are_named(change, error, message):
    arguments = {"logits": torch.zeros(3, 5), "target": torch.zeros(3, dtype=torch.uint8), **change}
    with pytest.raises(error, match=f"pixel_cross_entropy: {message}"):
        pixel_cross_entropy(**arguments)


# ---- stack_frames ----------------------------------------------------------------------------------------------------


def stacked(storage, row, env, first, stack):
    """The definition, one frame at a time."""
    return [
        torch.cat([storage[max(int(t) - j, int(f)), int(n)] for j in range(stack - 1, -1, -1)])
        for t, n, f in zip(row, env, first, strict=True)
    ]


@pytest.mark.parametrize("stack", [1, 3, 4])
@pytest.mark.parametrize("N", [1, 5])
def test_a_stack_ends_at_its_index_and_begins_in_its_episode(stack, N, device):
    storage = bytes_of(20, N, 3, 7, 5)
    row, first = torch.tensor([0, 2, 9, 19, 12, 19]), torch.tensor([0, 0, 3, 19, 11, 0])
    env = torch.arange(6) % N
    want = torch.stack(stacked(storage, row, env, first, stack))
    arguments = [x.to(device) for x in (storage.flatten(0, 1), row * N + env, first * N + env)]
    with kernels("stack_frames", device, 3):
        raw = stack_frames(*arguments, stack=stack, stride=N, dtype=torch.uint8)
        assert torch.equal(raw.cpu(), want)
        for dtype in (torch.float32, torch.float64):
            got = stack_frames(*arguments, stack=stack, stride=N, dtype=dtype)
            torch.testing.assert_close(got.cpu(), want.to(dtype) / 255)
    assert raw.shape == (6, stack * 3, 7, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 5), (3, 210, 160), (1, 300, 200)])
def test_kernel_and_reference_agree_on_stacks(shape, standardize, dtype, device):
    frames = bytes_of(9, *shape)
    frames[1] = 200  # of one colour: no deviation
    frames[2] = 200
    frames[2, 0, 0, 0] = 201
    frames[3] = 0
    index, first = torch.tensor([8, 3, 0, 5]), torch.tensor([2, 1, 0, 5])
    noise = torch.randn(4, 4 * shape[0], *shape[1:], dtype=dtype, generator=torch.Generator().manual_seed(1))
    arguments = {"standardize": standardize, "noise": noise, "dtype": dtype, "scale": 0.25}
    with _native.disabled():
        want = stack_frames(
            frames, index, first, **{**arguments, "noise": noise.double(), "dtype": torch.float64}
        )
    with kernels("stack_frames", device):
        got = stack_frames(
            frames.to(device), index.to(device), first.to(device), **{**arguments, "noise": noise.to(device)}
        )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got.cpu(), want.to(dtype), rtol=tolerance, atol=tolerance)


def test_standardised_frames_have_no_mean_and_a_deviation_of_one(device):
    frames = bytes_of(6, 3, 40, 30).to(device)
    index = torch.arange(6, device=device)
    y = stack_frames(frames, index, index, stack=2, standardize=True).double()
    torch.testing.assert_close(y.mean((-1, -2)), torch.zeros_like(y[..., 0, 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.var((-1, -2), unbiased=False), torch.ones_like(y[..., 0, 0]))
    flat = stack_frames(torch.full_like(frames, 77), index, index, standardize=True)
    assert not flat.any()


def test_no_stacks_are_an_empty_tensor_and_strided_frames_are_read_as_they_are(device):
    frames = bytes_of(8, 2, 6, 9).to(device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert stack_frames(frames, none, none).shape == (0, 8, 6, 9)
    index, first = torch.tensor([7, 4], device=device), torch.tensor([4, 4], device=device)
    wide = torch.stack([frames, frames], -1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(stack_frames(wide, index, first), stack_frames(frames, index, first))


STACK = {
    "frames": torch.zeros(6, 1, 4, 4, dtype=torch.uint8),
    "index": torch.tensor([3, 5]),
    "first": torch.tensor([1, 5]),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"frames": torch.zeros(6, 1, 4, 4)}, TypeError, "frames is torch.float32, but one of uint8"),
        ({"frames": torch.zeros(6, 4, 4, dtype=torch.uint8)}, ValueError, r"frames is \(6, 4, 4\)"),
        ({"index": torch.tensor([3, 5], dtype=torch.int32)}, TypeError, "index is torch.int32"),
        ({"index": torch.tensor([3, 6])}, ValueError, "index is 6 in place 1, but a row of the storage, 0 <= index < 6"),
        ({"index": torch.tensor([-1, 5])}, ValueError, "index is -1 in place 0"),
        ({"first": torch.tensor([1])}, ValueError, r"first is \(1,\), but \(2,\) was expected"),
        ({"first": torch.tensor([4, 5])}, ValueError, "first is 4 in place 0, whose index is 3"),
        ({"first": torch.tensor([2, 5]), "stride": 2}, ValueError, "first is 2 in place 0, whose index is 3, but a multi"),
        ({"stack": 0}, ValueError, "stack is 0"),
        ({"stride": 0}, ValueError, "stride is 0"),
        ({"scale": math.nan}, ValueError, "scale is nan"),
        ({"scale": math.inf}, ValueError, "scale is inf"),
        ({"standardize": 1}, TypeError, "standardize is a int, but a bool"),
        ({"noise": torch.zeros(2, 4, 4, 5)}, ValueError, r"noise is \(2, 4, 4, 5\), but \(2, 4, 4, 4\) was expected"),
        ({"noise": torch.zeros(2, 4, 4, 4).double()}, TypeError, "noise is torch.float64, but torch.float32"),
        ({"dtype": torch.float16}, TypeError, "dtype is torch.float16, but float32, float64 or uint8"),
        ({"dtype": torch.uint8, "standardize": True}, ValueError, "standardize is True, but nothing that changes bytes"),
        ({"dtype": torch.uint8, "noise": torch.zeros(2, 4, 4, 4)}, ValueError, "noise is a Tensor, but nothing"),
    ],
)  # fmt: skip
def test_bad_stacks_are_named(change, error, message):
    with pytest.raises(error, match=f"stack_frames: {message}"):
        stack_frames(**{**STACK, **change})


# ---- resize_area -----------------------------------------------------------------------------------------------------

SIZES = [
    ((210, 160), (105, 80)),
    ((210, 160), (84, 84)),
    ((210, 160), (64, 64)),
    ((210, 160), (42, 40)),
    ((84, 84), (83, 79)),
    ((33, 47), (5, 31)),
    ((17, 300), (17, 7)),
    ((1, 1), (1, 1)),
    ((5, 5), (1, 1)),
    ((64, 64), (64, 64)),
]


@pytest.mark.parametrize(("before", "after"), SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_is_opencvs_inter_area_within_one(before, after, channels, device):
    cv2 = pytest.importorskip(
        "cv2", reason="opencv-python-headless is not installed: nothing to compare with"
    )
    frame = bytes_of(channels, *before)
    frame[:, : before[0] // 2] = frame[:, : before[0] // 2] // 200 * 255  # edges, too
    got = resize_area(frame.to(device), after).cpu().numpy().astype(int)
    want = cv2.resize(frame.permute(1, 2, 0).numpy(), after[::-1], interpolation=cv2.INTER_AREA)
    want = want.reshape(*after, channels).transpose(2, 0, 1).astype(int)
    assert np.abs(got - want).max() <= 1


@pytest.mark.parametrize(("before", "after"), SIZES, ids=str)
def test_kernel_and_reference_agree_on_areas_to_the_bit(before, after, device):
    frames = bytes_of(2, 3, *before)
    frames[0, 0], frames[0, 1] = 255, 0
    frames[0, 2] = (torch.arange(before[0]).unsqueeze(-1) + torch.arange(before[1])) % 2  # halves, at 2 x 2
    with kernels("resize_area", device):
        got = resize_area(frames.to(device), after)
    with _native.disabled():
        assert torch.equal(got.cpu(), resize_area(frames, after))
    assert (got[0, 0] == 255).all()
    assert not got[0, 1].any()


def test_large_pictures_do_not_overflow(device):
    frame = torch.full((1, 4000, 5000), 255, dtype=torch.uint8)
    frame[:, :, ::2] = 254
    got = resize_area(frame.to(device), (3, 7)).cpu()
    with _native.disabled():
        assert torch.equal(got, resize_area(frame, (3, 7)))
    assert got.min() >= 254


def test_threads_and_shapes_do_not_change_areas():
    frames = bytes_of(40, 2, 105, 80)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(resize_area(frames, (50, 31)))
        assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(resize_area(frames[7, 1], (50, 31)), results[0][7, 1])
    assert resize_area(frames[:0], (50, 31)).shape == (0, 2, 50, 31)
    assert torch.equal(resize_area(frames.mT, (31, 50)), results[0].mT)


@pytest.mark.parametrize(
    ("frames", "size", "error", "message"),
    [
        (torch.zeros(4, 4), (2, 2), TypeError, "frames is torch.float32, but one of uint8"),
        (
            torch.zeros(4, dtype=torch.uint8),
            (2, 2),
            ValueError,
            r"frames is \(4,\), but \[..., height, width\]",
        ),
        (torch.zeros(0, 4, dtype=torch.uint8), (1, 2), ValueError, r"frames is \(0, 4\)"),
        (bytes_of(4, 4), (5, 4), ValueError, r"size\[0\] is 5, but an int in \[1, 4\]"),
        (bytes_of(4, 4), (4, 0), ValueError, r"size\[1\] is 0"),
        (bytes_of(4, 4), (2.0, 2), TypeError, r"size\[0\] is a float"),
        (bytes_of(4, 4), 2, TypeError, r"size is 2, but \(height, width\)"),
        (bytes_of(4, 4), (2, 2, 2), TypeError, r"size is \(2, 2, 2\)"),
    ],
)
def test_bad_pictures_are_named(frames, size, error, message):
    with pytest.raises(error, match=f"resize_area: {message}"):
        resize_area(frames, size)


# ---- sample_starts ---------------------------------------------------------------------------------------------------


def flags(T: int, N: int, seed: int = 0, lasts: bool = True, holes: bool = False):
    """Episodes of different lengths, whose last rows may be stored, and rows that hold nothing."""
    g = torch.Generator().manual_seed(seed)
    is_first = torch.rand(T, N, generator=g) < 0.15
    is_first[0] = torch.rand(N, generator=g) < 0.5
    is_last = torch.cat([is_first[1:], torch.zeros(1, N, dtype=torch.bool)]) if lasts else None
    valid = torch.rand(T, N, generator=g) < 0.9 if holes else None
    return is_first, is_last, valid


def starts(is_first, is_last, valid, stack, beginnings=False) -> list[tuple[int, int]]:
    """The definition, one row at a time."""
    T, N = is_first.shape
    found = []
    for t in range(T):
        for n in range(N):
            rows = range(t - stack + 1, t + 1)
            holds = [r >= 0 and (valid is None or bool(valid[r, n])) for r in ((t,) if beginnings else rows)]
            if not all(holds) or (is_last is not None and is_last[t, n]):
                continue
            if is_first[t, n] if beginnings else not any(is_first[r, n] for r in rows[1:]):
                found.append((t, n))
    return found


@pytest.mark.parametrize("stack", [1, 2, 4])
@pytest.mark.parametrize("shape", [(1, 1), (30, 1), (50, 7), (700, 13)])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("lasts", [False, True])
def test_starts_are_those_of_the_definition_and_all_of_them(stack, shape, holes, lasts, device):
    is_first, is_last, valid = flags(*shape, lasts=lasts, holes=holes)
    inside = starts(is_first, is_last, valid, stack)
    begins = starts(is_first, is_last, valid, 1, beginnings=True)
    masks = [None if x is None else x.to(device) for x in (is_first, is_last, valid)]

    def draw(uniform, beginning):
        given = torch.tensor(uniform, dtype=torch.float64, device=device)
        return sample_starts(given, masks[0], masks[1], stack=stack, valid=masks[2], beginning=beginning)

    if inside:
        # A number in the middle of each start's share draws that one.
        got = draw([(i + 0.5) / len(inside) for i in range(len(inside))], False)
        assert list(zip(got.row.tolist(), got.env.tolist(), strict=True)) == inside
        assert torch.equal(got.first, got.row - stack + 1)
    if begins:
        for i, place in enumerate(begins):
            got = draw([(i + 0.5) / len(begins)], True)
            assert (int(got.row), int(got.env), int(got.first)) == (*place, place[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_kernel_and_reference_draw_the_same(dtype, device):
    for seed in range(5):
        is_first, is_last, valid = flags(200 + 900 * seed, 5, seed, lasts=seed % 2 == 0, holes=seed % 3 == 0)
        uniform = torch.rand(64, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        uniform[:6] = torch.tensor(
            [0.5, 0.0, 1.0, -3.0, 7.0, math.nan]
        )  # what is no uniform number draws an end
        masks = [None if x is None else x.to(device) for x in (is_first, is_last, valid)]
        with kernels("sample_starts", device):
            got = sample_starts(uniform.to(device), masks[0], masks[1], valid=masks[2])
        with _native.disabled():
            want = sample_starts(uniform, is_first, is_last, valid=valid)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.cpu(), b)


def test_the_stacks_that_start_cross_no_reset_and_the_first_is_a_true_beginning(device):
    T, N, stack = 300, 6, 4
    is_first, is_last, _ = flags(T, N)
    # A frame tells its episode and its row.
    episode = is_first.long().cumsum(0)
    storage = torch.stack([episode, torch.arange(T).unsqueeze(-1).expand(T, N) % 256], -1)
    storage = storage.to(torch.uint8).view(T, N, 2, 1, 1).to(device)
    for seed in range(20):
        uniform = philox_uniform(seed, 0, (1, 1, 16), device=device)[0, 0]
        s = sample_starts(uniform, is_first.to(device), is_last.to(device), stack=stack)
        frames = stack_frames(
            storage.flatten(0, 1), s.row * N + s.env, s.first * N + s.env, stride=N, stack=stack, dtype=torch.uint8
        ).view(16, stack, 2).cpu()  # fmt: skip
        assert (frames[:, :, 0] == frames[:, :1, 0]).all()
        assert is_first[s.row[0].cpu(), s.env[0].cpu()]
        assert (frames[0] == frames[0, :1]).all()
        steps = (frames[1:, 1:, 1].long() - frames[1:, :-1, 1].long()) % 256
        assert (steps == 1).all()


def test_starts_are_drawn_alike(device):
    is_first, is_last, _ = flags(20, 3)
    count = len(starts(is_first, is_last, None, 4))
    uniform = philox_uniform(3, 0, (1, 1, 100 * count), device=device)[0, 0]
    s = sample_starts(uniform, is_first.to(device), is_last.to(device), beginning=False)
    hits = (s.row * 3 + s.env).cpu().bincount(minlength=60)
    hits = hits[hits > 0].double()
    assert len(hits) == count
    assert ((hits - 100) ** 2 / 100).sum() < count + 5 * (2 * count) ** 0.5


def test_where_there_is_no_start_an_error_says_so():
    is_first = torch.zeros(6, 2, dtype=torch.bool)
    uniform = torch.rand(3)
    with pytest.raises(
        ValueError, match="is_first is nowhere true, but a row that begins an episode was expected"
    ):
        sample_starts(uniform, is_first)
    assert sample_starts(uniform, is_first, beginning=False).row.min() >= 3
    is_first[0] = True
    with pytest.raises(ValueError, match="stack is 7, but a number of rows"):
        sample_starts(uniform, is_first, stack=7)
    with pytest.raises(ValueError, match="stack is 4, but a number of rows"):
        sample_starts(uniform, is_first, torch.ones_like(is_first), beginning=False)


START = {"uniform": torch.rand(3), "is_first": torch.ones(6, 2, dtype=torch.bool), "stack": 1}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"uniform": torch.zeros(3, 1)}, ValueError, r"uniform is \(3, 1\), but \[B\]"),
        ({"uniform": torch.zeros(3, dtype=torch.float16)}, TypeError, "uniform is torch.float16"),
        ({"is_first": torch.zeros(6, dtype=torch.bool)}, ValueError, r"is_first is \(6,\), but \[T, N\]"),
        ({"is_first": torch.zeros(0, 2, dtype=torch.bool)}, ValueError, r"is_first is \(0, 2\)"),
        ({"is_first": torch.zeros(6, 2)}, TypeError, "is_first is torch.float32, but one of bool"),
        ({"is_last": torch.zeros(6, 3, dtype=torch.bool)}, ValueError, r"is_last is \(6, 3\), but \(6, 2\) was expected"),
        ({"valid": torch.zeros(6, 2)}, TypeError, "valid is torch.float32"),
        ({"stack": 0}, ValueError, "stack is 0"),
        ({"beginning": None}, TypeError, "beginning is a NoneType, but a bool"),
    ],
)  # fmt: skip
def test_bad_starts_are_named(change, error, message):
    with pytest.raises(error, match=f"sample_starts: {message}"):
        sample_starts(**{**START, **change})


# ---- all of them -----------------------------------------------------------------------------------------------------


def _stack(x):
    index = torch.tensor([3, 5])
    return stack_frames(x, index, index - 2, noise=torch.ones(2, 8, 6, 8))


CALLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "stack_frames": _stack,
    "stack_frames_bytes": lambda x: stack_frames(
        x, torch.tensor([3, 5]), torch.tensor([1, 5]), dtype=torch.uint8
    ),
    "resize_area": lambda x: resize_area(x, (4, 3)),
    "sample_starts": lambda x: (
        sample_starts(x.flatten()[:5] / 256, x[0, 0] > 200, x[0, 1] > 200, stack=2).row
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_graph_break(name):
    torch.compiler.reset()
    x = bytes_of(6, 2, 6, 8)
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), CALLS[name](x))


def test_compiled_calls_are_checked_too():
    """What a tracer cannot look at, the kernel's caller does."""
    torch.compiler.reset()
    index, frames = torch.tensor([3, 6]), bytes_of(6, 1, 4, 4)
    gather = torch.compile(stack_frames, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="index is 6 in place 1"):
        gather(frames, index, index)
    none = torch.zeros(4, 2, dtype=torch.bool)
    draw = torch.compile(lambda x: sample_starts(torch.ones(3), x), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="is_first is nowhere true"):
        draw(none)
    loss = torch.compile(pixel_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="target is 7 in row 1"):
        loss(torch.zeros(3, 5), torch.tensor([0, 7, 9], dtype=torch.uint8))


@pytest.mark.parametrize("name", ["stack_frames", "stack_frames_bytes", "resize_area", "sample_starts"])
def test_opcheck(name):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        seen = None

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "pywm":
                self.seen = func, args
            return func(*args, **(kwargs or {}))

    with Recorder() as recorder:
        CALLS[name](bytes_of(6, 2, 6, 8))
    assert recorder.seen is not None
    torch.library.opcheck(*recorder.seen)
