"""What the cookbook's recipes look for on a model hub, as directories in which they find it without one.

`transformers` and `datasets` take a name such as `openai/gsm8k` for a directory if there is one, relative to where the
program runs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

MODEL = "Qwen/Qwen3-4B-Instruct-2507"
"""Recipes take only names of the cookbook's own table; the mesh serves another model under this one. Its chat format is
ChatML, as SmolLM2's."""

_GSM8K_CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
---
"""


def make(place: Path, model_dir: Path) -> None:
    """Fill a directory for recipes to run in: a tokenizer under the model's name, and two small data sets."""
    tokenizer = place / MODEL
    tokenizer.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(model_dir / name, tokenizer)
    sums = [(a, b) for a in range(1, 9) for b in range(1, 9)]
    problems = [{"question": f"What is {a}+{b}?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"} for a, b in sums]
    _write(place / "openai/gsm8k/main/train.jsonl", problems)
    _write(place / "openai/gsm8k/main/test.jsonl", problems[:8])
    (place / "openai/gsm8k/README.md").write_text(_GSM8K_CARD)
    chats = [_chat(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a, b in sums]
    _write(place / "HuggingFaceH4/no_robots/data/train.jsonl", chats)


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
