"""Promises: kept by any gateway, once, whoever listened when the result came. The test itself is the sampler."""

from __future__ import annotations

import asyncio

import httpx

from shared import topology
from shared.bus import Bus
from shared.contracts.base import Failure
from shared.contracts.results import RequestFailed
from tests.mesh.gateways import KEY, OTHER_KEY, Asker, add_key, http, poll, sampled, tokens_in
from tests.mesh.harness import MODEL, Place


async def queued(bus: Bus) -> int:
    """How many requests for samples lie in the queue."""
    info = await bus.stream_context.stream_info(topology.SAMPLE.name)
    return info.state.messages


async def test_a_waiting_poll_is_woken_by_its_result(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with place.gateway() as gateway, http(gateway.port) as client:
        asker = await Asker.connect(client, bus)
        requests = [await asker.request(seq) for seq in (3, 10**18)]
        polls = [asyncio.create_task(poll(client, request)) for request in requests]
        await asyncio.sleep(0.1)
        for number, request in enumerate(requests):
            await bus.answer(sampled(request, [7, number]))
        assert [tokens_in(await one) for one in polls] == [[[7, 0]], [[7, 1]]]


async def test_what_was_submitted_at_one_gateway_is_fetched_at_another(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with (
        place.gateway() as one,
        place.gateway(replica="gateway-2") as two,
        http(one.port) as here,
        http(two.port) as there,
    ):
        asker = await Asker.connect(here, bus)
        early, late = await asker.request(1), await asker.request(2)
        await bus.answer(sampled(early, [7]))
        waiting = asyncio.create_task(poll(there, late))
        assert tokens_in(await poll(there, early)) == [[7]]
        await bus.answer(sampled(late, [8]))
        assert tokens_in(await waiting) == [[8]]
        assert tokens_in(await poll(here, early)) == [[7]]
        assert tokens_in(await poll(there, early)) == [[7]], "a client may lose an answer and ask again"


async def test_a_result_that_came_while_no_gateway_lived_is_there(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with place.gateway() as gateway, http(gateway.port) as client:
        request = await (await Asker.connect(client, bus)).request(1)
    await bus.answer(sampled(request, [7]))
    async with place.gateway() as gateway, http(gateway.port) as client:
        assert tokens_in(await poll(client, request)) == [[7]]


async def test_a_repeated_submission_is_the_same_request_with_the_first_result(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with (
        place.gateway() as one,
        place.gateway(replica="gateway-2") as two,
        http(one.port) as here,
        http(two.port) as there,
    ):
        asker = await Asker.connect(here, bus)
        first = await asker.submit(1, num_samples=2)
        again = await Asker(there, asker.session, asker.sampler).submit(1, num_samples=2)
        assert first.json() == again.json()
        assert len(set(first.json()["sample_sequence_ids"])) == 2
        assert await queued(bus) == 1
        request = first.json()["request_id"]
        await bus.answer(sampled(request, [7]))
        await bus.answer(sampled(request, [8]))
        assert tokens_in(await poll(here, request)) == tokens_in(await poll(there, request)) == [[7]]


async def test_a_large_result_is_announced_by_its_size_and_then_sent(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with place.gateway() as gateway, http(gateway.port) as client:
        request = await (await Asker.connect(client, bus)).request(1)
        await bus.answer(sampled(request, range(100_000)))
        announced = (await poll(client, request, allow_metadata_only=True)).json()
        assert announced["status"] == "complete_metadata"
        assert announced["response_payload_size"] > 800_000
        assert tokens_in(await poll(client, request)) == [list(range(100_000))]


async def test_a_failure_is_told_with_who_can_mend_it(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with place.gateway() as gateway, http(gateway.port) as client:
        request = await (await Asker.connect(client, bus)).request(1)
        await bus.answer(RequestFailed(request_id=request, failure=Failure(message="too long", kind="user")))
        assert (await poll(client, request)).json() == {"error": "too long", "category": "user"}


async def test_a_poll_without_a_result_says_what_it_waits_for(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with place.gateway(poll_seconds=0.2) as gateway, http(gateway.port) as client:
        request = await (await Asker.connect(client, bus)).request(1)
        assert (await poll(client, request)).json() == {
            "type": "try_again",
            "request_id": request,
            "queue_state": "active",
        }
        await bus.table(topology.REPLICAS).delete(f"sampler-{MODEL}")

        async def state() -> str:
            return str((await poll(client, request)).json()["queue_state"])

        while await state() != "paused_capacity":
            await asyncio.sleep(0.05)


async def test_a_request_that_nobody_knows_any_more_is_gone(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with place.gateway(poll_seconds=0.2) as gateway, http(gateway.port) as client:
        asker = await Asker.connect(client, bus)
        assert (await poll(client, f"{asker.session}.sample-0.5")).status_code == 410


async def test_polls_end_when_their_gateway_stops(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with httpx.AsyncClient(headers={"X-API-Key": KEY}, timeout=60) as client:
        async with place.gateway() as gateway:
            client.base_url = httpx.URL(f"http://127.0.0.1:{gateway.port}/api/v1/")
            request = await (await Asker.connect(client, bus)).request(1)
            waiting = asyncio.create_task(poll(client, request))
            await asyncio.sleep(0.2)
        assert (await waiting).json()["type"] == "try_again"


async def test_a_request_of_somebody_else_is_not_found(place: Place, bus: Bus) -> None:
    await add_key(bus)
    await add_key(bus, OTHER_KEY, tenant="other")
    async with place.gateway() as gateway, http(gateway.port) as mine, http(gateway.port, OTHER_KEY) as theirs:
        asker = await Asker.connect(mine, bus)
        request = await asker.request(1)
        for answer in (
            await poll(theirs, request),
            await theirs.post("cancel_future", json={"request_id": request}),
            await Asker(theirs, asker.session, asker.sampler).submit(2),
            await theirs.post("join_sampling_session", json={"sampling_session_id": asker.sampler}),
        ):
            assert answer.status_code == 404, answer.text


async def test_a_tenant_at_its_limit_is_told_to_wait_and_others_are_not(place: Place, bus: Bus) -> None:
    await add_key(bus)
    await add_key(bus, OTHER_KEY, tenant="other")
    async with (
        place.gateway(tenant_requests=1, poll_seconds=0.2) as gateway,
        http(gateway.port) as mine,
        http(gateway.port, OTHER_KEY) as theirs,
    ):
        asker = await Asker.connect(mine, bus)
        request = await asker.request(1)
        refused = await asker.submit(2)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert (await asker.submit(1)).status_code == 200, "the same one again is no other"
        assert (await poll(mine, request)).json()["queue_state"] == "paused_rate_limit"
        await (await Asker.connect(theirs, bus)).request(1)
        await bus.answer(sampled(request, [7]))
        assert tokens_in(await poll(mine, request)) == [[7]]
        await asker.request(2)


async def test_copies_of_a_client_get_numbers_of_their_own(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with place.gateway() as gateway, http(gateway.port) as client:
        asker = await Asker.connect(client, bus)
        body = {"sampling_session_id": asker.sampler}
        answers = await asyncio.gather(*(client.post("join_sampling_session", json=body) for _ in range(8)))
        assert sorted(answer.json()["client_counter"] for answer in answers) == list(range(1, 9))


async def test_one_poll_tells_which_samples_are_done(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with (
        place.gateway() as one,
        place.gateway(replica="gateway-2") as two,
        http(one.port) as here,
        http(two.port) as there,
    ):
        asker = await Asker.connect(here, bus)
        requests = [await asker.request(seq) for seq in (0, 1, 10**9)]
        target = {"sampling_session_id": asker.sampler}
        waiting = asyncio.create_task(here.post("retrieve_futures", json={"target": target}))
        await asyncio.sleep(0.1)
        await bus.answer(sampled(requests[0], [7]))
        first = (await waiting).json()
        assert [done["request_id"] for done in first["completions"]] == [requests[0]]
        assert first["completions"][0]["state"] == "finished"
        await bus.answer(sampled(requests[2], [9]))
        await bus.answer(RequestFailed(request_id=requests[1], failure=Failure(message="no", kind="user")))
        body = {"target": target, "prev_cursor": first["cursor"], "timeout": 0.2}
        async with asyncio.timeout(30):
            while not (second := (await there.post("retrieve_futures", json=body)).json())["completions"]:
                pass
        assert second["completions"] == [{"state": "failed", "request_id": requests[1]}]
        clone = {"target": {**target, "cloned_sampler_id": 1}, "timeout": 0.2}
        copies = (await there.post("retrieve_futures", json=clone)).json()["completions"]
        assert [done["request_id"] for done in copies] == [requests[2]]


async def test_a_sample_that_is_given_up_is_told_to_samplers(place: Place, bus: Bus) -> None:
    await add_key(bus)
    heard: list[str] = []
    await bus.hear_abandoned(heard.append)
    async with place.gateway() as gateway, http(gateway.port) as client:
        request = await (await Asker.connect(client, bus)).request(1)
        assert (await client.post("cancel_future", json={"request_id": request})).status_code == 204
        async with asyncio.timeout(10):
            while heard != [request]:
                await asyncio.sleep(0.02)
