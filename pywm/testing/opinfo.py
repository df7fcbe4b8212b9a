"""One table of all ops, read by the tests, the fuzzer, the benchmarks and ``pywm doctor``.

A new op gets parity with the float64 reference, gradcheck, opcheck, compilation, strided and poisoned runs, the fuzzer and
the benchmarks by its row in :data:`OPS`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pywm import ops
from pywm.distributions import Categorical, DiagGaussian, MultiCategorical
from pywm.testing.rssm_samples import RSSM_OPS
from pywm.testing.sample import OpInfo, Sample, mask, normal

__all__ = ["OPS", "OpInfo", "Sample"]


def _scan_call(
    op: Callable[..., Any], positional: int, several: bool
) -> Callable[[Sample], tuple[Tensor, ...]]:
    def call(sample: Sample) -> tuple[Tensor, ...]:
        tensors = list(sample.tensors.items())
        keyword = {k: x for k, x in tensors[positional:] if x is not None}
        result = op(*(x for _, x in tensors[:positional]), **keyword, **sample.numbers)
        return tuple(result) if several else (result,)

    return call


def _gae(masked: bool) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        reward, value, next_value = torch.randn(3, *shape, generator=g, dtype=dtype)
        tensors = {
            "reward": reward,
            "value": value,
            "next_value": next_value,
            "terminated": mask(shape, g, 0.1),
            "truncated": mask(shape, g, 0.1),
        }
        if masked:
            tensors["valid"] = mask(shape, g, 0.8)
        return Sample({k: x.clone() for k, x in tensors.items()}, {"discount": 0.97, "lam": 0.9})

    return build


def _lambda_return(rows: bool, masked: bool) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        reward, next_value = torch.randn(2, *shape, generator=g, dtype=dtype)
        discount = 0.99 * (1 - mask(shape, g, 0.1).to(dtype))
        sample = Sample(
            {"reward": reward.clone(), "discount": discount, "next_value": next_value.clone()}, {"lam": 0.95}
        )
        if rows:
            del sample.numbers["lam"]
            sample.tensors["lam"] = torch.rand(shape, generator=g, dtype=dtype)
        if masked:
            sample.tensors["valid"] = mask(shape, g, 0.8)
        return sample

    return build


def _discounted_return(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
    reward = torch.randn(shape, generator=g, dtype=dtype)
    discount = 0.99 * (1 - mask(shape, g, 0.1).to(dtype))
    return Sample(
        {
            "reward": reward,
            "discount": discount,
            "bootstrap": torch.randn(shape[1], generator=g, dtype=dtype),
        }
    )


def _vtrace(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
    log_ratio, reward, value, next_value = torch.randn(4, *shape, generator=g, dtype=dtype)
    tensors = {
        "log_ratio": 0.5 * log_ratio,
        "reward": reward.clone(),
        "discount": 0.99 * (1 - mask(shape, g, 0.1).to(dtype)),
        "value": value.clone(),
        "next_value": next_value.clone(),
        "truncated": mask(shape, g, 0.1),
    }
    return Sample({**tensors}, {"lam": 0.9, "rho_clip": 1.2, "c_clip": 1.1})


def _ppo_rows(
    rows: tuple[int, ...], g: torch.Generator, dtype: torch.dtype, masked: bool, clipped: bool
) -> Sample:
    old_log_prob, advantage, value, returns, old_value = torch.randn(5, *rows, generator=g, dtype=dtype)
    tensors: dict[str, Tensor | None] = {
        "old_log_prob": 0.3 * old_log_prob - 1,
        "advantage": advantage.clone(),
        "value": value.clone(),
        "returns": returns.clone(),
    }
    numbers: dict[str, Any] = {"clip": 0.2, "value_coef": 0.7, "entropy_coef": 0.05}
    if clipped:
        tensors["old_value"] = value + 0.3 * old_value
        numbers["value_clip"] = 0.2
    if masked:
        tensors["valid"] = mask(rows, g, 0.7)
        numbers["normalize_advantage"] = True
    return Sample(tensors, numbers)


def _ppo_categorical(masked: bool = False, clipped: bool = False) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        *rows, A = shape
        sample = _ppo_rows(tuple(rows), g, dtype, masked, clipped)
        logits = torch.randn(shape, generator=g, dtype=dtype)
        action = torch.randint(A, tuple(rows), generator=g)
        return Sample({"dist.logits": logits, "action": action, **sample.tensors}, sample.numbers)

    return build


def _ppo_multi(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
    *rows, A = shape
    sample = _ppo_rows(tuple(rows), g, dtype, False, False)
    nvec = (A, 2, 3)
    logits = torch.randn(*rows, sum(nvec), generator=g, dtype=dtype)
    action = torch.stack([torch.randint(n, tuple(rows), generator=g) for n in nvec], -1)
    return Sample(
        {"dist.logits": logits, "action": action, **sample.tensors}, {**sample.numbers, "nvec": nvec}
    )


def _ppo_gaussian(shared: bool, masked: bool = False) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        *rows, A = shape
        sample = _ppo_rows(tuple(rows), g, dtype, masked, False)
        mean = torch.randn(shape, generator=g, dtype=dtype)
        log_std = 0.3 * torch.randn((A,) if shared else shape, generator=g, dtype=dtype)
        action = mean + 0.8 * torch.randn(shape, generator=g, dtype=dtype)
        # Log-probabilities near the new policy's, so that some ratios are clipped and some are not.
        old = DiagGaussian(mean, log_std).log_prob(action)
        sample.tensors["old_log_prob"] = old + 0.3 * torch.randn(tuple(rows), generator=g, dtype=dtype)
        return Sample(
            {"dist.mean": mean, "dist.log_std": log_std, "action": action, **sample.tensors}, sample.numbers
        )

    return build


def _ppo_call(sample: Sample) -> tuple[Tensor, ...]:
    tensors, numbers = dict(sample.tensors), dict(sample.numbers)
    dist: Categorical | MultiCategorical | DiagGaussian
    if "dist.mean" in tensors:
        dist = DiagGaussian(tensors.pop("dist.mean"), tensors.pop("dist.log_std"))  # type: ignore[arg-type]
    elif "nvec" in numbers:
        dist = MultiCategorical(tensors.pop("dist.logits"), numbers.pop("nvec"))  # type: ignore[arg-type]
    else:
        dist = Categorical(tensors.pop("dist.logits"))  # type: ignore[arg-type]
    loss, stats = ops.ppo_loss(dist, **tensors, **numbers)  # type: ignore[arg-type]
    return loss, *stats


# Widths of the perceptrons in the table, after the input's.
_MLP_WIDTHS = (9, 5, 3)


def _mlp(activation: str) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        widths = (shape[-1], *_MLP_WIDTHS)
        tensors: dict[str, Tensor | None] = {"x": torch.randn(shape, generator=g, dtype=dtype)}
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            weight = torch.randn(outputs, inputs, generator=g, dtype=dtype)
            tensors[f"weights[{i}]"] = weight / max(inputs, 1) ** 0.5
            tensors[f"biases[{i}]"] = 0.3 * torch.randn(outputs, generator=g, dtype=dtype)
        return Sample(tensors, {"activation": activation})

    return build


def _mlp_call(sample: Sample) -> tuple[Tensor, ...]:
    x, *parameters = sample.tensors.values()
    return (ops.mlp(x, parameters[::2], parameters[1::2], **sample.numbers),)  # type: ignore[arg-type]


def _mlp_parameters(inputs: int) -> int:
    return sum((i + 1) * o for i, o in itertools.pairwise((inputs, *_MLP_WIDTHS)))


def _norm_mlp(linear: bool, groups: int = 0) -> Callable[..., Sample]:
    """Perceptrons of the same widths; ``linear``: without a norm behind the last layer."""
    classes = 5

    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        sample = _mlp("silu")((*shape[:-1], shape[-1] + groups * classes), g, dtype)
        x = sample.tensors["x"]
        assert x is not None
        tensors = {**sample.tensors, "x": x[..., : shape[-1]].clone()}
        for i, width in enumerate(_MLP_WIDTHS[: -1 if linear else None]):
            tensors[f"scales[{i}]"] = 1 + 0.3 * torch.randn(width, generator=g, dtype=dtype)
        if groups:
            index = torch.randint(classes, (*shape[:-1], groups), generator=g)
            tensors["index"] = index.to(torch.uint8)
        return Sample(tensors, {"eps": 0.03})

    return build


def _norm_mlp_call(sample: Sample) -> tuple[Tensor, ...]:
    tensors, numbers = dict(sample.tensors), {"index": None, **sample.numbers}
    x = tensors.pop("x")
    if "index" in tensors:
        numbers["index"] = tensors.pop("index")
    weights, biases, scales = (
        [t for name, t in tensors.items() if name.startswith(kind)]
        for kind in ("weights", "biases", "scales")
    )
    return (ops.norm_mlp(x, weights, biases, scales, **numbers),)  # type: ignore[arg-type]


def _norm_act(norm: str, act: str, shifted: bool = False) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        D = shape[-1]
        tensors: dict[str, Tensor | None] = {
            "x": 0.3 + normal(*shape, g=g, dtype=dtype),
            "scale": 1 + 0.3 * normal(D, g=g, dtype=dtype),
        }
        if shifted:
            tensors["shift"] = 0.3 * normal(D, g=g, dtype=dtype)
        # A row of one number has no variance: a smaller eps would make its derivatives a difference of large numbers.
        return Sample(tensors, {"norm": norm, "act": act, "eps": 1e-2})

    return build


def _gates(**factors: int) -> Callable[..., Sample]:
    """Tensors of a cell, by the multiple of the state's width that they are as wide as."""

    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        *rows, D = shape
        return Sample({name: normal(*rows, k * D, g=g, dtype=dtype) for name, k in factors.items()})

    return build


def _block_gru_gates(blocked: bool) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        sample = _gates(gates=3, deter=1)(shape, g, dtype)
        sample.numbers["blocks"] = next(k for k in ((4, 3, 2, 1) if blocked else (1,)) if shape[-1] % k == 0)
        return sample

    return build


def _layernorm_gru_gates(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
    sample = _gates(pre=3, deter=1)(shape, g, dtype)
    pre, deter = sample.tensors.values()
    W = 3 * shape[-1]
    scale, shift = 1 + 0.3 * normal(W, g=g, dtype=dtype), 0.3 * normal(W, g=g, dtype=dtype)
    return Sample({"pre": pre, "scale": scale, "shift": shift, "deter": deter}, {"eps": 1e-2})


# Groups and classes of the one-hot vectors in the table.
_ONE_HOT = (3, 5)


def _one_hot_linear(biased: bool) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        *rows, U = shape
        S, K = _ONE_HOT
        tensors: dict[str, Tensor | None] = {
            "weight": normal(U, S * K, g=g, dtype=dtype),
            "index": torch.randint(K, (*rows, S), generator=g).to(torch.uint8),
        }
        if biased:
            tensors["bias"] = normal(U, g=g, dtype=dtype)
        return Sample(tensors)

    return build


def _keyword_call(op: Callable[..., Tensor]) -> Callable[[Sample], tuple[Tensor, ...]]:
    return lambda sample: (op(**sample.tensors, **sample.numbers),)


_ROW_SHAPES = ((5, 6), (1, 1), (16, 1), (1, 257), (70, 3), (64, 132), (4, 7, 33), (300, 520), (3,))
_ROW_BENCH = {"act": (1, 512), "observe": (16, 4096), "imagine": (1024, 512), "imagine_wide": (1024, 3072)}


def _gates_info(name: str, call: Callable[..., Tensor], variants: Mapping[str, Any], *names: str) -> OpInfo:
    """An op on the gates of a cell. ``names``: its tensors, all of them differentiable; the state counts 1."""
    widths = {"gates": 2 if name.startswith("gru_block") else 3, "pre": 3, "input": 3, "hidden": 3}
    width = sum(0 if k in ("scale", "shift") else widths.get(k, 1) for k in names)
    return OpInfo(
        name=name,
        call=_keyword_call(call),
        variants=variants,
        outputs=("deter",),
        differentiable=names,
        kernels=(name, f"{name}_backward"),
        shapes=_ROW_SHAPES,
        bench_shapes=_ROW_BENCH,
        bytes_moved=lambda shape, item: _elements(shape) * (width + 1) * item,
        bytes_moved_backward=lambda shape, item: _elements(shape) * (2 * width + 1) * item,
        tol={torch.float32: (1e-4, 2e-5), torch.float64: (1e-10, 1e-10)},
    )


_SCAN_SHAPES = ((5, 3), (1, 1), (16, 1), (1, 257), (15, 0), (64, 129), (300, 5), (7, 1030))
_SCAN_BENCH = {
    "ppo_cartpole": (32, 8),
    "ppo_atari": (128, 8),
    "ppo_wide": (128, 64),
    "dreamer_replay": (64, 16),
    "dreamer_imagine": (15, 1024),
    "imagine_wide": (15, 16384),
    "brax": (256, 1024),
    "long": (2048, 1),
    "dram": (1024, 4096),
}


def _elements(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[1]


# ---- distributions: shapes are [..., S], groups, or [..., Z], parts; classes and bins come with the variant

_CLASSES = 32
_BINS = 255
_LEVELS = 256


def _categorical_sample(K: int, unimix: float) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        logits = 2 * torch.randn(*shape, K, generator=g, dtype=dtype)
        uniform = torch.rand(shape, generator=g, dtype=dtype)
        # Where a uniform number lies at a boundary, rounding decides: between the two, or the largest one, it does not.
        probs = (1 - unimix) * logits.double().softmax(-1) + unimix / K
        edges = torch.cat([torch.zeros_like(probs[..., :1]), probs.cumsum(-1)], -1)
        near = (edges - uniform.unsqueeze(-1)).abs().amin(-1) < 1e-4
        widest, class_ = probs.max(-1)
        inside = edges.gather(-1, class_.unsqueeze(-1)).squeeze(-1) + widest / 2
        uniform = torch.where(near, inside.to(dtype), uniform)
        return Sample({"logits": logits, "uniform": uniform}, {"unimix": unimix})

    return build


def _categorical_sample_call(sample: Sample) -> tuple[Tensor, ...]:
    stoch, index = ops.categorical_sample(**sample.tensors, **sample.numbers)  # type: ignore[arg-type]
    return stoch, index.to(stoch.dtype)  # all outputs compare alike


def _kl_balance(K: int, unimix: float, free_nats: float) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        posterior, prior = 2 * torch.randn(2, *shape, K, generator=g, dtype=dtype)
        numbers = {"unimix": unimix, "free_nats": free_nats}
        return Sample({"posterior": posterior.clone(), "prior": prior.clone()}, numbers)

    return build


def _twohot_logits(shape: tuple[int, ...], B: int, g: torch.Generator, dtype: torch.dtype) -> Tensor:
    # The probability is on bins of ordinary size, as a trained head has it: the outermost are 5e8.
    x = torch.linspace(-20, 20, B, dtype=dtype)
    centre = torch.randn(*shape, 1, generator=g, dtype=dtype)
    return torch.randn(*shape, B, generator=g, dtype=dtype) - (x - centre).square()


def _symexp_twohot_loss(B: int, both: bool = False) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        logits = torch.randn(*shape, B, generator=g, dtype=dtype)

        def target() -> Tensor:
            y = torch.randn(shape, generator=g, dtype=dtype)
            return y.sign() * (5 * y).abs().expm1()  # some beyond the outermost bin

        tensors = {"logits": logits, "target": target()}
        if not both:
            return Sample({**tensors})
        return Sample({**tensors, "other": target()}, {"other_scale": 0.5})

    return build


def _symexp_twohot_mean(B: int) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        return Sample({"logits": _twohot_logits(shape, B, g, dtype)})

    return build


def _gaussian_sample(kind: str) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        mean, raw_std, noise = torch.randn(3, *shape, generator=g, dtype=dtype)
        tensors = {"mean": mean.clone(), "raw_std": 3 * raw_std, "noise": noise.clone()}
        return Sample({**tensors}, {"kind": kind})

    return build


def _gaussian_kl(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
    mean_q, std_q, mean_p, std_p = torch.randn(4, *shape, generator=g, dtype=dtype)
    tensors = {
        "mean_q": mean_q.clone(),
        "std_q": (0.5 * std_q).exp(),
        "mean_p": mean_p.clone(),
        "std_p": (0.5 * std_p).exp(),
    }
    return Sample({**tensors})


def _pixel_cross_entropy(K: int, cutoff: float) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        logits = torch.randn(*shape, K, generator=g, dtype=dtype)
        target = torch.randint(K, shape, generator=g)
        # A third of the rows is sure of its target, more than the cut-off asks for, and none lies on the edge.
        lift = torch.where(mask(shape, g, 0.3), 15.0, 0.0).to(dtype).unsqueeze(-1)
        logits = logits.scatter_add(-1, target.unsqueeze(-1), lift)
        loss = -logits.double().log_softmax(-1).gather(-1, target.unsqueeze(-1))
        near = torch.where((loss - cutoff).abs() < 1e-2, 1.0, 0.0).to(dtype)
        logits = logits.scatter_add(-1, target.unsqueeze(-1), near)
        return Sample({"logits": logits, "target": target.to(torch.uint8)}, {"cutoff": cutoff})

    return build


def _tensor_call(op: Callable[..., Any], several: bool) -> Callable[[Sample], tuple[Tensor, ...]]:
    def call(sample: Sample) -> tuple[Tensor, ...]:
        result = op(**sample.tensors, **sample.numbers)
        return tuple(result) if several else (result,)

    return call


_LATENT_SHAPES = ((3, 2), (1, 1), (4,), (2, 33), (0, 3), (5, 8), (3, 4, 5), (70, 9))
_GROUPS_BENCH = {"observe": (16, 32), "replay": (1024, 32), "imagine": (16384, 32)}
_TWOHOT_BENCH = {"observe": (16,), "replay": (1024,), "imagine": (16384,)}
_PARTS_BENCH = {"observe": (50, 30), "replay": (2500, 30), "wide": (65536, 30)}


def _rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


OPS: tuple[OpInfo, ...] = (
    OpInfo(
        name="gae",
        call=_scan_call(ops.gae, 5, several=True),
        variants={"plain": _gae(False), "valid": _gae(True)},
        outputs=("advantage", "returns"),
        differentiable=("reward", "value", "next_value"),
        kernels=("gae", "gae_backward"),
        shapes=_SCAN_SHAPES,
        bench_shapes=_SCAN_BENCH,
        bytes_moved=lambda shape, item: _elements(shape) * (5 * item + 2),
        bytes_moved_backward=lambda shape, item: _elements(shape) * (5 * item + 2),
        differentiable_outputs=2,
    ),
    OpInfo(
        name="lambda_return",
        call=_scan_call(ops.lambda_return, 3, several=False),
        variants={
            "plain": _lambda_return(False, False),
            "rows": _lambda_return(True, False),
            "valid": _lambda_return(False, True),
            "rows_valid": _lambda_return(True, True),
        },
        outputs=("returns",),
        differentiable=("reward", "discount", "next_value"),
        kernels=("lambda_return", "lambda_return_backward"),
        shapes=_SCAN_SHAPES,
        bench_shapes=_SCAN_BENCH,
        bytes_moved=lambda shape, item: _elements(shape) * 4 * item,
        bytes_moved_backward=lambda shape, item: _elements(shape) * 7 * item,
    ),
    OpInfo(
        name="discounted_return",
        call=_scan_call(ops.discounted_return, 3, several=False),
        variants={"plain": _discounted_return},
        outputs=("returns",),
        differentiable=("reward", "discount", "bootstrap"),
        kernels=("discounted_return", "discounted_return_backward"),
        shapes=_SCAN_SHAPES,
        bench_shapes=_SCAN_BENCH,
        bytes_moved=lambda shape, item: _elements(shape) * 3 * item,
        bytes_moved_backward=lambda shape, item: _elements(shape) * 5 * item,
    ),
    OpInfo(
        name="vtrace",
        call=_scan_call(ops.vtrace, 6, several=True),
        variants={"plain": _vtrace},
        outputs=("target", "advantage"),
        differentiable=("reward", "discount", "value", "next_value"),
        kernels=("vtrace", "vtrace_backward"),
        shapes=_SCAN_SHAPES,
        bench_shapes={"impala": (20, 256), "long": (100, 32)},
        bytes_moved=lambda shape, item: _elements(shape) * (8 * item + 1),
        bytes_moved_backward=lambda shape, item: _elements(shape) * (10 * item + 1),
        differentiable_outputs=2,
        devices=("cpu",),
    ),
    OpInfo(
        name="ppo_loss",
        call=_ppo_call,
        variants={
            "plain": _ppo_categorical(),
            "valid_clipped": _ppo_categorical(masked=True, clipped=True),
            "multi": _ppo_multi,
            "gaussian": _ppo_gaussian(shared=True),
            "gaussian_valid": _ppo_gaussian(shared=True, masked=True),
            "gaussian_rows_valid": _ppo_gaussian(shared=False, masked=True),
        },
        outputs=("loss", "policy_loss", "value_loss", "entropy", "clip_fraction", "approx_kl"),
        differentiable=("dist.logits", "dist.mean", "dist.log_std", "value"),
        kernels=("ppo_loss_categorical", "ppo_loss_gaussian"),
        shapes=((6, 3), (1, 1), (1, 4), (2, 70), (0, 3), (257, 2), (1300, 6), (4, 33, 5), (3,)),
        bench_shapes={"cartpole": (256, 2), "atari": (1024, 18), "wide": (32768, 6)},
        bytes_moved=lambda shape, item: shape[0] * (item * (2 * shape[1] + 5) + 8),
        bytes_moved_backward=lambda shape, item: shape[0] * item * 2 * (shape[1] + 1),
        tol={torch.float32: (3e-5, 3e-5), torch.float64: (1e-10, 1e-10)},
    ),
    OpInfo(
        name="mlp",
        call=_mlp_call,
        variants={"plain": _mlp("tanh"), "silu": _mlp("silu"), "elu": _mlp("elu"), "relu": _mlp("relu")},
        outputs=("y",),
        differentiable=("x", *(f"{kind}[{i}]" for i in range(3) for kind in ("weights", "biases"))),
        kernels=("mlp", "mlp_backward"),
        shapes=((5, 3), (1, 1), (16, 1), (1, 257), (0, 15), (64, 129), (4, 7, 33), (3,)),
        bench_shapes={"act": (8, 4), "minibatch": (256, 4), "rollout": (2048, 17)},
        bytes_moved=lambda shape, item: item * (shape[0] * (shape[1] + 3) + _mlp_parameters(shape[1])),
        bytes_moved_backward=lambda shape, item: (
            item * (shape[0] * (2 * shape[1] + 3) + 2 * _mlp_parameters(shape[1]))
        ),
        devices=("cpu",),
        tol={torch.float32: (1e-4, 5e-5), torch.float64: (1e-10, 1e-10)},
    ),
    OpInfo(
        name="norm_mlp",
        call=_norm_mlp_call,
        variants={
            "plain": _norm_mlp(linear=True),
            "normed": _norm_mlp(linear=False),
            "index": _norm_mlp(linear=True, groups=3),
            "index_normed": _norm_mlp(linear=False, groups=1),
        },
        outputs=("y",),
        differentiable=("x", *(f"{kind}[{i}]" for i in range(3) for kind in ("weights", "biases", "scales"))),
        kernels=("norm_mlp", "norm_mlp_backward"),
        shapes=((6, 3), (1, 1), (16, 1), (1, 257), (0, 15), (200, 130), (4, 7, 33), (3,)),
        bench_shapes={"heads": (8192, 192), "critic": (16384, 640)},
        bytes_moved=lambda shape, item: item * (shape[0] * (shape[1] + 3) + _mlp_parameters(shape[1])),
        bytes_moved_backward=lambda shape, item: (
            item * (shape[0] * (2 * shape[1] + 17) + 2 * _mlp_parameters(shape[1]))
        ),
        devices=("cpu",),
        tol={torch.float32: (1e-4, 3e-4), torch.float64: (1e-10, 1e-10)},
    ),
    OpInfo(
        name="norm_act",
        call=_keyword_call(ops.norm_act),
        variants={
            "plain": _norm_act("rms", "silu"),
            "rms_elu": _norm_act("rms", "elu"),
            "layer_tanh": _norm_act("layer", "tanh"),
            "layer_shift_silu": _norm_act("layer", "silu", shifted=True),
            "layer_shift_relu": _norm_act("layer", "relu", shifted=True),
            "layer_shift": _norm_act("layer", "none", shifted=True),
        },
        outputs=("y",),
        differentiable=("x", "scale", "shift"),
        kernels=("norm_act", "norm_act_backward"),
        shapes=_ROW_SHAPES,
        bench_shapes=_ROW_BENCH,
        bytes_moved=lambda shape, item: _elements(shape) * 2 * item,
        bytes_moved_backward=lambda shape, item: _elements(shape) * 3 * item,
        tol={torch.float32: (1e-4, 5e-5), torch.float64: (1e-10, 1e-10)},
    ),
    _gates_info(
        "block_gru_gates",
        ops.block_gru_gates,
        {"plain": _block_gru_gates(True), "one_block": _block_gru_gates(False)},
        "gates",
        "deter",
    ),
    _gates_info(
        "layernorm_gru_gates",
        ops.layernorm_gru_gates,
        {"plain": _layernorm_gru_gates},
        "pre",
        "scale",
        "shift",
        "deter",
    ),
    _gates_info(
        "gru_gates", ops.gru_gates, {"plain": _gates(input=3, hidden=3, deter=1)}, "input", "hidden", "deter"
    ),
    _gates_info(
        "gru_block_reset", ops.gru_block_reset, {"plain": _gates(gates=2, deter=1)}, "gates", "deter"
    ),
    _gates_info(
        "gru_block_update",
        ops.gru_block_update,
        {"plain": _gates(gates=2, candidate=1, deter=1)},
        "gates",
        "candidate",
        "deter",
    ),
    OpInfo(
        name="one_hot_linear",
        call=_keyword_call(ops.one_hot_linear),
        variants={"plain": _one_hot_linear(True), "no_bias": _one_hot_linear(False)},
        outputs=("y",),
        differentiable=("weight", "bias"),
        kernels=("one_hot_linear", "one_hot_linear_backward"),
        shapes=((5, 6), (1, 1), (16, 1), (1, 257), (70, 3), (64, 132), (4, 7, 33), (300, 520), (3,)),
        bench_shapes={"act": (1, 512), "observe": (16, 512), "imagine": (1024, 512)},
        bytes_moved=lambda shape, item: item * (_elements(shape) + shape[1] * (15 + 1)) + 3 * shape[0],
        bytes_moved_backward=lambda shape, item: (
            item * (_elements(shape) + shape[1] * (15 + 1)) + 3 * shape[0]
        ),
        tol={torch.float32: (1e-4, 2e-5), torch.float64: (1e-10, 1e-10)},
    ),
    OpInfo(
        name="categorical_sample",
        call=_categorical_sample_call,
        variants={
            "plain": _categorical_sample(_CLASSES, 0.01),
            "few": _categorical_sample(5, 0.2),
            "wide": _categorical_sample(250, 0.1),
            "unmixed": _categorical_sample(4, 0.0),
            "alone": _categorical_sample(1, 0.01),
        },
        outputs=("stoch", "index"),
        differentiable=("logits",),
        kernels=("categorical_sample", "categorical_sample_backward"),
        shapes=_LATENT_SHAPES,
        bench_shapes=_GROUPS_BENCH,
        bytes_moved=lambda shape, item: math.prod(shape) * (item * (2 * _CLASSES + 1) + 1),
        bytes_moved_backward=lambda shape, item: math.prod(shape) * item * 3 * _CLASSES,
        no_derivative=("plain", "few", "wide", "unmixed", "alone"),
    ),
    OpInfo(
        name="kl_balance",
        call=_tensor_call(ops.kl_balance, several=True),
        variants={
            "plain": _kl_balance(_CLASSES, 0.01, 1.0),
            "few": _kl_balance(5, 0.1, 3.0),
            "unmixed": _kl_balance(16, 0.0, 0.0),
        },
        outputs=("dynamics", "representation", "kl"),
        differentiable=("posterior", "prior"),
        kernels=("kl_balance", "kl_balance_backward"),
        shapes=_LATENT_SHAPES,
        bench_shapes=_GROUPS_BENCH,
        bytes_moved=lambda shape, item: item * (math.prod(shape) * 2 * _CLASSES + 3 * _rows(shape)),
        bytes_moved_backward=lambda shape, item: item * (math.prod(shape) * 4 * _CLASSES + 3 * _rows(shape)),
        differentiable_outputs=2,
        no_derivative=("plain", "few", "unmixed"),
    ),
    OpInfo(
        name="symexp_twohot_loss",
        call=_tensor_call(ops.symexp_twohot_loss, several=False),
        variants={
            "plain": _symexp_twohot_loss(_BINS),
            "few": _symexp_twohot_loss(15),
            "both": _symexp_twohot_loss(_BINS, both=True),
        },
        outputs=("loss",),
        differentiable=("logits",),
        kernels=("symexp_twohot_loss", "symexp_twohot_loss_backward"),
        shapes=_LATENT_SHAPES,
        bench_shapes=_TWOHOT_BENCH,
        bytes_moved=lambda shape, item: item * math.prod(shape) * (_BINS + 2),
        bytes_moved_backward=lambda shape, item: item * math.prod(shape) * (2 * _BINS + 2),
    ),
    OpInfo(
        name="symexp_twohot_mean",
        call=_tensor_call(ops.symexp_twohot_mean, several=False),
        variants={"plain": _symexp_twohot_mean(_BINS), "few": _symexp_twohot_mean(15)},
        outputs=("mean",),
        differentiable=("logits",),
        kernels=("symexp_twohot_mean", "symexp_twohot_mean_backward"),
        shapes=_LATENT_SHAPES,
        bench_shapes=_TWOHOT_BENCH,
        bytes_moved=lambda shape, item: item * math.prod(shape) * (_BINS + 1),
        bytes_moved_backward=lambda shape, item: item * math.prod(shape) * (2 * _BINS + 2),
        tol={
            torch.float32: (1e-4, 1e-3),
            torch.float64: (1e-11, 1e-10),
        },  # sums of products with bins of thousands
    ),
    OpInfo(
        name="gaussian_sample",
        call=_tensor_call(ops.gaussian_sample, several=True),
        variants={"plain": _gaussian_sample("softplus"), "sigmoid2": _gaussian_sample("sigmoid2")},
        outputs=("sample", "std"),
        differentiable=("mean", "raw_std"),
        kernels=("gaussian_sample", "gaussian_sample_backward"),
        shapes=_LATENT_SHAPES,
        bench_shapes=_PARTS_BENCH,
        bytes_moved=lambda shape, item: item * math.prod(shape) * 5,
        bytes_moved_backward=lambda shape, item: item * math.prod(shape) * 6,
        differentiable_outputs=2,
    ),
    OpInfo(
        name="gaussian_kl",
        call=_tensor_call(ops.gaussian_kl, several=False),
        variants={"plain": _gaussian_kl},
        outputs=("kl",),
        differentiable=("mean_q", "std_q", "mean_p", "std_p"),
        kernels=("gaussian_kl", "gaussian_kl_backward"),
        shapes=_LATENT_SHAPES,
        bench_shapes=_PARTS_BENCH,
        bytes_moved=lambda shape, item: item * (math.prod(shape) * 4 + _rows(shape)),
        bytes_moved_backward=lambda shape, item: item * (math.prod(shape) * 8 + _rows(shape)),
    ),
    OpInfo(
        name="pixel_cross_entropy",
        call=_tensor_call(ops.pixel_cross_entropy, several=False),
        variants={
            "plain": _pixel_cross_entropy(_LEVELS, 0.03),
            "few": _pixel_cross_entropy(5, 0.1),
            "uncut": _pixel_cross_entropy(33, 0.0),
        },
        outputs=("loss",),
        differentiable=("logits",),
        kernels=("pixel_cross_entropy", "pixel_cross_entropy_backward"),
        shapes=_LATENT_SHAPES,
        bench_shapes={"catch": (16, 576), "grey": (8, 4096), "atari": (4, 25200)},
        bytes_moved=lambda shape, item: math.prod(shape) * (item * (_LEVELS + 1) + 1),
        bytes_moved_backward=lambda shape, item: math.prod(shape) * (item * (2 * _LEVELS + 2) + 1),
    ),
    *RSSM_OPS,
)
