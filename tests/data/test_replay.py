"""The replay against a plain model of it: lists of rows, one for each environment."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from pywm.data import replay as replay_module
from pywm.data.memory import free_memory
from pywm.data.replay import Handles, Replay, Sequences
from pywm.data.rollout import Slot
from pywm.envs.toy import Counter
from pywm.envs.vector import Envs
from pywm.errors import CheckpointError, UserError
from pywm.types import State, StepOut

SLOTS: dict[str, Any] = {
    "obs": {"image": Slot((3, 2, 2), torch.uint8), "vector": Slot((2,), torch.float32)},
    "action": Slot((3,), torch.float32),
    "latents": {"deter": Slot((4,), torch.float32), "stoch": Slot((2,), torch.uint8)},
}


def make(size: int = 40, num_envs: int = 2, length: int = 3, **options: Any) -> Replay:
    return Replay(size, num_envs, length=length, **{**SLOTS, **options})


class Row(NamedTuple):
    number: int  # of the observation
    reward: float
    is_first: bool
    is_last: bool
    terminated: bool
    action: int  # 0 is none
    latent: int


class Player:
    """Environments that number their observations, actions and latents, and the rows that should come of them."""

    def __init__(self, replay: Replay, seed: int = 0, *, end: float = 0.3, next_step: bool = False) -> None:
        self.replay, self.N, self.end, self.next_step = replay, replay.num_envs, end, next_step
        self.random = np.random.default_rng(seed)
        self.number = 0
        self.streams: list[list[Row]] = [[] for _ in range(self.N)]
        self.queue: deque[tuple[int, int]] = deque()
        self.resetting = np.zeros(self.N, bool)
        self.reset()

    def count(self) -> np.ndarray:
        numbers = np.arange(self.number + 1, self.number + 1 + self.N)
        self.number += self.N
        return numbers

    def reset(self) -> None:
        self.obs = self.count()
        self.reward, self.is_first = np.zeros(self.N, np.float32), np.ones(self.N, bool)
        self.resetting[:] = False

    def restart(self) -> None:
        self.replay.restart()
        for stream in self.streams:
            if stream and not stream[-1].is_last:
                stream[-1] = stream[-1]._replace(is_last=True, action=0)
        self.reset()

    def append(self, n: int, row: Row) -> None:
        self.streams[n].append(row)
        stride = self.replay.length + 1
        if len(self.streams[n]) % stride == 0:
            self.queue.append((n, len(self.streams[n]) - stride))

    def step(self) -> None:
        N, obs, final = self.N, self.obs, self.count()
        action, latent = self.random.integers(1, 4, N), self.count() % 250
        valid = ~self.resetting
        terminated = (self.random.random(N) < self.end) & valid
        truncated = (self.random.random(N) < self.end / 2) & valid
        ended = terminated | truncated
        reward = self.random.integers(1, 9, N).astype(np.float32)  # while resetting, too: to be ignored
        following = final if self.next_step else np.where(ended, self.count(), final)
        out = StepOut(to_obs(following), reward, terminated, truncated, to_obs(final), valid)
        self.replay.add(to_obs(obs), to_action(action), out, **to_latents(latent))
        for n in np.flatnonzero(valid):
            row = Row(obs[n], self.reward[n], self.is_first[n], False, False, action[n], latent[n])
            self.append(n, row)
        for n in np.flatnonzero(ended):
            self.append(n, Row(final[n], reward[n], False, True, terminated[n], 0, 0))
        self.is_first = ended | ~valid
        self.reward = np.where(self.is_first, 0, reward)
        self.resetting = ended if self.next_step else self.resetting
        self.obs = following
        assert self.replay.is_first.tolist() == self.is_first.tolist()

    def play(self, steps: int) -> Player:
        for _ in range(steps):
            self.step()
        return self

    def oldest(self, n: int) -> int:
        return max(len(self.streams[n]) - self.replay.capacity, 0)

    def starts(self) -> list[tuple[int, int]]:
        T = self.replay.length
        return [(n, i) for n, s in enumerate(self.streams) for i in range(self.oldest(n), len(s) - T)]

    def waiting(self) -> list[tuple[int, int]]:
        return [(n, i) for n, i in self.queue if i >= self.oldest(n)]

    def check(self, batch: Sequences) -> None:
        """Compare every row of a batch with the model's."""
        T = self.replay.length
        starts = set(self.starts())
        for b, (n, start) in enumerate(zip(*(x.tolist() for x in batch.handles), strict=True)):
            assert (n, start) in starts
            rows = self.streams[n][start : start + T + 1]
            assert len(rows) == T + 1
            obs = to_obs(np.array([row.number for row in rows[1:]]))
            assert batch.obs["image"][:, b].numpy().tolist() == obs["image"].tolist()
            assert batch.obs["vector"][:, b].numpy().tolist() == obs["vector"].tolist()
            previous = to_action(np.array([row.action for row in rows[:-1]]))
            assert batch.prev_action[:, b].tolist() == previous.tolist()
            for name in ("reward", "is_first", "is_last", "terminated"):
                assert getattr(batch, name)[:, b].tolist() == [getattr(row, name) for row in rows[1:]]
            latents = to_latents(np.array([rows[0].latent]))
            assert {k: x[b].tolist() for k, x in batch.latents.items()} == {
                k: x[0].tolist() for k, x in latents.items()
            }


def to_obs(numbers: np.ndarray) -> dict[str, np.ndarray]:
    digits = np.stack([numbers // 2**16 % 256, numbers // 2**8 % 256, numbers % 256], -1).astype(np.uint8)
    image = np.broadcast_to(digits[:, :, None, None], (len(numbers), 3, 2, 2)).copy()
    return {"image": image, "vector": np.stack([numbers, -numbers], -1).astype(np.float32)}


def to_action(numbers: np.ndarray) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[numbers][:, 1:]


def to_latents(numbers: np.ndarray) -> dict[str, torch.Tensor]:
    x = torch.from_numpy(np.asarray(numbers))
    return {"deter": x[:, None].expand(-1, 4) / 8, "stoch": x[:, None].expand(-1, 2).to(torch.uint8)}


def same(a: Sequences, b: Sequences) -> bool:
    tensors = [
        (*s.obs.values(), s.prev_action, s.reward, s.is_first, s.is_last, s.terminated, *s.latents.values())
        for s in (a, b)
    ]
    return all(torch.equal(x, y) for x, y in zip(*tensors, strict=True)) and all(
        np.array_equal(x, y) for x, y in zip(a.handles, b.handles, strict=True)
    )


# ---- rows ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_envs=st.integers(1, 4),
    length=st.integers(1, 6),
    spare=st.integers(0, 30),
    steps=st.integers(1, 60),
    end=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    next_step=st.booleans(),
    restarts=st.integers(0, 2),
)
def test_samples_are_windows_of_what_was_played(
    seed: int, num_envs: int, length: int, spare: int, steps: int, end: float, next_step: bool, restarts: int
) -> None:
    replay = make(num_envs * (length + 1 + spare), num_envs, length, seed=seed)
    player = Player(replay, seed, end=end, next_step=next_step)
    for i in range(restarts + 1):
        if i:
            player.restart()
        for _ in range(steps):
            player.step()
            assert replay.num_windows == len(player.starts())
            assert replay.num_queued == len(player.waiting())
            if replay.num_windows and player.random.random() < 0.3:
                batch = replay.sample(3)
                expected = player.waiting()[:3]
                got = list(zip(*(x.tolist() for x in batch.handles), strict=True))
                assert got[: len(expected)] == expected
                player.queue = deque(player.waiting()[3:])
                player.check(batch)
    assert replay.num_rows == sum(min(len(s), replay.capacity) for s in player.streams)


def counters(mode: AutoresetMode, end: str) -> Iterator[tuple[Envs, Replay]]:
    envs = Envs(
        SyncVectorEnv([lambda: Counter(2, end), lambda: Counter(3, end)], autoreset_mode=mode),
        name="counters",
    )
    yield (
        envs,
        Replay(40, 2, length=5, obs={"obs": Slot((1,), torch.float32)}, action=Slot((2,), torch.float32)),
    )
    envs.close()


@pytest.mark.parametrize("end", ["terminated", "truncated"])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_every_autoreset_mode_gives_the_same_rows(mode: AutoresetMode, end: str) -> None:
    for envs, replay in counters(mode, end):
        obs = envs.reset(seed=0)
        for t in range(12):
            assert replay.is_first[0] == (
                obs[0, 0] % 10 == 0 or (mode is AutoresetMode.NEXT_STEP and obs[0, 0] % 10 == 2)
            )
            action = np.array([t % 2, 1])
            out = envs.step(action)
            replay.add(obs, np.eye(2, dtype=np.float32)[action], out)
            obs = out.obs
        batch = replay._gather(Handles(np.array([0]), np.array([0])))
        # Episodes of 2 steps, 3 rows; each reward belongs to the observation that it came with.
        assert batch.obs["obs"][:, 0, 0].tolist() == [1, 2, 10, 11, 12]
        assert batch.is_first[:, 0].tolist() == [False, False, True, False, False]
        assert batch.is_last[:, 0].tolist() == [False, True, False, False, True]
        assert batch.terminated[:, 0].tolist() == [
            end == "terminated" and x for x in batch.is_last[:, 0].tolist()
        ]
        taken = batch.prev_action[:, 0].argmax(-1).float()
        acted = batch.prev_action[:, 0].sum(-1)
        assert acted.tolist() == [1, 1, 0, 1, 1]  # no action leads from one episode to the next
        step = torch.tensor([1.0, 2.0, 0.0, 1.0, 2.0])
        assert batch.reward[:, 0].tolist() == ((step + taken / 2) * acted).tolist()


def test_the_example_of_the_docstring() -> None:
    replay = make(8, 1, 3, obs={"obs": Slot((), torch.float32)}, action=Slot((), torch.float32), latents={})
    yes, no = np.array([True]), np.array([False])
    a, b, c, d, e = (np.array([x], np.float32) for x in range(1, 6))
    replay.add(a, np.array([7.0]), StepOut(b, np.array([1.0], np.float32), no, no, b, yes))
    replay.add(b, np.array([8.0]), StepOut(d, np.array([2.0], np.float32), yes, no, c, yes))
    replay.add(d, np.array([9.0]), StepOut(e, np.array([0.0], np.float32), no, no, e, yes))
    batch = replay.sample(1)
    assert batch.obs["obs"][:, 0].tolist() == [2, 3, 4]
    assert batch.prev_action[:, 0].tolist() == [7, 8, 0]
    assert batch.reward[:, 0].tolist() == [1, 2, 0]
    assert batch.is_first[:, 0].tolist() == [False, False, True]
    assert batch.is_last[:, 0].tolist() == batch.terminated[:, 0].tolist() == [False, True, False]


def test_an_aborted_episode_ends_without_having_terminated() -> None:
    replay = make(20, 1, 3)
    player = Player(replay, end=0.0).play(2)
    player.restart()
    player.play(2)
    batch = replay.sample(1)
    assert batch.is_first[:, 0].tolist() == [False, True, False]
    assert batch.is_last[:, 0].tolist() == [True, False, False]
    assert not batch.terminated.any()
    assert batch.prev_action[1].count_nonzero() == 0
    player.restart()
    player.restart()  # with nothing in between changes nothing
    player.play(1)
    player.check(replay.sample(4))


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_windows_never_cross_the_write_head_and_every_place_is_equally_likely() -> None:
    replay = make(2 * 17, 2, 4)
    player = Player(replay).play(60)  # both rings are full several times over
    replay.sample(200)  # empties the queue
    starts = player.starts()
    assert len(starts) == replay.num_windows == 2 * (17 - 4)
    batch = replay.sample(26_000)
    seen = list(zip(*(x.tolist() for x in batch.handles), strict=True))
    counts = np.array([seen.count(start) for start in starts])
    assert counts.sum() == 26_000
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # χ² with 25 degrees of freedom: p = 1e-4


def test_the_online_queue_gives_each_window_once_and_first() -> None:
    replay = make(400, 2, 3)
    player = Player(replay, end=0.2).play(50)
    windows = player.waiting()
    assert len(windows) == replay.num_queued > 20
    first, rest = replay.sample(5), replay.sample(len(windows))
    got = [list(zip(*(x.tolist() for x in s.handles), strict=True)) for s in (first, rest)]
    assert got[0] == windows[:5]
    assert got[1][: len(windows) - 5] == windows[5:]
    assert replay.num_queued == 0
    rows = [(n, i + k) for n, i in windows for k in range(4)]
    assert len(set(rows)) == len(rows)  # they do not overlap


def test_a_queue_that_nobody_empties_does_not_grow() -> None:
    replay = make(2 * 12, 2, 3)
    Player(replay, end=0.2).play(300)
    assert len(replay._queue) <= 2 * 12 // 4 + 1


def test_the_same_seed_draws_the_same_windows() -> None:
    batches = []
    for seed in (1, 1, 2):
        replay = make(200, seed=seed)
        Player(replay).play(40)
        replay.sample(40)
        batches.append(replay.sample(16))
    assert same(batches[0], batches[1])
    assert not same(batches[0], batches[2])


# ---- latents ---------------------------------------------------------------------------------------------------------


def test_latents_written_back_are_what_the_next_sample_starts_from() -> None:
    replay = make(60, 2, 3)
    player = Player(replay).play(20)
    batch = replay.sample(1)
    n, start = int(batch.handles.env[0]), int(batch.handles.start[0])
    before = replay._gather(Handles(np.array([n, n]), np.array([start, start + 3])))
    deter = torch.arange(12.0).view(3, 1, 4)
    stoch = torch.arange(6, dtype=torch.uint8).view(3, 1, 2)
    replay.write_back(batch.handles, deter=deter, stoch=stoch)
    now = replay._gather(Handles(np.full(4, n), start + np.arange(4)))
    assert torch.equal(now.latents["deter"][1:], deter[:, 0])
    assert torch.equal(now.latents["stoch"][1:], stoch[:, 0])
    assert torch.equal(now.latents["deter"][0], before.latents["deter"][0])  # the context row keeps its own
    for i in range(4):
        player.streams[n][start + i] = player.streams[n][start + i]._replace(latent=-1)
    others = [s for s in player.starts() if player.streams[s[0]][s[1]].latent >= 0]
    player.check(replay._gather(Handles(*(np.array(x) for x in zip(*others, strict=True)))))


def test_the_deepest_place_in_a_window_wins() -> None:
    replay = make(20, 1, 3)
    Player(replay, end=0.0).play(8)
    handles = Handles(
        np.zeros(3, np.int64), np.array([2, 1, 0])
    )  # row 3 is number 1, 2 and 3 of these windows
    deter = torch.arange(1.0, 4.0)[:, None, None].expand(3, 3, 4)
    replay.write_back(handles, deter=deter, stoch=torch.zeros(3, 3, 2, dtype=torch.uint8))
    rows = replay._gather(Handles(np.zeros(4, np.int64), np.arange(1, 5)))
    assert rows.latents["deter"][:, 0].tolist() == [1, 2, 3, 3]


def test_latents_of_evicted_rows_are_dropped() -> None:
    replay = make(8, 1, 3)
    player = Player(replay, end=0.0).play(4)
    batch = replay.sample(1)  # rows 0 to 3
    player.play(6)  # rows 0 and 1 are gone, and others lie in their place
    deter = torch.full((3, 1, 4), 99.0)
    replay.write_back(batch.handles, deter=deter, stoch=torch.full((3, 1, 2), 99, dtype=torch.uint8))
    rows = replay._gather(Handles(np.zeros(5, np.int64), np.arange(2, 7))).latents["stoch"][:, 0]
    assert rows.tolist() == [99, 99, *(row.latent for row in player.streams[0][4:7])]
    player.play(8)
    replay.write_back(batch.handles, deter=deter, stoch=torch.full((3, 1, 2), 99, dtype=torch.uint8))
    player.check(replay.sample(20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_in_half_precision(dtype: torch.dtype) -> None:
    latents = {"deter": Slot((4,), dtype), "stoch": Slot((2,), torch.uint8)}
    replay = make(20, 1, 2, latents=latents)
    assert replay.nbytes == make(20, 1, 2).nbytes - 20 * 8
    Player(replay, end=0.0).play(6)
    batch = replay.sample(1)
    assert batch.latents["deter"].dtype == dtype
    deter = torch.randn(2, 1, 4)
    replay.write_back(batch.handles, deter=deter, stoch=torch.zeros(2, 1, 2, dtype=torch.uint8))
    rows = replay._gather(batch.handles._replace(start=batch.handles.start + 1))
    assert torch.equal(rows.latents["deter"][0], deter[0, 0].to(dtype))
    other = make(20, 1, 2, latents=latents)
    other.load_state(replay.state())
    assert same(other.sample(5), replay.sample(5))


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_it_says_how_much_memory_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    row = 3 * 2 * 2 + 2 * 4 + 3 * 4 + 4 + 3 + 4 * 4 + 2
    with caplog.at_level("INFO", "pywm"):
        replay = make(41, 2)
    assert replay.nbytes == Replay.measure(41, 2, **SLOTS) == 40 * row
    assert sum(view.nbytes for view in replay._views.values()) == replay.nbytes
    assert f"the replay of 41 rows takes 0.00 GiB ({row} bytes a row)" in caplog.text


def test_what_does_not_fit_is_refused_by_the_name_of_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Replay.measure(1, 1, **SLOTS)
    monkeypatch.setattr(replay_module, "free_memory", lambda: 1000 * row)
    make(1000, 2)
    message = (
        rf"replay_size is 1,002, which takes 0.00 GiB \({row} bytes a row\), but .* expected at most 1,000"
    )
    with pytest.raises(UserError, match=message):
        make(1002, 2)
    monkeypatch.setattr(replay_module, "free_memory", lambda: None)  # where the system does not tell
    with pytest.raises(UserError, match="replay_size is 1,000,000,000,000,000, but the system refuses"):
        make(10**15, 2)
    monkeypatch.undo()
    with pytest.raises(
        UserError, match=r"replay_size is 1,000,000,000,000, which takes .* GiB of memory are free"
    ):
        make(10**12, 2)


def test_a_large_replay_takes_no_memory_before_it_is_filled() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not Path("/proc/self/statm").exists():
        pytest.skip("/proc is not there")
    before = resident()
    replay = make(
        2**20, 2, obs={"image": Slot((3, 16, 16), torch.uint8), "vector": Slot((2,), torch.float32)}
    )
    assert replay.nbytes > 800 * 2**20
    assert resident() - before < 100 * 2**20


def test_free_memory_minds_the_limits_of_containers(tmp_path: Path) -> None:
    def put(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert free_memory(tmp_path) is None
    put("proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:  5000 kB\n")
    assert free_memory(tmp_path) == 5000 * 1024
    put("proc/self/cgroup", "4:cpu,memory:/a/b\n0::/c/d\n")
    put("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "4000000\n")
    put("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "1500000\n")
    put("sys/fs/cgroup/memory/a/memory.stat", "cache 700000\ntotal_inactive_file 500000\n")
    assert free_memory(tmp_path) == 3000000
    put("sys/fs/cgroup/c/d/memory.max", "max\n")
    put("sys/fs/cgroup/c/d/memory.current", "1000000\n")
    put("sys/fs/cgroup/memory.max", "2000000\n")
    put("sys/fs/cgroup/memory.current", "1000000\n")
    put("sys/fs/cgroup/memory.stat", "file 5\ninactive_file 1\n")
    assert free_memory(tmp_path) == 1000001
    put("sys/fs/cgroup/memory.current", "3000000\n")
    assert free_memory(tmp_path) == 0
    put("proc/self/cgroup", "nonsense\n\n")
    assert free_memory(tmp_path) == 5000 * 1024


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 2, 9, 70])
def test_a_restored_replay_goes_on_alike(steps: int) -> None:
    replay, other = make(40, seed=5), make(40, seed=6)
    player = Player(replay).play(steps)
    Player(other, 9).play(33)
    if steps > 2:
        replay.sample(2)
    state = replay.state()
    copy = {name: x.clone() for name, x in state.tensors.items()}
    assert sum(len(x) for name, x in state.tensors.items() if name == "column.reward") == replay.num_rows
    other.load_state(state)
    for _ in range(30):
        player.replay = replay
        before = player.random.bit_generator.state, player.number, player.obs, player.reward, player.is_first
        player.step()
        player.replay = other
        player.random.bit_generator.state, player.number, player.obs, player.reward, player.is_first = before
        player.step()
        if replay.num_windows:
            assert same(replay.sample(3), other.sample(3))
    assert replay.num_queued == other.num_queued
    assert all(torch.equal(x, state.tensors[name]) for name, x in copy.items())  # a copy, not a view


def test_a_state_survives_a_checkpoint(tmp_path: Path) -> None:
    from pywm.training import checkpoint

    replay, other = make(seed=5), make()
    Player(replay).play(30)
    checkpoint.save(tmp_path, 30, checkpoint.join({"replay": replay.state()}))
    state = checkpoint.part(checkpoint.load(tmp_path).state, "replay")
    assert state is not None
    other.load_state(state)
    assert same(replay.sample(50), other.sample(50))


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    replay = make()
    Player(replay).play(30)
    state = replay.state()

    def damaged(**changes: Any) -> State:
        tensors, data = dict(state.tensors), dict(state.data)
        for name, value in changes.items():
            (tensors if isinstance(value, torch.Tensor) or name.startswith("column") else data)[name] = value
        return State({k: x for k, x in tensors.items() if x is not None}, data)

    other = make()
    Player(other, 3).play(20)
    mine = other.state()
    latents = {"deter": Slot((5,), torch.float32), "stoch": Slot((2,), torch.uint8)}
    for stranger, key in (
        (make(44), "replay_size is 44, but 40"),
        (make(40, 4), "num_envs is 4, but 2"),
        (make(length=4), "length is 4, but 3"),
        (make(latents=latents), r"columns is .*\[\[5\], 'torch.float32'\]"),
    ):
        with pytest.raises(CheckpointError, match=f"Replay.load_state: {key}"):
            other.load_state(stranger.state())
    for changes, key in (
        ({"format": 7}, "format is 7"),
        ({"column.reward": None}, "column.reward is missing"),
        ({"column.reward": torch.zeros(3)}, r"column.reward is torch.float32 \(3,\)"),
        (
            {"column.obs.image": state.tensors["column.obs.image"].float()},
            "column.obs.image is torch.float32",
        ),
        ({"count": torch.tensor([-1, 5])}, "count is .* expected 0 or more"),
        ({"count": torch.tensor([1])}, "count is torch.int64"),
        ({"queue": torch.tensor([1, 2])}, r"queue is \(2,\)"),
        ({"queue": torch.tensor([[2, 0]])}, "queue holds row 0 of stream 2"),
        ({"queue": torch.tensor([[0, 10**6]])}, "queue holds row 1000000"),
        ({"generator": {"state": 1}}, "generator does not fit"),
        ({"generator": None}, "generator does not fit"),
    ):
        with pytest.raises(CheckpointError, match=f"Replay.load_state: {key}"):
            other.load_state(damaged(**changes))
    now = other.state()
    assert now.data == mine.data
    assert all(torch.equal(x, mine.tensors[name]) for name, x in now.tensors.items())


# ---- bad calls -------------------------------------------------------------------------------------------------------


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="replay_size is 7, but expected at least 8: a window of 4 rows"):
        make(7)
    with pytest.raises(ValueError, match="Replay: num_envs is 0, but 1 or more was expected"):
        make(num_envs=0)
    with pytest.raises(ValueError, match="Replay: length is 0, but 1 or more was expected"):
        make(length=0)
    replay = make()
    with pytest.raises(ValueError, match=r"Replay.sample: num_windows is 0, but a stream of at least 4 rows"):
        replay.sample(1)
    Player(replay).play(4)
    with pytest.raises(ValueError, match=r"Replay.sample: batch_size is 0, but 1 or more"):
        replay.sample(0)


def test_wrong_arrays_are_refused_before_anything_is_written() -> None:
    replay = make()
    player = Player(replay, end=0.0).play(3)
    obs, action, latents = to_obs(np.array([1, 2])), to_action(np.array([1, 2])), to_latents(np.array([1, 2]))
    no, yes, reward = np.zeros(2, bool), np.ones(2, bool), np.zeros(2, np.float32)
    out = StepOut(to_obs(np.array([3, 4])), reward, no, no, to_obs(np.array([3, 4])), yes)
    bare = {"image": obs["image"]}
    calls: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ValueError, r"obs is out.obs, but what was acted on", (out.obs, action, out), latents),
        (
            ValueError,
            r"obs has the keys \['image'\], but 'vector' was expected",
            (bare, action, out),
            latents,
        ),
        (ValueError, r"obs has the keys \['obs'\]", (obs["image"], action, out), latents),
        (ValueError, r"action is \(2,\), but \(2, 3\)", (obs, action[:, 0], out), latents),
        (ValueError, r"the latents are \[\], but \['deter', 'stoch'\]", (obs, action, out), {}),
        (ValueError, r"deter is \(1, 4\)", (obs, action, out), {**latents, "deter": latents["deter"][:1]}),
        (
            TypeError,
            r"stoch is int64, but uint8",
            (obs, action, out),
            {**latents, "stoch": latents["stoch"].long()},
        ),
        (
            TypeError,
            r"obs is float32, but uint8",
            ({**obs, "image": obs["image"] / np.float32(9)}, action, out),
            latents,
        ),
        (ValueError, r"out.reward is \(1,\)", (obs, action, out._replace(reward=reward[:1])), latents),
        (
            ValueError,
            r"out.final_obs has the keys \['image'\]",
            (obs, action, out._replace(final_obs=bare, terminated=yes)),
            latents,
        ),
    ]
    before = replay.state()
    for error, message, arguments, named in calls:
        with pytest.raises(error, match=f"Replay.add: {message}"):
            replay.add(*arguments, **named)
    after = replay.state()
    assert all(torch.equal(x, before.tensors[name]) for name, x in after.tensors.items())
    player.step()
    batch = replay.sample(2)
    with pytest.raises(ValueError, match=r"Replay.write_back: deter is \(3, 1, 4\), but \(3, 2, 4\)"):
        replay.write_back(
            batch.handles, deter=torch.zeros(3, 1, 4), stoch=torch.zeros(3, 2, 2, dtype=torch.uint8)
        )
    with pytest.raises(ValueError, match=r"Replay.write_back: the latents are \['deter'\]"):
        replay.write_back(batch.handles, deter=torch.zeros(3, 2, 4))
