"""The scan behind ``rssm_observe``: the dispatcher's op, its kernels' calls, and its gradient.

What does not depend on the recurrence is made of large products outside it: the embeddings' and actions' parts before, all
gradients of weights after.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pywm.ops import _native, _operands, _rssm_check, reference_rssm, rssm_products
from pywm.ops._registry import define, differentiate, is_traced, is_transformed, plain, plain_optional, served
from pywm.ops.cuda_graphs import graphs
from pywm.ops.norm_act import _backward as norm_act_backward
from pywm.ops.rssm_params import CELLS, NORMS, OPERANDS, Layer, RSSMConfig, RSSMParams

# Layers of the scan in the order in which the kernel takes them, and whether its bias is the kernel's business.
_KERNEL_LAYERS = ("deter_in", "stoch_in", "hidden", "gates", "candidate", "posterior", "out")
_LAYERS = ("deter_in", "stoch_in", "action_in", "hidden", "gates", "candidate", "posterior", "out")


def _layer(params: RSSMParams, name: str) -> Layer | None:
    if name == "posterior":
        return params.posterior[0]
    if name == "out":
        return params.posterior[1]
    layer: Layer | None = getattr(params, name)
    return layer


def flat(params: RSSMParams) -> tuple[list[Tensor], int]:
    """The scan's tensors, and a bit mask that tells which of the layers' parts they are."""
    tensors: list[Tensor] = []
    present = 0
    for i, name in enumerate(_LAYERS):
        for j, x in enumerate(_layer(params, name) or ()):
            if x is not None:
                tensors.append(x)
                present |= 1 << (4 * i + j)
    return tensors, present


@functools.lru_cache(maxsize=64)
def _config(sizes: tuple[int, ...], numbers: tuple[float, ...]) -> RSSMConfig:
    cell, norm, act, deter, hidden, stoch, classes, blocks, sigmoid2, _, operands = sizes
    unimix, eps, cell_eps, min_std = numbers
    return RSSMConfig(
        deter=deter,
        hidden=hidden,
        stoch=stoch,
        classes=classes,
        cell=CELLS[cell],
        blocks=blocks,
        norm=NORMS[norm],
        act=("none", "", "silu", "elu", "relu")[act],
        unimix=unimix,
        eps=eps,
        cell_eps=cell_eps,
        std="sigmoid2" if sigmoid2 else "softplus",
        min_std=min_std,
        operands=OPERANDS[operands],
    )


class Scan(NamedTuple):
    """The form of a scan: what a kernel must know beside tensors, as the dispatcher can carry it."""

    sizes: list[int]
    numbers: list[float]

    @staticmethod
    def of(c: RSSMConfig, present: int) -> Scan:
        """Of a configuration and the mask of :func:`flat`."""
        kinds = CELLS.index(c.cell), NORMS.index(c.norm), {"none": 0, "silu": 2, "elu": 3, "relu": 4}[c.act]
        flags = int(c.std == "sigmoid2"), present, OPERANDS.index(c.operands)
        blocks = c.blocks if c.cell == "block_gru" else 1  # the others' widths need not be multiples of it
        sizes = [*kinds, c.deter, c.hidden, c.stoch, c.classes, blocks, *flags]
        return Scan(sizes, [c.unimix, c.eps, c.cell_eps, c.min_std])

    def form(self) -> tuple[Any, ...]:
        """As the binding takes it."""
        return (*self.sizes[:8], *self.numbers, self.sizes[8], self.sizes[10])

    def config(self) -> RSSMConfig:
        """The configuration, but for the widths of actions and embeddings."""
        return _config(tuple(self.sizes), tuple(self.numbers))

    def layers(self, tensors: list[Tensor]) -> dict[str, Layer]:
        """Undo :func:`flat`."""
        rest = iter(tensors)
        found = {}
        for i, name in enumerate(_LAYERS):
            parts = [next(rest) if self.sizes[9] >> (4 * i + j) & 1 else None for j in range(4)]
            if parts[0] is not None:
                found[name] = Layer(*parts)  # type: ignore[arg-type]
        return found


def observe(
    params: RSSMParams,
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor | None,
    force: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """:func:`reference_rssm.observe` by kernels, where there are some."""
    c = params.config
    if not is_served(embed, c) or embed.shape[1] == 0 or is_transformed():
        return reference_rssm.observe(params, embed, action, is_first, deter, stoch, noise, force)
    _native.let_products_work()
    tensors, present = flat(params)
    scan = Scan.of(c, present)
    given = (embed, action, is_first, deter, stoch, noise, force, *tensors)
    traced = torch.compiler.is_compiling() or is_traced(*given)
    classes = None if traced or c.cell != "block_gru" else _classes(action, is_first)
    if classes is None:
        action = action.masked_fill(is_first.unsqueeze(-1), 0)
        if c.cell == "block_gru":
            action = reference_rssm.bounded(action)
    inputs = (embed, action, is_first, deter, stoch, noise, force, classes)
    if traced:
        deter, stats, stoch, index, *_ = torch.ops.pywm.rssm_observe(*inputs, tensors, *scan)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in (embed, action, deter, stoch, *tensors)):
        deter, stats, stoch, index, *_ = _Eager.apply(scan, *inputs, *tensors)  # type: ignore[no-untyped-call]
    else:
        deter, stats, stoch, index, *_ = _forward(*inputs, tensors, *scan, keep=False)
    return deter, stats, stoch, None if c.is_gaussian else index


def as_multiplied(params: RSSMParams, x: Tensor) -> RSSMParams:
    """The model with the operands that its kernels take on the device of ``x``: float32 where others are not faster."""
    if params.config.operands == "float32" or not _native.supports(x):
        return params
    rounds = rssm_products.serves(params.config) if by_products(x) else _operands.is_rounded_on_cpu()
    return params if rounds and not is_transformed() else in_float32(params)


def in_float32(params: RSSMParams) -> RSSMParams:
    """The same model, whose products round nothing."""
    c = params.config
    return params if c.operands == "float32" else params._replace(config=replace(c, operands="float32"))


def is_served(x: Tensor, c: RSSMConfig) -> bool:
    """Whether there are kernels for a model of this form on the device of ``x``."""
    return _native.supports(x) and (not by_products(x) or rssm_products.serves(c))


def by_products(x: Tensor) -> bool:
    """Whether torch's products and row kernels do it, rather than one call."""
    return x.device.type != "cpu" or rssm_products.is_forced()


def _classes(action: Tensor, is_first: Tensor) -> Tensor | None:
    """The classes ``[T, N]`` of one-hot actions whose gradient nobody wants, A where an episode begins; else None.

    What the cell sees of a class is then computed once, and not for each of T·N rows.
    """
    if by_products(action) or action.requires_grad or action.shape[-1] > 255:
        return None
    classes = is_first.new_empty(is_first.shape, dtype=torch.uint8)
    found = _native.module().action_classes(plain(action), plain(is_first), classes)
    return classes if served(found, "action_classes") else None


def _each_class(action: Tensor) -> Tensor:
    """``[A + 1, A]``: all one-hot actions, and zeros."""
    A = action.shape[-1]
    return torch.eye(A + 1, A, dtype=action.dtype)


def _columns(weight: Tensor, begin: int, end: int | None = None) -> Tensor:
    return weight.flatten(0, -2)[:, begin:end]


def action_features(layers: dict[str, Layer], c: RSSMConfig, action: Tensor) -> Tensor:
    """What the cell sees of the actions, before the recurrence: ``[T·N, H]`` (block_gru), or they themselves."""
    if c.cell != "block_gru":
        return action
    layer = layers["action_in"]
    return reference_rssm.norm_act(_operands.linear(action, layer, c.operands), layer, c)


def _forward(
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor | None,
    force: Tensor | None,
    classes: Tensor | None,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    numbers: Sequence[float],
    keep: bool = True,
) -> Any:
    scan = Scan(list(sizes), list(numbers))
    c, layers = scan.config(), scan.layers([plain(x) for x in tensors])
    T, N, _ = embed.shape
    D, H, Z = c.deter, c.hidden, c.stoch_width
    embed, action, deter, stoch = (plain(x) for x in (embed, action, deter, stoch))
    posterior, stoch_in = layers["posterior"], layers["stoch_in"]
    linear = functools.partial(_operands.linear, operands=c.operands)
    token_proj = linear(embed.flatten(0, 1), Layer(_columns(posterior.weight, D), posterior.bias))
    features = action_features(layers, c, action.flatten(0, 1) if classes is None else _each_class(action))
    if c.cell == "block_gru":
        into = layers["hidden"]
        action_proj = linear(features, Layer(_columns(into.weight, D // c.blocks + 2 * H), into.bias))
    else:
        action_proj = linear(features, Layer(stoch_in.weight[:, Z:], stoch_in.bias))
    stoch_proj = linear(stoch, Layer(stoch_in.weight[:, :Z]))
    if by_products(embed):
        inputs = (
            token_proj.view(T, N, H),
            action_proj.view(T, N, -1),
            deter,
            stoch_proj,
            noise,
            is_first,
            force,
        )
        results = graphs.run(
            "rssm_observe",
            (*sizes, *numbers),
            functools.partial(rssm_products.observe, c, layers),
            _present(layers),
            [plain_optional(x) for x in inputs],
        )
        return tuple(results)
    index = embed.new_empty((T, N, c.stoch) if not c.is_gaussian else (0,), dtype=torch.uint8)
    result = _native.module().rssm_observe(
        scan.form(),
        kernel_layers(layers),
        token_proj.view(T, N, H),
        action_proj.view(T, N, -1) if classes is None else action_proj,
        classes,
        deter,
        stoch_proj,
        plain_optional(noise),
        plain(is_first),
        plain_optional(force),
        None if c.is_gaussian else index,
        keep,
    )
    if result is None:
        _rssm_check.refused("rssm_observe", force, c)
    deters, stats, stochs, *kept = served(result, "rssm_observe")
    return deters, stats, stochs, index, *kept


def _present(layers: dict[str, Layer]) -> list[Tensor]:
    return [x for layer in layers.values() for x in layer if x is not None]


def kernel_layers(layers: dict[str, Layer]) -> tuple[Tensor | None, ...]:
    """The layers' parts in the kernel's order."""
    parts: list[Tensor | None] = []
    for name in _KERNEL_LAYERS:
        parts += layers.get(name, Layer(None))  # type: ignore[arg-type]
    return tuple(parts)


def _backward(
    grad_deter: Tensor | None,
    grad_stats: Tensor | None,
    grad_stoch: Tensor | None,
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    deter0: Tensor,
    stoch0: Tensor,
    noise: Tensor | None,
    classes: Tensor | None,
    tensors: Sequence[Tensor],
    deter: Tensor,
    stats: Tensor,
    stoch: Tensor,
    u: Tensor,
    cell1: Tensor,
    cell2: Tensor,
    o: Tensor,
    sizes: Sequence[int],
    numbers: Sequence[float],
) -> Any:
    """Return the gradients of embed, action, the initial deter and stoch, and of all tensors."""
    scan = Scan(list(sizes), list(numbers))
    c = scan.config()
    tensors = [plain(x) for x in tensors]
    layers = scan.layers(tensors)
    T, N, _ = embed.shape
    D, Z = c.deter, c.stoch_width
    embed, action, is_first, deter0, stoch0 = (plain(x) for x in (embed, action, is_first, deter0, stoch0))
    if c.is_gaussian:  # also where samples were forced
        mean, std = reference_rssm.distribution(stats, c)
        noise = (stoch - mean) / std
    outer = [plain_optional(g) for g in (grad_deter, grad_stats, grad_stoch)]
    planes = is_first, u, cell1, cell2, o
    if by_products(embed):
        result = graphs.run(
            "rssm_observe_backward",
            (*sizes, *numbers),
            functools.partial(rssm_products.observe_backward, c, layers),
            _present(layers),
            [*outer, deter0, deter, stats, *planes],
        )
    else:
        rest = (*outer, deter0, deter, stats, plain_optional(noise), *planes)
        kernel = _native.module().rssm_observe_backward
        result = served(kernel(scan.form(), kernel_layers(layers), *rest), "rssm_observe_backward")
    grad_deter0, grad_stoch_proj, *rows, norms = result
    d_stats, d_o, d_cell1, d_cell2, d_u, x, y, head = (r.flatten(0, 1) for r in rows)
    reset = is_first.unsqueeze(-1)  # selected, not multiplied: what a reset drops may be NaN
    before = torch.cat([deter0.unsqueeze(0), deter[:-1]]).masked_fill_(reset, 0).flatten(0, 1)
    stoch_before = torch.cat([stoch0.unsqueeze(0), stoch[:-1]]).masked_fill_(reset, 0).flatten(0, 1)
    posterior = layers["posterior"]
    mm = functools.partial(_operands.mm, operands=c.operands)
    grad_embed = mm(d_o, posterior.weight[:, D:]).view(T, N, -1)
    of_cell = CellRows(d_cell1, d_cell2, d_u, x, y, before, stoch_before, action.flatten(0, 1), classes)
    grads, grad_action = cell_gradients(layers, c, of_cell, list(layers))
    pairs = (d_o, deter.flatten(0, 1)), (d_o, embed.flatten(0, 1))
    grads["posterior"] = weight_gradient(posterior, *pairs, operands=c.operands)
    grads["out"] = weight_gradient(layers["out"], (d_stats, head), operands=c.operands)
    grad_stoch0 = mm(grad_stoch_proj, layers["stoch_in"].weight[:, :Z])
    norm_gradients([(layers[name], grads[name]) for name in (*normed(c), "posterior")], norms)
    flat = [
        g
        for name in _LAYERS
        if name in layers
        for g, of in zip(grads[name], layers[name], strict=True)
        if of is not None
    ]
    return [grad_embed, grad_action.reshape(action.shape), grad_deter0, grad_stoch0, *flat]


Gradients = dict[str, list[Tensor | None]]  # of a layer's parts, by its name


def weight_gradient(layer: Layer, *pairs: tuple[Tensor, Tensor], operands: str) -> list[Tensor | None]:
    """Return the gradients of a dense layer's weight, whose inputs lie side by side, and of its bias."""
    out = torch.empty_like(layer.weight)
    column = 0
    for grad, inputs in pairs:
        part = out[:, column : column + inputs.shape[1]]
        _operands.multiply(grad.t(), _operands.cast(inputs, operands), part)
        column += inputs.shape[1]
    return [out, None if layer.bias is None else pairs[0][0].sum(0), None, None]


class CellRows(NamedTuple):
    """All rows of a reverse scan: gradients of the cell's pre-activations, and what its products took.

    Attributes:
        d_cell1: see ``RssmObserveBackwardArgs``, like the next four.
        d_cell2: likewise.
        d_u: likewise.
        x: likewise.
        y: likewise.
        before: ``[T·N, D]``, the deter that each step began with.
        stoch_before: ``[T·N, S·K]``.
        action: ``[T·N, A]``, bounded where the cell bounds it.
        classes: ``[T, N]`` of one-hot actions without a gradient, or None.
    """

    d_cell1: Tensor
    d_cell2: Tensor
    d_u: Tensor
    x: Tensor
    y: Tensor
    before: Tensor
    stoch_before: Tensor
    action: Tensor
    classes: Tensor | None = None


def cell_gradients(
    layers: dict[str, Layer], c: RSSMConfig, rows: CellRows, wanted: Sequence[str]
) -> tuple[Gradients, Tensor]:
    """Return the gradients of the weights and biases of the cell's layers, as far as ``wanted``, and of the actions."""
    D, H, Z, G = c.deter, c.hidden, c.stoch_width, c.blocks
    mm = functools.partial(_operands.mm, operands=c.operands)
    cast = functools.partial(_operands.cast, operands=c.operands)
    d_cell1, d_cell2, d_u, x, y, before, stoch_before, action, classes = rows
    grads: Gradients = {name: [None] * 4 for name in layers}

    def weight(name: str, *pairs: tuple[Tensor, Tensor]) -> None:
        if name in wanted:
            grads[name] = weight_gradient(layers[name], *pairs, operands=c.operands)

    if c.cell == "block_gru":
        Dg = D // G
        weight("deter_in", (d_u[:, :H], before))
        weight("stoch_in", (d_u[:, H:], stoch_before))
        hidden, gates = layers["hidden"], layers["gates"]
        wide = _columns(hidden.weight, 0)
        actions, d_actions = action, d_cell1
        if classes is not None:  # the gradients of all rows of a class are one sum
            actions = _each_class(action)
            one_hot = functional.one_hot(classes.flatten().long(), len(actions)).to(d_cell1.dtype)
            d_actions = mm(one_hot.t(), d_cell1)
        grads["action_in"], features, grad_action = _through_action(
            layers, c, actions, mm(d_actions, wide[:, Dg + 2 * H :])
        )
        if classes is not None:
            grad_action = action.new_zeros(action.shape)  # nobody asked for it
        if "hidden" in wanted:
            out = torch.empty_like(wide)
            for g in range(G):
                block = slice(g * Dg, (g + 1) * Dg)
                _operands.multiply(d_cell1[:, block].t(), cast(before[:, block]), out[block, :Dg])
            _operands.multiply(d_cell1.t(), cast(x), out[:, Dg : Dg + 2 * H])
            _operands.multiply(d_actions.t(), cast(features), out[:, Dg + 2 * H :])
            grads["hidden"][0] = out.view_as(hidden.weight)
            grads["hidden"][1] = None if hidden.bias is None else d_cell1.sum(0)
        if "gates" in wanted:
            parts = torch.empty_like(gates.weight)
            for g in range(G):
                of_block = d_cell2[:, 3 * g * Dg : 3 * (g + 1) * Dg]
                _operands.multiply(of_block.t(), cast(y[:, g * Dg : (g + 1) * Dg]), parts[g])
            grads["gates"][0] = parts
            grads["gates"][1] = None if gates.bias is None else d_cell2.sum(0)
        return grads, grad_action
    weight("stoch_in", (d_u, stoch_before), (d_u, action))
    if c.cell == "layernorm_gru":
        weight("gates", (d_cell1, x), (d_cell1, before))
    elif c.cell == "gru":
        weight("gates", (d_cell1, x))
        weight("candidate", (d_cell2, before))
    else:
        weight("gates", (d_cell1, x), (d_cell1, before))
        weight("candidate", (d_cell2, x), (d_cell2, y))
    return grads, mm(d_u, layers["stoch_in"].weight[:, Z:])


def normed(c: RSSMConfig) -> tuple[str, ...]:
    """The layers of the cell that may have a norm, in the order in which kernels give their gradients."""
    if c.cell == "block_gru":
        return "deter_in", "stoch_in", "hidden"
    return ("stoch_in", "gates") if c.cell == "layernorm_gru" else ("stoch_in",)


def norm_gradients(layers: Sequence[tuple[Layer, list[Tensor | None]]], norms: Tensor) -> None:
    """Hand out ``norms``, the gradients of all scales and shifts one after another, to their layers' gradients."""
    position = 0
    for layer, grads in layers:
        for part in (2, 3):
            of = layer[part]
            if of is not None:
                # Copied, for an op's outputs share no memory.
                grads[part] = norms[position : position + len(of)].clone()
                position += len(of)


def _through_action(
    layers: dict[str, Layer], c: RSSMConfig, action: Tensor, grad: Tensor
) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """Return the gradients of action_in's parts, its outputs, and the gradient of the actions."""
    layer = layers["action_in"]
    mm = functools.partial(_operands.mm, operands=c.operands)
    pre = _operands.linear(action, layer, c.operands)
    parts: list[Tensor | None] = [None] * 4
    features = reference_rssm.norm_act(pre, layer, c)
    if c.norm == "none":
        aten = torch.ops.aten
        through: dict[str, Callable[[], Tensor]] = {
            "none": lambda: grad,
            "silu": lambda: aten.silu_backward(grad, pre),
            "elu": lambda: aten.elu_backward(grad, 1.0, 1.0, 1.0, False, pre),
            "relu": lambda: aten.threshold_backward(grad, pre, 0.0),
        }
        grad = through[c.act]()
    else:
        wanted = [True, True, layer.shift is not None]
        options = (c.norm, c.act, c.eps, wanted)
        grads = norm_act_backward(grad, pre, layer.scale, layer.shift, *options)  # type: ignore[no-untyped-call]
        grad, parts[2], shift = grads
        parts[3] = None if layer.shift is None else shift
    parts[0] = mm(grad.t(), action)
    parts[1] = None if layer.bias is None else grad.sum(0)
    return parts, features, mm(grad, layer.weight)


class _Eager(torch.autograd.Function):
    """The scan with its gradient, past the dispatcher."""

    @staticmethod
    def forward(ctx: Any, scan: Scan, *inputs: Any) -> Any:
        """See :func:`rssm_observe`."""
        embed, action, is_first, deter, stoch, noise, force, classes, *tensors = inputs
        output = _forward(embed, action, is_first, deter, stoch, noise, force, classes, tensors, *scan)
        ctx.scan = scan
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(embed, action, is_first, deter, stoch, noise, classes, *tensors, *output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return the gradients of all inputs."""
        embed, action, is_first, deter, stoch, noise, classes, *rest = ctx.saved_tensors
        tensors, (deters, stats, stochs, _, *kept) = rest[:-8], rest[-8:]
        inputs = (
            embed,
            action,
            is_first,
            deter,
            stoch,
            noise,
            classes,
            tensors,
            deters,
            stats,
            stochs,
            *kept,
        )
        if torch.is_grad_enabled():  # somebody will differentiate again, which the dispatcher's op refuses
            results = torch.ops.pywm.rssm_observe_backward(*grads[:3], *inputs, *ctx.scan)
        else:
            differentiate_once: Any = _backward
            results = differentiate_once(*grads[:3], *inputs, *ctx.scan)
        grad_embed, grad_action, grad_deter, grad_stoch, *flat = results
        return None, grad_embed, grad_action, None, grad_deter, grad_stoch, None, None, None, *flat


def _fake(embed, action, is_first, deter, stoch, noise, force, classes, tensors, sizes, numbers):  # type: ignore[no-untyped-def]
    cell, _, _, D, H, S, K, *_ = sizes
    T, N, _ = embed.shape
    Z, Q = (S, 2 * S) if K == 0 else (S * K, S * K)
    widths = {0: (2 * H, D, 3 * D), 1: (H, 3 * D, 0), 2: (H, 3 * D, 3 * D), 3: (H, 2 * D, D)}[cell]
    outputs = [embed.new_empty((T, N, width)) for width in (D, Q, Z)]
    outputs.append(embed.new_empty((0,) if K == 0 else (T, N, S), dtype=torch.uint8))
    return *outputs, *(embed.new_empty((T, N, width)) for width in (*widths, H))


def _fake_backward(  # type: ignore[no-untyped-def]
    grad_deter,
    grad_stats,
    grad_stoch,
    embed,
    action,
    is_first,
    deter0,
    stoch0,
    noise,
    classes,
    tensors,
    *unused,
):
    return [x.new_empty(x.shape) for x in (embed, action, deter0, stoch0, *tensors)]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    embed, action, is_first, deter, stoch, noise, _, classes, tensors, sizes, numbers = inputs
    ctx.scan = Scan(list(sizes), list(numbers))
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(embed, action, is_first, deter, stoch, noise, classes, *tensors, *output)


def _autograd(ctx: Any, *grads: Tensor | None) -> Any:
    embed, action, is_first, deter, stoch, noise, classes, *rest = ctx.saved_tensors
    tensors, (deters, stats, stochs, _, *kept) = rest[:-8], rest[-8:]
    results = torch.ops.pywm.rssm_observe_backward(
        *grads[:3],
        embed,
        action,
        is_first,
        deter,
        stoch,
        noise,
        classes,
        tensors,
        deters,
        stats,
        stochs,
        *kept,
        *ctx.scan,
    )
    grad_embed, grad_action, grad_deter, grad_stoch, *flat = results
    return grad_embed, grad_action, None, grad_deter, grad_stoch, None, None, None, flat, None, None


define(
    "rssm_observe(Tensor embed, Tensor action, Tensor is_first, Tensor deter, Tensor stoch, Tensor? noise, "
    "Tensor? force, Tensor? classes, Tensor[] tensors, int[] sizes, float[] numbers) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    _forward,
)
define(
    "rssm_observe_backward(Tensor? grad_deter, Tensor? grad_stats, Tensor? grad_stoch, Tensor embed, Tensor action, "
    "Tensor is_first, Tensor deter0, Tensor stoch0, Tensor? noise, Tensor? classes, Tensor[] tensors, Tensor deter, "
    "Tensor stats, Tensor stoch, Tensor u, Tensor cell1, Tensor cell2, Tensor o, int[] sizes, float[] numbers) -> Tensor[]",
    _fake_backward,
    _backward,
)
differentiate("rssm_observe", _setup_context, _autograd, "rssm_observe_backward")
