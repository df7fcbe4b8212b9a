"""Whole trainings in processes of their own: exact resumes, signals, NaN, full disks, locks."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kills import fingerprint
from processes import Commands

from pywm.training import checkpoint
from pywm.training.log import read_metrics

TINY = ("train", "tiny", "CartPole-v1", "--checkpoint-every", "40")
RESUME = ("train", "tiny", "CartPole-v1", "--resume", "--run-dir")


def steps_of(run: Path) -> list[int]:
    return [row["env_steps"] for row in read_metrics(run / "metrics.jsonl")]


# Resume is exact.


@pytest.fixture(scope="session")
def original(server: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    server.folder = tmp_path_factory.mktemp("undisturbed")
    assert server(*TINY, "--run-dir", "run").code == 0
    return server.folder / "run"


@pytest.fixture
def undisturbed(original: Path, tmp_path: Path) -> Path:
    """A finished training of 160 steps, for this test to spoil."""
    return Path(shutil.copytree(original, tmp_path / "undisturbed"))


def test_equal_seeds_are_equal_and_others_are_not(pywm: Commands, undisturbed: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert pywm(*TINY, "--run-dir", tmp_path / f"{seed}", "--seed", seed).code == 0
    assert fingerprint(tmp_path / "0") == fingerprint(undisturbed)
    assert fingerprint(tmp_path / "1") != fingerprint(undisturbed)


@pytest.mark.parametrize("stop", [80, 104], ids=["at a checkpoint", "between checkpoints"])
def test_a_resumed_training_equals_an_undisturbed_one(
    stop: int, pywm: Commands, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "resumed"
    first = pywm(*TINY, "--run-dir", run, "--stop-at", stop)
    assert first.code == 0
    assert steps_of(run)[-1] == stop
    second = pywm(*RESUME, run)
    assert f"resumed at {stop} env steps" in second.err
    ours, theirs = fingerprint(run), fingerprint(undisturbed)
    if stop == 104:  # one checkpoint more was taken on the way; all the rest is equal
        for name in ("agent", "optim", "env", "rng"):
            file = f"{name}.safetensors"
            assert ours["checkpoint"]["files"].get(file) == theirs["checkpoint"]["files"].get(file), name
        assert ours["metrics"] == theirs["metrics"]
    else:
        assert ours == theirs


def test_n_steps_and_then_twice_as_many_equal_2n_steps(
    pywm: Commands, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "prolonged"
    assert pywm(*TINY, "--run-dir", run, "--steps", 80).code == 0
    second = pywm(*RESUME, run, "--steps", 160)
    assert second.code == 0
    assert "steps  80   160" in second.err
    assert fingerprint(run) == fingerprint(undisturbed)


def test_a_real_process_resumes_like_a_forked_one(undisturbed: Path, tmp_path: Path) -> None:
    # The other tests fork from a process that has imported everything; this one starts from nothing.
    algos = Path(__file__).parent / "algos"
    code = (
        f"import sys, pywm.algos as a, pywm.cli; a.__path__.append({str(algos)!r}); sys.exit(pywm.cli.main())"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    run = tmp_path / "run"
    for more in (("--stop-at", "80"), ("--resume",)):
        command = [sys.executable, "-c", code, *TINY, "--run-dir", str(run), *more]
        subprocess.run(command, check=True, env=environment, capture_output=True)
    assert fingerprint(run) == fingerprint(undisturbed)


def test_rows_after_the_checkpoint_are_not_repeated(
    pywm: Commands, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert pywm(*TINY, "--run-dir", run, "--crash-at", 136).code == 1
    assert steps_of(run)[-1] == 128  # the checkpoint is at 120
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"env_steps": 136, "loss/ti')  # cut off by the crash
    assert pywm(*RESUME, run, "--crash-at", -1).code == 0
    assert steps_of(run) == list(range(8, 168, 8))
    assert fingerprint(run) == fingerprint(undisturbed)


def test_a_resume_falls_back_when_the_newest_checkpoint_is_damaged(
    pywm: Commands, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert pywm(*TINY, "--run-dir", run, "--steps", 120).code == 0
    (run / "checkpoints/step_00000120/optim.safetensors").write_bytes(b"")
    result = pywm(*RESUME, run, "--steps", 160)
    assert result.code == 0
    assert "step_00000120: optim.safetensors has 0 bytes" in result.err
    assert "falling back to step_00000080" in result.err
    assert "resumed at 80 env steps" in result.err
    assert "falling back to step_00000080" in (run / "log.txt").read_text()
    assert (run / "checkpoints/damaged-step_00000120").is_dir()  # out of the way of the new one
    assert fingerprint(run) == fingerprint(undisturbed)


def test_a_resume_falls_back_when_the_newest_checkpoint_holds_something_else(
    pywm: Commands, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert pywm(*TINY, "--run-dir", run, "--steps", 120).code == 0
    newest = run / "checkpoints/step_00000120"
    data = json.loads((newest / "state.json").read_text()) | {"run": [1]}
    raw = json.dumps(data).encode()
    (newest / "state.json").write_bytes(raw)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    result = pywm(*RESUME, run, "--steps", 160)
    assert result.code == 0
    assert "step_00000120: state.json: run is [1], but expected an object; falling back to" in result.err
    assert fingerprint(run) == fingerprint(undisturbed)


def test_a_resume_without_a_valid_checkpoint_says_so(pywm: Commands, undisturbed: Path) -> None:
    for path in checkpoint.list_checkpoints(undisturbed / "checkpoints"):
        (path / "state.json").unlink()
    result = pywm(*RESUME, undisturbed)
    assert result.code == 2
    assert "no valid checkpoint" in result.err
    assert "step_00000160: state.json is missing" in result.err
    assert "--fresh" in result.err
    assert pywm(*TINY, "--run-dir", undisturbed, "--fresh").code == 0
    assert (undisturbed / "previous-1/metrics.jsonl").exists()
    assert steps_of(undisturbed) == list(range(8, 168, 8))


def test_a_finished_training_has_nothing_left_to_do(pywm: Commands, undisturbed: Path) -> None:
    before = fingerprint(undisturbed)
    result = pywm(*RESUME, undisturbed)
    assert result.code == 0
    assert "finished at 160 env steps" in result.err
    assert fingerprint(undisturbed) == before


def test_evaluating_and_showing_do_not_change_what_is_learned(
    pywm: Commands, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = ("--eval-every", 16, "--eval-episodes", 1, "--progress", "off")
    if importlib.util.find_spec("tensorboard"):
        more += ("--tensorboard",)
    assert pywm(*TINY, "--run-dir", run, *more).code == 0
    files = [fingerprint(r)["checkpoint"]["files"] for r in (run, undisturbed)]
    for name in ("agent.safetensors", "optim.safetensors", "env.safetensors", "rng.safetensors"):
        assert files[0][name] == files[1][name]
    rows = read_metrics(run / "metrics.jsonl")
    assert [r["env_steps"] for r in rows if "eval/return_mean" in r] == list(range(16, 168, 16))
    if "--tensorboard" in more:
        assert list((run / "tb").iterdir())


# Signals.


def start_slow(pywm: Commands, run: Path, *more: object) -> object:
    process = pywm.start(*TINY, "--run-dir", run, "--steps", 100_000, "--sleep", 0.05, *more)
    process.wait_for(run / "metrics.jsonl")
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_iteration_saves_and_tells_how_to_go_on(
    number: signal.Signals, pywm: Commands, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start_slow(pywm, run)
    process.send(number)
    result = process.wait()
    assert result.code == 130
    reached = steps_of(run)[-1]
    assert "stopping after this iteration" in result.err
    assert f"stopped at {reached} env steps, saved {run}/checkpoints/step_{reached:08d}" in result.err
    [command] = [line.strip() for line in result.err.splitlines() if line.startswith("  pywm train")]
    assert command == f"pywm train tiny CartPole-v1 --run-dir {run} --resume"
    assert checkpoint.load(run / "checkpoints").step == reached
    # The command it printed works as it stands, and so does stopping at once after a resume.
    again = pywm.start(*command.split()[1:])
    again.wait_for_text("resumed at")
    again.send(number)
    assert again.wait().code == 130
    assert checkpoint.load(run / "checkpoints").step >= reached


def test_a_second_ctrl_c_stops_at_once(pywm: Commands, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = pywm.start(*TINY, "--run-dir", run, "--steps", 100_000, "--sleep", 0.001)
    process.wait_for(run / "checkpoints/LATEST")
    process.send(signal.SIGINT)
    assert process.wait().code == 130
    process = pywm.start(*RESUME, run, "--sleep", 1000)
    process.wait_for_text("resumed at")
    time.sleep(0.3)  # into the iteration that takes 1000 seconds
    last = checkpoint.load(run / "checkpoints").step
    begin = time.monotonic()
    process.send(signal.SIGINT)
    time.sleep(0.1)
    process.send(signal.SIGINT)
    result = process.wait()
    assert result.code == 130
    assert time.monotonic() - begin < 10
    assert f"the last good checkpoint is {run}/checkpoints/step_{last:08d}" in result.err
    assert f"pywm train tiny CartPole-v1 --run-dir {run} --resume" in result.err
    assert checkpoint.load(run / "checkpoints").step == last


# NaN and exceptions.


def test_nan_stops_with_the_tensor_s_name_and_keeps_the_last_good_checkpoint(
    pywm: Commands, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = pywm(*TINY, "--run-dir", run, "--nan-at", 100)
    assert result.code == 4
    assert "'loss/tiny' became NaN at 104 env steps (1 of 1 values)" in result.err
    assert f"the last good checkpoint is {run}/checkpoints/step_00000080" in result.err
    assert "Traceback" not in result.err
    assert "Traceback" in (run / "log.txt").read_text()
    assert checkpoint.load(run / "checkpoints").step == 80
    assert pywm(*RESUME, run, "--nan-at", -1).code == 0


def test_a_crash_keeps_its_traceback_in_the_log(pywm: Commands, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = pywm(*TINY, "--run-dir", run, "--crash-at", 100)
    assert result.code == 1
    assert "KeyError" in result.err
    assert "the tiny algorithm crashed as it was told to" in (run / "log.txt").read_text()
    assert f"the last good checkpoint is {run}/checkpoints/step_00000080" in result.err


# Full disk.


def test_on_a_full_disk_training_goes_on_and_the_checkpoint_before_stays(
    pywm: Commands, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert pywm(*TINY, "--run-dir", run, "--steps", 80).code == 0
    # A limit on the size of a file stands for the disk: the payload no longer fits, the metrics do.
    result = pywm(*RESUME, run, "--steps", 160, "--payload-kib", 512, limit_bytes=100_000)
    assert result.code == 2
    assert "checkpoint at 120 env steps not written ([Errno 27] File too large" in result.err
    assert "training goes on, the last good one is step_00000080" in result.err
    [final] = [line for line in result.err.splitlines() if "the final checkpoint at 160 env steps" in line]
    assert "was not written ([Errno 27] File too large" in final
    assert f"the last good checkpoint is {run}/checkpoints/step_00000080. Go on with:" in final
    assert result.err.rstrip().endswith(f"pywm train tiny CartPole-v1 --run-dir {run} --resume")
    assert result.err.count("not written") == 2  # at 120 and at the end
    assert steps_of(run)[-1] == 160
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []
    assert checkpoint.load(run / "checkpoints").step == 80
    assert pywm(*RESUME, run, "--steps", 160).code == 0


def test_metrics_that_do_not_fit_are_dropped_whole(pywm: Commands, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = pywm(*TINY, "--run-dir", run, "--steps", 4000, "--checkpoint-every", 4000, limit_bytes=40_000)
    assert "cannot write metrics (only part of the row was written); rows are lost" in result.err
    assert result.code == 0
    text = (run / "metrics.jsonl").read_text()
    assert 39_000 < len(text) <= 40_000
    assert text.endswith("}\n")
    assert all(isinstance(json.loads(line), dict) for line in text.splitlines())


def test_a_folder_that_cannot_be_written_is_the_user_s_problem(pywm: Commands, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = pywm(*TINY, "--run-dir", tmp_path / "file" / "run")
    assert result.code == 2
    assert f"cannot use the run directory {tmp_path}/file/run" in result.err
    (tmp_path / "run/log.txt").mkdir(parents=True)
    result = pywm(*TINY, "--run-dir", tmp_path / "run")
    assert result.code == 2
    assert f"cannot use the run directory {tmp_path}/run" in result.err


# Which directory, and who may use it.


def test_a_directory_with_steps_asks_for_resume_or_fresh(pywm: Commands, undisturbed: Path) -> None:
    result = pywm(*TINY, "--run-dir", undisturbed)
    assert result.code == 2
    assert f"{undisturbed} already has step 160: add --resume to go on or --fresh to start over" in result.err


def test_resume_and_fresh_exclude_each_other(pywm: Commands, tmp_path: Path) -> None:
    result = pywm(*TINY, "--run-dir", tmp_path / "run", "--resume", "--fresh")
    assert result.code == 2
    assert "resume and fresh exclude each other" in result.err
    assert not (tmp_path / "run").exists()


def test_resume_takes_the_newest_run_of_the_seed(pywm: Commands, tmp_path: Path) -> None:
    folders = []
    for seed in (1, 1, 11):
        result = pywm("train", "tiny", "CartPole-v1", "--seed", seed, "--steps", 40)
        assert result.code == 0
        folders.append(Path(result.out.strip()))
    assert [folder.parent for folder in folders] == [Path("runs/CartPole-v1/tiny")] * 3
    assert len(set(folders)) == 3
    result = pywm("train", "tiny", "CartPole-v1", "--seed", 1, "--resume", "--steps", 80)
    assert Path(result.out.strip()) == folders[1]
    assert "resumed at 40 env steps" in result.err
    missing = pywm("train", "tiny", "CartPole-v1", "--seed", 2, "--resume")
    assert missing.code == 2
    assert "resume: no run of tiny on CartPole-v1 with seed 2 below runs/" in missing.err


def test_resume_passes_over_a_newer_run_without_a_checkpoint(pywm: Commands, tmp_path: Path) -> None:
    good = Path(pywm(*TINY, "--steps", 40).out.strip())
    empty = tmp_path / good.with_name("0-99991231-235959")
    empty.mkdir()
    (empty / "config.json").write_text((tmp_path / good / "config.json").read_text())
    result = pywm(*TINY, "--resume", "--steps", 80)
    assert result.code == 0, result.err
    assert Path(result.out.strip()) == good
    assert "resumed at 40 env steps" in result.err
    assert (
        result.err.count(f"{empty.relative_to(tmp_path)} is newer, but has no checkpoint; taking {good}") == 1
    )


def test_a_start_that_fails_at_once_leaves_no_directory(pywm: Commands, tmp_path: Path) -> None:
    for place in ((), ("--run-dir", tmp_path / "new/run")):
        failed = pywm(*TINY, *place, "--crash-at", 0)
        assert failed.code == 1
        assert "the tiny algorithm crashed" in failed.err
        assert "held nothing yet and was removed" in failed.err
    assert not list((tmp_path / "runs/CartPole-v1/tiny").iterdir())
    assert not (tmp_path / "new/run").exists()
    # One that was there before, and whatever somebody put into it, stays; so does a run with steps.
    (tmp_path / "mine").mkdir()
    assert pywm(*TINY, "--run-dir", "mine", "--crash-at", 0).code == 1
    assert (tmp_path / "mine/log.txt").exists()
    assert pywm(*TINY, "--run-dir", "later", "--crash-at", 16).code == 1
    assert steps_of(tmp_path / "later") == [8]


def test_a_run_killed_before_its_first_checkpoint_starts_again(pywm: Commands, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = pywm.start(*TINY, "--run-dir", run, "--checkpoint-every", 10**6, "--sleep", 0.05)
    process.wait_for(run / "metrics.jsonl")
    process.send(signal.SIGKILL)
    assert process.wait().code == 137
    assert "already has step" in pywm(*TINY, "--run-dir", run).err
    result = pywm(*RESUME, run, "--sleep", 0)
    assert result.code == 0
    assert "has no checkpoint yet; starting from the beginning" in result.err
    assert steps_of(run) == list(range(8, 168, 8))


def test_two_processes_cannot_train_into_one_directory(pywm: Commands, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_slow(pywm, run)
    for more in ("--resume", "--fresh"):
        result = pywm(*TINY, "--run-dir", run, more)
        assert result.code == 2
        assert f"run directory {run} is in use by process {process.pid} on " in result.err
    process.send(signal.SIGKILL)
    process.wait()
    # The lock of a dead process is no lock.
    assert pywm(*RESUME, run, "--steps", 16, "--sleep", 0).code == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-envs", 3), "num_envs  2    3    <- fixed"),
        (("--hidden", 9), "hidden  8    9    <- fixed"),
        (("--seed", 5), "is a run of seed 0, but 5 was asked for"),
    ],
)
def test_settings_that_shape_the_training_cannot_change_on_resume(
    flags: tuple[object, ...], message: str, pywm: Commands, undisturbed: Path
) -> None:
    result = pywm(*RESUME, undisturbed, *flags)
    assert result.code == 2
    assert message in result.err
    assert checkpoint.load(undisturbed / "checkpoints").skipped == ()


def test_settings_that_were_lost_are_not_replaced_by_the_preset_s(pywm: Commands, undisturbed: Path) -> None:
    (undisturbed / "config.json").unlink()
    result = pywm(*RESUME, undisturbed, "--steps", 320)
    assert result.code == 2
    assert f"resume: {undisturbed}/config.json is missing, but expected beside the checkpoints" in result.err
    assert "resumed" not in result.err
    assert not (undisturbed / "config.json").exists()


def test_settings_that_may_change_are_shown(pywm: Commands, undisturbed: Path) -> None:
    result = pywm(*RESUME, undisturbed, "--lr", 0.5, "--steps", 200, "--checkpoint-every", 100)
    assert result.code == 0
    shown = [line.split() for line in result.err.splitlines() if line.startswith("  ")]
    assert ["lr", "0.25", "0.5"] in shown
    assert ["steps", "160", "200"] in shown
    assert ["checkpoint_every", "40", "100"] in shown
    assert json.loads((undisturbed / "config.json").read_text())["config"]["lr"] == 0.5


def test_a_resume_keeps_the_settings_it_began_with(pywm: Commands, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--lr", 0.7, "--hidden", 5, "--stop-at", 80)
    assert pywm(*TINY, "--run-dir", run, *flags).code == 0
    assert pywm(*RESUME, run).code == 0
    about = json.loads((run / "config.json").read_text())
    assert (about["config"]["lr"], about["config"]["hidden"]) == (0.7, 5)
    assert about["run"]["checkpoint_every"] == 40


def test_another_environment_or_algorithm_is_not_resumed(pywm: Commands, undisturbed: Path) -> None:
    result = pywm("train", "tiny", "Acrobot-v1", "--resume", "--run-dir", undisturbed)
    assert result.code == 2
    assert "is a run of env 'CartPole-v1', but 'Acrobot-v1' was asked for" in result.err


def test_the_run_directory_has_everything_in_it(pywm: Commands, undisturbed: Path) -> None:
    about = json.loads((undisturbed / "config.json").read_text())
    assert (about["algo"], about["env"], about["seed"]) == ("tiny", "CartPole-v1", 0)
    assert about["config"]["lr"] == 0.25  # the preset's
    assert (undisturbed / "command.txt").read_text() == f"pywm {' '.join(TINY)} --run-dir run\n"
    facts = json.loads((undisturbed / "env.json").read_text())
    assert {"pywm", "python", "torch", "numpy", "gymnasium", "cpu", "cores", "gpus"} <= set(facts)
    assert "finished at 160 env steps" in (undisturbed / "log.txt").read_text()
    rows = read_metrics(undisturbed / "metrics.jsonl")
    assert rows[0]["return/mean"] is None  # no episode had ended: NaN is no JSON
    assert {"env_steps", "loss/tiny", "time/total", "time/steps_per_second", "time/env"} <= set(rows[-1])


def test_a_copied_run_goes_on_elsewhere(pywm: Commands, undisturbed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(undisturbed, tmp_path / "copy")
    shutil.rmtree(undisturbed)
    assert pywm(*RESUME, copy, "--steps", 200).code == 0
