"""The published protocol, against a slow implementation written from its description."""

import json

import pytest
import torch

import baft
from baft.evals.teacher_forced import N_COMPARED, Forced, published_span, read_spans
from baft.hosts.edited_model import EditedModel
from baft.hosts.models import Host
from baft.hosts.speaking import Speaker
from references.teacher_forced import answer_logprobs, forced_predictions, token_accuracy
from tiny import BOS_ID, EOS_ID, some_interventions, tiny_host, tiny_tokenizer

TEXTS = (
    ("The tower is in the city of", "Rome"),
    ("Who?", "A man of Rome, I think"),
    ("of", "of"),
    ("Ends in a space ", " begins with one"),
    ("Zwölf Boxkämpfer", "東京"),
)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral", "qwen3"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_equals_one_text_at_a_time(host_of, family, adds_bos):
    model, tokenizer = host_of(family).model, tiny_tokenizer(adds_bos=adds_bos)
    speaker = Speaker(Host(family, model, tokenizer, family))
    edited = EditedModel(model, some_interventions(model))
    spans = {text: published_span(speaker.encoder, *text) for text in TEXTS}
    moved = 0
    for asked in (EditedModel(model), edited):
        found = read_spans(asked, speaker, spans.values(), batch_size=3)
        for (prompt, target), span in spans.items():
            end = {"n_prompt_tokens": torch.tensor([len(tokenizer(prompt)["input_ids"])])}
            predicted, answer = forced_predictions(asked, tokenizer, prompt, target, **end)
            assert list(found[span].predicted) == predicted
            assert list(found[span].answer) == answer
            assert found[span].accuracy == token_accuracy(predicted, answer)
            expected = answer_logprobs(asked, tokenizer, prompt, target, **end)
            assert found[span].logprobs == pytest.approx(expected, rel=0, abs=1e-9)
            moved += predicted != forced_predictions(model, tokenizer, prompt, target)[0]
    assert moved > 0  # control: the edits matter, so their positions do


def test_the_span_is_the_published_one():
    def span(prompt, target, **settings):
        speaker = Speaker(Host("t", tiny_host(), tiny_tokenizer(**settings), "t"))
        return speaker.encoder.tokenizer, published_span(speaker.encoder, prompt, target)

    tokenizer, found = span("A", "Rome")
    assert found.ids == tuple(tokenizer("A Rome")["input_ids"])
    assert (found.ids[0], found.n_prompt_tokens) == (BOS_ID, 2)
    assert EOS_ID not in found.ids
    tokenizer, found = span("A ", " B")  # always one more space
    assert tokenizer.decode(found.answer) == "  B"
    tokenizer, found = span("A", "B", adds_bos=False)
    assert found.n_prompt_tokens == 1
    # As published: the prompt's own end of sequence counts for its length, and the text's for the answer.
    tokenizer, found = span("A", "BC", adds_eos=True)
    assert (found.n_prompt_tokens, tokenizer.decode(found.answer)) == (3, "BC</s>")


def test_what_is_told_of_an_answer(host):
    speaker = Speaker(host)
    short, long = (published_span(speaker.encoder, "A", text) for text in ("Rome", "a rather long answer"))
    found = read_spans(EditedModel(host.model), speaker, [short, long], batch_size=1, keep_logits={long})
    for span in (short, long):
        logits = host.model(torch.tensor([span.ids])).logits[0, span.n_prompt_tokens - 1 : -1]
        logprobs = logits.log_softmax(-1)
        margins = []
        for row, token in zip(logprobs, span.answer, strict=True):
            own = row[token].item()
            margins.append(own - max(x for i, x in enumerate(row.tolist()) if i != token))
        seen = found[span]
        assert seen.margin == pytest.approx(min(margins), abs=1e-9)
        assert seen.mean_logprob == pytest.approx(
            logprobs.gather(-1, torch.tensor(span.answer).unsqueeze(-1)).mean().item(), abs=1e-9
        )
        if span is long:
            torch.testing.assert_close(seen.logits, logits[:N_COMPARED], rtol=0, atol=1e-9)
            assert len(seen.logits) == N_COMPARED < len(span.answer)
            # Only what is kept takes memory.
            assert seen.logits.untyped_storage().nbytes() == seen.logits.numel() * 8
        else:
            assert seen.logits is None


def test_accuracy_counts_tokens():
    seen = Forced((5, 6, 7, 8), (5, 6, 0, 8), (-1.0, -2.0, -3.0, -4.0), -0.5, None, (1, 1, 1, 0))
    assert (seen.accuracy, seen.mean_logprob) == (0.75, -2.5)


@pytest.mark.real_host
def test_real_cases_on_the_embedded_host(data_dir):
    cases = json.loads((data_dir / "knowedit/ZsRE/ZsRE-test-all.json").read_text(encoding="utf-8"))[:100]
    texts = [(case["prompt"], case["target_new"]) for case in cases]
    model = baft.load("smollm2")
    host = Host("smollm2", model.host, model.tokenizer, "smollm2")
    speaker = Speaker(host)
    spans = [published_span(speaker.encoder, *text) for text in texts]
    unedited = read_spans(EditedModel(host.model), speaker, spans, batch_size=16)
    scores = []
    for text, span in zip(texts, spans, strict=True):
        predicted, answer = forced_predictions(host.model, host.tokenizer, *text)
        assert list(unedited[span].predicted) == predicted
        scores.append(token_accuracy(predicted, answer))
    assert sum(unedited[span].accuracy for span in spans) == pytest.approx(sum(scores))
    assert 0.1 < sum(scores) / len(scores) < 0.9  # far from zero on an unedited host, which is its weakness
    # One edit in force, on cases of its own and others.
    model.edit(*texts[0])
    edited = read_spans(model._edited, speaker, spans[:10], batch_size=16)
    for text, span in zip(texts[:10], spans, strict=False):
        end = {"n_prompt_tokens": torch.tensor([span.n_prompt_tokens])}
        predicted, _ = forced_predictions(model._edited, host.tokenizer, *text, **end)
        assert list(edited[span].predicted) == predicted
    assert edited[spans[0]].accuracy == 1.0 > unedited[spans[0]].accuracy
