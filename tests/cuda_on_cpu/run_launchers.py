"""Call launchers of a library that was built with the emulator. A program: it runs under a preloaded sanitizer.

    python run_launchers.py LIBRARY REQUEST RESULTS FIRST

``REQUEST.json`` is a list of calls (op, dtype, schedule, the names of its arrays and outputs, numbers), ``REQUEST.npz``
holds the arrays. Every call from number FIRST on is announced on stderr and leaves ``RESULTS/<number>.npz``, or
``RESULTS/<number>.txt`` with the emulator's complaint.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

# The structs of csrc/ops.h, field by field. A star marks a pointer, a sharp a number that is a double in any case.
_PPO = (
    "*old_log_prob *advantage *value *returns *old_value *valid *loss *stats *grad_value *workspace M "
    "clip value_clip value_coef entropy_coef normalize_advantage "
)
_STACK = "*frames *index *first *noise *out R B C pixels stack stride #scale standardize"
STRUCTS = {
    "gae": "*reward *value *next_value *terminated *truncated *valid *advantage *returns T N discount lam",
    "gae_backward": "*grad_advantage *grad_returns *terminated *truncated *valid "
    "*grad_reward *grad_value *grad_next_value T N discount lam",
    "lambda_return": "*reward *discount *next_value *lam_rows *valid *returns T N lam",
    "lambda_return_backward": "*grad *discount *next_value *returns *lam_rows *valid "
    "*grad_reward *grad_discount *grad_next_value T N lam",
    "discounted_return": "*reward *discount *bootstrap *returns T N",
    "discounted_return_backward": "*grad *discount *bootstrap *returns "
    "*grad_reward *grad_discount *grad_bootstrap T N",
    "ppo_loss_categorical": _PPO + "*logits *action *nvec *grad_logits G width",
    "ppo_loss_gaussian": _PPO + "*mean *log_std *action *grad_mean *grad_log_std A log_std_rows",
    "norm_act": "*x *scale *shift *y M D eps activation layer turns",
    "norm_act_backward": "*grad *x *scale *shift *grad_x *grad_scale *grad_shift *partial M D eps activation layer turns",
    "block_gru_gates": "*gates *deter *y M D",
    "block_gru_gates_backward": "*grad *gates *deter *grad_gates *grad_deter M D",
    "layernorm_gru_gates": "*pre *scale *shift *deter *y M D eps",
    "layernorm_gru_gates_backward": "*grad *pre *scale *shift *deter "
    "*grad_pre *grad_scale *grad_shift *grad_deter *partial M D eps",
    "gru_gates": "*input *hidden *deter *y M D",
    "gru_gates_backward": "*grad *input *hidden *deter *grad_input *grad_hidden *grad_deter M D",
    "gru_block_reset": "*gates *deter *y M D",
    "gru_block_reset_backward": "*grad *gates *deter *grad_gates *grad_deter M D",
    "gru_block_update": "*gates *candidate *deter *y M D",
    "gru_block_update_backward": "*grad *gates *candidate *deter *grad_gates *grad_candidate *grad_deter M D",
    "one_hot_linear": "*weight *bias *index *y *packed M U groups classes",
    "one_hot_linear_backward": "*grad *index *grad_weight *grad_bias *packed M U groups classes",
    "philox": "*out T N slots seed offset stream normal",
    "categorical_sample": "*logits *uniform *stoch *index M K unimix",
    "categorical_sample_backward": "*grad *logits *grad_logits M K unimix",
    "rssm_enter": "*deter *add *stoch_proj *packed *index *is_first *h *u N D H groups classes add_stride u_stride",
    "rssm_leave": "*logits *outer_logits *outer_stoch *outer_deter *carry_stoch *carry_deter *is_first_behind "
    "*grad_logits *grad_h N D groups classes unimix",
    "kl_balance": "*posterior *prior *dynamics *representation *kl M G K unimix free_nats",
    "kl_balance_backward": "*grad_dynamics *grad_representation *posterior *prior *kl *grad_posterior *grad_prior "
    "M G K unimix free_nats",
    "symexp_twohot_loss": "*logits *target *other *loss M B other_scale",
    "symexp_twohot_loss_backward": "*grad *logits *target *other *grad_logits M B other_scale",
    "symexp_twohot_mean": "*logits *mean M B",
    "symexp_twohot_mean_backward": "*grad *logits *mean *grad_logits M B",
    "gaussian_sample": "*mean *raw_std *noise *sample *std P min_std sigmoid2",
    "gaussian_sample_backward": "*grad_sample *grad_std *raw_std *noise *grad_mean *grad_raw_std P sigmoid2",
    "laprop_step": "*param *grad *exp_avg *exp_avg_sq *norm *slow *rounded *offsets *workspace P segments step followed "
    "#lr #beta1 #beta2 #eps #clip #min_norm #slow_rate",
    "gaussian_kl": "*mean_q *std_q *mean_p *std_p *kl M Z",
    "gaussian_kl_backward": "*grad *mean_q *std_q *mean_p *std_p "
    "*grad_mean_q *grad_std_q *grad_mean_p *grad_std_p M Z",
    "pixel_cross_entropy": "*logits *target *loss M K cutoff",
    "pixel_cross_entropy_backward": "*grad *logits *loss *target *grad_logits M K cutoff",
    "stack_frames": _STACK,
    "stack_frames_bytes": _STACK,
    "resize_area": "*frames *out M h w h2 w2",
    "sample_starts": "*is_first *is_last *valid T N stack *uniform *row *env *first B beginning",
}
_BYTES = ("stack_frames_bytes", "resize_area")  # launchers without a float type
_SIZES = {"T", "N", "M", "G", "K", "B", "Z", "P", "D", "U", "A"}
_SIZES |= {"width", "log_std_rows", "slots", "offset", "stream", "groups", "classes", "turns"}
_SIZES |= {"H", "add_stride", "u_stride", "segments", "step", "followed"}
_SIZES |= {"R", "C", "pixels", "stack", "stride", "h", "w", "h2", "w2"}
_DOUBLES = {"clip", "value_clip", "value_coef", "entropy_coef", "unimix", "free_nats"}
_FLAGS = {"normalize_advantage", "layer", "normal", "sigmoid2", "standardize", "beginning"}
_POISON = 0xFF  # as a float: NaN


def struct_type(op: str, dtype: str) -> type[ctypes.Structure]:
    """Return the ctypes twin of the launcher's struct."""
    real = {"float32": ctypes.c_float, "float64": ctypes.c_double}[dtype]

    def field(name: str) -> tuple[str, Any]:
        if name.startswith("*"):
            return name[1:], ctypes.c_void_p
        if name.startswith("#"):
            return name[1:], ctypes.c_double
        if name in _SIZES:
            return name, ctypes.c_int64
        if name in _DOUBLES:
            return name, ctypes.c_double
        if name == "activation":
            return name, ctypes.c_int
        if name == "seed":
            return name, ctypes.c_uint64
        return name, ctypes.c_bool if name in _FLAGS else real

    fields = [field(name) for name in STRUCTS[op].split()]
    return type(op, (ctypes.Structure,), {"_fields_": fields})


class Memory:
    """Blocks of exactly the size asked for, so that a sanitizer sees the first byte beyond."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.malloc.restype = ctypes.c_void_p
        self._libc.malloc.argtypes = [ctypes.c_size_t]
        self._libc.free.argtypes = [ctypes.c_void_p]
        self._blocks: list[int] = []

    def hold(self, array: np.ndarray) -> int:
        """Return the address of a copy."""
        array = np.ascontiguousarray(array)
        address = self._libc.malloc(max(array.nbytes, 1))
        self._blocks.append(address)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        return address

    def read(self, address: int, shape: list[int], dtype: str) -> np.ndarray:
        """Return a copy of what stands at an address."""
        array = np.empty(shape, dtype)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        return array

    def free(self) -> None:
        """Give all blocks back."""
        while self._blocks:
            self._libc.free(self._blocks.pop())


def main() -> None:
    """Run the calls."""
    library, request, results, first = (
        ctypes.CDLL(sys.argv[1]),
        sys.argv[2],
        Path(sys.argv[3]),
        int(sys.argv[4]),
    )
    library.emulator_error.restype = ctypes.c_char_p
    library.emulator_set_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
    library.ppo_loss_workspace.restype = ctypes.c_int64
    library.ppo_loss_workspace.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.norm_act_workspace.restype = ctypes.c_int64
    library.norm_act_workspace.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.laprop_workspace.restype = ctypes.c_int64
    library.laprop_workspace.argtypes = [ctypes.c_int64, ctypes.c_int64]
    calls = json.loads(Path(f"{request}.json").read_text())
    arrays = np.load(f"{request}.npz")
    memory = Memory()
    for number, call in enumerate(calls):
        if number < first:
            continue
        print(f"== call {number}", file=sys.stderr, flush=True)
        op, dtype = call["op"], call["dtype"]
        args = struct_type(op, dtype)()
        for name in call["arrays"]:
            setattr(args, name, memory.hold(arrays[f"{number}/{name}"]))
        for name, shape in call["byte_outputs"].items():
            setattr(args, name, memory.hold(np.full(shape, _POISON, np.uint8)))
        for name, shape in call["index_outputs"].items():
            setattr(args, name, memory.hold(np.full([*shape, 8], _POISON, np.uint8)))
        for name, shape in call["outputs"].items():
            poison = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, _POISON, np.uint8)
            setattr(args, name, memory.hold(poison))
        if "workspace_columns" in call:
            doubles = library.ppo_loss_workspace(call["numbers"]["M"], call["workspace_columns"])
            args.workspace = memory.hold(np.full(doubles, np.nan))
        if "partial_columns" in call:
            elements = library.norm_act_workspace(call["numbers"]["M"], call["partial_columns"])
            args.partial = memory.hold(np.full(elements, np.nan, dtype))
        if op == "laprop_step":
            doubles = library.laprop_workspace(call["numbers"]["P"], call["numbers"]["segments"])
            args.workspace = memory.hold(np.full(doubles, np.nan))
        for name, value in call["numbers"].items():
            setattr(args, name, value)
        library.emulator_set_schedule(*call["schedule"])
        suffix = "" if op in _BYTES else "_f32" if dtype == "float32" else "_f64"
        launcher = getattr(library, op + suffix)
        launcher.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        if launcher(ctypes.byref(args), ctypes.sizeof(args)):
            (results / f"{number}.txt").write_text(library.emulator_error().decode())
        else:
            got = {
                name: memory.read(getattr(args, name), shape, dtype)
                for name, shape in {**call["outputs"], **call["in_place"]}.items()
            }
            got |= {
                name: memory.read(getattr(args, name), shape, "uint8")
                for name, shape in call["byte_outputs"].items()
            }
            got |= {
                name: memory.read(getattr(args, name), shape, "int64")
                for name, shape in call["index_outputs"].items()
            }
            np.savez(results / f"{number}.npz", **got)
        memory.free()


if __name__ == "__main__":
    main()
