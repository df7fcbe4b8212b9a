"""Where metrics go: a JSONL file always, a live screen or plain lines, TensorBoard and wandb on request."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from pywm.errors import require_extra

__all__ = [
    "EpisodeLines",
    "JsonlWriter",
    "LivePanel",
    "PlainLines",
    "Screen",
    "Sink",
    "TensorBoardSink",
    "WandbSink",
    "open_screen",
    "plain_number",
    "read_metrics",
]

log = logging.getLogger(__name__)

PLAIN_SECONDS = 10.0
LIVE_SECONDS = 0.25


def plain_number(value: Any) -> float | int | str | None:
    """Turn a metric into a JSON value: 0-d tensors and arrays into numbers, non-finite ones into None."""
    if isinstance(value, Tensor):
        value = value.detach()
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class JsonlWriter:
    """Append one JSON object a line; a full disk loses rows, never the file or the training.

    Args:
        path: the file; created when missing.
        rows: keep only this many rows of an earlier process, so that a resumed run repeats none.

    Attributes:
        rows: how many rows the file holds. Counted in rows, not bytes: equal runs have equal counts,
            but their wall-clock times have different lengths.
    """

    def __init__(self, path: Path, rows: int = 0):
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        self._failed = False
        with open(path, "rb") as old:
            kept = [len(line) for line, _ in zip(old, range(rows), strict=False) if line.endswith(b"\n")]
        if len(kept) < rows:
            log.warning(
                "%s has %d rows, the checkpoint was written at %d: some are lost", path, len(kept), rows
            )
        self.rows, self._offset = len(kept), sum(kept)
        self._file.truncate(self._offset)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row at once, so that a kill loses none that came before."""
        line = (json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError("only part of the row was written")
            self._offset += len(line)
            self.rows += 1
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("cannot write metrics (%s); rows are lost until there is space", error)
            self._failed = True
            self._file.truncate(self._offset)

    def sync(self) -> None:
        """Force the rows onto the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a ``metrics.jsonl``; a last line cut off by a kill is left out."""
    rows = []
    for line in Path(path).read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


class Sink(Protocol):
    """A further place for metrics."""

    def write(self, row: Mapping[str, Any], env_steps: int) -> None:
        """Take one row."""

    def close(self) -> None:
        """Flush and release everything."""


class TensorBoardSink:
    """Scalars for TensorBoard, in ``RUN/tb``; rows after ``env_steps`` of an earlier process are dropped."""

    def __init__(self, folder: Path, env_steps: int = 0):
        require_extra("tensorboard", "tb")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=env_steps + 1 if env_steps else None)

    def write(self, row: Mapping[str, Any], env_steps: int) -> None:
        """Take one row."""
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "env_steps":
                self._writer.add_scalar(key, value, env_steps)

    def close(self) -> None:
        """Flush and release everything."""
        self._writer.close()


class WandbSink:
    """Metrics for Weights & Biases; a resumed run continues the same page."""

    def __init__(self, folder: Path, config: Mapping[str, Any], name: str):
        wandb = require_extra("wandb", "wandb")
        id_file = folder / "wandb-id"
        if id_file.exists():
            run_id = id_file.read_text().strip()
        else:
            run_id = os.urandom(6).hex()
            id_file.write_text(run_id)
        self._run = wandb.init(
            project="pywm", name=name, id=run_id, resume="allow", dir=str(folder), config=dict(config)
        )

    def write(self, row: Mapping[str, Any], env_steps: int) -> None:
        """Take one row."""
        self._run.log({key: value for key, value in row.items() if value is not None}, step=env_steps)

    def close(self) -> None:
        """Flush and release everything."""
        self._run.finish()


class Screen(Protocol):
    """What a person sees while training."""

    def show(self, status: Status, *, force: bool = False) -> None:
        """Show the newest figures, if it is time to."""

    def close(self) -> None:
        """Give the terminal back."""


class Status:
    """The figures of a run that a screen shows.

    Attributes:
        title: algorithm, environment, seed and device.
        folder: the run's directory.
        env_steps, total_steps: progress, in environment steps.
        start_steps: where this process began.
        began: ``time.monotonic()`` of the first step.
        metrics: the newest value of every metric.
        shares: part of the time spent in each phase since the start, adding up to at most 1.
    """

    def __init__(self, title: str, folder: str, total_steps: int, start_steps: int = 0):
        self.title, self.folder = title, folder
        self.total_steps, self.env_steps, self.start_steps = total_steps, start_steps, start_steps
        self.began = time.monotonic()
        self.metrics: dict[str, Any] = {}
        self.shares: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Time since this process began."""
        return max(time.monotonic() - self.began, 1e-9)

    @property
    def rate(self) -> float:
        """Environment steps per second in this process."""
        return (self.env_steps - self.start_steps) / self.seconds

    @property
    def remaining(self) -> float | None:
        """Seconds to go at the present rate, or None when nothing was done yet."""
        left = max(self.total_steps - self.env_steps, 0)
        return left / self.rate if self.rate > 0 else None

    def figures(self) -> str:
        """Return the main metrics as one line."""
        shown = []
        if self.metrics.get("return/mean") is not None:
            shown.append(f"return {self.metrics['return/mean']:.1f}")
        if self.metrics.get("eval/return_mean") is not None:
            shown.append(f"eval {self.metrics['eval/return_mean']:.1f}")
        for key, value in self.metrics.items():
            if key.startswith("loss/") and isinstance(value, (int, float)) and len(shown) < 5:
                shown.append(f"{key.removeprefix('loss/')} loss {value:.3g}")
        return "   ".join(shown)

    def time_line(self) -> str:
        """Return where the time goes as one line."""
        shares = " ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        other = max(1.0 - sum(self.shares.values()), 0.0)
        return f"{shares} other {other:.0%}" if shares else ""

    def time_report(self) -> str:
        """Return how long this process took and for what, the longest first; nothing where no phase was timed."""
        if not self.shares:
            return ""
        parts = {**self.shares, "other": max(1.0 - sum(self.shares.values()), 0.0)}
        shown = sorted(((share, name) for name, share in parts.items() if share >= 0.005), reverse=True)
        where = ", ".join(f"{name} {share:.0%}" for share, name in shown)
        return f"time {clock(self.seconds)} at {self.rate:,.0f} env steps/s: {where}"


def clock(seconds: float | None) -> str:
    """Format seconds as ``h:mm:ss``."""
    if seconds is None:
        return "-:--:--"
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class PlainLines:
    """One line every ten seconds, through logging: for files, pipes and cluster logs."""

    def __init__(self, seconds: float = PLAIN_SECONDS):
        self._seconds = seconds
        self._next = time.monotonic() + seconds

    def show(self, status: Status, *, force: bool = False) -> None:
        """Log one line if it is time to."""
        now = time.monotonic()
        if now < self._next and not force:
            return
        self._next = now + self._seconds
        parts = [
            f"{status.env_steps:,}/{status.total_steps:,} env steps",
            f"{status.rate:,.0f}/s",
            f"ETA {clock(status.remaining)}",
            status.figures(),
            status.time_line(),
        ]
        log.info("%s", "   ".join(part for part in parts if part))

    def close(self) -> None:
        """Do nothing: there is no terminal to give back."""


class EpisodeLines:
    """One line every ten seconds while episodes are played, through logging.

    Args:
        episodes: how many there will be.
        seconds: between two lines.
    """

    def __init__(self, episodes: int, seconds: float = PLAIN_SECONDS):
        self._episodes, self._seconds = episodes, seconds
        self._began = time.monotonic()
        self._next = self._began + seconds

    def show(self, finished: int, steps: int) -> None:
        """Log one line if it is time to."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._seconds
        rate = steps / (now - self._began)
        log.info("%d/%d episodes   %s steps   %s/s", finished, self._episodes, f"{steps:,}", f"{rate:,.0f}")


class LivePanel:
    """A progress bar with the figures below it, redrawn in place on a terminal."""

    def __init__(self, seconds: float = LIVE_SECONDS, console: Any = None):
        from rich.console import Console
        from rich.live import Live

        self._seconds, self._next = seconds, 0.0
        # Redrawn from the training loop: a drawing thread would meet the forks of vector environments.
        self._live = Live(console=console or Console(stderr=True), auto_refresh=False, transient=False)
        self._live.start()

    def show(self, status: Status, *, force: bool = False) -> None:
        """Redraw if it is time to."""
        now = time.monotonic()
        if now < self._next and not force:
            return
        self._next = now + self._seconds
        self._live.update(self._render(status), refresh=True)

    def _render(self, status: Status) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(expand=True)
        head.add_column()
        head.add_column(justify="right", overflow="fold")
        head.add_row(Text(status.title, style="bold"), Text(status.folder, style="dim"))
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=max(status.total_steps, 1), completed=status.env_steps, width=32),
            Text(f"{status.env_steps:,} / {status.total_steps:,} env steps"),
            Text(f"{clock(status.seconds)}  ETA {clock(status.remaining)}"),
        )
        speed = f"{status.rate:,.0f} steps/s   time: {status.time_line()}   RAM {_memory_gib():.1f} GiB"
        return Group(head, bar, Text(status.figures()), Text(speed, style="dim"))

    def close(self) -> None:
        """Give the terminal back."""
        self._live.stop()


class NoScreen:
    """Show nothing."""

    def show(self, status: Status, *, force: bool = False) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def open_screen(kind: str) -> Screen:
    """Open the screen called ``"live"``, ``"plain"``, ``"off"``, or ``"auto"``: live on a terminal."""
    if kind == "auto":
        kind = "live" if sys.stderr.isatty() else "plain"
    return {"live": LivePanel, "plain": PlainLines, "off": NoScreen}[kind]()


def _memory_gib() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
