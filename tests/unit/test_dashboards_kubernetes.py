"""Monitoring on Kubernetes: what is mounted is what is committed, and Prometheus's configurations are valid."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards.build import JSON
from services.local.prometheus import SCRAPE_SECONDS, find_binary, rule_files
from shared.errors import UserError

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "k8s" / "components" / "monitoring"
CONFIGS = (MONITORING / "prometheus.yml", MONITORING / "dcgm" / "prometheus.yml")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_all_rules_and_dashboards_become_config_maps() -> None:
    maps = {
        each["name"]: set(each["files"]) for each in load(ROOT / "dashboards/kustomization.yaml")["configMapGenerator"]
    }
    assert maps["grafana-dashboards"] == {f"json/{path.name}" for path in JSON.iterdir()}
    assert maps["prometheus-rules"] == {path.name for path in rule_files()}


def test_the_configuration_with_dcgm_is_the_other_one_and_a_job_more() -> None:
    plain, dcgm = map(load, CONFIGS)
    assert dcgm["scrape_configs"][:-1] == plain.pop("scrape_configs")
    assert dcgm.pop("scrape_configs")[-1]["job_name"] == "gpu"
    assert plain == dcgm


def test_intervals_are_those_of_one_machine_and_grafana_knows_them() -> None:
    assert load(CONFIGS[0])["global"]["scrape_interval"] == f"{SCRAPE_SECONDS}s"
    source = load(ROOT / "dashboards/provisioning/datasources/openrl.yml")["datasources"][0]
    assert source["jsonData"]["timeInterval"] == f"{SCRAPE_SECONDS}s"
    assert source["uid"] == "openrl"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_configurations_are_valid(path: Path, tmp_path: Path) -> None:
    try:
        promtool = find_binary("promtool")
    except UserError as error:
        pytest.skip(str(error))
    config = load(path)
    for job in config["scrape_configs"]:
        job.pop("kubernetes_sd_configs", None)  # Debian builds Prometheus without it
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    asked = [promtool, "check", "config", "--syntax-only", str(tmp_path / "prometheus.yml")]
    outcome = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
