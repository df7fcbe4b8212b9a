"""Every field of an algorithm's Config is checked against its annotation."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import pytest

from pywm.config import check_fields
from pywm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    lr: float = 0.1
    anneal: bool = True
    name: Literal["a", "b"] = "a"
    clip: float | None = None
    hidden: tuple[int, ...] = (64, 64)
    derived: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        check_fields(self, "x.Config")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", 1.5, "x.Config: seed is 1.5, but expected int"),
        ("seed", True, "x.Config: seed is True, but expected int"),
        ("seed", None, "x.Config: seed is None, but expected int"),
        ("lr", "fast", "x.Config: lr is 'fast', but expected float"),
        ("lr", 10**400, "x.Config: lr is 1000"),
        ("anneal", 1, "x.Config: anneal is 1, but expected bool"),
        ("name", "c", "x.Config: name is 'c', but expected one of 'a', 'b'"),
        ("clip", "x", "x.Config: clip is 'x', but expected float"),
        ("hidden", 64, "x.Config: hidden is 64, but expected a list"),
        ("hidden", (64, 1.5), "x.Config: hidden[1] is 1.5, but expected int"),
    ],
)
def test_a_value_of_another_type_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Config(**{field: value})
    assert message in str(caught.value)


def test_what_fits_is_taken_as_annotated() -> None:
    config = Config(seed=np.int64(3), lr=1, clip=np.float32(0.5), hidden=[8])  # type: ignore[arg-type]
    assert config == Config(seed=3, lr=1.0, clip=0.5, hidden=(8,))
    assert [type(x) for x in (config.seed, config.lr, config.clip)] == [int, float, float]
    assert type(config.hidden) is tuple
