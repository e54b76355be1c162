"""The manifests as Kubernetes would get them: each overlay built by kustomize, and looked at as plain objects."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.parent.name for path in ROOT.glob("k8s/overlays/*/kustomization.yaml"))
Object = Mapping[str, Any]
WORKLOADS = {"Deployment", "StatefulSet", "PodTemplate", "DaemonSet", "Job", "CronJob", "Pod"}
NOT_OURS = {
    "nats": "the bus: NATS's own image and configuration",
    "prometheus": "reads everybody's metrics: its own image, and a configuration that promtool checks",
    "grafana": "draws them: its own image, whose files belong to the user 472",
}
"""What runs something else than `python -m services.NAME`, by `app.kubernetes.io/name`. All else is ours."""


@lru_cache
def built(overlay: str) -> tuple[Object, ...]:
    """All objects of an overlay."""
    return build(f"k8s/overlays/{overlay}")


def build(folder: str) -> tuple[Object, ...]:
    """All objects of a folder."""
    done = subprocess.run([*_kustomize(), folder], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(found for found in yaml.safe_load_all(done.stdout) if found)


def _kustomize() -> list[str]:
    if kubectl := shutil.which("kubectl"):
        return [kubectl, "kustomize"]
    if kustomize := shutil.which("kustomize"):
        return [kustomize, "build"]
    pytest.skip("THE MANIFESTS ARE NOT TESTED: install kubectl or kustomize")


@dataclass(frozen=True)
class Pods:
    """What runs: a workload and the pods that it stands for."""

    workload: Object

    @property
    def name(self) -> str:
        return f"{self.workload['kind']}/{self.workload['metadata']['name']}"

    @property
    def template(self) -> Object:
        found = (
            self.workload["template"] if self.workload["kind"] == "PodTemplate" else self.workload["spec"]["template"]
        )
        assert isinstance(found, dict)
        return found

    @property
    def labels(self) -> Mapping[str, str]:
        return dict(self.template["metadata"]["labels"])

    @property
    def spec(self) -> Object:
        return dict(self.template["spec"])

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def main(self) -> Object:
        return dict(self.spec["containers"][0])

    @property
    def app(self) -> str:
        return self.labels["app.kubernetes.io/name"]

    @property
    def service(self) -> str | None:
        """The service of ours that it is; None: none of ours."""
        return self.labels.get("openrl.dev/service")

    def port(self, wanted: str | int) -> int | None:
        """The number of a port that is named or numbered so; None: there is none."""
        for port in (port for container in self.containers for port in container.get("ports", [])):
            if wanted in (port["name"], port["containerPort"]):
                return int(port["containerPort"])
        return None

    def volume(self, path: str) -> tuple[Object, bool] | None:
        """The volume that a path of the main container is on, and whether it may be written."""
        mounts = [
            m for m in self.main["volumeMounts"] if path == m["mountPath"] or path.startswith(m["mountPath"] + "/")
        ]
        if not mounts:
            return None
        mount = max(mounts, key=lambda m: len(m["mountPath"]))
        volume = next(v for v in self._volumes if v["name"] == mount["name"])
        return volume, not mount.get("readOnly", False)

    @property
    def _volumes(self) -> list[Object]:
        claims = self.workload.get("spec", {}).get("volumeClaimTemplates", [])
        return [*self.spec.get("volumes", []), *({"name": c["metadata"]["name"], **c} for c in claims)]


def workloads(overlay: str) -> list[Pods]:
    return [Pods(found) for found in built(overlay) if found["kind"] in WORKLOADS]


def of_kind(overlay: str, kind: str) -> list[Object]:
    return [found for found in built(overlay) if found["kind"] == kind]


def named(overlay: str, kind: str, name: str) -> Object | None:
    return next((found for found in of_kind(overlay, kind) if found["metadata"]["name"] == name), None)


def matches(selector: Object | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects something with these labels."""
    if selector is None:
        return False
    plain = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return plain and all(_holds(rule, labels) for rule in selector.get("matchExpressions", []))


def _holds(rule: Object, labels: Mapping[str, str]) -> bool:
    value = labels.get(rule["key"])
    match rule["operator"]:
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "In":
            return value in rule["values"]
    raise AssertionError(f"operator {rule['operator']} is not known here")


def everything_below(value: Any) -> Iterator[Object]:
    """Every mapping in an object, itself included."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from everything_below(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from everything_below(inner)
