"""Where samples end.

`stop` names all that ends a sample. Absent it means the model's end-of-sequence tokens; an explicit list means exactly
what is in it, so an empty one means that nothing does. The token that ends a sample is its last one.
"""

from __future__ import annotations

from typing import Any

from tests.engines.sampler_tools import PROMPTS, StartAny, ask, continued, decode, tokens
from tests.engines.tiny import CONTEXT, IM_END


class Ends:
    """Stops, and the room that there is."""

    async def test_a_sample_ends_at_the_models_own_token_unless_told_otherwise(
        self, start: StartAny, reference: Any
    ) -> None:
        engine = await start()
        usual = await engine.generate(ask(PROMPTS[4], num_samples=64, max_tokens=100, seed=1, temperature=2, stop=None))
        endless = await engine.generate(ask(PROMPTS[4], num_samples=64, max_tokens=100, seed=1, temperature=2, stop=[]))
        for with_stop, without in zip(usual.sequences, endless.sequences, strict=True):
            assert len(without.tokens) == 100
            assert without.stop_reason == "length"
            end = without.tokens.index(IM_END) + 1 if IM_END in without.tokens else 100
            assert with_stop.tokens == without.tokens[:end]
            assert with_stop.stop_reason == ("stop" if IM_END in without.tokens else "length")
            assert len(with_stop.logprobs) == end
        assert {s.stop_reason for s in usual.sequences} == {"stop", "length"}

    async def test_a_sample_ends_with_the_first_of_several_stop_ids(self, start: StartAny) -> None:
        engine = await start()
        endless = await engine.generate(ask(PROMPTS[0], temperature=0, max_tokens=30))
        said = tokens(endless)
        some = said[7], said[20]
        stopped = await engine.generate(ask(PROMPTS[0], temperature=0, max_tokens=30, stop=list(some)))
        first = min(said.index(token) for token in some)
        assert tokens(stopped) == said[: first + 1]
        assert stopped.sequences[0].stop_reason == "stop"
        assert len(stopped.sequences[0].logprobs) == first + 1

    async def test_a_sample_may_end_with_its_first_token(self, start: StartAny) -> None:
        engine = await start()
        said = tokens(await engine.generate(ask(PROMPTS[0], temperature=0)))
        stopped = await engine.generate(ask(PROMPTS[0], temperature=0, stop=said[:1]))
        assert tokens(stopped) == said[:1]

    async def test_a_sample_ends_with_the_token_that_completes_a_string(self, start: StartAny) -> None:
        engine = await start(decode=decode)
        letters: dict[str, Any] = {"temperature": 3.0, "max_tokens": 100, "seed": 4, "num_samples": 16}
        endless = await engine.generate(ask(PROMPTS[1], **letters))
        stopped = await engine.generate(ask(PROMPTS[1], **letters, stop=["ab", "\x00", "Q"]))
        for with_stop, without in zip(stopped.sequences, endless.sequences, strict=True):
            text = [decode(without.tokens[:count]) for count in range(101)]
            ends = [count for count in range(101) if any(s in text[count] for s in ("ab", "\x00", "Q"))]
            assert with_stop.tokens == without.tokens[: min(ends, default=100)]
            assert with_stop.stop_reason == ("stop" if ends else "length")
        assert any(s.stop_reason == "stop" for s in stopped.sequences)

    async def test_strings_and_ids_may_be_mixed(self, start: StartAny) -> None:
        engine = await start(decode=decode)
        said = tokens(await engine.generate(ask(PROMPTS[0], temperature=0, max_tokens=30)))
        at = next(at for at in range(5, 30) if said[at] < 128)
        stopped = await engine.generate(ask(PROMPTS[0], temperature=0, max_tokens=30, stop=[chr(said[at]), IM_END]))
        assert tokens(stopped) == said[: said.index(said[at]) + 1]

    async def test_without_max_tokens_a_sample_fills_the_context(self, start: StartAny) -> None:
        engine = await start(max_context=50)
        prompt = PROMPTS[2]
        result = await engine.generate(ask(prompt, max_tokens=None))
        assert len(tokens(result)) == 50 - len(prompt)
        assert result.sequences[0].stop_reason == "length"

    async def test_the_whole_context_can_be_used(self, start: StartAny, reference: Any) -> None:
        engine = await start()
        prompt = [at % 250 for at in range(CONTEXT - 3)]
        result = await engine.generate(ask(prompt, max_tokens=3, temperature=0))
        assert tokens(result) == continued(reference, prompt, 3)

    async def test_a_string_is_one_stop_and_not_its_characters(self, start: StartAny) -> None:
        engine = await start(decode=decode)
        letters: dict[str, Any] = {"temperature": 3.0, "max_tokens": 60, "seed": 4, "num_samples": 8}
        one = await engine.generate(ask(PROMPTS[1], **letters, stop="ab"))
        listed = await engine.generate(ask(PROMPTS[1], **letters, stop=["ab"]))
        assert [s.tokens for s in one.sequences] == [s.tokens for s in listed.sequences]
        assert any(ord("a") in s.tokens[:-1] for s in one.sequences)

    async def test_an_explicit_list_leaves_out_the_models_own_end(self, start: StartAny) -> None:
        engine = await start()
        wild: dict[str, Any] = {"num_samples": 64, "max_tokens": 100, "seed": 1, "temperature": 2}
        listed = await engine.generate(ask(PROMPTS[4], **wild, stop=[7]))
        both = await engine.generate(ask(PROMPTS[4], **wild, stop=[7, IM_END]))
        assert any(IM_END in s.tokens for s in listed.sequences), "it is a token like any other"
        for one, other in zip(listed.sequences, both.sequences, strict=True):
            ends = [at + 1 for at, token in enumerate(one.tokens) if token in (7, IM_END)]
            end = min(ends, default=len(one.tokens))
            assert other.tokens == one.tokens[:end]
            assert other.stop_reason == ("stop" if ends else "length")
