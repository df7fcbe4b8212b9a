"""What ``pywm doctor`` finds: versions, kernels and their self-test, extras, known-bad combinations."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import pywm
from pywm.distributions import Categorical
from pywm.ops import _native
from pywm.training import machine

__all__ = ["Finding", "findings"]


class Finding(NamedTuple):
    """One line of ``pywm doctor``; ``mark`` is OK, -- (absent, which is fine) or !! (broken)."""

    what: str
    mark: str
    text: str
    mend: str = ""


def findings() -> list[Finding]:
    """Look at the kernels, the extras, known-bad versions, the disk and the memory."""
    found = [*_kernels(), *_self_test(), *map(_extra, EXTRAS)]
    found += _bad_combinations()
    found.append(Finding("disk", "OK", f"{machine.free_disk() / 2**30:.1f} GiB free here"))
    found.append(Finding("memory", "OK", f"{machine.free_memory() / 2**30:.1f} GiB free"))
    return found


def _kernels() -> list[Finding]:

    findings = []
    backends = pywm.backend()
    for device, title in (("cpu", "C++ kernels"), ("cuda", "CUDA kernels")):
        found = backends[device]
        text, _, mend = found.why.partition("; mend it with: ")
        if found.name == device:
            mark = "OK"
        else:
            mark = "!!" if device == "cpu" or (torch.cuda.is_available() and mend) else "--"
        findings.append(Finding(title, mark, text, mend))
    return findings


def _self_test() -> list[Finding]:
    """Run every op on the compiled kernels and on its reference."""
    if not _native.has_backend("cpu"):
        return []
    generator = torch.Generator().manual_seed(0)
    T, N = 33, 17
    reward, value, next_value, log_ratio = torch.randn(4, T, N, generator=generator)
    terminated, truncated = torch.rand(2, T, N, generator=generator) < 0.1
    discount = 0.9 * torch.rand(T, N, generator=generator)
    dist = Categorical(torch.randn(T, N, 5, generator=generator))
    action = torch.randint(5, (T, N), generator=generator)
    calls: dict[str, Callable[[], Any]] = {
        "gae": lambda: pywm.gae(reward, value, next_value, terminated, truncated),
        "lambda_return": lambda: pywm.lambda_return(reward, discount, next_value, 0.9),
        "discounted_return": lambda: pywm.discounted_return(reward, discount, next_value[-1]),
        "vtrace": lambda: pywm.vtrace(log_ratio, reward, discount, value, next_value, truncated),
        "ppo_loss": lambda: pywm.ppo_loss(dist, action, log_ratio - 1.6, reward, value, next_value).loss,
    }
    wrong = []
    for name, call in calls.items():
        try:
            served = call()
            with _native.disabled():
                expected = call()
            pairs = zip(_tensors(served), _tensors(expected), strict=True)
            if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs):
                wrong.append(f"{name} differs from its reference")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    if wrong:
        return [Finding("self-test", "!!", "; ".join(wrong), _native.mend())]
    return [Finding("self-test", "OK", f"{len(calls)}/{len(calls)} ops equal to PyTorch")]


def _tensors(result: Any) -> list[Any]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


# Extra -> what it brings: the module to look for and the distribution whose version to show.
EXTRAS = {
    "classic": (("pygame", "pygame"),),
    "atari": (("ale_py", "ale-py"),),
    "box2d": (("Box2D", "box2d"),),
    "mujoco": (("mujoco", "mujoco"),),
    "dmc": (("dm_control", "dm-control"),),
    "minigrid": (("minigrid", "minigrid"),),
    "crafter": (("crafter", "crafter"),),
    "tb": (("tensorboard", "tensorboard"),),
    "wandb": (("wandb", "wandb"),),
    "video": (("imageio", "imageio"), ("imageio_ffmpeg", "imageio-ffmpeg")),
    "plot": (("matplotlib", "matplotlib"),),
}


def _extra(name: str) -> Finding:
    parts = EXTRAS[name]
    if all(importlib.util.find_spec(module) for module, _ in parts):
        versions = ", ".join(f"{dist} {machine.version(dist) or ''}".rstrip() for _, dist in parts)
        return Finding(name, "OK", versions)
    return Finding(name, "--", "not installed", f'pip install "pywm[{name}]"')


def _bad_combinations() -> list[Finding]:
    """Versions that are known not to work together."""
    findings = []
    mujoco, dmc, gymnasium = (
        machine.version("mujoco"),
        machine.version("dm-control"),
        machine.version("gymnasium"),
    )
    if mujoco and dmc and _major(mujoco) >= 4:
        text = f"mujoco {mujoco} breaks dm-control {dmc}"
        findings.append(Finding("DM Control", "!!", text, 'pip install "mujoco<4"'))
    if gymnasium and (_major(gymnasium) != 1 or gymnasium.startswith("1.0.")):
        text = f"gymnasium {gymnasium} has another autoreset than pywm knows"
        findings.append(Finding("gymnasium", "!!", text, 'pip install "gymnasium>=1.1,<2"'))
    return findings


def _major(text: str) -> int:
    head = text.partition(".")[0]
    return int(head) if head.isdigit() else 0
