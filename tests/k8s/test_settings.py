"""What pods are told: loaded by the services' own configuration, and in agreement with the rest of the manifests."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from services.local.nats_server import find_binary
from shared import config, topology
from shared.config import ServiceConfig
from shared.errors import UserError
from tests.k8s.manifests import OVERLAYS, ROOT, Object, Pods, named, of_kind, workloads
from tests.k8s.test_objects import BY_HAND, WITH_DCGM

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
BUCKETS = ("s3://", "gs://")


def environment(overlay: str, pods: Pods) -> dict[str, str]:
    """The variables of a pod's main container, as the kubelet would set them."""
    found: dict[str, str] = {}
    for source in pods.main.get("envFrom", []):
        found |= data(overlay, "ConfigMap", source["configMapRef"]["name"])
    for variable in pods.main.get("env", []):
        found[variable["name"]] = variable["value"] if "value" in variable else _from(overlay, pods, variable)
    return found


def _from(overlay: str, pods: Pods, variable: Object) -> str:
    origin = variable["valueFrom"]
    if field := origin.get("fieldRef"):
        path: str = field["fieldPath"]
        return pods.labels[path.split("'")[1]] if path.startswith("metadata.labels[") else "a-pod"
    kind, key = ("ConfigMap", "configMapKeyRef") if "configMapKeyRef" in origin else ("Secret", "secretKeyRef")
    reference = origin[key]
    return data(overlay, kind, reference["name"])[reference["key"]]


def data(overlay: str, kind: str, name: str) -> Mapping[str, str]:
    found = named(overlay, kind, name)
    if found is None:
        assert name in BY_HAND, (kind, name)
        return {"username": "user", "password": "secret", "signing-key": "key", "token": "token"}
    return dict(found["data"])


def settings(overlay: str, pods: Pods, scratch: Path) -> ServiceConfig:
    """A service's configuration, loaded by its own code. Raise `UserError` for what it does not know."""
    assert pods.service is not None
    environ = environment(overlay, pods)
    strange = [name for name in environ if name.startswith("OPENRL_")]
    strange = [name for name in strange if not name.startswith(("OPENRL_MESH_", f"OPENRL_{pods.service.upper()}_"))]
    assert not strange, f"{pods.name} is told what is another service's: {strange}"
    return config.load(kind_of(pods.service), pods.service, config_file(overlay, pods, scratch), environ)


def kind_of(service: str) -> type[ServiceConfig]:
    module = importlib.import_module(f"services.{service}.config")
    (kind,) = [
        found
        for found in vars(module).values()
        if isinstance(found, type) and issubclass(found, ServiceConfig) and found is not ServiceConfig
    ]
    return kind


def config_file(overlay: str, pods: Pods, scratch: Path) -> Path | None:
    args = pods.main["args"]
    if "--config" not in args:
        return None
    place = Path(args[args.index("--config") + 1])
    found = pods.volume(str(place))
    assert found is not None
    file = scratch / place.name
    file.write_text(data(overlay, "ConfigMap", found[0]["configMap"]["name"])[place.name])
    return file


def services(overlay: str) -> list[Pods]:
    return [pods for pods in workloads(overlay) if pods.service]


@every_overlay
def test_every_setting_is_known_to_its_service_and_of_its_type(overlay: str, tmp_path: Path) -> None:
    for pods in services(overlay):
        loaded = settings(overlay, pods, tmp_path)
        assert loaded.replica == "a-pod"
        assert loaded.nats_password


def test_an_unknown_setting_and_a_wrong_one_are_found(tmp_path: Path) -> None:
    pods = next(pods for pods in services("dev") if pods.service == "reward")
    for name, value in (("OPENRL_REWARD_PROZESSES", "4"), ("OPENRL_REWARD_PROCESSES", "many")):
        changed = msgspec.json.decode(msgspec.json.encode(pods.workload))
        changed["spec"]["template"]["spec"]["containers"][0]["env"].append({"name": name, "value": value})
        with pytest.raises(UserError, match="PROZESSES|processes"):
            settings("dev", Pods(changed), tmp_path)


@every_overlay
def test_commands_run_the_service_that_the_pod_is_called(overlay: str) -> None:
    for pods in services(overlay):
        service = environment(overlay, pods).get("SERVICE", "")
        words = " ".join(pods.main["args"]).replace("$(SERVICE)", service).split()
        assert words[words.index("python") + 1 : words.index("python") + 3] == ["-m", f"services.{pods.service}"]


@every_overlay
def test_pods_are_given_longer_to_end_than_they_take_to_drain(overlay: str, tmp_path: Path) -> None:
    for pods in services(overlay):
        assert pods.spec["terminationGracePeriodSeconds"] >= settings(overlay, pods, tmp_path).drain_seconds + 20
        if "watchfiles" in pods.main["args"]:
            patience = next(int(a.split("=")[1]) for a in pods.main["args"] if a.startswith("--sigint-timeout"))
            assert patience > settings(overlay, pods, tmp_path).drain_seconds


@every_overlay
def test_ports_and_addresses_are_where_others_look_for_them(overlay: str, tmp_path: Path) -> None:
    nats = next(pods for pods in workloads(overlay) if pods.name == "StatefulSet/nats")
    for pods in services(overlay):
        loaded = settings(overlay, pods, tmp_path)
        assert loaded.host == "0.0.0.0"
        assert loaded.metrics_port == pods.port("metrics")
        host, _, port = loaded.nats_url.removeprefix("nats://").partition(":")
        service = named(overlay, "Service", host)
        assert service is not None
        assert int(port) in [given["port"] for given in service["spec"]["ports"]]
        assert loaded.stream_replicas == nats.workload["spec"]["replicas"]
        if (http := getattr(loaded, "port", None)) is not None:
            assert http == pods.port("http")


@every_overlay
def test_every_path_in_a_setting_is_on_a_volume_that_can_be_written_where_it_must_be(
    overlay: str, tmp_path: Path
) -> None:
    for pods in services(overlay):
        loaded = settings(overlay, pods, tmp_path)
        if not loaded.blob_url.startswith(BUCKETS):
            assert _writable(pods, loaded.blob_url), pods.name
        if pods.service == "coordinator":
            assert _writable(pods, str(getattr(loaded, "metrics_dir")))  # noqa: B009 - of this service alone
        for place in ("/tmp", "/cache"):
            assert _writable(pods, place), pods.name
        if (secret := getattr(loaded, "secret_file", None)) is not None:
            volume = pods.volume(secret)
            assert volume is not None
            assert Path(secret).name in data(overlay, "Secret", volume[0]["secret"]["secretName"])


def _writable(pods: Pods, path: str) -> bool:
    found = pods.volume(path)
    return found is not None and found[1]


@every_overlay
def test_all_pods_of_a_pool_serve_the_model_that_the_environment_service_knows(overlay: str, tmp_path: Path) -> None:
    (environments,) = [pods for pods in services(overlay) if pods.service == "environment"]
    known: dict[str, str] = getattr(settings(overlay, environments, tmp_path), "models")  # noqa: B009
    served: dict[str, str] = {}
    for pods in services(overlay):
        if pods.service in ("sampler", "trainer"):
            loaded: Any = settings(overlay, pods, tmp_path)
            served[loaded.base_model] = loaded.model_dir
            assert pods.volume(loaded.model_dir), pods.name
            fetched = _init_environment(overlay, pods)
            assert (fetched["MODEL"], fetched["MODEL_DIR"]) == (loaded.base_model, loaded.model_dir)
    assert served
    assert served.items() <= known.items()
    for directory in known.values():
        assert environments.volume(directory)


def _init_environment(overlay: str, pods: Pods) -> dict[str, str]:
    (fetch,) = pods.spec["initContainers"]
    references = [v for v in fetch["env"] if "configMapKeyRef" in v["valueFrom"]]
    return {v["name"]: _from(overlay, pods, v) for v in references}


@every_overlay
def test_engines_are_those_that_the_images_have(overlay: str, tmp_path: Path) -> None:
    pools = [pods for pods in services(overlay) if pods.service in ("sampler", "trainer")]
    assert pools
    for pods in pools:
        assert getattr(settings(overlay, pods, tmp_path), "engine") == "torch", pods.name  # noqa: B009


@every_overlay
def test_groups_of_the_autoscaler_are_the_pod_templates_of_their_models(overlay: str, tmp_path: Path) -> None:
    templates = {pods.workload["metadata"]["name"]: pods for pods in services(overlay) if "template" in pods.workload}
    for pods in services(overlay):
        if pods.service == "autoscaler":
            groups: Any = getattr(settings(overlay, pods, tmp_path), "groups")  # noqa: B009
            assert {group.name for group in groups} == set(templates)
            for group in groups:
                own: Any = settings(overlay, templates[group.name], tmp_path)
                assert (group.role, group.base_model) == (templates[group.name].service, own.base_model)
                _same_share(overlay, templates[group.name], group.shape)
            return
    assert not templates


def _same_share(overlay: str, pods: Pods, shape: Any) -> None:
    """A claim's capacity is what the autoscaler counts with; without one, the whole GPU is claimed."""
    for claim in pods.spec.get("resourceClaims", []):
        template = named(overlay, "ResourceClaimTemplate", claim["resourceClaimTemplateName"])
        assert template is not None
        (request,) = template["spec"]["spec"]["devices"]["requests"]
        if capacity := request["exactly"].get("capacity"):
            assert capacity["requests"] == {"memory": f"{shape.memory_gib:.0f}Gi", "milli": str(shape.milli)}
            return
    assert shape.milli == 1000


# -- the bus -----------------------------------------------------------------------------------------------------------


@every_overlay
def test_the_bus_may_store_all_that_its_streams_may_hold_and_its_volume_is_larger(overlay: str) -> None:
    conf = nats_conf(overlay)
    store = gib(conf.split("max_file_store:")[1].split()[0])
    assert store * 2**30 >= topology.MOST_BYTES * 1.2
    (claim,) = named_nats(overlay)["spec"]["volumeClaimTemplates"]
    assert gib(claim["spec"]["resources"]["requests"]["storage"]) >= 2 * store


@every_overlay
def test_the_bus_is_given_longer_to_end_than_its_lame_duck_takes(overlay: str) -> None:
    conf = nats_conf(overlay)
    seconds = [int(conf.split(f"{name}: ")[1].split("s")[0].strip('"')) for name in ("grace_period", "duck_duration")]
    assert Pods(named_nats(overlay)).spec["terminationGracePeriodSeconds"] >= sum(seconds) + 10


@every_overlay
def test_the_bus_takes_its_configuration_and_lists_all_its_servers(overlay: str, tmp_path: Path) -> None:
    file = tmp_path / "nats.conf"
    file.write_text(nats_conf(overlay))
    pods = Pods(named_nats(overlay))
    done = subprocess.run(
        [find_binary(), "--config", str(file), "-t"],
        env=environment(overlay, pods), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    servers = pods.workload["spec"]["replicas"]
    listed = [f"nats-{n}.{pods.workload['spec']['serviceName']}:6222" for n in range(servers)]
    assert all(server in file.read_text() for server in listed) == (servers > 1)
    assert named(overlay, "Service", pods.workload["spec"]["serviceName"]) is not None


def named_nats(overlay: str) -> Object:
    found = named(overlay, "StatefulSet", "nats")
    assert found is not None
    return found


def nats_conf(overlay: str) -> str:
    (found,) = [one for one in of_kind(overlay, "ConfigMap") if one["metadata"]["name"].startswith("nats-config")]
    return str(found["data"]["nats.conf"])


def gib(text: str) -> float:
    units = {"GiB": 1.0, "Gi": 1.0, "GB": 1.0, "MiB": 1 / 1024, "Mi": 1 / 1024}
    unit = next(unit for unit in units if text.endswith(unit))
    return float(text.removesuffix(unit)) * units[unit]


# -- what is not ours --------------------------------------------------------------------------------------------------


@every_overlay
def test_prometheus_drops_what_is_old_before_its_volume_is_full(overlay: str) -> None:
    (prometheus,) = [pods for pods in workloads(overlay) if pods.app == "prometheus"]
    (most,) = [argument for argument in prometheus.main["args"] if argument.startswith("--storage.tsdb.retention.size")]
    volume = prometheus.volume("/prometheus")
    assert volume is not None
    claim = named(overlay, "PersistentVolumeClaim", volume[0]["persistentVolumeClaim"]["claimName"])
    assert claim is not None
    # Its own advice: the newest block and the log are not counted.
    assert gib(most.split("=")[1]) <= 0.85 * gib(claim["spec"]["resources"]["requests"]["storage"])


@every_overlay
def test_prometheus_is_configured_for_gpus_where_the_operator_is_expected(overlay: str) -> None:
    (found,) = [one for one in of_kind(overlay, "ConfigMap") if one["metadata"]["name"].startswith("prometheus-config")]
    jobs = [job["job_name"] for job in yaml.safe_load(found["data"]["prometheus.yml"])["scrape_configs"]]
    assert jobs == ["openrl", "prometheus", *(["gpu"] if overlay in WITH_DCGM else [])]


def test_the_tests_of_the_cluster_run_on_this_configuration() -> None:
    assert nats_conf("gpu-dra") == (ROOT / "k8s/base/nats/nats.conf").read_text()
