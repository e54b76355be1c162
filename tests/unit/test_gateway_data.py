"""Training data and results on the wire, against what the real client writes and reads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from services.gateway import results, training_data
from services.gateway.endpoints import sampling
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.base import Failure
from shared.contracts.results import RequestFailed
from shared.contracts.sampling import SampledSequence, SampleResult, TopLogprobs
from shared.contracts.training import Datum, LossSpec, OperationResult
from shared.errors import UserError

INPUT = types.ModelInput.from_ints([5, 6, 7])


def sent(loss: str, *inputs: dict[str, Any], config: dict[str, float | str] | None = None) -> Any:
    """What arrives of a request that the client has written."""
    data = [types.Datum(model_input=INPUT, loss_fn_inputs=each) for each in inputs]
    body = types.ForwardBackwardRequest(
        forward_backward_input=types.ForwardBackwardInput(data=data, loss_fn=loss, loss_fn_config=config),  # type: ignore[arg-type]
        model_id="s-1:train:0",
        seq_id=4,
    )
    return training_data.parse(forward_backward_request_to_proto(body).SerializeToString())


def read(loss: str, **inputs: Any) -> Datum:
    return training_data.data_of(sent(loss, inputs))[0]


def test_targets_and_weights_come_as_they_were_sent() -> None:
    datum = read("cross_entropy", target_tokens=[6, 7, 8], weights=[0.0, 1.0, -0.5])
    assert (list(datum.tokens), list(datum.targets)) == ([5, 6, 7], [6, 7, 8])
    assert datum.weights == Float32s([0.0, 1.0, -0.5])
    assert datum.targets_per_token == 1


@pytest.mark.parametrize("mask", ["weights", "mask"])
def test_what_policy_losses_need_has_its_place(mask: str) -> None:
    ones = types.TensorData.from_numpy(np.array([1, 1, 0]))
    datum = read(
        "gspo", target_tokens=[6, 7, 8], logprobs=[-1.0, -2.0, 0.0], advantages=[1.0, 1.0, 1.0],
        sequence_ratio_mask=[0.0, 1.0, 0.0], **{mask: ones},
    )  # fmt: skip
    assert datum.logprobs == Float32s([-1.0, -2.0, 0.0])
    assert datum.ratio_mask == Float32s([0.0, 1.0, 0.0])
    assert datum.weights == Float32s([1.0, 1.0, 0.0])


@pytest.mark.parametrize("columns", [1, 2, 40])
def test_tables_of_targets_come_whole_whether_sent_dense_or_sparse(columns: int) -> None:
    targets = torch.zeros(3, columns, dtype=torch.int64)
    targets[1, columns - 1] = 9
    weights = torch.zeros(3, columns)
    weights[1, columns - 1] = 0.25
    message = sent("cross_entropy", {"target_tokens": targets, "weights": weights})
    assert columns < 40 or message.data[0].loss_fn_inputs["weights"].WhichOneof("encoding") == "sparse_csr"
    (datum,) = training_data.data_of(message)
    assert list(datum.targets) == targets.flatten().tolist()
    assert datum.weights == Float32s(weights.flatten().tolist())
    assert datum.targets_per_token == columns


def test_log_probabilities_have_the_shape_of_the_targets() -> None:
    table = torch.tensor([[1, 2], [3, 4], [5, 6]])
    message = sent(
        "cross_entropy", {"target_tokens": [6, 7, 8]}, {"target_tokens": table}, {"target_tokens": table[:, :1]}
    )
    logprobs = [Float32s([-1, -2, -3]), Float32s([-1, -2, -3, -4, -5, -6]), Float32s([-7, -8, -9])]
    result = OperationResult(
        request_id="r", run="s-1:train:0", seq=4, metrics={"loss:sum": 2.5}, logprobs=logprobs,
        note=training_data.note_of(message),
    )  # fmt: skip
    output = deserialize_forward_backward_output(results.forward_backward(result))
    assert output.metrics == {"loss:sum": 2.5}
    assert [datum["logprobs"].tolist() for datum in output.loss_fn_outputs] == [
        [-1, -2, -3], [[-1, -2], [-3, -4], [-5, -6]], [[-7], [-8], [-9]],
    ]  # fmt: skip


def test_parameters_of_a_loss_are_read_by_either_name() -> None:
    inputs = {"target_tokens": [6, 7, 8], "logprobs": [0.0] * 3, "advantages": [0.0] * 3}
    config: dict[str, float | str] = {"clip_low_threshold": 0.5, "clip_high": 2.0}
    expected = LossSpec(name="ppo", params={"clip_low": 0.5, "clip_high": 2.0})
    assert training_data.loss_of(sent("ppo", inputs, config=config)) == expected
    with_data = {**inputs, "clip_low_threshold": [0.5] * 3, "clip_high_threshold": [2.0] * 3}
    assert training_data.loss_of(sent("ppo", with_data)) == expected
    with pytest.raises(UserError, match="several values"):
        training_data.loss_of(sent("ppo", {**inputs, "clip_low_threshold": [0.5, 0.6, 0.5]}))
    with pytest.raises(UserError, match="must be a number"):
        training_data.loss_of(sent("ppo", inputs, config={"clip_low": "high"}))


def test_samples_come_as_they_were_drawn() -> None:
    top = TopLogprobs(width=2, ids=Int32s([1, 2, 3, 0]), logprobs=Float32s([-1, -2, -3, -99999]))
    result = SampleResult(
        request_id="r",
        sequences=[
            SampledSequence(tokens=Int32s([7, 8]), logprobs=Float32s([-0.5, -1]), stop_reason="stop", top=top),
            SampledSequence(tokens=Int32s(), logprobs=Float32s(), stop_reason="length"),
        ],
        prompt_logprobs=Float32s([math.nan, -0.25]),
        top_prompt_logprobs=top,
    )
    read = deserialize_sample_response(results.sample(result))
    assert [(list(one.tokens), one.stop_reason) for one in read.sequences] == [([7, 8], "stop"), ([], "length")]
    assert read.sequences[0].logprobs == [-0.5, -1.0]
    assert read.sequences[0].topk_logprobs is not None
    assert read.sequences[0].topk_logprobs[0] == [(1, -1.0), (2, -2.0)]
    assert read.prompt_logprobs == [None, -0.25]
    assert read.prompt_cache_hit_tokens == 0
    assert read.target_prompt_logprobs is None


@pytest.mark.parametrize("sparse", [False, True])
def test_asked_log_probabilities_have_the_form_in_which_they_were_asked(sparse: bool) -> None:
    asked = torch.tensor([[-1, -1, -1, 4], [-1, -1, -1, -1], [-1, -1, 2, -1]])
    tensor = types.TensorData.from_torch_sparse(asked, pad_value=-1) if sparse else types.TensorData.from_torch(asked)
    assert (tensor.sparse_crow_indices is not None) == sparse
    wire = sampling.Tensor(
        data=list(tensor.data), dtype="int64", shape=tensor.shape,
        sparse_crow_indices=tensor.sparse_crow_indices, sparse_col_indices=tensor.sparse_col_indices,
    )  # fmt: skip
    ids, columns, note = sampling._targets(wire, length=4)
    assert ids is not None
    assert (list(ids), columns) == (asked.flatten().tolist(), 4)
    values = Float32s([-0.5 if token >= 0 else math.nan for token in ids])
    answer = results.sample(SampleResult(request_id="r", target_logprobs=values, note=note))
    found = deserialize_sample_response(answer).target_prompt_logprobs
    assert found is not None
    assert (found.sparse_crow_indices, found.sparse_col_indices) == (
        tensor.sparse_crow_indices, tensor.sparse_col_indices,
    )  # fmt: skip
    assert found.to_torch().tolist() == torch.where(asked >= 0, -0.5, 0.0).tolist()


def test_other_results_are_json() -> None:
    result = OperationResult(request_id="r", run="s-1:train:0", seq=4, metrics={"step:max": 2.0}, note="s-1:sample:3")
    assert results.operation(result) == {
        "model_id": "s-1:train:0", "metrics": {"step:max": 2.0}, "sampling_session_id": "s-1:sample:3",
    }  # fmt: skip
    failed = RequestFailed(request_id="r", failure=Failure(message="no", kind="server"))
    assert results.answer(failed).content == b'{"error":"no","category":"server"}'
