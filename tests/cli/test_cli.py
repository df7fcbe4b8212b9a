"""The command line: what each command prints where, with which exit code, and what it says about mistakes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from processes import Commands

from pywm import cli, doctor


def explain(result: Any) -> str:
    return f"exit code {result.code}\nstdout: {result.out}\nstderr: {result.err}"


# Help and start-up.


def test_help_lists_every_command(pywm: Commands) -> None:
    for argv in ((), ("--help",), ("-h",), ("help",)):
        result = pywm(*argv)
        assert result.code == 0
        assert result.err == ""
        for command in ("train", "eval", "dream", "plot", "bench", "check-env", "list", "doctor"):
            assert f"pywm {command}" in result.out


@pytest.mark.parametrize(
    "command", ["eval", "dream", "plot", "bench", "check-env", "list", "doctor", "train"]
)
def test_every_command_has_help(command: str, pywm: Commands) -> None:
    result = pywm(command, "--help")
    assert result.code == 0
    assert f"usage: pywm {command}" in result.out


def test_the_help_of_train_shows_the_algorithm_s_settings(pywm: Commands) -> None:
    result = pywm("train", "tiny", "--help")
    assert result.code == 0
    for part in (
        "--lr",
        "--num-envs",
        "--seed",
        "--steps",
        "size of the weights",
        "--resume",
        "--checkpoint-every",
    ):
        assert part in result.out


def test_help_is_quick_and_the_module_runs() -> None:
    code = (
        "import sys, pywm.cli\n"
        "code = pywm.cli.main(['--help'])\n"
        "heavy = {'gymnasium', 'tyro', 'rich', 'matplotlib', 'PIL', 'imageio', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for arguments in (["-c", code], ["-m", "pywm", "--version"]):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(("usage: pywm", "pywm 0."))


# Typing errors.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("trian", "ppo", "CartPole-v1"), "no command 'trian'. Did you mean 'train'?"),
        (("xyz",), "no command 'xyz'. Choose from bench, check-env, doctor, dream, eval, list, plot, train."),
        (("train", "Tinny", "CartPole-v1"), "no algorithm 'Tinny'. Did you mean 'tiny'?"),
        (("train", "zzz", "CartPole-v1"), "no algorithm 'zzz'. Choose from"),
        (
            ("train", "tiny", "CartPole-v1", "--preset", "cartpol"),
            "no preset 'cartpol'. Did you mean 'cartpole'?",
        ),
        (("train", "tiny", "CartPol-v1"), "CartPole-v1"),
        (("train", "tiny", "CartPole-v1", "--num-env", "3"), "--num-envs"),
        (("train", "tiny", "CartPole-v1", "--runs-dir", "x"), "--run-dir"),
        (("train", "tiny"), "expected ALGO ENV, as in: pywm train tiny CartPole-v1"),
        (("train", "--seed", "3", "tiny", "CartPole-v1"), "expected ALGO ENV before any flag"),
        (("train", "tiny", "CartPole-v1", "--steps", "many"), "many"),
        (("train", "tiny", "CartPole-v1", "--device", "gpu"), "device is 'gpu', but expected cpu, cuda or"),
        (("train", "tiny", "CartPole-v1", "--device", "cuda:99"), "GPUs; use --device cpu"),
        (("train", "tiny", "CartPole-v1", "--device", "meta"), "train: device is 'meta', which torch"),
        (
            ("train", "tiny", "CartPole-v1", "--device", "vulkan"),
            "cannot use here, but expected cpu, cuda or",
        ),
        (("train", "tiny", "CartPole-v1", "--steps", "1.5e0"), "1.5e0"),
        (
            ("train", "tiny", "CartPole-v1", "--eval-episodes", "0"),
            "eval_episodes is 0, but expected 1 or more",
        ),
        (("train", "tiny", "CartPole-v1", "--stop-at", "-1"), "stop_at is -1, but expected 1 or more"),
        (("train", "tiny", "CartPole-v1", "--log-every", "-1"), "log_every is -1, but expected 0 or more"),
        (
            ("train", "ppo", "CartPole-v1", "--max-episode-steps", "0"),
            "max_episode_steps is 0, but at least 1",
        ),
        (("plot", ".", "--level", "2"), "plot: level is 2.0, but expected a number between 0 and 1"),
        (("eval", "nowhere"), "nowhere is not a run directory: it has no config.json"),
        (("plot", "nowhere"), "nowhere does not exist"),
        (("plot",), "runs"),
        (("bench", "opps"), "no benchmark 'opps'. Did you mean 'ops'?"),
        (("list", "alggos"), "algos"),
    ],
)
def test_a_mistake_is_answered_with_what_was_meant(
    argv: tuple[str, ...], message: str, pywm: Commands
) -> None:
    result = pywm(*argv)
    assert result.code == 2, explain(result)
    assert result.out == ""
    assert message in " ".join(result.err.replace("│", " ").split()), explain(result)
    assert "Traceback" not in result.err
    assert not (pywm.folder / "runs").exists()  # and nothing was left behind


def test_debug_shows_the_traceback(pywm: Commands) -> None:
    result = pywm("train", "zzz", "CartPole-v1", "--debug")
    assert result.code == 1
    assert "Traceback" in result.err


# Train.


def test_train_prints_the_run_and_explains_on_stderr(pywm: Commands) -> None:
    result = pywm("train", "tiny", "CartPole-v1", "--steps", "1_6", "--seed", 3)
    assert result.code == 0, explain(result)
    run = pywm.folder / result.out.strip()
    assert (run / "config.json").exists()
    assert run.parent == pywm.folder / "runs/CartPole-v1/tiny"
    assert run.name.startswith("3-")
    assert "preset cartpole: expect about 20, whatever it does" in result.err
    assert "tiny on CartPole-v1, seed 3, cpu" in result.err


def test_integers_may_be_written_with_an_exponent(pywm: Commands) -> None:
    flags = ("--steps", "1.6e1", "--seed=1e1", "--checkpoint_every", "1e2", "--lr", "1e-3")
    result = pywm("train", "tiny", "CartPole-v1", *flags)
    assert result.code == 0, explain(result)
    about = json.loads((pywm.folder / result.out.strip() / "config.json").read_text())
    assert [about["config"][name] for name in ("steps", "seed", "lr")] == [16, 10, 1e-3]
    assert about["run"]["checkpoint_every"] == 100
    again = pywm("train", "tiny", "CartPole-v1", "--seed", "1e1", "--resume", "--steps", "3.2e1")
    assert again.code == 0, explain(again)
    assert "resumed at 16" in again.err


def test_train_says_once_that_there_are_no_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pywm.ops import _native

    argv = ["train", "ppo", "CartPole-v1", "--steps", "64", "--device", "cpu", "--run-dir"]
    assert cli.main([*argv, str(tmp_path / "with")]) == 0
    assert "compiled kernels are not used" not in capsys.readouterr().err
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "why_not", "no compiler; mend it with: a command")
    # The ops' fast entries were bound when they were imported: they still run here, and only the words are tested.
    assert cli.main([*argv, str(tmp_path / "without")]) == 0
    said = capsys.readouterr().err
    assert said.count("compiled kernels are not used: no compiler; mend it with: a command\n") == 1


def test_a_preset_is_chosen_by_environment_and_flags_win(pywm: Commands) -> None:
    def config(*argv: object) -> dict[str, Any]:
        result = pywm("train", "tiny", *argv, "--steps", 8)
        assert result.code == 0, explain(result)
        return json.loads((pywm.folder / result.out.strip() / "config.json").read_text())["config"]

    assert config("CartPole-v1")["lr"] == 0.25
    assert config("CartPole-v1", "--lr", 3e-4)["lr"] == 3e-4
    assert config("CartPole-v1", "--preset", "slow")["lr"] == 0.01
    assert config("CartPole-v1", "--preset=slow", "--num_envs=4")["num_envs"] == 4


BROKEN = """
import gymnasium, numpy as np

class Broken(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Discrete(2)
    t = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        if self.t == 9:
            raise RuntimeError("the robot fell over")
        return np.zeros(2, np.float32), 0.0, False, False, {}

    def get_state(self):
        from pywm.types import State
        return State({}, {"t": self.t})

    def set_state(self, state):
        self.t = state.data["t"]
"""


def test_an_environment_s_failure_is_exit_code_3(pywm: Commands) -> None:
    (pywm.folder / "my_pkg.py").write_text(BROKEN)
    result = pywm("train", "tiny", "my_pkg:Broken", "--checkpoint-every", 8, "--run-dir", "run")
    assert result.code == 3, explain(result)
    assert "my_pkg:Broken raised RuntimeError in step: the robot fell over" in result.err
    assert "Traceback" not in result.err
    assert "the last good checkpoint is run/checkpoints/step_" in result.err
    assert "pywm train tiny my_pkg:Broken --run-dir run --resume" in result.err


@pytest.mark.parametrize(("gpu", "warned"), [(True, True), (False, False)])
def test_a_gpu_that_is_left_idle_is_told(
    gpu: bool,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "a GPU")
    argv = [
        "train",
        "ppo",
        "CartPole-v1",
        "--steps",
        "64",
        "--run-dir",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    assert cli.main(argv) == 0
    err = capsys.readouterr().err
    found = "warning: training runs on the CPU, although torch sees a GPU: --device cuda uses it" in err
    assert found == warned


def test_a_terminal_gets_the_live_screen(pywm: Commands) -> None:
    main, other = pty.openpty()
    result = pywm("train", "tiny", "CartPole-v1", "--steps", 16, err=os.ttyname(other))
    os.close(other)
    shown = b""
    while chunk := _read(main):
        shown += chunk
    os.close(main)
    text = shown.decode()
    assert result.code == 0, text
    for part in (
        "tiny · CartPole-v1 · seed 0 · cpu",
        "16 / 16 env steps",
        "ETA",
        "steps/s",
        "finished at 16",
    ):
        assert part in text
    assert "16/16 env steps" not in text  # the plain line


def _read(descriptor: int) -> bytes:
    os.set_blocking(descriptor, False)
    try:
        return os.read(descriptor, 65536)
    except (BlockingIOError, OSError):
        return b""


def test_evaluations_write_films_into_the_run(pywm: Commands) -> None:
    pytest.importorskip("pygame")
    result = pywm(
        *("train", "tiny", "CartPole-v1", "--steps", 80, "--run-dir", "run"),
        *("--eval-every", 40, "--eval-episodes", 1, "--video"),
    )
    assert result.code == 0, explain(result)
    with Image.open(pywm.folder / "run/videos/eval_00000040.gif") as image:
        assert image.n_frames > 2
    with_extra = bool(list((pywm.folder / "run/videos").glob("*.mp4")))
    assert with_extra == _has("imageio_ffmpeg")


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


# Eval.


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in for an algorithm, in this process."""
    from pywm import algos

    folder = Path(__file__).parents[1] / "training/algos"
    monkeypatch.setattr(algos, "__path__", [*algos.__path__, str(folder)])
    assert "tiny" in algos.algorithms()
    yield
    sys.modules.pop("pywm.algos.tiny", None)


def test_eval_prints_one_json_object(pywm: Commands, trained: Path) -> None:
    result = pywm("eval", trained, "--episodes", 3, "--json", "--seed", 5)
    assert result.code == 0, explain(result)
    summary = json.loads(result.out)
    assert result.out.count("\n") == 1
    assert summary["episodes"] == len(summary["returns"]) == 3
    assert summary["return_mean"] == pytest.approx(sum(summary["returns"]) / 3)
    assert summary["length_mean"] == summary["return_mean"]  # CartPole pays 1 a step
    assert summary["return_std"] >= 0
    assert (summary["seed"], summary["algo"], summary["env"]) == (5, "tiny", "CartPole-v1")
    assert json.loads(pywm("eval", trained, "--episodes", 3, "--json", "--seed", 5).out) == summary
    assert json.loads(pywm("eval", trained, "--episodes", 3, "--json", "--seed", 6).out) != summary


def test_eval_speaks_to_people_too(pywm: Commands, trained: Path) -> None:
    result = pywm("eval", trained, "--episodes", 2)
    assert result.code == 0
    assert result.out.startswith("tiny on CartPole-v1: return ")
    assert "over 2 episodes" in result.out


def test_eval_stops_where_no_episode_ends(pywm: Commands, trained: Path) -> None:
    import shutil

    shutil.copytree(trained, pywm.folder / "run")
    path = pywm.folder / "run/config.json"
    path.write_text(path.read_text().replace("CartPole-v1", "my_pkg:Endless"))
    (pywm.folder / "my_pkg.py").write_text(BROKEN.replace("Broken", "Endless").replace("== 9", "< 0"))
    result = pywm("eval", "run", "--episodes", 2, "--max-steps", "5e2")
    assert result.code == 3, explain(result)
    assert result.err.startswith("pywm: evaluate: an episode has not ended after 500 steps (max_steps)")
    assert result.out == ""


def test_eval_tells_on_stderr_how_it_goes(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: None
) -> None:
    from pywm.training.log import EpisodeLines

    monkeypatch.setattr(EpisodeLines.__init__, "__defaults__", (0.0,))  # a line after each step
    assert cli.main(["eval", str(trained), "--episodes", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["episodes"] == 2
    assert err.startswith("0/2 episodes   2 steps   ")
    assert "1/2 episodes" in err


def test_eval_writes_a_gif(pywm: Commands, trained: Path) -> None:
    pytest.importorskip("pygame")
    for name in ("a.gif", "new/folder/a.gif"):
        result = pywm("eval", trained, "--episodes", 1, "--json", "--gif", name)
        assert result.code == 0, explain(result)
        assert json.loads(result.out)["gif"] == name
        with Image.open(pywm.folder / name) as image:
            assert image.n_frames >= 8
    (pywm.folder / "folder.gif").mkdir()
    result = pywm("eval", trained, "--gif", "folder.gif")
    assert result.code == 2, explain(result)
    assert "eval: cannot write folder.gif: it is a directory" in result.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--episodes", 0), "eval: episodes is 0, but expected 1 or more"),
        (("--max-steps", 0), "eval: max_steps is 0, but expected 1 or more"),
        (("--num-envs", 0), "eval: num_envs is 0, but expected 1 or more"),
        (("--seed", -1), "eval: seed is -1, but expected a number in [0, 2147483647]"),
        (("--gif", "x.foo"), "eval: gif is 'x.foo', but expected a file name that ends in .gif"),
        (("--gif", "/dev/null/x.gif"), "eval: cannot write /dev/null/x.gif: "),
        (("--video", "x.gif"), "eval: video is 'x.gif', but expected a file name that ends in .mp4"),
        (("--checkpoint", "step_00000001"), "no checkpoint 'step_00000001' in"),
        (("--checkpoint", "best"), "run/checkpoints; there are step_00000080"),
        (("--device", "cuda:99"), "GPUs; use --device cpu"),
        (("--device", "gpu"), "eval: device is 'gpu', but expected cpu, cuda or cuda:<number>"),
        (("--device", "meta"), "eval: device is 'meta', which torch"),
    ],
)
def test_eval_refuses(argv: tuple[object, ...], message: str, pywm: Commands, trained: Path) -> None:
    result = pywm("eval", trained, "--json", *argv)
    assert result.code == 2, explain(result)
    assert message in result.err
    assert result.out == ""


def test_eval_refuses_files_that_can_hold_code(pywm: Commands) -> None:
    import torch

    torch.save({"w": torch.ones(1)}, pywm.folder / "model.pt")
    result = pywm("eval", "model.pt")
    assert result.code == 2
    assert "model.pt: refused" in result.err
    assert "can hold code" in result.err


def test_eval_of_a_checkpoint_that_does_not_fit(pywm: Commands, trained: Path) -> None:
    import shutil

    shutil.copytree(trained, pywm.folder / "run")
    path = pywm.folder / "run/config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"config": about["config"] | {"hidden": 99}}))
    result = pywm("eval", "run")
    assert result.code == 2
    assert "does not fit the agent: weight has another shape" in result.err
    path.write_text(json.dumps(about | {"config": about["config"] | {"hiden": 99}}))
    assert "Config has no field 'hiden'. Did you mean 'hidden'?" in pywm("eval", "run").err


EVIL = "open('code-was-run', 'w')\nfrom pywm.envs.toy import Counter as Env\n"


@pytest.mark.parametrize(
    ("env", "cwd"),
    [
        ("kx.evil:Env", "."),
        ("kx.evil.deep:Env", "."),
        ("kx.package.deep:Env", "."),
        ("kx.linked:Env", "."),
        ("alias.evil:Env", "."),
        ("evil:Env", "kx"),
    ],
)
def test_a_run_that_brings_code_is_refused_before_any_of_it_runs(
    env: str, cwd: str, pywm: Commands, trained: Path
) -> None:
    import shutil

    folder = pywm.folder
    run = Path(shutil.copytree(trained, folder / "kx"))
    (run / "package").mkdir()
    for name in ("__init__.py", "evil.py", "package/__init__.py", "package/deep.py"):
        (run / name).write_text(EVIL)
    (folder / "elsewhere.py").write_text(EVIL)
    (run / "linked.py").symlink_to(folder / "elsewhere.py")
    (folder / "alias").symlink_to(run)
    about = json.loads((run / "config.json").read_text()) | {"env": env}
    (run / "config.json").write_text(json.dumps(about))
    where, pywm.folder = os.path.relpath(run, folder / cwd), folder / cwd
    commands = [("eval", where), ("train", "tiny", env, "--resume", "--run-dir", where)]
    for argv in commands:
        result = pywm(*argv)
        assert not list(folder.rglob("code-was-run"))
        assert result.code == 2, explain(result)
        assert f"{where}: refused, its environment {env!r} would be imported from" in result.err
        assert "inside the run directory" in result.err
        assert "Traceback" not in result.err


def test_a_run_in_an_environment_of_one_s_own_is_evaluated_and_resumed(pywm: Commands) -> None:
    (pywm.folder / "my_pkg").mkdir()
    (pywm.folder / "my_pkg/envs.py").write_text("from pywm.envs.toy import Counter as Env\n")
    result = pywm("train", "tiny", "my_pkg.envs:Env", "--steps", 16)
    assert result.code == 0, explain(result)
    run = result.out.strip()
    assert pywm("eval", run, "--episodes", 1).code == 0
    again = pywm("train", "tiny", "my_pkg.envs:Env", "--resume", "--run-dir", run, "--steps", 32)
    assert again.code == 0, explain(again)
    assert "resumed at 16" in again.err


def test_load_gives_agent_and_environment_in_three_lines(trained: Path, tiny: None) -> None:
    import gymnasium

    import pywm
    from pywm.training import checkpoint

    agent, env = pywm.load(trained)
    obs, state = env.reset(seed=0), None
    action, state = agent.act(obs, state)

    assert env.step(action).reward.shape == (1,)
    saved = checkpoint.load(trained / "checkpoints").state.tensors["agent/weight"]
    assert agent.weight.tolist() == saved.tolist()
    env.close()
    _, env = pywm.load(trained, env=lambda: gymnasium.make("CartPole-v1"), num_envs=3, which="step_00000080")
    assert env.num_envs == 3
    env.close()


# The others.


def test_plot_prints_the_picture_s_name(pywm: Commands, trained: Path) -> None:
    pytest.importorskip("matplotlib")
    result = pywm("plot", trained, "--out", "a.png", "--metric", "loss/tiny")
    assert (result.code, result.out) == (0, "a.png\n"), explain(result)
    with Image.open(pywm.folder / "a.png") as image:
        assert image.format == "PNG"
    assert "they have" in pywm("plot", trained, "--metric", "nonsense").err


def test_list_tells_what_there_is(pywm: Commands) -> None:
    assert "tiny" in pywm("list", "algos").out
    assert "A deterministic stand-in" in pywm("list", "algos").out
    assert "CartPole-v1: about 20, whatever it does" in pywm("list", "presets").out
    assert "CartPole-v1" in pywm("list", "envs").out.splitlines()
    everything = pywm("list")
    assert everything.code == 0
    assert "algos:" in everything.out


def test_check_env_reports_and_its_exit_code_says_the_outcome(pywm: Commands) -> None:
    good = pywm("check-env", "CartPole-v1")
    assert good.code == 0, explain(good)
    assert "CartPole-v1" in good.out
    (pywm.folder / "my_pkg.py").write_text(BROKEN)
    bad = pywm("check-env", "my_pkg:Broken")
    assert bad.code == 3, explain(bad)
    assert "the robot fell over" in bad.out + bad.err


TWO_CAMERAS = """
import gymnasium, numpy as np
from gymnasium import spaces

class TwoCameras(gymnasium.Env):
    observation_space = spaces.Dict(
        left=spaces.Box(0, 255, (16, 16, 3), np.uint8), right=spaces.Box(0, 255, (32, 32, 3), np.uint8)
    )
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, bool(self.np_random.random() < 0.2), False, {}
"""


def test_check_env_says_what_dreamer_sees(pywm: Commands) -> None:
    result = pywm("check-env", "CartPole-v1")
    assert "dreamer_v3 sees\n  obs " in result.out
    for text in (
        "vector of 4 numbers (float32), as symlogs",
        "categorical of 2",
        "the replay of 100,000 rows takes",
        "preset cartpole: expect",
    ):
        assert text in result.out
    found = json.loads(pywm("check-env", "CartPole-v1", "--json").out)
    assert found["ok"] is True
    assert found["facts"]["vector keys"] == "obs"
    assert {check["status"] for check in found["checks"]} == {"ok"}
    assert found["dreamer_v3"]["action"] == "categorical of 2"


def test_check_env_says_what_is_refused_and_why(pywm: Commands) -> None:
    (pywm.folder / "my_pkg.py").write_text(TWO_CAMERAS)
    result = pywm("check-env", "my_pkg:TwoCameras")
    assert result.code == 0, explain(result)  # the environment keeps its promises
    assert (
        "dreamer_v3 refuses it: dreamer_v3: WorldModel: images have the sizes [(16, 16), (32, 32)]"
        in result.out
    )
    found = json.loads(pywm("check-env", "my_pkg:TwoCameras", "--json").out)
    assert "pictures of one size were expected" in found["dreamer_v3"]["refused"]


def test_a_first_impression_of_the_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "__file__", "/nowhere/pywm/cli.py")  # no checkout around it
    assert cli.main(["bench"]) == 0
    assert "128 x 64" in capsys.readouterr().out
    assert cli.main(["bench", "peers"]) == 2
    assert "needs a checkout" in capsys.readouterr().err


def test_a_checkout_s_benchmarks_get_their_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/run.py").write_text("import sys; print(sys.argv[1:]); sys.exit(5)")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "pywm"\n')
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "pywm/cli.py"))
    assert cli.main(["bench", "ops", "--json", "x"]) == 5
    assert "['--json', 'x']" in capfd.readouterr().out


@pytest.mark.parametrize("project", [None, '[project]\nname = "pywm-tools"\n'])
def test_benchmarks_of_somebody_else_are_not_run(
    project: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "benchmarks").mkdir()
    for name in ("run", "peers"):
        (tmp_path / f"benchmarks/{name}.py").write_text("print('somebody else was run')")
    if project is not None:
        (tmp_path / "pyproject.toml").write_text(project)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "pywm/cli.py"))
    monkeypatch.setattr(cli, "_bench_ops", lambda: ["ours"])
    assert cli.main(["bench"]) == 0
    assert cli.main(["bench", "peers"]) == 2
    out, err = capfd.readouterr()
    assert out == "ours\n"
    assert "needs a checkout" in err


# Doctor.


def test_doctor_finds_this_machine_healthy(pywm: Commands) -> None:
    result = pywm("doctor")
    assert result.code == 0, explain(result)
    for part in (
        "pywm 0.",
        "torch 2.",
        "gymnasium 1.",
        "C++ kernels",
        "CUDA kernels",
        "self-test",
        "GiB free",
    ):
        assert part in result.out
    findings = json.loads(pywm("doctor", "--json").out)["findings"]
    assert {f["what"] for f in findings} >= {"C++ kernels", "atari", "plot", "disk"}


def test_doctor_names_what_is_missing_and_the_command_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)
    assert doctor._extra("wandb") == ("wandb", "--", "not installed", 'pip install "pywm[wandb]"')


def test_doctor_sees_missing_kernels_as_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pywm.ops import Backend

    missing = Backend("reference", "no compiled module; mend it with: pip install it")
    monkeypatch.setattr(doctor.pywm, "backend", lambda: {"cpu": missing, "cuda": missing})
    assert cli.main(["doctor"]) == 2
    assert "C++ kernels      !!   no compiled module  ->  pip install it" in capsys.readouterr().out


def test_doctor_s_self_test_catches_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from pywm.testing import opinfo

    if not doctor._native.has_backend("cpu"):
        pytest.skip("needs the compiled kernels")
    assert [f.mark for f in doctor._self_test()] == ["OK"]

    def off_by_a_little(self: Any, sample: Any) -> tuple[Any, ...]:
        return tuple(x * 1.001 for x in self.call(sample))

    monkeypatch.setattr(opinfo.OpInfo, "op", off_by_a_little)
    [finding] = doctor._self_test()
    assert finding.mark == "!!"
    assert "gae on cpu differs from its reference" in finding.text


@pytest.mark.parametrize(
    ("versions", "text"),
    [
        ({"mujoco": "4.0.0", "dm-control": "1.0.50"}, "mujoco 4.0.0 breaks dm-control 1.0.50"),
        ({"gymnasium": "0.29.1"}, "gymnasium 0.29.1 has another autoreset"),
        ({"gymnasium": "1.0.0"}, "gymnasium 1.0.0 has another autoreset"),
        ({"mujoco": "3.17.0", "dm-control": "1.0.50", "gymnasium": "1.4.0"}, None),
        ({"mujoco": "4.0.0"}, None),
    ],
)
def test_doctor_knows_versions_that_do_not_work_together(
    versions: dict[str, str], text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.machine, "version", versions.get)
    found = doctor._bad_combinations()
    assert [f.mark for f in found] == (["!!"] if text else [])
    assert text is None or text in found[0].text


# Exceptions.


def failing(error: BaseException) -> Callable[[list[str]], int]:
    def command(argv: list[str]) -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "pywm: interrupted"),
        (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"), 2, "--device cpu"),
    ],
)
def test_exceptions_become_messages(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "list", (failing(error), "", ""))
    assert cli.main(["list"]) == code
    assert message in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "list", (failing(RuntimeError("a bug")), "", ""))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["list"])


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    code = f'{sys.executable} -c \'import sys, pywm.cli as c; sys.exit(c.main(["list", "envs"]))\''
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{code} | true"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
