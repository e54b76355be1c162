"""Measures an adapter with nothing but transformers and peft, on the held-out tasks of a job file.

    python examples/check_adapter.py MODEL_DIRECTORY ADAPTER_DIRECTORY [JOB_FILE]

Prints the share of replies that are exactly the answer, drawn greedily. It should be what the mesh reported.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.environment.registry import Registry
from shared.contracts.episodes import EnvironmentSpec, Message


def rendered(tokenizer: Any, messages: list[Message]) -> str:
    begun = messages[-1].role == "assistant"
    plain = [{"role": message.role, "content": message.content} for message in messages]
    text: str = tokenizer.apply_chat_template(
        plain, tokenize=False, continue_final_message=begun, add_generation_prompt=not begun
    )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("job", type=Path, nargs="?", default=Path(__file__).with_name("demo.json"))
    parser.add_argument("--tasks", type=int, help="how many; default: as many as the job evaluates")
    arguments = parser.parse_args()
    job = json.loads(arguments.job.read_text())
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, arguments.adapter).eval()

    environment = Registry.load([]).make(EnvironmentSpec(**job["environment"]))
    count = arguments.tasks or job["evaluation"]["tasks"]
    tasks = [environment.task("held_out", index, seed=job["seed"]) for index in range(count)]
    prompts = [rendered(tokenizer, environment.start(task)) for task in tasks]
    right = 0
    for start in range(0, count, 32):
        batch = tokenizer(prompts[start : start + 32], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=job["sampling"]["max_tokens"], do_sample=False)
        replies = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(
            reply.strip() == task.answer for reply, task in zip(replies, tasks[start : start + 32], strict=True)
        )
    print(f"held-out accuracy by plain peft: {right / count:.3f} ({count} tasks)")


if __name__ == "__main__":
    main()
