"""The return estimators side by side with what is installed of the rivals.

    python benchmarks/peers.py                         # 2 threads, all shapes
    python benchmarks/peers.py --check                 # exit 1 if a target is missed
    python benchmarks/peers.py --compile 256 --json out.json

Rivals: stable-baselines3's rollout buffer, torchrl (loop and vectorised), tianshou, numba (one column, and a prange loop
over columns), a loop in CleanRL's style, and torch.compile of that loop (up to ``--compile`` rows, for it unrolls and takes
minutes). Every side allocates its outputs. Rivals get the least work that their interface allows: those who take one done
flag and the next value from the row below are spared our next_value and truncated flags; the data are such that both
give the same result, which is checked before anything is timed. All sides take turns within one run; figures are medians.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import Thunk, interleaved, machine, settle_allocator, triad
from torch import Tensor

import pywm

DISCOUNT, LAM = 0.99, 0.95

# What is to be reached against the fastest rival, with 2 threads in float32.
TARGETS = {
    ("gae", (128, 8)): 2.0,
    ("gae", (128, 64)): 4.0,
    ("gae", (256, 1024)): 3.5,
    ("gae", (1024, 4096)): 1.9,
    ("gae", (2048, 1)): 1.0,
    ("lambda_return", (15, 1024)): 6.0,
    ("lambda_return", (15, 16384)): 2.0,
}


class Data:
    """Rollouts without truncation, so that one done flag and the row below say everything."""

    def __init__(self, T: int, N: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.reward = torch.randn(T, N, generator=g)
        values = torch.randn(T + 1, N, generator=g)
        self.value, self.next_value, self.last_value = (
            values[:-1].clone(),
            values[1:].clone(),
            values[-1].clone(),
        )
        self.done = torch.rand(T, N, generator=g) < 0.02
        self.truncated = torch.zeros(T, N, dtype=torch.bool)
        self.cont = 1 - self.done.float()
        self.discount = DISCOUNT * self.cont
        # The same as NumPy arrays and in the layouts that rivals want; made once, not timed.
        self.reward_np, self.value_np = self.reward.numpy(), self.value.numpy()
        self.last_value_np, self.done_np = self.last_value.numpy(), self.done.float().numpy()
        self.next_value_np, self.cont_np = self.next_value.numpy(), self.cont.numpy()
        self.column = [x.unsqueeze(-1) for x in (self.value, self.next_value, self.reward)]
        self.done_column = self.done.unsqueeze(-1)
        self.column_nt = [
            x.t().contiguous().unsqueeze(-1) for x in (self.value, self.next_value, self.reward)
        ]
        self.done_nt = self.done.t().contiguous().unsqueeze(-1)


# ---- rivals: name -> (data) -> a call that returns (advantage, returns), or None where it does not apply -----------


def pywm_gae(d: Data) -> Thunk:
    return lambda: pywm.gae(d.reward, d.value, d.next_value, d.done, d.truncated, discount=DISCOUNT, lam=LAM)


def cleanrl_loop(reward: Tensor, value: Tensor, last_value: Tensor, cont: Tensor) -> tuple[Tensor, Tensor]:
    advantages = torch.zeros_like(reward)
    last = torch.zeros_like(reward[0])
    for t in range(reward.shape[0] - 1, -1, -1):
        next_value = last_value if t == reward.shape[0] - 1 else value[t + 1]
        delta = reward[t] + DISCOUNT * next_value * cont[t] - value[t]
        last = delta + DISCOUNT * LAM * cont[t] * last
        advantages[t] = last
    return advantages, advantages + value


def functional_loop(reward: Tensor, value: Tensor, last_value: Tensor, cont: Tensor) -> tuple[Tensor, Tensor]:
    last, next_value, advantages = torch.zeros_like(reward[0]), last_value, []
    for t in range(reward.shape[0] - 1, -1, -1):
        last = reward[t] + DISCOUNT * cont[t] * (next_value + LAM * last) - value[t]
        next_value = value[t]
        advantages.append(last)
    stacked = torch.stack(advantages[::-1])
    return stacked, stacked + value


def cleanrl(d: Data) -> Thunk:
    return lambda: cleanrl_loop(d.reward, d.value, d.last_value, d.cont)


def compiled(d: Data) -> Thunk:
    torch.compiler.reset()
    fn = torch.compile(functional_loop)
    return lambda: fn(d.reward, d.value, d.last_value, d.cont)


def stable_baselines3(d: Data) -> Thunk:
    spaces = importlib.import_module("gymnasium.spaces")
    buffers = importlib.import_module("stable_baselines3.common.buffers")
    T, N = d.reward.shape
    box = spaces.Box(-1, 1, (1,), np.float32)
    buffer = buffers.RolloutBuffer(T, box, box, device="cpu", gae_lambda=LAM, gamma=DISCOUNT, n_envs=N)
    # Row t of its episode_starts says that the episode before it ended.
    starts = np.concatenate([np.zeros((1, N), np.float32), d.done_np[:-1]])
    last_done = d.done_np[-1].astype(bool)

    def call() -> tuple[np.ndarray, np.ndarray]:
        buffer.advantages, buffer.returns = np.zeros((T, N), np.float32), np.zeros((T, N), np.float32)
        buffer.rewards, buffer.values, buffer.episode_starts = d.reward_np, d.value_np, starts
        buffer.compute_returns_and_advantage(d.last_value, last_done)
        return buffer.advantages, buffer.returns

    return call


def torchrl_loop(d: Data) -> Thunk:
    functional = importlib.import_module("torchrl.objectives.value.functional")
    estimate = functional.generalized_advantage_estimate
    return lambda: [x[..., 0] for x in estimate(DISCOUNT, LAM, *d.column, d.done_column, time_dim=0)]


def torchrl_vectorised(d: Data) -> Thunk | None:
    if d.reward.numel() > 1 << 20:
        return None  # it builds arrays of T² and takes seconds
    functional = importlib.import_module("torchrl.objectives.value.functional")
    estimate = functional.vec_generalized_advantage_estimate
    return lambda: [x[..., 0].t() for x in estimate(DISCOUNT, LAM, *d.column_nt, d.done_nt)]


def tianshou(d: Data) -> Thunk | None:
    if d.reward.shape[1] != 1:
        return None  # it takes one episode stream
    base = importlib.import_module("tianshou.algorithm.algorithm_base")
    args = [x[:, 0].astype(np.float64) for x in (d.value_np, d.next_value_np, d.reward_np)]
    end = d.done_np[:, 0].astype(bool)
    keep = DISCOUNT * (1.0 - end)

    def call() -> tuple[np.ndarray, np.ndarray]:
        # Its function has no notion of a terminal state: the next value is masked outside, which costs next to nothing.
        advantage = base._gae(args[0], args[1] * (keep / DISCOUNT), args[2], end, DISCOUNT, LAM)
        return advantage[:, None], (advantage + args[0])[:, None]

    return call


_numba: dict[str, Callable[..., Any]] = {}


def _numba_kernels() -> dict[str, Callable[..., Any]]:
    if _numba:
        return _numba
    numba = importlib.import_module("numba")
    discount, lam = np.float32(DISCOUNT), np.float32(LAM)

    @numba.njit(fastmath=True, parallel=True)
    def columns(reward, value, last_value, cont):  # type: ignore[no-untyped-def]
        T, N = reward.shape
        advantage, returns = np.empty_like(reward), np.empty_like(reward)
        blocks = (N + 63) // 64
        for b in numba.prange(blocks):
            lo, hi = b * 64, min(N, b * 64 + 64)
            carry, next_value = np.zeros(hi - lo, np.float32), last_value[lo:hi].copy()
            for t in range(T - 1, -1, -1):
                for n in range(lo, hi):
                    k = discount * cont[t, n]
                    x = reward[t, n] + k * (next_value[n - lo] + lam * carry[n - lo]) - value[t, n]
                    carry[n - lo] = x
                    next_value[n - lo] = value[t, n]
                    advantage[t, n] = x
                    returns[t, n] = x + value[t, n]
        return advantage, returns

    @numba.njit(fastmath=True, parallel=True)
    def single_columns(reward, value, last_value, cont):  # type: ignore[no-untyped-def]
        T, N = reward.shape
        advantage, returns = np.empty_like(reward), np.empty_like(reward)
        for n in numba.prange(N):
            carry, next_value = np.float32(0), last_value[n]
            for t in range(T - 1, -1, -1):
                k = discount * cont[t, n]
                carry = reward[t, n] + k * (next_value + lam * carry) - value[t, n]
                next_value = value[t, n]
                advantage[t, n] = carry
                returns[t, n] = carry + value[t, n]
        return advantage, returns

    @numba.njit(fastmath=True)
    def serial(reward, value, last_value, cont):  # type: ignore[no-untyped-def]
        T, N = reward.shape
        advantage, returns = np.empty_like(reward), np.empty_like(reward)
        for n in range(N):
            carry, next_value = np.float32(0), last_value[n]
            for t in range(T - 1, -1, -1):
                k = discount * cont[t, n]
                carry = reward[t, n] + k * (next_value + lam * carry) - value[t, n]
                next_value = value[t, n]
                advantage[t, n] = carry
                returns[t, n] = carry + value[t, n]
        return advantage, returns

    @numba.njit(fastmath=True)
    def rows(reward, value, last_value, cont):  # type: ignore[no-untyped-def]
        T, N = reward.shape
        advantage, returns = np.empty_like(reward), np.empty_like(reward)
        carry, next_value = np.zeros(N, np.float32), last_value.copy()
        for t in range(T - 1, -1, -1):
            for n in range(N):
                k = discount * cont[t, n]
                x = reward[t, n] + k * (next_value[n] + lam * carry[n]) - value[t, n]
                carry[n], next_value[n] = x, value[t, n]
                advantage[t, n] = x
                returns[t, n] = x + value[t, n]
        return advantage, returns

    # The arguments and the meaning of pywm.gae: it may derive nothing from the row below.
    @numba.njit(parallel=True)
    def exact(reward, value, next_value, terminated, truncated):  # type: ignore[no-untyped-def]
        T, N = reward.shape
        advantage, returns = np.empty_like(reward), np.empty_like(reward)
        for b in numba.prange((N + 63) // 64):
            lo, hi = b * 64, min(N, b * 64 + 64)
            carry = np.zeros(hi - lo, np.float32)
            for t in range(T - 1, -1, -1):
                for n in range(lo, hi):
                    future = np.float32(0) if terminated[t, n] else discount * next_value[t, n]
                    kept = (
                        np.float32(0)
                        if terminated[t, n] or truncated[t, n]
                        else discount * lam * carry[n - lo]
                    )
                    x = reward[t, n] + future - value[t, n] + kept
                    carry[n - lo] = x
                    advantage[t, n] = x
                    returns[t, n] = x + value[t, n]
        return advantage, returns

    _numba.update(rows=rows, exact=exact, columns=columns, single_columns=single_columns, serial=serial)
    return _numba


def numba_variant(name: str) -> Callable[[Data], Thunk]:
    def make(d: Data) -> Thunk:
        numba = importlib.import_module("numba")
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        kernel = _numba_kernels()[name]
        if name == "exact":
            masks = d.done.numpy(), d.truncated.numpy()
            return lambda: kernel(d.reward_np, d.value_np, d.next_value_np, *masks)
        return lambda: kernel(d.reward_np, d.value_np, d.last_value_np, d.cont_np)

    return make


GAE: dict[str, Callable[[Data], Thunk | None]] = {
    "pywm": pywm_gae,
    "numba prange, blocks": numba_variant("columns"),
    "numba prange, columns": numba_variant("single_columns"),
    "numba prange, our semantics": numba_variant("exact"),
    "numba one thread": numba_variant("serial"),
    "numba one thread, by rows": numba_variant("rows"),
    "torch.compile of the loop": compiled,
    "stable-baselines3": stable_baselines3,
    "CleanRL-style loop": cleanrl,
    "torchrl loop": torchrl_loop,
    "torchrl vectorised": torchrl_vectorised,
    "tianshou": tianshou,
}


def lambda_loop(reward: Tensor, discount: Tensor, next_value: Tensor) -> tuple[Tensor]:
    last, returns = next_value[-1], []
    inputs = reward + discount * next_value * (1 - LAM)
    for t in range(reward.shape[0] - 1, -1, -1):
        last = inputs[t] + discount[t] * LAM * last
        returns.append(last)
    return (torch.stack(returns[::-1]),)


def lambda_compiled(d: Data) -> Thunk:
    torch.compiler.reset()
    fn = torch.compile(lambda_loop)
    return lambda: fn(d.reward, d.discount, d.next_value)


def lambda_torchrl(vectorised: bool) -> Callable[[Data], Thunk]:
    def make(d: Data) -> Thunk:
        functional = importlib.import_module("torchrl.objectives.value.functional")
        _, next_value, reward = d.column
        if vectorised:
            fn = functional.vec_td_lambda_return_estimate
        else:
            fn = functional.td_lambda_return_estimate
        return lambda: [fn(DISCOUNT, LAM, next_value, reward, d.done_column, time_dim=0)[..., 0]]

    return make


LAMBDA: dict[str, Callable[[Data], Thunk | None]] = {
    "pywm": lambda d: lambda: (pywm.lambda_return(d.reward, d.discount, d.next_value, LAM),),
    "torch.compile of the loop": lambda_compiled,
    "loop (sheeprl's form)": lambda d: lambda: lambda_loop(d.reward, d.discount, d.next_value),
    "torchrl loop": lambda_torchrl(False),
    "torchrl vectorised": lambda_torchrl(True),
}

NEEDS = {
    "numba": "numba",
    "stable-baselines3": "stable_baselines3",
    "torchrl": "torchrl",
    "tianshou": "tianshou",
}


def compare(op: str, shape: tuple[int, int], options: argparse.Namespace) -> dict[str, Any]:
    """Return one row: medians in µs of everybody who can, and who cannot."""
    data = Data(*shape)
    rivals = GAE if op == "gae" else LAMBDA
    thunks: dict[str, Thunk] = {}
    left_out: dict[str, str] = {}
    want = [np.asarray(x, np.float64) for x in rivals["pywm"](data)()]  # type: ignore[misc]
    for name, make in rivals.items():
        package = next((p for k, p in NEEDS.items() if name.startswith(k)), None)
        if package and importlib.util.find_spec(package) is None:
            left_out[name] = "not installed"
            continue
        if "compile" in name and shape[0] > options.compile:
            left_out[name] = (
                f"compiles an unrolled loop of {shape[0]} rows (--compile {shape[0]} to include it)"
            )
            continue
        try:
            thunk = make(data)
            if thunk is None:
                left_out[name] = "not for this shape"
                continue
            got = [np.asarray(x, np.float64) for x in thunk()]  # type: ignore[attr-defined]
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        if not all(np.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(got, want, strict=True)):
            left_out[name] = "gives other results"
            continue
        thunks[name] = thunk
    moved = shape[0] * shape[1] * (22 if op == "gae" else 16)
    bound = triad(moved)
    times = interleaved({**thunks, "bound": bound}, options.seconds)
    bound_us = times.pop("bound")
    ours = times.pop("pywm")
    fastest = min(times, key=times.__getitem__)
    return {
        "op": op,
        "shape": list(shape),
        "pywm_us": round(ours, 2),
        "fastest": fastest,
        "ratio": round(times[fastest] / ours, 2),
        "target": TARGETS[op, shape],
        "times_bound": round(ours / bound_us, 2),
        "rivals_us": {k: round(v, 2) for k, v in sorted(times.items(), key=lambda item: item[1])},
        "left_out": left_out,
    }


def call_overhead() -> dict[str, float]:
    """What a call costs where there is nothing to compute, beside what torch takes for comparable things."""
    x, mask = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool)
    return interleaved(
        {
            "pywm.gae": lambda: pywm.gae(x, x, x, mask, mask),
            "torch.empty_like twice": lambda: (torch.empty_like(x), torch.empty_like(x)),
            "torch.add": lambda: torch.add(x, x),
        },
        2.0,
    )


def main() -> int:
    """Run the comparison and print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each shape")
    parser.add_argument(
        "--compile", type=int, default=16, metavar="ROWS", help="compile loops up to this long"
    )
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    settle_allocator()
    about = machine(options.threads)

    overhead = call_overhead()
    print("call overhead, µs: " + ", ".join(f"{k} {v:.2f}" for k, v in overhead.items()))
    rows = []
    for (op, shape), target in TARGETS.items():
        row = compare(op, shape, options)
        rows.append(row)
        verdict = "reached" if row["ratio"] >= target else "MISSED"
        print(
            f"\n{op} {shape[0]} x {shape[1]}: pywm {row['pywm_us']} µs, {row['times_bound']} x the triad; "
            f"{row['ratio']} x faster than {row['fastest']} (target {target}: {verdict})"
        )
        for name, time_us in row["rivals_us"].items():
            print(f"    {name:28}{time_us:>14} µs{time_us / row['pywm_us']:>10.1f} x")
        for name, reason in row["left_out"].items():
            print(f"    {name:28}left out: {reason}")
        sys.stdout.flush()
    if options.json:
        report = {"machine": about, "overhead_us": overhead, "rows": rows}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    missed = [row for row in rows if row["ratio"] < row["target"]]
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
