"""vLLM's worker with two things of ours: it scores prompts as requests mean it, and it ends with the sampler.

vLLM's own scores of a prompt know neither targets nor the last positions only, make the logits of a whole prompt at
once, and leave out that a policy may adapt the unembedding: vLLM maps adapters to as many rows as sequences are
sampled, and these are rows of a prompt. `PromptScorer` stands in for that one method of the model runner.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import psutil
import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.outputs import LogprobsTensors

from services.sampler.engines.drawing import likeliest, total_logprob
from services.sampler.engines.scoring import LOGITS_AT_ONCE
from services.sampler.engines.vllm_wire import scoring_of

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

SCORER = "_get_prompt_logprobs_dict"
"""The method of vLLM's model runner that is replaced. Its contract is the same in vLLM 0.24 and 0.32."""
LOOK_SECONDS = 1.0


class SamplerWorker(PlatformWorker):  # type: ignore[misc]  # vLLM is in an environment of its own
    """The worker of the platform that vLLM was built for."""

    def init_device(self) -> None:
        """As vLLM's, which makes the model runner."""
        end_with(self.vllm_config.additional_config["sampler_pid"])
        super().init_device()
        if not callable(getattr(self.model_runner, SCORER, None)):
            raise RuntimeError(f"this vLLM has no {SCORER}: the sampler is written for 0.24 to 0.32")
        setattr(self.model_runner, SCORER, PromptScorer(self.model_runner))


def end_with(sampler: int) -> None:
    """End this process soon after the process `sampler` has: one that was killed cannot end its children."""

    def watch() -> None:
        while psutil.pid_exists(sampler):
            time.sleep(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end with the sampler", daemon=True).start()


class PromptScorer:
    """Computes what `vllm_wire.Columns` lists, at the positions of prompts that a step has computed."""

    def __init__(self, runner: Any) -> None:
        """`runner` is vLLM's `GPUModelRunner`, or the one for CPUs, which is made from it."""
        self._runner = runner

    def __call__(self, hidden: Tensor, scheduled: dict[str, int]) -> dict[str, LogprobsTensors]:
        """Score `hidden` [tokens of the step, hidden]; return the prompts that are complete."""
        runner, complete = self._runner, {}
        for request in [request for request in runner.num_prompt_logprobs if request in scheduled]:
            state, count = runner.requests[request], scheduled[request]
            scores = self._scores(state, runner.num_prompt_logprobs[request])
            first, length = state.num_computed_tokens, len(state.prompt_token_ids)
            rows = runner.query_start_loc.np[runner.input_batch.req_id_to_index[request]].item()
            self._score(state, scores, first, hidden[rows : rows + min(count, length - 1 - first)])
            if first + count >= length:
                complete[request] = scores
                state.in_progress_prompt_logprobs_cpu = None
                del runner.num_prompt_logprobs[request]
        if complete:
            runner._sync_device()  # noqa: SLF001 - as the method that this one stands in for
        return complete

    @staticmethod
    def _scores(state: Any, columns: int) -> LogprobsTensors:
        if state.in_progress_prompt_logprobs_cpu is None:
            tensors = LogprobsTensors.empty_cpu(len(state.prompt_token_ids) - 1, columns + 1)
            for tensor in (tensors.logprob_token_ids, tensors.logprobs, tensors.selected_token_ranks):
                tensor.zero_()
            state.in_progress_prompt_logprobs_cpu = tensors
        return state.in_progress_prompt_logprobs_cpu

    def _score(self, state: Any, scores: LogprobsTensors, first: int, hidden: Tensor) -> None:
        """Fill in what `hidden`, at the positions from `first` on, says about the position after each."""
        wanted = scoring_of(state.sampling_params.extra_args)
        if wanted is None:
            return
        size = max(1, min(LOGITS_AT_ONCE // self._runner.input_batch.vocab_size, self._runner.max_num_reqs))
        for start in range(max(first, wanted["first"] - 1), first + len(hidden), size):
            rows = hidden[start - first : start - first + size]
            place = slice(start, start + len(rows))
            ids, logprobs = _columns(self._logits(state, rows), state.prompt_token_ids, wanted, start)
            scores.logprob_token_ids[place].copy_(ids, non_blocking=True)
            scores.logprobs[place].copy_(logprobs, non_blocking=True)

    def _logits(self, state: Any, hidden: Tensor) -> Tensor:
        """Logits [n, V] of rows of one prompt, with its policy: vLLM is told that all of them are to be sampled."""
        lora = state.lora_request
        mapping = (lora.lora_int_id if lora is not None else 0,) * len(hidden)
        # The next step sets its own mapping before it computes anything.
        self._runner._set_active_loras(mapping, mapping, set() if lora is None else {lora})  # noqa: SLF001
        logits: Tensor = self._runner.model.compute_logits(hidden)
        return logits.float()


def _columns(logits: Tensor, prompt: list[int], wanted: Any, start: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [n, columns] from logits [n, V] at the positions from `start` on."""
    own = torch.tensor(prompt[start + 1 : start + 1 + len(logits)], device=logits.device)[:, None]
    width = wanted["targets"]
    given = wanted["target_ids"][start * width : (start + len(logits)) * width]
    targets = torch.tensor(given, dtype=torch.int64, device=logits.device).view(len(logits), width)
    named = torch.cat([own, targets.clamp(min=0)], 1)
    found = logits.gather(1, named) - total_logprob(logits)[:, None]
    if wanted["top"]:
        ids, best = likeliest(logits, wanted["top"])
        named, found = torch.cat([named, ids], 1), torch.cat([found, best], 1)
    return named.int(), found
