from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, ClassVar, Literal

import pytest

from pywm.config import Change, Preset, check_resume, diff, from_json, suggest, table, to_json
from pywm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Network:
    hidden: tuple[int, ...] = (64, 64)
    activation: Literal["tanh", "relu"] = "tanh"


@dataclasses.dataclass
class Config:
    may_change: ClassVar[tuple[str, ...]] = ("steps",)

    seed: int = 0
    lr: float = 3e-4
    anneal: bool = True
    name: str = "x"
    clip: float | None = None
    size: tuple[int, int] = (84, 84)
    network: Network = dataclasses.field(default_factory=Network)
    critic: Network | None = None
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] | None = None
    many: list[Network] = dataclasses.field(default_factory=list)
    mixed: int | float | str = 1
    derived: int = dataclasses.field(default=3, init=False)


def test_a_configuration_survives_a_file() -> None:
    config = Config(
        seed=2**40,
        lr=math.inf,
        anneal=False,
        clip=0.1,
        network=Network((3,), "relu"),
        critic=Network(()),
        weights={"kl": 0.5},
        extra={"deep": [1, {"x": None}]},
        many=[Network((1, 2))],
        mixed="text",
    )
    text = json.dumps(to_json(config), allow_nan=False)
    data = json.loads(text)
    del data["derived"]
    again = from_json(Config, data)
    assert again == config
    assert type(again.size) is tuple
    assert type(again.network.hidden) is tuple


def test_missing_fields_keep_their_defaults() -> None:
    assert from_json(Config, {"lr": 1}) == Config(lr=1.0)
    assert type(from_json(Config, {"lr": 1}).lr) is float
    assert [from_json(Config, {"mixed": value}).mixed for value in (1, 1.5, "a")] == [1, 1.5, "a"]
    assert type(from_json(Config, {"mixed": 1}).mixed) is int


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"lrr": 1}, "Config has no field 'lrr'. Did you mean 'lr'?"),
        ({"network": {"hiden": [1]}}, "Config.network has no field 'hiden'. Did you mean 'hidden'?"),
        ({"derived": 1}, "Config has no field 'derived'."),
        ({"may_change": []}, "Config has no field 'may_change'."),
        ({"lr": "fast"}, "Config.lr is 'fast', but expected float"),
        ({"lr": True}, "Config.lr is True, but expected float"),
        ({"seed": 1.0}, "Config.seed is 1.0, but expected int"),
        ({"seed": True}, "Config.seed is True, but expected int"),
        ({"anneal": 1}, "Config.anneal is 1, but expected bool"),
        ({"name": None}, "Config.name is None, but expected str"),
        ({"clip": "x"}, "Config.clip is 'x', but expected float"),
        ({"size": [1, 2, 3]}, "Config.size has 3 items, but expected 2"),
        ({"size": 5}, "Config.size is 5, but expected a list"),
        ({"network": {"hidden": [1, "a"]}}, "Config.network.hidden[1] is 'a', but expected int"),
        ({"network": {"activation": "gelu"}}, "activation is 'gelu', but expected one of 'tanh', 'relu'"),
        ({"network": 3}, "Config.network is 3, but expected a JSON object"),
        ({"weights": {"kl": "a"}}, "Config.weights.kl is 'a', but expected float"),
        ({"weights": []}, "Config.weights is [], but expected a JSON object"),
        ({"many": [{"x": 1}]}, "Config.many[0] has no field 'x'"),
        ([], "Config is [], but expected a JSON object"),
    ],
)
def test_what_does_not_fit_is_named(data: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_json(Config, data)
    assert message in str(caught.value)


def test_a_field_without_a_default_must_be_there() -> None:
    needy = dataclasses.make_dataclass("Needy", [("x", int)])
    with pytest.raises(UserError, match=r"Needy: .*'x'"):
        from_json(needy, {})


def test_only_json_values_go_out() -> None:
    with pytest.raises(TypeError, match="to_json: a field is set, but expected a JSON value"):
        to_json(Config(extra={"a": {1}}))
    with pytest.raises(TypeError, match="to_json: config is type, but expected a dataclass instance"):
        to_json(Config)


def test_differences_are_found_in_nested_fields() -> None:
    old, new = to_json(Config()), to_json(Config(lr=1.0, network=Network((3,)), critic=Network()))
    changes = {change.key: (change.old, change.new) for change in diff(old, new)}
    assert changes["lr"] == (3e-4, 1.0)
    assert changes["network.hidden"] == ([64, 64], [3])
    assert changes["critic.hidden"] == (None, [64, 64])
    assert "seed" not in changes
    assert diff(old, old) == []


def test_resume_lets_only_some_fields_change() -> None:
    old = {"steps": 1, "lr": 1.0, "network": {"a": 1, "b": 2}}
    assert check_resume(old, old | {"steps": 2}) == [Change("steps", 1, 2)]
    assert check_resume(old, old | {"network": {"a": 1, "b": 3}}, ("network",)) == [Change("network.b", 2, 3)]
    assert check_resume(old, old | {"network": {"a": 1, "b": 3}}, ("network.b",))
    with pytest.raises(UserError) as caught:
        check_resume(old, old | {"steps": 2, "network": {"a": 5, "b": 2}}, ("steps", "network.b"))
    lines = str(caught.value).splitlines()
    assert lines[0] == "resume: network.a cannot change in a run that has checkpoints"
    assert lines[1].split() == ["key", "old", "new"]
    assert lines[2].split() == ["steps", "1", "2"]
    assert lines[3].split() == ["network.a", "1", "5", "<-", "fixed"]
    assert "--fresh" in lines[4]


def test_tables_are_aligned_and_long_values_cut() -> None:
    lines = table([Change("a", 1, "x" * 100), Change("long.name", None, [1])]).splitlines()
    assert lines[0].index("old") == lines[1].index("1")
    assert lines[0].index("new") == lines[1].index("'x")
    assert len(lines[1]) < 90


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pp", " Did you mean 'ppo'?"),
        ("PPO", " Did you mean 'ppo'?"),
        ("dreamer3", " Did you mean 'dreamer_v3'?"),
        ("zzz", " Choose from dreamer_v3, ppo."),
    ],
)
def test_the_closest_name_is_suggested(name: str, expected: str) -> None:
    assert suggest(name, ["ppo", "dreamer_v3"]) == expected
    assert suggest(name, []) == ""


def test_presets_suit_by_pattern() -> None:
    preset = Preset({}, ("ALE/*", "CartPole-v1"), "")
    assert preset.suits("ALE/Pong-v5")
    assert preset.suits("CartPole-v1")
    assert not preset.suits("CartPole-v0")
    assert not preset.suits("ale/Pong-v5")
