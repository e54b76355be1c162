"""A session's timeline as a Perfetto trace: tracks for its runs and samplers, slices for requests, counters for tokens.

Pure. A trace is a sequence of packets, each of which can be read as soon as it is there (perfetto.dev, "Writing
TrackEvents Protos").
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as perfetto

from shared.checkpoints import path_of
from shared.contracts.checkpoints import CheckpointRecord
from shared.contracts.results import ResultTiming
from shared.contracts.sessions import SamplerRecord, SessionRecord
from shared.contracts.tenants import UsageRecorded
from shared.contracts.training import RunRecord

NANO = 1_000_000_000
SEQUENCE = 1
LANES = 10_000
"""Requests of one run or sampler that overlap and still get lanes of their own."""

Texts = Mapping[str, str | float]


class Timeline:
    """Makes the packets of a trace."""

    def __init__(self, session: SessionRecord) -> None:
        self._session = session
        self._root = _id(session.session)
        self._free: dict[str, list[float]] = {}
        """By run or sampler: until when each of its lanes is taken."""
        self._begun = False

    def session(self, until: float) -> bytes:
        """The session itself, which has ended or goes on `until` now."""
        session = self._session
        name = session.display_name or session.session
        about = {"session": session.session, "ended": session.ended or "not yet", **_texts(session.user_metadata)}
        return self._track(session.session, f"session {name}") + self._slice(
            session.session, "session", session.created, session.ended_at or until, about
        )

    def run(self, run: RunRecord) -> bytes:
        """A run and when it was made."""
        about: Texts = {"base_model": run.base_model, "lora_rank": run.lora.rank, **_texts(run.user_metadata)}
        return self._track(run.run, f"training run {run.run}", self._root) + self._instant(
            run.run, "created", run.created, about
        )

    def sampler(self, sampler: SamplerRecord) -> bytes:
        """A sampler and when it was made."""
        about = {"base_model": sampler.base_model, "path": sampler.path or "", "policy": str(sampler.policy or "")}
        return self._track(sampler.sampler, f"sampler {sampler.sampler}", self._root) + self._instant(
            sampler.sampler, "created", sampler.created, about
        )

    def checkpoint(self, record: CheckpointRecord) -> bytes:
        """When a checkpoint was written."""
        about: Texts = {"path": path_of(record.key), "bytes": record.size}
        return self._instant(record.key.run, f"checkpoint {record.key.name}", record.created, about)

    def request(self, parent: str, timing: ResultTiming, done: float) -> bytes:
        """A request of a run or sampler, from when it came to its answer, its wait in a slice of its own."""
        name = timing.op or timing.kind
        about: dict[str, str | float] = {"request": timing.request_id}
        if timing.failure is not None:
            about |= {"error": timing.failure.message, "category": timing.failure.kind}
        begin = timing.submitted or done - timing.seconds - timing.queue_seconds
        if begin >= done:
            return self._instant(parent, name, done, about)
        lane, packets = self._lane(parent, begin, done)
        packets += self._slice(lane, name, begin, done, about)
        if timing.queue_seconds:
            packets += self._slice(lane, "waiting", begin, begin + timing.queue_seconds, {})
        return packets

    def tokens(self, used: UsageRecorded) -> bytes:
        """Tokens a second while a replica counted some."""
        name = f"{used.kind} tokens/s" + (" (cached)" if used.cached else "") + f", {used.base_model}"
        track = f"{self._session.session} {name}"
        rate = used.tokens / max(used.end - used.begin, 1.0)
        packet = _packet(0)
        descriptor = packet.track_descriptor
        descriptor.uuid, descriptor.name, descriptor.parent_uuid = _id(track), name, self._root
        descriptor.counter.SetInParent()
        return _bytes(packet) + _counted(track, used.begin, rate) + _counted(track, used.end, 0.0)

    def _lane(self, parent: str, begin: float, end: float) -> tuple[str, bytes]:
        """A track below the parent's on which nothing else happens meanwhile: slices of one track must nest."""
        lanes = self._free.setdefault(parent, [])
        number = next((number for number, free in enumerate(lanes) if free <= begin), len(lanes))
        if number < len(lanes):
            lanes[number] = end
            return f"{parent} {number}", b""
        if number < LANES:
            lanes.append(end)
        return f"{parent} {number}", self._track(f"{parent} {number}", "requests", _id(parent))

    def _track(self, track: str, name: str, parent: int = 0) -> bytes:
        packet = _packet(0)
        if not self._begun:  # tells the reader that nothing of this sequence was lost before
            self._begun = True
            packet.sequence_flags = perfetto.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
        packet.track_descriptor.uuid, packet.track_descriptor.name = _id(track), name
        if parent:
            packet.track_descriptor.parent_uuid = parent
        return _bytes(packet)

    def _slice(self, track: str, name: str, begin: float, end: float, about: Texts) -> bytes:
        first = _event(track, begin, perfetto.TrackEvent.TYPE_SLICE_BEGIN, name, about)
        last = _event(track, max(begin, end), perfetto.TrackEvent.TYPE_SLICE_END, "", {})
        return _bytes(first) + _bytes(last)

    def _instant(self, track: str, name: str, at: float, about: Texts) -> bytes:
        return _bytes(_event(track, at, perfetto.TrackEvent.TYPE_INSTANT, name, about))


def _event(track: str, at: float, kind: int, name: str, about: Texts) -> perfetto.TracePacket:
    packet = _packet(at)
    event = packet.track_event
    event.track_uuid, event.type = _id(track), kind
    if name:
        event.name = name
    for key, value in about.items():
        note = event.debug_annotations.add()
        note.name = key
        if isinstance(value, str):
            note.string_value = value
        else:
            note.double_value = value
    return packet


def _counted(track: str, at: float, value: float) -> bytes:
    packet = _packet(at)
    event = packet.track_event
    event.track_uuid, event.type, event.double_counter_value = _id(track), perfetto.TrackEvent.TYPE_COUNTER, value
    return _bytes(packet)


def _packet(at: float) -> perfetto.TracePacket:
    packet = perfetto.TracePacket()
    packet.timestamp = int(at * NANO)
    packet.trusted_packet_sequence_id = SEQUENCE
    return packet


def _bytes(packet: perfetto.TracePacket) -> bytes:
    content: bytes = perfetto.Trace(packet=[packet]).SerializeToString()
    return content


def _id(track: str) -> int:
    return zlib.crc32(track.encode()) << 20 | zlib.adler32(track.encode()) & 0xFFFFF


def _texts(given: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in given.items()}
