"""The pieces of a run that need no process of their own."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pywm.errors import CheckpointError, MissingExtra, NumericalError, UserError
from pywm.training import checkpoint, directory
from pywm.training.checkpoint import join, load
from pywm.training.log import (
    EpisodeLines,
    JsonlWriter,
    LivePanel,
    PlainLines,
    Status,
    plain_number,
    read_metrics,
)
from pywm.training.run import NullRun, Run, RunOptions, assert_finite
from pywm.types import State


@pytest.fixture(autouse=True)
def quiet_logger() -> Iterator[None]:
    level = logging.getLogger("pywm").level
    yield
    logging.getLogger("pywm").setLevel(level)


def open_run(
    folder: Path, *, total_steps: int = 100, config: dict[str, Any] | None = None, **options: Any
) -> Run:
    return Run.open(
        RunOptions(run_dir=str(folder), **{"progress": "off", "checkpoint_every": 10} | options),
        algo="tiny",
        env="CartPole-v1",
        seed=0,
        config=config or {"steps": total_steps},
        total_steps=total_steps,
    )


def agent_state(value: float = 1.0) -> State:
    return join({"agent": State({"weight": torch.full((3,), value)}, {})})


# assert_finite.


def test_the_first_bad_tensor_is_named() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), float("inf")])
    with pytest.raises(NumericalError, match=r"'kl' became NaN at 8,192 env steps \(2 of 3 values\)"):
        assert_finite({"loss": good, "kl": bad, "entropy": bad}, env_steps=8192)
    with pytest.raises(NumericalError, match="'x' became infinite"):
        assert_finite({"x": torch.tensor(-math.inf)}, env_steps=0)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"count": torch.arange(3), "mask": torch.ones(2, dtype=torch.bool)},
        {"empty": torch.zeros(0)},
        {"overflows the sum": torch.full((4,), 3e38)},
        {"cancels": torch.tensor([3e38, 3e38, -3e38, -3e38])},
        {"mixed": torch.ones(2), "dtypes": torch.ones(2, dtype=torch.float64), "half": torch.ones(1).half()},
        {"with grad": torch.ones(2, requires_grad=True)},
    ],
)
def test_finite_tensors_pass(tensors: dict[str, torch.Tensor]) -> None:
    assert_finite(tensors, env_steps=1)


def test_an_infinity_that_cancels_in_the_sum_is_found() -> None:
    with pytest.raises(NumericalError, match="'x' became infinite"):
        assert_finite({"x": torch.tensor([math.inf, -math.inf])}, env_steps=1)


# Checkpoints of a run.


def test_poisoned_weights_are_never_saved(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.save(10, agent_state())
        for name, bad in (("agent", math.nan), ("optim", math.inf), ("normalizer", -math.inf)):
            state = join({"agent": State({}, {}), name: State({"x": torch.tensor(bad)}, {})})
            with pytest.raises(NumericalError, match=f"'{name}/x' became"):
                run.save(20, state)
        run.save(
            30, join({"env": State({"limits": torch.tensor(math.inf)}, {})})
        )  # the world may be what it likes
    assert [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == [10, 30]


def test_a_step_is_saved_again_only_where_that_is_asked_for(tmp_path: Path) -> None:
    states = [State({"x": torch.tensor(float(i))}, {}) for i in range(4)]
    seen = []
    with open_run(tmp_path) as run:
        for i, replace in enumerate((False, False, True)):
            run.save(10, join({"agent": states[i]}), replace=replace)
            seen.append(float(checkpoint.load(tmp_path / "checkpoints").state.tensors["agent/x"]))
        run.finish(10, join({"agent": states[3]}), replace=True)
        seen.append(float(checkpoint.load(tmp_path / "checkpoints").state.tensors["agent/x"]))
    assert seen == [0, 0, 2, 3]
    assert [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == [10]


def test_checkpoints_are_due_once_for_each_multiple_passed(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        assert [s for s in range(4, 44, 4) if run.checkpoint_due(s)] == [12, 20, 32, 40]
        run.save(40, agent_state())
    with open_run(tmp_path, resume=True) as run:
        assert [s for s in range(44, 64, 4) if run.checkpoint_due(s)] == [52, 60]
        assert not run.checkpoint_due(60)


def test_checkpoints_are_counted_through_a_resume(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        assert run.checkpoint_number == 0
        for step in (10, 20, 20):
            run.save(step, agent_state())
        assert run.checkpoint_number == 2
    with open_run(tmp_path, resume=True) as run:
        assert run.resumed is not None
        assert run.resumed.step == 20
        assert run.checkpoint_number == 2
        run.save(20, agent_state())  # Ctrl-C before the first iteration
        assert run.checkpoint_number == 2
        run.save(30, agent_state())
        assert run.checkpoint_number == 3


def test_the_best_score_decides_which_checkpoint_is_best(tmp_path: Path) -> None:
    with open_run(tmp_path, keep_last=1) as run:
        for step, score in ((5, math.nan), (10, None), (20, 5.0), (30, math.nan), (40, 4.0)):
            run.save(step, agent_state(step), score=score)
    with open_run(tmp_path, keep_last=1, resume=True) as run:
        run.save(50, agent_state(50), score=4.5)
    assert load(tmp_path / "checkpoints", which="best").step == 20
    with open_run(tmp_path, keep_last=1, resume=True) as run:
        run.save(60, agent_state(60), score=6.0)
    assert load(tmp_path / "checkpoints", which="best").step == 60


def test_the_random_generators_are_put_back(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.save(10, agent_state())
        expected = torch.randn(3), np.random.rand()
    torch.randn(7)
    with open_run(tmp_path, resume=True) as run:
        run.restore_rng()
        assert torch.equal(torch.randn(3), expected[0])
        assert np.random.rand() == expected[1]


def test_a_run_from_the_beginning_seeds_the_random_generators(tmp_path: Path) -> None:
    drawn = []
    for name in ("a", "b"):
        with open_run(tmp_path / name):
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_a_disk_that_is_full_at_the_end_is_told_once_with_the_way_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_run(tmp_path) as run:
        run.save(90, agent_state())
    good, going_on = tmp_path / "checkpoints/step_00000090", "resume=True), ...)"
    monkeypatch.setattr(checkpoint, "save", full)

    def train() -> None:
        with open_run(tmp_path, resume=True) as run:
            assert run.save(95, agent_state()) is None
            assert run.checkpoint_due(100)
            assert run.save(100, agent_state()) is None
            run.finish(100, agent_state())

    with pytest.raises(CheckpointError) as caught:
        train()
    message = str(caught.value)
    assert message.startswith(
        "the final checkpoint at 100 env steps was not written ([Errno 28] No space left"
    )
    assert f"the last good checkpoint is {good}. Go on with:\n" in message
    assert message.endswith(going_on)
    assert caplog.text.count("not written") == 1  # that of step 95, after which training goes on
    assert "checkpoint at 95 env steps not written" in caplog.text
    assert going_on not in caplog.text
    nothing = pytest.raises(CheckpointError, match=r"was not written \(.*\); there is no checkpoint")
    with nothing, open_run(tmp_path / "new") as run:
        run.finish(100, agent_state())


def test_generators_of_a_device_that_do_not_fit_are_an_error_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(tmp_path) as run:
        run.save(10, agent_state())

    def refuse(state: State) -> None:
        raise RuntimeError("RNG state is wrong size")

    with open_run(tmp_path, resume=True) as run:
        monkeypatch.setattr(checkpoint, "set_rng_state", refuse)
        with pytest.raises(
            CheckpointError, match=r"step_00000010: random generator state: RNG state is wrong"
        ):
            run.restore_rng()


# Metrics.


def test_metrics_become_plain_json(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        metrics = {
            "tensor": torch.tensor(0.5, requires_grad=True),
            "int": torch.tensor(3),
            "numpy": np.float32(0.25),
            "nan": math.nan,
            "inf": torch.tensor(math.inf),
        }
        run.log(metrics, env_steps=8)
    [row] = read_metrics(tmp_path / "metrics.jsonl")
    assert {k: row[k] for k in ("env_steps", *metrics)} == {
        "env_steps": 8, "tensor": 0.5, "int": 3, "numpy": 0.25, "nan": None, "inf": None,
    }  # fmt: skip
    assert row["time/total"] >= 0
    assert plain_number("text") == "text"


def test_log_every_thins_the_rows(tmp_path: Path) -> None:
    with open_run(tmp_path, log_every=30) as run:
        assert [s for s in range(10, 101, 10) if run.log_due(s)] == [30, 60, 90]
    with open_run(tmp_path / "all") as run:
        assert all(run.log_due(s) for s in range(10, 50, 10))


def test_time_goes_on_counting_after_a_resume(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.log({}, env_steps=10)
        run.save(10, agent_state())
    rows = read_metrics(tmp_path / "metrics.jsonl")
    rows[0]["time/total"] = 1000.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open_run(tmp_path, resume=True) as run:
        run.log({}, env_steps=20)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["time/total"] >= 1000.0


def test_phases_share_the_time_without_counting_any_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with open_run(tmp_path) as run:
        now[0] += 1
        with run.phase("learn"):
            now[0] += 2
            with run.phase("env"):
                now[0] += 3
            now[0] += 4
        run.log({}, env_steps=50)
        with run.phase("env"):
            now[0] += 5
        run.log({}, env_steps=60)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["time/learn"], first["time/env"]) == (0.6, 0.3)
    assert (second["time/learn"], second["time/env"]) == (0.0, 1.0)
    assert (first["time/steps_per_second"], second["time/steps_per_second"]) == (5.0, 2.0)


def test_rows_are_cut_to_the_number_the_checkpoint_knows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a":1}\n{"a":2}\n{"a":3}\n{"a":')
    writer = JsonlWriter(path, rows=2)
    writer.write({"a": 4})
    writer.close()
    assert path.read_text() == '{"a":1}\n{"a":2}\n{"a":4}\n'
    assert not caplog.messages
    path.write_text(path.read_text() + '{"a":')
    writer = JsonlWriter(path, rows=9)
    assert writer.rows == 3
    writer.close()
    assert path.read_text() == '{"a":1}\n{"a":2}\n{"a":4}\n'
    assert "has 3 rows, the checkpoint was written at 9" in caplog.text


# Signals and threads.


def test_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with open_run(tmp_path):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(KeyError), open_run(tmp_path / "b"):
        raise KeyError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_one_signal_asks_and_the_second_insists(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        assert not run.stopping
        signal.raise_signal(signal.SIGTERM)
        assert run.stopping
        assert run.interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_run_works_in_another_thread_and_stops_when_told_to(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    started, problems = threading.Event(), []

    def train() -> None:
        try:
            with open_run(tmp_path) as run:
                shared.append(run)
                step = 0
                while not run.stopping:
                    step += 1
                    run.log({}, env_steps=step)
                    started.set()
                    time.sleep(0.001)
                run.finish(step, agent_state())
        except BaseException as error:
            problems.append(error)

    shared: list[Run] = []
    thread = threading.Thread(target=train)
    thread.start()
    assert started.wait(10)
    assert signal.getsignal(signal.SIGINT) == before
    shared[0].stop()
    thread.join(10)
    assert not problems
    assert not shared[0].interrupted
    assert load(tmp_path / "checkpoints").step >= 1


def test_forked_workers_leave_ctrl_c_to_their_parent_and_can_be_terminated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills: list[tuple[int, int]] = []
    with open_run(tmp_path) as run:
        pid = os.getpid()
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: pid + 1)  # as seen in a child that inherited the handlers
            patch.setattr(os, "kill", lambda *call: kills.append(call))
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
            assert not kills
            signal.raise_signal(signal.SIGTERM)
            assert kills == [(pid + 1, signal.SIGTERM)]
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert not run.stopping


def test_stop_at_ends_a_time_slot(tmp_path: Path) -> None:
    with open_run(tmp_path, stop_at=30) as run:
        run.log({}, env_steps=20)
        assert not run.stopping
        run.log({}, env_steps=30)
        assert run.stopping
        assert not run.interrupted


def test_from_python_the_way_to_go_on_is_python(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_run(tmp_path) as run:
        run.finish(30, agent_state())
    assert f"Run.open(RunOptions(run_dir='{tmp_path}', resume=True), ...)" in caplog.text


def test_a_null_run_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with NullRun() as run:
        with run.phase("env"):
            run.log({"a": 1}, env_steps=10)
        assert not run.stopping
        assert not any(due(10**9) for due in (run.checkpoint_due, run.eval_due, run.log_due))
        assert run.save(10, agent_state()) is None
        run.restore_rng()
        run.finish(10, agent_state())
        run.stop()
        assert run.stopping
    assert list(tmp_path.iterdir()) == []


# Directories.


def test_one_process_has_one_run_in_a_directory(tmp_path: Path) -> None:
    with open_run(tmp_path), pytest.raises(UserError, match="in use by another run of this process"):
        open_run(tmp_path)
    with open_run(tmp_path, resume=True):
        pass


@pytest.mark.parametrize(
    ("name", "least"),
    [("checkpoint_every", 1), ("keep_last", 1), ("eval_episodes", 1), ("stop_at", 1), ("eval_every", 0),
     ("log_every", 0)],
)  # fmt: skip
def test_counts_and_periods_are_positive(name: str, least: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"Run.open: {name} is {least - 1}, but expected {least} or more"):
        open_run(tmp_path / "run", **{name: least - 1})
    assert not (tmp_path / "run").exists()
    with open_run(tmp_path / "run", **{name: least}):
        pass


def test_fresh_keeps_what_was_there_aside(tmp_path: Path) -> None:
    for n in (1, 2, 3):
        with open_run(tmp_path, fresh=n > 1) as run:
            run.log({}, env_steps=n)
            run.finish(100, agent_state(n))
    assert load(tmp_path / "checkpoints").state.tensors["agent/weight"][0] == 3
    assert load(tmp_path / "previous-1/checkpoints").state.tensors["agent/weight"][0] == 1
    assert load(tmp_path / "previous-2/checkpoints").state.tensors["agent/weight"][0] == 2
    assert "finished" in (tmp_path / "previous-2/log.txt").read_text()


def test_a_failed_open_releases_the_directory(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.finish(100, agent_state())
    for _ in range(2):
        with pytest.raises(UserError, match="already has step 100"):
            open_run(tmp_path)
    with open_run(tmp_path, resume=True):
        pass


def test_a_failed_open_leaves_no_directory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory.machine, "facts", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(ZeroDivisionError):
        open_run(tmp_path / "old")
    assert (tmp_path / "old/config.json").exists()


def test_what_others_put_into_a_new_run_stays_when_it_fails(tmp_path: Path) -> None:

    def work() -> None:
        with open_run(tmp_path / "run") as run:
            (run.dir / "notes.txt").write_text("mine")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert (tmp_path / "run/notes.txt").exists()


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"algo": 1, "env": "e", "seed": 0, "config": {}}', "[" * 99_999, "\udcff"),
        '{"algo": "a", "env": "e", "seed": 0, "config": {}, "run": [1]}',
    ],
)
def test_a_config_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"config.json"):
        directory.read_run(tmp_path)


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a run directory: it has no config.json"):
        directory.read_run(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"model.pt: refused, expected a run directory; .* can hold code"
    ):
        directory.read_run(tmp_path / "model.pt")


def test_environment_names_become_one_folder(tmp_path: Path) -> None:
    options = RunOptions(runs=str(tmp_path))
    for env, folder in (
        ("ALE/Pong-v5", "ALE-Pong-v5"),
        ("my_pkg:MyEnv-v0", "my_pkg-MyEnv-v0"),
        ("../..", "env"),
    ):
        assert directory.choose(options, "ppo", env, 3).parent == tmp_path / folder / "ppo"


# Screens and sinks.


def test_plain_lines_come_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    status, lines = Status("t", "f", 1000), PlainLines()
    with caplog.at_level(logging.INFO):
        for second in range(36):
            now[0], status.env_steps = float(second), second * 10
            status.metrics = {"return/mean": 12.34, "loss/policy": 0.5, "eval/return_mean": 3.0}
            status.shares = {"env": 0.25, "learn": 0.5}
            lines.show(status)
    assert len(caplog.messages) == 3
    parts = ["300/1,000 env steps", "10/s", "ETA 0:01:10", "return 12.3", "eval 3.0", "policy loss 0.5"]
    for part in (*parts, "env 25% learn 50% other 25%"):
        assert part in caplog.messages[2]


def test_lines_about_episodes_come_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines = EpisodeLines(20)
    with caplog.at_level(logging.INFO):
        for second in range(36):
            now[0] = float(second)
            lines.show(second // 10, second * 1000)
    assert caplog.messages[1] == "2/20 episodes   20,000 steps   1,000/s"
    assert len(caplog.messages) == 3


def test_the_live_panel_shows_progress_figures_and_where_the_time_goes() -> None:
    import io

    from rich.console import Console

    stream = io.StringIO()
    panel = LivePanel(0.0, Console(file=stream, force_terminal=True, width=120))
    status = Status("ppo · CartPole-v1 · seed 0 · cpu", "runs/x", 100_000)
    status.env_steps, status.metrics, status.shares = 51_200, {"return/mean": 187.0}, {"env": 0.18}
    panel.show(status)
    panel.close()
    for part in (
        "ppo · CartPole-v1",
        "runs/x",
        "51,200 / 100,000 env steps",
        "ETA",
        "return 187.0",
        "env 18%",
        "RAM",
    ):
        assert part in stream.getvalue()


def test_the_end_says_where_the_time_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    caplog.set_level(logging.INFO, logger="pywm")
    with open_run(tmp_path) as run:
        for name, seconds in (("env", 10.0), ("learn", 60.0), ("replay", 0.1), ("learn", 20.0)):
            with run.phase(name):
                now[0] += seconds
        now[0] += 9.9
        run.finish(100, agent_state())
    # The last phases count, too, although no row was logged after them.
    assert "time 0:01:40 at 1 env steps/s: learn 80%, env 10%, other 10%" in caplog.messages
    assert caplog.messages[-1].startswith("finished at 100 env steps")


def test_a_run_without_phases_says_nothing_of_its_time() -> None:
    assert Status("t", "f", 1000).time_report() == ""


def test_tensorboard_and_wandb_are_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for option, extra in (("tensorboard", "tb"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, option, None)
        message = rf'{option} is not installed. Install it with: pip install "pywm\[{extra}\]"'
        with pytest.raises(MissingExtra, match=message):
            open_run(tmp_path / option, **{option: True})
        assert not (tmp_path / option).exists()
        monkeypatch.delitem(sys.modules, option)


def test_wandb_continues_the_same_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    rows: list[tuple[dict[str, Any], int]] = []
    page = SimpleNamespace(
        log=lambda row, step: rows.append((row, step)), finish=lambda: rows.append(({}, -1))
    )
    fake = SimpleNamespace(init=lambda **kwargs: calls.append(kwargs) or page)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with open_run(tmp_path, wandb=True) as run:
        run.log({"a": 1.0, "b": math.nan}, env_steps=10)
        run.finish(100, agent_state())
    with open_run(tmp_path, wandb=True, resume=True):
        pass
    assert calls[0]["id"] == calls[1]["id"]
    assert calls[0]["config"]["env"] == "CartPole-v1"
    assert rows[0][0]["a"] == 1.0
    assert "b" not in rows[0][0]
    assert [step for _, step in rows] == [10, -1, -1]
