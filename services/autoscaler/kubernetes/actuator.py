"""Acts on a Kubernetes cluster: replicas are pods, made from PodTemplates. See `Actuator`.

| loop | consumes | waits for | unblocked by |
|---|---|---|---|
| nodes, pods, podtemplates; resourceclaims, resourceslices | lists and watches | events | the API server |

Nothing is kept but what the API server says. Names of pods are the plan's, so that doing a thing twice does it once;
every deletion names the uid, so that it never meets a later pod of the same name.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from kubernetes.aio.client import Configuration

from services.autoscaler.actuator import Cluster
from services.autoscaler.config import GroupConfig
from services.autoscaler.kubernetes import claims as claiming
from services.autoscaler.kubernetes import pods as making
from services.autoscaler.kubernetes.api import (
    CLAIMS,
    CONFLICT,
    NODES,
    NOT_FOUND,
    POD_TEMPLATES,
    PODS,
    SLICES,
    Api,
    ApiError,
    Resource,
    configuration,
    rejects,
)
from services.autoscaler.kubernetes.cache import Cache
from services.autoscaler.kubernetes.config import KubernetesConfig
from services.autoscaler.kubernetes.inventory import Inventory, inventory, with_hidden
from services.autoscaler.kubernetes.lease import Lease
from services.autoscaler.kubernetes.marks import OURS, Object, Placed, name_of
from services.autoscaler.kubernetes.replicas import Pod, gpus_of, names_of, pod_of, problems
from services.autoscaler.observed import WHOLE
from services.autoscaler.plan import Drain, Start
from shared.errors import TemporaryError, UserError
from shared.tasks import Tasks, cancelled

log = logging.getLogger(__name__)

OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
AT_ONCE = 8
"""Writes at the same time."""
DNS_LABEL = re.compile(r"^[a-z]([a-z0-9-]{0,50}[a-z0-9])?$")
"""Names of groups: with a number they are names of pods, and labels."""

Writes = list[tuple[str, Callable[[], Awaitable[None]]]]
"""What is to be done, in words and in deed."""


class KubernetesActuator:
    """See the module's docstring."""

    def __init__(
        self, config: KubernetesConfig, groups: Sequence[GroupConfig], replica: str, drain_seconds: float, tasks: Tasks,
        reach: Configuration | None = None,
    ) -> None:  # fmt: skip
        """`replica` is this autoscaler's name, `drain_seconds` what replicas take to end; `reach` is for tests."""
        for group in groups:
            _check(group, config)
        self._config, self._drain_seconds, self._tasks, self._reach = config, drain_seconds, tasks, reach
        self._groups = {group.name: group for group in groups}
        self._types = {type_ for group in groups for type_ in group.shape.shape().types}
        self._identity = f"{replica}_{uuid.uuid4()}"
        self._following: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """See `Actuator.start`."""
        reach = self._reach or await configuration(self._config.kubeconfig)
        self._api = Api(reach, self._config.namespace or _own_namespace())
        self._lease = Lease(self._api, self._config.lease, self._identity, self._config.lease_seconds)
        self._nodes = self._follow(NODES)
        self._pods = self._follow(PODS, OURS)
        self._templates = self._follow(POD_TEMPLATES)
        dra = self._config.mode == "dra"
        self._claims = self._follow(CLAIMS, OURS) if dra else None
        self._slices = self._follow(SLICES) if dra else None

    def _follow(self, resource: Resource, labels: str = "") -> Cache:
        cache = Cache(self._api, resource, self._config.watch_seconds, self._config.stale_seconds, labels)
        self._following.append(self._tasks.start(f"follow {resource.plural}", cache.keep()))
        return cache

    async def lead(self) -> bool:
        """See `Actuator.lead`."""
        return await self._lease.claim()

    async def close(self) -> None:
        """See `Actuator.close`."""
        await cancelled(self._following)
        if not hasattr(self, "_api"):
            return
        try:
            await self._lease.release()
        finally:
            await self._api.close()

    async def look(self) -> Cluster:
        """See `Actuator.look`."""
        pods, claims, found = self._our_pods(), self._our_claims(), self._inventory()
        names = names_of(found.devices.values())
        replicas = tuple(pod.replica(gpus_of(pod, claims, names)) for pod in pods)
        nodes = {pod.name: pod.placed.node for pod in pods if pod.placed is not None}
        found = with_hidden(found, replicas, nodes)
        lacking = [f"there is no PodTemplate {self._template_name(group)} in namespace {self._api.namespace}, from"
                   f" which replicas of {name} are made" for name, group in self._groups.items()
                   if self._template(group) is None]  # fmt: skip
        return Cluster(found.gpus, replicas, (*lacking, *found.problems, *problems(pods)))

    def _inventory(self) -> Inventory:
        slices = self._slices.objects() if self._slices else ()
        specs = [(one.get("template") or {}).get("spec") or {} for one in map(self._template, self._groups.values())
                 if one is not None]  # fmt: skip
        tolerations = [spec.get("tolerations") or [] for spec in specs]
        return inventory(self._nodes.objects(), slices, tolerations, self._types, self._config, time.time())

    def _our_pods(self) -> list[Pod]:
        return [pod_of(found) for found in self._pods.objects()]

    def _our_claims(self) -> Mapping[str, Object]:
        return {name_of(one): one for one in self._claims.objects()} if self._claims else {}

    def _template_name(self, group: GroupConfig) -> str:
        return group.pod_template or group.name

    def _template(self, group: GroupConfig) -> Object | None:
        name = self._template_name(group)
        return next((one for one in self._templates.objects() if name_of(one) == name), None)

    async def act(self, starts: Sequence[Start], drains: Sequence[Drain]) -> None:
        """See `Actuator.act`. Takes away what has ended, too, and sees to claims that are missing or left over."""
        pods = {pod.name: pod for pod in self._our_pods()}
        leaving = [pods[drain.replica] for drain in drains if drain.replica in pods]
        ended = [pod for pod in pods.values() if pod.ended and not pod.going]
        writes: Writes = [(f"take away {pod.name}", self._ending(pod, 0)) for pod in ended]
        writes += [
            (f"drain {pod.name}", self._ending(pod, making.grace(pod.grace, self._drain_seconds)))
            for pod in leaving
            if not pod.going and not pod.ended
        ]
        refused = await self._do(writes)
        if self._claims:
            left = claiming.unused(self._our_claims(), list(pods.values()))
            refused += await self._do([(f"give back {name_of(one)}", self._unclaiming(one)) for one in left])
        found = self._inventory()
        refused += await self._do([(f"start {start.replica}", self._starting(start, found)) for start in starts])
        if self._claims:  # of pods that are new, and of those whose claims could not be made before
            waiting = claiming.missing(self._our_claims(), self._our_pods())
            refused += await self._do([(f"claim for {pod.name}", self._claiming(pod, found)) for pod in waiting])
        if refused:
            raise TemporaryError(f"{len(refused)} changes were refused: {'; '.join(refused[:3])}")

    async def _do(self, writes: Writes) -> list[str]:
        """Do all of them, some at a time; what is refused does not keep others. Trouble with the API server does."""
        refused: list[str] = []
        for first in range(0, len(writes), AT_ONCE):
            await self._lease.keep()
            some = writes[first : first + AT_ONCE]
            results = await asyncio.gather(*(do() for _, do in some), return_exceptions=True)
            for (what, _), result in zip(some, results, strict=True):
                if isinstance(result, ApiError) and rejects(result):
                    refused.append(f"{what}: {result}")
                elif isinstance(result, BaseException):
                    raise result
        return refused

    def _ending(self, pod: Pod, grace: int) -> Callable[[], Awaitable[None]]:
        async def do() -> None:
            await self._delete(self._pods, PODS, pod.name, {"uid": pod.uid}, grace)

        return do

    def _unclaiming(self, claim: Object) -> Callable[[], Awaitable[None]]:
        """Unless somebody has begun to use it: that changes its version."""

        async def do() -> None:
            metadata = claim["metadata"]
            same = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
            assert self._claims is not None
            await self._delete(self._claims, CLAIMS, metadata["name"], same)

        return do

    async def _delete(
        self, cache: Cache, resource: Resource, name: str, same: Mapping[str, str], grace: int | None = None
    ) -> None:
        try:
            cache.note(await self._api.delete(resource, name, same, grace))
        except ApiError as error:
            if error.status not in (NOT_FOUND, CONFLICT):
                raise
            log.info("%s %s is no longer the one that was to go", resource.kind, name)

    def _starting(self, start: Start, found: Inventory) -> Callable[[], Awaitable[None]]:
        async def do() -> None:
            group = self._groups[start.group]
            template = self._template(group)
            if template is None:
                raise ApiError(f"there is no PodTemplate {self._template_name(group)}", NOT_FOUND)
            made = making.pod(start, self._placed(start, found), group, template, self._config, self._drain_seconds)
            await self._create(self._pods, PODS, made)

        return do

    def _placed(self, start: Start, found: Inventory) -> Placed:
        shape = start.shape
        nodes = {gpu.name: gpu.node for gpu in found.gpus}
        node = nodes.get(start.gpus[0])
        if node is None:
            raise ApiError(f"{start.gpus[0]} is no longer there", NOT_FOUND)
        claim = ""
        if self._claims:
            claim = claiming.claim_name(start.replica, start.gpus, shape.milli, found.devices, uuid.uuid4().hex)
        return Placed(
            gpus=list(start.gpus), node=node, memory_gib=shape.memory_gib, milli=shape.milli,
            types=sorted(shape.types), replaces=start.replaces, claim=claim,
        )  # fmt: skip

    def _claiming(self, pod: Pod, found: Inventory) -> Callable[[], Awaitable[None]]:
        async def do() -> None:
            assert self._claims is not None
            templates = [one for one in map(self._template, self._groups.values()) if one is not None]
            unique = list({name_of(one): one for one in templates}.values())
            await self._create(self._claims, CLAIMS, claiming.claim(pod, found.devices, unique, self._config))

        return do

    async def _create(self, cache: Cache, resource: Resource, body: Object) -> None:
        try:
            cache.note(await self._api.create(resource, body))
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise


def _own_namespace() -> str:
    try:
        return OWN_NAMESPACE.read_text().strip()
    except OSError:
        raise UserError("not in a pod: set kubernetes.namespace to where replicas are to be") from None


def _check(group: GroupConfig, config: KubernetesConfig) -> None:
    """What a group may ask for in this mode."""
    shape, mode = group.shape, config.mode
    if not DNS_LABEL.match(group.name):
        raise UserError(
            f"group '{group.name}': in Kubernetes its name becomes names of pods: a lower-case letter first, then"
            " letters, digits and '-', at most 52"
        )
    if mode == "device-plugin" and shape.milli != WHOLE:
        raise UserError(
            f"group {group.name}: milli = {shape.milli}, and a device plugin gives whole GPUs; set milli to {WHOLE}, or"
            " kubernetes.mode to dra or time-slicing"
        )
    if mode in ("time-slicing", "cpu") and shape.gpus > 1:
        raise UserError(
            f"group {group.name}: {shape.gpus} GPUs cannot be had in mode {mode}, only in dra, device-plugin"
        )
    if mode == "time-slicing" and shape.milli * config.slices < WHOLE:
        raise UserError(
            f"group {group.name}: milli = {shape.milli} is less than one of {config.slices} time slices of a GPU; set"
            f" it to {-(-WHOLE // config.slices)} or more"
        )
