"""What a scope reads: the words that were said last, in the context of all that stands before."""

import pytest
import torch

from baft.hosts.early import early_features
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.nn.scope import ScopeHead
from baft.scope.reading import LAST, Reader, padded
from baft.scope.scope import Scope
from baft.types import Edit
from tiny import CHATML, tiny_host, tiny_tokenizer


class Untrained(ScopeHead):
    """Two channels, and an edit acts everywhere."""

    fingerprint, n_dims = 1, 6

    def thresholds(self, keys):
        return keys.weights.new_full(keys.weights.shape[1:2], -1e9)


@pytest.fixture(scope="module")
def reader():
    host = Host(
        "tiny", tiny_host("llama", max_position_embeddings=512), tiny_tokenizer(chat_template=CHATML), "tiny"
    )
    return Reader(host, Encoder.for_host(host))


def states(reader, row):
    return early_features(reader.host, reader.encoder, [row], [slice(len(row))])[0]


def test_words_are_those_of_the_last_turn_at_the_end_of_a_long_text(reader):
    encode = reader.encoder
    turns = [("user", "First"), ("assistant", "Yes"), ("user", "Who?")]
    chat = encode.chat([{"role": role, "content": text} for role, text in turns])
    raw, long = encode.prompt("Who?"), encode.prompt("x" * 3 * LAST)
    of_raw, of_chat, of_long = reader.words([raw, chat, long])
    torch.testing.assert_close(of_raw, states(reader, raw)[-4:])
    tail = len(encode.inner("<|im_end|>\n<|im_start|>assistant\n"))
    torch.testing.assert_close(of_chat, states(reader, chat)[-4 - tail : -tail])
    torch.testing.assert_close(of_long, states(reader, long)[-LAST:])
    assert not torch.allclose(of_chat, of_raw)  # what stands before has its say


def test_texts_of_unequal_length_are_padded():
    texts = [torch.ones(2, 3, dtype=torch.float64), torch.full((4, 3), 2.0, dtype=torch.float64)]
    features, real = padded(texts)
    assert real.tolist() == [[True, True, False, False], [True] * 4]
    assert features.dtype == torch.float32
    assert features.sum(-1).tolist() == [[3.0, 3.0, 0.0, 0.0], [6.0] * 4]


def test_names_are_those_of_the_last_turn(reader):
    encoder = reader.encoder
    turns = [("user", "Who is Bob?"), ("assistant", "Yes"), ("user", "Where was Ada Lovelace?")]
    chat = encoder.chat([{"role": role, "content": text} for role, text in turns])
    rows = [chat, encoder.prompt("Ada x"), encoder.prompt("b" * 3 * LAST + " Ada")]
    scope = Scope(reader, Untrained(128, n_dims=6, n_hidden=4).requires_grad_(False))
    asked = scope.read(rows)
    assert asked.names(0).words == ("where", "was", "ada", "lovelace")
    assert asked.names(1).words == ("ada", "x")
    assert asked.names(2).words[-1] == "ada"
    assert len("".join(asked.names(2).words)) == LAST - 1  # without the space
    for i, row in enumerate(rows):  # whatever else is read beside it
        alone = scope.read([row]).names(0)
        assert asked.names(i).words == alone.words
        assert asked.names(i).weights == pytest.approx(alone.weights, abs=1e-5)
    assert max(asked.names(0).weights) > 0


def test_the_names_of_an_edit_are_its_own(reader):
    scope = Scope(reader, Untrained(128, n_dims=6, n_hidden=4).requires_grad_(False))
    edits = [
        Edit("The mother of Ada is", "x", rephrasings=("Ada's mother is",)),
        Edit("Zoë", "y"),
        Edit("Bob Hope lives in", "z"),
    ]
    together = [one.names() for one in scope.keys(edits)]
    alone = [scope.keys([edit])[0].names() for edit in edits]
    assert [[wording.words for wording in one] for one in together] == [
        [("the", "mother", "of", "ada", "is"), ("ada", "s", "mother", "is")],
        [("zoe",)],
        [("bob", "hope", "lives", "in")],
    ]
    for mine, same in zip(together, alone, strict=True):
        for wording, other in zip(mine, same, strict=True):
            assert wording.words == other.words
            assert wording.weights == pytest.approx(other.weights, abs=1e-5)
            assert max(wording.weights) > 0
