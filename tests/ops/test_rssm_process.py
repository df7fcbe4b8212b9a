"""Recurrent state-space models in threads, in forked children, and over many calls."""

import subprocess
import sys

import pytest

from pywm.ops import _native

COMMON = """
import torch
from pywm.models import RSSM, RSSMConfig, RSSMState
from pywm.ops import Layer, Policy
torch.set_num_threads(2)
torch.manual_seed(0)
c = RSSMConfig(deter=32, hidden=16, stoch=4, classes=4, embed=8, action=3, blocks=4)
model = RSSM(c, generator=torch.Generator().manual_seed(0))
policy = Policy((Layer(torch.randn(16, c.feat) / 8, scale=torch.ones(16)), Layer(torch.zeros(3, 16))))
T, N = 6, 3
embed, action = torch.randn(T, N, 8), torch.randn(T, N, 3)
first = torch.rand(T, N) < 0.2
start = model.initial(N)

def work(seed):
    r = model.observe(embed, action, first, start, seed=seed)
    outputs = [r.deter, r.stoch, r.posterior, r.prior]
    grads = torch.autograd.grad([x.square().sum() for x in outputs], list(model.parameters()))
    with torch.no_grad():
        imagined = model.imagine(policy, r.state, 3, seed=seed)
        noise = torch.full((N, 4), 0.1 * (seed % 10))
        step = model.step(r.state, action[0], embed[0], first[0], noise=noise)
    return [*outputs, *grads, imagined.deter, imagined.action, step.deter, step.stoch]
"""

THREADS = (
    COMMON
    + """
import threading
want = [work(seed) for seed in range(8)]
wrong = []
def run(i):
    for _ in range(60):
        if not all(torch.equal(a, b) for a, b in zip(work(i), want[i])):
            wrong.append(i)
            return
threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not wrong, wrong
print("done")
"""
)

# Small products, for torch's own large ones hang in a child whose parent has used them.
FORK = (
    COMMON
    + """
import os
want = work(1)
child = os.fork()
if child == 0:
    import numpy
    # One thread there: sums over rows in another order.
    pairs = [(a.detach().numpy(), b.detach().numpy()) for a, b in zip(work(1), want)]
    os._exit(0 if all(numpy.allclose(a, b, 1e-3, 1e-4) for a, b in pairs) else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
print("done")
"""
)

MEMORY = (
    COMMON
    + """
from pathlib import Path
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
for i in range(300):
    work(i)
before = resident()
for i in range(CALLS):
    work(i)
grown = resident() - before
assert grown < 1 << 20, grown
print("done")
"""
)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(THREADS, id="threads"),
        pytest.param(FORK, id="fork"),
        pytest.param(MEMORY.replace("CALLS", "600"), id="memory"),
        pytest.param(
            MEMORY.replace("CALLS", "100_000"),
            id="memory-100k",
            marks=[pytest.mark.slow, pytest.mark.timeout(3600)],
        ),
    ],
)
def test_in_a_process_of_its_own(script):
    if "resident" in script and not _native.module().keeps_memory:
        pytest.skip("built with AddressSanitizer, which keeps what was freed")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=3600
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "done" in run.stdout
