"""Requests to the API server, by the official client's asyncio half: addresses, tokens and TLS are its business.

Every failure is an `ApiError`, which is temporary: what was not done, the next plan asks for again. After an answer
that asks for patience (429, or 503 with Retry-After), and after no answer at all, nothing is asked for a while.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from services.autoscaler.kubernetes.marks import Object
from shared.errors import TemporaryError, UserError

TIMEOUT_SECONDS = 10.0
SILENCE_SECONDS = 1.0
"""Nothing is asked for so long after no answer, so that a plan of a thousand pods does not wait a thousand times."""
MOST_PATIENCE = 60.0
CONFLICT, GONE, NOT_FOUND, TOO_MANY = 409, 410, 404, 429


class ApiError(TemporaryError):
    """The API server refused, or did not answer (status 0)."""

    def __init__(self, message: str, status: int = 0, reason: str = "", delay: float = 1.0) -> None:
        super().__init__(message, delay=delay)
        self.status = status
        self.reason = reason


@dataclass(frozen=True)
class Resource:
    """A kind of object, and where it is served."""

    group: str
    """As in apiVersion: `resource.k8s.io/v1`."""
    plural: str
    kind: str
    namespaced: bool = True

    def path(self, namespace: str, name: str = "") -> str:
        """Where one of them is, or all of them are."""
        root = f"/apis/{self.group}" if "/" in self.group else f"/api/{self.group}"
        place = f"/namespaces/{namespace}" if self.namespaced else ""
        return f"{root}{place}/{self.plural}" + (f"/{name}" if name else "")


PODS = Resource("v1", "pods", "Pod")
POD_TEMPLATES = Resource("v1", "podtemplates", "PodTemplate")
NODES = Resource("v1", "nodes", "Node", namespaced=False)
CLAIMS = Resource("resource.k8s.io/v1", "resourceclaims", "ResourceClaim")
SLICES = Resource("resource.k8s.io/v1", "resourceslices", "ResourceSlice", namespaced=False)
LEASES = Resource("coordination.k8s.io/v1", "leases", "Lease")


async def configuration(kubeconfig: str) -> Configuration:
    """How the API server is reached: by a file, or as a pod."""
    found = Configuration()
    try:
        if kubeconfig:
            await load_kube_config(kubeconfig, client_configuration=found, persist_config=False)
        else:
            load_incluster_config(found)
    except (ConfigException, OSError) as error:
        raise UserError(
            f"no Kubernetes API server: {error}; run as a pod with a service account's token, or set"
            " kubernetes.kubeconfig to a file"
        ) from None
    return found


class Api:
    """One API server, in one namespace."""

    def __init__(self, configuration: Configuration, namespace: str) -> None:
        self.namespace = namespace
        self._client = ApiClient(configuration)
        self._client.user_agent = "openrl-autoscaler"
        self._quiet_until = 0.0

    async def close(self) -> None:
        """End connections."""
        await self._client.close()

    async def list(self, resource: Resource, query: Mapping[str, str]) -> Object:
        """A page of objects."""
        return await self._json("GET", resource.path(self.namespace), query=query)

    async def get(self, resource: Resource, name: str) -> Object:
        """One object."""
        return await self._json("GET", resource.path(self.namespace, name))

    async def create(self, resource: Resource, body: Object) -> Object:
        """Make an object. Status 409: there is one of that name."""
        return await self._json("POST", resource.path(self.namespace), body)

    async def update(self, resource: Resource, name: str, body: Object) -> Object:
        """Replace an object. Status 409: it is no longer at the resourceVersion that the body has."""
        return await self._json("PUT", resource.path(self.namespace, name), body)

    async def delete(
        self, resource: Resource, name: str, preconditions: Mapping[str, str], grace: int | None = None
    ) -> Object:
        """Delete an object if it is the one that is meant. Status 409: it is another one, of the same name."""
        body: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": dict(preconditions)}
        if grace is not None:
            body["gracePeriodSeconds"] = grace
        return await self._json("DELETE", resource.path(self.namespace, name), body)

    async def watch(self, resource: Resource, query: Mapping[str, str], seconds: float) -> AsyncIterator[Object | None]:
        """Events; the first thing is None, when the API server has accepted. Ends when the watch does."""
        response = await self._send("GET", resource.path(self.namespace), None, query, seconds)
        try:
            yield None
            rest = b""
            async for chunk in response.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield msgspec.json.decode(line)
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
            raise ApiError(f"the watch of {resource.plural} broke off: {_words(error)}") from None
        finally:
            response.close()

    async def _json(
        self, method: str, path: str, body: Object | None = None, query: Mapping[str, str] | None = None
    ) -> Object:
        response = await self._send(method, path, body, query, TIMEOUT_SECONDS)
        try:
            found: Object = msgspec.json.decode(await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
            raise ApiError(f"the API server's answer to {method} {path} broke off: {_words(error)}") from None
        return found

    async def _send(
        self, method: str, path: str, body: Object | None, query: Mapping[str, str] | None, seconds: float
    ) -> aiohttp.ClientResponse:
        if (wait := self._quiet_until - time.monotonic()) > 0:
            raise ApiError(f"the API server is left alone for another {wait:.1f} s", TOO_MANY, delay=wait)
        try:
            method, url, headers, payload, _ = await self._client.param_serialize(
                method, path, query_params=list((query or {}).items()), header_params={"Accept": "application/json"},
                body=body, auth_settings=["BearerToken"],
            )  # fmt: skip
            answered = await self._client.call_api(
                method, url, headers, payload, _request_timeout=aiohttp.ClientTimeout(total=seconds)
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._quiet_until = time.monotonic() + SILENCE_SECONDS
            raise ApiError(f"the API server does not answer {method} {path}: {_words(error)}") from None
        response: aiohttp.ClientResponse = answered.response
        if response.status >= 400:
            raise await self._refusal(response, method, path)
        return response

    async def _refusal(self, response: aiohttp.ClientResponse, method: str, path: str) -> ApiError:
        try:
            status: Any = msgspec.json.decode(await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError):
            status = None
        status = status if isinstance(status, dict) else {}
        delay = _patience(response)
        if delay:
            self._quiet_until = time.monotonic() + delay
        words = f"{response.status} {status.get('reason', '')}: {status.get('message', response.reason)}"
        return ApiError(
            f"the API server refuses {method} {path}: {words}", response.status, status.get("reason", ""), delay or 1.0
        )


def _patience(response: aiohttp.ClientResponse) -> float:
    """Seconds that the API server asks to be left alone."""
    if response.status != TOO_MANY and response.status < 500:
        return 0.0
    text = response.headers.get("Retry-After", "")
    least = 1.0 if response.status == TOO_MANY else 0.0
    return min(MOST_PATIENCE, max(least, float(text))) if text.isdigit() else least


def _words(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__


def rejects(error: ApiError) -> bool:
    """Whether it is about this one request, so that others may well succeed."""
    return 400 <= error.status < 500 and error.status != TOO_MANY
