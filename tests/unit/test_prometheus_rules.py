"""The rules that the autoscaler and people rely on, by Prometheus's own test tool."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from services.local.prometheus import find_binary, rule_files
from shared.errors import UserError

CASES = Path(__file__).parent / "prometheus"


@pytest.fixture(scope="module")
def promtool() -> str:
    try:
        return find_binary("promtool")
    except UserError as error:
        pytest.skip(str(error))


def ran(promtool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)


def test_rules_are_valid(promtool: str) -> None:
    outcome = ran(promtool, "check", "rules", *map(str, rule_files()))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("case", sorted(path.name for path in CASES.glob("*.yml")))
def test_rules_give_what_they_should(promtool: str, case: str) -> None:
    outcome = ran(promtool, "test", "rules", str(CASES / case))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_every_alert_is_tested() -> None:
    alerts = [line.split("alert: ")[1] for line in rule_files()[1].read_text().splitlines() if "- alert: " in line]
    tested = (CASES / "alerts.yml").read_text()
    assert alerts
    assert [alert for alert in alerts if f"alertname: {alert}" not in tested] == []
