"""The command ``pywm``: train, eval, plot, bench, check-env, list, doctor.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 2 the user's mistake, 3 the
environment's, 4 a numerical stop, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pywm.config import from_json, suggest
from pywm.errors import PywmError, UserError
from pywm.training.evaluate import MAX_STEPS

__all__ = ["main"]

log = logging.getLogger("pywm.cli")

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments; ``sys.argv[1:]`` by default.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    logger = logging.getLogger("pywm")
    handler, level = _Stderr(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        return _dispatch(argv)
    except PywmError as error:
        if debug:
            raise
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout (head, less) has seen enough; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except RuntimeError as error:
        if debug or "out of memory" not in str(error):
            raise
        _complain(f"{error}\nUse fewer or smaller batches (--batch-size, --num-envs) or --device cpu.")
        return 2
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _dispatch(argv: list[str]) -> int:
    from pywm.ops import _native

    if refused := _native.refused_setting():
        raise UserError(refused)
    if not argv or argv[0] in ("-h", "--help", "help"):
        _out(_help())
        return 0
    if argv[0] in ("-V", "--version", "version"):
        from pywm._version import __version__

        _out(f"pywm {__version__}")
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        raise UserError(f"no command {command!r}.{suggest(command, COMMANDS)}")
    return COMMANDS[command][0](rest)


def _help() -> str:
    lines = ["usage: pywm COMMAND ...", "", "World-model reinforcement learning at kernel speed.", ""]
    lines += [f"  {usage}\n      {text}" for _, usage, text in COMMANDS.values()]
    lines += ["", "pywm COMMAND --help tells more. --debug shows the traceback of an error. --version."]
    return "\n".join(lines)


def _out(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _complain(text: str) -> None:
    sys.stderr.write(f"pywm: {text}\n")


class _Stderr(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at the moment, for the live screen redirects it."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):
            prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            sys.stderr.write(f"{prefix}{self.format(record)}\n")


@dataclasses.dataclass
class _Given:
    """The arguments that decide which defaults the others have."""

    algo: str
    env: str | None
    preset: str | None = None
    seed: int | None = None
    run_dir: str | None = None
    runs: str = "runs"
    resume: bool = False


def _given(argv: list[str]) -> _Given:
    given = _Given(argv[0], argv[1] if len(argv) > 1 and not argv[1].startswith("-") else None)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        name = flag.replace("_", "-")
        if not equals and i + 1 < len(argv):
            value = argv[i + 1]
        if name in ("--preset", "--run-dir", "--runs") and value:
            setattr(given, name[2:].replace("-", "_"), value)
        elif name == "--seed" and _integer(value).lstrip("-").replace("_", "").isdigit():
            given.seed = int(_integer(value))
        elif name == "--resume":
            given.resume = True
    return given


def _train(argv: list[str]) -> int:
    from pywm import algos

    helping = "-h" in argv or "--help" in argv
    if not argv or argv[0].startswith("-"):
        names = ", ".join(algos.algorithms())
        usage = (
            "usage: pywm train ALGO ENV [--flags]\n\n"
            f"ALGO is one of {names}; pywm train ALGO --help lists its flags."
        )
        if helping:
            _out(usage)
            return 0
        raise UserError(f"train: expected ALGO ENV before any flag\n{usage}")
    given = _given(argv)
    module = algos.get(given.algo)
    if given.env is None and not helping:
        raise UserError(f"train: expected ALGO ENV, as in: pywm train {given.algo} CartPole-v1")
    base, options, note = _defaults(module, given)
    config, options, device = _parse_train(argv, given, base, options)
    assert given.env is not None
    return _run_training(module, given, config, options, _device("train", device), note, argv)


def _defaults(module: Any, given: _Given) -> tuple[Any, Any, str]:
    """Return the configuration and the run options before flags, and where they come from."""
    from pywm import algos
    from pywm.training.directory import KEPT_OPTIONS
    from pywm.training.run import RunOptions

    config, options, note = module.Config(), RunOptions(runs=given.runs), ""
    saved = None
    if given.resume and given.env is not None:
        saved = _saved_run(given, config)
    if saved is not None:
        folder, about = saved
        config = from_json(module.Config, about["config"])
        options = dataclasses.replace(options, run_dir=str(folder))
        for name, value in about.get("run", {}).items():
            if name in KEPT_OPTIONS and isinstance(value, int):
                setattr(options, name, value)
        note = f"settings of {folder}"
    chosen = (
        algos.choose_preset(module, given.env or "", given.preset) if saved is None or given.preset else None
    )
    if chosen is not None:
        name, preset = chosen
        config = dataclasses.replace(config, **preset.config)
        note = f"preset {name}: expect {preset.expected}"
    elif saved is None:
        note = f"no preset for {given.env}; the defaults of {given.algo}"
    return config, options, note


def _saved_run(given: _Given, config: Any) -> tuple[Path, dict[str, Any]] | None:
    from pywm.training.directory import find_run, read_run

    seed = config.seed if given.seed is None else given.seed
    folder = (
        Path(given.run_dir)
        if given.run_dir
        else find_run(given.runs, algo=given.algo, env=given.env or "", seed=seed)
    )
    if folder is None or not (folder / "config.json").exists():
        return None
    about = read_run(folder)
    # Of another algorithm or environment: Run.open has the words for it.
    return (folder, about) if (about["algo"], about["env"]) == (given.algo, given.env) else None


def _parse_train(argv: list[str], given: _Given, base: Any, options: Any) -> tuple[Any, Any, str]:
    import tyro

    from pywm.training.run import RunOptions

    flat = tyro.conf.arg(name="")
    arguments = dataclasses.make_dataclass(
        "Train",
        [
            ("algo", tyro.conf.Positional[str], dataclasses.field(default=given.algo)),
            ("env", tyro.conf.Positional[str], dataclasses.field(default=given.env or "ENV")),
            (
                "preset",
                Annotated[str | None, tyro.conf.arg(help=_PRESET_HELP)],
                dataclasses.field(default=None),
            ),
            ("device", Annotated[str, tyro.conf.arg(help=_DEVICE_HELP)], dataclasses.field(default="auto")),
            ("config", Annotated[type(base), flat], dataclasses.field(default_factory=lambda: base)),
            ("run", Annotated[RunOptions, flat], dataclasses.field(default_factory=lambda: options)),
        ],
    )
    words = _spell_out(argv, type(base), RunOptions)
    parsed: Any = tyro.cli(arguments, args=words, prog="pywm train", description=f"Train {given.algo}.")
    return parsed.config, parsed.run, parsed.device


def _spell_out(argv: list[str], *classes: type) -> list[str]:
    """Write 1e6 as 1000000 behind the flags of integer fields: tyro reads nothing else there."""
    hints = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    integers = {name for name, hint in hints.items() if hint is int or int in typing.get_args(hint)}
    words, wanted = [], False
    for word in argv:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            wanted = flag[2:].replace("-", "_") in integers
            words.append(f"{flag}={_integer(value)}" if wanted and equals else word)
        else:
            words.append(_integer(word) if wanted else word)
    return words


def _integer(text: str) -> str:
    """Spell out an integer like 1e6; anything else stays as it is, for others to judge."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?[eE]\+?[0-9]{1,2}", text):
        return text
    value = Decimal(text)  # exact, where a float is not always
    return str(int(value)) if value == value.to_integral_value() else text


_PRESET_HELP = "settings made for a family of environments; by default the one that suits ENV"
_DEVICE_HELP = "cpu, cuda, cuda:1; auto is the GPU where there is one"


def _device(command: str, name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    expected = "but expected cpu, cuda or cuda:<number>"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{command}: device is {name!r}, {expected}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(
                f"{command}: device is {name!r}, but torch {torch.__version__} sees {count} GPUs; use --device cpu"
            )
    elif device.type != "cpu":
        # torch knows the names of devices that are not here (mps, xpu), or that hold no data (meta).
        try:
            torch.zeros(1, device=device).cpu()
        except Exception as error:  # each kind of device has another
            raise UserError(
                f"{command}: device is {name!r}, which torch {torch.__version__} cannot use here, {expected}"
            ) from error
    return name


def _run_training(
    module: Any, given: _Given, config: Any, options: Any, device: str, note: str, argv: list[str]
) -> int:
    import torch

    from pywm.config import to_json
    from pywm.envs import make
    from pywm.ops import _native, backend
    from pywm.training.run import Run

    env = given.env
    assert env is not None
    # One on trial first, so that a typo leaves no run directory behind.
    make(env, 1, max_episode_steps=getattr(config, "max_episode_steps", None)).close()
    log.info("%s on %s, seed %d, %s", given.algo, env, config.seed, device)
    log.info("%s", note)
    if torch.device(device).type == "cpu" and torch.cuda.is_available():
        log.warning("training runs on the CPU, although torch sees a GPU: --device cuda uses it")
    # Of this device alone: a training on the CPU wakes no GPU.
    served = backend(torch.empty(0, device=device))
    if served.name == "reference":
        _native.tell(served.why)
    with Run.open(
        options,
        algo=given.algo,
        env=env,
        seed=config.seed,
        config=to_json(config),
        total_steps=getattr(config, "total_steps", config.steps),
        may_change=getattr(module.Config, "may_change", ("steps",)),
        device=device,
        command=shlex.join(["pywm", "train", *argv]),
    ) as run:
        module.train(config, env, run=run, device=device)
    _out(str(run.dir))
    return INTERRUPTED if run.interrupted else 0


@dataclasses.dataclass
class _Eval:
    """Play episodes with the agent of a run and report their returns."""

    run: str
    """the run's directory"""
    episodes: int = 20
    """how many to play"""
    max_steps: int = MAX_STEPS
    """the most agent decisions in an episode; one that goes on is an error of the environment (exit code 3)"""
    seed: int | None = None
    """of the environments; by default one that training did not use"""
    checkpoint: str = "latest"
    """latest, best, or a name like step_00050000"""
    stochastic: bool = False
    """sample actions instead of taking the most likely"""
    num_envs: int = 8
    """parallel environments"""
    device: str = "cpu"
    """where the networks run"""
    json: bool = False
    """print one JSON object"""
    gif: str | None = None
    """write the first episode as a GIF to this file"""
    video: str | None = None
    """write the first episode as an mp4 to this file (extra "video")"""


def _eval(argv: list[str]) -> int:
    from pywm import algos
    from pywm.training import checkpoint, report
    from pywm.training.directory import read_run
    from pywm.training.evaluate import EVAL_SEED, evaluate
    from pywm.training.log import EpisodeLines

    arguments = _parse(_Eval, "pywm eval", argv)
    for name in ("episodes", "max_steps", "num_envs"):
        if getattr(arguments, name) < 1:
            raise UserError(f"eval: {name} is {getattr(arguments, name)}, but expected 1 or more")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**31:
        raise UserError(f"eval: seed is {arguments.seed}, but expected a number in [0, {2**31 - 1}]")
    filming = arguments.gif or arguments.video
    if arguments.gif:
        report.check_film("gif", arguments.gif)
    if arguments.video:
        report.check_film("video", arguments.video)
    agent, envs = algos.load(
        arguments.run,
        num_envs=min(arguments.num_envs, arguments.episodes),
        which=arguments.checkpoint,
        device=_device("eval", arguments.device),
        render_mode="rgb_array" if filming else None,
    )
    frames: list[Any] | None = [] if filming else None
    seed = EVAL_SEED if arguments.seed is None else arguments.seed
    checkpoint.seed_rng(seed)
    try:
        result = evaluate(
            agent,
            envs,
            episodes=arguments.episodes,
            seed=seed,
            greedy=not arguments.stochastic,
            frames=frames,
            max_steps=arguments.max_steps,
            progress=EpisodeLines(arguments.episodes).show,
        )
    finally:
        envs.close()
    if filming and not frames:
        raise UserError(f"eval: {envs.name} gave no picture to render")
    written = {}
    try:
        if arguments.gif:
            written["gif"] = str(report.write_gif(frames or [], arguments.gif))
        if arguments.video:
            written["video"] = str(report.write_video(frames or [], arguments.video))
    except OSError as error:
        raise UserError(f"eval: cannot write the film: {error}") from error
    about = read_run(arguments.run)
    if arguments.json:
        summary = {
            "run": arguments.run,
            "algo": about["algo"],
            "env": about["env"],
            **result._asdict(),
            **written,
        }
        _out(json.dumps(summary))
    else:
        _out(
            f"{about['algo']} on {about['env']}: return {result.return_mean:.2f} ± {result.return_std:.2f} "
            f"over {result.episodes} episodes (length {result.length_mean:.1f}, seed {result.seed})"
        )
        for path in written.values():
            log.info("wrote %s", path)
    return 0


@dataclasses.dataclass
class _Dream:
    """Show what a run's world model imagines beside what happened: it looks at the first rows of an episode, then goes on
    under the actions that were taken. Pictures become a strip (truth, prediction, error), vectors curves; both a GIF, too.
    """

    run: str
    """a run directory of an algorithm with a world model"""
    steps: int = 45
    """rows to imagine"""
    context: int = 5
    """rows to look at first"""
    sequences: int = 3
    """episodes"""
    seed: int | None = None
    """of the environments and the samples; by default one that training did not use"""
    checkpoint: str = "latest"
    """latest, best, or a name like step_00050000"""
    device: str = "cpu"
    """where the networks run"""
    out: str | None = None
    """folder of the files; RUN/dreams by default"""


def _dream(argv: list[str]) -> int:
    from pywm import algos
    from pywm.training import checkpoint
    from pywm.training.dream import dream, write_dream
    from pywm.training.evaluate import EVAL_SEED

    arguments = _parse(_Dream, "pywm dream", argv)
    if arguments.sequences < 1:
        raise UserError(f"dream: sequences is {arguments.sequences}, but expected 1 or more")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**31:
        raise UserError(f"dream: seed is {arguments.seed}, but expected a number in [0, {2**31 - 1}]")
    agent, envs = algos.load(
        arguments.run,
        num_envs=arguments.sequences,
        which=arguments.checkpoint,
        device=_device("dream", arguments.device),
    )
    seed = EVAL_SEED if arguments.seed is None else arguments.seed
    checkpoint.seed_rng(seed)
    try:
        if not hasattr(agent, "open_loop"):
            raise UserError(f"dream: {arguments.run} is of an algorithm without a world model")
        found = dream(agent, envs, steps=arguments.steps, context=arguments.context, seed=seed)
    finally:
        envs.close()
    folder = Path(arguments.run) / "dreams" if arguments.out is None else Path(arguments.out)
    for path in write_dream(found, folder):
        _out(str(path))
    errors = found.errors()
    ahead = [k for k in (1, 5, 15, 30, 45) if found.context + k <= len(errors)]
    figures = ", ".join(f"{errors[found.context + k - 1]:.4g} after {k}" for k in ahead)
    log.info("mean squared error: %.4g while looking; imagined: %s", errors[: found.context].mean(), figures)
    return 0


@dataclasses.dataclass
class _Plot:
    """Draw the learning curves of runs: every seed, their interquartile mean and its confidence band."""

    runs: tuple[str, ...]
    """run directories, or directories above them"""
    out: str = "curves.png"
    """the picture; its ending says the format"""
    metric: str = "return/mean"
    """key of the rows of metrics.jsonl"""
    x: Literal["env_steps", "hours"] = "env_steps"
    """what to draw against"""
    level: float = 0.95
    """of the confidence band"""


def _plot(argv: list[str]) -> int:
    from pywm.training import report

    arguments = _parse(_Plot, "pywm plot", argv)
    if not arguments.runs:
        raise UserError("plot: expected at least one run directory, as in: pywm plot runs/CartPole-v1")
    out = report.plot(
        arguments.runs, arguments.out, metric=arguments.metric, x=arguments.x, level=arguments.level
    )
    _out(str(out))
    return 0


@dataclasses.dataclass
class _CheckEnv:
    """Check an environment: spaces, dtypes, seeding, autoreset, final observations, bad actions. Say what DreamerV3 makes
    of it: how each key of the observation enters, the head of the actions, the settings, the memory of the replay.
    """

    env: str
    """an id like CartPole-v1 or my_pkg:MyEnv-v0"""
    json: bool = False
    """print one JSON object"""


def _check_env(argv: list[str]) -> int:
    arguments = _parse(_CheckEnv, "pywm check-env", argv)
    from pywm.envs import check_env

    report = check_env(arguments.env)
    views = _views(arguments.env)
    if arguments.json:
        _out(json.dumps({"env": arguments.env, "ok": report.ok, **dataclasses.asdict(report), **views}))
        return 0 if report.ok else 3
    _out(str(report))
    for algo, view in views.items():
        if "refused" in view:
            _out(f"{algo} refuses it: {view['refused']}")
            continue
        width = max(map(len, view))
        _out("\n".join([f"{algo} sees", *(f"  {key:{width}}  {text}" for key, text in view.items())]))
    return 0 if report.ok else 3


def _views(env: str) -> dict[str, dict[str, str]]:
    """Return what every algorithm that tells makes of an environment, or ``"refused"`` and why."""
    from pywm import algos

    views = {}
    for algo in algos.algorithms():
        module = algos.get(algo)
        if not hasattr(module, "describe"):
            continue
        try:
            config, _, note = _defaults(module, _Given(algo, env))
            views[algo] = {**module.describe(config, env), "settings": note}
        except PywmError as error:
            views[algo] = {"refused": str(error)}
    return views


@dataclasses.dataclass
class _List:
    """List what there is."""

    what: Literal["all", "algos", "envs", "presets"]
    """all where left out"""


def _list(argv: list[str]) -> int:
    what = _parse(_List, "pywm list", argv if argv else ["all"]).what
    sections = {"algos": _list_algos, "envs": _list_envs, "presets": _list_presets}
    if what != "all":
        _out("\n".join(sections[what]()))
        return 0
    for name in ("algos", "presets"):
        _out(f"{name}:\n" + "\n".join(f"  {line}" for line in sections[name]()))
    _out("envs: any gymnasium id, my_pkg:MyEnv-v0, ... (pywm list envs)")
    return 0


def _list_algos() -> list[str]:
    from pywm import algos

    lines = []
    for name in algos.algorithms():
        about = (algos.get(name).__doc__ or "").strip().splitlines()
        lines.append(f"{name:<14} {about[0] if about else ''}".rstrip())
    return lines


def _list_presets() -> list[str]:
    from pywm import algos

    return [
        f"{algo:<14} {name:<14} {', '.join(preset.envs)}: {preset.expected}"
        for algo in algos.algorithms()
        for name, preset in getattr(algos.get(algo), "PRESETS", {}).items()
    ]


def _list_envs() -> list[str]:
    import gymnasium

    import pywm.envs  # noqa: F401 - registers our own

    with contextlib.suppress(ImportError):
        import ale_py

        gymnasium.register_envs(ale_py)
    # Old ids stay registered only to name their successors.
    names = [name for name in gymnasium.registry if not name.startswith(("phys2d/", "tabular/", "GymV"))]
    return sorted(names)


def _bench(argv: list[str]) -> int:
    kinds = ("ops", "peers", "train", "sample-efficiency")
    usage = f"usage: pywm bench [{'|'.join(kinds)}] [--flags of that benchmark]"
    if argv and argv[0] in ("-h", "--help"):
        _out(usage)
        return 0
    kind, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("ops", argv)
    if kind not in kinds:
        raise UserError(f"no benchmark {kind!r}.{suggest(kind, kinds)}")
    root = Path(__file__).parent.parent
    script = root / "benchmarks" / ("run.py" if kind == "ops" else f"{kind.replace('-', '_')}.py")
    if _is_checkout(root) and script.exists():
        return subprocess.call([sys.executable, str(script), *rest])
    if kind != "ops":
        raise UserError(
            f"bench {kind} needs a checkout of the repository: it is benchmarks/{script.name} there"
        )
    for line in _bench_ops():
        _out(line)
    return 0


def _is_checkout(root: Path) -> bool:
    """Whether a folder is pywm's own: site-packages may hold somebody else's ``benchmarks``."""
    try:
        return (
            re.search(r'^name = "pywm"$', (root / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
            is not None
        )
    except (OSError, UnicodeDecodeError):
        return False


def _bench_ops() -> list[str]:
    """Time the ops against their references: a first impression where there is no checkout."""
    import time

    from pywm.testing.opinfo import OPS

    def median(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
        return sorted(times)[len(times) // 2]

    lines = [f"{'float32, forward':<20} {'shape':<12} {'kernel':>12} {'reference':>12}"]
    for op in OPS:
        shapes = [shape for shape in op.bench_shapes.values() if math.prod(shape) <= _QUICK_ELEMENTS]
        for shape in shapes:
            sample = op.sample(shape, next(iter(op.variants)))
            kernel, plain = median(lambda: op.op(sample)), median(lambda: op.reference(sample))  # noqa: B023
            times = f"{kernel * 1e6:9.1f} us {plain * 1e6:9.1f} us"
            lines.append(f"{op.name:<20} {' x '.join(map(str, shape)):<12} {times}   {plain / kernel:.1f}x")
    return lines


# Larger references take seconds.
_QUICK_ELEMENTS = 1 << 14


@dataclasses.dataclass
class _Doctor:
    """Say what is installed, what works, and which command mends what does not."""

    json: bool = False
    """print one JSON object"""


def _doctor(argv: list[str]) -> int:
    arguments = _parse(_Doctor, "pywm doctor", argv)
    from pywm import doctor
    from pywm.training import machine

    facts = machine.facts()
    findings = doctor.findings()
    if arguments.json:
        _out(json.dumps({"machine": facts, "findings": [finding._asdict() for finding in findings]}))
    else:
        heads = [
            f"{name} {facts[name]}"
            for name in ("pywm", "python", "torch", "numpy", "gymnasium")
            if name in facts
        ]
        _out("  ".join(heads))
        _out(f"{facts['cpu']}, {facts['cores']} cores, {facts['system']}")
        for finding in findings:
            mend = f"  ->  {finding.mend}" if finding.mend else ""
            _out(f"  {finding.what:<16} {finding.mark}   {finding.text}{mend}")
    return 2 if any(finding.mark == "!!" for finding in findings) else 0


def _parse(cls: type, prog: str, argv: list[str]) -> Any:
    import tyro

    return tyro.cli(cls, args=_spell_out(argv, cls), prog=prog, config=(tyro.conf.PositionalRequiredArgs,))


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {
    "train": (_train, "pywm train ALGO ENV [--resume | --fresh] [--flags]", "train an agent"),
    "eval": (
        _eval,
        "pywm eval RUN [--episodes N] [--json] [--gif FILE]",
        "play episodes with a trained agent",
    ),
    "dream": (
        _dream,
        "pywm dream RUN [--steps N] [--context N]",
        "show what a run's world model imagines beside what happened",
    ),
    "plot": (_plot, "pywm plot RUN... [--out curves.png]", "draw learning curves with confidence bands"),
    "bench": (
        _bench,
        "pywm bench [ops|peers|train|sample-efficiency]",
        "measure speed, or returns against real steps",
    ),
    "check-env": (
        _check_env,
        "pywm check-env ID [--json]",
        "check an environment, and say what agents see of it",
    ),
    "list": (_list, "pywm list [algos|envs|presets]", "list what there is"),
    "doctor": (_doctor, "pywm doctor [--json]", "say what works here, and how to mend what does not"),
}
