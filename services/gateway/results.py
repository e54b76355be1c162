"""Results of the mesh as clients read them: in protobuf those of samples and passes, in JSON all others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from services.gateway.context import Answer
from services.gateway.protocol import messages as proto
from shared import checkpoints
from shared.contracts.arrays import Float32s
from shared.contracts.results import RequestFailed, Result
from shared.contracts.sampling import SampleResult, TopLogprobs
from shared.contracts.training import OperationResult

PROTOBUF = "application/x-protobuf"
OUTPUT_TYPE = "ArrayRecord"
SPARSE = "sparse"
_STOP = {"stop": proto.STOP_REASON_STOP, "length": proto.STOP_REASON_LENGTH}
_encoder = msgspec.json.Encoder()


def answer(result: Result) -> Answer:
    """The answer to a poll for a result that is there."""
    if isinstance(result, SampleResult):
        return Answer(sample(result), PROTOBUF)
    if isinstance(result, OperationResult):
        if result.logprobs:
            return Answer(forward_backward(result), PROTOBUF)
        return Answer(_encoder.encode(operation(result)))
    if isinstance(result, RequestFailed):
        return Answer(_encoder.encode({"error": result.failure.message, "category": result.failure.kind}))
    raise AssertionError(f"{type(result).__name__} is not asked for here")


def operation(result: OperationResult) -> dict[str, Any]:
    """What any operation but a pass gave. Clients read the fields that belong to what they asked."""
    found: dict[str, Any] = {"model_id": result.run, "metrics": result.metrics}
    if result.recorded is not None:
        found["path"] = checkpoints.path_of(result.recorded.key)
    elif result.note.startswith(checkpoints.SCHEME):
        found["path"] = result.note
    elif result.note:
        found["sampling_session_id"] = result.note
    return found


def forward_backward(result: OperationResult) -> bytes:
    """What a pass gave: metrics, and log-probabilities in the shape of the targets."""
    message = proto.ForwardBackwardOutput(loss_fn_output_type=OUTPUT_TYPE, metrics=result.metrics)
    start = 0
    for columns, count in _columns(result):
        part = result.logprobs[start : start + count]
        start += count
        record = message.loss_fn_outputs.add(type_tag=OUTPUT_TYPE, num_datums=len(part))
        record.fields["logprobs"].CopyFrom(_batched(part, columns))
    return message.SerializeToString()


def sample(result: SampleResult) -> bytes:
    """What was sampled."""
    message = proto.SampleResponse()
    for sequence in result.sequences:
        added = message.sequences.add(
            stop_reason=_STOP[sequence.stop_reason],
            tokens=sequence.tokens.tobytes(),
            logprobs=sequence.logprobs.tobytes(),
        )
        if sequence.top is not None:
            added.topk_sampled_logprobs.CopyFrom(_top(sequence.top))
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = result.prompt_logprobs.tobytes()
    if result.top_prompt_logprobs is not None:
        message.topk_prompt_logprobs.CopyFrom(_top(result.top_prompt_logprobs))
    if result.target_logprobs is not None:
        message.target_prompt_logprobs.CopyFrom(_targets(result.target_logprobs, result.note))
    return message.SerializeToString()


def targets_note(columns: int, *, sparse: bool) -> str:
    """What a sample request notes of the table whose log-probabilities it asks for; the answer has its form."""
    return f"{columns} {SPARSE}" if sparse else str(columns)


def _columns(result: OperationResult) -> Iterator[tuple[int, int]]:
    """Columns and number of data, as the request noted them."""
    if not result.note:
        yield 0, len(result.logprobs)
        return
    for part in result.note.split(","):
        columns, _, count = part.partition("*")
        yield int(columns), int(count)


def _batched(values: Sequence[Float32s], columns: int) -> proto.BatchedTensor:
    sizes = [len(each) * each.itemsize for each in values]
    offsets = np.fromiter(itertools.accumulate(sizes, initial=0), "<i8", len(sizes) + 1)
    return proto.BatchedTensor(
        data=b"".join(map(memoryview, values)),
        offsets=offsets.tobytes(),
        dtype=proto.DTYPE_FLOAT32,
        trailing_shape=[columns] if columns else [],
    )


def _top(top: TopLogprobs) -> proto.TopkLogprobs:
    return proto.TopkLogprobs(
        token_ids=top.ids.tobytes(),
        logprobs=top.logprobs.tobytes(),
        k=top.width,
        length=len(top.ids) // top.width if top.width else 0,
    )


def _targets(logprobs: Float32s, note: str) -> proto.Tensor:
    columns, _, form = note.partition(" ")
    values = np.frombuffer(logprobs, "<f4").reshape(-1, int(columns))
    asked = ~np.isnan(values)
    message = proto.Tensor(dtype=proto.DTYPE_FLOAT32, shape=values.shape)
    if form == SPARSE:
        message.sparse_csr.values = values[asked].tobytes()
        message.sparse_csr.crow_indices = np.concatenate([[0], asked.sum(1).cumsum()]).astype("<i8").tobytes()
        message.sparse_csr.col_indices = np.nonzero(asked)[1].astype("<i8").tobytes()
    else:
        message.dense = np.where(asked, values, np.float32(0)).tobytes()
    return message
