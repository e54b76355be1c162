"""What an API server keeps: objects with uid and resourceVersion, and the events by which they changed."""

from __future__ import annotations

import asyncio
import copy
import itertools
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import kubernetes_validate

Object = dict[str, Any]
VERSION = "1.37"
KINDS = {
    ("v1", "pods"): "Pod",
    ("v1", "podtemplates"): "PodTemplate",
    ("v1", "nodes"): "Node",
    ("resource.k8s.io/v1", "resourceclaims"): "ResourceClaim",
    ("resource.k8s.io/v1", "resourceslices"): "ResourceSlice",
    ("coordination.k8s.io/v1", "leases"): "Lease",
}
Kind = tuple[str, str]
"""apiVersion and plural."""


class Refused(Exception):
    """An answer other than what was asked for."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Store:
    """All objects. Names are taken to be of one namespace, which is all that the tests have."""

    def __init__(self) -> None:
        self.objects: dict[tuple[Kind, str], Object] = {}
        self.events: list[tuple[int, Kind, str, Object]] = []
        """Version, kind, type, and the object as it was then."""
        self.forgotten = 0
        """Versions up to this one cannot be watched from any more."""
        self.version = 0
        self.changed = asyncio.Condition()
        self._versions = itertools.count(1)

    def all(self, kind: Kind) -> list[Object]:
        return [one for (of, _), one in sorted(self.objects.items()) if of == kind]

    def get(self, kind: Kind, name: str) -> Object:
        if (kind, name) not in self.objects:
            raise Refused(404, "NotFound", f'{kind[1]} "{name}" not found')
        return self.objects[kind, name]

    async def create(self, kind: Kind, body: Object, namespace: str | None) -> Object:
        body = copy.deepcopy(body)
        _validate(kind, body)
        metadata = body["metadata"]
        name = metadata["name"]
        if (kind, name) in self.objects:
            raise Refused(409, "AlreadyExists", f'{kind[1]} "{name}" already exists')
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "generation": 1}
        if namespace:
            metadata["namespace"] = namespace
        if kind[1] == "pods":
            body.setdefault("status", {"phase": "Pending"})
        return await self._put(kind, body, "ADDED")

    async def replace(self, kind: Kind, name: str, body: Object) -> Object:
        held = self.get(kind, name)
        body = copy.deepcopy(body)
        _validate(kind, body)
        asked = body["metadata"].get("resourceVersion")
        if asked and asked != held["metadata"]["resourceVersion"]:
            raise Refused(409, "Conflict", f'the object "{name}" has been modified; apply your changes to the latest')
        body["metadata"] |= {key: held["metadata"][key] for key in ("uid", "creationTimestamp")}
        return await self.put(kind, body)

    async def patch(self, kind: Kind, name: str, change: Mapping[str, Any]) -> Object:
        """A merge patch (RFC 7396)."""
        merged = _merged(copy.deepcopy(self.get(kind, name)), change)
        return await self.replace(kind, name, merged)

    async def put(self, kind: Kind, body: Object) -> Object:
        """What the cluster's own controllers do."""
        metadata = body["metadata"]
        if metadata.get("deletionTimestamp") and not metadata.get("finalizers") and kind[1] != "pods":
            return await self.remove(kind, metadata["name"])
        return await self._put(kind, body, "MODIFIED")

    async def delete(self, kind: Kind, name: str, options: Mapping[str, Any]) -> Object:
        held = self.get(kind, name)
        for key, wanted in (options.get("preconditions") or {}).items():
            if held["metadata"][key] != wanted:
                raise Refused(409, "Conflict", f"precondition failed: {key} in precondition: {wanted}")
        if kind[1] != "pods":
            if held["metadata"].get("finalizers"):
                return await self._mark(kind, held, None)
            return await self.remove(kind, name)
        grace = options.get("gracePeriodSeconds")
        grace = held["spec"].get("terminationGracePeriodSeconds", 30) if grace is None else grace
        settled = not held["spec"].get("nodeName") or held["status"]["phase"] in ("Failed", "Succeeded")
        if (grace == 0 or settled) and not held["metadata"].get("finalizers"):
            return await self.remove(kind, name)
        if held["metadata"].get("deletionGracePeriodSeconds", grace + 1) <= grace:
            return held
        return await self._mark(kind, held, grace)

    async def remove(self, kind: Kind, name: str) -> Object:
        return await self._put(kind, self.objects[kind, name], "DELETED")

    async def _mark(self, kind: Kind, held: Object, grace: int | None) -> Object:
        marked = copy.deepcopy(held)
        marked["metadata"].setdefault("deletionTimestamp", now())
        if grace is not None:
            marked["metadata"]["deletionGracePeriodSeconds"] = grace
        return await self._put(kind, marked, "MODIFIED")

    async def _put(self, kind: Kind, body: Object, what: str) -> Object:
        self.version = next(self._versions)
        body = copy.deepcopy(body)
        body["metadata"]["resourceVersion"] = str(self.version)
        body |= {"apiVersion": kind[0], "kind": KINDS[kind]}
        if what == "DELETED":
            del self.objects[kind, body["metadata"]["name"]]
        else:
            self.objects[kind, body["metadata"]["name"]] = body
        self.events.append((self.version, kind, what, body))
        async with self.changed:
            self.changed.notify_all()
        return copy.deepcopy(body)

    def forget(self) -> None:
        """Compact: nothing can be watched from before now."""
        self.forgotten, self.events = self.version, []

    def since(self, kind: Kind, version: int) -> Iterator[tuple[int, str, Object]]:
        for at, of, what, body in self.events:
            if of == kind and at > version:
                yield at, what, body


def _validate(kind: Kind, body: Object) -> None:
    if (body.get("apiVersion"), body.get("kind")) != (kind[0], KINDS[kind]):
        raise Refused(400, "BadRequest", f"{body.get('apiVersion')} {body.get('kind')} does not go to {kind}")
    plain = {key: value for key, value in body.items() if key != "status"}
    try:
        kubernetes_validate.validate(plain, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise Refused(422, "Invalid", f"{KINDS[kind]}.{'.'.join(map(str, error.path))}: {error.message}") from None
    for one in body.get("spec", {}).get("containers", ()) if kind[1] == "pods" else ():
        limits = (one.get("resources") or {}).get("limits") or {}
        if not str(limits.get("nvidia.com/gpu", 0)).isdigit():
            raise Refused(422, "Invalid", "spec.containers[0].resources.limits[nvidia.com/gpu]: must be an integer")
        there = {each["name"] for each in body["spec"].get("resourceClaims", ())}
        for each in (one.get("resources") or {}).get("claims") or ():
            if each["name"] not in there:
                raise Refused(422, "Invalid", f"spec.containers[0].resources.claims: {each['name']} is not there")


def _merged(target: Any, change: Any) -> Any:
    if not isinstance(change, dict):
        return change
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), value)
    return merged
