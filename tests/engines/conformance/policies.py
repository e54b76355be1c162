"""Policies: each request gets exactly the one that it names, whatever else is in the batch."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from services.trainer.engines.base import PassItem
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.contracts.arrays import Int32s
from shared.contracts.policies import LoraSpec, PolicyRef
from shared.contracts.sampling import SampleResult
from shared.contracts.training import AdamParams, Datum, LossSpec
from shared.errors import PermanentError, TemporaryError, UserError
from shared.models.adapter_files import to_peft
from tests.engines.sampler_tools import (
    PROMPTS,
    StartAny,
    ask,
    continued,
    eventually,
    logprobs_of,
    policy_files,
    together,
    tokens,
)
from tests.engines.tiny import CONTEXT

LOSS = LossSpec(name="cross_entropy")


class PolicyUse:
    """With PEFT, and our own trainer, as references."""

    async def test_policies_in_one_batch_equal_peft_with_each_alone(
        self, start: StartAny, sampler_model: Path, tmp_path: Path, tolerance: float
    ) -> None:
        engine = await start()
        models: dict[PolicyRef | None, Any] = {None: AutoModelForCausalLM.from_pretrained(sampler_model).eval()}
        specs: list[dict[str, Any]] = [{}, {"train_mlp": False}, {"train_unembed": True, "alpha": 8.0}]
        for seed, spec in enumerate(specs):
            policy = PolicyRef(run="run", version=seed)
            base = AutoModelForCausalLM.from_pretrained(sampler_model).eval()
            _, files = policy_files(base, seed, **spec)
            for name, content in files.items():
                folder = tmp_path / str(seed)
                folder.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
            await engine.load_policy(policy, files)
            models[policy] = PeftModel.from_pretrained(base, tmp_path / str(seed))
        asked = [(prompt, named, 5 + at) for at, prompt in enumerate(PROMPTS) for named in models]
        results = await together(
            engine, [ask(prompt, policy=named, temperature=0, max_tokens=count) for prompt, named, count in asked]
        )
        for (prompt, named, count), result in zip(asked, results, strict=True):
            model = models[named]
            assert result.policy == named
            assert tokens(result) == continued(model, prompt, count), str(named)
            expected = logprobs_of(model, prompt, tokens(result))
            torch.testing.assert_close(torch.tensor(result.sequences[0].logprobs), expected, atol=tolerance, rtol=0)
        same_prompt = {
            tuple(tokens(r)) for (prompt, _, _), r in zip(asked, results, strict=True) if prompt == PROMPTS[2]
        }
        assert len(same_prompt) == len(models)

    async def test_a_policy_in_use_cannot_be_unloaded(self, start: StartAny, reference: Any) -> None:
        engine = await start()
        policy = PolicyRef(run="run", version=0)
        await engine.load_policy(policy, policy_files(reference, 0)[1])
        task = asyncio.create_task(engine.generate(ask(PROMPTS[0], policy=policy, max_tokens=CONTEXT - 1)))
        await eventually(lambda: engine.load().running == 1)
        with pytest.raises(TemporaryError, match="used by 1 request"):
            await engine.unload_policy(policy)
        assert engine.policies == {policy}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await engine.unload_policy(policy)
        await engine.unload_policy(policy)
        assert engine.policies == frozenset()
        with pytest.raises(UserError, match="run@0 is not loaded"):
            await engine.generate(ask(PROMPTS[0], policy=policy))

    async def test_policies_come_and_go_while_requests_run(self, start: StartAny, reference: Any) -> None:
        engine = await start(max_policies=2)
        first, second, third = (PolicyRef(run="run", version=version) for version in range(3))
        files = {policy: policy_files(reference, policy.version)[1] for policy in (first, second, third)}
        await engine.load_policy(first, files[first])
        stop = asyncio.Event()

        async def traffic() -> list[tuple[int, ...]]:
            answers = []
            while not stop.is_set():
                answers.append(tuple(tokens(await engine.generate(ask(PROMPTS[2], policy=first, temperature=0)))))
            return answers

        busy = [asyncio.create_task(traffic()) for _ in range(3)]
        await engine.load_policy(second, files[second])
        await engine.load_policy(second, files[second])
        with pytest.raises(TemporaryError, match="2 policies are loaded"):
            await engine.load_policy(third, files[third])
        before = tokens(await engine.generate(ask(PROMPTS[2], policy=second, temperature=0)))
        await engine.unload_policy(second)
        await engine.load_policy(third, files[third])
        after = tokens(await engine.generate(ask(PROMPTS[2], policy=third, temperature=0)))
        stop.set()
        answers = {answer for task in busy for answer in await task}
        assert engine.policies == {first, third}
        assert len(answers | {tuple(before), tuple(after)}) == 3
        assert len(answers) == 1

    async def test_files_that_do_not_fit_the_model_are_refused(self, start: StartAny) -> None:
        engine = await start()
        with pytest.raises(PermanentError):
            await engine.load_policy(PolicyRef(run="run", version=0), {"adapter_config.json": b"{}"})
        assert engine.policies == frozenset()

    async def test_a_policy_that_overflows_fails_only_its_own_requests(self, start: StartAny, reference: Any) -> None:
        engine = await start(max_sequences=8)
        bad, good = PolicyRef(run="bad", version=0), PolicyRef(run="good", version=0)
        adapter, _ = policy_files(reference, 0)
        for _, b in adapter.weights.values():
            b.mul_(1e30)
        await engine.load_policy(bad, to_peft(adapter, "tiny"))
        await engine.load_policy(good, policy_files(reference, 1)[1])
        poison = ask(PROMPTS[2], policy=bad, temperature=0, max_tokens=30)
        short = ask(PROMPTS[0], policy=good, temperature=0, max_tokens=30)
        alone = await engine.generate(short)
        for _ in range(3):  # the places that the failed ones leave, longer than needed, are used by the others
            asked = [poison, short] * 4
            outcomes = await asyncio.gather(*(engine.generate(request) for request in asked), return_exceptions=True)
            for outcome in outcomes[::2]:
                assert isinstance(outcome, PermanentError)
                assert "policy bad@0 gives logits that are not finite" in str(outcome)
            for outcome in outcomes[1::2]:
                assert isinstance(outcome, SampleResult)
                assert tokens(outcome) == tokens(alone)

    async def test_a_prompt_whose_scores_overflow_is_an_error_and_not_nan(
        self, start: StartAny, reference: Any
    ) -> None:
        engine, policy = await start(), PolicyRef(run="bad", version=0)
        adapter, _ = policy_files(reference, 0)
        for _, b in adapter.weights.values():
            b.mul_(1e30)
        await engine.load_policy(policy, to_peft(adapter, "tiny"))
        asked = [ask(PROMPTS[2], policy=each, prompt_logprobs=True, max_tokens=0) for each in (policy, None)]
        bad, good = await asyncio.gather(*map(engine.generate, asked), return_exceptions=True)
        assert isinstance(bad, PermanentError)
        assert "policy bad@0 gives logits that are not finite" in str(bad)
        assert isinstance(good, SampleResult)

    async def test_logprobs_are_those_of_the_trainer(
        self, start: StartAny, sampler_model: Path, tolerance: float
    ) -> None:
        trainer = TorchTrainerEngine("tiny", sampler_model, device="cpu")
        trainer.create_run("run", LoraSpec(rank=8, seed=1, train_unembed=True))
        prompts = PROMPTS[1:]
        data = [Datum(tokens=Int32s(prompt[:-1]), targets=Int32s(prompt[1:])) for prompt in prompts]
        for _ in range(3):
            trainer.forward_backward([PassItem("run", data, LOSS)])
            trainer.optim_step({"run": AdamParams(learning_rate=0.02)})
        (trained,) = trainer.forward_backward([PassItem("run", data, LOSS, forward_only=True)])
        engine, policy = await start(), PolicyRef(run="run", version=3)
        await engine.load_policy(policy, trainer.export_adapter("run"))
        asked = [ask(prompt, policy=policy, prompt_logprobs=True, max_tokens=0) for prompt in prompts]
        for expected, result in zip(trained.logprobs, await together(engine, asked), strict=True):
            assert result.prompt_logprobs is not None
            assert result.prompt_logprobs[1:].tolist() == pytest.approx(list(expected), abs=tolerance)
