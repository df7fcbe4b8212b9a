"""Checkpoints: what goes in comes out, whatever happens in between, and nothing hostile gets through."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pywm.errors import CheckpointError
from pywm.training import checkpoint
from pywm.training.checkpoint import join, load, part, save
from pywm.types import State


def make_state(value: float = 1.0) -> State:
    agent = State({"weight": torch.full((3, 4), value), "bias": torch.arange(5.0)}, {"name": "x"})
    return join({"agent": agent, "optim": State({"moment": torch.ones(7)}, {"count": 3})})


def assert_equal(a: State, b: State) -> None:
    assert a.data == b.data
    assert set(a.tensors) == set(b.tensors)
    for name, tensor in a.tensors.items():
        assert tensor.dtype == b.tensors[name].dtype
        assert torch.equal(tensor, b.tensors[name]), name


def snapshot(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# What goes in comes out.


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    buffer = torch.randn(20, dtype=torch.float64)
    tensors = {
        "agent/bf16": torch.randn(3, 5).to(torch.bfloat16),
        "agent/scalar": torch.tensor(2**40),
        "agent/bool": torch.rand(4) > 0.5,
        "agent/empty": torch.zeros(0, 3),
        "agent/view": buffer[2:7],
        "agent/same_buffer": buffer[5:12],
        "agent/strided": buffer[::2],
        "agent/parameter": torch.nn.Parameter(torch.randn(2)),
        "agent/nan": torch.tensor([float("nan"), float("inf")]).nan_to_num(),
        "loose": torch.arange(3, dtype=torch.uint8),
    }
    data = {
        "big": 2**127 + 1,
        "third": 1 / 3,
        "none": None,
        "text": "é☃",
        "list": [1, [2.5]],
        "np": np.int64(7),
    }
    save(tmp_path, 5, State(tensors, {"agent": data}))
    loaded = load(tmp_path)
    assert loaded.step == 5
    assert loaded.skipped == ()
    assert_equal(
        State({k: t.detach() for k, t in tensors.items()}, {"agent": data | {"np": 7}}), loaded.state
    )


def test_parts_are_joined_and_taken_apart() -> None:
    state = join({"agent": State({"w": torch.ones(1)}, {"a": 1}), "env": None, "rng": State({}, {})})
    assert set(state.tensors) == {"agent/w"}
    assert part(state, "agent") == State({"w": state.tensors["agent/w"]}, {"a": 1})
    assert part(state, "env") is None
    assert part(state, "rng") == State({}, {})
    with pytest.raises(ValueError, match="join: part is 'a/b'"):
        join({"a/b": State({}, {})})


def test_random_generators_continue_where_they_were(tmp_path: Path) -> None:
    for source in (random.seed, np.random.seed, torch.manual_seed):
        source(3)
    random.gauss(0, 1)  # leaves one number in reserve, and so does NumPy's
    np.random.standard_normal()
    save(tmp_path, 0, join({"rng": checkpoint.rng_state()}))

    def draw() -> tuple[Any, ...]:
        numbers = [random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand()]
        return (*numbers, *torch.randn(3).tolist())

    expected = draw()
    assert draw() != expected
    checkpoint.set_rng_state(part(load(tmp_path).state, "rng"))
    assert draw() == expected


def test_json_that_cannot_be_kept_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save: state.data holds a set, but expected JSON values"):
        save(tmp_path, 1, State({}, {"a": {"x": {1, 2}}}))
    with pytest.raises(ValueError, match=r"save: state.data takes \d+ bytes"):
        save(tmp_path, 1, State({}, {"a": "x" * (1 << 24)}))
    with pytest.raises(ValueError, match="save: step is -1"):
        save(tmp_path, -1, State({}, {}))
    with pytest.raises(ValueError, match="save: keep_last is 0"):
        save(tmp_path, 1, State({}, {}), keep_last=0)
    assert list(tmp_path.iterdir()) == []


def test_trying_a_state_leaves_the_generators_alone(tmp_path: Path) -> None:
    state = checkpoint.rng_state()
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    checkpoint.set_rng_state(state)
    save(tmp_path, 0, join({"rng": state}))
    load(tmp_path)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


# Which ones stay.


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step, make_state(step), keep_last=2, best=step == 3)
    names = [path.name for path in checkpoint.list_checkpoints(tmp_path)]
    assert names == ["step_00000003", "step_00000006", "step_00000007"]
    assert (tmp_path / "LATEST").read_text() == "step_00000007\n"
    assert load(tmp_path).step == 7
    assert load(tmp_path, which="best").step == 3
    assert load(tmp_path, which="step_00000006").step == 6
    with pytest.raises(CheckpointError, match=r"no checkpoint 'step_00000001'.*there are step_00000007"):
        load(tmp_path, which="step_00000001")


def test_only_the_newest_keeps_what_only_it_needs(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, make_state(step), keep_last=2, best=step == 1, newest_only=("optim", "replay"))
    assert_equal(load(tmp_path).state, make_state(3))
    assert load(tmp_path).dropped == ()
    for which in ("best", "step_00000002"):
        old = load(tmp_path, which=which)
        assert old.dropped == ("optim",)
        assert_equal(part(old.state, "agent"), part(make_state(old.step), "agent"))
        assert part(old.state, "optim") is None
        assert sorted(path.name for path in old.path.iterdir()) == [
            "agent.safetensors",
            "manifest.json",
            "state.json",
        ]
    # A step is taken back: what is newer by its number may be all there is to go on from.
    save(tmp_path, 2, make_state(2.5), newest_only=("optim",))
    assert_equal(load(tmp_path).state, make_state(3))


def test_what_a_kill_left_of_a_dropped_part_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_remove_dropped", lambda _: None)
        for step in (1, 2):
            save(tmp_path, step, make_state(step), newest_only=("optim",))
    left = tmp_path / "step_00000001" / "optim.safetensors"
    assert left.exists()
    assert part(load(tmp_path, which="step_00000001").state, "optim") is None
    checkpoint.clean(tmp_path)
    assert not left.exists()
    assert load(tmp_path).dropped == ()


def test_a_part_is_read_without_the_others(tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_state())
    (path / "optim.safetensors").write_bytes(b"not read, and not checked")
    loaded = load(tmp_path, parts=("agent",))
    assert_equal(loaded.state, join({"agent": part(make_state(), "agent")}))
    with pytest.raises(CheckpointError, match=r"optim.safetensors has 25 bytes"):
        load(tmp_path)


@pytest.mark.parametrize("pointer", [None, "step_00000009\n", "../evil\n"])
def test_without_a_best_one_the_newest_is_not_passed_off_as_it(pointer: str | None, tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, make_state(step))
    if pointer is not None:
        (tmp_path / "BEST").write_text(pointer)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint 'best' in .*; there are step_00000002, step_00000001"
    ):
        load(tmp_path, which="best")


def test_steps_beyond_eight_digits_sort_by_number(tmp_path: Path) -> None:
    for step in (99_999_999, 1_000_000_000):
        save(tmp_path, step, make_state())
    assert load(tmp_path).step == 1_000_000_000


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 4, make_state(1.0))
    save(tmp_path, 4, make_state(2.0))
    assert_equal(load(tmp_path).state, make_state(2.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step_00000004"]


def test_a_replaced_step_that_was_damaged_becomes_good(tmp_path: Path) -> None:
    path = save(tmp_path, 4, make_state(1.0))
    (path / "state.json").unlink()
    save(tmp_path, 4, make_state(2.0))
    assert_equal(load(tmp_path).state, make_state(2.0))


def test_leftovers_of_a_killed_process_are_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 4, make_state(1.0))
    for name in (".tmp-5-99", ".del-step_00000001", ".old-step_00000004"):
        shutil.copytree(tmp_path / "step_00000004", tmp_path / name)
    # Killed between the renames: the old one is all there is of step 3.
    os.rename(shutil.copytree(tmp_path / "step_00000004", tmp_path / "x"), tmp_path / ".old-step_00000003")
    checkpoint.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step_00000003", "step_00000004"]


# Kills and full disks.

_KILLED_SAVE = """
import os, shutil, sys
import torch
from pywm.training import checkpoint
from pywm.types import State
torch.set_num_threads(1)
root, calls = sys.argv[1], ("open", "mkdir", "rename", "replace", "fsync", "close", "rmdir", "unlink")

def state(value):
    tensors = {"agent/w": torch.full((999,), float(value)), "optim/m": torch.full((99,), float(value))}
    return State(tensors, {"agent": {"value": value}})

def attempt(root, fatal):
    '''Save step 3 a second time, then step 4 (which prunes step 1); die at the call number `fatal`.'''
    seen = 0
    def wrap(call):
        def wrapped(*args, **options):
            nonlocal seen
            seen += 1
            if seen == fatal:
                os._exit(9)
            return call(*args, **options)
        return wrapped
    for name in calls:
        setattr(os, name, wrap(getattr(os, name)))
    checkpoint.save(root, 3, state(33), keep_last=3, newest_only=("optim",))
    checkpoint.save(root, 4, state(4), keep_last=3, newest_only=("optim",))
    os._exit(0)

for step in (1, 2, 3):
    checkpoint.save(f"{root}/start", step, state(step))
fatal = 0
while True:
    fatal += 1
    folder = shutil.copytree(f"{root}/start", f"{root}/{fatal}")
    pid = os.fork()
    if pid == 0:
        attempt(folder, fatal)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    # As the next process would: clean, then load.
    checkpoint.clean(folder)
    for path in checkpoint.list_checkpoints(folder):
        checkpoint.verify(path)  # no half removed one either
    loaded = checkpoint.load(folder)
    value = loaded.state.data["agent"]["value"]
    assert not loaded.skipped, (fatal, loaded.skipped)
    assert not loaded.dropped and "optim/m" in loaded.state.tensors, fatal  # the newest one lacks nothing
    for path in checkpoint.list_checkpoints(folder):
        old = checkpoint.load(folder, which=path.name)
        assert ("optim/m" in old.state.tensors) == (not old.dropped) == os.path.exists(path / "optim.safetensors")
    assert (loaded.step, value) in ((3, 3), (3, 33), (4, 4)), (fatal, loaded.step, value)
    assert all(bool((t == value).all()) for t in loaded.state.tensors.values()), fatal
    leftovers = [n for n in os.listdir(folder) if n.startswith((".tmp", ".old", ".del"))]
    assert not leftovers, (fatal, leftovers)
    if code == 0:
        assert (loaded.step, value) == (4, 4)
        assert checkpoint.load(folder, which="step_00000003").dropped == ("optim",)
        break
    assert code == 9
print(fatal - 1)
"""


def test_death_at_every_system_call_of_a_save_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_SAVE, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30  # moments at which it died


def test_every_byte_is_on_the_disk_before_a_name_points_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def record(name: str) -> None:
        call = getattr(os, name)

        def recorded(*args: Any) -> Any:
            paths = [os.readlink(f"/proc/self/fd/{args[0]}")] if name == "fsync" else args
            events.append(" ".join([name, *(Path(path).name for path in paths)]))
            return call(*args)

        monkeypatch.setattr(os, name, recorded)

    for name in ("fsync", "rename", "replace"):
        record(name)
    save(tmp_path, 7, make_state())
    temporary = f".tmp-7-{os.getpid()}"
    ours = [
        event for event in events if "LATEST" not in event
    ]  # the tensor library renames within the directory
    files = ["agent.safetensors", "optim.safetensors", "state.json", "manifest.json"]
    published = ours.index(f"rename {temporary} step_00000007")
    synced = [event.removeprefix("fsync ") for event in ours[:published] if event.startswith("fsync")]
    assert [name for name in synced if name in files] == files  # the manifest last
    assert synced[-1] == temporary
    assert ours[published + 1] == f"fsync {tmp_path.name}"
    pointer = [event for event in events if "LATEST" in event]
    assert pointer == ["fsync .LATEST.tmp", "replace .LATEST.tmp LATEST"]
    assert events[-1] == f"fsync {tmp_path.name}"


def test_too_little_space_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, make_state())
    before = snapshot(tmp_path)
    big = State({"agent/w": torch.zeros(1 << 18)}, {})  # 1 MiB, so 1.5 MiB are wanted
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(1.4 * 2**20)))
    with pytest.raises(OSError, match=r"1.4 MiB free, 1.6 MiB needed") as caught:
        save(tmp_path, 2, big)
    assert caught.value.errno == errno.ENOSPC
    assert snapshot(tmp_path) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(1.6 * 2**20)))
    save(tmp_path, 2, big)


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_an_error_of_the_disk_keeps_the_checkpoint_before(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, make_state(1.0))

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2, make_state(2.0))
    assert not list(tmp_path.glob(".tmp-*"))
    assert load(tmp_path).skipped == ()
    assert load(tmp_path).step == (2 if call == "replace" else 1)  # replace: only the pointer was late


def test_the_tensor_library_s_disk_errors_keep_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def full(*args: Any) -> None:
        message = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise safetensors.SafetensorError(message)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save(tmp_path, 2, make_state(2.0))
    assert caught.value.errno == errno.ENOSPC


# Damaged and hostile checkpoints. Each function spoils the newest of two; the older one must be loaded.


def sign(path: Path) -> None:
    """Make the manifest agree with the files, as an attacker would."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        raw = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    changed = change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest if changed is None else changed))


def edit_state(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a run and its generators left in state.json, and sign it."""
    save(path.parent, 2, join({"rng": checkpoint.rng_state(), "run": State({}, dict(RUN))}))
    data = json.loads((path / "state.json").read_text())
    change(data)
    (path / "state.json").write_text(json.dumps(data))
    sign(path)


RUN = {"checkpoint_number": 2, "metrics_rows": 5, "best_score": None}


def rename_entry(new: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][new] = manifest["files"].pop("agent.safetensors")

    return change


def write_raw(path: Path, raw: bytes) -> None:
    (path / "agent.safetensors").write_bytes(raw)
    sign(path)


def write_header(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = (len(text) if length is None else length).to_bytes(8, "little")
    write_raw(path, size + text + data)


def tensor(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def flip(file: Path, position: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


def pickled(path: Path) -> bytes:
    return pickle.dumps(Bomb(path.parent / "code-was-run"))


def link(file: Path) -> None:
    other = file.parent.parent / "elsewhere"
    os.rename(file, other)
    os.symlink(other, file)


def link_directory(path: Path) -> None:
    other = path.parent.parent / "elsewhere"
    os.rename(path, other)
    os.symlink(other, path)


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path / "agent.safetensors", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(1 << 20))
    sign(path)


def sparse(file: Path, size: int) -> None:
    with open(file, "r+b") as stream:
        stream.truncate(size)


def fifo(path: Path) -> None:
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")


def directory_for(file: Path) -> None:
    file.unlink()
    file.mkdir()


def same_key_twice(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"step"', '"step": 1, "step"', 1))


def huge_number(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"step": 2', '"step": ' + "9" * 100_000))


F = 2**63
# name -> (how to spoil, what the message must contain)
SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated tensors": (lambda p: sparse(p / "agent.safetensors", 90), "agent.safetensors has 90 bytes"),
    "grown tensors": (lambda p: sparse(p / "optim.safetensors", 9000), "optim.safetensors has 9000 bytes"),
    "bit flip in tensors": (
        lambda p: flip(p / "agent.safetensors", -3),
        "sha256 mismatch in agent.safetensors",
    ),
    "bit flip in a header": (
        lambda p: flip(p / "agent.safetensors", 12),
        "sha256 mismatch in agent.safetensors",
    ),
    "bit flip in state": (lambda p: flip(p / "state.json", 5), "sha256 mismatch in state.json"),
    "bit flip in a hash": (lambda p: flip(p / "manifest.json", 60), "manifest.json|sha256"),
    "tensors missing": (lambda p: (p / "agent.safetensors").unlink(), "agent.safetensors is missing"),
    "state missing": (lambda p: (p / "state.json").unlink(), "state.json is missing"),
    "manifest missing": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest empty": (lambda p: (p / "manifest.json").write_text(""), "manifest.json is not valid JSON"),
    "manifest cut": (lambda p: sparse(p / "manifest.json", 99), "manifest.json is not valid JSON"),
    "manifest not text": (
        lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe{"),
        "manifest.json is not valid",
    ),
    "manifest drops what it lists": (
        lambda p: edit_manifest(p, lambda m: m | {"dropped": ["agent"]}),
        "expected names of parts it lacks",
    ),
    "manifest drops a path": (
        lambda p: edit_manifest(p, lambda m: m | {"dropped": ["../../x"]}),
        "expected names of parts it lacks",
    ),
    "manifest drops no list": (
        lambda p: edit_manifest(p, lambda m: m | {"dropped": "replay"}),
        "expected names of parts it lacks",
    ),
    "manifest a list": (lambda p: edit_manifest(p, lambda m: [m]), "manifest.json is not a pywm-checkpoint"),
    "manifest of others": (
        lambda p: edit_manifest(p, lambda m: m | {"format": "x"}),
        "is not a pywm-checkpoint",
    ),
    "manifest of the future": (lambda p: edit_manifest(p, lambda m: m | {"version": 9}), "has version 9"),
    "manifest of another step": (
        lambda p: edit_manifest(p, lambda m: m | {"step": 1}),
        "manifest.json is of step 1",
    ),
    "manifest without state": (
        lambda p: edit_manifest(p, lambda m: m["files"].pop("state.json") and None),
        "state",
    ),
    "manifest a directory": (
        lambda p: directory_for(p / "manifest.json"),
        "manifest.json is not a regular file",
    ),
    "manifest huge": (lambda p: sparse(p / "manifest.json", 1 << 21), "more than the limit"),
    "manifest nested": (
        lambda p: (p / "manifest.json").write_text("[" * 99_999 + "]" * 99_999),
        "nested too deeply",
    ),
    "manifest ambiguous": (same_key_twice, "a key occurs twice"),
    "manifest with a huge number": (huge_number, "manifest.json"),
    "path traversal": (
        lambda p: edit_manifest(p, rename_entry("../../agent.safetensors")),
        "which is refused",
    ),
    "absolute path": (
        lambda p: edit_manifest(p, rename_entry("/etc/passwd")),
        "'/etc/passwd', which is refused",
    ),
    "name with NUL": (lambda p: edit_manifest(p, rename_entry("agent\0.safetensors")), "which is refused"),
    "pickle listed": (lambda p: edit_manifest(p, rename_entry("agent.pt")), "'agent.pt', which is refused"),
    "manifest lists itself": (lambda p: edit_manifest(p, rename_entry("manifest.json")), "which is refused"),
    "negative size": (
        lambda p: edit_manifest(p, lambda m: m["files"]["state.json"].update(size=-1)),
        "no size and sha256 for state.json",
    ),
    "size not a number": (
        lambda p: edit_manifest(p, lambda m: m["files"]["state.json"].update(size=True)),
        "no size and sha256 for state.json",
    ),
    "tensors a link": (lambda p: link(p / "agent.safetensors"), "agent.safetensors is not a regular file"),
    "manifest a link": (lambda p: link(p / "manifest.json"), "manifest.json is not a regular file"),
    "directory a link": (link_directory, "is not a directory of its own"),
    "state a pipe": (fifo, "state.json is not a regular file"),
    "state a list": (
        lambda p: ((p / "state.json").write_text("[]"), sign(p)),
        "state.json does not hold an object",
    ),
    "state nested": (
        lambda p: ((p / "state.json").write_text('{"a":' * 99_999 + "1" + "}" * 99_999), sign(p)),
        "nested too deeply",
    ),
    "state huge": (lambda p: (sparse(p / "state.json", 1 << 25), sign(p)), "more than the limit"),
    "run a list": (
        lambda p: edit_state(p, lambda d: d.update(run=[1])),
        r"run is \[1\], but expected an object",
    ),
    "run without a count": (
        lambda p: edit_state(p, lambda d: d["run"].pop("checkpoint_number")),
        "state.json: run.checkpoint_number is None, but expected a count",
    ),
    "run with a word": (
        lambda p: edit_state(p, lambda d: d["run"].update(metrics_rows="x")),
        "state.json: run.metrics_rows is 'x', but expected a count",
    ),
    "run with a list": (
        lambda p: edit_state(p, lambda d: d["run"].update(best_score=[1])),
        r"state.json: run.best_score is \[1\], but expected a number or null",
    ),
    "generators missing": (
        lambda p: edit_state(p, lambda d: d.update(rng={})),
        "state.json and rng.safetensors do not fit the random generators: KeyError",
    ),
    "generators a word": (
        lambda p: edit_state(p, lambda d: d["rng"].update(python="ab", numpy=3)),
        "do not fit the random generators",
    ),
    "generator beyond its words": (
        lambda p: edit_state(p, lambda d: d["rng"].update(numpy=["MT19937", 10**6, 0, 0.0])),
        "position 1000000 of NumPy's generator is beyond its 624 words",
    ),
    "tensors a pickle": (lambda p: write_raw(p, pickled(p)), "agent.safetensors: header"),
    "tensors a zip bomb": (zip_bomb, "agent.safetensors: header"),
    "tensors empty": (lambda p: write_raw(p, b""), "agent.safetensors: header length 0 exceeds"),
    "header length negative": (lambda p: write_header(p, {}, length=2**64 - 1), "exceeds the file's"),
    "header length huge": (lambda p: write_header(p, {}, length=1 << 40), "exceeds the file's"),
    "header too large": (lambda p: write_header(p, b" " * (1 << 23)), "exceeds the limit"),
    "header not JSON": (lambda p: write_header(p, b"{{{{"), "header is not valid JSON"),
    "header not text": (lambda p: write_header(p, b"\xff\xff"), "header is not valid JSON"),
    "header nested": (lambda p: write_header(p, b"[" * 99_999), "nested too deeply"),
    "header a list": (lambda p: write_header(p, []), "header is not an object"),
    "header ambiguous": (
        lambda p: write_header(p, b'{"a":' + json.dumps(tensor()).encode() + b',"a":1}', bytes(4)),
        "a key occurs twice",
    ),
    "tensor not an object": (lambda p: write_header(p, {"a": 3}), "lacks dtype, shape or data_offsets"),
    "tensor with more keys": (lambda p: write_header(p, {"a": tensor() | {"x": 1}}, bytes(4)), "lacks dtype"),
    "dtype of objects": (lambda p: write_header(p, {"a": tensor("O")}, bytes(4)), "has dtype 'O'"),
    "dtype a list": (lambda p: write_header(p, {"a": tensor(["F32"])}, bytes(4)), "has dtype"),
    "shape huge": (lambda p: write_header(p, {"a": tensor(shape=[F, 2])}, bytes(4)), "has shape"),
    "shape that overflows": (
        lambda p: write_header(p, {"a": tensor(shape=[2**33, 2**31], offsets=[0, 0])}),
        "does not fit its data_offsets",
    ),
    "shape negative": (lambda p: write_header(p, {"a": tensor(shape=[-1, -1])}, bytes(4)), "has shape"),
    "shape of floats": (lambda p: write_header(p, {"a": tensor(shape=[1.0])}, bytes(4)), "has shape"),
    "shape of rank 1000": (lambda p: write_header(p, {"a": tensor(shape=[1] * 1000)}, bytes(4)), "has shape"),
    "shape too large": (lambda p: write_header(p, {"a": tensor(shape=[2])}, bytes(4)), "does not fit"),
    "offsets backwards": (lambda p: write_header(p, {"a": tensor(offsets=[4, 0])}, bytes(4)), "does not fit"),
    "offsets beyond the end": (lambda p: write_header(p, {"a": tensor()}), "tensor data end at byte 4"),
    "offsets overlapping": (
        lambda p: write_header(p, {"a": tensor(), "b": tensor()}, bytes(4)),
        "overlap or leave a gap",
    ),
    "offsets with a gap": (
        lambda p: write_header(p, {"a": tensor(), "b": tensor(offsets=[8, 12])}, bytes(12)),
        "overlap or leave a gap",
    ),
    "bytes at the end": (lambda p: write_header(p, {"a": tensor()}, bytes(9)), "tensor data end at byte 4"),
    "metadata of numbers": (
        lambda p: write_header(p, {"a": tensor(), "__metadata__": {"x": 1}}, bytes(4)),
        "cannot read agent.safetensors",
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_checkpoint_is_refused_and_the_one_before_loaded(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, expected = SPOILED[kind]
    root = tmp_path / "checkpoints"
    save(root, 1, make_state(1.0))
    newest = save(root, 2, make_state(2.0))
    spoil(newest)
    size = sum(p.stat().st_size for p in newest.iterdir() if p.is_file()) if newest.is_dir() else 0

    tracemalloc.start()
    with caplog.at_level(logging.WARNING):
        loaded = load(root)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert loaded.step == 1
    assert_equal(loaded.state, make_state(1.0))
    [(path, reason)] = loaded.skipped
    assert path == newest
    assert re.search(expected, reason), reason
    assert reason.startswith("step_00000002: ")
    assert caplog.messages == [f"{reason}; falling back to step_00000001"]
    assert len(reason) < 500  # a hostile file does not get to flood the screen
    assert peak < 2 * size + (3 << 20)  # 3 MiB: what reading the good one and the hashing buffer takes
    assert not (root / "code-was-run").exists()

    checkpoint.quarantine(loaded.skipped)
    assert load(root).skipped == ()
    with (
        pytest.raises(CheckpointError, match="step_00000002")
        if newest.exists()
        else pytest.raises(CheckpointError)
    ):
        load(root, which=newest.name)


def test_when_none_is_valid_every_fault_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step, make_state()) / "state.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert "step_00000002: state.json is missing" in str(caught.value)
    assert "step_00000001: state.json is missing" in str(caught.value)


def test_files_the_manifest_does_not_list_are_never_opened(tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_state())
    for name in ("agent.pt", "extra.safetensors", "state.pkl"):
        (path / name).write_bytes(pickled(path))
    os.chmod(path / "agent.pt", 0)
    assert_equal(load(tmp_path).state, make_state())
    assert not (tmp_path / "code-was-run").exists()


def test_a_pickle_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"w": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"model.pt: refused, .* can hold code"):
        load(file)


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            load(folder)


@pytest.mark.parametrize("pointer", ["", "nonsense", "step_00000009", "../step_00000001", "x" * 1000])
def test_a_bad_pointer_does_no_harm(pointer: str, tmp_path: Path) -> None:
    save(tmp_path, 1, make_state())
    for name in ("LATEST", "BEST"):
        (tmp_path / name).write_text(pointer)
    assert load(tmp_path).step == 1
    with pytest.raises(CheckpointError, match="no checkpoint 'best' in"):
        load(tmp_path, which="best")
    save(tmp_path, 2, make_state())
    assert load(tmp_path).step == 2


@pytest.mark.parametrize("seed", range(5))
def test_any_flipped_bit_is_found(seed: int, tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_state())
    rng = random.Random(seed)
    for _ in range(40):
        file = rng.choice(sorted(path.iterdir()))
        good = file.read_bytes()
        spoiled = bytearray(good)
        spoiled[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        file.write_bytes(spoiled)
        try:
            loaded = load(tmp_path).state
        except CheckpointError:
            pass
        else:
            assert_equal(loaded, make_state())  # white space or an ignored byte of the manifest
        file.write_bytes(good)


def test_no_code_of_this_package_can_unpickle() -> None:
    import pywm

    for source in Path(pywm.__file__).parent.rglob("*.py"):
        text = source.read_text()
        for forbidden in ("import pickle", "torch.load(", "torch.save(", "cloudpickle", "allow_pickle=True"):
            assert forbidden not in text, f"{source}: {forbidden}"
