"""A world-model agent of one's own in one page: play, learn a model, imagine in it, learn to act.

::

    python examples/own_loop.py --iterations 150

The world is 64 walkers on a line who are paid near its middle. What takes the time are three calls: ``pywm.rssm_observe``
over the window that was played, ``pywm.imagine`` from every row of it, and ``pywm.lambda_return`` over what was imagined.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import pywm
from pywm.models import RSSM, RSSMConfig, RSSMState
from pywm.nn import NormMLP
from pywm.ops import Policy

T, N, H = 17, 64, 10  # rows of an episode, walkers, steps of imagination
DISCOUNT, LAM = 0.95, 0.95
MOVES = torch.tensor([-0.2, 0.0, 0.2])


class Agent(nn.Module):
    """A recurrent state-space model with its encoder and heads, an actor and a critic."""

    def __init__(self) -> None:
        super().__init__()
        self.rssm = RSSM(RSSMConfig(deter=64, hidden=64, stoch=8, classes=8, embed=64, action=len(MOVES)))
        feat = self.rssm.config.feat
        self.encoder = NormMLP((1, 64))
        self.decoder, self.reward = NormMLP((feat, 64), 1), NormMLP((feat, 64), 1, out_scale=0.0)
        self.actor = NormMLP((feat, 64), len(MOVES), out_scale=0.01)
        self.critic = NormMLP((feat, 64), 1, out_scale=0.0)


@torch.no_grad()
def play(agent: Agent) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Play an episode; return obs ``[T, N, 1]``, the actions that led there ``[T, N, 3]``, rewards, ``is_first [T, N]``."""
    position, state = torch.rand(N, 1) * 4 - 2, agent.rssm.initial(N)
    action, is_first = torch.zeros(N, len(MOVES)), torch.zeros(T, N, dtype=torch.bool)
    is_first[0] = True
    obs, prev_action, reward = [], [], []
    for t in range(T):
        obs.append(position)
        prev_action.append(action)
        reward.append((position.squeeze(-1).abs() < 0.3).float() * (t > 0))
        out = agent.rssm.step(state, action, agent.encoder(position), is_first[t])
        state = RSSMState(out.deter, out.stoch)
        logits = agent.actor(torch.cat([out.deter, out.stoch.flatten(1)], -1))
        choice = torch.distributions.Categorical(logits=logits).sample()
        action = functional.one_hot(choice, len(MOVES)).float()
        position = (position + MOVES[choice, None]).clamp(-2, 2)
    return torch.stack(obs), torch.stack(prev_action), torch.stack(reward), is_first


def model_loss(agent: Agent, obs: Tensor, prev_action: Tensor, reward: Tensor, is_first: Tensor) -> tuple:
    """Return the model's loss on a window, and the states of its rows, flat."""
    rssm = agent.rssm
    observed = pywm.rssm_observe(rssm.params(), agent.encoder(obs), prev_action, is_first, rssm.initial(N))
    feat = torch.cat([observed.deter, observed.stoch.flatten(2)], -1)
    kl = rssm.kl(observed.posterior, observed.prior, free_nats=0.1)
    loss = (agent.decoder(feat) - obs).square().sum(-1) + (agent.reward(feat).squeeze(-1) - reward).square()
    states = RSSMState(observed.deter.detach().flatten(0, 1), observed.index.flatten(0, 1))
    return (loss + kl.dynamics + 0.1 * kl.representation).mean(), states


def policy_loss(agent: Agent, states: RSSMState) -> Tensor:
    """Return the losses of actor and critic on what the model imagines from ``states``."""
    with torch.no_grad():
        policy = Policy(agent.actor.layers())
        imagined = pywm.imagine(agent.rssm.params(), policy, states, H)
        feat = imagined.feat  # [H + 1, T·N, F]
        reward, value = agent.reward(feat).squeeze(-1), agent.critic(feat).squeeze(-1)
        discount = torch.full_like(reward[1:], DISCOUNT)
        returns = pywm.lambda_return(reward[1:], discount, value[1:], LAM)
        advantage = returns - value[:-1]
    log_p = torch.log_softmax(agent.actor(feat[:-1]), -1)
    log_prob, entropy = (log_p * imagined.action).sum(-1), -(log_p.exp() * log_p).sum(-1)
    critic = (agent.critic(feat[:-1]).squeeze(-1) - returns).square()
    return (critic - log_prob * advantage - 3e-3 * entropy).mean()


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print what the walkers earn a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=150, help="episodes of all walkers, an update each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    torch.manual_seed(arguments.seed)
    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    for iteration in range(arguments.iterations):
        window = play(agent)
        loss, states = model_loss(agent, *window)
        loss = loss + policy_loss(agent, states)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 10 == 0 or iteration == arguments.iterations - 1:
            paid = float(window[2][1:].mean())
            sys.stdout.write(f"{iteration:4}  reward a step {paid:.3f}  loss {loss.item():.3f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
