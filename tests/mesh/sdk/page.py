"""docs/tinker-compatibility.md, made of what the tests of this package declare.

`python -m tests.mesh.sdk.page` writes it anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import tinker
from tinker.types import ClientConfigResponse

from tests.mesh.sdk import declared
from tests.mesh.sdk.flags import DYNAMIC, FLAGS, LIMITS

DOCUMENT = Path(__file__).parents[3] / "docs" / "tinker-compatibility.md"
COMMAND = "python -m tests.mesh.sdk.page"

HEAD = """# Compatibility with the Tinker SDK
<!-- Written by `{command}` from what the tests in tests/mesh/sdk declare. -->

All {count} public methods of the clients of `tinker` {version}, unmodified, as tests call them against a real mesh: a
gateway, a trainer, a sampler and a coordinator over NATS, with a tiny Llama. A test fails unless it calls every method
that it stands for here; each is judged by the meaning of its answers, mostly against the same model in transformers.

`python -m pytest tests/mesh/sdk` runs them. What the look-ups mean in detail is in [looking-up.md](looking-up.md), the
losses in [losses.md](losses.md), sampling in [sampling.md](sampling.md)."""


def page() -> str:
    """The whole document."""
    declared.load_all()
    methods = declared.methods_of_the_sdk()
    parts = [HEAD.format(command=COMMAND, count=len(methods), version=tinker.__version__)]
    parts += [_client(name, [each for each in methods if each.startswith(f"{name}.")]) for name in declared.CLIENTS]
    parts.append(f"## Differences\n{_table(('what', 'here'), sorted(_differences()))}")
    parts.append(_flags())
    parts.append(f"## Limits\n{_table(('of', ''), LIMITS)}")
    return "\n\n".join(parts) + "\n"


def untested() -> list[str]:
    """Public methods of the SDK that no test stands for."""
    declared.load_all()
    shown = {method for meaning in declared.MEANINGS for method in meaning.methods}
    return [method for method in declared.methods_of_the_sdk() if method not in shown]


def _client(client: str, methods: Sequence[str]) -> str:
    rows: dict[tuple[str, ...], list[str]] = {}
    for method in methods:
        checked = tuple(meaning.what for meaning in declared.MEANINGS if method in meaning.methods)
        rows.setdefault(checked, []).append(method.removeprefix(f"{client}."))
    table = [(", ".join(f"`{name}`" for name in names), _checked(checked)) for checked, names in rows.items()]
    return f"## {client}: {len(methods)} methods\n{_table(('method', 'what is checked'), table)}"


def _checked(meanings: Sequence[str]) -> str:
    if len(meanings) < 2:
        return "".join(meanings) or "**not tested**"
    return "<br>".join(f"• {meaning}" for meaning in meanings)


def _differences() -> Iterable[tuple[str, str]]:
    return {(each.subject, each.how) for each in declared.DIFFERENCES}


def _flags() -> str:
    set_here = [(f"`{name}`", _value(value), why) for name, (value, why) in (FLAGS | DYNAMIC).items()]
    left = [name for name in ClientConfigResponse.model_fields if name not in FLAGS]
    return (
        f"## Flags\n{_table(('flag', 'our choice', 'why'), set_here)}\n\n"
        f"Left at the client's defaults: {', '.join(f'`{name}`' for name in left)}."
    )


def _value(value: object) -> str:
    return str(value).lower()


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows])


if __name__ == "__main__":
    DOCUMENT.write_text(page())
