"""PPO's clipped objective in one pass: the public function, the dispatcher's ops, and their gradient.

The forward pass computes the gradients too, for it holds everything they need in registers; the backward pass only
multiplies them with the gradient of the loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from pywm.distributions import Categorical, DiagGaussian, MultiCategorical
from pywm.ops import _check, _native, reference
from pywm.ops._registry import (
    define,
    differentiate,
    empty_if,
    is_traced,
    is_transformed,
    plain,
    plain_mask,
    plain_optional,
    served,
)


class PPOStats(NamedTuple):
    """Diagnostics of :func:`ppo_loss`: 0-d tensors, so that reading them is the caller's decision to synchronise.

    Attributes:
        policy_loss: mean of -min(ρA, clip(ρ)A).
        value_loss: ½ mean of (V - R)², clipped where asked; without ``value_coef``.
        entropy: mean entropy in nats.
        clip_fraction: share of rows with ``|ρ - 1| > clip``.
        approx_kl: mean of (ρ - 1) - log ρ.
    """

    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


class PPOLoss(NamedTuple):
    """Result of :func:`ppo_loss`.

    Attributes:
        loss: 0-d; policy loss + value_coef·value loss - entropy_coef·entropy.
        stats: :class:`PPOStats`, without gradient.
    """

    loss: Tensor
    stats: PPOStats


Distribution = Categorical | MultiCategorical | DiagGaussian

_categorical = _native.entry("ppo_loss_categorical")
_gaussian = _native.entry("ppo_loss_gaussian")
_MAX_GROUPS = _native.module().max_groups if _native.has_backend("cpu") else 0


def ppo_loss(
    dist: Distribution,
    action: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    value: Tensor,
    returns: Tensor,
    *,
    clip: float = 0.2,
    value_clip: float | None = None,
    old_value: Tensor | None = None,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
    normalize_advantage: bool = True,
    valid: Tensor | None = None,
) -> PPOLoss:
    r"""Return PPO's clipped loss of a batch, with its diagnostics.

    .. math::
        \rho = \exp(\log\pi(a|s) - \log\pi_\mathrm{old}(a|s)), \qquad
        L = -\overline{\min(\rho A, \mathrm{clip}(\rho, 1 \pm \epsilon) A)}
            + c_v \tfrac12 \overline{(V - R)^2} - c_e \overline{H}

    with means over the valid rows. Rows are any equal leading shape ``[...]``, usually ``[M]``.

    Args:
        dist: the new policy: :class:`~pywm.distributions.Categorical` (logits ``[..., A]``),
            :class:`~pywm.distributions.MultiCategorical` (logits ``[..., sum(nvec)]``) or
            :class:`~pywm.distributions.DiagGaussian` (mean ``[..., A]``, log_std ``[A]`` or ``[..., A]``).
        action: integers ``[...]``, ``[..., G]``, or floats ``[..., A]``, as the distribution takes them.
        old_log_prob: ``[...]``, log-probability when the action was chosen; a constant.
        advantage: ``[...]``, a constant.
        value: ``[...]``, V(s) of the new parameters.
        returns: ``[...]``, targets of the value; a constant.
        clip: ε > 0.
        value_clip: clips the change of the value against ``old_value``; None does not clip.
        old_value: ``[...]``, needed by ``value_clip``; a constant.
        value_coef: c_v >= 0.
        entropy_coef: c_e >= 0.
        normalize_advantage: subtract the mean and divide by the unbiased standard deviation + 1e-8 over the valid rows;
            with fewer than two of them, nothing is done.
        valid: ``[...]`` mask (bool, or float where non-zero is true) or None; rows that are not valid count nowhere and
            get gradient 0, and NaN in them is harmless.

    Returns:
        :class:`PPOLoss`. Differentiable once in the distribution's tensors and ``value``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, a number is out of range, ``value_clip`` comes without ``old_value``, or (on
            CPU) an action is not a class. On CUDA such an action makes the loss NaN, for looking costs a synchronisation.

    Source:
        Schulman et al. (2017), eq. 7 and 9; details as in Huang et al. (2022), "The 37 implementation details of PPO".
    """
    constants = (old_log_prob, advantage, value, returns, old_value, valid)
    unused = old_value is not None and value_clip is None  # looked at all the same
    if not (is_compiling() or unused or _native.is_disabled() or forward_ad._current_level >= 0):
        result = _fast(
            dist, action, constants, (clip, value_clip, value_coef, entropy_coef, normalize_advantage)
        )
        if result is not None:
            return result
    clip = _check.number("ppo_loss", "clip", clip, exclusive_low=True)
    if value_clip is None:
        if old_value is not None and isinstance(value, Tensor):
            _check.same("ppo_loss", "old_value", old_value, "value", value)
        old_value = None
    else:
        value_clip = _check.number("ppo_loss", "value_clip", value_clip)
        if old_value is None:
            raise ValueError("ppo_loss: old_value is None, but value_clip needs it")
    value_coef = _check.number("ppo_loss", "value_coef", value_coef, finite=True)
    entropy_coef = _check.number("ppo_loss", "entropy_coef", entropy_coef, finite=True)
    normalize_advantage = _check.flag("ppo_loss", "normalize_advantage", normalize_advantage)
    numbers = (
        clip,
        -1.0 if value_clip is None else value_clip,
        value_coef,
        entropy_coef,
        normalize_advantage,
    )
    _check_call(dist, action, old_log_prob, advantage, value, returns, old_value, valid)
    constants = (old_log_prob, advantage, value, returns, old_value, valid)
    first = dist.mean if isinstance(dist, DiagGaussian) else dist.logits
    many = isinstance(dist, MultiCategorical) and len(dist.nvec) > _MAX_GROUPS
    if is_transformed() or not _native.supports(first) or value.numel() == 0 or many:
        if not isinstance(dist, DiagGaussian):
            _check_classes(dist, action, valid)
        loss, stats = _reference(
            dist, action, constants, clip, value_clip, value_coef, entropy_coef, normalize_advantage
        )
        return PPOLoss(loss, PPOStats(*stats.unbind()))
    want_value = value.requires_grad
    if isinstance(dist, DiagGaussian):
        want = dist.mean.requires_grad or dist.log_std.requires_grad
        loss, stats, _, _, _ = torch.ops.pywm.ppo_loss_gaussian(
            dist.mean, dist.log_std, action, *constants, *numbers, [want, want_value]
        )
    else:
        grouped = isinstance(dist, MultiCategorical)
        nvec = list(dist.nvec) if isinstance(dist, MultiCategorical) else [dist.logits.shape[-1]]
        want = dist.logits.requires_grad
        loss, stats, _, _ = torch.ops.pywm.ppo_loss_categorical(
            dist.logits, nvec, action.long(), *constants, *numbers, grouped, [want, want_value]
        )
    return PPOLoss(loss, PPOStats(*stats.unbind()))


def _fast(
    dist: object, action: object, constants: tuple[Any, ...], numbers: tuple[Any, ...]
) -> PPOLoss | None:
    """Serve a plain eager call in one crossing; None sends it to the checks and the dispatcher."""
    value = constants[2]
    if not isinstance(value, Tensor):
        return None
    grad = torch.is_grad_enabled()
    want_value = grad and value.requires_grad
    kind = type(dist)
    inputs: tuple[Tensor, ...]
    try:
        if kind is DiagGaussian:
            inputs = dist.mean, dist.log_std  # type: ignore[attr-defined]
            want = grad and any(x.requires_grad for x in inputs)
            result = _gaussian(*inputs, action, *constants, *numbers, want, want_value, False)
        elif kind is Categorical or kind is MultiCategorical:
            logits: Tensor = dist.logits  # type: ignore[attr-defined]
            if logits.is_nested:  # it has no shape to ask for
                return None
            grouped = kind is MultiCategorical
            nvec = dist.nvec if grouped else logits.shape[-1:]  # type: ignore[attr-defined]
            inputs = (logits,)
            want = grad and logits.requires_grad
            result = _categorical(
                logits, nvec, action, *constants, *numbers, grouped, want, want_value, False
            )
        else:
            return None
    except IndexError as error:
        raise ValueError(str(error)) from None
    except AttributeError:  # no distribution of tensors: the checks say what it is
        return None
    if result is None:
        return None
    loss, stats, *gradients = result
    if want or want_value:
        loss = _Attach.apply(loss, *gradients, *inputs, value)  # type: ignore[no-untyped-call]
    return PPOLoss(loss, PPOStats(*(stats if type(stats) is tuple else stats.unbind())))


class _Attach(torch.autograd.Function):
    """Give a finished loss the gradients that were computed with it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        count = len(ctx.saved_tensors) // 2
        saved, inputs = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needs = ctx.needs_input_grad[1 + count :]
        scaled = (_scaled(grads[0], *tensors) for tensors in zip(saved, inputs, needs, strict=True))
        return None, *(None,) * count, *scaled


def _reference(
    dist: Distribution,
    action: Tensor,
    constants: tuple[Tensor | None, ...],
    clip: float,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    normalize_advantage: bool,
) -> tuple[Tensor, Tensor]:
    old_log_prob, advantage, value, returns, old_value, valid = constants
    assert old_log_prob is not None
    assert advantage is not None
    assert value is not None
    assert returns is not None
    dtype = value.dtype

    def wide(x: Tensor) -> Tensor:
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    if isinstance(dist, DiagGaussian):
        dist, action = DiagGaussian(wide(dist.mean), wide(dist.log_std)), wide(action)
    elif isinstance(dist, MultiCategorical):
        dist = MultiCategorical(wide(dist.logits), dist.nvec)
    else:
        dist = Categorical(wide(dist.logits))
    loss, stats = reference.ppo_loss(
        dist,
        action,
        wide(old_log_prob),
        wide(advantage),
        wide(value),
        wide(returns),
        None if old_value is None else wide(old_value),
        valid,
        clip,
        value_clip,
        value_coef,
        entropy_coef,
        normalize_advantage,
    )
    return loss.to(dtype), stats.to(dtype)


def _check_call(
    dist: object,
    action: object,
    old_log_prob: object,
    advantage: object,
    value: object,
    returns: object,
    old_value: object,
    valid: object,
) -> None:
    name = "ppo_loss"
    if isinstance(dist, DiagGaussian):
        first_name, first = "dist.mean", _check.tensor(name, "dist.mean", dist.mean)
        log_std = _check.tensor(name, "dist.log_std", dist.log_std)
        _check.like(name, "dist.log_std", log_std, first_name, first)
    elif isinstance(dist, Categorical | MultiCategorical):
        first_name, first = "dist.logits", _check.tensor(name, "dist.logits", dist.logits)
    else:
        raise TypeError(
            f"{name}: dist is a {type(dist).__name__}, but Categorical, MultiCategorical or DiagGaussian of "
            "pywm.distributions was expected"
        )
    if first.ndim < 1 or first.shape[-1] < 1:
        raise ValueError(
            f"{name}: {first_name} is {tuple(first.shape)}, but [..., A] with A >= 1 was expected"
        )
    rows, width = tuple(first.shape[:-1]), first.shape[-1]
    if isinstance(dist, DiagGaussian):
        if tuple(dist.log_std.shape) not in ((width,), (*rows, width)):
            raise ValueError(
                f"{name}: dist.log_std is {tuple(dist.log_std.shape)}, but {(width,)} or {(*rows, width)} was "
                "expected, to go with dist.mean"
            )
        action_shape: tuple[int, ...] = (*rows, width)
        action = _check.tensor(name, "action", action)
        _check.like(name, "action", action, first_name, first)
    elif isinstance(dist, MultiCategorical):
        if sum(dist.nvec) != width or min(dist.nvec, default=0) < 1:
            raise ValueError(
                f"{name}: dist.nvec is {dist.nvec}, but positive numbers that sum to {width}, the width of "
                "dist.logits, were expected"
            )
        action_shape = (*rows, len(dist.nvec))
        action = _check.tensor(name, "action", action, _check.INTEGER_DTYPES)
    else:
        action_shape = rows
        action = _check.tensor(name, "action", action, _check.INTEGER_DTYPES)
    _same_shape("action", action, action_shape, first_name, first)
    for argument, x in (
        ("old_log_prob", old_log_prob),
        ("advantage", advantage),
        ("value", value),
        ("returns", returns),
        ("old_value", old_value),
    ):
        if x is None and argument == "old_value":
            continue
        x = _check.tensor(name, argument, x)
        _same_shape(argument, x, rows, first_name, first)
        _check.like(name, argument, x, first_name, first)
    if valid is not None:
        valid = _check.tensor(name, "valid", valid, _check.MASK_DTYPES)
        _same_shape("valid", valid, rows, first_name, first)


def _check_classes(dist: Categorical | MultiCategorical, action: Tensor, valid: Tensor | None) -> None:
    """Name an action that is no class, as the kernel does; the reference only knows that an index is out of bounds."""
    if is_compiling() or is_traced(action, dist.logits) or action.device.type != "cpu":
        return  # nothing to look at, or nobody to wait for it
    grouped = isinstance(dist, MultiCategorical)
    classes = torch.tensor(dist.nvec if isinstance(dist, MultiCategorical) else dist.logits.shape[-1])
    bad = (action < 0) | (action >= classes)
    if valid is not None:
        bad &= (valid != 0).unsqueeze(-1) if grouped else valid != 0
    if bool(bad.any()):
        first = int(bad.flatten().nonzero()[0])
        groups = classes.numel()
        raise ValueError(
            f"ppo_loss: action is {int(action.flatten()[first])} in row {first // groups}, but 0 <= action < "
            f"{int(classes.flatten()[first % groups])} was expected"
        )


def _same_shape(name: str, x: Tensor, expected: tuple[int, ...], first_name: str, first: Tensor) -> None:
    if tuple(x.shape) != expected:
        raise ValueError(
            f"ppo_loss: {name} is {tuple(x.shape)}, but {expected} was expected, as {first_name} is "
            f"{tuple(first.shape)}"
        )
    _check.same_device("ppo_loss", name, x, first_name, first)


# ---- the dispatcher's ops: loss and stats, then the gradients that the backward pass scales -------------------------


def _fake_categorical(  # type: ignore[no-untyped-def]
    logits, nvec, action, old_log_prob, advantage, value, returns, old_value, valid, clip, value_clip,
    value_coef, entropy_coef, normalize_advantage, grouped, wanted,
):  # fmt: skip
    return (
        logits.new_empty(()),
        logits.new_empty((5,)),
        empty_if(wanted[0], logits),
        empty_if(wanted[1], value),
    )


def _run_categorical(  # type: ignore[no-untyped-def]
    logits, nvec, action, old_log_prob, advantage, value, returns, old_value, valid, clip, value_clip,
    value_coef, entropy_coef, normalize_advantage, grouped, wanted,
):  # fmt: skip
    floats = plain(old_log_prob), plain(advantage), plain(value), plain(returns), plain_optional(old_value)
    try:
        result = _categorical(
            plain(logits), nvec, plain(action), *floats, plain_mask(valid), clip, value_clip, value_coef,
            entropy_coef, normalize_advantage, grouped, *wanted, True,
        )  # fmt: skip
    except IndexError as error:
        raise ValueError(str(error)) from None
    return served(result, "ppo_loss")


def _fake_gaussian(  # type: ignore[no-untyped-def]
    mean, log_std, action, old_log_prob, advantage, value, returns, old_value, valid, clip, value_clip,
    value_coef, entropy_coef, normalize_advantage, wanted,
):  # fmt: skip
    return (
        mean.new_empty(()),
        mean.new_empty((5,)),
        empty_if(wanted[0], mean),
        empty_if(wanted[0], log_std),
        empty_if(wanted[1], value),
    )


def _run_gaussian(  # type: ignore[no-untyped-def]
    mean, log_std, action, old_log_prob, advantage, value, returns, old_value, valid, clip, value_clip,
    value_coef, entropy_coef, normalize_advantage, wanted,
):  # fmt: skip
    floats = plain(old_log_prob), plain(advantage), plain(value), plain(returns), plain_optional(old_value)
    result = _gaussian(
        plain(mean), plain(log_std), plain(action), *floats, plain_mask(valid), clip, value_clip, value_coef,
        entropy_coef, normalize_advantage, *wanted, True,
    )  # fmt: skip
    return served(result, "ppo_loss")


def _setup_categorical(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[2], output[3], inputs[0], inputs[5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _setup_gaussian(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[2], output[3], output[4], inputs[0], inputs[1], inputs[5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scaled(grad: Tensor, saved: Tensor, of: Tensor, wanted: bool) -> Tensor | None:
    if not wanted:
        return None
    if not torch.is_grad_enabled():
        return saved * grad
    # Somebody may differentiate the gradient: it depends on what it is the gradient `of`, and the op raises then.
    return torch.ops.pywm.ppo_loss_backward(grad, saved, of)  # type: ignore[no-any-return]


def _autograd_categorical(ctx: Any, grad: Tensor | None, *unused: Any) -> Any:
    if grad is None:
        return (None,) * 16
    grad_logits, grad_value, logits, value = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        _scaled(grad, grad_logits, logits, needs[0]), None, None, None, None,
        _scaled(grad, grad_value, value, needs[5]), *(None,) * 10,
    )  # fmt: skip


def _autograd_gaussian(ctx: Any, grad: Tensor | None, *unused: Any) -> Any:
    if grad is None:
        return (None,) * 15
    grad_mean, grad_log_std, grad_value, mean, log_std, value = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        _scaled(grad, grad_mean, mean, needs[0]), _scaled(grad, grad_log_std, log_std, needs[1]), None, None, None,
        _scaled(grad, grad_value, value, needs[5]), *(None,) * 9,
    )  # fmt: skip


_COMMON = (
    "Tensor old_log_prob, Tensor advantage, Tensor value, Tensor returns, Tensor? old_value, Tensor? valid, "
)
_NUMBERS = "float clip, float value_clip, float value_coef, float entropy_coef, bool normalize_advantage, "
define(
    f"ppo_loss_categorical(Tensor logits, int[] nvec, Tensor action, {_COMMON}{_NUMBERS}bool grouped, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_categorical,
    _run_categorical,
)
define(
    f"ppo_loss_gaussian(Tensor mean, Tensor log_std, Tensor action, {_COMMON}{_NUMBERS}bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_gaussian,
    _run_gaussian,
)
define(
    "ppo_loss_backward(Tensor grad, Tensor saved, Tensor of) -> Tensor",
    lambda _grad, saved, _of: torch.empty_like(saved),
    lambda grad, saved, _: saved * grad,
)
differentiate("ppo_loss_categorical", _setup_categorical, _autograd_categorical, "ppo_loss_backward")
differentiate("ppo_loss_gaussian", _setup_gaussian, _autograd_gaussian)
