"""Train Stable-Baselines3's PPO inside the world model that a DreamerV3 run has learned, then let it play for real.

::

    pip install "pywm[sb3,classic]"
    pywm train dreamer_v3 CartPole-v1 --run-dir runs/dreamer
    python examples/ppo_in_a_dream.py runs/dreamer --steps 100000

PPO never sees the environment while it learns: its episodes begin where real ones do, and the model imagines the rest. What
it is paid in the dream and what it earns outside are printed side by side; their distance is what the model is wrong about.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor

import pywm
from pywm.integrations.sb3 import as_vec_env
from pywm.models import WorldModelVectorEnv


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate in the dream and outside, and print both returns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="directory of a DreamerV3 run")
    parser.add_argument("--steps", type=int, default=100_000, help="imagined steps to train for")
    parser.add_argument("--num-envs", type=int, default=16, help="imagined episodes at a time")
    parser.add_argument("--length", type=int, default=200, help="imagined steps of an episode at most")
    parser.add_argument("--episodes", type=int, default=20, help="episodes of each evaluation")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    dream = WorldModelVectorEnv.from_run(
        arguments.run, arguments.num_envs, max_episode_steps=arguments.length
    )
    imagined = VecMonitor(as_vec_env(dream))
    agent = PPO("MlpPolicy", imagined, n_steps=128, batch_size=256, device="cpu", seed=arguments.seed)
    agent.learn(arguments.steps)

    _, envs = pywm.load(arguments.run)
    real = VecMonitor(as_vec_env(envs.env))
    real.seed(arguments.seed)
    for name, env in (("in the dream", imagined), ("for real", real)):
        mean, std = evaluate_policy(agent, env, n_eval_episodes=arguments.episodes)
        sys.stdout.write(f"return {name}: {mean:.1f} ± {std:.1f} over {arguments.episodes} episodes\n")
        env.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
