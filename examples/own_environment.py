"""Train DreamerV3 in an environment of one's own, from Python, in about a minute on one core of a CPU.

::

    python examples/own_environment.py --steps 4000

Before any training, ``pywm check-env own_environment:Thermostat`` (in this folder) says what the agent sees of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from pywm.algos import dreamer_v3
from pywm.envs import make
from pywm.training.evaluate import evaluate


class Thermostat(gymnasium.Env):
    """Keep a room within half a degree of what is wished for, by cooling, waiting or heating; 1 for each step there is.

    The observation is how far off the room is, in degrees, and what was done last. A random agent earns 2.8 of 30.
    """

    def __init__(self) -> None:
        self.observation_space = spaces.Dict(
            error=spaces.Box(-20, 20, (1,), np.float32), last=spaces.Discrete(3)
        )
        self.action_space = spaces.Discrete(3)

    def _obs(self) -> dict[str, Any]:
        return {"error": np.array([self._error], np.float32), "last": self._last}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin at up to five degrees off."""
        super().reset(seed=seed)
        self._error, self._last, self._t = float(self.np_random.uniform(-5, 5)), 1, 0
        return self._obs(), {}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Heat or cool by 0.8 degrees, to which the weather adds."""
        self._last, self._t = int(action), self._t + 1
        change = 0.8 * (self._last - 1) + float(self.np_random.normal(0, 0.1))
        self._error = float(np.clip(self._error + change, -20, 20))
        # The time is up, which is no terminal state: truncated, not terminated.
        return self._obs(), float(abs(self._error) < 0.5), False, self._t == 30, {}


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print the return before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="environment steps")
    parser.add_argument(
        "--learning-starts", type=int, default=512, help="windows in the replay before it learns"
    )
    parser.add_argument("--episodes", type=int, default=20, help="of each evaluation")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    small = dreamer_v3.Config(**dreamer_v3.PRESETS["tiny"].config)  # for the cores of a CPU
    config = dataclasses.replace(
        small, steps=arguments.steps, seed=arguments.seed, learning_starts=arguments.learning_starts
    )
    envs = make(Thermostat, 8, training=False)
    untrained = dreamer_v3.Agent(config, envs.observation_space, envs.action_space)
    before = evaluate(untrained, envs, episodes=arguments.episodes, seed=1)
    agent = dreamer_v3.train(config, Thermostat)
    after = evaluate(agent, envs, episodes=arguments.episodes, seed=1)
    envs.close()
    sys.stdout.write(f"return {before.return_mean:.1f} before, {after.return_mean:.1f} after training\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
