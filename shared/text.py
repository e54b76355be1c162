"""Text and tokens: the only module outside of engines that knows tokenizers and chat templates.

`transformers` is imported when a tokenizer is first loaded, so a service that handles no text starts without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from shared.contracts.episodes import Message
from shared.errors import UserError

log = logging.getLogger(__name__)


class Text(Protocol):
    """What services need of a tokenizer."""

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready for the assistant's next turn.

        A conversation that ends with a message of the assistant is left open there, so that the model goes on with it.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""


class ChatTokenizer:
    """A model's tokenizer with its chat template."""

    def __init__(self, directory: str) -> None:
        """`directory` holds the model's files (or is a hub name). Raise `UserError` if there is no usable tokenizer."""
        self._tokenizer = _load(directory)
        if not self._tokenizer.chat_template:
            raise UserError(
                f"the tokenizer in {directory} has no chat template: use an instruction-tuned model, "
                "or add a chat_template to its tokenizer_config.json"
            )

    def render(self, messages: Sequence[Message]) -> list[int]:
        """See `Text.render`."""
        plain = [{"role": message.role, "content": message.content} for message in messages]
        begun = bool(messages) and messages[-1].role == "assistant"
        text: str = self._tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Text.decode`."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    @property
    def decoder(self) -> Callable[[Sequence[int]], str]:
        """`decode` with special tokens kept, for stop strings."""
        return lambda tokens: str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))


@lru_cache(maxsize=32)
def chat_tokenizer(directory: str) -> ChatTokenizer:
    """The tokenizer of a model, loaded once a process."""
    return ChatTokenizer(directory)


def _load(directory: str) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds of import that not every service needs

    if Path(directory).is_dir() and not any(Path(directory).glob("tokenizer*")):
        raise UserError(
            f"{directory} has no tokenizer: put tokenizer.json and tokenizer_config.json beside the weights"
        )
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"the tokenizer in {directory} cannot be loaded: {str(error).splitlines()[0]}") from None
