"""Recipes of the tinker-cookbook, as they were published, against a mesh of this machine.

Run by `make cookbook`, which installs the cookbook; elsewhere there is nothing to collect. Each recipe is a process of
its own that knows only `TINKER_BASE_URL` and `TINKER_API_KEY`. OPENRL_COOKBOOK_STEPS makes the runs longer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cookbook import offline

pytest.importorskip("tinker_cookbook", reason="`make cookbook` installs it")
pytestmark = pytest.mark.timeout(1200)

STEPS = int(os.environ.get("OPENRL_COOKBOOK_STEPS", "2"))
OPENRL = (sys.executable, "-m", "services.local")
ROOT = Path(__file__).parents[2]
DEMO_MODEL = "smollm2-135m-instruct"
MODEL = f"model_name={offline.MODEL}"


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The demo's model, fetched once into the data directory of this clone."""
    directory = ROOT / ".openrl" / "models" / DEMO_MODEL
    if not (directory / "model.safetensors").exists():
        subprocess.run([*OPENRL, "model", "add", DEMO_MODEL], cwd=ROOT, check=True)
    return directory


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Where recipes run."""
    directory = tmp_path_factory.mktemp("cookbook")
    offline.make(directory, model_dir)
    return directory


@pytest.fixture(scope="session")
def environment(place: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A running mesh, as the two lines that `openrl up` prints."""
    data = str(tmp_path_factory.mktemp("mesh"))
    subprocess.run([*OPENRL, "model", "add", offline.MODEL, str(model_dir), "--data", data], cwd=ROOT, check=True)
    up = subprocess.run(
        [*OPENRL, "up", "--detach", "--port", "0", "--gateway-port", "0", "--data", data],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    lines = (line.strip() for line in up.stdout.splitlines())
    exported = dict(line.removeprefix("export ").split("=", 1) for line in lines if line.startswith("export TINKER_"))
    try:
        yield {
            **os.environ,
            **exported,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(place / "cache"),
            "TOKENIZERS_PARALLELISM": "false",
        }
    finally:
        subprocess.run([*OPENRL, "down", "--data", data], cwd=ROOT, check=True)


class Recipes:
    """Runs recipes and reads what they logged."""

    def __init__(self, place: Path, environment: dict[str, str]) -> None:
        self._place = place
        self._environment = environment

    def run(self, module: str, *settings: str) -> list[dict[str, Any]]:
        """The rows of its metrics file. Fails with the end of its output."""
        log = self._place / "logs" / module
        argv = [sys.executable, "-m", f"tinker_cookbook.recipes.{module}", MODEL, f"log_path={log}", *settings]
        done = subprocess.run(argv, cwd=self._place, env=self._environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def recipes(place: Path, environment: dict[str, str]) -> Recipes:
    return Recipes(place, environment)


def test_sl_loop_learns_its_data(recipes: Recipes) -> None:
    rows = recipes.run(
        "sl_loop", "batch_size=8", "learning_rate=0.004", "lora_rank=8", f"max_steps={max(STEPS, 4)}", "save_every=2"
    )
    losses = [row["train_mean_nll"] for row in rows if "train_mean_nll" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_rl_loop_runs_with_its_default_loss(recipes: Recipes) -> None:
    rows = recipes.run("rl_loop", "batch_size=4", "group_size=8", "lora_rank=8", "max_tokens=24", f"max_steps={STEPS}")
    assert len([row for row in rows if "reward/total" in row]) == STEPS


def test_math_rl_runs_on_arithmetic(recipes: Recipes) -> None:
    rows = recipes.run(
        "math_rl.train",
        "env=arithmetic",
        "renderer_name=qwen3_instruct",
        "groups_per_batch=8",
        "group_size=4",
        "lora_rank=8",
        "learning_rate=4e-4",
        f"max_steps={STEPS}",
        "eval_every=0",
    )
    rewards = [row["env/all/reward/total"] for row in rows if "env/all/reward/total" in row]
    assert len(rewards) == STEPS


def test_guess_number_runs_over_many_turns(recipes: Recipes) -> None:
    rows = recipes.run(
        "multiplayer_rl.guess_number.train",
        "renderer_name=qwen3_instruct",
        "batch_size=2",
        "group_size=4",
        "max_tokens=8",
        f"max_steps={STEPS}",
        "eval_every=0",
    )
    assert len([row for row in rows if "env/all/reward/total" in row]) == STEPS
