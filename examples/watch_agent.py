"""Load the agent of a run, let it play an episode, say what it does and film it.

::

    pywm train dreamer_v3 CartPole-v1 --run-dir runs/cartpole
    python examples/watch_agent.py runs/cartpole --gif episode.gif
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

import pywm
from pywm.training.report import write_gif


def main(argv: Sequence[str] | None = None) -> int:
    """Play one episode; print each action and reward, and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="directory of a run of any algorithm")
    parser.add_argument("--gif", default="episode.gif", help="where the film goes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    agent, env = pywm.load(arguments.run, render_mode="rgb_array")
    obs, state, is_first = env.reset(arguments.seed), None, np.ones(1, bool)
    frames, total, steps = [env.render()], 0.0, 0
    ended = False
    while not ended:
        # Everything is a batch, here of one environment; the state is the agent's memory.
        action, state = agent.act(obs, state, is_first=is_first, greedy=True)
        out = env.step(action)
        obs, is_first = out.obs, np.zeros(1, bool)
        total, steps, ended = (
            total + float(out.reward[0]),
            steps + 1,
            bool(out.terminated[0] | out.truncated[0]),
        )
        sys.stdout.write(f"{steps:5}  action {action[0]}  reward {out.reward[0]:g}\n")
        if not ended:  # an environment that resets itself shows the next episode's beginning
            frames.append(env.render())
    env.close()
    why = "terminal state" if out.terminated[0] else "time limit"
    sys.stdout.write(f"return {total:g} after {steps} steps ({why})\n")
    pictures = [frame for frame in frames if frame is not None]
    if pictures:
        sys.stdout.write(f"{write_gif(pictures, arguments.gif)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
