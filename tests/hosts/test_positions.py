import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baft.errors import ConfigError, InputError
from baft.hosts.positions import PositionSpec, Window


def edited_by_hand(real, n_prompt, has_bos, spec):
    """The rule, token by token: the last 3 real prompt tokens but BOS, and every output token."""
    tokens = [i for i, is_real in enumerate(real) if is_real]
    bos = tokens[:1] if has_bos else []
    if n_prompt is None:
        edited = [i for i in tokens if i not in bos]
    else:
        prompt, outputs = tokens[:n_prompt], tokens[n_prompt:]
        last = prompt[len(prompt) - min(spec.last_prompt, len(prompt)) :]
        edited = [i for i in last if i not in bos] + (
            [i for i in outputs if i not in bos] if spec.outputs else []
        )
    return [i in edited for i in range(len(real))]


@st.composite
def situations(draw):
    n_rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    side = draw(st.sampled_from(["left", "right"]))
    lengths = [draw(st.integers(1, width)) for _ in range(n_rows)]
    real = [[(width - 1 - i if side == "left" else i) < n for i in range(width)] for n in lengths]
    n_prompt = draw(st.none() | st.just([draw(st.integers(0, n)) for n in lengths]))
    last = draw(st.integers(0, 4))
    spec = PositionSpec(last, True if last == 0 else draw(st.booleans()))
    return real, n_prompt, [draw(st.booleans()) for _ in lengths], spec


def window_of(real, n_prompt, bos, spec):
    return Window(
        spec,
        torch.tensor(real),
        n_prompt_tokens=None if n_prompt is None else torch.tensor(n_prompt),
        starts_with_bos=torch.tensor(bos),
    )


@given(situations(), st.integers(0, 12), st.integers(1, 12), st.integers(1, 3))
def test_a_window_is_the_rule(situation, start, length, n_beams):
    real, n_prompt, bos, spec = situation
    prompts = n_prompt or [None] * len(real)
    known = [edited_by_hand(*row, spec) for row in zip(real, prompts, bos, strict=True)]
    new = spec.outputs or n_prompt is None
    want = [(row + [new] * 30)[start : start + length] for row in known for _ in range(n_beams)]
    window = window_of(real, n_prompt, bos, spec)
    shown = window.shown(start, length, len(real) * n_beams)
    assert shown.mask.tolist() == want
    flat = [is_edited for row in want for is_edited in row]
    assert (shown.any, shown.all) == (any(flat), all(flat))


def test_the_paper_s_rule_in_numbers():
    window = window_of([[True] * 7, [False] * 2 + [True] * 5], [5, 4], [True, True], PositionSpec())
    assert window.edited.int().tolist() == [[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    # Controls: a prompt's end or a BOS elsewhere is another window.
    other = window_of([[True] * 7, [False] * 2 + [True] * 5], [6, 3], [True, False], PositionSpec())
    assert other.edited.int().tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]


def test_rows_that_do_not_fit_are_refused():
    window = window_of([[True] * 3] * 2, [1, 1], [False, False], PositionSpec())
    with pytest.raises(InputError, match="3 rows for 2 prompts"):
        window.shown(0, 3, 3)
    with pytest.raises(InputError, match="does not fit"):
        window_of([[True, True, False]], [3], [False], PositionSpec())
    with pytest.raises(InputError, match="does not fit"):
        window_of([[True, True]], [-1], [False], PositionSpec())


@pytest.mark.parametrize(("last_prompt", "outputs"), [(-1, True), (0, False)])
def test_a_rule_that_names_no_token_is_refused(last_prompt, outputs):
    with pytest.raises(ConfigError, match="at least one token"):
        PositionSpec(last_prompt, outputs)
    assert PositionSpec(0, True).outputs
