"""The recurrent state-space model side by side with what is installed of the rivals.

    python benchmarks/rssm.py --size size12m                      # 2 threads, all workloads
    python benchmarks/rssm.py --size size1m --check               # exit 1 if a target is missed
    python benchmarks/rssm.py --size classic --sheeprl /tmp/sheeprl --json out.json
    python benchmarks/rssm.py --size tiny --seconds 1             # does the script work?

Rivals: pywm's own reference in PyTorch, torchrl's DreamerV3 modules and sheeprl's DreamerV3 (block GRU, and LayerNorm GRU
for "classic", which torchrl lacks), each as it is and with one step under torch.compile. ``--compile`` adds whole windows
under torch.compile, which take minutes to compile. sheeprl pins other versions of everything, so it is not installed but
put beside:

    pip install --no-deps --target /tmp/sheeprl sheeprl==0.8.4

Workloads: "observe" filters a window (posterior and prior) without gradients; "gradients" does it and differentiates
posterior, prior, deter and stoch in all parameters and the embeddings; "imagine" goes 15 steps with a 3-layer actor of 18
classes from 1024 starts, without gradients; "act" is one posterior step. Float32; every side draws its own samples. Rivals get
the least work that their code allows: no losses, no TensorDict where a tensor will do, embeddings and priors outside the
recurrence where they offer it. pywm must equal its float64 reference under forced samples before anything is timed, and
the rivals' outputs must be finite, one-hot and of the right shape. All sides take turns within one run; figures are
medians. "peak" is the share of what one large torch.mm reaches in the same run, an operation of 2 FLOPs for each weight and row.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.machinery
import importlib.util
import json
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from run import Thunk, interleaved, machine, settle_allocator
from torch import Tensor, nn

from pywm.models import RSSM, SIZES, RSSMConfig, RSSMState
from pywm.ops import Layer, Policy, _native, reference_rssm
from pywm.training.machine import version

A = 18  # actions


class Form(NamedTuple):
    """Sizes beside those of the model: encoder's width, actor's width, window, starts and horizon of imagination."""

    embed: int
    units: int
    T: int = 64
    B: int = 16
    N: int = 1024
    H: int = 15


FORMS = {
    "size1m": Form(256, 64),
    "classic": Form(4096, 512),
    "size12m": Form(1024, 256),
    "tiny": Form(12, 16, T=4, B=2, N=8, H=3),
    "tiny-classic": Form(12, 16, T=4, B=2, N=8, H=3),
}
TINY = {"deter": 32, "hidden": 16, "stoch": 4, "classes": 4}
MODELS = {**SIZES, "tiny": TINY, "tiny-classic": {**SIZES["classic"], **TINY}}

# What is to be reached against the fastest rival, with 2 threads.
TARGETS = {
    ("observe", "size1m"): 6.0,
    ("observe", "classic"): 2.5,
    ("observe", "size12m"): 2.4,
    ("gradients", "size1m"): 4.0,
    ("gradients", "classic"): 2.2,
    ("gradients", "size12m"): 2.5,
    ("imagine", "size1m"): 2.5,
    ("imagine", "classic"): 1.5,
    ("imagine", "size12m"): 1.4,
    ("act 16", "size12m"): 2.0,
    ("act 1", "size12m"): 1.5,
    ("act 1", "size1m"): 4.0,
}
WORKLOADS = ("observe", "gradients", "imagine", "act 1", "act 16")
PRODUCT = 1536  # rows and columns of the matrices that measure the machine


class Data:
    """The inputs of all workloads; time-major."""

    def __init__(self, c: RSSMConfig, form: Form) -> None:
        g = torch.Generator().manual_seed(0)
        T, B, N, H = form[2:]

        def one_hot(*shape: int, classes: int) -> Tensor:
            return nn.functional.one_hot(torch.randint(classes, shape, generator=g), classes).float()

        self.embed = torch.randn(T, B, form.embed, generator=g)
        self.action = one_hot(T, B, classes=A)
        self.is_first = torch.rand(T, B, generator=g) < 0.02
        self.deter = torch.randn(N, c.deter, generator=g).tanh()
        self.stoch = one_hot(N, c.stoch, classes=c.classes)
        self.horizon = H
        self.force = torch.randint(c.classes, (T, B, c.stoch), generator=g)
        self.force_imagined = torch.randint(c.classes, (H, N, c.stoch), generator=g)
        self.force_action = one_hot(H, N, classes=A)

    def step(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return deter, the flat stoch, action and embedding of n environments."""
        rows = (self.deter, self.stoch.flatten(1), self.action.flatten(0, 1), self.embed.flatten(0, 1))
        return tuple(x[torch.arange(n) % len(x)] for x in rows)  # type: ignore[return-value]


# ---- sides: observe() -> deter, flat stoch, posterior, prior [T, B, ...]; imagine() -> deter, stoch, action [H, N, ...];
# ---- act(n) -> a call that returns deter, stoch [n, ...]. What does not belong to the workload is made beforehand. --------


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(fn, dynamic=False)


class Pywm:
    """Our kernels, or the reference behind them."""

    def __init__(self, d: Data, c: RSSMConfig, form: Form) -> None:
        self.d, self.c = d, c
        g = torch.Generator().manual_seed(1)
        self.model = RSSM(c, generator=g)
        self.embed = d.embed.clone().requires_grad_()
        self.leaves = [self.embed, *self.model.parameters()]
        layers, width = [], c.feat
        for outputs in (form.units,) * 3:
            shift = torch.zeros(outputs) if c.norm == "layer" else None
            weight = torch.randn(outputs, width, generator=g) / width**0.5
            layers.append(Layer(weight, torch.zeros(outputs), torch.ones(outputs), shift))
            width = outputs
        layers.append(Layer(torch.randn(A, width, generator=g) / width**0.5, torch.zeros(A)))
        self.policy = Policy(tuple(layers), norm=c.norm, act=c.act, eps=c.eps)

    def observe(self, **options: Any) -> tuple[Tensor, ...]:
        d = self.d
        deter, stoch, _, posterior, prior = self.model.observe(self.embed, d.action, d.is_first, **options)
        return deter, stoch.flatten(2), posterior.flatten(2), prior.flatten(2)

    def imagine(self, **options: Any) -> tuple[Tensor, ...]:
        state = RSSMState(self.d.deter, self.d.stoch)
        result = self.model.imagine(self.policy, state, self.d.horizon, **options)
        return result.deter[1:], result.stoch[1:].flatten(2), result.action

    def act(self, n: int) -> Thunk:
        deter, stoch, action, embed = self.d.step(n)
        state = RSSMState(deter, stoch.unflatten(1, (self.c.stoch, self.c.classes)))

        def call() -> tuple[Tensor, ...]:
            result = self.model.step(state, action, embed)
            return result.deter, result.stoch.flatten(1)

        return call

    def flops(self, workload: str) -> float:
        """2 for each weight and row, for each of the gradients' two products again."""
        rows, H = self.d.action.shape[0] * self.d.action.shape[1], self.d.horizon
        count = {"core": 0, "prior": 0, "posterior": 0}
        for name, layer in self.model.params().layers():
            part = name.partition("[")[0]
            count[part if part in count else "core"] += layer.weight.numel()
        core, prior, posterior = count.values()
        if workload == "imagine":
            actor = sum(layer.weight.numel() for layer in self.policy.layers)
            return 2.0 * H * len(self.d.deter) * (core + prior + actor)
        if workload.startswith("act"):
            return 2.0 * int(workload.split()[1]) * (core + posterior)
        return 2.0 * rows * (core + prior + posterior) * (3 if workload == "gradients" else 1)


class Reference(Pywm):
    """The definition in PyTorch, eager."""

    def observe(self, **options: Any) -> tuple[Tensor, ...]:
        with _native.disabled():
            return super().observe(**options)

    def imagine(self, **options: Any) -> tuple[Tensor, ...]:
        with _native.disabled():
            return super().imagine(**options)

    def act(self, n: int) -> Thunk:
        call = super().act(n)

        def slow() -> object:
            with _native.disabled():
                return call()

        return slow


class CompiledReference(Pywm):
    """One step of the definition under torch.compile; the prior after the loop, as in the definition."""

    whole = False

    def observe(self) -> tuple[Tensor, ...]:
        d, c, params = self.d, self.c, self.model.params()
        T, B, _ = d.action.shape

        def step(*args: Any) -> tuple[Tensor, ...]:
            return reference_rssm.step(params, *args, None)[:3]

        def loop(step: Callable[..., Any], embed: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
            deter, stoch = (x.flatten(1) for x in self.model.initial(B))
            rows = []
            for t in range(T):
                deter, stats, stoch = step(deter, stoch, d.action[t], embed[t], d.is_first[t], noise[t])
                rows.append((deter, stoch, stats))
            deters, stochs, posterior = (torch.stack(x) for x in zip(*rows, strict=True))
            return deters, stochs, posterior, reference_rssm.head(deters, params.prior, c)

        if not hasattr(self, "_observe"):
            whole = compiled(lambda *args: loop(step, *args))
            self._step = compiled(step)
            self._observe = whole if self.whole else lambda *args: loop(self._step, *args)
        return self._observe(self.embed, torch.rand(T, B, c.stoch))

    def imagine(self) -> tuple[Tensor, ...]:
        d, c, params, policy = self.d, self.c, self.model.params(), self.policy

        def step(deter: Tensor, stoch: Tensor, noise: Tensor, action_noise: Tensor) -> tuple[Tensor, ...]:
            outputs = reference_rssm.head(torch.cat([deter, stoch], -1), policy.layers, policy)
            action = reference_rssm.act(policy, outputs, action_noise)
            deter, _, stoch, _ = reference_rssm.step(params, deter, stoch, action, None, None, noise, None)
            return deter, stoch, action

        if not hasattr(self, "_imagine"):
            self._imagine = compiled(step)
        H, N = d.horizon, len(d.deter)
        noise, action_noise = torch.rand(H, N, c.stoch), torch.rand(H, N, 1)
        deter, stoch, rows = d.deter, d.stoch.flatten(1), []
        for t in range(H):
            deter, stoch, action = self._imagine(deter, stoch, noise[t], action_noise[t])
            rows.append((deter, stoch, action))
        return tuple(torch.stack(x) for x in zip(*rows, strict=True))

    def act(self, n: int) -> Thunk:
        inputs, params, S = self.d.step(n), self.model.params(), self.c.stoch
        step = compiled(lambda *args: reference_rssm.step(params, *args, None)[:3:2])
        return lambda: step(*inputs, None, torch.rand(n, S))


class CompiledWindow(CompiledReference):
    whole = True

    def imagine(self) -> tuple[Tensor, ...]:
        raise NotImplementedError("only the window of observe")

    def act(self, n: int) -> Thunk:
        raise NotImplementedError("only the window of observe")


class TorchRL:
    """RSSMRolloutV3 for windows; RSSMPriorV3 and RSSMPosteriorV3 on tensors for the rest. Batch-major."""

    scope: str | None = None

    def __init__(self, d: Data, c: RSSMConfig, form: Form) -> None:
        if c.cell != "block_gru":
            raise NotImplementedError("torchrl has no GRU with LayerNorm")
        base = importlib.import_module("torchrl.modules.models.model_based")
        wrap = importlib.import_module("tensordict.nn").TensorDictModule
        self.tensordict = importlib.import_module("tensordict").TensorDict
        self.d = d
        sizes = {"hidden_dim": c.hidden, "num_categoricals": c.stoch, "num_classes": c.classes}
        self.prior = base.RSSMPriorV3(
            action_shape=(A,), action_dim=A, rnn_hidden_dim=c.deter, recurrent_model="block_gru",
            num_blocks=c.blocks, prior_num_layers=c.prior_layers, unimix=c.unimix, **sizes,
        )  # fmt: skip
        self.posterior = base.RSSMPosteriorV3(
            rnn_hidden_dim=c.deter, obs_embed_dim=c.embed, use_rms_norm=True, unimix=c.unimix, **sizes
        )
        self.actor = base.DreamerV3MLP(c.feat, A, depth=3, num_cells=form.units)
        self.sample = base._straight_through_categorical
        self.wrap = self._wrap
        self.rollout = base.RSSMRolloutV3(
            wrap(
                self.prior,
                in_keys=["state", "belief", "action"],
                out_keys=[("next", "prior_logits"), ("next", "state"), ("next", "belief")],
            ),
            wrap(
                self.posterior,
                in_keys=[("next", "belief"), ("next", "encoded_latents")],
                out_keys=[("next", "posterior_logits"), ("next", "state")],
            ),
        )
        if self.scope:
            self.rollout.compile_rollout(self.scope)
        self._imagine = self._wrap(self._imagine_step)
        T, B, _ = d.action.shape
        self.embed = d.embed.transpose(0, 1).contiguous().requires_grad_()
        self.leaves = [self.embed, *self.prior.parameters(), *self.posterior.parameters()]
        self.window = {
            "state": torch.zeros(B, T, c.stoch_width),
            "belief": torch.zeros(B, T, c.deter),
            "action": d.action.transpose(0, 1).contiguous(),
            "is_init": d.is_first.t().contiguous().unsqueeze(-1),
            "next": {"encoded_latents": self.embed},
        }

    def _wrap(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(fn) if self.scope else fn

    def observe(self) -> tuple[Tensor, ...]:
        T, B, _ = self.d.action.shape
        after = self.rollout(self.tensordict(self.window, [B, T])).get("next")
        names = ("belief", "state", "posterior_logits", "prior_logits")
        return tuple(after.get(name).transpose(0, 1).flatten(2) for name in names)

    def _imagine_step(self, deter: Tensor, stoch: Tensor) -> tuple[Tensor, ...]:
        action = self.sample(self.actor(stoch, deter), self.prior.unimix)
        _, stoch, deter = self.prior(stoch, deter, action)
        return deter, stoch, action

    def imagine(self) -> tuple[Tensor, ...]:
        deter, stoch, rows = self.d.deter, self.d.stoch.flatten(1), []
        for _ in range(self.d.horizon):
            deter, stoch, action = self._imagine(deter, stoch)
            rows.append((deter, stoch, action))
        return tuple(torch.stack(x) for x in zip(*rows, strict=True))

    def act(self, n: int) -> Thunk:
        def step(deter: Tensor, stoch: Tensor, action: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
            # What RSSMStateEstimatorV3 does.
            deter = self.prior._update_belief(stoch, deter, action)
            return deter, self.posterior(deter, embed)[1]

        call, inputs = self._wrap(step), self.d.step(n)
        return lambda: call(*inputs)


class TorchRLStep(TorchRL):
    scope = "step"


class TorchRLScan(TorchRL):
    scope = "scan"

    def imagine(self) -> tuple[Tensor, ...]:
        raise NotImplementedError("only the window of observe")

    def act(self, n: int) -> Thunk:
        raise NotImplementedError("only the window of observe")


class Sheeprl:
    """The RSSM of dreamer_v3_5, or of dreamer_v3 for a GRU with LayerNorm, driven as in their losses and players."""

    compile = False

    def __init__(self, d: Data, c: RSSMConfig, form: Form) -> None:
        self.d, self.c, self.classic = d, c, c.cell == "layernorm_gru"
        torch.distributions.Distribution.set_default_validate_args(False)  # as its configuration does
        self.rssm, self.actor = (self._classic if self.classic else self._block)(c, form)
        self._dynamic = self._wrap(self.rssm.dynamic)
        self._imagine = self._wrap(self._imagine_step)
        self.embed = d.embed.clone().requires_grad_()
        self.leaves = [self.embed, *self.rssm.parameters()]
        self.is_first = d.is_first.float().unsqueeze(-1)
        B = d.action.shape[1]
        self.deter0, self.stoch0 = torch.zeros(1, B, c.deter), torch.zeros(1, B, c.stoch, c.classes)

    def _wrap(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(fn) if self.compile else fn

    def _block(self, c: RSSMConfig, form: Form) -> tuple[nn.Module, nn.Module]:
        agent = importlib.import_module("sheeprl.algos.dreamer_v3_5.agent")
        prior = agent.mlp(c.deter, c.hidden, c.prior_layers)
        prior.append(agent.Linear(c.hidden, c.stoch_width))
        rssm = agent.RSSM(
            agent.RecurrentModel(c.deter, c.stoch_width, A, c.hidden, c.blocks),
            agent.RepresentationModel(c.deter, c.embed, c.hidden, c.stoch_width),
            prior, c.classes, c.unimix,
        )  # fmt: skip
        return rssm, agent.Actor(c.feat, [A], False, form.units, 3, unimix=c.unimix, outscale=1.0)

    def _classic(self, c: RSSMConfig, form: Form) -> tuple[nn.Module, nn.Module]:
        agent = importlib.import_module("sheeprl.algos.dreamer_v3.agent")

        def options() -> dict[str, Any]:
            norm = {"eps": c.eps, "normalized_shape": c.hidden}
            return {
                "output_dim": c.stoch_width, "hidden_sizes": [c.hidden], "activation": nn.SiLU,
                "layer_args": {"bias": False}, "norm_layer": [agent.LayerNorm], "norm_args": [norm],
            }  # fmt: skip

        rssm = agent.RSSM(
            agent.RecurrentModel(c.stoch_width + A, c.deter, c.hidden, layer_norm_kw={"eps": c.cell_eps}),
            agent.RepresentationModel(c.deter, input_dims=c.deter + c.embed, **options()),
            agent.MLP(input_dims=c.deter, **options()),
            {}, c.classes, c.unimix, learnable_initial_recurrent_state=False,
        )  # fmt: skip
        return rssm, agent.Actor(
            c.feat, [A], False, {}, dense_units=form.units, mlp_layers=3, unimix=c.unimix
        )

    def observe(self) -> tuple[Tensor, ...]:
        rssm, action, T = self.rssm, self.d.action, len(self.embed)
        deter, stoch, rows = self.deter0, self.stoch0, []
        embed, extra = rssm.project_observations(self.embed), {}
        if self.classic:
            extra = {"initial_states": (self.deter0, self.stoch0), "projected": True}
        else:
            action, stoch = rssm.embed_actions(action * (1 - self.is_first)), stoch.flatten(2)
        for t in range(T):
            row = (x[t : t + 1] for x in (action, embed, self.is_first))
            deter, stoch, logits = self._dynamic(stoch, deter, *row, **extra)
            rows.append((deter, stoch, logits))
        deters, stochs, posterior = (torch.cat(x) for x in zip(*rows, strict=True))
        prior = rssm.prior_logits(deters)
        return deters, stochs.flatten(2), posterior.flatten(2), prior.flatten(2)

    def _imagine_step(self, deter: Tensor, stoch: Tensor) -> tuple[Tensor, ...]:
        action = torch.cat(self.actor(torch.cat((stoch, deter), -1))[0], -1)
        stoch, deter = self.rssm.imagination(stoch, deter, action)
        return deter, stoch.view(1, -1, self.c.stoch_width), action

    def imagine(self) -> tuple[Tensor, ...]:
        deter, stoch, rows = self.d.deter[None], self.d.stoch.flatten(1)[None], []
        for _ in range(self.d.horizon):
            deter, stoch, action = self._imagine(deter, stoch)
            rows.append((deter, stoch, action))
        return tuple(torch.cat(x) for x in zip(*rows, strict=True))

    def act(self, n: int) -> Thunk:
        def block(deter: Tensor, stoch: Tensor, action: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
            inputs = self.rssm.embed_actions(action), self.rssm.project_observations(embed)
            return self.rssm.dynamic(stoch, deter, *inputs)[:2]

        def classic(deter: Tensor, stoch: Tensor, action: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
            deter = self.rssm.recurrent_model(torch.cat((stoch, action), -1), deter)
            return deter, self.rssm._representation(deter, embed)[1].flatten(2)

        call = self._wrap(classic if self.classic else block)
        inputs = [x[None] for x in self.d.step(n)]
        return lambda: [x[0] for x in call(*inputs)]


class SheeprlStep(Sheeprl):
    compile = True


@contextmanager
def stand_ins(*packages: str) -> Iterator[None]:
    """Let modules of packages that are not installed be imported as mocks: sheeprl's models need none of them to run."""

    class Finder:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> Any:
            if name.partition(".")[0] in packages:
                return importlib.machinery.ModuleSpec(name, Finder, is_package=True)  # type: ignore[arg-type]
            return None

        @staticmethod
        def create_module(spec: Any) -> Any:
            return mock.MagicMock()

        @staticmethod
        def exec_module(module: Any) -> None:
            pass

    sys.meta_path.append(Finder)  # type: ignore[arg-type]  # the last one, for what nobody else finds
    try:
        yield
    finally:
        sys.meta_path.remove(Finder)  # type: ignore[arg-type]
        for name, module in list(sys.modules.items()):
            if isinstance(module, mock.MagicMock):
                del sys.modules[name]


def find_sheeprl(path: str | None) -> str:
    """Import the modules with sheeprl's models; return why it did not work, or nothing."""
    if path:
        sys.path.append(path)
    spec = importlib.util.find_spec("sheeprl")
    if spec is None or not spec.submodule_search_locations:
        return "not installed (pip install --no-deps --target DIR sheeprl==0.8.4, then --sheeprl DIR)"
    # Its package imports all algorithms with all their needs; the folder alone will do.
    package = types.ModuleType("sheeprl")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["sheeprl"] = package
    try:
        with stand_ins("hydra", "lightning", "lightning_utilities", "omegaconf", "diambra", "dotenv"):
            for name in ("dreamer_v3", "dreamer_v3_5"):
                importlib.import_module(f"sheeprl.algos.{name}.agent")
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


SIDES: dict[str, type] = {
    "pywm": Pywm,
    "reference": Reference,
    "reference, compiled step": CompiledReference,
    "reference, compiled window": CompiledWindow,
    "torchrl": TorchRL,
    "torchrl, compiled step": TorchRLStep,
    "torchrl, compiled scan": TorchRLScan,
    "sheeprl": Sheeprl,
    "sheeprl, compiled step": SheeprlStep,
}


# ---- the gates -----------------------------------------------------------------------------------------------------------


def differentiate(side: Any, **options: Any) -> list[Tensor]:
    """The outputs of observe and their gradients; all cotangents are the same, so that nobody works on making them."""
    outputs = side.observe(**options)
    ones = [torch.ones((), dtype=x.dtype).expand_as(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, side.leaves, ones)]


def assert_correct(side: Pywm) -> None:
    """The green gate: kernels equal the float64 reference under forced samples."""
    d, before = side.d, _native.calls()
    exact = copy.copy(side)
    exact.d = copy.copy(d)
    for name, x in vars(d).items():
        setattr(exact.d, name, x.double() if isinstance(x, Tensor) and x.is_floating_point() else x)
    exact.model = copy.deepcopy(side.model).double()
    exact.embed = exact.d.embed.clone().requires_grad_()
    exact.leaves = [exact.embed, *exact.model.parameters()]
    layers = (Layer(*(None if x is None else x.double() for x in layer)) for layer in side.policy.layers)
    exact.policy = Policy(tuple(layers), norm=side.c.norm, act=side.c.act, eps=side.c.eps)

    def all_of(side: Pywm) -> list[Tensor]:
        found = differentiate(side, force_stoch=d.force)
        with torch.no_grad():
            action = side.d.force_action
            return [*found, *side.imagine(force_stoch=d.force_imagined, force_action=action)]

    got = all_of(side)
    served = {name for name, count in _native.calls().items() if count != before.get(name)}
    assert {"rssm_observe", "rssm_observe_backward"} <= served, "no compiled kernel served the call"
    with _native.disabled():
        want = all_of(exact)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)
        assert error < 1e-4, f"output {i} differs from the float64 reference by {error:.1e} of its largest"


def assert_plausible(outputs: Any, want: Any, c: RSSMConfig) -> None:
    """Finite, of our shapes, and one-hot where samples are."""
    assert [x.shape for x in outputs] == [x.shape for x in want], "other shapes"
    assert all(x.isfinite().all() for x in outputs), "not finite"
    stoch = outputs[1].unflatten(-1, (c.stoch, c.classes))
    assert torch.allclose(stoch.amax(-1), torch.ones(())), "not one-hot"
    assert torch.allclose(stoch.sum(-1), torch.ones(())), "not one-hot"


# ---- the comparison ------------------------------------------------------------------------------------------------------


def call_of(side: Any, workload: str) -> Thunk:
    if workload == "gradients":
        return lambda: differentiate(side)
    call = side.act(int(workload.split()[1])) if workload.startswith("act") else getattr(side, workload)

    def quiet() -> object:
        with torch.no_grad():
            return call()

    return quiet


def compare(
    workload: str, d: Data, c: RSSMConfig, options: argparse.Namespace, sheeprl: str
) -> dict[str, Any]:
    """Return one row: medians in ms of everybody who can, and who cannot."""
    torch.compiler.reset()
    form, thunks, left_out, compile_s = FORMS[options.size], {}, {}, {}
    ours = Pywm(d, c, form)
    want = call_of(ours, workload)()
    for name, kind in SIDES.items():
        package, _, how = name.partition(", ")
        try:
            if package == "sheeprl" and sheeprl:
                raise NotImplementedError(sheeprl)
            if package == "torchrl" and version("torchrl") is None:
                raise NotImplementedError("not installed (pip install torchrl==0.14.1)")
            if how in ("compiled window", "compiled scan") and not options.compile:
                raise NotImplementedError("takes minutes to compile (--compile to include it)")
            start = time.perf_counter()
            thunk = call_of(kind(d, c, form), workload)
            outputs = thunk()
            if how:
                compile_s[name] = round(time.perf_counter() - start, 1)
            count = 4 if workload == "gradients" else len(want)
            assert_plausible(outputs[:count], want[:count], c)
            assert all(x.isfinite().all() for x in outputs), "not finite"
        except Exception as error:
            if name == "pywm":
                raise
            reason = (str(error).splitlines() or [""])[0]
            known = isinstance(error, NotImplementedError)
            left_out[name] = reason if known else f"{type(error).__name__}: {reason}"
            continue
        thunks[name] = thunk
    a, b = torch.randn(2, PRODUCT, PRODUCT)
    times = interleaved({**thunks, "product": lambda: torch.mm(a, b)}, options.seconds)
    peak = 2 * PRODUCT**3 / times.pop("product") * 1e-3  # GFLOP/s
    flops = ours.flops(workload)
    own = times["pywm"]
    rivals = {name: x for name, x in times.items() if name != "pywm"}
    fastest = min(rivals, key=rivals.__getitem__)
    return {
        "workload": workload,
        "size": options.size,
        "gflop": round(flops * 1e-9, 3),
        "peak_gflop_s": round(peak, 1),
        "fastest": fastest,
        "ratio": round(rivals[fastest] / own, 2),
        "target": TARGETS.get((workload, options.size)),
        "ms": {name: round(x * 1e-3, 3) for name, x in sorted(times.items(), key=lambda item: item[1])},
        "share_of_peak": {name: round(flops / x * 1e-3 / peak, 3) for name, x in times.items()},
        "compile_s": compile_s,
        "left_out": left_out,
    }


def show(row: dict[str, Any]) -> None:
    verdict = "no target"
    if row["target"]:
        verdict = f"target {row['target']}: " + ("reached" if row["ratio"] >= row["target"] else "MISSED")
    print(
        f"\n{row['size']}, {row['workload']} ({row['gflop']} GFLOP; torch.mm {row['peak_gflop_s']} GFLOP/s): "
        f"{row['ratio']} x faster than {row['fastest']} ({verdict})"
    )
    print(f"    {'':28}{'median ms':>12}{'ratio':>9}{'peak':>9}")
    for name, ms in row["ms"].items():
        compile_s = f"   compiled in {row['compile_s'][name]} s" if name in row["compile_s"] else ""
        share = row["share_of_peak"][name]
        print(f"    {name:28}{ms:>12.3f}{ms / row['ms']['pywm']:>9.2f}{share:>9.1%}{compile_s}")
    for name, reason in row["left_out"].items():
        print(f"    {name:28}left out: {reason}")
    sys.stdout.flush()


def main() -> int:
    """Run the comparison and print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(FORMS), default="size12m")
    parser.add_argument(
        "--workload", choices=WORKLOADS, action="append", help="only this one; may be repeated"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each workload")
    parser.add_argument("--sheeprl", metavar="PATH", help="a folder with sheeprl")
    parser.add_argument("--compile", action="store_true", help="also what takes minutes to compile")
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    settle_allocator()
    sheeprl = find_sheeprl(options.sheeprl)
    about = {**machine(options.threads), **({} if sheeprl else {"sheeprl": version("sheeprl")})}

    form = FORMS[options.size]
    c = RSSMConfig(**MODELS[options.size], embed=form.embed, action=A)
    d = Data(c, form)
    assert_correct(Pywm(d, c, form))
    rows = []
    for workload in options.workload or WORKLOADS:
        rows.append(compare(workload, d, c, options, sheeprl))
        show(rows[-1])
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    missed = [row for row in rows if row["target"] and row["ratio"] < row["target"]]
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
