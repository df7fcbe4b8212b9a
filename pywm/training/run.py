"""One training run: its directory, metrics, checkpoints, signals and what a resumed process needs.

A training loop uses it like this; the order inside the iteration is what makes a resume exact::

    with Run.open(options, algo="ppo", env=env, seed=seed, config=to_json(config), total_steps=steps) as run:
        ...                                       # build environments, agent, optimiser
        if run.resumed:                           # load the parts, then the random generators
            agent.load_state(part(run.resumed.state, "agent"))
            env_steps = run.resumed.step
            run.restore_rng()
        while env_steps < steps:
            with run.phase("env"):
                ...
            run.log(metrics, env_steps=env_steps)
            if run.eval_due(env_steps):
                run.evaluate(agent, eval_envs, env_steps=env_steps)
            if run.checkpoint_due(env_steps):     # last: everything before it belongs to the checkpoint
                run.save(env_steps, join({"agent": agent.state(), ...}), score=score)
            if run.stopping:
                break
        run.finish(env_steps, join({...}))

Episodes of environments that cannot be restored (``Envs.restorable``) must be started anew after each save, and after
a resume, for both to go on alike. The checkpoint of a stop between two multiples of ``checkpoint_every`` ends episodes
that an uninterrupted run would play on; such runs are equal only where the stop falls on a multiple.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shlex
import signal
import threading
import time
import traceback
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from pywm.errors import CheckpointError, NumericalError, UserError, require_extra
from pywm.training import checkpoint, directory
from pywm.training.checkpoint import Loaded
from pywm.training.evaluate import EVAL_SEED, Evaluation, evaluate
from pywm.training.lock import RunLock
from pywm.training.log import (
    JsonlWriter,
    NoScreen,
    Screen,
    Sink,
    Status,
    TensorBoardSink,
    WandbSink,
    open_screen,
    plain_number,
)
from pywm.types import State

__all__ = ["NullRun", "Run", "RunOptions", "assert_finite"]

log = logging.getLogger(__name__)

# Parts that hold the world's data, which may be what it likes; weights and statistics may not.
_UNCHECKED_PARTS = ("env", "rng", "replay", "run")
# Many times as large as all else, and of use to nothing but a resume.
_NEWEST_ONLY = ("replay",)
_LEAST = {
    "checkpoint_every": 1,
    "keep_last": 1,
    "log_every": 0,
    "eval_every": 0,
    "eval_episodes": 1,
    "stop_at": 1,
}


@dataclasses.dataclass
class RunOptions:
    """How a run is kept, shown and resumed; only ``checkpoint_every`` can change what is learned.

    Attributes:
        run_dir: the run's directory; by default runs/<env>/<algo>/<seed>-<time>.
        resume: continue from the last good checkpoint.
        fresh: start anew in a directory that has steps; what is there moves to previous-<n>.
        checkpoint_every: environment steps between checkpoints. Environments that cannot be restored end
            their episodes there, so this is part of the result for them, and a resumed run equals an
            uninterrupted one only where the stop fell on a multiple of it (other environments: wherever it fell).
        keep_last: how many of the newest checkpoints to keep; the best one is kept besides. Only the very newest keeps
            the replay of an algorithm that has one.
        log_every: environment steps between rows of metrics; 0 is every iteration.
        eval_every: environment steps between evaluations; 0 is never.
        eval_episodes: episodes an evaluation plays.
        stop_at: save and stop at this many environment steps, although the run is longer (a time slot). Take a
            multiple of ``checkpoint_every`` where environments cannot be restored: see there.
        progress: what to show while training; auto is live on a terminal, plain otherwise.
        tensorboard: also write to RUN/tb (extra "tb").
        wandb: also write to Weights & Biases (extra "wandb").
        video: write a GIF of every evaluation (and an mp4 with the extra "video").
        runs: where runs go that are not given a directory.
    """

    run_dir: str | None = None
    resume: bool = False
    fresh: bool = False
    checkpoint_every: int = 25_000
    keep_last: int = 3
    log_every: int = 0
    eval_every: int = 0
    eval_episodes: int = 10
    stop_at: int | None = None
    progress: Literal["auto", "live", "plain", "off"] = "auto"
    tensorboard: bool = False
    wandb: bool = False
    video: bool = False
    runs: str = "runs"


def assert_finite(tensors: Mapping[str, Tensor], *, env_steps: int) -> None:
    """Stop the training when a tensor holds NaN or infinity.

    One reduction a tensor and a single comparison while all is well; the search for the culprit only
    starts when something is wrong. Synchronises with the device.

    Args:
        tensors: losses, gradients or parameters under the names to show, in the order they are computed.
        env_steps: where the training stands.

    Raises:
        NumericalError: naming the first tensor that is not finite.
    """
    floating = {name: t.detach() for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not floating:
        return
    sums = [tensor.sum() for tensor in floating.values()]
    if len({(s.device, s.dtype) for s in sums}) > 1:
        sums = [s.to("cpu", torch.float64) for s in sums]
    # A sum can overflow although every element is finite: only a suspicion.
    if bool(torch.isfinite(torch.stack(sums)).all()):
        return
    for name, tensor in floating.items():
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinite"
            raise NumericalError(
                f"{name!r} became {kind} at {env_steps:,} env steps "
                f"({int(bad.sum())} of {tensor.numel()} values), the first tensor to do so. Training stopped."
            )


class _Phase:
    """Accounts the time of a ``with`` block, exclusive of the phases inside it."""

    __slots__ = ("_clock", "name")

    def __init__(self, clock: _PhaseClock, name: str):
        self._clock, self.name = clock, name

    def __enter__(self) -> None:
        self._clock.push(self.name)

    def __exit__(self, *exc: object) -> None:
        self._clock.pop()


class _PhaseClock:
    """Where the time goes: seconds for each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._last = time.perf_counter()
        self._phases: dict[str, _Phase] = {}

    def phase(self, name: str) -> _Phase:
        phase = self._phases.get(name)
        if phase is None:
            phase = self._phases[name] = _Phase(self, name)
            self.seconds[name] = 0.0
        return phase

    def push(self, name: str) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._last
        self._stack.append(name)
        self._last = now

    def pop(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack.pop()] += now - self._last
        self._last = now


class _Every:
    """True once for each multiple of ``period`` that the counter passes: a function of the steps alone."""

    def __init__(self, period: int, start: int):
        self._period, self._last = period, start

    def due(self, env_steps: int) -> bool:
        if self._period <= 0:
            return False
        passed = env_steps // self._period > self._last // self._period
        self._last = max(self._last, env_steps)
        return passed


class Run:
    """A training run. Made by :meth:`open`, used as a context manager.

    Entering it seeds the generators of Python, NumPy and torch; in a resumed run :meth:`restore_rng` sets them.

    Attributes:
        dir: the run's directory.
        options: how it was opened.
        resumed: the checkpoint to go on from, or None when starting from the beginning.
        checkpoint_number: how many checkpoints were taken so far, before a resume included. Equal in the
            process that goes on after a save and in one that resumes from it, so reset seeds derive from it.
        interrupted: Ctrl-C or SIGTERM ended (or is ending) the run.
    """

    def __init__(
        self,
        folder: Path,
        options: RunOptions,
        *,
        title: str,
        seed: int,
        total_steps: int,
        resumed: Loaded | None,
        resume_command: str,
        sinks: Iterable[Sink],
        lock: RunLock,
        file_log: _FileLog,
        is_new: bool,
    ):
        self.dir = folder
        self.options = options
        self.resumed = resumed
        self.interrupted = False
        self.resume_command = resume_command
        self._seed = seed
        self._lock = lock
        self._is_new = is_new
        self._sinks = list(sinks)
        self._pid = os.getpid()
        self._stop = False
        self._finished = False
        self._handlers: dict[int, Any] = {}
        start = resumed.step if resumed else 0
        about = resumed.state.data.get("run", {}) if resumed else {}
        self.checkpoint_number = int(about.get("checkpoint_number", 0))
        self._best: float | None = about.get("best_score")
        self._saved_step = start if resumed else None
        self._last_good = resumed.path if resumed else None
        self._env_steps = start
        self._checkpoints = _Every(options.checkpoint_every, start)
        self._evals = _Every(options.eval_every, start)
        self._logs = _Every(options.log_every, start)
        self._metrics = JsonlWriter(folder / "metrics.jsonl", rows=int(about.get("metrics_rows", 0)))
        self._elapsed_before = directory.last_time(folder / "metrics.jsonl")
        self._clock = _PhaseClock()
        self._status = Status(title, str(folder), total_steps, start)
        self._last_row = (time.perf_counter(), start, dict[str, float]())
        self._screen: Screen = NoScreen()
        self._file_log = file_log

    @classmethod
    def open(
        cls,
        options: RunOptions,
        *,
        algo: str,
        env: str,
        seed: int,
        config: dict[str, Any],
        total_steps: int,
        may_change: Collection[str] = ("steps",),
        device: str = "cpu",
        command: str | None = None,
    ) -> Run:
        """Open a run directory: a new one, or an old one to resume or to start over.

        Args:
            options: where and how.
            algo: name of the algorithm.
            env: id or name of the environment.
            seed: with the two above it names the directory.
            config: the algorithm's configuration as JSON (:func:`pywm.config.to_json`).
            total_steps: ``env_steps`` at which training ends; for the progress display.
            may_change: fields of ``config`` that may differ from those the run began with.
            device: for the progress display.
            command: the command line, kept in ``command.txt``; None when called from Python.

        Raises:
            UserError: the directory has steps and neither ``resume`` nor ``fresh`` is set, is in use, is of
                another run, or the configuration does not fit the checkpoint.
            CheckpointError: there are checkpoints, but none is valid.
        """
        if options.resume and options.fresh:
            raise UserError(
                "resume and fresh exclude each other: go on with --resume, start over with --fresh"
            )
        for name, least in _LEAST.items():
            value = getattr(options, name)
            if value is not None and value < least:
                raise UserError(f"Run.open: {name} is {value}, but expected {least} or more")
        # Before there is a directory that would stay behind.
        if options.tensorboard:
            require_extra("tensorboard", "tb")
        if options.wandb:
            require_extra("wandb", "wandb")
        is_new = options.run_dir is None and not options.resume
        folder = directory.choose(options, algo, env, seed)
        try:
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                is_new = True
            lock = RunLock(folder)
        except OSError as error:
            raise UserError(f"cannot use the run directory {folder}: {error}") from error
        file_log: _FileLog | None = None
        try:
            about = {"format": directory.FORMAT, "algo": algo, "env": env, "seed": seed, "config": config}
            about["run"] = {name: getattr(options, name) for name in directory.KEPT_OPTIONS}
            if options.fresh:
                directory.move_aside(folder)
            file_log = _FileLog(folder / "log.txt")
            resumed = directory.prepare(folder, options, about, may_change)
            directory.describe(folder, about, command)
            step = resumed.step if resumed else 0
            name = f"{algo}-{env}-{folder.name}"
            sinks: list[Sink] = []
            if options.tensorboard:
                sinks.append(TensorBoardSink(folder / "tb", step))
            if options.wandb:
                sinks.append(WandbSink(folder, about, name))
            if command is None:
                resume_command = f"Run.open(RunOptions(run_dir={str(folder)!r}, resume=True), ...)"
            else:
                resume_command = shlex.join(
                    ["pywm", "train", algo, env, "--run-dir", str(folder), "--resume"]
                )
            run = cls(
                folder,
                options,
                title=f"{algo} · {env} · seed {seed} · {device}",
                seed=seed,
                total_steps=total_steps,
                resumed=resumed,
                resume_command=resume_command,
                sinks=sinks,
                lock=lock,
                file_log=file_log,
                is_new=is_new,
            )
        except BaseException as error:
            if file_log is not None:
                file_log.detach()
            if is_new:
                _discard(folder)
            lock.release()
            if isinstance(error, OSError) and not isinstance(error, UserError):
                raise UserError(f"cannot use the run directory {folder}: {error}") from error
            raise
        return run

    # What a training loop calls.

    def log(self, metrics: Mapping[str, Any], *, env_steps: int) -> None:
        """Write one row of metrics and refresh the screen.

        Adds ``time/total`` (seconds, earlier processes included), ``time/steps_per_second`` and the share of
        every phase since the row before. 0-d tensors are read here, which synchronises with the device.
        """
        self._env_steps = env_steps
        row: dict[str, Any] = {"env_steps": env_steps}
        row.update((key, plain_number(value)) for key, value in metrics.items())
        row.update(self._times(env_steps))
        self._metrics.write(row)
        for sink in self._sinks:
            sink.write(row, env_steps)
        self._status.env_steps = env_steps
        self._status.metrics.update(row)
        self._show()

    def log_due(self, env_steps: int) -> bool:
        """Whether ``log_every`` asks for a row now; always, where it is 0."""
        self._env_steps = env_steps
        due = self.options.log_every <= 0 or self._logs.due(env_steps)
        if not due:
            self._status.env_steps = env_steps
            self._show()
        return due

    def phase(self, name: str) -> _Phase:
        """Account the time of a ``with`` block under ``name``: ``"env"``, ``"act"``, ``"learn"``, ..."""
        return self._clock.phase(name)

    def eval_due(self, env_steps: int) -> bool:
        """Whether ``eval_every`` asks for an evaluation now; true once for each multiple passed."""
        return self._evals.due(env_steps)

    def evaluate(self, agent: Any, envs: Any, *, env_steps: int) -> Evaluation:
        """Play ``eval_episodes`` greedy episodes, log their figures and write a GIF where asked to.

        The random generators are put back afterwards: evaluating does not change what is learned.
        """
        frames: list[Any] | None = [] if self.options.video else None
        before = checkpoint.rng_state()
        with self.phase("eval"):
            try:
                result = evaluate(
                    agent, envs, episodes=self.options.eval_episodes, seed=EVAL_SEED, frames=frames
                )
            finally:
                checkpoint.set_rng_state(before)
        self.log(result.metrics(), env_steps=env_steps)
        if frames:
            self._write_video(frames, env_steps)
        return result

    def checkpoint_due(self, env_steps: int) -> bool:
        """Whether a multiple of ``checkpoint_every`` was passed; ask once an iteration, after logging."""
        self._env_steps = env_steps
        return self._checkpoints.due(env_steps)

    def save(
        self, env_steps: int, state: State, *, score: float | None = None, replace: bool = False
    ) -> Path | None:
        """Write a checkpoint, with the random generators and the position in the log.

        Args:
            env_steps: where the training stands; saving the same step again does nothing.
            state: :func:`pywm.training.checkpoint.join` of the parts; ``"agent"`` is what evaluation loads.
            score: higher is better; the highest so far is kept as the best checkpoint.
            replace: save the same step again all the same: an algorithm may learn for long without a step.

        Returns:
            The checkpoint, or None where the disk did not take it: the one before is intact, and training
            may go on.

        Raises:
            NumericalError: a tensor is not finite; nothing is written.
        """
        try:
            return self._save(env_steps, state, score, replace)
        except OSError as error:
            if env_steps >= self._status.total_steps or self.stopping:
                return None  # `finish` follows, which tries again and has the words for it
            kept = self._last_good.name if self._last_good else "none yet"
            log.warning(
                "checkpoint at %d env steps not written (%s); training goes on, the last good one is %s",
                env_steps,
                error,
                kept,
            )
            return None

    def _save(self, env_steps: int, state: State, score: float | None, replace: bool) -> Path | None:
        self._env_steps = env_steps
        if env_steps == self._saved_step and not replace:
            return self._last_good
        tensors = {
            name: tensor
            for name, tensor in state.tensors.items()
            if name.partition("/")[0] not in _UNCHECKED_PARTS
        }
        assert_finite(tensors, env_steps=env_steps)
        self.checkpoint_number += 1
        improved = score is not None and score == score and (self._best is None or score > self._best)
        about = {
            "checkpoint_number": self.checkpoint_number,
            "metrics_rows": self._metrics.rows,
            "best_score": score if improved else self._best,
        }
        whole = checkpoint.join({"rng": checkpoint.rng_state(), "run": State({}, about)})
        whole = State({**state.tensors, **whole.tensors}, {**state.data, **whole.data})
        with self.phase("checkpoint"):
            self._metrics.sync()
            path = checkpoint.save(
                self.dir / "checkpoints",
                env_steps,
                whole,
                keep_last=self.options.keep_last,
                best=improved,
                newest_only=_NEWEST_ONLY,
            )
        self._saved_step, self._last_good = env_steps, path
        if improved:
            self._best = score
        return path

    def restore_rng(self) -> None:
        """Set the random generators as they were at the checkpoint; call it when everything is built."""
        if self.resumed is not None:
            state = checkpoint.part(self.resumed.state, "rng")
            if state is None:
                raise CheckpointError(f"{self.resumed.path.name}: holds no random generator state")
            try:
                checkpoint.set_rng_state(state)
            except (RuntimeError, TypeError, ValueError) as error:  # a GPU's; the others were checked
                raise CheckpointError(f"{self.resumed.path}: random generator state: {error}") from error

    def announce(self, envs: Any) -> None:
        """Say once, when the training starts, what checkpoints do to environments that cannot be restored.

        Args:
            envs: a :class:`pywm.envs.Envs`.
        """
        if not envs.restorable:
            log.info(
                "%s cannot be restored: episodes end at each checkpoint (every %s env steps), and a resumed run "
                "equals an uninterrupted one only if it stopped at a multiple of that",
                envs.name,
                f"{self.options.checkpoint_every:,}",
            )

    @property
    def stopping(self) -> bool:
        """Whether to end after this iteration: Ctrl-C, SIGTERM, :meth:`stop` or ``stop_at``."""
        stop_at = self.options.stop_at
        return self._stop or (stop_at is not None and self._env_steps >= stop_at)

    def stop(self) -> None:
        """Ask the training to end after this iteration, from any thread."""
        self._stop = True

    def finish(
        self, env_steps: int, state: State, *, score: float | None = None, replace: bool = False
    ) -> None:
        """Save the last checkpoint, and say where the time went and how to go on, if there is anything left to do.

        The arguments are those of :meth:`save`.

        Raises:
            CheckpointError: the disk did not take it; the message has the command to go on with.
        """
        failure: OSError | None = None
        try:
            path = self._save(env_steps, state, score, replace)
        except OSError as error:
            failure = error
        self._status.env_steps = env_steps
        self._take_shares()
        self._screen.show(self._status, force=True)
        if report := self._status.time_report():
            log.info("%s", report)
        self._finished = True
        if failure is not None:
            kept = "there is no checkpoint"
            if self._last_good is not None:
                kept = f"the last good checkpoint is {self._last_good}. Go on with:\n  {self.resume_command}"
            raise CheckpointError(
                f"the final checkpoint at {env_steps:,} env steps was not written ({failure}); {kept}"
            ) from failure
        if env_steps < self._status.total_steps:
            log.warning(
                "stopped at %s env steps, saved %s. Go on with:\n  %s",
                f"{env_steps:,}",
                path,
                self.resume_command,
            )
        else:
            log.info("finished at %s env steps, saved %s", f"{env_steps:,}", path)

    # Context manager: signals, screen, closing.

    def __enter__(self) -> Run:
        self._screen = open_screen(self.options.progress)
        if self.resumed is None:
            # They are in the checkpoint whether the algorithm draws from them or not, and environments may.
            checkpoint.seed_rng(self._seed)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)
        where = f"resumed at {self.resumed.step:,} env steps" if self.resumed else "started"
        log.info("%s: %s", self.dir, where)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._screen.close()
            self._explain(error)
        finally:
            for number, handler in self._handlers.items():
                # None stands for a handler that was not set from Python and cannot be put back.
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            self._handlers.clear()
            for sink in self._sinks:
                sink.close()
            self._metrics.close()
            self._file_log.detach()
            # A start that failed at once: --resume must not find it in the place of an earlier run.
            if error is not None and self._is_new and _discard(self.dir):
                log.warning("%s held nothing yet and was removed", self.dir)
            self._lock.release()

    def _explain(self, error: BaseException | None) -> None:
        if error is None:
            return
        if isinstance(error, KeyboardInterrupt):
            self.interrupted = True
        self._file_log.traceback(error)
        if self._finished:
            return
        if self._last_good is not None:
            log.warning(
                "the last good checkpoint is %s. Go on with:\n  %s", self._last_good, self.resume_command
            )
        else:
            log.warning("no checkpoint was written yet")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked environment worker: Ctrl-C is its parent's business, termination its own.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self._stop and self.interrupted:
            raise KeyboardInterrupt
        self._stop = self.interrupted = True
        # Not logging: the signal may have arrived inside a write to the same stream.
        os.write(2, b"\npywm: stopping after this iteration and saving; once more to stop at once\n")

    # Details.

    def _times(self, env_steps: int) -> dict[str, float]:
        now = time.perf_counter()
        then, steps, seconds = self._last_row
        span = max(now - then, 1e-9)
        times = {
            "time/total": round(self._elapsed_before + self._status.seconds, 3),
            "time/steps_per_second": round((env_steps - steps) / span, 1),
        }
        for name, total in self._clock.seconds.items():
            times[f"time/{name}"] = round((total - seconds.get(name, 0.0)) / span, 4)
        self._last_row = (now, env_steps, dict(self._clock.seconds))
        return times

    def _show(self) -> None:
        self._take_shares()
        self._screen.show(self._status)

    def _take_shares(self) -> None:
        elapsed = self._status.seconds
        self._status.shares = {name: total / elapsed for name, total in self._clock.seconds.items()}

    def _write_video(self, frames: list[Any], env_steps: int) -> None:
        from pywm.training import report

        folder = self.dir / "videos"
        try:
            folder.mkdir(exist_ok=True)
            report.write_gif(frames, folder / f"eval_{env_steps:08d}.gif")
            if report.can_write_video():
                report.write_video(frames, folder / f"eval_{env_steps:08d}.mp4")
        except OSError as error:
            log.warning("video not written: %s", error)


class NullRun(Run):
    """A run that keeps nothing: what an algorithm uses when it is called without one."""

    def __init__(self) -> None:
        self.dir = Path()
        self.options = RunOptions(progress="off")
        self.resumed = None
        self.interrupted = False
        self.resume_command = ""
        self.checkpoint_number = 0
        self._stop = False
        self._env_steps = 0
        self._clock = _PhaseClock()

    def log(self, metrics: Mapping[str, Any], *, env_steps: int) -> None:
        """Drop the row."""

    def log_due(self, env_steps: int) -> bool:
        """Return False: nobody reads."""
        return False

    def eval_due(self, env_steps: int) -> bool:
        """Return False: nobody reads."""
        return False

    def checkpoint_due(self, env_steps: int) -> bool:
        """Return False: nothing is kept."""
        return False

    def save(
        self, env_steps: int, state: State, *, score: float | None = None, replace: bool = False
    ) -> Path | None:
        """Keep nothing."""
        return None

    def announce(self, envs: Any) -> None:
        """Say nothing: there are no checkpoints."""

    def finish(
        self, env_steps: int, state: State, *, score: float | None = None, replace: bool = False
    ) -> None:
        """Do nothing."""

    def __enter__(self) -> NullRun:
        return self

    def __exit__(self, *exc: object) -> None:
        """Do nothing."""


def _discard(folder: Path) -> bool:
    """Remove what a failed start has made, unless it is worth something; its own error is the one to show."""
    try:
        return directory.discard(folder)
    except OSError as error:
        log.warning("cannot remove %s: %s", folder, error)
        return False


class _FileLog(logging.Handler):
    """Copies the package's log into ``log.txt``; a full disk silences it."""

    def __init__(self, path: Path):
        super().__init__(logging.INFO)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in detach()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("pywm")
        logger.addHandler(self)
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)

    def detach(self) -> None:
        logging.getLogger("pywm").removeHandler(self)
        with contextlib.suppress(OSError):
            self._file.close()

    def emit(self, record: logging.LogRecord) -> None:
        self._write(self.format(record))

    def traceback(self, error: BaseException) -> None:
        self._write("".join(traceback.format_exception(error)).rstrip())

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.write(text + "\n")
            self._file.flush()
