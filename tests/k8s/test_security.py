"""What pods may do to their node, who may speak to whom, and what two of them may do to the cluster."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

import pytest

from tests.k8s.manifests import OVERLAYS, ROOT, Object, Pods, matches, named, of_kind, workloads
from tests.k8s.test_objects import WITH_DCGM

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
CLIENT = {"openrl.dev/client": "true"}
ONLOOKER = {"openrl.dev/dashboards": "true"}
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
"""That of the overlay, or one in another namespace."""
OUTSIDE = (CLIENT, ONLOOKER, PROMETHEUS)
"""Pods that policies name and that need not be in the overlay."""
TOKENS = {
    "autoscaler": "makes and ends pods and their claims",
    "prometheus": "asks which pods there are, to read their metrics",
}
"""Who speaks to the API server, and why."""
FIXED_USERS = {"grafana": 472}
"""Images whose files and start script are made for one user, although it is below 10000."""
STRANGER = {"app.kubernetes.io/name": "somebody-else"}


@every_overlay
def test_every_container_runs_as_restricted_as_it_can(overlay: str) -> None:
    for pods in workloads(overlay):
        context = pods.spec["securityContext"]
        assert context["runAsNonRoot"]
        assert context["runAsUser"] > 9999 or context["runAsUser"] == FIXED_USERS.get(pods.app), pods.name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pods.spec), pods.name
        for container in pods.containers:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, pods.name
            assert own["capabilities"] == {"drop": ["ALL"]}, pods.name
            live = overlay == "dev-live" and container["name"] == "service"  # its code is to be overwritten
            assert own["readOnlyRootFilesystem"] is not live, pods.name
        assert not [volume for volume in pods.spec.get("volumes", []) if "hostPath" in volume], pods.name


@every_overlay
def test_the_namespace_enforces_the_restricted_level(overlay: str) -> None:
    namespace = named(overlay, "Namespace", "openrl")
    assert namespace is not None
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@every_overlay
def test_only_two_have_a_token_of_the_api_server(overlay: str) -> None:
    with_token = {pods.app: pods for pods in workloads(overlay) if pods.spec["automountServiceAccountToken"]}
    assert set(with_token) == set(TOKENS) & {pods.app for pods in workloads(overlay)}
    assert "prometheus" in with_token
    subjects = [subject for binding in bindings(overlay) for subject in binding["subjects"]]
    assert {(subject["kind"], subject["name"], subject["namespace"]) for subject in subjects} == {
        ("ServiceAccount", pods.spec["serviceAccountName"], "openrl") for pods in with_token.values()
    }
    others = [pods.spec["serviceAccountName"] for pods in workloads(overlay) if pods.app not in TOKENS]
    assert not set(others) & {pods.spec["serviceAccountName"] for pods in with_token.values()}


@every_overlay
def test_prometheus_may_look_at_pods_of_its_namespace_and_of_the_gpu_operators(overlay: str) -> None:
    own = [found for found in bindings(overlay) if "prometheus" in [subject["name"] for subject in found["subjects"]]]
    places = {found["metadata"].get("namespace") for found in own}
    assert places == ({"openrl", "gpu-operator"} if overlay in WITH_DCGM else {"openrl"})
    for binding in own:
        assert binding["kind"] == "RoleBinding"
        assert binding["roleRef"]["kind"] == "Role"
        role = named(overlay, "Role", binding["roleRef"]["name"])
        assert role is not None
        assert role["metadata"]["namespace"] == binding["metadata"]["namespace"]
        assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]


def _autoscaler(overlay: str) -> dict[str, Any]:
    """Its configuration; empty: the overlay has none."""
    files = [found["data"].get("autoscaler.toml", "") for found in of_kind(overlay, "ConfigMap")]
    return tomllib.loads("".join(files))


def bindings(overlay: str) -> list[Object]:
    return [*of_kind(overlay, "RoleBinding"), *of_kind(overlay, "ClusterRoleBinding")]


@every_overlay
def test_roles_name_what_they_allow_and_change_nothing_outside_of_the_namespace(overlay: str) -> None:
    roles = [*of_kind(overlay, "Role"), *of_kind(overlay, "ClusterRole")]
    for role in roles:
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert not {"secrets", "pods/exec", "serviceaccounts/token", "roles"} & set(rule["resources"])
            if role["kind"] == "ClusterRole":
                assert set(rule["verbs"]) <= {"get", "list", "watch"}
    for binding in bindings(overlay):
        assert named(overlay, binding["roleRef"]["kind"], binding["roleRef"]["name"])


@every_overlay
def test_the_autoscaler_may_do_what_its_documentation_names_and_no_more(overlay: str) -> None:
    """What the actuator really asks for is compared with the same table in test_actuator."""
    text = (ROOT / "docs" / "autoscaler.md").read_text().partition("**What it may do**")[2].partition("## Limits")[0]
    rows = re.findall(r"^\| ([a-z]+) \| ([a-z, ]+) \| (.+) \|$", text, re.MULTILINE)
    mode = _autoscaler(overlay).get("kubernetes", {}).get("mode", "")
    wanted = {
        name: set(verbs.split(", "))
        for name, verbs, where in rows
        if name != "resource" and ("`dra`" not in where or mode == "dra")
    }
    allowed_verbs: dict[str, set[str]] = {}
    for binding in bindings(overlay):
        if "autoscaler" not in [subject["name"] for subject in binding["subjects"]]:
            continue
        role = named(overlay, binding["roleRef"]["kind"], binding["roleRef"]["name"])
        assert role is not None
        for rule in role["rules"]:
            for resource in rule["resources"]:
                allowed_verbs.setdefault(resource, set()).update(rule["verbs"])
    assert allowed_verbs == (wanted if mode else {})


@every_overlay
def test_every_policy_selects_pods_and_names_peers_and_ports_that_are_there(overlay: str) -> None:
    for policy in of_kind(overlay, "NetworkPolicy"):
        name, spec = policy["metadata"]["name"], policy["spec"]
        selected = [pods for pods in workloads(overlay) if matches(spec["podSelector"], pods.labels)]
        assert selected, name
        for rule in spec.get("ingress", []):
            for port in rule["ports"]:
                assert any(pods.port(port["port"]) for pods in selected), (name, port)
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            for peer in rule.get("from", rule.get("to", [])):
                if selector := peer.get("podSelector"):
                    known = any(matches(selector, pods.labels) for pods in workloads(overlay))
                    assert known or selector["matchLabels"] in OUTSIDE, (name, peer)


@every_overlay
def test_services_reach_the_bus_and_nothing_else_in_the_mesh(overlay: str) -> None:
    everybody = workloads(overlay)
    nats = next(pods for pods in everybody if pods.name == "StatefulSet/nats")
    services = [pods for pods in everybody if pods.service]
    for pods in services:
        assert allowed(overlay, pods.labels, nats, 4222), pods.name
        assert not allowed(overlay, pods.labels, nats, 6222), pods.name
        assert not allowed(overlay, pods.labels, nats, 8222), pods.name
        for other in services:
            for port in (9464, 8470):
                assert not allowed(overlay, pods.labels, other, port), (pods.name, other.name)


@every_overlay
def test_strangers_reach_nothing_and_clients_and_onlookers_what_is_theirs(overlay: str) -> None:
    denied = named(overlay, "NetworkPolicy", "default-deny")
    assert denied is not None
    assert denied["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for pods in workloads(overlay):
        for port in ports(pods):
            assert not admits(overlay, pods, STRANGER, port), pods.name
            assert admits(overlay, pods, CLIENT, port) == ((pods.app, port) == ("gateway", 8470)), pods.name
            assert admits(overlay, pods, ONLOOKER, port) == ((pods.app, port) == ("grafana", 3000)), pods.name


def ports(pods: Pods) -> list[int]:
    return [port["containerPort"] for container in pods.containers for port in container.get("ports", [])]


@every_overlay
def test_prometheus_reaches_every_service_s_metrics_and_nothing_else(overlay: str) -> None:
    prometheus = one(overlay, "prometheus")
    for pods in workloads(overlay):
        for port in ports(pods):
            assert allowed(overlay, prometheus.labels, pods, port) == (bool(pods.service) and port == 9464), pods.name
    # One that is elsewhere may have an exporter of the bus beside it.
    assert admits(overlay, one(overlay, "nats"), PROMETHEUS, 8222)


@every_overlay
def test_grafana_and_the_autoscaler_reach_prometheus_and_nobody_else_does(overlay: str) -> None:
    prometheus = one(overlay, "prometheus")
    for pods in workloads(overlay):
        asks = pods.app in ("grafana", "autoscaler")
        assert allowed(overlay, pods.labels, prometheus, 9090) == asks, pods.name
    grafana = one(overlay, "grafana")
    for pods in workloads(overlay):
        for port in ports(pods):
            expected = (pods.app, port) == ("prometheus", 9090)
            assert allowed(overlay, grafana.labels, pods, port) == expected, pods.name


def one(overlay: str, app: str) -> Pods:
    (found,) = [pods for pods in workloads(overlay) if pods.app == app]
    return found


def test_the_servers_of_the_bus_reach_each_other() -> None:
    nats = next(pods for pods in workloads("gpu-dra") if pods.name == "StatefulSet/nats")
    assert allowed("gpu-dra", nats.labels, nats, 6222)


def allowed(overlay: str, source: Mapping[str, str], target: Pods, port: int) -> bool:
    """Whether a pod of the namespace with these labels may open a connection to another one."""
    egress = [
        rule
        for policy in of_kind(overlay, "NetworkPolicy")
        if "Egress" in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], source)
        for rule in policy["spec"].get("egress", [])
    ]
    out = any(
        _names(peer, target.labels) and _has(rule, target, port) for rule in egress for peer in rule.get("to", [])
    )
    return out and admits(overlay, target, source, port)


def admits(overlay: str, target: Pods, source: Mapping[str, str], port: int) -> bool:
    """Whether a pod lets itself be connected to by a pod with these labels."""
    ingress = [
        rule
        for policy in of_kind(overlay, "NetworkPolicy")
        if "Ingress" in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], target.labels)
        for rule in policy["spec"].get("ingress", [])
    ]
    return any(_names(peer, source) and _has(rule, target, port) for rule in ingress for peer in rule["from"])


def _names(peer: Object, labels: Mapping[str, str]) -> bool:
    return "podSelector" in peer and matches(peer["podSelector"], labels)


def _has(rule: Object, target: Pods, port: int) -> bool:
    return any(port == given["port"] or target.port(given["port"]) == port for given in rule["ports"])
