"""What a scope reads: the words that were said last, in the context of all that stands before."""

import pytest
import torch

from baft.hosts.early import early_features
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.scope.reading import LAST, Reader, padded
from tiny import CHATML, tiny_host, tiny_tokenizer


@pytest.fixture(scope="module")
def reader():
    host = Host(
        "tiny", tiny_host("llama", max_position_embeddings=512), tiny_tokenizer(chat_template=CHATML), "tiny"
    )
    return Reader(host, Encoder.for_host(host))


def states(reader, row):
    features, _ = early_features(reader.host, reader.encoder, [row])
    return features[0]


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
