"""A learned world model as a gymnasium environment, in which anybody's agent can train.

An episode begins with an observation of the real environment, which the model filters; from there on it only imagines::

    real:      first observation
                    │ filtered: a sample of the posterior
    imagined:    state 0 ──action──► state 1 ──action──► state 2 ...     samples of the prior
                    │                   │                   │
                 decoded             decoded, reward, P(it goes on)

Rewards are expected values. What the model has not learned (states that training never visited) it makes up: an agent may
find returns in there that the real environment does not pay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from pywm.envs.spaces import ObsLayout, last_frame, split_keys
from pywm.errors import CheckpointError, EnvError, UserError
from pywm.models.actions import ActionSpace
from pywm.models.world_model import WorldModel
from pywm.ops.rssm_params import RSSMState

__all__ = ["WorldModelEnv", "WorldModelVectorEnv"]

MAX_EPISODE_STEPS = 200
# First observations that a run's environment is asked for.
NUM_STARTS = 64
FRAMES_PER_SECOND = 30


class WorldModelEnv(gymnasium.Env[Any, Any]):
    """A world model as a single environment.

    ::

        env = WorldModelEnv.from_run("runs/CartPole-v1/dreamer_v3/0-20261122-120000")
        obs, info = env.reset(seed=0)
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())

    The same seeds and actions give the same episode. Everything random comes from ``np_random``.

    Args:
        model: the world model. It is used as it is: what trains it meanwhile changes this environment.
        observation_space: of the real environment; observations have its form, and lie in it. Texts in it are left out.
        action_space: of the real environment.
        starts: where episodes begin: M first observations as one batch (``[M, ...]``, or a dict of such arrays), of which
            one is drawn, or a function that takes a seed and returns one: ``lambda seed: env.reset(seed=seed)[0]``.
        obs: ``"decoded"``, the predicted observations, or ``"latent"``, the model's state ``[D + S·K]``: the deterministic
            part, then the one-hot samples.
        termination: when a state is the last one: ``"sample"`` draws it with the predicted probability, ``"threshold"``
            says so where it is above one half, and ``"never"`` leaves it to ``max_episode_steps``.
        max_episode_steps: imagined steps after which an episode is truncated, 200 by default. Errors grow with every step:
            what an agent needs to see the consequences of its actions is enough.
        render_mode: ``"rgb_array"`` for pictures, of models that predict some.

    Attributes:
        model: the world model.

    Raises:
        UserError: an argument is not one of those, the spaces do not fit the model, or the starts do not fit the spaces.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FRAMES_PER_SECOND}  # noqa: RUF012

    def __init__(
        self,
        model: WorldModel,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        starts: Any | Callable[[int], Any],
        *,
        obs: Literal["decoded", "latent"] = "decoded",
        termination: Literal["sample", "threshold", "never"] = "sample",
        max_episode_steps: int = MAX_EPISODE_STEPS,
        render_mode: str | None = None,
    ) -> None:
        form = _Form(type(self).__name__, obs, termination, max_episode_steps, render_mode)
        self.model = model
        self._imagined = _Imagined(model, observation_space, action_space, starts, 1, form)
        self.observation_space = self._imagined.space
        self.action_space = action_space
        self.render_mode = render_mode
        self.metadata = form.metadata(model, self.metadata)
        self._running = False

    @classmethod
    def from_run(
        cls,
        run: Path | str,
        *,
        env: Any = None,
        starts: Any | Callable[[int], Any] = None,
        num_starts: int = NUM_STARTS,
        which: str = "latest",
        device: str = "cpu",
        **options: Any,
    ) -> WorldModelEnv:
        """Take the world model, the spaces and the starts of a trained run.

        The run's environment is made once, for its spaces and its first observations, and closed again.

        Args:
            run: the run's directory; see :func:`pywm.load`, also for ``env``, ``which`` and ``device``.
            env: what to make the environment from; needed where the run was trained in a callable.
            starts: where episodes begin; by default at the first observations of ``num_starts`` resets with the seeds 0, 1,
                2, ...
            num_starts: 64 by default.
            which: ``"latest"``, ``"best"`` or the name of a step directory.
            device: where the model goes.
            options: ``obs``, ``termination``, ``max_episode_steps`` and ``render_mode``, as above.

        Raises:
            CheckpointError: this is no run, or it has no valid checkpoint.
            UserError: the run has no world model, or its environment cannot be made.
        """
        found = _read_run(cls.__name__, run, env, starts, num_starts, which, device)
        return cls(*found, **options)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: of everything random from here on.
            options: ``"start"``: an observation to begin with, instead of one of the starts.

        Raises:
            UserError: the start is not in the observation space.
        """
        super().reset(seed=seed)
        given = (options or {}).get("start")
        self._imagined.begin([0], [self.np_random], None if given is None else _batch(given))
        self._running = True
        return self._row(self._imagined.observe()), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Imagine a step.

        Args:
            action: in the action space.

        Raises:
            TypeError, ValueError: it is not; nothing was imagined.
            UserError: no episode is running.
        """
        if not self._running:
            raise UserError("WorldModelEnv.step: no episode is running, but reset() was expected before")
        array = np.asarray(action)
        if array.shape != (self.action_space.shape or ()):
            raise ValueError(
                f"WorldModelEnv.step: action has shape {array.shape}, but {self.action_space.shape or ()} was expected"
            )
        reward, terminated, truncated = self._imagined.step(array[None], [self.np_random])
        self._running = not (terminated[0] or truncated[0])
        obs = self._row(self._imagined.observe())
        return obs, float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def _row(self, obs: Any) -> Any:
        return _row(self.observation_space, obs, 0)

    def render(self) -> np.ndarray | None:
        """Return the predicted picture, uint8 ``[height, width, 3]``; several stand side by side."""
        return None if self.render_mode is None else self._imagined.frames()[0]


class WorldModelVectorEnv(VectorEnv[Any, Any, Any]):
    """A world model as a vector environment: an imagined step of all N in one call.

    Environment n is what :class:`WorldModelEnv` is with the seed of environment 0 plus n, up to the rounding of
    larger products. An episode that ends begins anew in the same step (``AutoresetMode.SAME_STEP``); its last
    observation is in ``info["final_obs"]``.

    Args:
        model: see :class:`WorldModelEnv` for this and all other arguments.
        observation_space: of a single real environment.
        action_space: of a single real environment.
        starts: where episodes begin.
        num_envs: N.
        obs: ``"decoded"`` or ``"latent"``.
        termination: ``"sample"``, ``"threshold"`` or ``"never"``.
        max_episode_steps: imagined steps after which an episode is truncated, 200 by default.
        render_mode: ``"rgb_array"`` for pictures.

    Attributes:
        model: the world model.

    Raises:
        UserError: as of :class:`WorldModelEnv`, or ``num_envs`` is less than 1.
    """

    metadata = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": FRAMES_PER_SECOND,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }
    returns_fresh_arrays = True

    def __init__(
        self,
        model: WorldModel,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        starts: Any | Callable[[int], Any],
        num_envs: int,
        *,
        obs: Literal["decoded", "latent"] = "decoded",
        termination: Literal["sample", "threshold", "never"] = "sample",
        max_episode_steps: int = MAX_EPISODE_STEPS,
        render_mode: str | None = None,
    ) -> None:
        if num_envs < 1:
            raise UserError(f"{type(self).__name__}: num_envs is {num_envs}, but at least 1 was expected")
        form = _Form(type(self).__name__, obs, termination, max_episode_steps, render_mode)
        self.model, self.num_envs = model, num_envs
        self._imagined = _Imagined(model, observation_space, action_space, starts, num_envs, form)
        self.single_observation_space = self._imagined.space
        self.single_action_space = action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.render_mode = render_mode
        self.metadata = form.metadata(model, self.metadata)
        self._rngs = [seeding.np_random(None)[0] for _ in range(num_envs)]
        self._running = False

    @classmethod
    def from_run(
        cls,
        run: Path | str,
        num_envs: int,
        *,
        env: Any = None,
        starts: Any | Callable[[int], Any] = None,
        num_starts: int = NUM_STARTS,
        which: str = "latest",
        device: str = "cpu",
        **options: Any,
    ) -> WorldModelVectorEnv:
        """Take the world model, the spaces and the starts of a trained run; see :meth:`WorldModelEnv.from_run`."""
        found = _read_run(cls.__name__, run, env, starts, num_starts, which, device)
        return cls(*found, num_envs, **options)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode everywhere, or in some environments.

        Args:
            seed: of the first environment, those of the others count from there; or one for each.
            options: ``"reset_mask"``: ``[N]`` bool, where to begin; the other episodes go on. ``"start"``: N observations
                to begin with, instead of starts.

        Raises:
            UserError: an option is not what it should be.
        """
        options, N = options or {}, self.num_envs
        seeds = [seed + n for n in range(N)] if isinstance(seed, int | np.integer) else seed
        if seeds is not None and len(seeds) != N:
            raise UserError(
                f"WorldModelVectorEnv.reset: seed has {len(seeds)} entries, but {N} were expected"
            )
        mask = np.asarray(options.get("reset_mask", np.ones(N, bool)))
        if mask.shape != (N,) or mask.dtype != bool:
            raise UserError(
                f"WorldModelVectorEnv.reset: reset_mask is {mask.dtype} {mask.shape}, but bool ({N},) was expected"
            )
        if not self._running and not mask.all():
            raise UserError(
                "WorldModelVectorEnv.reset: no episode is running, but a reset of all environments was expected first"
            )
        rows = np.flatnonzero(mask).tolist()
        if seeds is not None:
            for n in rows:
                if seeds[n] is not None:
                    self._rngs[n] = seeding.np_random(int(seeds[n]))[0]
        if rows:
            self._imagined.begin(rows, [self._rngs[n] for n in rows], options.get("start"))
        self._running = True
        return self._imagined.observe(), {}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Imagine a step of every environment.

        Args:
            actions: ``[N, ...]``, in the action space.

        Raises:
            TypeError, ValueError: they are not; nothing was imagined.
            UserError: ``reset`` was never called.
        """
        if not self._running:
            raise UserError(
                "WorldModelVectorEnv.step: no episode is running, but reset() was expected before"
            )
        reward, terminated, truncated = self._imagined.step(np.asarray(actions), self._rngs)
        obs = self._imagined.observe()
        ended = terminated | truncated
        if not np.count_nonzero(ended):
            return obs, reward, terminated, truncated, {}
        rows = np.flatnonzero(ended).tolist()
        final = np.full(self.num_envs, None, dtype=object)
        for n in rows:
            final[n] = _row(self.single_observation_space, obs, n)
        self._imagined.begin(rows, [self._rngs[n] for n in rows])
        _write_rows(obs, self._imagined.observe(rows), rows)
        return obs, reward, terminated, truncated, {"final_obs": final, "_final_obs": ended}

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return the predicted picture of every environment, uint8 ``[height, width, 3]``; several stand side by side."""
        return None if self.render_mode is None else tuple(self._imagined.frames())


class _Form(NamedTuple):
    """What observations look like and when episodes end; ``name`` is that of the environment, for messages."""

    name: str
    obs: str
    termination: str
    max_episode_steps: int
    render_mode: str | None

    def check(self, model: WorldModel) -> None:
        for key, known in (("obs", ("decoded", "latent")), ("termination", ("sample", "threshold", "never"))):
            if getattr(self, key) not in known:
                raise UserError(
                    f"{self.name}: {key} is {getattr(self, key)!r}, but one of {', '.join(known)} was expected"
                )
        if self.max_episode_steps < 1:
            raise UserError(
                f"{self.name}: max_episode_steps is {self.max_episode_steps}, but at least 1 was expected"
            )
        if self.render_mode is not None and (self.render_mode != "rgb_array" or not model.images):
            expected = (
                "'rgb_array' or None was" if model.images else "None was, for the model predicts no pictures,"
            )
            raise UserError(f"{self.name}: render_mode is {self.render_mode!r}, but {expected} expected")

    def metadata(self, model: WorldModel, known: dict[str, Any]) -> dict[str, Any]:
        return known if model.images else {**known, "render_modes": []}


class _Imagined:
    """N imagined episodes: the model's states, how they are begun, gone on with, and shown."""

    def __init__(
        self,
        model: WorldModel,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        starts: Any | Callable[[int], Any],
        N: int,
        form: _Form,
    ) -> None:
        if not isinstance(model, WorldModel):
            raise UserError(f"{form.name}: model is a {type(model).__name__}, but a WorldModel was expected")
        form.check(model)
        self._model, self._form = model, form
        self._layout = ObsLayout(observation_space, form.name)
        self._check_keys()
        self._actions = ActionSpace(action_space)
        if self._actions.width != model.rssm.config.action:
            raise UserError(
                f"{form.name}: action_space is {action_space}, of width {self._actions.width}, but one of width "
                f"{model.rssm.config.action}, the model's, was expected"
            )
        self.space = self._layout.original if form.obs == "decoded" else _latent_space(model)
        self._starts = starts if callable(starts) else self._convert("starts", starts, "M")
        self._state = model.rssm.initial(N)
        self._elapsed = np.zeros(N, dtype=np.int64)

    def _check_keys(self) -> None:
        model = self._model
        images = split_keys(self._layout.space).image
        found = {key: (part.shape, key in images) for key, part in _leaves(self._layout.space)}
        expected = {key: (shape, True) for key, shape in model.images.items()}
        expected |= {key: (shape, False) for key, shape in model.vectors.items()}
        if found != expected:
            raise UserError(
                f"{self._form.name}: observation_space gives {_tell(found)}, but {_tell(expected)}, what the model was "
                "made for, was expected"
            )

    def _convert(self, name: str, raw: Any, count: str) -> dict[str, np.ndarray]:
        """Turn a batch of observations, as the environment gives them, into what the model takes."""
        expected = ", ".join(
            f"{key}: {part.dtype} [{', '.join([count, *map(str, part.shape or ())])}]"
            for key, part in _leaves(self._layout.original)
        )
        try:
            obs = self._layout.convert(_arrays(raw))
            named = obs if isinstance(obs, dict) else {"obs": obs}
            rows = {len(x) for x in named.values()}
            fits = len(rows) == 1 and 0 not in rows and (not count.isdigit() or rows == {int(count)})
            for key, part in _leaves(self._layout.space):
                is_image = key in self._model.images
                fits = fits and named[key].shape[1:] == part.shape
                fits = fits and (
                    named[key].dtype == np.uint8 if is_image else named[key].dtype.kind in "biuf"
                )
        except (AttributeError, LookupError, TypeError, ValueError):
            fits = False
        if not fits:
            raise UserError(f"{self._form.name}: {name} is {_shapes(raw)}, but {expected} was expected")
        return {key: x if key in self._model.images else x.astype(np.float32) for key, x in named.items()}

    @torch.no_grad()
    def begin(self, rows: list[int], rngs: Sequence[np.random.Generator], given: Any = None) -> None:
        """Begin episodes in some rows, with a generator for each; ``given`` are N observations to begin with."""
        if given is not None:
            named = self._convert("options['start']", given, str(len(self._elapsed)))
            named = {key: x[rows] for key, x in named.items()}
        elif isinstance(self._starts, dict):
            size = len(next(iter(self._starts.values())))
            chosen = [int(rng.integers(size)) for rng in rngs]
            named = {key: x[chosen] for key, x in self._starts.items()}
        else:
            drawn = [
                self._convert("what starts returned", _batch(self._starts(int(rng.integers(2**31)))), "1")
                for rng in rngs
            ]
            named = {key: np.concatenate([row[key] for row in drawn]) for key in drawn[0]}
        model, N = self._model, len(rows)
        initial = model.rssm.initial(N)
        tensors = {key: torch.from_numpy(x).to(initial.deter.device) for key, x in named.items()}
        embed = model.encode(tensors).to(initial.deter.dtype)
        nothing = initial.deter.new_zeros(N, model.rssm.config.action)
        out = model.rssm.step(initial, nothing, embed, noise=self._noise(rngs))
        deter, stoch = (x.clone() for x in self._state)
        deter[rows], stoch[rows] = out.deter, out.stoch
        self._state = RSSMState(deter, stoch)
        self._elapsed[rows] = 0

    def _noise(self, rngs: Sequence[np.random.Generator]) -> Tensor:
        """Draw what a step takes. A row's numbers are its own generator's, so that no row depends on another one."""
        c, like = self._model.rssm.config, self._state.deter
        noise = np.empty((len(rngs), c.stoch), np.float32)
        for rng, row in zip(rngs, noise, strict=True):
            if c.is_gaussian:
                rng.standard_normal(dtype=np.float32, out=row)
            else:
                rng.random(dtype=np.float32, out=row)
        return torch.from_numpy(noise).to(like.device, like.dtype)

    @torch.no_grad()
    def step(
        self, action: np.ndarray, rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Go on under actions ``[N, ...]``; return reward, terminated and truncated, ``[N]`` each."""
        model, N, function = self._model, len(self._elapsed), f"{self._form.name}.step"
        taken = self._actions.from_env(action, function)
        if len(taken) != N:
            raise ValueError(f"{function}: there are {len(taken)} actions, but {N} were expected")
        like = self._state.deter
        out = model.rssm.step(self._state, taken.to(like.device, like.dtype), noise=self._noise(rngs))
        self._state = RSSMState(out.deter, out.stoch)
        reward, discount = (x.double().cpu().numpy() for x in model.outcome(self._feat()))
        # The head has learned γ times the probability to go on, and may overstep 1. The draw is made whatever the rule, so
        # that the rule does not change what is imagined.
        goes_on = discount / model.discount
        chance = np.array([rng.random() for rng in rngs])
        least: dict[str, Any] = {"sample": chance, "threshold": 0.5, "never": 0.0}
        self._elapsed += 1
        return reward, goes_on < least[self._form.termination], self._elapsed >= self._form.max_episode_steps

    def _feat(self, rows: list[int] | None = None) -> Tensor:
        deter, stoch = self._state if rows is None else (x[rows] for x in self._state)
        return torch.cat([deter, stoch.flatten(1)], -1)

    @torch.no_grad()
    def observe(self, rows: list[int] | None = None) -> Any:
        """Return the observations of all or some rows: a batch of elements of ``space``, in new arrays."""
        feat = self._feat(rows)
        if self._form.obs == "latent":
            assert isinstance(self.space, spaces.Box)
            latent: np.ndarray = feat.float().cpu().numpy().clip(self.space.low, self.space.high)
            return latent
        named = {key: x.float().cpu().numpy() for key, x in self._model.predict_obs(feat).items()}
        for key in self._model.images:
            named[key] = named[key] * 255
        return self._layout.invert(named)

    @torch.no_grad()
    def frames(self) -> list[np.ndarray]:
        """Draw the predicted pictures of each row, uint8 ``[height, width, 3]``, one beside the other."""
        found = self._model.decode(self._feat())
        pictures = [last_frame(found[key].float().cpu().numpy()) for key in self._model.images]
        beside = np.concatenate(pictures, -1).transpose(0, 2, 3, 1)
        return list((beside.clip(0, 1) * 255 + 0.5).astype(np.uint8))


def _latent_space(model: WorldModel) -> spaces.Box:
    # Gates mix tanh and the state before it, and samples are one-hot; Gaussian ones have no bounds.
    c = model.rssm.config
    bound = np.ones(c.feat, np.float32)
    bound[c.deter :] = np.inf if c.is_gaussian else 1.0
    return spaces.Box(-bound, bound, dtype=np.float32)


def _read_run(
    function: str,
    run: Path | str,
    env: Any,
    starts: Any | Callable[[int], Any],
    num_starts: int,
    which: str,
    device: str,
) -> tuple[WorldModel, spaces.Space[Any], spaces.Space[Any], Any]:
    """Return a run's model, its environment's spaces, and starts."""
    import pywm  # the package's front door: agents are above models

    function = f"{function}.from_run"
    if num_starts < 1:
        raise UserError(f"{function}: num_starts is {num_starts}, but at least 1 was expected")
    try:
        agent, envs = pywm.load(run, env=env, which=which, device=device)
    except CheckpointError:
        raise
    except (EnvError, UserError) as error:
        raise UserError(
            f"{function}: env is {env!r}, but what makes an environment like that of {run} was expected: {error}"
        ) from error
    try:
        model = getattr(getattr(agent, "networks", None), "world_model", None)
        if not isinstance(model, WorldModel):
            raise UserError(f"{function}: {run} is of an algorithm without a world model")
        real = envs.env
        if starts is None:
            # A copy of each: an environment may write into what it returned.
            first = [_row_as_batch(real.reset(seed=seed)[0]) for seed in range(num_starts)]
            starts = _concatenate(first)
    finally:
        envs.close()
    return model, real.single_observation_space, real.single_action_space, starts


def _tell(found: Mapping[str, tuple[Any, bool]]) -> str:
    parts = [
        f"{key}: {'picture' if is_image else 'vector'} {shape}" for key, (shape, is_image) in found.items()
    ]
    return "{" + ", ".join(sorted(parts)) + "}"


def _leaves(space: spaces.Space[Any], path: str = "") -> list[tuple[str, spaces.Space[Any]]]:
    if not isinstance(space, spaces.Dict):
        return [(path or "obs", space)]
    return [
        leaf for key, part in space.spaces.items() for leaf in _leaves(part, f"{path}/{key}" if path else key)
    ]


def _shapes(raw: Any) -> str:
    if isinstance(raw, Mapping):
        return "{" + ", ".join(f"{key}: {_shapes(part)}" for key, part in raw.items()) + "}"
    if not isinstance(raw, np.ndarray | np.generic | list | tuple):
        return repr(raw)
    try:
        array = np.asarray(raw)
    except ValueError:
        return f"a {type(raw).__name__} of uneven parts"
    return f"{array.dtype} {list(array.shape)}"


def _arrays(raw: Any) -> Any:
    if isinstance(raw, Mapping):
        return {key: _arrays(part) for key, part in raw.items()}
    return np.asarray(raw)


def _batch(obs: Any) -> Any:
    """Make a batch of one."""
    if isinstance(obs, Mapping):
        return {key: _batch(part) for key, part in obs.items()}
    return np.asarray(obs)[None]


def _row_as_batch(obs: Any) -> Any:
    if isinstance(obs, Mapping):
        return {key: _row_as_batch(part) for key, part in obs.items()}
    return np.array(obs[:1])


def _concatenate(batches: list[Any]) -> Any:
    if isinstance(batches[0], Mapping):
        return {key: _concatenate([batch[key] for batch in batches]) for key in batches[0]}
    return np.concatenate(batches)


def _row(space: spaces.Space[Any], obs: Any, n: int) -> Any:
    """Return observation ``n`` of a batch, as a copy."""
    if isinstance(space, spaces.Dict):
        return {key: _row(part, obs[key], n) for key, part in space.spaces.items()}
    # An index of Discrete is a number, a Box without axes still an array.
    return np.array(obs[n]) if isinstance(space, spaces.Box) else obs[n].copy()


def _write_rows(obs: Any, new: Any, rows: list[int]) -> None:
    if isinstance(obs, dict):
        for key, part in obs.items():
            _write_rows(part, new[key], rows)
    else:
        obs[rows] = new
