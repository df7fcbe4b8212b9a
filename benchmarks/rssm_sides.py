"""Who takes part in ``rssm.py``: pywm, its reference, torchrl and sheeprl, each behind the same three calls."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any, NamedTuple
from unittest import mock

import torch
from run import Thunk
from torch import Tensor, nn

from pywm.models import RSSM, RSSMConfig, RSSMState
from pywm.ops import Layer, Policy, _native, reference_rssm
from pywm.ops.cuda_graphs import record
from pywm.training.machine import version

A = 18  # actions


class Form(NamedTuple):
    """Sizes beside those of the model: encoder's and actor's width, window, starts and horizon of imagination."""

    embed: int
    units: int
    T: int = 64
    B: int = 16
    N: int = 1024
    H: int = 15


class Data:
    """The inputs of all workloads; time-major."""

    def __init__(self, c: RSSMConfig, form: Form) -> None:
        g = torch.Generator().manual_seed(0)
        T, B, N, H = form[2:]

        def one_hot(*shape: int, classes: int) -> Tensor:
            return nn.functional.one_hot(torch.randint(classes, shape, generator=g), classes).float()

        self.T, self.B, self.N, self.H = T, B, N, H
        self.embed = torch.randn(T, B, form.embed, generator=g)
        self.action = one_hot(T, B, classes=A)
        self.is_first = torch.rand(T, B, generator=g) < 0.02
        self.deter = torch.randn(N, c.deter, generator=g).tanh()
        self.stoch = one_hot(N, c.stoch, classes=c.classes).flatten(1)
        self.force = torch.randint(c.classes, (T, B, c.stoch), generator=g)
        self.force_imagined = torch.randint(c.classes, (H, N, c.stoch), generator=g)
        self.force_action = one_hot(H, N, classes=A)

    def to(self, device: str) -> Data:
        """Move everything."""
        for name, x in vars(self).items():
            if isinstance(x, Tensor):
                setattr(self, name, x.to(device))
        return self

    def step(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return deter, stoch, action and embedding of n environments."""
        rows = (self.deter, self.stoch, self.action.flatten(0, 1), self.embed.flatten(0, 1))
        return tuple(x[torch.arange(n, device=x.device) % len(x)] for x in rows)  # type: ignore[return-value]


class LeftOutError(Exception):
    """Why a side does not take part."""


class Side:
    """One contestant; what does not belong to a workload is made beforehand.

    Attributes:
        compiled: what torch.compile compiles: nothing, ``"step"`` or, in observe, a ``"scan"`` or the whole ``"window"``.
        embed: the embeddings as this side wants them.
        leaves: what the workload "gradients" differentiates in.
    """

    embed: Tensor
    leaves: list[Tensor]

    def __init__(self, d: Data, c: RSSMConfig, form: Form, compiled: str = "") -> None:
        self.d, self.c, self.form, self.compiled = d, c, form, compiled
        self.build()
        self._imagine_step = self.wrap(self.imagine_step)

    def wrap(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        if not self.compiled:
            return fn
        # On a GPU with graphs of its own.
        mode = "reduce-overhead" if self.d.deter.is_cuda else None
        return torch.compile(fn, dynamic=False, mode=mode)

    def build(self) -> None:
        raise NotImplementedError

    def observe(self) -> tuple[Tensor, ...]:
        """Filter the window: deter, stoch, posterior and prior, ``[T, B, ...]``."""
        raise NotImplementedError

    def imagine_step(self, deter: Tensor, stoch: Tensor) -> tuple[Tensor, ...]:
        """Act and go on: deter, stoch and action, ``[N, ...]``."""
        raise NotImplementedError

    def act_step(self, deter: Tensor, stoch: Tensor, action: Tensor, embed: Tensor) -> tuple[Tensor, ...]:
        """Go one step with an observation: deter and stoch, ``[n, ...]``."""
        raise NotImplementedError

    def imagine(self) -> tuple[Tensor, ...]:
        """Imagine from all starts: deter, stoch and action, ``[H, N, ...]``."""
        deter, stoch, rows = self.d.deter, self.d.stoch, []
        for _ in range(self.d.H):
            rows.append(self._imagine_step(deter, stoch))
            deter, stoch, _ = rows[-1]
        return tuple(torch.stack(x) for x in zip(*rows, strict=True))

    def act(self, n: int) -> Thunk:
        """Return a call of the acting step for n environments."""
        step, inputs = self.wrap(self.act_step), self.d.step(n)
        return lambda: step(*inputs)


class Pywm(Side):
    """Our kernels."""

    def build(self) -> None:
        c, g = self.c, torch.Generator().manual_seed(1)
        device = self.d.deter.device
        self.model = RSSM(c, generator=g).to(device)
        self.embed = self.d.embed.clone().requires_grad_()
        self.leaves = [self.embed, *self.model.parameters()]
        layers, width = [], c.feat
        for outputs in (self.form.units,) * 3:
            shift = torch.zeros(outputs) if c.norm == "layer" else None
            weight = torch.randn(outputs, width, generator=g) / width**0.5
            layers.append(Layer(weight, torch.zeros(outputs), torch.ones(outputs), shift))
            width = outputs
        layers.append(Layer(torch.randn(A, width, generator=g) / width**0.5, torch.zeros(A)))
        layers = [Layer(*(None if x is None else x.to(device) for x in layer)) for layer in layers]
        self.policy = Policy(tuple(layers), norm=c.norm, act=c.act, eps=c.eps)

    def observe(self, **options: Any) -> tuple[Tensor, ...]:
        d = self.d
        deter, stoch, _, posterior, prior = self.model.observe(self.embed, d.action, d.is_first, **options)
        return deter, stoch.flatten(2), posterior.flatten(2), prior.flatten(2)

    def imagine(self, **options: Any) -> tuple[Tensor, ...]:
        state = RSSMState(self.d.deter, self.d.stoch.unflatten(1, (self.c.stoch, self.c.classes)))
        result = self.model.imagine(self.policy, state, self.d.H, **options)
        return result.deter[1:], result.stoch[1:].flatten(2), result.action

    def act_step(self, deter: Tensor, stoch: Tensor, *rest: Tensor, **options: Any) -> tuple[Tensor, ...]:
        state = RSSMState(deter, stoch.unflatten(1, (self.c.stoch, self.c.classes)))
        result = self.model.step(state, *rest, **options)
        return result.deter, result.stoch.flatten(1)

    def flops(self, workload: str) -> float:
        """2 for each weight and row; with gradients three times as many."""
        d, count = self.d, {"core": 0, "prior": 0, "posterior": 0}
        for name, layer in self.model.params().layers():
            part = name.partition("[")[0]
            count[part if part in count else "core"] += layer.weight.numel()
        core, prior, posterior = count.values()
        if workload == "imagine":
            actor = sum(layer.weight.numel() for layer in self.policy.layers)
            return 2.0 * d.H * d.N * (core + prior + actor)
        if workload.startswith("act"):
            return 2.0 * int(workload.split()[1]) * (core + posterior)
        return 2.0 * d.T * d.B * (core + prior + posterior) * (3 if workload == "gradients" else 1)


class EagerReference(Pywm):
    """The definition in PyTorch as users get it where no kernel is."""

    def observe(self, **options: Any) -> tuple[Tensor, ...]:
        with _native.disabled():
            return super().observe(**options)

    def imagine(self, **options: Any) -> tuple[Tensor, ...]:
        with _native.disabled():
            return super().imagine(**options)

    def act_step(self, *args: Tensor, **options: Any) -> tuple[Tensor, ...]:
        with _native.disabled():
            return super().act_step(*args, **options)


class CompiledReference(Pywm):
    """The definition under torch.compile, the prior after the recurrence as there."""

    def build(self) -> None:
        super().build()
        self.params = self.model.params()
        self._step = self.observe_step
        if self.compiled == "step":
            self._step = self.wrap(self.observe_step)
        self._window = self.wrap(self.window) if self.compiled == "window" else self.window

    def observe_step(self, *args: Any) -> tuple[Tensor, ...]:
        return reference_rssm.step(self.params, *args, None)[:3]

    def window(self, noise: Tensor) -> tuple[Tensor, ...]:
        d, rows = self.d, []
        deter, stoch = (x.flatten(1).to(d.deter.device) for x in self.model.initial(d.B))
        for t in range(d.T):
            args = d.action[t], self.embed[t], d.is_first[t], noise[t]
            deter, posterior, stoch = self._step(deter, stoch, *args)
            rows.append((deter, stoch, posterior))
        deters, stochs, posteriors = (torch.stack(x) for x in zip(*rows, strict=True))
        priors = reference_rssm.head(deters, self.params.prior, self.c, self.c.operands)
        return deters, stochs, posteriors, priors

    def observe(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self._window(torch.rand(self.d.T, self.d.B, self.c.stoch, device=self.d.deter.device))

    imagine = Side.imagine  # type: ignore[assignment]

    def imagine_step(self, deter: Tensor, stoch: Tensor) -> tuple[Tensor, ...]:
        device = deter.device
        noise, action_noise = (torch.rand(self.d.N, width, device=device) for width in (self.c.stoch, 1))
        feat = torch.cat([deter, stoch], -1)
        outputs = reference_rssm.head(feat, self.policy.layers, self.policy, self.c.operands)
        action = reference_rssm.act(self.policy, outputs, action_noise)
        deter, _, stoch, _ = reference_rssm.step(self.params, deter, stoch, action, None, None, noise, None)
        return deter, stoch, action

    def act_step(self, *args: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        noise = torch.rand(len(args[0]), self.c.stoch, device=args[0].device)
        return reference_rssm.step(self.params, *args, None, noise, None)[:3:2]


class GraphReference(CompiledReference):
    """The definition in PyTorch, a whole call captured in a CUDA graph (windows and imagination without gradients)."""

    def capture(self, call: Thunk) -> Thunk:
        if not self.d.deter.is_cuda:
            raise LeftOutError("a CUDA graph needs a GPU")
        outputs, play = record(lambda: list(call()))  # type: ignore[call-overload]

        def replay() -> list[Tensor]:
            play()
            return outputs

        return replay

    def observe(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise LeftOutError("a captured forward pass has no gradients")
        if not hasattr(self, "replay"):
            self.replay = self.capture(super().observe)
        return self.replay()  # type: ignore[return-value]

    def imagine(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        if not hasattr(self, "replay"):
            self.replay = self.capture(super().imagine)
        return self.replay()  # type: ignore[return-value]

    def act(self, n: int) -> Thunk:
        inputs = self.d.step(n)
        return self.capture(lambda: self.act_step(*inputs))


class TorchRL(Side):
    """RSSMRolloutV3 for windows, batch-major; RSSMPriorV3 and RSSMPosteriorV3 on tensors for the rest."""

    def build(self) -> None:
        c, d = self.c, self.d
        if d.deter.is_cuda:
            raise LeftOutError("compared on the CPU only")
        if version("torchrl") is None:
            raise LeftOutError("not installed (pip install torchrl==0.14.1)")
        if c.cell != "block_gru":
            raise LeftOutError("has no GRU with LayerNorm")
        base = importlib.import_module("torchrl.modules.models.model_based")
        wrap = importlib.import_module("tensordict.nn").TensorDictModule
        self.tensordict = importlib.import_module("tensordict").TensorDict
        sizes: dict[str, Any] = {
            "hidden_dim": c.hidden,
            "num_categoricals": c.stoch,
            "num_classes": c.classes,
        }
        sizes |= {"rnn_hidden_dim": c.deter, "unimix": c.unimix, "norm_eps": c.eps}
        core = {"recurrent_model": "block_gru", "num_blocks": c.blocks, "prior_num_layers": c.prior_layers}
        self.prior = base.RSSMPriorV3(action_shape=(A,), action_dim=A, **core, **sizes)
        self.posterior = base.RSSMPosteriorV3(obs_embed_dim=c.embed, use_rms_norm=True, **sizes)
        self.actor = base.DreamerV3MLP(c.feat, A, depth=3, num_cells=self.form.units)
        self.sample = base._straight_through_categorical
        outputs = [("next", name) for name in ("prior_logits", "state", "belief")]
        prior = wrap(self.prior, in_keys=["state", "belief", "action"], out_keys=outputs)
        inputs = [("next", "belief"), ("next", "encoded_latents")]
        outputs = [("next", "posterior_logits"), ("next", "state")]
        self.rollout = base.RSSMRolloutV3(prior, wrap(self.posterior, in_keys=inputs, out_keys=outputs))
        if self.compiled:
            self.rollout.compile_rollout(self.compiled)
        self.embed = d.embed.transpose(0, 1).contiguous().requires_grad_()
        self.leaves = [self.embed, *self.prior.parameters(), *self.posterior.parameters()]
        self.window = {
            "state": torch.zeros(d.B, d.T, c.stoch_width),
            "belief": torch.zeros(d.B, d.T, c.deter),
            "action": d.action.transpose(0, 1).contiguous(),
            "is_init": d.is_first.t().contiguous().unsqueeze(-1),
            "next": {"encoded_latents": self.embed},
        }

    def observe(self) -> tuple[Tensor, ...]:
        after = self.rollout(self.tensordict(self.window, [self.d.B, self.d.T])).get("next")
        names = ("belief", "state", "posterior_logits", "prior_logits")
        return tuple(after.get(name).transpose(0, 1).flatten(2) for name in names)

    def imagine_step(self, deter: Tensor, stoch: Tensor) -> tuple[Tensor, ...]:
        action = self.sample(self.actor(stoch, deter), self.prior.unimix)
        _, stoch, deter = self.prior(stoch, deter, action)
        return deter, stoch, action

    def act_step(self, deter: Tensor, stoch: Tensor, action: Tensor, embed: Tensor) -> tuple[Tensor, ...]:
        # As RSSMStateEstimatorV3 does it.
        deter = self.prior._update_belief(stoch, deter, action)
        return deter, self.posterior(deter, embed)[1]


class Sheeprl(Side):
    """The RSSM of dreamer_v3_5, driven as in its loss and its player."""

    def build(self) -> None:
        d, c = self.d, self.c
        if d.deter.is_cuda:
            raise LeftOutError("compared on the CPU only")
        torch.distributions.Distribution.set_default_validate_args(False)  # as its configuration does
        self.make()
        self.dynamic = self.wrap(self.rssm.dynamic)
        self.embed = d.embed.clone().requires_grad_()
        self.leaves = [self.embed, *self.rssm.parameters()]
        self.is_first = d.is_first.float().unsqueeze(-1)
        self.deter0, self.stoch0 = torch.zeros(1, d.B, c.deter), torch.zeros(1, d.B, c.stoch_width)

    def make(self) -> None:
        c, agent = self.c, importlib.import_module("sheeprl.algos.dreamer_v3_5.agent")
        prior = agent.mlp(c.deter, c.hidden, c.prior_layers)
        prior.append(agent.Linear(c.hidden, c.stoch_width))
        core = agent.RecurrentModel(c.deter, c.stoch_width, A, c.hidden, c.blocks)
        posterior = agent.RepresentationModel(c.deter, c.embed, c.hidden, c.stoch_width)
        self.rssm = agent.RSSM(core, posterior, prior, c.classes, c.unimix)
        self.actor = agent.Actor(c.feat, [A], False, self.form.units, 3, unimix=c.unimix, outscale=1.0)

    def hoisted(self) -> tuple[Tensor, Tensor]:
        """What the recurrence takes of actions and embeddings."""
        action = self.rssm.embed_actions(self.d.action * (1 - self.is_first))
        return action, self.rssm.project_observations(self.embed)

    def observe(self, **options: Any) -> tuple[Tensor, ...]:
        inputs = (*self.hoisted(), self.is_first)
        deter, stoch, rows = self.deter0, self.stoch0, []
        for t in range(self.d.T):
            deter, stoch, logits = self.dynamic(stoch, deter, *(x[t : t + 1] for x in inputs), **options)
            rows.append((deter, stoch, logits))
        deters, stochs, posteriors = (torch.cat(x).flatten(2) for x in zip(*rows, strict=True))
        return deters, stochs, posteriors, self.rssm.prior_logits(deters).flatten(2)

    def imagine_step(self, deter: Tensor, stoch: Tensor) -> tuple[Tensor, ...]:
        deter, stoch = deter[None], stoch[None]
        action = torch.cat(self.actor(torch.cat((stoch, deter), -1))[0], -1)
        stoch, deter = self.rssm.imagination(stoch, deter, action)
        return deter[0], stoch.view(-1, self.c.stoch_width), action[0]

    def act_step(self, deter: Tensor, stoch: Tensor, action: Tensor, embed: Tensor) -> tuple[Tensor, ...]:
        inputs = self.rssm.embed_actions(action), self.rssm.project_observations(embed)
        return self.rssm.dynamic(stoch, deter, *inputs)[:2]


class SheeprlClassic(Sheeprl):
    """The RSSM of dreamer_v3, whose cell is a GRU with LayerNorm; its linear layers before norms have no bias."""

    def make(self) -> None:
        c, agent = self.c, importlib.import_module("sheeprl.algos.dreamer_v3.agent")

        def options() -> dict[str, Any]:
            norms = {
                "norm_layer": [agent.LayerNorm],
                "norm_args": [{"eps": c.eps, "normalized_shape": c.hidden}],
            }
            sizes = {"output_dim": c.stoch_width, "hidden_sizes": [c.hidden]}
            return {**sizes, **norms, "activation": nn.SiLU, "layer_args": {"bias": False}}

        core = agent.RecurrentModel(c.stoch_width + A, c.deter, c.hidden, layer_norm_kw={"eps": c.cell_eps})
        posterior = agent.RepresentationModel(c.deter, input_dims=c.deter + c.embed, **options())
        prior = agent.MLP(input_dims=c.deter, **options())
        self.rssm = agent.RSSM(
            core, posterior, prior, {}, c.classes, c.unimix, learnable_initial_recurrent_state=False
        )
        units = {"dense_units": self.form.units, "mlp_layers": 3}
        self.actor = agent.Actor(c.feat, [A], False, {}, unimix=c.unimix, **units)
        self.stoch0_wide = torch.zeros(1, self.d.B, c.stoch, c.classes)

    def hoisted(self) -> tuple[Tensor, Tensor]:
        return self.d.action, self.rssm.project_observations(self.embed)

    def observe(self, **options: Any) -> tuple[Tensor, ...]:
        self.stoch0 = self.stoch0_wide
        return super().observe(initial_states=(self.deter0, self.stoch0_wide), projected=True)

    def act_step(self, deter: Tensor, stoch: Tensor, action: Tensor, embed: Tensor) -> tuple[Tensor, ...]:
        deter = self.rssm.recurrent_model(torch.cat((stoch, action), -1)[None], deter[None])
        stoch = self.rssm._representation(deter, embed[None])[1]
        return deter[0], stoch.view(-1, self.c.stoch_width)


@contextmanager
def stand_ins(*packages: str) -> Iterator[None]:
    """Let modules of missing packages be imported as mocks: sheeprl's models import many and need none of them."""

    class Finder:
        @classmethod
        def find_spec(cls, name: str, *_: object) -> ModuleSpec | None:
            return ModuleSpec(name, cls, is_package=True) if name.partition(".")[0] in packages else None

        @staticmethod
        def create_module(_: ModuleSpec) -> Any:
            return mock.MagicMock()

        @staticmethod
        def exec_module(module: Any) -> None:
            pass

    sys.meta_path.append(Finder)  # behind all others, so that what is installed is found
    try:
        yield
    finally:
        sys.meta_path.remove(Finder)
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
    # The package imports all its algorithms with all that they need; its folder will do.
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
