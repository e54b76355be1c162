"""What pods may do to their node, who may speak to whom, and what the autoscaler may do to the cluster."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.k8s.manifests import OVERLAYS, Object, Pods, matches, named, of_kind, workloads

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
OUTSIDE = ({"app.kubernetes.io/name": "prometheus"}, {"openrl.dev/client": "true"})
"""Pods that policies name and that need not be in the overlay."""
STRANGER = {"app.kubernetes.io/name": "somebody-else"}


@every_overlay
def test_every_container_runs_as_restricted_as_it_can(overlay: str) -> None:
    for pods in workloads(overlay):
        context = pods.spec["securityContext"]
        assert context["runAsNonRoot"]
        assert context["runAsUser"] > 9999
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
def test_only_the_autoscaler_has_a_token_of_the_api_server(overlay: str) -> None:
    with_token = {pods.name for pods in workloads(overlay) if pods.spec["automountServiceAccountToken"]}
    assert with_token == {pods.name for pods in workloads(overlay) if pods.service == "autoscaler"}
    bound = {subject["name"] for binding in of_kind(overlay, "RoleBinding") for subject in binding["subjects"]}
    bound |= {subject["name"] for binding in of_kind(overlay, "ClusterRoleBinding") for subject in binding["subjects"]}
    assert bound == ({"autoscaler"} if with_token else set())


@every_overlay
def test_roles_name_what_they_allow_and_change_nothing_outside_of_the_namespace(overlay: str) -> None:
    roles = [*of_kind(overlay, "Role"), *of_kind(overlay, "ClusterRole")]
    for role in roles:
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert not {"secrets", "pods/exec", "serviceaccounts/token", "roles"} & set(rule["resources"])
            if role["kind"] == "ClusterRole":
                assert set(rule["verbs"]) <= {"get", "list", "watch"}
    for binding in [*of_kind(overlay, "RoleBinding"), *of_kind(overlay, "ClusterRoleBinding")]:
        assert named(overlay, binding["roleRef"]["kind"], binding["roleRef"]["name"])


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
def test_strangers_reach_nothing_and_prometheus_and_clients_what_is_theirs(overlay: str) -> None:
    denied = named(overlay, "NetworkPolicy", "default-deny")
    assert denied is not None
    assert denied["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for pods in workloads(overlay):
        for port in (4222, 6222, 8222, 8470, 9464):
            assert not admits(overlay, pods, STRANGER, port), pods.name
        assert admits(overlay, pods, OUTSIDE[0], 9464 if pods.service else 8222), pods.name
        assert admits(overlay, pods, OUTSIDE[1], 8470) == (pods.service == "gateway"), pods.name


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
