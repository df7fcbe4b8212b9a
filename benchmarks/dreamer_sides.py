"""Who takes part in ``dreamer.py``: pywm, its reference, torchrl and sheeprl, each behind one call that is one update."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from gymnasium import spaces
from rssm_sides import LeftOutError, find_sheeprl, stand_ins
from torch import Tensor, nn

from pywm.algos import dreamer_v3
from pywm.data.replay import Sequences
from pywm.models import world_model
from pywm.nn import ImageDecoder, ImageEncoder, NormMLP
from pywm.ops import _native, reference_rssm
from pywm.training.machine import version
from pywm.types import StepOut

VECTOR = 24  # numbers of an observation
PICTURE = (3, 64, 64)
COMPILED_SHAPES = 64  # of one function, for all networks share theirs


class Form(NamedTuple):
    """What is learnt from, and how far ahead is imagined."""

    size: str
    obs: str
    actions: int = 18
    T: int = 64
    B: int = 16
    H: int = 15

    @property
    def space(self) -> spaces.Box:
        """Of observations."""
        if self.obs == "pixels":
            return spaces.Box(0, 255, PICTURE, np.uint8)
        return spaces.Box(-np.inf, np.inf, (VECTOR,))

    @property
    def config(self) -> dreamer_v3.Config:
        """Settings of pywm; the learning rate is that of the end of the warm-up, so that something is learnt."""
        return dreamer_v3.Config(
            size=self.size,  # type: ignore[arg-type]
            batch_size=self.B,
            batch_length=self.T,
            imagine_horizon=self.H,
            replay_size=self.B * (self.T + 8),
            num_envs=self.B,
            warmup=0,
        )


# ---- our side ------------------------------------------------------------------------------------------------------------


def new_learner(form: Form) -> tuple[dreamer_v3.Learner, Sequences]:
    """Return a learner, the same each time, and the batch that all sides learn from."""
    agent = dreamer_v3.Agent(form.config, form.space, spaces.Discrete(form.actions))
    learner = dreamer_v3.Learner(agent, types.SimpleNamespace(num_envs=form.B))  # type: ignore[arg-type]
    season(agent)
    random, N, c = np.random.default_rng(0), form.B, agent.networks.world_model.rssm.config

    def observe() -> np.ndarray:
        if form.obs == "pixels":
            return random.integers(0, 256, (N, *PICTURE), np.uint8)
        return random.normal(size=(N, VECTOR)).astype(np.float32)

    obs, no = observe(), np.zeros(N, bool)
    for _ in range(form.T + 4):
        terminated, after = random.random(N) < 0.01, observe()
        reward = random.normal(size=N).astype(np.float32)
        action = torch.eye(form.actions)[random.integers(form.actions, size=N)]
        out = StepOut(after, reward, terminated, no, observe(), ~no)
        deter = np.tanh(random.normal(size=(N, c.deter))).astype(np.float32)
        stoch = random.integers(0, c.classes, (N, c.stoch)).astype(np.uint8)
        learner.replay.add(obs, action, out, deter=deter, stoch=stoch)
        obs = after
    return learner, learner.replay.sample(form.B)


def season(agent: dreamer_v3.Agent) -> None:
    """Give heads over bins, which begin with zeros, outputs as after some training: near zero, and different."""
    networks, generator = agent.networks, torch.Generator().manual_seed(1)
    with torch.no_grad():
        for head in (networks.critic, networks.world_model.reward):
            assert head.out is not None
            assert head.out.bias is not None
            head.out.weight.normal_(0, 0.3 / math.sqrt(head.out.weight.shape[1]), generator=generator)
            head.out.bias.copy_(torch.linspace(-20, 20, len(head.out.bias)).abs().mul(-2))
        agent.slow_critic.module.load_state_dict(networks.critic.state_dict())


class Clock:
    """Measures the parts of calls, each without the parts inside it.

    Attributes:
        parts: name to seconds since :meth:`start`.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.parts: dict[str, float] = {}
        self._inside = [0.0]

    def part(self, name: str, owner: Any, method: str) -> None:
        """Count the time of a method of an object."""
        call = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                seconds = time.perf_counter() - start
                self.parts[name] = self.parts.get(name, 0.0) + seconds - self._inside.pop()
                self._inside[-1] += seconds

        setattr(owner, method, timed)


class Side:
    """One contestant.

    Attributes:
        compiled: what torch.compile compiles: nothing, ``"step"``, all but the loops, or ``"whole"`` losses.
        other: how its model differs from ours where it does not do the same work; such a side is shown, but not compared.
    """

    other = ""

    def __init__(self, form: Form, compiled: str = "") -> None:
        self.form, self.compiled = form, compiled
        self.build(*new_learner(form))

    def compile(self, call: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(call, dynamic=False)

    def build(self, learner: dreamer_v3.Learner, batch: Sequences) -> None:
        raise NotImplementedError

    def update(self) -> dict[str, Any]:
        """Learn from the batch once; return the losses."""
        raise NotImplementedError

    def parameters(self) -> list[Tensor]:
        """What is learnt."""
        raise NotImplementedError


class Pywm(Side):
    """Our kernels, with a clock for the parts."""

    def build(self, learner: dreamer_v3.Learner, batch: Sequences) -> None:
        self.learner, self.batch = learner, batch
        agent, self.clock = learner.agent, Clock()
        self.history: list[dict[str, float]] = []
        networks = agent.networks
        model = networks.world_model
        heads = (model.reward, model.proceed, networks.actor, networks.critic, agent.slow_critic.module)
        self.clock.part("losses", learner, "update")  # what no other part takes
        self.clock.part("encode", model, "encode")
        self.clock.part("observe", model.rssm, "observe")
        self.clock.part("decode and heads", model, "decode")
        for head in heads:
            self.clock.part("decode and heads", head, "forward")
        self.clock.part("imagine", model.rssm, "imagine")
        self.clock.part("backward", agent.parameters, "backward")
        self.clock.part("optimiser", learner.optimizer, "step")
        self.clock.part("optimiser", agent.slow_critic, "update")
        self.clock.part("write back", learner.replay, "write_back")

    def update(self) -> dict[str, Any]:
        self.clock.start()
        stats = self.learner.update(self.batch)
        self.history.append(self.clock.parts)
        return stats

    def parameters(self) -> list[Tensor]:
        return list(self.learner.agent.networks.parameters())


class Reference(Pywm):
    """The same update as users get it where no kernel is."""

    def update(self) -> dict[str, Any]:
        with _native.disabled():
            return super().update()


class CompiledReference(Reference):
    """The same; steps of the recurrent model, networks and losses each under torch.compile."""

    def build(self, learner: dreamer_v3.Learner, batch: Sequences) -> None:
        torch._dynamo.config.recompile_limit = COMPILED_SHAPES
        agent = learner.agent
        for module in (*agent.networks.modules(), *agent.slow_critic.module.modules()):
            if isinstance(module, NormMLP | ImageEncoder | ImageDecoder):
                module.forward = self.compile(module.forward)  # type: ignore[method-assign]
        agent.networks.world_model.rssm.kl = self.compile(agent.networks.world_model.rssm.kl)  # type: ignore[method-assign]
        self.functions: list[tuple[Any, str, Any]] = [
            (reference_rssm, "step", self.compile(reference_rssm.step)),
        ]
        for name in ("symexp_twohot_loss", "symexp_twohot_mean"):
            call = self.compile(getattr(dreamer_v3, name))
            self.functions += [(dreamer_v3, name, call), (world_model, name, call)]
        super().build(learner, batch)

    def update(self) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            for owner, name, call in self.functions:
                stack.enter_context(mock.patch.object(owner, name, call))
            return super().update()


# ---- torchrl -------------------------------------------------------------------------------------------------------------


class OurConvolutions(nn.Module):
    """Our convolutional network as it runs without kernels, for rows of any number of axes."""

    def __init__(self, network: nn.Module, rank: int) -> None:
        super().__init__()
        self.network, self.rank = network, rank

    def forward(self, *inputs: Tensor) -> Tensor:
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        lead = x.shape[: x.ndim - self.rank]
        with _native.disabled():
            return self.network(x.flatten(0, len(lead) - 1)).unflatten(0, lead)


class TorchRL(Side):
    """``DreamerV3Loss`` and what belongs to it, put together as in the example that comes with it."""

    ours = True  # convolutions: as ours, or torchrl's own with strides

    def build(self, learner: dreamer_v3.Learner, batch: Sequences) -> None:
        if version("torchrl") is None:
            raise LeftOutError("not installed (pip install torchrl==0.14.1)")
        config, form = learner.config, self.form
        self.sizes = dreamer_v3.WIDTHS[form.size]
        c = learner.agent.networks.world_model.rssm.config
        modules, objectives, data, algorithms, tensordict = (
            importlib.import_module(name)
            for name in (
                "torchrl.modules",
                "torchrl.objectives",
                "torchrl.data",
                "torchrl.trainers.algorithms",
                "tensordict",
            )
        )
        base = importlib.import_module("torchrl.modules.models.model_based")
        estimators = importlib.import_module("torchrl.objectives.utils")
        tdnn = importlib.import_module("tensordict.nn")
        unbounded = data.Unbounded
        module, sequential = tdnn.TensorDictModule, tdnn.TensorDictSequential
        units, eps = self.sizes["units"], c.eps

        def mlp(inputs: int, outputs: int | None, depth: int, scale: float = 1.0) -> nn.Module:
            return modules.DreamerV3MLP(inputs, outputs, depth, units, scale, eps)

        def after(*names: str) -> list[tuple[str, str]]:
            return [("next", name) for name in names]

        # Encoder and decoder.
        self.image = form.obs == "pixels"
        if self.image:
            encoder = [module(self.image_encoder(modules), after("obs"), after("encoded_latents"))]
            decoder = [module(self.image_decoder(modules, c), after("state", "belief"), after("reco_pixels"))]
        else:
            encoder = [
                module(objectives.symlog, after("obs"), after("symlog_obs")),
                module(mlp(VECTOR, None, 3), after("symlog_obs"), after("encoded_latents")),
            ]
            decoder = [
                module(mlp(c.feat, VECTOR, 3), after("state", "belief"), after("reco_symlog")),
                module(objectives.symexp, after("reco_symlog"), after("reco_pixels")),
            ]
        # Recurrent model.
        latents = {"hidden_dim": c.hidden, "num_categoricals": c.stoch, "num_classes": c.classes}
        latents |= {"rnn_hidden_dim": c.deter, "unimix": c.unimix, "norm_eps": eps}
        core = {"recurrent_model": "block_gru", "num_blocks": c.blocks, "prior_num_layers": c.prior_layers}
        prior = base.RSSMPriorV3(action_shape=(form.actions,), action_dim=form.actions, **core, **latents)
        posterior = base.RSSMPosteriorV3(obs_embed_dim=c.embed, use_rms_norm=True, **latents)
        rollout = base.RSSMRolloutV3(
            module(prior, ["state", "belief", "action"], after("prior_logits", "state", "belief")),
            module(posterior, after("belief", "encoded_latents"), after("posterior_logits", "state")),
        )
        if self.compiled == "step":
            rollout.compile_rollout("step")
        # Heads.
        reward, proceed = mlp(c.feat, config.bins, 1, 0.0), mlp(c.feat, 1, 1)
        decoded = modules.SymExpTwoHot(config.bins)
        world = sequential(
            sequential(*encoder),
            rollout,
            sequential(*decoder),
            module(reward, after("belief", "state"), after("reward_logits")),
            module(decoded, after("reward_logits"), after("reward")),
            module(proceed, after("belief", "state"), after("continue_pred")),
        )
        imagined_prior = torch.compile(prior, dynamic=False) if self.compiled == "step" else prior
        imagination = modules.WorldModelWrapper(
            module(imagined_prior, ["state", "belief", "action"], ["_", "state", "belief"]),
            sequential(
                module(reward, ["belief", "state"], ["reward_logits"]),
                module(decoded, ["reward_logits"], ["reward"]),
            ),
        )
        continuation = sequential(
            module(proceed, ["belief", "state"], ["continue_logits"]),
            module(nn.Sigmoid(), ["continue_logits"], ["continuation"]),
        )
        actor = modules.DreamerV3DiscreteActor(
            c.feat, form.actions, num_cells=units, norm_eps=eps, unimix=config.actor_unimix
        )
        critic = sequential(
            module(mlp(c.feat, config.bins, 3, 0.0), ["belief", "state"], ["state_value_logits"]),
            module(modules.SymExpTwoHot(config.bins), ["state_value_logits"], ["state_value"]),
        )
        env = importlib.import_module("torchrl.envs.model_based").DreamerEnv(
            imagination, prior_shape=(c.stoch_width,), belief_shape=(c.deter,)
        )
        env.observation_spec = data.Composite(state=unbounded((c.stoch_width,)), belief=unbounded((c.deter,)))
        env.state_spec = env.observation_spec.clone()
        env.action_spec = data.OneHot(form.actions)
        env.reward_spec = unbounded((1,))
        # Losses and optimiser.
        model_loss = objectives.DreamerV3ModelLoss(
            world,
            num_reward_bins=config.bins,
            free_bits=config.free_nats,
            kl_mode="separate",
            lambda_dynamic=config.dynamics_scale,
            lambda_representation=config.representation_scale,
            unimix=c.unimix,
            lambda_continue=1.0,
            reco_symlog=not self.image,
            continue_target_scale=1 - 1 / config.horizon,
            detach_output=False,
        )
        model_loss.set_keys(pixels="obs")
        actor_loss = objectives.DreamerV3ActorLoss(
            actor,
            critic,
            env,
            continuation_model=continuation,
            imagination_horizon=form.H,
            entropy_bonus=config.entropy_coef,
            use_reinforce=True,
        )
        # The head of continuation has the discount in it.
        actor_loss.make_value_estimator(estimators.ValueEstimators.TDLambda, gamma=1.0, lmbda=config.lam)
        value_loss = objectives.DreamerV3ValueLoss(
            critic,
            "two_hot",
            num_value_bins=config.bins,
            actor_loss=actor_loss,
            slow_critic_regularization=1.0,
        )
        target = estimators.SoftUpdate(value_loss, tau=config.slow_rate)
        loss = objectives.DreamerV3Loss(model_loss, actor_loss, value_loss, lmbda=config.lam)
        self.learnt = [*world.parameters(), *actor.parameters(), *value_loss.parameters()]
        whole = self.compiled == "whole"
        self.stepper = algorithms.DreamerV3OptimizationStepper(
            loss,
            algorithms.DreamerV3Optimizer(self.learnt, lr=config.lr, warmup_steps=0),
            target,
            compile_train_step=whole,
            cudagraph=False,
            warmup_steps=1,
        )
        first = (c.stoch_width, c.deter)
        state, belief = (torch.zeros(form.B, form.T, width) for width in first)
        state[:, 0] = nn.functional.one_hot(batch.latents["stoch"].long(), c.classes).flatten(1)
        belief[:, 0] = batch.latents["deter"]

        def rows(x: Tensor) -> Tensor:
            return x.transpose(0, 1).contiguous()

        self.sample = tensordict.TensorDict(
            {
                "action": rows(batch.prev_action),
                "is_init": rows(batch.is_first).unsqueeze(-1),
                "state": state,
                "belief": belief,
                "next": {
                    "obs": rows(batch.obs["obs"]),
                    "reward": rows(batch.reward).unsqueeze(-1),
                    "done": rows(batch.is_last).unsqueeze(-1),
                    "terminated": rows(batch.terminated).unsqueeze(-1),
                },
            },
            [form.B, form.T],
        )
        if whole:
            self.stepper.warmup(self.sample)

    def image_encoder(self, modules: Any) -> nn.Module:
        return OurConvolutions(ImageEncoder(PICTURE, self.sizes["depth"]), 3)

    def image_decoder(self, modules: Any, c: Any) -> nn.Module:
        # Ours wants deter first.
        network = ImageDecoder(
            PICTURE, c.deter, c.stoch_width, depth=self.sizes["depth"], units=self.sizes["units"]
        )
        return Swapped(OurConvolutions(network, 1))

    def update(self) -> dict[str, Any]:
        losses = self.stepper.step(None, self.sample)
        return {name: x for name, x in losses.items() if name.startswith("loss_")}

    def parameters(self) -> list[Tensor]:
        return self.learnt


class Swapped(nn.Module):
    """A module of two inputs in the other order."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.inner(b, a)


class TorchRLStrided(TorchRL):
    """The same with torchrl's own convolutions, which have strides: a quarter of the arithmetic."""

    other = "convolutions with strides of 2, a quarter of the arithmetic, and no perceptron in the decoder"

    def build(self, learner: dreamer_v3.Learner, batch: Sequences) -> None:
        if self.form.obs != "pixels":
            raise LeftOutError("")
        super().build(learner, batch)

    def image_encoder(self, modules: Any) -> nn.Module:
        return modules.DreamerV3ImageEncoder(depth=self.sizes["depth"])

    def image_decoder(self, modules: Any, c: Any) -> nn.Module:
        return modules.DreamerV3ImageDecoder(c.feat, PICTURE, depth=self.sizes["depth"])


# ---- sheeprl -------------------------------------------------------------------------------------------------------------


class Setup(nn.Module):
    """What stands for Fabric's wrapper of a module: nothing but its call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.module(*args, **options)


def find_update(path: str | None) -> str:
    """Import sheeprl's dreamer_v3_5 with its update; return why it did not work, or nothing."""
    if why := find_sheeprl(path):
        return why
    missing = ("hydra", "lightning", "lightning_utilities", "omegaconf", "torchmetrics", "cv2", "diambra")
    missing += ("dotenv", "mlflow", "ale_py")
    try:
        with stand_ins(*missing):
            importlib.import_module("sheeprl.algos.dreamer_v3_5.dreamer_v3_5")
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


class Sheeprl(Side):
    """``train`` of dreamer_v3_5 itself, with the least that can stand for Fabric and with no metrics."""

    def build(self, learner: dreamer_v3.Learner, batch: Sequences) -> None:
        torch.distributions.Distribution.set_default_validate_args(False)  # as its configuration does
        agent = sys.modules["sheeprl.algos.dreamer_v3_5.agent"]
        self.algo = sys.modules["sheeprl.algos.dreamer_v3_5.dreamer_v3_5"]
        optim = importlib.import_module("sheeprl.algos.dreamer_v3_5.optim")
        form, config = self.form, learner.config
        self.config = self.algo.dotdict(self.settings(learner))
        fabric = types.SimpleNamespace(
            device=torch.device("cpu"),
            world_size=1,
            backward=lambda loss, inputs: loss.backward(inputs=inputs),
            all_gather=lambda x: x,
        )
        obs_space = spaces.Dict({"obs": form.space})
        silu = types.SimpleNamespace(utils=types.SimpleNamespace(get_class=lambda _: nn.SiLU))
        with (
            mock.patch.object(agent, "hydra", silu),
            mock.patch.object(agent, "setup_module", lambda _, module: Setup(module)),
            mock.patch.object(agent, "compiled_player", lambda call, *_, **__: call),
        ):
            found = agent.build_agent(fabric, [form.actions], False, self.config, obs_space)
        world, actor, critic, self.target = found[:4]
        self.critic, self.step = critic, self.algo.update
        self.learnt = [*world.parameters(), *actor.parameters(), *critic.parameters()]
        optimizer = optim.LaProp(self.learnt, lr=config.lr, warmup=0)
        moments = self.algo.Moments(1 - config.return_rate, 1.0, config.return_low, config.return_high)
        if self.compiled == "step":
            # Its own option compiles whole losses with their loops; this all but the loops.
            world.rssm.dynamic = self.compile(world.rssm.dynamic)
            world.rssm.imagination = self.compile(world.rssm.imagination)
            for module in (world.encoder, world.observation_model, world.reward_model, world.continue_model):
                module.forward = self.compile(module.forward)
            self.losses = self.compile(self.algo.actor_critic_loss)

        def padded(x: Tensor) -> Tensor:
            """A row of context before the window."""
            return torch.cat([torch.zeros_like(x[:1]), x])

        rows = {"rewards": batch.reward, "is_first": batch.is_first, "terminated": batch.terminated}
        rows["truncated"] = batch.is_last & ~batch.terminated
        self.data = {name: padded(x.float().unsqueeze(-1)) for name, x in rows.items()}
        self.data["obs"] = padded(batch.obs["obs"])
        # There an action stands in the row where it is chosen.
        self.data["actions"] = torch.cat([batch.prev_action, torch.zeros_like(batch.prev_action[:1])])
        self.data["deter"] = batch.latents["deter"].unsqueeze(0)
        self.data["stoch"] = batch.latents["stoch"].unsqueeze(0)
        models = (world, actor, critic, self.target, optimizer, moments)
        self.args = (fabric, self.config, *models, self.data, None, [form.actions])

    def settings(self, learner: dreamer_v3.Learner) -> dict[str, Any]:
        """Its configuration ``dreamer_v3_5_1M`` or another, with our names' values; the actor's unimix is ours."""
        config, form = learner.config, self.form
        c, sizes = learner.agent.networks.world_model.rssm.config, dreamer_v3.WIDTHS[form.size]
        units = {"dense_units": sizes["units"]}
        convolutions = {
            "cnn_channels_multiplier": sizes["depth"],
            "cnn_stages": [2, 3, 4, 4],
            "cnn_kernel_size": 5,
        }
        keys = {name: {"encoder": [], "decoder": []} for name in ("cnn_keys", "mlp_keys")}
        keys["cnn_keys" if form.obs == "pixels" else "mlp_keys"] = {"encoder": ["obs"], "decoder": ["obs"]}
        world = {
            "discrete_size": c.classes,
            "stochastic_size": c.stoch,
            "unimix": c.unimix,
            "kl_free_nats": config.free_nats,
            "continue_discount": True,
            "reward_grad": True,
            "encoder": {**convolutions, **units, "mlp_layers": 3, "symlog_inputs": True},
            "recurrent_model": {
                "recurrent_state_size": c.deter,
                "hidden_size": c.hidden,
                "blocks": c.blocks,
                "dynamics_layers": 1,
            },
            "transition_model": {"hidden_size": c.hidden, "layers": 2},
            "representation_model": {"hidden_size": c.hidden, "layers": 1},
            "observation_model": {**convolutions, **units, "mlp_layers": 3, "block_space": 8},
            "reward_model": {**units, "mlp_layers": 1, "bins": config.bins},
            "discount_model": {**units, "mlp_layers": 1},
        }
        actor = {"ent_coef": config.entropy_coef, "min_std": 0.1, "max_std": 1.0, "mlp_layers": 3, **units}
        critic = {"mlp_layers": 3, **units, "bins": config.bins, "outscale": 0.0, "tau": config.slow_rate}
        scales = {"observation": 1.0, "reward": 1.0, "continue": 1.0, "policy": 1.0, "value": 1.0}
        scales |= {"dynamic": config.dynamics_scale, "representation": config.representation_scale}
        scales |= {"replay_value": config.replay_value_scale}
        algo = {
            **keys,
            "gamma": 1 - 1 / config.horizon,
            "lmbda": config.lam,
            "horizon": config.imagine_horizon,
            "replay_context": 1,
            "compile": {"enabled": self.compiled == "whole", "mode": None, "player": False},
            "dense_act": "torch.nn.SiLU",
            "norm_eps": c.eps,
            "loss_scales": scales,
            "world_model": world,
            "actor": {**actor, "unimix": config.actor_unimix, "outscale": 0.01},
            "critic": {**critic, "slow_regularizer": 1.0, "replay_loss": True, "replay_grad": True},
        }
        return {"algo": algo, "env": {"num_envs": 1}, "fabric": {"precision": "32-true"}}

    def update(self) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def update(fabric: Any, loss: Tensor, optimizer: Any) -> None:
            seen["total"] = loss.detach()
            self.step(fabric, loss, optimizer)

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(self.algo, "update", update))
            if self.compiled == "step":
                stack.enter_context(mock.patch.object(self.algo, "actor_critic_loss", self.losses))
            self.algo.train(*self.args)
        self.algo.update_target_critic(self.critic, self.target, self.config.algo.critic.tau)
        return seen

    def parameters(self) -> list[Tensor]:
        return self.learnt
