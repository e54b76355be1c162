"""How environments are registered: built in, as classes, as functions, and plugins that do not work."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from services.environment.api import Environment, EnvironmentParams, Task
from services.environment.builtin.arithmetic import Arithmetic
from services.environment.registry import FAMILY, Registry, from_function
from shared.contracts.episodes import EnvironmentSpec, Message
from shared.errors import UserError

REGISTRY = Registry.load([])


def test_what_is_built_in_is_what_the_package_registers() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["openrl.environments"] == FAMILY.builtin


def test_an_unknown_environment_is_told_with_what_there_is() -> None:
    with pytest.raises(UserError, match="'arithmetics' is unknown: did you mean 'arithmetic'"):
        REGISTRY.make(EnvironmentSpec(name="arithmetics"))
    with pytest.raises(UserError, match="There are arithmetic, guess_number, reasoning_gym"):
        REGISTRY.make(EnvironmentSpec(name="nothing_like_it"))


def test_a_function_is_an_environment_with_checked_parameters() -> None:
    def mine(split: str, index: int, seed: int, *, base: int, names: tuple[str, ...] = ("a",)) -> Task:
        return Task(question=f"{split} {index} {seed} {base} {names[0]}")

    registry = Registry({"mine": from_function("mine", mine)})
    environment = registry.make(EnvironmentSpec(name="mine", params={"base": 3}))
    assert environment.size("train") is None
    assert environment.task("train", 1, 2).question == "train 1 2 3 a"
    for params, wrong in (
        ({}, "missing required field `base`"),
        ({"base": "x"}, "Expected `int`, got `str` - at `environment.params.base`"),
        ({"base": 1, "bases": 2}, "has no parameter 'bases': it has base, names"),
    ):
        with pytest.raises(UserError, match=wrong):
            registry.make(EnvironmentSpec(name="mine", params=params))


def test_broken_plugins_are_named_and_the_others_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_raising.py").write_text("raise RuntimeError('no licence')")
    (tmp_path / "plugin_fine.py").write_text(
        "from services.environment.api import Environment, Task\n"
        "def fine(split, index, seed):\n    return Task(question='?')\n"
        "class Half(Environment):\n    pass\n"
        "def short(split):\n    pass\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = {
        "raising": "plugin_raising:x", "missing": "plugin_missing:x", "absent": "plugin_fine:x",
        "half": "plugin_fine:Half", "short": "plugin_fine:short", "number": "plugin_fine:number",
        "fine": "plugin_fine:fine", "Bad.Name": "plugin_fine:fine",
    }  # fmt: skip
    registry = Registry.load([f"{name}={target}" for name, target in plugins.items()])
    assert registry.names == ["arithmetic", "fine", "guess_number", "reasoning_gym"]
    assert set(registry.broken) == set(plugins) - {"fine"}
    for name, reason in (
        ("raising", "RuntimeError: no licence"),
        ("half", r"Half lacks task\(\)"),
        ("number", "is 3:"),
    ):
        with pytest.raises(UserError, match=f"environment '{name}' could not be loaded .*{reason}"):
            registry.make(EnvironmentSpec(name=name))
    sys.modules.pop("plugin_fine", None)


def test_a_plugin_cannot_take_the_name_of_another() -> None:
    registry = Registry.load(["arithmetic=services.environment.builtin.guess_number:GuessNumber"])
    assert isinstance(registry.make(EnvironmentSpec(name="arithmetic")), Arithmetic)
    assert "is taken" in registry.broken["arithmetic"]


def test_a_plugin_that_is_not_understood_is_a_configuration_error() -> None:
    with pytest.raises(UserError, match=r"plugin 'mine' is not understood: write it as name=module:attribute"):
        Registry.load(["mine"])


def test_an_environment_needs_params_of_its_own_only_if_it_has_any() -> None:
    class Plain(Environment[EnvironmentParams]):
        def task(self, split: object, index: int, seed: int) -> Task:
            return Task(question=str(index))

    registry = Registry({"plain": Plain})
    assert registry.make(EnvironmentSpec(name="plain")).start(Task(question="q")) == [Message(role="user", content="q")]
    with pytest.raises(UserError, match="'plain' has no parameter 'x': it has none"):
        registry.make(EnvironmentSpec(name="plain", params={"x": 1}))


def test_every_wrong_parameter_is_named_with_its_path_and_a_hint() -> None:
    found = REGISTRY.errors("arithmetic", {"zzz": 1, "carri": True, "min": "a", "operands": 0}, "environment")
    errors = {error.path: error.message for error in found}
    assert set(errors) == {
        "environment.params.zzz", "environment.params.carri", "environment.params.min", "environment.params.operands"
    }  # fmt: skip
    assert errors["environment.params.carri"] == "unknown parameter; did you mean 'carry'?"
    assert errors["environment.params.zzz"].startswith("unknown parameter; known parameters: operations, operands, min")
    assert "Expected `int" in errors["environment.params.min"]
    assert REGISTRY.errors("chess", {}, "environment")[0].path == "environment.name"


def test_parameters_of_a_function_are_checked_in_the_same_way() -> None:
    def mine(split: str, index: int, seed: int, *, base: int, names: tuple[str, ...] = ("a",)) -> Task:
        return Task(question=f"{split} {index} {seed} {base} {names[0]}")

    registry = Registry({"mine": from_function("mine", mine)})
    assert registry.errors("mine", {"base": 3}, "environment") == []
    found = registry.errors("mine", {"names": 3, "bases": 1}, "environment")
    assert [error.path.removeprefix("environment.params.") for error in found] == ["bases", "base", "names"]
