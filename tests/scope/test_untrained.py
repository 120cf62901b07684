"""Scope without a head: words, the rare ones counting more."""

import pytest
import torch

from baft.errors import InputError
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.scope.index import ScopeIndex
from baft.scope.reading import Reader
from baft.scope.scope import Scope, scope_of
from baft.scope.untrained import UntrainedHead, untrained_head
from baft.types import Edit
from tiny import CHATML, tiny_host, tiny_tokenizer


@pytest.fixture(scope="module")
def host():
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    return Host("tiny", tiny_host("llama", max_position_embeddings=512), tokenizer, "tiny")


@pytest.fixture(scope="module")
def scope(host):
    return scope_of(host, Encoder.for_host(host))


def test_embeddings_are_whitened_and_rare_ones_weigh_more():
    torch.manual_seed(0)
    table = torch.randn(3, 6, dtype=torch.float64)
    often = torch.tensor([0] * 400 + [1] * 300 + [2] * 3)
    noise = 0.05 * torch.randn(len(often), 6, dtype=torch.float64)
    head = UntrainedHead.fit(table[often] + noise)
    covariance = torch.cov((table[often] + noise).T, correction=0)
    shrunk = 0.9 * covariance + 0.1 * covariance.diag().diag()
    torch.testing.assert_close(
        head.whitening @ shrunk @ head.whitening.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9
    )
    features = torch.cat([table, torch.full((3, 2), 7.0, dtype=torch.float64)], 1)[
        None
    ]  # the rest is not read
    keys = head.keys(features, torch.ones(1, 3, dtype=torch.bool))
    assert keys.weights.sum().item() == pytest.approx(1.0)
    assert keys.weights[0, 0].argmax() == 2
    torch.testing.assert_close(head.vectors(features).norm(dim=-1), torch.ones(1, 1, 3, dtype=torch.float64))


def test_a_prompt_is_about_an_edit_that_it_repeats(scope):
    assert not scope.is_trained
    edit = Edit("Nine hats of", "Co", rephrasings=("zqx",))
    [keys] = scope.keys([edit])
    index = ScopeIndex(scope.head, [keys])
    encode = scope.reader.encoder
    chat = encode.chat(
        [
            {"role": "user", "content": "A"},
            {"role": "assistant", "content": "B"},
            {"role": "user", "content": edit.prompt},
        ]
    )
    rows = [encode.prompt(edit.prompt), encode.prompt("zqx"), encode.prompt("..."), chat]
    assert index.find(scope.read(rows)).tolist() == [0, 0, -1, 0]
    earlier = encode.chat(
        [
            {"role": "user", "content": edit.prompt},
            {"role": "assistant", "content": "B"},
            {"role": "user", "content": "..."},
        ]
    )
    assert index.find(scope.read([earlier])).tolist() == [-1]  # the last user turn is what is asked
    with pytest.raises(InputError, match="'zqx' shall stay as it is, and is so near to 'zqx'"):
        scope.keys([edit], unrelated=["zqx"])
    [strict] = scope.keys([Edit(edit.prompt, "Co")], unrelated=["zqx"])
    assert ScopeIndex(scope.head, [strict]).find(scope.read(rows)).tolist() == [0, -1, -1, 0]


def test_an_edit_that_says_its_subject_acts_only_where_that_is_said(scope, monkeypatch):
    monkeypatch.setattr("baft.scope.untrained._MIDPOINT", 0.0)
    prompts = ["What did Zelda like", "What did Hugo like", "Zelda liked", "what did zeldA like"]
    asked = scope.read([scope.reader.encoder.prompt(one) for one in prompts])
    without, with_it, elsewhere = scope.keys(
        [
            Edit(prompts[0], "Co"),
            Edit(prompts[0], "Co", subject="Zelda"),
            Edit(prompts[0], "Co", subject="Link"),  # of which the prompt says nothing
        ]
    )
    found = [ScopeIndex(scope.head, [one]).find(asked).tolist() for one in (without, with_it, elsewhere)]
    assert found == [[0, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 0]]
    near = ["What did A's Zelda like", "What did Z. Zel like", "What did z's a like", "Zelda Fitz liked"]
    asked = scope.read([scope.reader.encoder.prompt(one) for one in near])
    [double] = scope.keys([Edit("What did Zelda Sayre like", "Co", subject="Zelda Sayre")])
    assert ScopeIndex(scope.head, [with_it]).find(asked).tolist() == [0, 0, 0, 0]
    assert ScopeIndex(scope.head, [double]).find(asked).tolist() == [-1, -1, -1, -1]
    as_another = scope.keys([Edit(near[1], "Al", subject="Hugo"), Edit(near[3], "Al", subject="Zelda")])
    assert ScopeIndex(scope.head, [with_it]).acts_on(ScopeIndex(scope.head, as_another)).all()
    both = ScopeIndex(scope.head, scope.keys([Edit(prompts[1], "Al", subject="Hugo")]))
    zelda = ScopeIndex(scope.head, [with_it])
    assert not zelda.acts_on(both).any()
    assert not both.acts_on(zelda).any()
    assert ScopeIndex(scope.head, [without]).acts_on(both).all()


def test_an_edit_made_before_says_what_its_neighbors_do_to_it(scope, caplog):
    edit = Edit("Nine hats of", "Co", rephrasings=("zqx",), neighbors=("zqx",))
    with pytest.raises(InputError, match="near to 'zqx' that the edit would not act on this rephrasing"):
        scope.keys([edit])
    [strict] = scope.keys([edit], made=True)
    assert "would not act on this rephrasing" in caplog.text
    assert "or an earlier baft, made it so" in caplog.text
    asked = scope.read([scope.reader.encoder.prompt(one) for one in (edit.prompt, "zqx")])
    assert ScopeIndex(scope.head, [strict]).find(asked).tolist() == [0, -1]
    caplog.clear()
    assert scope.separable(edit, ["..."]) == ()
    assert "'Nine hats of' keeps its scope: 'zqx' shall stay as it is" in caplog.text
    assert scope.separable(Edit(edit.prompt, "Co"), ["...", edit.prompt, "zqx"]) == ("...", "zqx")


def test_it_is_made_once_for_a_host(host, scope, monkeypatch):
    monkeypatch.setattr("baft.scope.scope.untrained_head", None)
    assert scope_of(host, Encoder.for_host(host)).head is scope.head
    made = untrained_head(Reader(host, Encoder.for_host(host)))
    assert torch.equal(made.whitening, scope.head.whitening)
    assert Scope(scope.reader, made).is_trained is False
