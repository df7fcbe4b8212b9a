"""The rollout stores each observation once and keeps true successors only where an episode was cut."""

from __future__ import annotations

import numpy as np
import torch

from pywm.data.rollout import Rollout, Slot


def _rollout() -> Rollout:
    slots = {"image": Slot((1, 2, 2), torch.uint8), "vector": Slot((3,), torch.float32)}
    return Rollout(4, 2, obs=slots)


def _obs(t: int) -> dict[str, np.ndarray]:
    vector = np.arange(6, dtype=np.float64).reshape(2, 3) + 10 * t
    return {"image": np.full((2, 1, 2, 2), t, np.uint8), "vector": vector}


def test_observations_keep_their_dtype_and_place() -> None:
    rollout = _rollout()
    for t in range(5):
        rollout.write_obs(t, _obs(t))
    assert rollout.obs["image"].dtype == torch.uint8
    assert rollout.obs["image"].shape == (5, 2, 1, 2, 2)
    assert rollout.obs["image"][:, 1, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert rollout.obs["vector"].dtype == torch.float32
    assert rollout.rows[3]["vector"].tolist() == _obs(3)["vector"].tolist()
    assert rollout.rows[3]["vector"].data_ptr() == rollout.obs["vector"][3].data_ptr()


def test_the_next_rollout_begins_where_this_one_ended() -> None:
    rollout = _rollout()
    rollout.write_obs(-1, _obs(7))
    rollout.write_final(0, _obs(1), np.array([1]))
    rollout.restart()
    assert rollout.rows[0]["vector"].tolist() == _obs(7)["vector"].tolist()
    assert rollout.final_obs() is None


def test_final_observations_name_their_transition() -> None:
    rollout = _rollout()
    rollout.write_final(0, _obs(1), np.array([1]))
    rollout.write_final(3, _obs(5), np.array([0, 1]))
    final = rollout.final_obs()
    assert final is not None
    assert final.row.tolist() == [1, 6, 7]
    assert final.obs["vector"].dtype == torch.float32
    assert final.obs["vector"][:, 0].tolist() == [13.0, 50.0, 53.0]
    assert final.obs["image"].dtype == torch.uint8
    assert final.obs["image"][:, 0, 0, 0].tolist() == [1, 5, 5]


def test_columns_are_what_was_written() -> None:
    rollout = _rollout()
    flags = np.array([True, False]), np.array([False, True]), np.array([True, True])
    rollout.write_step(2, np.array([0.5, -1.0]), *flags)
    assert rollout.column(rollout.reward)[2].tolist() == [0.5, -1.0]
    assert rollout.column(rollout.terminated)[2].tolist() == [True, False]
    assert rollout.column(rollout.truncated)[2].tolist() == [False, True]
    assert rollout.column(rollout.reward).dtype == torch.float32
    assert rollout.valid.all()
