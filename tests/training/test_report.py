from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pywm.errors import MissingExtra, UserError
from pywm.training import report


def write_run(folder: Path, seed: int, curve: list[tuple[int, float | None]], *, env: str = "E-v0") -> Path:
    folder.mkdir(parents=True)
    about = {"algo": "tiny", "env": env, "seed": seed, "config": {}}
    (folder / "config.json").write_text(json.dumps(about))
    rows = [{"env_steps": x, "return/mean": y, "time/total": x * 3.6} for x, y in curve]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# Statistics.


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([5.0], 5.0),
        ([1.0, 2.0, 6.0], 3.0),
        ([-100.0, 1.0, 2.0, 900.0], 1.5),
        ([9.0, 1.0, 2.0, 3.0, 4.0], 3.0),  # one off each end
        (list(range(8)), 3.5),  # two off each end
    ],
)
def test_iqm_is_the_mean_of_the_middle_half(scores: list[float], expected: float) -> None:
    assert report.iqm(np.array(scores)) == pytest.approx(expected)
    assert report.iqm(np.array([scores, scores]), axis=1) == pytest.approx([expected, expected])


def test_the_band_is_reproducible_and_holds_the_statistic() -> None:
    scores = np.random.default_rng(1).normal(size=(5, 3, 4))
    low, high = report.bootstrap_band(scores, resamples=500)
    again = report.bootstrap_band(scores, resamples=500)
    assert np.array_equal(low, again[0])
    assert np.array_equal(high, again[1])
    assert low.shape == high.shape == (4,)
    middle = report.iqm(scores.reshape(15, 4))
    assert (low < middle).all()
    assert (middle < high).all()
    wide = report.bootstrap_band(scores, resamples=500, level=0.99)
    assert (wide[0] <= low).all()
    assert (wide[1] >= high).all()


def test_the_bootstrap_is_stratified_by_task() -> None:
    # Two tasks, all runs of a task equal: drawn within tasks, every resample is the same.
    scores = np.stack([np.zeros(4), np.full(4, 100.0)], axis=1)
    low, high = report.bootstrap_band(scores, statistic=lambda sample: sample.mean(axis=1))
    assert low == high == 50.0


def test_the_band_covers_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(0), 0
    mean = lambda sample: sample.mean(axis=1)  # noqa: E731
    for _ in range(200):
        low, high = report.bootstrap_band(rng.normal(size=(30, 1)), statistic=mean, level=0.9, resamples=300)
        hits += int(low <= 0.0 <= high)
    assert 165 <= hits <= 193  # 180 expected; the percentile bootstrap of 30 is a little narrow


# Curves.


def test_seeds_of_one_algorithm_and_environment_form_a_curve(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0, [(0, 0.0), (100, 10.0), (200, 20.0)])
    write_run(tmp_path / "b", 1, [(0, 0.0), (50, None), (150, 30.0)])
    write_run(tmp_path / "c", 0, [(0, 5.0), (10, 5.0)], env="F-v0")
    first, second = report.curves([tmp_path])
    assert (first.name, first.seeds) == ("tiny · E-v0", (0, 1))
    assert second.name == "tiny · F-v0"
    assert first.x[0] == 0
    assert first.x[-1] == 150  # as far as both have come
    assert first.y[:, -1] == pytest.approx([15.0, 30.0])
    [hours, _] = report.curves([tmp_path], x="hours")
    assert hours.x[-1] == pytest.approx(0.15)


def test_what_cannot_be_plotted_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        report.curves([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="no run"):
        report.curves([tmp_path])
    write_run(tmp_path / "a", 0, [(0, 0.0)])
    with pytest.raises(
        UserError, match=r"none of the 1 runs has the metric 'retrun'; they have .*return/mean"
    ):
        report.curves([tmp_path], metric="retrun")


def test_runs_that_were_put_aside_are_not_plotted(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0, [(0, 0.0)])
    write_run(tmp_path / "a/previous-1", 0, [(0, 9.0)])
    assert report.find_runs([tmp_path, tmp_path / "a"]) == [tmp_path / "a"]


def test_a_run_that_was_put_aside_is_plotted_when_it_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a/previous-1", 0, [(0, 9.0)])
    write_run(tmp_path / "my-previous-run", 0, [(0, 9.0)])
    assert report.find_runs([tmp_path / "a/previous-1"]) == [tmp_path / "a/previous-1"]
    assert report.find_runs([tmp_path]) == [tmp_path / "my-previous-run"]


def test_a_plot_is_a_picture_with_curve_and_band(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / f"{seed}", seed, [(0, 0.0), (100, 10.0 + seed)])
    write_run(tmp_path / "one", 0, [(50, 3.0)], env="F-v0")
    out = report.plot([tmp_path], tmp_path / "new/curves.png")
    with Image.open(out) as image:
        assert image.format == "PNG"
        colors = {pixel for _, pixel in image.convert("RGB").getcolors(1 << 24)}
    assert (31, 119, 180) in colors  # the first curve
    assert any(abs(r - 210) < 8 and abs(g - 228) < 8 and abs(b - 240) < 8 for r, g, b in colors)  # its band
    assert report.plot([tmp_path], tmp_path / "curves.svg").read_text().lstrip().startswith("<?xml")
    with pytest.raises(UserError, match="cannot write"):
        report.plot([tmp_path], tmp_path / "curves.nonsense")


def test_plotting_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r'matplotlib is not installed. .* pip install "pywm\[plot\]"'):
        report.plot([tmp_path])


# Films.


def frames(count: int, height: int = 5, width: int = 7) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(256, size=(height, width, 3), dtype=np.uint8) for _ in range(count)]


def test_a_gif_has_every_frame(tmp_path: Path) -> None:
    path = report.write_gif(frames(12), tmp_path / "a.gif", fps=20)
    with Image.open(path) as image:
        assert (image.format, image.size, image.n_frames) == ("GIF", (7, 5), 12)
        assert image.info["duration"] == 50
        assert image.info["loop"] == 0


def test_a_long_gif_is_thinned(tmp_path: Path) -> None:
    with Image.open(report.write_gif(frames(700), tmp_path / "a.gif", fps=50)) as image:
        assert 200 <= image.n_frames <= 300
        assert image.info["duration"] == 60  # three times 20 ms: it plays as fast as before


def test_a_large_gif_is_shrunk(tmp_path: Path) -> None:
    with Image.open(report.write_gif(frames(2, 600, 900), tmp_path / "a.gif")) as image:
        assert image.size == (300, 200)


def test_grey_and_batched_frames_are_taken(tmp_path: Path) -> None:
    grey = [np.full((4, 6), value, np.uint8) for value in (0, 90)]
    with Image.open(report.write_gif(grey, tmp_path / "a.gif")) as image:
        assert image.size == (6, 4)
    with Image.open(report.write_gif([f[None] for f in frames(2)], tmp_path / "b.gif")) as image:
        assert image.size == (7, 5)


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 3)), np.zeros((4, 4, 5), np.uint8), np.zeros(3, np.uint8)])
def test_what_is_no_picture_is_refused(bad: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"write_gif: a frame is .* but expected uint8 \[height, width, 3\]"):
        report.write_gif([bad], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="frames is empty"):
        report.write_gif([], tmp_path / "a.gif")


@pytest.mark.filterwarnings("ignore:.*unclosed file")  # imageio's reader leaves its pipes to the collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_video_of_odd_size_is_padded(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    import imageio.v2 as imageio

    path = report.write_video(frames(5, 33, 51), tmp_path / "a.mp4")
    assert path.stat().st_size > 0
    with imageio.get_reader(path) as reader:
        assert reader.get_data(0).shape == (34, 52, 3)
        assert reader.count_frames() == 5
    with pytest.raises(ValueError, match="frames is empty"):
        report.write_video([], tmp_path / "a.mp4")


def test_an_encoder_that_writes_nothing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *exc: object) -> None:
            (tmp_path / "a.mp4").touch()

        def append_data(self, frame: Any) -> None:
            assert frame.shape == (6, 8, 3)

    fake = SimpleNamespace(get_writer=lambda *_, **__: Writer())
    monkeypatch.setattr(report, "require_extra", lambda *_: fake)
    with pytest.raises(OSError, match="the encoder wrote nothing"):
        report.write_video(frames(2), tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists()


def test_video_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio.v2", None)
    with pytest.raises(MissingExtra, match=r'pip install "pywm\[video\]"'):
        report.write_video(frames(2), tmp_path / "a.mp4")
