"""The only module that touches ``pywm._C``: whether it is there, what it serves, and why not."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import os
import re
import shlex
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, overload
from urllib.parse import unquote, urlsplit

import torch
from torch import Tensor

from pywm._version import __version__
from pywm.ops._check import FLOAT_DTYPES, KERNEL_DTYPES

_C: ModuleType | None = None
why_not: str = ""
"""Why there are no compiled kernels, in one line with the command that mends it; empty when there are."""


def _load() -> tuple[ModuleType | None, str]:
    """Import the compiled module; on any failure say why, for the references can take over."""
    spec = importlib.util.find_spec("pywm._C")
    if spec is None or spec.origin is None:
        return None, f"{_absence()}; mend it with: {mend()}"
    if not _is_whole(Path(spec.origin)):
        return None, f"the compiled module is damaged ({spec.origin} ends too early); mend it with: {mend()}"
    try:
        module = importlib.import_module("pywm._C")
    except ImportError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if reason.startswith("PYWM_"):  # a setting that the module refuses is the user's to mend
            if _in_the_command():
                return None, reason
            raise ValueError(f"pywm: {reason}") from None
        return None, f"the compiled module does not load ({reason}); mend it with: {mend()}"
    found = getattr(module, "__version__", None)
    if found != __version__:
        what = f"the compiled module is of version {found}, the package of {__version__}"
        return None, f"{what}; mend it with: {mend()}"
    return module, ""


def _in_the_command() -> bool:
    """Whether this process is the command ``pywm``, which complains in one line where an import has a traceback."""
    name = getattr(sys, "argv", [""])[0]
    if name == "-m":  # Python is still looking for the module, in this package
        return ("-m", "pywm") in pairwise(sys.orig_argv)
    return Path(name).stem == "pywm"


def refused_setting() -> str:
    """Return why the compiled module refuses a setting of the user's, or "" where it does not."""
    return why_not if why_not.startswith("PYWM_") else ""


def mend() -> str:
    """Return the command that installs the package again from where it came, compiled this time."""
    from importlib import metadata  # only wanted when something is wrong

    checkout = Path(__file__).parents[2]
    source = "pywm"
    try:
        origin = json.loads(metadata.distribution("pywm").read_text("direct_url.json") or "{}")
        if origin.get("dir_info") is not None:  # installed from a folder, not from a package index or a wheel
            editable = "-e " if origin["dir_info"].get("editable") else ""
            source = editable + shlex.quote(unquote(urlsplit(origin["url"]).path))
    except metadata.PackageNotFoundError:
        if (checkout / "CMakeLists.txt").exists():
            source = f"-e {shlex.quote(str(checkout))}"
    # pip would only unpack the same wheel again if it had kept one that was built without kernels.
    return f"pip install --force-reinstall --no-deps --no-cache-dir {source}"


def _absence() -> str:
    wanted = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    found = [p.name for p in Path(__file__).parents[1].glob("_C.*") if p.suffix in (".so", ".pyd")]
    foreign = ", ".join(sorted(name for name in found if name != wanted))
    if foreign:
        return f"the compiled module is of another Python (found {foreign}, this one loads {wanted})"
    return "no compiled module in this installation (it needs a C++ compiler, and PYWM_NO_EXT unset)"


def _is_whole(path: Path) -> bool:
    """Whether an ELF file reaches to the end of its section table: loading a truncated one kills."""
    with contextlib.suppress(OSError, struct.error), path.open("rb") as file:
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01":  # another format; its loader knows better
            return True
        (table,) = struct.unpack_from("<Q", header, 0x28)
        entry_size, entries, names = struct.unpack_from("<3H", header, 0x3A)
        size = file.seek(0, io.SEEK_END)
        if table + entry_size * entries > size:
            return False
        file.seek(table + entry_size * names + 4)
        string_table = 3  # what the last section is, unless the end of the file is zeros
        return file.read(4) == struct.pack("<I", string_table)
    return True


_C, why_not = _load()
# Asked once, for torch.compile cannot trace the question.
_has_bfloat16_instructions = _C is not None and _C.cpu_isa().endswith("bf16")
_disabled = False


def module() -> Any:
    """Return the compiled module; call only after :func:`has_backend` said yes."""
    assert _C is not None, why_not
    return _C


def has_backend(device_type: str) -> bool:
    """Whether this build has kernels for ``"cpu"`` or ``"cuda"``."""
    if _C is None or _disabled:
        return False
    return device_type == "cpu" or (device_type == "cuda" and bool(_C.has_cuda))


_told: set[str] = set()


def tell(why: str) -> None:
    """Warn, once in a process, that references serve where kernels could."""
    if why not in _told:
        _told.add(why)
        logging.getLogger("pywm").warning("compiled kernels are not used: %s", why)


_in_child = False


def _mark_child() -> None:
    global _in_child
    _in_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_child)


def let_products_work() -> None:
    """Call before torch's products where an op must not hang.

    In a child of a process that has used torch's thread pool, the pool's threads are not there, and a product waits for
    them for ever; with one thread torch asks for none.
    """
    if _in_child and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


def has_bfloat16_instructions() -> bool:
    """Whether the CPU's kernels multiply bfloat16 numbers by instructions made for it."""
    return _has_bfloat16_instructions


def supports(x: Tensor) -> bool:
    """Whether this build has kernels for the device and dtype of ``x``."""
    return x.dtype in KERNEL_DTYPES and has_backend(x.device.type)


def entry(name: str) -> Callable[..., Any]:
    """Return the fast entry of op ``name``: it serves the call or returns None."""
    if _C is None:
        return lambda *_: tell(why_not)
    kernel: Callable[..., Any] | None = getattr(_C, name, None)
    if kernel is None:
        what = f"the compiled module has no {name}, for it was built from other sources"
        raise ImportError(f"pywm: {what}; mend it with: {mend()}")
    return kernel


@contextmanager
def disabled() -> Iterator[None]:
    """Run the references inside the ``with`` block, on this process; for tests and comparisons."""
    global _disabled
    before, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = before


def is_disabled() -> bool:
    """Whether :func:`disabled` is in force."""
    return _disabled


def calls() -> dict[str, tuple[int, int]]:
    """How often each compiled kernel ran in this process: name -> (CPU, CUDA)."""
    return dict(_C.calls()) if _C is not None else {}


class Backend(NamedTuple):
    """Which implementation serves a tensor, and why.

    Attributes:
        name: ``"cpu"`` or ``"cuda"`` for compiled kernels, ``"reference"`` for plain PyTorch.
        why: one line: the instruction set and threads, or what is missing and how to mend it.
    """

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


@overload
def backend(x: None = None) -> dict[str, Backend]: ...


@overload
def backend(x: Tensor) -> Backend: ...


def backend(x: Tensor | None = None) -> Backend | dict[str, Backend]:
    """Tell which implementation serves a tensor, or what every device would get, and why.

    Args:
        x: a tensor as it would be passed to an op; None asks for a summary by device.

    Returns:
        A :class:`Backend`, or a dict from ``"cpu"`` and ``"cuda"`` to one.

    Raises:
        TypeError: ``x`` is not a tensor.
    """
    if x is None:
        return {device: _of_device(device) for device in ("cpu", "cuda")}
    if not isinstance(x, Tensor):
        raise TypeError(f"backend: x is a {type(x).__name__}, but a torch.Tensor or None was expected")
    if x.dtype not in FLOAT_DTYPES or x.layout is not torch.strided or x.device.type == "meta":
        return Backend("none", f"ops take dense float tensors, not {x.dtype} {x.layout} on {x.device.type}")
    if x.dtype not in KERNEL_DTYPES:
        return Backend("reference", f"no kernels for {x.dtype}; float32 and float64 have them")
    return _of_device(x.device.type)


def _of_device(device: str) -> Backend:
    if _C is None:
        return Backend("reference", why_not)
    if _disabled:
        return Backend("reference", "compiled kernels are disabled in this block")
    if device == "cpu":
        threads = _C.num_threads()
        why = f"compiled kernels, {_C.cpu_isa()}, {threads} thread{'s' if threads != 1 else ''}"
        # RSSMConfig.operands
        without = (
            ""
            if has_bfloat16_instructions()
            else "; without bfloat16 instructions: such operands stay float32"
        )
        return Backend("cpu", why + without)
    if device != "cuda":
        return Backend("reference", f"no kernels for {device} devices")
    if not _C.has_cuda:
        return Backend("reference", f"built without CUDA kernels: {_C.cuda_reason}")
    if not torch.cuda.is_available():
        return Backend("reference", f"CUDA kernels are built, but torch sees no GPU ({_C.cuda_status()})")
    missing = _missing_architecture(_C.cuda_reason, torch.cuda.get_device_capability())
    return (
        Backend("none", missing)
        if missing
        else Backend("cuda", f"compiled kernels, {_C.cuda_reason}; {_scans()}")
    )


def _scans() -> str:
    from pywm.ops.cuda_graphs import graphs  # above this module

    return f"scans launch by launch ({graphs.why_not})" if graphs.why_not else "scans recorded as CUDA graphs"


def _missing_architecture(built: str, capability: tuple[int, int]) -> str:
    """Say in one line that the kernels ``built`` for some GPUs do not run on one of this capability, or return ""."""
    found = re.findall(r"(\d+)[af]?(-real|-virtual)?(?!\S)", built.partition("architectures ")[2])
    if not found:  # "native" and the like: only a launch can tell
        return ""
    major, minor = capability
    for digits, kind in found:
        arch = int(digits)
        runs_as_it_is = kind != "-virtual" and arch // 10 == major and arch % 10 <= minor
        if runs_as_it_is or (kind != "-real" and arch <= 10 * major + minor):
            return ""
    names = ", ".join(digits for digits, _ in found)
    return (
        f"sm_{major}{minor} is not among the architectures that the kernels were built for ({names}); mend it with: "
        f"PYWM_CUDA_ARCHS={major}{minor} {mend()}"
    )
