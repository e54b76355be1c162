"""Training data that name the samples they are made of get the log-probabilities that the sampler has recorded.

A sampled sequence is named by the request that it answered, whose result is kept for an hour.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from services.gateway import ids
from services.gateway.context import Gateway
from services.gateway.errors import NotFound
from services.gateway.protocol import messages as proto
from services.gateway.training_data import Span, spans_of
from shared.contracts.arrays import Float32s
from shared.contracts.sampling import SampledSequence, SampleResult
from shared.contracts.training import Datum
from shared.errors import UserError


async def with_sampled_logprobs(
    gateway: Gateway, run: str, message: proto.ForwardBackwardRequest, data: Sequence[Datum]
) -> list[Datum]:
    """The data with `logprobs` from the samples that their spans name. Raise `UserError` for what does not fit."""
    session = ids.parse_run(run).session
    results: dict[str, SampleResult] = {}
    found = []
    for index, (sent, datum) in enumerate(zip(message.data, data, strict=True)):
        spans = spans_of(sent)
        for span in spans:
            if span.sampled and (request := span.sequence.rpartition("/")[0]) not in results:
                results[request] = await _result(gateway, session, index, span.sequence)
        logprobs = _logprobs(index, datum, spans, results)
        found.append(msgspec.structs.replace(datum, logprobs=logprobs))
    return found


def _logprobs(index: int, datum: Datum, spans: Sequence[Span], results: dict[str, SampleResult]) -> Float32s:
    if not spans:
        raise UserError(
            f"datum {index} does not say where its tokens come from: stable_reinforce needs with_provenance, "
            "and samples of a client with record_stability_info"
        )
    logprobs = Float32s()
    for span in spans:
        if not span.sampled:
            logprobs.extend([0.0] * span.length)
            continue
        sequence = _sequence(index, span, results)
        part = slice(span.offset, span.offset + span.length)
        place = len(logprobs)
        if sequence.tokens[part] != datum.targets[place : place + span.length] or span.length > len(sequence.tokens):
            raise UserError(
                f"datum {index}: target_tokens[{place}:{place + span.length}] are not the tokens "
                f"{span.offset} to {span.offset + span.length} of sequence {span.sequence}"
            )
        logprobs.extend(sequence.logprobs[part])
    if len(logprobs) != len(datum.targets):
        raise UserError(f"datum {index}: its spans cover {len(logprobs)} of {len(datum.targets)} target_tokens")
    return logprobs


def _sequence(index: int, span: Span, results: dict[str, SampleResult]) -> SampledSequence:
    request, _, number = span.sequence.rpartition("/")
    sequences = results[request].sequences
    if not number.isdigit() or int(number) >= len(sequences):
        raise UserError(f"datum {index}: there is no sequence {ids.shown(span.sequence)}")
    return sequences[int(number)]


async def _result(gateway: Gateway, session: str, index: int, sequence: str) -> SampleResult:
    request = sequence.rpartition("/")[0]
    try:
        owned = ids.parse_request(request)
    except NotFound:
        raise UserError(f"datum {index}: {ids.shown(sequence)} is no id of a sampled sequence") from None
    result = await gateway.bus.answer_of(request) if owned.session == session else None
    if not isinstance(result, SampleResult):
        raise UserError(
            f"datum {index}: sequence {ids.shown(sequence)} is not known in this session (any more): what a sampler "
            "records is kept for an hour"
        )
    return result
