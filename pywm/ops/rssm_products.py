"""Scans made of torch's products and our row kernels: how a GPU observes and imagines.

Torch's products are the fastest there are on a GPU, and what lies between two of them is one launch of a row kernel. All of
them write into memory that is there already, so that a whole window can be recorded once as a CUDA graph and played again
(see :mod:`pywm.ops.cuda_graphs`). The backward pass is written by hand: one reverse scan for the gradients of the
pre-activations, and the weights' gradients as one product each over all T·N rows, which ``rssm_scan`` makes for every
backend.

With bfloat16 operands a call begins with copies of all weights, and each product with one of its activations; both belong
to what is recorded, so that they are made anew from the weights as they are.

The cells with categorical latents and a norm: ``block_gru`` and ``layernorm_gru``. Any device: the CPU has a faster way,
but runs this one in tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pywm.ops import _native, reference_rssm
from pywm.ops._operands import cast, multiply
from pywm.ops._registry import served
from pywm.ops.rssm_params import Layer, Policy, RSSMConfig

CELLS = ("block_gru", "layernorm_gru")


_forced = False


@contextmanager
def forced() -> Iterator[None]:
    """Take this way on the CPU too, inside the ``with`` block, on this process; for tests."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def is_forced() -> bool:
    """Whether :func:`forced` is in force."""
    return _forced


def serves(c: RSSMConfig) -> bool:
    """Whether a model of this form can be scanned here."""
    return c.cell in CELLS and not c.is_gaussian and c.norm != "none"


class Rows:
    """The row kernels; each method writes its last arguments. For tests, which put the emulator's in their place."""

    def norm_act(self, x: Tensor, layer: Layer, c: RSSMConfig | Policy, y: Tensor) -> None:
        """Norm and nonlinearity of rows; with scales ``[turns, D]``, row m takes number m mod turns."""
        options = layer.scale, layer.shift, c.norm, c.act, c.eps
        served(_native.module().rows_norm_act(x, *options, y), "norm_act")

    def norm_act_backward(
        self, grad: Tensor, x: Tensor, layer: Layer, c: RSSMConfig | Policy, grad_x: Tensor
    ) -> None:
        """The gradient of the rows only."""
        options = layer.scale, layer.shift, c.norm, c.act, c.eps
        served(_native.module().rows_norm_act_backward(grad, x, *options, grad_x), "norm_act_backward")

    def block_gates(self, gates: Tensor, deter: Tensor, y: Tensor) -> None:
        """A block of a row is a row."""
        served(_native.module().rows_block_gru_gates(gates, deter, y), "block_gru_gates")

    def block_gates_backward(self, grad: Tensor, gates: Tensor, deter: Tensor, *outputs: Tensor) -> None:
        """Writes the gradients of gates and deter."""
        result = _native.module().rows_block_gru_gates_backward(grad, gates, deter, *outputs)
        served(result, "block_gru_gates_backward")

    def layernorm_gates(self, pre: Tensor, layer: Layer, eps: float, deter: Tensor, y: Tensor) -> None:
        """LayerNorm over all gates, and the cell."""
        result = _native.module().rows_layernorm_gru_gates(pre, layer.scale, layer.shift, deter, eps, y)
        served(result, "layernorm_gru_gates")

    def layernorm_gates_backward(
        self, grad: Tensor, pre: Tensor, layer: Layer, eps: float, deter: Tensor, *outputs: Tensor
    ) -> None:
        """Writes the gradients of pre and deter."""
        kernel = _native.module().rows_layernorm_gru_gates_backward
        result = kernel(grad, pre, layer.scale, layer.shift, deter, eps, *outputs)
        served(result, "layernorm_gru_gates_backward")

    def sample(self, logits: Tensor, uniform: Tensor, unimix: float, stoch: Tensor, index: Tensor) -> None:
        """``logits [M, K]``."""
        result = _native.module().rows_categorical_sample(logits, uniform, unimix, stoch, index)
        served(result, "categorical_sample")

    def enter(
        self,
        deter: Tensor,
        add: Tensor,
        stoch_proj: Tensor | None,
        packed: Tensor,
        index: Tensor | None,
        is_first: Tensor,
        h: Tensor,
        u: Tensor,
    ) -> None:
        """The masked state, and the layer that takes the sample before."""
        result = _native.module().rssm_enter(deter, add, stoch_proj, packed, index, is_first, h, u)
        served(result, "rssm_enter")

    def leave(self, *arguments: Any) -> None:
        """Where a step of the reverse scan begins."""
        served(_native.module().rssm_leave(*arguments), "rssm_leave")


rows = Rows()


def _together(layers: Sequence[Layer]) -> Layer:
    """Layers side by side, as far as norms go."""
    shifts = [x.shift for x in layers]
    scale = torch.stack([x.scale for x in layers])  # type: ignore[misc]
    return Layer(scale, None, scale, torch.stack(shifts) if shifts[0] is not None else None)  # type: ignore[arg-type]


def _linear(x: Tensor, layer: Layer, out: Tensor) -> None:
    multiply(x, layer.weight.t(), out, layer.bias)


def _cast(layers: Sequence[Layer], operands: str) -> list[Layer]:
    """Layers with weights in the dtype in which :func:`multiply` takes them."""
    return [layer._replace(weight=cast(layer.weight, operands)) for layer in layers]


def _blocks(x: Tensor, G: int) -> Tensor:
    """``[N, G·width]`` as ``[G, N, width]``."""
    return x.view(x.shape[0], G, -1).transpose(0, 1)


class _Cell:
    """The parts of a cell's weights that meet in its products; ``layers`` have them as products take them."""

    def __init__(self, c: RSSMConfig, layers: dict[str, Layer], action: bool = False) -> None:
        layers = dict(zip(layers, _cast(list(layers.values()), c.operands), strict=True))
        self.c, self.layers = c, layers
        self.block = c.cell == "block_gru"
        stoch_in = layers["stoch_in"]
        self.stoch_weight = stoch_in.weight[:, : c.stoch_width]
        # A class's numbers side by side, to be gathered.
        self.packed = self.stoch_weight.t().to(stoch_in.scale.dtype).contiguous()  # type: ignore[union-attr]
        inputs = [stoch_in]
        if self.block:
            inputs = [layers["deter_in"], stoch_in, *([layers["action_in"]] if action else [])]
            width = c.deter // c.blocks
            self.from_deter = layers["hidden"].weight[:, :, :width]  # [G, D/G, D/G]
            self.from_x = layers["hidden"].weight.flatten(0, 1)[:, width : width + len(inputs) * c.hidden]
        else:
            self.from_x, self.from_deter = (
                layers["gates"].weight[:, : c.hidden],
                layers["gates"].weight[:, c.hidden :],
            )
        self.inputs = len(inputs)
        self.norms = _together(inputs)
        bias = stoch_in.bias
        self.bias = bias if bias is not None else self.packed.new_zeros(c.hidden)

    def step(
        self,
        h: Tensor,
        u: Tensor,
        x: Tensor,
        add: Tensor,
        cell1: Tensor,
        y: Tensor,
        cell2: Tensor,
        deter: Tensor,
    ) -> None:
        """From the masked h and the pre-activations ``u [N, inputs, H]``, of which deter_in's are made here, to deter.

        ``add`` is what the first product of block_gru is added to; the rest is written.
        """
        c, layers, N = self.c, self.layers, len(h)
        taken = cast(h, c.operands)
        if self.block:
            _linear(taken, layers["deter_in"], u[:, 0])
        rows.norm_act(u.view(-1, c.hidden), self.norms, c, x.view(-1, c.hidden))
        x = x.view(N, -1)
        if self.block:
            multiply(x, self.from_x.t(), cell1, add)
            blocks = _blocks(cell1, c.blocks)
            multiply(_blocks(taken, c.blocks), self.from_deter.transpose(1, 2), blocks, blocks)
            rows.norm_act(cell1, layers["hidden"], c, y)
            gates, inputs = layers["gates"], _blocks(y, c.blocks)
            bias = gates.bias.view(c.blocks, 1, -1)  # type: ignore[union-attr]
            multiply(inputs, gates.weight.transpose(1, 2), _blocks(cell2, c.blocks), bias)
            width = c.deter // c.blocks
            rows.block_gates(cell2.view(-1, 3 * width), h.view(-1, width), deter.view(-1, width))
        else:
            gates = layers["gates"]
            _linear(x, Layer(self.from_x, gates.bias), cell1)
            multiply(taken, self.from_deter.t(), cell1, cell1)
            rows.layernorm_gates(cell1, gates, c.cell_eps, h, deter)


def observe(
    c: RSSMConfig,
    layers: dict[str, Layer],
    token_proj: Tensor,
    action_proj: Tensor,
    deter0: Tensor,
    stoch_proj: Tensor,
    noise: Tensor | None,
    is_first: Tensor,
    force: Tensor | None,
) -> list[Tensor]:
    """Scan a window.

    Args:
        c: the form of the model.
        layers: by name, as ``rssm_scan`` has them.
        token_proj: ``[T, N, H]``, the embeddings' part of the head's pre-activations, bias included.
        action_proj: ``[T, N, D]``, the actions' part of the block-diagonal layer with its bias; of ``layernorm_gru`` that
            of stoch_in, ``[T, N, H]``.
        deter0: ``[N, D]``.
        stoch_proj: ``[N, H]``, the initial sample's part of stoch_in.
        noise: ``[T, N, S]`` uniforms, unless samples are forced.
        is_first: ``[T, N]`` bool.
        force: ``[T, N, S]`` uint8 classes, or None.

    Returns:
        deter, logits, samples, classes, and the pre-activations ``u``, ``cell1``, ``cell2``, ``o`` for the backward pass.
    """
    T, N, H = token_proj.shape
    D, S, K = c.deter, c.stoch, c.classes
    cell = _Cell(c, layers)
    new = token_proj.new_empty
    deters, stats, stochs = new(T, N, D), new(T, N, S * K), new(T, N, S * K)
    u, o = new(T, N, cell.inputs, H), new(T, N, H)
    cell1, cell2 = (new(T, N, D), new(T, N, 3 * D)) if cell.block else (new(T, N, 3 * D), new(T, N, 0))
    if force is None:
        index = new(T, N, S, dtype=torch.uint8)
    else:
        index = force.clone()
        stochs.copy_(torch.nn.functional.one_hot(force.long(), K).flatten(2))
    h, x, y, head = new(N, D), new(N, cell.inputs, H), new(N, D), new(N, H)
    posterior, out = cell.layers["posterior"], cell.layers["out"]
    of_deter = posterior.weight[:, :D].t()
    for t in range(T):
        before, proj, classes = (deters[t - 1], None, index[t - 1]) if t else (deter0, stoch_proj, None)
        add = cell.bias if cell.block else action_proj[t]
        rows.enter(before, add, proj, cell.packed, classes, is_first[t], h, u[t, :, -1])
        cell.step(h, u[t], x, action_proj[t], cell1[t], y, cell2[t], deters[t])
        multiply(deters[t], of_deter, o[t], token_proj[t])
        rows.norm_act(o[t], posterior, c, head)
        _linear(head, out, stats[t])
        if force is None:
            assert noise is not None
            logits = stats[t].view(-1, K)
            rows.sample(logits, noise[t].view(-1), c.unimix, stochs[t].view(-1, K), index[t].view(-1))
    return [deters, stats, stochs, index, u.flatten(2), cell1, cell2, o]


def observe_backward(
    c: RSSMConfig,
    layers: dict[str, Layer],
    grad_deter: Tensor | None,
    grad_stats: Tensor | None,
    grad_stoch: Tensor | None,
    deter0: Tensor,
    deter: Tensor,
    stats: Tensor,
    is_first: Tensor,
    u: Tensor,
    cell1: Tensor,
    cell2: Tensor,
    o: Tensor,
) -> list[Tensor]:
    """Scan in reverse.

    Returns:
        The gradients of deter0, of the initial sample's part of stoch_in, of logits, o, cell1, cell2 and u; the activations
        x, y and head, computed again; the gradients of all norms' scales and shifts, one after the other.
    """
    T, N, D = deter.shape
    S, K, H = c.stoch, c.classes, c.hidden
    cell = _Cell(c, layers)
    layers, G = cell.layers, c.blocks
    reset = is_first.unsqueeze(-1)
    before = torch.cat([deter0.unsqueeze(0), deter[:-1]]).masked_fill_(reset, 0)
    d_stats, d_u, d_cell1, d_cell2, d_o = (torch.empty_like(t) for t in (stats, u, cell1, cell2, o))
    grad_head, grad_x = torch.empty_like(o), torch.empty_like(u)
    grad_y = torch.empty_like(cell1) if cell.block else None
    grad_h, carry, carry_stoch = torch.empty_like(deter), torch.empty_like(deter0), stats.new_empty(N, S * K)
    posterior, out, gates = layers["posterior"], layers["out"], layers["gates"]
    of_deter = posterior.weight[:, :D]
    outer = [None if g is None else g.view(T, N, -1) for g in (grad_stats, grad_stoch, grad_deter)]
    for t in range(T - 1, -1, -1):
        behind = (carry_stoch, carry, is_first[t + 1]) if t + 1 < T else (None, None, None)
        outside = [None if g is None else g[t] for g in outer]
        rows.leave(stats[t].view(N, S, K), *outside, *behind, c.unimix, d_stats[t], grad_h[t])
        multiply(d_stats[t], out.weight, grad_head[t])
        rows.norm_act_backward(grad_head[t], o[t], posterior, c, d_o[t])
        into = grad_h[t]
        multiply(d_o[t], of_deter, into, into)
        if cell.block:
            assert grad_y is not None
            width = D // G
            grads = d_cell2[t].view(-1, 3 * width), carry.view(-1, width)
            rows.block_gates_backward(
                grad_h[t].view(-1, width), cell2[t].view(-1, 3 * width), before[t].view(-1, width), *grads
            )
            multiply(_blocks(d_cell2[t], G), gates.weight, _blocks(grad_y[t], G))
            rows.norm_act_backward(grad_y[t], cell1[t], layers["hidden"], c, d_cell1[t])
            taken = cast(d_cell1[t], c.operands)
            multiply(taken, cell.from_x, grad_x[t])
            into = _blocks(carry, G)
            multiply(_blocks(taken, G), cell.from_deter, into, into)
        else:
            rows.layernorm_gates_backward(
                grad_h[t], cell1[t], gates, c.cell_eps, before[t], d_cell1[t], carry
            )
            taken = cast(d_cell1[t], c.operands)
            multiply(taken, cell.from_x, grad_x[t])
            multiply(taken, cell.from_deter, carry, carry)
        rows.norm_act_backward(grad_x[t].view(-1, H), u[t].view(-1, H), cell.norms, c, d_u[t].view(-1, H))
        if cell.block:
            multiply(d_u[t, :, :H], layers["deter_in"].weight, carry, carry)
        multiply(d_u[t, :, -H:], cell.stoch_weight, carry_stoch)
    x, y, head = torch.empty_like(u), d_o.new_empty(T, N, D if cell.block else 0), torch.empty_like(o)
    rows.norm_act(u.view(-1, H), cell.norms, c, x.view(-1, H))
    if cell.block:
        rows.norm_act(cell1.view(-1, D), layers["hidden"], c, y.view(-1, D))
    rows.norm_act(o.view(-1, H), posterior, c, head.view(-1, H))
    sums: list[Tensor] = []
    halves = (
        (("deter_in", slice(0, H)), ("stoch_in", slice(H, None)))
        if cell.block
        else (("stoch_in", slice(0, H)),)
    )
    for name, columns in halves:
        sums += _norm_sums(grad_x[..., columns], u[..., columns], layers[name], c)
    if cell.block:
        assert grad_y is not None
        sums += _norm_sums(grad_y, cell1, layers["hidden"], c)
    else:
        rest = grad_h, cell1, gates.scale, gates.shift, before, c.cell_eps, [False, True, True, False]
        sums += torch.ops.pywm.layernorm_gru_gates_backward(*rest)[1:3]
    sums += _norm_sums(grad_head, o, posterior, c)
    grad_deter0 = carry.masked_fill(reset[0], 0)
    grad_proj = d_u[0, :, -H:].masked_fill(reset[0], 0)
    return [grad_deter0, grad_proj, d_stats, d_o, d_cell1, d_cell2, d_u, x, y, head, torch.cat(sums)]


def _norm_sums(grad: Tensor, x: Tensor, layer: Layer, c: RSSMConfig) -> list[Tensor]:
    """The gradients of scale and shift over all rows."""
    wanted = [False, True, layer.shift is not None]
    rest = layer.scale, layer.shift, c.norm, c.act, c.eps, wanted
    _, scale, shift = torch.ops.pywm.norm_act_backward(grad.contiguous(), x.contiguous(), *rest)
    return [scale, shift] if layer.shift is not None else [scale]


def imagine(
    c: RSSMConfig,
    layers: dict[str, Layer],
    prior: Sequence[Layer],
    policy: Policy,
    network: Sequence[Layer],
    horizon: int,
    deter0: Tensor,
    stoch0: Tensor,
    index0: Tensor,
    noise: Tensor | None,
    action_noise: Tensor | None,
    force: Tensor | None,
    force_action: Tensor | None,
) -> list[Tensor]:
    """Act and step; the arguments are :func:`pywm.imagine`'s, the sample flat.

    Returns:
        deter, samples and classes with a row more than the horizon, actions, the prior's logits, the policy's outputs.
    """
    N, D = deter0.shape
    H, S, K = c.hidden, c.stoch, c.classes
    cell = _Cell(c, layers, action=True)
    new = deter0.new_empty
    deters, stochs = new(horizon + 1, N, D), new(horizon + 1, N, S * K)
    index = new(horizon + 1, N, S, dtype=torch.uint8)
    actions, stats = new(horizon, N, c.action), new(horizon, N, S * K)
    outputs = new(horizon, N, network[-1].weight.shape[0])
    deters[0].copy_(deter0)
    stochs[0].copy_(stoch0)
    index[0].copy_(index0)
    if force is not None:
        index[1:].copy_(force)
        stochs[1:].copy_(torch.nn.functional.one_hot(force.long(), K).flatten(2))
    if force_action is not None:
        actions.copy_(force_action)
    never = index0.new_zeros(N, dtype=torch.bool)
    u, x, y, h = new(N, cell.inputs, H), new(N, cell.inputs, H), new(N, D), new(N, D)
    cell1, cell2 = (new(N, D), new(N, 3 * D)) if cell.block else (new(N, 3 * D), new(N, 0))
    prior, network = _cast(prior, c.operands), _cast(network, c.operands)
    first = network[0]
    a, b = (new(N, first.weight.shape[0]) for _ in range(2))
    p, q = new(N, H), new(N, H)
    stoch_in = cell.layers["stoch_in"]
    add = new(N, H)
    into = layers["hidden"].bias if cell.block else None
    wide = into if into is not None else new(D).zero_()
    for t in range(horizon):
        _linear(stochs[t], Layer(first.weight[:, D:], first.bias), a)
        multiply(deters[t], first.weight[:, :D].t(), a, a)
        _hidden(a, network, policy, b, outputs[t])
        if force_action is None:
            assert action_noise is not None
            _act(policy, outputs[t], action_noise[t], actions[t])
        taken = actions[t]
        if cell.block:
            if policy.kind != "categorical" or force_action is not None:
                taken = taken / taken.abs().clamp(min=1)
            _linear(taken, cell.layers["action_in"], u[:, 2])
        else:
            _linear(taken, Layer(stoch_in.weight[:, S * K :], stoch_in.bias), add)
        # The starts' samples may be floats, and nothing else: their product is not a gathered sum.
        proj = None
        if t == 0:
            proj = new(N, H)
            multiply(stoch0, cell.stoch_weight.t(), proj)
        start = cell.bias if cell.block else add
        rows.enter(deters[t], start, proj, cell.packed, index[t], never, h, u[:, 1 if cell.block else 0])
        cell.step(h, u, x, wide, cell1, y, cell2, deters[t + 1])
        _linear(deters[t + 1], prior[0], p)
        _hidden(p, prior, c, q, stats[t])
        if force is None:
            assert noise is not None
            logits = stats[t].view(-1, K)
            rows.sample(logits, noise[t].view(-1), c.unimix, stochs[t + 1].view(-1, K), index[t + 1].view(-1))
    return [deters, stochs, index, actions, stats, outputs]


def _hidden(
    pre: Tensor, layers: Sequence[Layer], c: RSSMConfig | Policy, scratch: Tensor, out: Tensor
) -> None:
    """From the first hidden layer's pre-activations, which are overwritten, to the output."""
    for i, layer in enumerate(layers[:-1]):
        if i:
            _linear(scratch, layer, pre)
        if c.norm == "none":
            scratch.copy_(reference_rssm.norm_act(pre, layer, c))
        else:
            rows.norm_act(pre, layer, c, scratch)
    _linear(scratch, layers[-1], out)


def _act(policy: Policy, outputs: Tensor, noise: Tensor, action: Tensor) -> None:
    if policy.kind == "categorical":
        begin = 0
        for i, classes in enumerate(policy.groups):
            logits = outputs[:, begin : begin + classes].contiguous()
            taken, index = torch.empty_like(logits), logits.new_empty(len(logits), dtype=torch.uint8)
            rows.sample(logits, noise[:, i].contiguous(), policy.unimix, taken, index)
            action[:, begin : begin + classes].copy_(taken)
            begin += classes
        return
    action.copy_(reference_rssm.act(policy, outputs, noise))  # a few launches of torch's
