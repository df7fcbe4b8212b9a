"""What ``pywm doctor`` finds: versions, kernels and their self-test, extras, known-bad combinations."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, NamedTuple

import torch

import pywm
from pywm.ops import _native
from pywm.training import machine

if TYPE_CHECKING:
    from pywm.testing.opinfo import OpInfo

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
    """Run every op of the table on the compiled kernels, against its float64 reference."""
    from pywm.testing.opinfo import OPS

    devices = [
        d for d in ("cpu", "cuda") if _native.has_backend(d) and (d == "cpu" or torch.cuda.is_available())
    ]
    wrong = []
    tested = [(op, device) for device in devices for op in OPS if device in op.devices]
    for op, device in tested:
        try:
            if not all(_equals_reference(op, variant, device) for variant in op.variants):
                wrong.append(f"{op.name} on {device} differs from its reference")
        except Exception as error:  # whatever a broken kernel raises is the finding
            wrong.append(f"{op.name} on {device} raises {type(error).__name__}: {error}")
    if wrong:
        return [Finding("self-test", "!!", "; ".join(wrong), _native.mend())]
    if not tested:
        return []
    return [
        Finding("self-test", "OK", f"{len(tested)}/{len(tested)} ops equal to PyTorch ({', '.join(devices)})")
    ]


def _equals_reference(op: OpInfo, variant: str, device: str) -> bool:
    sample = op.sample(op.shapes[-1], variant, device=device)
    served, expected = op.op(sample), op.reference(sample.double())
    rtol, atol = op.tol[torch.float32]
    return all(
        torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol, equal_nan=True)
        for a, b in zip(served, expected, strict=True)
    )


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
    "sb3": (("stable_baselines3", "stable-baselines3"),),
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
