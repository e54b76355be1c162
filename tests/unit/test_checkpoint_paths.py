"""Names of checkpoints: what is one, and what is refused before anybody looks for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.checkpoints import id_of, parse_id, parse_path, path_of
from shared.contracts.checkpoints import CHECKPOINT_NAME, CheckpointKey
from shared.errors import UserError

RUN = "s-1:train:0"
names = st.from_regex(CHECKPOINT_NAME, fullmatch=True)
kinds = st.sampled_from(["training", "sampler", "external"])


@given(run=st.from_regex(r"[A-Za-z0-9:_-]{1,80}", fullmatch=True), kind=kinds, name=names)
def test_a_path_and_an_id_name_their_checkpoint_again(run: str, kind: str, name: str) -> None:
    key = CheckpointKey(run=run, kind=kind, name=name)  # type: ignore[arg-type]
    assert parse_path(path_of(key)) == key
    assert parse_id(run, id_of(key)) == key


def test_paths_are_those_of_the_client() -> None:
    assert path_of(CheckpointKey(run=RUN, kind="training", name="a")) == f"tinker://{RUN}/weights/a"
    assert path_of(CheckpointKey(run=RUN, kind="sampler", name="a")) == f"tinker://{RUN}/sampler_weights/a"
    assert path_of(CheckpointKey(run=RUN, kind="external", name="a")) == f"tinker://{RUN}/external_weights/a"


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("", "no path of a checkpoint"),
        ("/etc/passwd", "no path of a checkpoint"),
        (f"file://{RUN}/weights/a", "no path of a checkpoint"),
        (f"tinker://{RUN}", "no path of a checkpoint"),
        ("tinker:///weights/a", "no path of a checkpoint"),
        (f"tinker://{'r' * 201}/weights/a", "no path of a checkpoint"),
        (f"tinker://{RUN}/weights", "names no checkpoint"),
        (f"tinker://{RUN}/training/a", "names no checkpoint"),
        (f"tinker://{RUN}/../a", "names no checkpoint"),
        (f"tinker://{RUN}/weights/", "no name of a checkpoint"),
        (f"tinker://{RUN}/weights/..", "no name of a checkpoint"),
        (f"tinker://{RUN}/weights/.hidden", "no name of a checkpoint"),
        (f"tinker://{RUN}/weights/../../a", "no name of a checkpoint"),
        (f"tinker://{RUN}/weights/a/b", "no name of a checkpoint"),
        (f"tinker://{RUN}/weights/a\n", "no name of a checkpoint"),
        (f"tinker://{RUN}/weights/a%2fb", "no name of a checkpoint"),
        (f"tinker://{RUN}/weights/é", "no name of a checkpoint"),
        (f"tinker://{RUN}/weights/{'a' * 128}", "no name of a checkpoint"),
    ],
)
def test_what_names_no_checkpoint_is_refused(path: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_path(path)
