"""Training data as clients send them, in protobuf, and as the mesh has them. The one reader of that protobuf.

Every mistake names the datum, the field, what is wrong and what would be right. What only a trainer knows, the model's
vocabulary and context, is checked there, as clearly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from services.gateway.protocol import messages as proto
from shared.contracts import arrays
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.training import Datum, LossName, LossSpec
from shared.errors import UserError
from shared.loss_params import LONGER_NAMES, loss_params

Array = NDArray[Any]

MOST_CELLS = 1 << 24
"""Targets of one datum, when a sparse table is written out."""
INT32 = np.iinfo(np.int32)
_DTYPES: Mapping[int, np.dtype[Any]] = {
    proto.DTYPE_FLOAT32: np.dtype("<f4"),
    proto.DTYPE_INT64: np.dtype("<i8"),
    proto.DTYPE_INT32: np.dtype("<i4"),
    proto.DTYPE_BFLOAT16: np.dtype("<u2"),
}
_WEIGHTS = ("weights", "mask")
"""Names of the weight of each target; the policy losses take 0 and 1 only."""
_FIELDS: Mapping[str, str] = {
    "logprobs": "logprobs",
    "advantages": "advantages",
    "sequence_ratio_mask": "ratio_mask",
}
"""What else clients send for each token, and how a datum of the mesh calls it."""
_KNOWN = ("target_tokens", *_WEIGHTS, *_FIELDS, *LONGER_NAMES)


@dataclass(frozen=True)
class Span:
    """Where a stretch of a datum's targets comes from."""

    sequence: str
    """Of a sampled sequence, its id."""
    offset: int
    length: int
    sampled: bool
    """False: from the prompt of that sequence."""


@dataclass(frozen=True)
class Table:
    """Values with their shape: [N] or [N, K], the rows one behind the other."""

    values: Array
    shape: tuple[int, ...]


def parse(body: bytes) -> proto.ForwardBackwardRequest:
    """The message in a body. Raise `UserError` if it is none."""
    message = proto.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise UserError("the body is no valid protobuf ForwardBackwardRequest") from None
    return message


def loss_of(message: proto.ForwardBackwardRequest) -> LossSpec:
    """The loss with its parameters. Raise `UserError` for what is unknown or out of bounds."""
    if message.loss_fn == "custom":
        raise UserError(
            "loss 'custom' is not run on this server: use forward_backward_custom with a function, which runs in the "
            "client"
        )
    if message.loss_fn not in get_args(LossName):
        raise UserError(f"loss {message.loss_fn!r} is unknown: choose one of {', '.join(get_args(LossName))}")
    given = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise UserError(f"{message.loss_fn}: {name} is {value.text!r}, it must be a number")
        given[name] = value.number
    given |= _thresholds(message)
    return LossSpec(name=cast("LossName", message.loss_fn), params=loss_params(message.loss_fn, given))


def data_of(message: proto.ForwardBackwardRequest) -> list[Datum]:
    """All data. Raise `UserError` for the first mistake."""
    if not message.data:
        raise UserError("the request has no data: give at least one datum")
    return [_datum(index, datum, message.loss_fn) for index, datum in enumerate(message.data)]


def note_of(message: proto.ForwardBackwardRequest) -> str:
    """How many columns each datum's targets have, as `K*count,…`; 0: they are no table. Empty: none is one.

    The answer brings it back, since the log-probabilities in it have the shape of the targets.
    """
    runs: list[list[int]] = []
    for datum in message.data:
        shape = list(datum.loss_fn_inputs["target_tokens"].shape) if "target_tokens" in datum.loss_fn_inputs else []
        columns = int(shape[1]) if len(shape) == 2 else 0
        if runs and runs[-1][0] == columns:
            runs[-1][1] += 1
        else:
            runs.append([columns, 1])
    return "" if all(columns == 0 for columns, _ in runs) else ",".join(f"{k}*{count}" for k, count in runs)


def spans_of(datum: proto.Datum) -> list[Span]:
    """Where the targets of a datum come from, in order."""
    spans = []
    for span in datum.loss_fn_input_spans:
        sampled = span.WhichOneof("span") == "sampled_tokens"
        found = span.sampled_tokens if sampled else span.prompt_tokens
        spans.append(Span(found.sequence_id, found.offset, found.length, sampled))
    return spans


def text_tokens(chunks: Sequence[proto.Chunk], where: str) -> Int32s:
    """The token ids of a model input. Raise `UserError` for a chunk that is no text."""
    parts = []
    for number, chunk in enumerate(chunks):
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise not_text(f"{where}: chunk {number}", str(kind))
        parts.append(chunk.encoded_text.tokens)
    try:
        tokens: Int32s = arrays.decode(Int32s, b"".join(parts))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return tokens


def not_text(where: str, kind: str) -> UserError:
    """What is told of a chunk that only other models could read."""
    what = {"image": "an image", "image_asset_pointer": "an image", "dmel": "audio"}.get(kind, "not text")
    return UserError(f"{where} is {what}, but the base model reads text only: leave it out, or send its text as tokens")


# -- one datum -------------------------------------------------------------------------------------------------------


def _datum(index: int, datum: proto.Datum, loss: str) -> Datum:
    tokens = text_tokens(datum.model_input, f"datum {index}: model_input")
    tables = {name: _table(index, name, tensor) for name, tensor in datum.loss_fn_inputs.items()}
    for name in tables:
        if name not in _KNOWN:
            raise UserError(f"datum {index}: loss input {name!r} is unknown; there are {', '.join(_KNOWN)}")
    targets = tables.get("target_tokens")
    if targets is None:
        raise UserError(f"datum {index} has no target_tokens: give the token to predict at each position")
    _check_targets(index, targets, len(tokens), loss)
    given: dict[str, Any] = {
        field: _floats(index, name, tables[name], targets) for name, field in _FIELDS.items() if name in tables
    }
    return Datum(
        tokens=tokens,
        targets=_ids(index, targets),
        weights=_weights(index, tables, targets),
        targets_per_token=targets.shape[1] if len(targets.shape) > 1 else 1,
        **given,
    )


def _check_targets(index: int, targets: Table, length: int, loss: str) -> None:
    if not length:
        raise UserError(f"datum {index} has no tokens in its model_input")
    if targets.shape[0] != length:
        raise UserError(
            f"datum {index} has {targets.shape[0]} target_tokens for {length} tokens of model_input: give one for each "
            "position, usually the input shifted by one"
        )
    if len(targets.shape) > 1 and loss != "cross_entropy":
        raise UserError(f"datum {index}: target_tokens has the shape {list(targets.shape)}, {loss} takes [{length}]")
    if len(targets.shape) > 1 and not targets.shape[1]:
        raise UserError(f"datum {index}: target_tokens has no columns: give at least one target for each position")
    if targets.values.dtype.kind != "i":
        raise UserError(f"datum {index}: target_tokens are floating-point numbers: send them as int64")


def _ids(index: int, targets: Table) -> Int32s:
    wrong = (targets.values < 0) | (targets.values > INT32.max)
    if wrong.any():
        place = int(wrong.argmax())
        raise UserError(f"datum {index}: target_tokens[{place}] is {targets.values[place]}: token ids begin at 0")
    ids: Int32s = arrays.decode(Int32s, targets.values.astype("<i4").tobytes())
    return ids


def _weights(index: int, tables: Mapping[str, Table], targets: Table) -> Float32s | None:
    names = [name for name in _WEIGHTS if name in tables]
    if len(names) > 1:
        raise UserError(f"datum {index} has both weights and mask: give one of them")
    return _floats(index, names[0], tables[names[0]], targets) if names else None


def _floats(index: int, name: str, table: Table, targets: Table) -> Float32s:
    if table.values.size != targets.values.size:
        raise UserError(
            f"datum {index}: {name} has the shape {list(table.shape)} and target_tokens {list(targets.shape)}: they "
            "must be the same"
        )
    finite = np.isfinite(table.values)
    if not finite.all():
        place = int((~finite).argmax())
        raise UserError(f"datum {index}: {name}[{place}] is {table.values[place]}, it must be a finite number")
    values: Float32s = arrays.decode(Float32s, table.values.astype("<f4").tobytes())
    return values


def _thresholds(message: proto.ForwardBackwardRequest) -> dict[str, float]:
    """Clipping thresholds that came with the data: all the same, since a loss has one of each."""
    found: dict[str, float] = {}
    for index, datum in enumerate(message.data):
        for name in LONGER_NAMES:
            if name not in datum.loss_fn_inputs:
                continue
            values = _table(index, name, datum.loss_fn_inputs[name]).values
            for value in {float(value) for value in np.unique(values)}:
                if found.setdefault(name, value) != value or math.isnan(value):
                    raise UserError(
                        f"datum {index}: {name} has several values, but a request has one: give it in loss_fn_config"
                    )
    return found


# -- tensors ---------------------------------------------------------------------------------------------------------


def _table(index: int, name: str, tensor: proto.Tensor) -> Table:
    where = f"datum {index}: {name}"
    if tensor.dtype not in _DTYPES:
        raise UserError(f"{where} has no known dtype: send float32 or int64")
    shape = tuple(tensor.shape)
    if any(size < 0 for size in shape) or math.prod(shape) > MOST_CELLS:
        raise UserError(f"{where} has the shape {list(shape)}: it may have {MOST_CELLS} values")
    if tensor.WhichOneof("encoding") == "sparse_csr":
        values = _written_out(where, tensor, shape)
    else:
        values = _values(where, tensor.dense, tensor.dtype)
    shape = shape or (values.size,)
    if len(shape) > 2 or math.prod(shape) != values.size:
        raise UserError(f"{where} has {values.size} values and the shape {list(shape)}: give N, or N rows of K")
    return Table(values, shape)


def _values(where: str, content: bytes, dtype: int) -> Array:
    kind = _DTYPES[dtype]
    if len(content) % kind.itemsize:
        raise UserError(f"{where} has {len(content)} bytes, no whole number of {kind.itemsize}-byte values")
    values: Array = np.frombuffer(content, kind)
    if dtype == proto.DTYPE_BFLOAT16:  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _written_out(where: str, tensor: proto.Tensor, shape: tuple[int, ...]) -> Array:
    """A sparse table (CSR) with zeros wherever it names nothing."""
    if len(shape) != 2:
        raise UserError(f"{where} is sparse and has the shape {list(shape)}: give rows and columns")
    csr, (rows, columns) = tensor.sparse_csr, shape
    values = _values(where, csr.values, tensor.dtype)
    starts = _values(f"{where}: crow_indices", csr.crow_indices, proto.DTYPE_INT64)
    places = _values(f"{where}: col_indices", csr.col_indices, proto.DTYPE_INT64)
    counts = np.diff(starts)
    if starts.size != rows + 1 or starts[0] != 0 or starts[-1] != values.size or (counts < 0).any():
        raise UserError(f"{where}: crow_indices must be {rows + 1} places that rise from 0 to {values.size}")
    if places.size != values.size or ((places < 0) | (places >= columns)).any():
        raise UserError(f"{where}: col_indices must be {values.size} columns from 0 to {columns - 1}")
    found = np.zeros((rows, columns), values.dtype)
    found[np.repeat(np.arange(rows), counts), places] = values
    return found.reshape(-1)
