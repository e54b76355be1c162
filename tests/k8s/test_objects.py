"""Every object is one that Kubernetes accepts, and refers only to what is there."""

from __future__ import annotations

import re
import tomllib
from collections import Counter

import kubernetes_validate
import pytest

from tests.k8s.manifests import NOT_OURS, OVERLAYS, ROOT, Pods, built, matches, named, of_kind, workloads

CUSTOM = {"ManagedCertificate", "BackendConfig"}
"""Of GKE: no part of Kubernetes, so there is no schema of them here."""
BY_HAND = {"nats-auth", "gateway-signing", "model-hub"}
"""Secrets that whoever runs a mesh makes: docs/kubernetes.md says how."""
NOT_DEPLOYED = {
    "local": "is the mesh of one machine",
    "gpu_exporter": "would have to see GPUs that it claims none of; here the GPU operator's exporter does that",
}
"""Packages of services/ without pods, and why."""
OF_THE_OPERATOR = {("Role", "openrl-prometheus"), ("RoleBinding", "openrl-prometheus")}
"""What is in the GPU operator's namespace: Prometheus may find its exporters there."""
WITH_DCGM = {"gpu-dra", "gpu-dra-shares", "gpu-device-plugin"}

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@every_overlay
def test_every_object_is_valid(overlay: str) -> None:
    for found in built(overlay):
        if found["kind"] not in CUSTOM:
            kubernetes_validate.validate(found, "1.37", strict=True)


def test_the_check_itself_finds_a_misspelt_field() -> None:
    service = dict(of_kind("dev", "Service")[0])
    service["spec"] = {**service["spec"], "selektor": {}}
    with pytest.raises(kubernetes_validate.ValidationError, match="selektor"):
        kubernetes_validate.validate(service, "1.37", strict=True)


@every_overlay
def test_names_are_unique_and_all_is_in_one_namespace(overlay: str) -> None:
    cluster_wide = {"Namespace", "PriorityClass", "ClusterRole", "ClusterRoleBinding", "DeviceClass"}
    names = Counter((found["kind"], found["metadata"]["name"]) for found in built(overlay))
    assert max(names.values()) == 1
    abroad = OF_THE_OPERATOR if overlay in WITH_DCGM else set()
    assert {name for name in names if name in OF_THE_OPERATOR} == abroad
    for found in built(overlay):
        kind, name = found["kind"], found["metadata"]["name"]
        expected = None if kind in cluster_wide else "gpu-operator" if (kind, name) in abroad else "openrl"
        assert found["metadata"].get("namespace") == expected, name


@every_overlay
def test_every_service_of_the_mesh_is_there(overlay: str) -> None:
    there = {pods.service for pods in workloads(overlay)} - {None}
    services = {path.parent.name for path in ROOT.glob("services/*/__init__.py")}
    assert set(NOT_DEPLOYED) <= services
    assert there == services - set(NOT_DEPLOYED) - ({"autoscaler"} if overlay.startswith("dev") else set())


@every_overlay
def test_whatever_is_not_ours_is_listed_and_runs_no_image_of_ours(overlay: str) -> None:
    assert {pods.app for pods in workloads(overlay) if not pods.service} == set(NOT_OURS)
    for pods in workloads(overlay):
        for container in pods.containers:
            assert container["image"].startswith("openrl/") == (pods.app not in NOT_OURS), pods.name


@every_overlay
def test_pods_carry_the_recommended_labels_and_their_selectors_match(overlay: str) -> None:
    for pods in workloads(overlay):
        assert {"app.kubernetes.io/name", "app.kubernetes.io/part-of"} <= set(pods.labels), pods.name
        assert pods.service in (None, pods.labels["app.kubernetes.io/name"]), pods.name
        if selector := pods.workload.get("spec", {}).get("selector"):
            assert matches(selector, pods.labels), pods.name
            others = [other for other in workloads(overlay) if other.name != pods.name]
            assert not [other.name for other in others if matches(selector, other.labels)], pods.name


@every_overlay
def test_every_service_selects_pods_that_have_its_ports(overlay: str) -> None:
    for service in of_kind(overlay, "Service"):
        selected = [p for p in workloads(overlay) if matches({"matchLabels": service["spec"]["selector"]}, p.labels)]
        assert len(selected) == 1, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            assert selected[0].port(port["targetPort"]), (service["metadata"]["name"], port)


@every_overlay
def test_every_pod_is_covered_by_one_disruption_budget_that_can_be_counted(overlay: str) -> None:
    budgets = of_kind(overlay, "PodDisruptionBudget")
    for pods in workloads(overlay):
        (budget,) = [found["spec"] for found in budgets if matches(found["spec"]["selector"], pods.labels)]
        if pods.workload["kind"] == "PodTemplate":
            # Without a controller that scales them, nothing says of how many pods some may be missing.
            assert isinstance(budget["minAvailable"], int), pods.name
            assert "maxUnavailable" not in budget
    for budget in budgets:
        assert any(matches(budget["spec"]["selector"], pods.labels) for pods in workloads(overlay))


@every_overlay
def test_all_that_pods_refer_to_is_there(overlay: str) -> None:
    for pods in workloads(overlay):
        assert named(overlay, "ServiceAccount", pods.spec["serviceAccountName"]), pods.name
        assert named(overlay, "PriorityClass", pods.spec["priorityClassName"]), pods.name
        for volume in pods.spec.get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                assert named(overlay, "PersistentVolumeClaim", claim["claimName"]), (pods.name, claim)
            if config := volume.get("configMap"):
                assert named(overlay, "ConfigMap", config["name"]), (pods.name, config)
            if secret := volume.get("secret"):
                assert named(overlay, "Secret", secret["secretName"]) or secret["secretName"] in BY_HAND
        for claim in pods.spec.get("resourceClaims", []):
            assert named(overlay, "ResourceClaimTemplate", claim["resourceClaimTemplateName"]), pods.name
        mounted = {mount["name"] for container in pods.containers for mount in container["volumeMounts"]}
        claimed = {c["metadata"]["name"] for c in pods.workload.get("spec", {}).get("volumeClaimTemplates", [])}
        assert mounted == {volume["name"] for volume in pods.spec.get("volumes", [])} | claimed, pods.name


@every_overlay
def test_claims_are_of_classes_that_are_there_and_their_containers_use_them(overlay: str) -> None:
    for template in of_kind(overlay, "ResourceClaimTemplate"):
        for request in template["spec"]["spec"]["devices"]["requests"]:
            assert named(overlay, "DeviceClass", request["exactly"]["deviceClassName"])
    for pods in workloads(overlay):
        claims = {claim["name"] for claim in pods.spec.get("resourceClaims", [])}
        assert claims == {claim["name"] for claim in pods.main.get("resources", {}).get("claims", [])}


@every_overlay
def test_whoever_has_cuda_has_a_gpu(overlay: str) -> None:
    for pods in workloads(overlay):
        wants = "mesh-cuda" in pods.main["image"]
        resources = pods.main["resources"]
        has = "claims" in resources or resources["limits"].get("nvidia.com/gpu") == "1"
        assert wants == has, pods.name
        assert wants == any(variable.get("value") == "cuda" for variable in pods.main.get("env", [])), pods.name


@every_overlay
def test_images_are_pinned_and_ours_are_of_this_version(overlay: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for pods in workloads(overlay):
        for container in pods.containers:
            name, _, tag = container["image"].rpartition(":")
            assert name, container["image"]
            if name.startswith("openrl/"):
                assert tag in ((version, "dev") if overlay.startswith("dev") else (version,))
            else:
                assert re.match(r"v?\d+\.\d+\.\d+", tag), container["image"]


@every_overlay
def test_configuration_that_changes_rolls_the_pods_that_read_it(overlay: str) -> None:
    for kind in ("ConfigMap", "Secret"):
        for found in of_kind(overlay, kind):
            assert re.search(r"-[a-z0-9]{10}$", found["metadata"]["name"]), found["metadata"]["name"]


@every_overlay
def test_probes_ask_ports_that_are_there_and_life_is_not_health(overlay: str) -> None:
    for pods in workloads(overlay):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            request = pods.main[probe]["httpGet"]
            assert pods.port(request["port"]), pods.name
            if pods.service:
                assert request["path"] == ("/livez" if probe == "livenessProbe" else "/healthz")


@every_overlay
def test_resources_are_asked_for_and_memory_is_bounded(overlay: str) -> None:
    for pods in workloads(overlay):
        for container in pods.containers:
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), pods.name
            assert "memory" in container["resources"]["limits"], pods.name


@every_overlay
def test_services_with_several_replicas_are_spread(overlay: str) -> None:
    for pods in workloads(overlay):
        if pods.workload.get("spec", {}).get("replicas", 1) > 1:
            assert pods.spec["topologySpreadConstraints"], pods.name
            for constraint in pods.spec["topologySpreadConstraints"]:
                assert matches(constraint["labelSelector"], pods.labels)


def test_the_servers_of_the_bus_are_on_different_nodes() -> None:
    nats = next(pods for pods in workloads("gpu-dra") if pods.name == "StatefulSet/nats")
    (rule,) = nats.spec["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["topologyKey"] == "kubernetes.io/hostname"
    assert matches(rule["labelSelector"], nats.labels)
    assert nats.workload["spec"]["replicas"] == 3


def test_pods_are_found_at_all() -> None:
    assert {pods.name for pods in workloads("dev")} >= {"StatefulSet/nats", "Deployment/smollm2-135m-trainer"}
    assert {pods.name for pods in workloads("gke")} >= {"PodTemplate/qwen3-600m-sampler", "Deployment/autoscaler"}
    assert isinstance(workloads("dev")[0], Pods)
