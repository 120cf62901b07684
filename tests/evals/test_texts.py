"""Running text under edits: losses, changes where none should be, fluency."""

import math

import pytest
import torch

from baft.errors import ConfigError, InputError
from baft.evals.metrics import ngram_entropy
from baft.evals.texts import FalseFires, TextLoss, _windows, false_fires, fluency, perplexity, text_loss
from baft.hosts.architecture import Site
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.hosts.speaking import Speaker
from rules import Ruled, follows, prefers
from tiny import EOS_ID, half_open_part, open_part, shut_part, states_at, tiny_tokenizer

TEXTS = ("The king of France was old.", "Rome", "Rain fell all night, and the match was moved to Thursday.")


def edit(host, part):
    return EditedModel(host.model, {Site(1): [part]})


def slow_losses(host, text, window):
    """Every token from its own call: the window that a token is first seen in, worked out by hand."""
    ids, found, begin = list(host.tokenizer(text)["input_ids"]), [], 0
    for i in range(1, len(ids)):
        while i >= begin + window:
            begin = min(begin + window // 2, len(ids) - window)
        logits = host.model(torch.tensor([ids[begin:i]])).logits[0, -1]
        found.append(-logits.log_softmax(-1)[ids[i]].item())
    return found


@pytest.mark.parametrize("window", [160, 10, 11, 2])
def test_every_token_is_predicted_once(host, window):
    plain = EditedModel(host.model)
    loss = text_loss(host, plain, TEXTS, window=window)
    expected = [slow_losses(host, text, window) for text in TEXTS]
    assert loss.n_tokens == tuple(len(one) for one in expected)
    assert loss.nll == pytest.approx([math.fsum(one) for one in expected], abs=1e-9)
    other = text_loss(host, plain, TEXTS[::-1], window=window, batch_size=1)
    assert other.nll[::-1] == pytest.approx(loss.nll, abs=1e-9)


def test_perplexity(host):
    assert TextLoss((1.0, 2.0), (1, 2)).perplexity == pytest.approx(math.e)
    plain, edited = EditedModel(host.model), edit(host, open_part())
    whole = [x for text in TEXTS for x in slow_losses(host, text, 160)]
    assert perplexity(host, plain, TEXTS) == pytest.approx(math.exp(math.fsum(whole) / len(whole)))
    assert perplexity(host, edited, TEXTS) != pytest.approx(perplexity(host, plain, TEXTS))
    long = "a" * 400  # longer than the context
    assert text_loss(host, plain, [long]).n_tokens == (400,)


def test_windows_overlap_by_half():
    row = tuple(range(11))
    assert list(_windows(row, 12)) == list(_windows(row, 11)) == [(row, 1)]
    assert list(_windows(row, 4)) == [
        ((0, 1, 2, 3), 1),
        ((2, 3, 4, 5), 2),
        ((4, 5, 6, 7), 2),
        ((6, 7, 8, 9), 2),
        ((7, 8, 9, 10), 3),
    ]


def test_all_text_but_the_first_token_counts_as_output(host):
    edited = edit(host, open_part())
    ids = torch.tensor([Encoder.for_host(host).prompt(TEXTS[0])])
    # Called without the prompt's end, every token but BOS is edited: the same thing.
    logprobs = edited(ids).logits[0, :-1].log_softmax(-1)
    expected = -logprobs.gather(-1, ids[0, 1:].unsqueeze(-1)).sum().item()
    assert text_loss(host, edited, TEXTS[:1]).nll[0] == pytest.approx(expected, abs=1e-9)
    plain = text_loss(host, EditedModel(host.model), TEXTS[:1]).nll[0]
    assert plain != pytest.approx(expected, abs=1e-3)  # control


def test_false_fires(host):
    n_tokens = tuple(len(host.tokenizer(text)["input_ids"]) - 1 for text in TEXTS)
    for part, n_changed in ((shut_part(), (0, 0, 0)), (open_part(), n_tokens)):
        fires = false_fires(host, edit(host, part), TEXTS, batch_size=2)
        assert (fires.n_changed, fires.n_fired, fires.n_tokens) == (n_changed, n_changed, n_tokens)
    assert false_fires(host, EditedModel(host.model), TEXTS).n_fired == (0, 0, 0)
    part = half_open_part(host.model, Site(1), seed=1)
    seen = false_fires(host, edit(host, part), TEXTS)
    for i, text in enumerate(TEXTS):
        ids = torch.tensor([host.tokenizer(text)["input_ids"]])
        changed = (edit(host, part)(ids).logits != host.model(ids).logits).any(-1)
        assert seen.n_changed[i] == int(changed.sum())
        states = states_at(host.model, Site(1), ids)[1:]  # but for BOS
        assert seen.n_fired[i] == int((part.gate.weights(states) > 0).any(-1).any(-1).sum())
    assert sum(seen.n_fired) < sum(seen.n_changed)  # what comes after a token that fired changes too
    assert 0 < sum(seen.n_changed) < sum(n_tokens)  # control: the gate shuts on some
    short = false_fires(host, edit(host, open_part()), TEXTS, n_tokens=5)
    assert short.n_changed == short.n_tokens == (4, n_tokens[1], 4)


def test_shares():
    fires = FalseFires((0, 3, 0, 1), (0, 2, 0, 0), (10, 10, 10, 10))
    assert (fires.changed_tokens, fires.fired_tokens) == (0.1, 0.05)
    assert (fires.changed_texts, fires.fired_texts) == (0.5, 0.25)


def test_fluency(host):
    plain = EditedModel(host.model)
    found = fluency(host, plain, ["A", "The king of", "Bees"], n_tokens=12, batch_size=2)
    assert found == fluency(host, plain, ["A", "The king of", "Bees"], n_tokens=12)  # no draw in it
    encoder = Encoder.for_host(host)
    ids = list(encoder.prompt("The king of"))
    for _ in range(12):
        logits = host.model(torch.tensor([ids])).logits[0, -1]
        logits[[EOS_ID, encoder.end_of_turn(chat=True)]] = -torch.inf
        ids.append(int(logits.argmax()))
    assert found[1] == ngram_entropy(encoder.text(ids[len(encoder.prompt("The king of")) :]))


def test_a_model_that_would_end_at_once_goes_on(host):
    said = "a b\tc\nd"
    ids = host.tokenizer(f"x{said}", add_special_tokens=False)["input_ids"]
    ends, goes_on = prefers(EOS_ID, by=1e9), follows(ids, by=1e6)
    model = Ruled(host.model, lambda ids, logits: ends(ids, goes_on(ids, logits)))
    assert fluency(host, model, ["x"], n_tokens=len(said)) == (ngram_entropy(said),)
    assert ngram_entropy(said) > 0
    speaker = Speaker(host)
    assert speaker.replies(model, speaker.rows("x", None), 7) == [[EOS_ID]]  # control


def test_what_is_refused(host):
    plain = EditedModel(host.model)
    for measure in (text_loss, false_fires):
        with pytest.raises(InputError, match="the list is empty"):
            measure(host, plain, [])
    bare = Host("bare", host.model, tiny_tokenizer(adds_bos=False), "bare")
    with pytest.raises(InputError, match="'R' is a single token, of which nothing can be predicted"):
        text_loss(bare, plain, ["R"])
    with pytest.raises(ConfigError, match="at least 2 tokens, got 1"):
        text_loss(host, plain, TEXTS, window=1)
    with pytest.raises(ConfigError, match="at least 2 tokens, got n_tokens=1"):
        false_fires(host, plain, TEXTS, n_tokens=1)
    with pytest.raises(InputError, match="a prompt of 2 tokens and 159 new ones exceed this host's context"):
        fluency(host, plain, ["A"], n_tokens=159)
