"""What random numbers by counting promise."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch

from pywm.ops import _native, philox_normal, philox_uniform, reference

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])

# Of Random123's kat_vectors, for Philox4x32 with 10 rounds: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@contextlib.contextmanager
def kernels(device: str, count: int = 1) -> Iterator[None]:
    column = 0 if device == "cpu" else 1
    before = _native.calls()["philox"][column]
    yield
    assert _native.calls()["philox"][column] - before == count


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_reference_gives_the_published_words(counter, key, words):
    key = key if key < 2**63 else key - 2**64
    got = reference.philox_words(*(torch.tensor(c) for c in counter), key)
    assert tuple(int(w) for w in got) == words


def test_the_kernel_gives_the_published_words(device):
    counter, key, words = KNOWN[0]
    with kernels(device):
        got = philox_uniform(key, counter[1], (1, 1, 4), stream=counter[2], device=device)
    assert got.flatten().tolist() == [(w >> 8) / 2**24 for w in words]


@both_dtypes
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1, 0x299F31D0A4093822])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 2, 5), (1, 70, 4), (65, 3, 30), (2, 1, 257), (0, 3, 2), (2, 3, 0)]
)
def test_kernel_and_reference_agree(seed, shape, dtype, device):
    for offset, stream in ((0, 0), (7, 3), (2**32 - shape[0], 2**32 - 1)):
        arguments = {"stream": stream, "dtype": dtype}
        with kernels(device, 1 if math.prod(shape) else 0):
            uniform = philox_uniform(seed, offset, shape, device=device, **arguments)
        normal = philox_normal(seed, offset, shape, device=device, **arguments)
        with _native.disabled():
            torch.testing.assert_close(
                uniform.cpu(), philox_uniform(seed, offset, shape, **arguments), rtol=0, atol=0
            )
            want = philox_normal(seed, offset, shape, stream=stream, dtype=torch.float64)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(normal.cpu(), want.to(dtype), rtol=tolerance, atol=tolerance)


def test_a_number_depends_on_its_own_place_alone(device):
    whole = philox_uniform(5, 10, (6, 200, 33), stream=2, device=device)
    torch.testing.assert_close(
        philox_uniform(5, 12, (3, 70, 6), stream=2, device=device), whole[2:5, :70, :6]
    )
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            again = philox_uniform(5, 10, (6, 200, 33), stream=2, device=device)
            torch.testing.assert_close(again, whole, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)
    for other in ({"seed": 6}, {"offset": 11}, {"stream": 3}):
        arguments = {"seed": 5, "offset": 10, "stream": 2, **other}
        differs = philox_uniform(shape=(6, 200, 33), device=device, **arguments) != whole
        assert differs.float().mean() > 0.999


def test_the_numbers_are_uniform_and_normal(device):
    uniform = philox_uniform(1, 0, (10, 100, 100), device=device).cpu().flatten()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    counts = (uniform * 100).long().bincount(minlength=100)
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 149  # χ² with 99 degrees of freedom: p > 0.001
    normal = philox_normal(1, 0, (10, 100, 100), device=device).cpu().flatten().double()
    assert abs(normal.mean()) < 0.01
    assert abs(normal.var() - 1) < 0.02
    edges = torch.linspace(-2, 2, 41, dtype=torch.float64)
    expected = 1e5 * torch.special.ndtr(edges).diff()
    counts = torch.histogram(normal, edges).hist
    assert ((counts - expected) ** 2 / expected).sum() < 73  # 40 degrees of freedom


def test_compiles_without_graph_break():
    torch.compiler.reset()

    def fn(x):
        return x + philox_uniform(2**64 - 1, 3, (4, 5, 6), stream=1) * philox_normal(7, 0, (4, 5, 6))

    x = torch.zeros(4, 5, 6)
    torch.testing.assert_close(torch.compile(fn, fullgraph=True, backend="aot_eager")(x), fn(x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed is -1, but an int in"),
        ({"seed": 2**64}, ValueError, "seed is 18446744073709551616"),
        ({"seed": 0.5}, TypeError, "seed is a float, but an int"),
        ({"seed": True}, TypeError, "seed is a bool"),
        ({"offset": -1}, ValueError, "offset is -1"),
        ({"offset": 2**32}, ValueError, "offset is 4294967296"),
        ({"stream": 2**32}, ValueError, "stream is 4294967296"),
        ({"shape": (1, 2)}, TypeError, r"shape is \(1, 2\), but \(T, N, S\)"),
        ({"shape": (1, 2, -3)}, ValueError, "shape is -3"),
        ({"shape": 3}, TypeError, "shape is 3"),
        ({"dtype": torch.float16}, TypeError, "dtype is torch.float16"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"seed": 1, "offset": 0, "shape": (2, 2, 2), **change}
    for op in (philox_uniform, philox_normal):
        with pytest.raises(error, match=f"{op.__name__}: {message}"):
            op(**arguments)
