"""What a TrainingClient computes: losses, gradients, steps."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import tinker
import torch
from tinker import types

from shared.contracts.training import Datum as MeshDatum
from shared.contracts.training import LossSpec
from tests.engines.formulas import loss_of
from tests.mesh.harness import MODEL
from tests.mesh.sdk.data import CLOSE, NEW, OTHERS, TOKENS, Reference, datum, learn, loss, prompt, scores
from tests.mesh.sdk.declared import DEPRECATED_TOO, differs, means
from tests.mesh.sdk.test_service_client import adapter
from tests.mesh.sdk.world import SECONDS, User, wait

pytestmark = DEPRECATED_TOO

EPS = 1e-4
"""With AdamW's default of 1e-12 a gradient that is zero but for rounding moves a weight as far as any other, and what
is packed beside a sequence changes its rounding. This is above the rounding and below the gradients."""
ONE_TARGET: Any = {"target_tokens": [6], "weights": [1.0]}
PASSES = ("TrainingClient.forward", "TrainingClient.forward_async")
TRAINING = ("TrainingClient.forward_backward", "TrainingClient.forward_backward_async")
STEPS = ("TrainingClient.optim_step", "TrainingClient.optim_step_async")


def policy_datum(q: Sequence[float], **more: Any) -> types.Datum:
    return datum(logprobs=list(q), advantages=NEW, **more)


@means("loss and log-probabilities are those of transformers, weighted, with negative weights too", *PASSES, *TRAINING)
def test_cross_entropy_is_that_of_the_model(user: User, model: Reference) -> None:
    training, weights = user.train(), [1.0, 0.0, 2.5, -1.0, 0.5]
    data = [datum(weights=weights), datum(OTHERS)]
    expected = [model.scores(TOKENS), model.scores(OTHERS)]
    total = -sum(w * lp for w, lp in zip(weights, expected[0], strict=True)) - sum(expected[1])
    for found in (
        training.forward(data, "cross_entropy").result(),
        wait(training.forward_async(data, "cross_entropy")).result(),
        training.forward_backward(data, "cross_entropy").result(),
        wait(training.forward_backward_async(data, "cross_entropy")).result(),
    ):
        assert found.metrics["loss:sum"] == pytest.approx(total, abs=CLOSE)
        assert [list(each["logprobs"].data) for each in found.loss_fn_outputs] == [
            pytest.approx(each, abs=CLOSE) for each in expected
        ]


@means(
    "each policy loss has the value of its formula, written out token by token: importance_sampling, ppo, cispo, dro, "
    "gspo, with their parameters",
    "TrainingClient.forward_backward",
)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("importance_sampling", {}),
        ("ppo", {}),
        ("ppo", {"clip_low_threshold": 0.95, "clip_high_threshold": 1.05}),
        ("cispo", {}),
        ("cispo", {"clip_high_threshold": 1.1}),
        ("dro", {"beta": 0.2}),
        ("gspo", {}),
    ],
)
def test_policy_losses_have_the_values_of_their_formulas(
    user: User, model: Reference, name: Any, settings: dict[str, float]
) -> None:
    lp = model.scores(TOKENS)
    q = [each + shift for each, shift in zip(lp, [0.3, -0.4, 0.02, 0.0, -0.1], strict=True)]
    given = {key.removesuffix("_threshold"): value for key, value in settings.items()}
    from shared.contracts.arrays import Float32s, Int32s

    here = MeshDatum(
        tokens=Int32s(TOKENS[:-1]), targets=Int32s(TOKENS[1:]), logprobs=Float32s(q), advantages=Float32s(NEW)
    )
    expected = loss_of(torch.tensor(lp, dtype=torch.float64), here, LossSpec(name=name, params=given)).item()
    found = user.train().forward_backward([policy_datum(q)], name, settings).result()
    assert found.metrics["loss:sum"] == pytest.approx(expected, abs=CLOSE)


@means("computes and leaves no gradient behind: the step after it changes nothing", *PASSES)
def test_forward_alone_trains_nothing(user: User) -> None:
    training = user.train()
    before = training.forward([datum()], "cross_entropy").result().metrics["loss:sum"]
    training.optim_step(types.AdamParams(learning_rate=0.1)).result()
    assert wait(training.forward_async([datum()], "cross_entropy")).result().metrics["loss:sum"] == before


@means("gradients of several passes add up: two halves of a batch train like the whole", *TRAINING)
def test_gradients_gather_until_the_step(user: User) -> None:
    whole, halves = user.train(), user.train()
    whole.forward_backward([datum(), datum(OTHERS)], "cross_entropy").result()
    halves.forward_backward([datum()], "cross_entropy")
    wait(halves.forward_backward_async([datum(OTHERS)], "cross_entropy")).result()
    for run in (whole, halves):
        run.optim_step(types.AdamParams(learning_rate=0.02)).result()
    assert loss(halves) == pytest.approx(loss(whole), abs=CLOSE)
    assert loss(halves, OTHERS) == pytest.approx(loss(whole, OTHERS), abs=CLOSE)


@means("a batch of more than 1,024 data, which the client cuts in parts, has the loss of the whole", TRAINING[0])
def test_a_batch_that_the_client_cuts_up_is_one_batch(user: User) -> None:
    training = user.train()
    one = loss(training)
    found = training.forward_backward([datum()] * 1030, "cross_entropy").result()
    assert found.metrics["loss:sum"] == pytest.approx(1030 * one, rel=1e-5)
    assert len(found.loss_fn_outputs) == 1030


@means("several targets for each token, dense and sparse: the loss is the sum over all, each with its weight", *PASSES)
def test_several_targets_for_a_token(user: User, model: Reference) -> None:
    targets = torch.tensor([[6, 9], [7, 0], [8, 11]])
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]])
    table = model.table(TOKENS[:3])
    expected = -(table.gather(1, targets) * weights).sum().item()
    table_of_targets: Any = {"target_tokens": targets, "weights": weights}  # what scripts pass: made sparse by the SDK
    data = types.Datum(model_input=prompt(TOKENS[:3]), loss_fn_inputs=table_of_targets)
    dense = {
        "target_tokens": types.TensorData.from_torch(targets),
        "weights": types.TensorData.from_torch(weights),
    }
    training = user.train()
    sparse = training.forward([data], "cross_entropy").result()
    again = types.Datum(model_input=prompt(TOKENS[:3]), loss_fn_inputs=dense)
    plain = wait(training.forward_async([again], "cross_entropy")).result()
    for found in (sparse, plain):
        assert found.metrics["loss:sum"] == pytest.approx(expected, abs=CLOSE)
    assert plain.loss_fn_outputs[0]["logprobs"].shape == [3, 2]


@means(
    "a function of the client on log-probabilities: twice the loss is twice the gradient; its own metrics come along",
    "TrainingClient.forward_backward_custom",
    "TrainingClient.forward_backward_custom_async",
)
def test_a_loss_of_the_clients_own_trains_like_the_same_built_in(user: User) -> None:
    def own_loss(_: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -2 * logprobs[0].sum(), {"mine": 1.0}

    own, built_in = user.train(), user.train()
    for call in range(2):
        if call:
            found = wait(own.forward_backward_custom_async([datum()], own_loss)).result()
        else:
            found = own.forward_backward_custom([datum()], own_loss).result()
        expected = built_in.forward_backward([datum(weights=[2.0] * 5)], "cross_entropy").result()
        assert found.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], abs=CLOSE)
        assert found.metrics["mine"] == 1.0
        for run in (own, built_in):
            run.optim_step(types.AdamParams(learning_rate=0.02)).result()
    assert loss(own) == pytest.approx(loss(built_in), abs=CLOSE)


@means(
    "AdamW: the first step moves each weight by the learning rate; weight decay is decoupled; a step of rate 0 "
    "changes nothing; settings may change from step to step",
    *STEPS,
)
def test_steps_are_those_of_adamw(user: User) -> None:
    training = user.train()
    before = adapter(user, training, "before")
    training.forward_backward([datum()], "cross_entropy")
    params = types.AdamParams(learning_rate=0.01, weight_decay=0.1)
    done = training.optim_step(params).result()
    assert done.metrics is not None
    after = adapter(user, training, "after")
    for name in before:
        if "lora_B" in name:
            moved = after[name][after[name] != 0].abs()
            assert len(moved)
            assert torch.allclose(moved, torch.full_like(moved, 0.01), rtol=1e-2)
        else:  # without a gradient at first, since B is zero: only the decay acts
            assert torch.allclose(after[name], before[name] * (1 - 0.01 * 0.1), rtol=1e-5)
    wait(training.optim_step_async(types.AdamParams(learning_rate=0.0))).result()
    same = adapter(user, training, "same")
    assert all(torch.equal(same[name], after[name]) for name in after)


@means(
    "operations are done in the order in which they were asked for, however early: a pipeline of passes and steps "
    "gives the losses of one that waits each time",
    *TRAINING,
    *STEPS,
)
def test_a_pipeline_gives_what_waiting_gives(user: User) -> None:
    ahead, patient = user.train(), user.train()
    waited = []
    for _ in range(4):
        found = wait(patient.forward_backward_async([datum()], "cross_entropy")).result()
        waited.append(found.metrics["loss:sum"])
        wait(patient.optim_step_async(types.AdamParams(learning_rate=0.02))).result()
    passes = []
    for _ in range(4):
        passes.append(ahead.forward_backward([datum()], "cross_entropy"))
        ahead.optim_step(types.AdamParams(learning_rate=0.02))
    losses = [each.result().metrics["loss:sum"] for each in passes]
    assert losses == pytest.approx(waited, abs=CLOSE)
    assert losses == sorted(losses, reverse=True)


@means("two clients that train two runs at the same time get the losses that each gets alone", TRAINING[0], STEPS[0])
def test_runs_at_the_same_time_do_not_disturb_each_other(user: User) -> None:
    tasks = {1: TOKENS, 2: OTHERS}
    alone = {seed: learn(user.train(seed=seed), 8, tokens, eps=EPS) for seed, tokens in tasks.items()}
    found: dict[int, list[float]] = {}

    def run(seed: int, service: tinker.ServiceClient) -> None:
        training = service.create_lora_training_client(MODEL, rank=8, seed=seed).result(SECONDS)
        start.wait(SECONDS)
        found[seed] = learn(training, 8, tasks[seed], eps=EPS)

    start = threading.Barrier(len(tasks))
    threads = [threading.Thread(target=run, args=(seed, user.another())) for seed in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    for seed, losses in alone.items():
        assert found[seed] == pytest.approx(losses, abs=CLOSE)


@means(
    "the base model by the name under which it was asked for, the adapter's rank, where its tokenizer is",
    "TrainingClient.get_info",
    "TrainingClient.get_info_async",
    "TrainingClient.get_tokenizer",
)
def test_a_run_is_described(user: User) -> None:
    training = user.train(rank=4)
    info = training.get_info()
    assert (info.model_id, info.model_data.model_name, info.is_lora, info.lora_rank) == (
        training.model_id,
        MODEL,
        True,
        4,
    )
    assert wait(training.get_info_async()) == info
    assert training.get_tokenizer().decode(training.get_tokenizer().encode("Hello")) == "Hello"


@means(
    "what a user did wrong fails its own future, with category `user` and a message that names it, and holds up "
    "nothing",
    TRAINING[0],
    STEPS[0],
)
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: [datum([5, 999_999, 7])], "999999"),
        (lambda: [datum(list(range(5, 250)) * 5)], "1024"),
        (lambda: [datum(advantages=[1.0] * 5)], "logprobs"),
        (lambda: [types.Datum(model_input=prompt([5, 6]), loss_fn_inputs=ONE_TARGET)], "target_tokens"),
        (lambda: [datum(weights=[1.0, float("nan"), 1.0, 1.0, 1.0])], "finite"),
    ],
    ids=["unknown-token", "too-long", "no-logprobs", "too-few-targets", "nan"],
)
def test_mistakes_fail_alone_and_say_what_is_wrong(user: User, wrong: Any, says: str) -> None:
    training = user.train()
    name: Any = "importance_sampling" if says == "logprobs" else "cross_entropy"
    refused = training.forward_backward(wrong(), name)
    step = training.optim_step(types.AdamParams(learning_rate=0.02))
    with pytest.raises(tinker.RequestFailedError, match=says) as raised:
        refused.result()
    assert raised.value.category == "user"
    assert step.result().metrics is not None
    assert loss(training) > 0


@differs("images and sound", "refused with an error that names the chunk: the models that are served read text only")
def test_pictures_and_sound_are_refused_by_name(user: User) -> None:
    training, sampler = user.train(), user.base()
    picture = types.ImageChunk(data=b"x", format="png", expected_tokens=1)
    sound = types.DmelChunk(dmel=b"x")
    for chunk, called in ((picture, "image"), (sound, "audio")):
        mixed = types.ModelInput(chunks=[types.EncodedTextChunk(tokens=[5, 6]), chunk])
        data = types.Datum(model_input=mixed, loss_fn_inputs=ONE_TARGET)
        with pytest.raises(tinker.RequestFailedError, match=f"{called}.*text only") as raised:
            training.forward_backward([data], "cross_entropy").result()
        assert raised.value.category == "user"
        with pytest.raises(tinker.BadRequestError, match=f"{called}.*text only"):
            sampler.sample(mixed, 1, types.SamplingParams(max_tokens=1)).result(SECONDS)


@differs("Dimuon", "refused with a clear error, at a run's creation and at a step: AdamW is the only optimizer")
def test_other_optimizers_are_refused(user: User) -> None:
    with pytest.raises(tinker.BadRequestError, match="AdamW"):
        user.train(optimizer=types.DimuonOptimizerConfig())
    training = user.train()
    with pytest.raises(tinker.RequestFailedError, match="AdamW") as raised:
        training.optim_step(types.DimuonParams(learning_rate=0.1)).result()
    assert raised.value.category == "user"
    assert loss(training) > 0


@means("its targets' log-probabilities are those of the sampler that has the same weights", *PASSES)
def test_trainer_and_sampler_agree(user: User) -> None:
    training = user.train()
    learn(training)
    found = wait(training.forward_async([datum()], "cross_entropy")).result()
    plain = training.forward([datum()], "cross_entropy").result()
    sampler = training.save_weights_and_get_sampling_client().result(SECONDS)
    assert list(found.loss_fn_outputs[0]["logprobs"].data) == pytest.approx(scores(sampler), abs=CLOSE)
    assert plain.metrics == pytest.approx(found.metrics, abs=CLOSE)
