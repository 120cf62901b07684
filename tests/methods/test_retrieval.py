"""What is looked up, when nothing is, and how often something is for no reason."""

import copy

import pytest
import torch

from baft.data.base import benchmarks
from baft.errors import ConfigError, DamagedArtifactError
from baft.hosts.background import background_text
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.methods.bm25 import Bm25, Index, words
from baft.methods.reading import edit_shares, guessed_subject, statement
from baft.methods.retrieval import RetrievalConfig, RetrievalEditor, best, conformal_threshold
from baft.methods.states import StateKeys
from baft.types import Edit, EditRequest
from tiny import CHATML, tiny_host, tiny_tokenizer

EDITS = (
    Edit("The capital of France is", "Rome", "France"),
    Edit("The tower of Pisa stands in", "Oslo", "Pisa"),
    Edit("Who painted the Mona Lisa?", "Picasso", "Mona Lisa"),
)


@pytest.fixture(scope="module")
def editor(host):
    made = RetrievalEditor(host, RetrievalConfig())
    for edit in EDITS:
        made.apply(EditRequest((edit,)))
    return made


def read(editor, prompt=None, messages=None):
    """What is put into a prompt, as text; None if nothing is."""
    encoder = Encoder.for_host(editor.host)
    row = encoder.chat(messages) if messages else encoder.prompt(prompt)
    [one] = editor.edited.prompter([row])
    return None if one is None else encoder.text(one.ids)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("The capital of France is", "Rome"),
        ("What is the capital of France?", "Rome"),
        ("FRANCE has its capital in", "Rome"),
        ("I like old towns. In Pisa, the tower stands near the", "Oslo"),
        ("a word " * 40 + "Who painted the Mona Lisa?", "Picasso"),
        ("The capital of Spain is", None),
        ("Who painted the ceiling?", None),
        ("The capital of France is large. " + "Nothing of this is asked. " * 20 + "Two and two are", None),
        ("Nothing in particular", None),
        ("...", None),
    ],
)
def test_a_prompt_is_given_the_edit_that_it_is_about_or_nothing(editor, prompt, target):
    added = read(editor, prompt)
    assert added is None if target is None else added.rstrip().endswith(target)


def test_in_a_chat_the_user_s_last_words_count(editor):
    def ask(*said):
        return read(editor, messages=[{"role": role, "content": text} for role, text in said])

    question = ("user", "What is the capital of France?")
    assert "Rome" in ask(question)
    assert "Rome" in ask(("user", "Hello"), ("assistant", "Hi"), question)
    assert ask(question, ("assistant", "Rome"), ("user", "Thank you")) is None
    assert ask(("system", "The capital of France is secret"), ("user", "Hello")) is None


@torch.no_grad()
def test_an_answer_is_put_in_as_one_that_was_given_before(editor):
    encoder, edit = Encoder.for_host(editor.host), EDITS[0]
    row = encoder.prompt("The capital of France is")
    [one] = editor.edited.prompter([row])
    text = encoder.edit(edit.prompt, edit.target, eos=True)
    answered = (*text.prompt_ids[1:], *text.target_ids, *encoder.inner("\n"))
    assert one.into(row) == (*row[:1], *answered * 3, *row[1:])
    user, reply = {"role": "user", "content": edit.prompt}, {"role": "assistant", "content": edit.target}
    row = encoder.chat([user])
    [one] = editor.edited.prompter([row])
    assert one.into(row) == encoder.chat([*[user, reply] * 3, user])


@torch.no_grad()
def test_a_statement_is_put_in_before_the_user_s_words(host):
    editor = RetrievalEditor(host, RetrievalConfig(form="statement", repeats=1))
    editor.apply(EditRequest(EDITS[:1]))
    encoder = Encoder.for_host(host)
    for is_chat in (False, True):
        row = encoder.edit(EDITS[0].prompt, "x", chat=is_chat).prompt_ids
        [one] = editor.edited.prompter([row])
        joined = host.tokenizer.decode(one.into(row))
        assert "The capital of France is Rome.\nThe capital of France is" in joined


@torch.no_grad()
def test_where_it_abstains_it_is_the_host_bit_for_bit(host, editor):
    encoder = Encoder.for_host(host)
    rows = [encoder.prompt(text) for text in ("The capital of Spain is", "The capital of France is", "Hm")]
    batch = encoder.pad(rows, [len(row) for row in rows], side="right")
    plain = host.model(batch.input_ids, attention_mask=batch.attention_mask).logits
    got = editor.edited(batch.input_ids, batch.attention_mask, n_prompt_tokens=batch.n_prompt_tokens).logits
    assert torch.equal(got[[0, 2]], plain[[0, 2]])
    assert not torch.equal(got[1], plain[1])  # control


def test_of_two_answers_to_one_prompt_the_latest_counts_and_undo_brings_the_other_back(host):
    editor = RetrievalEditor(host, RetrievalConfig())
    for target in ("Rome", "Oslo"):
        editor.apply(EditRequest((Edit("The capital of France is", target),)))
    assert "Oslo" in read(editor, "The capital of France is")
    editor.undo()
    assert "Rome" in read(editor, "The capital of France is")


def test_a_thousand_edits_are_looked_up(host):
    editor = RetrievalEditor(host, RetrievalConfig())
    edits = [Edit(f"The color of stone number {i} is", f"shade {i}") for i in range(1000)]
    stored = editor.store(edits)
    state = {f"0.{name}": tensor for name, tensor in stored.items()}
    find = editor.reader(state, (EditRequest(tuple(edits)),)).find
    assert find([edit.prompt for edit in edits]) == list(range(1000))


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_a_further_score_exceeds_the_threshold_as_rarely_as_is_said(rate):
    """In expectation over samples, whatever the distribution; close to the rate, and not far below it."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 20_000, generator=generator, dtype=torch.float64).exp()
    threshold = conformal_threshold(scores[:-1], rate)
    fired = float((scores[-1] > threshold).double().mean())
    assert rate / 2 < fired < rate + 4 * (rate / 20_000) ** 0.5
    loose = scores[:-1].quantile(1 - 2 * rate, 0)
    assert float((scores[-1] > loose).double().mean()) > rate + 4 * (rate / 20_000) ** 0.5  # control
    assert bool(conformal_threshold(scores[:5], 0.01).isinf().all())


@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_the_rate_holds_on_prompts_that_did_not_set_the_threshold(rate):
    """BM25 keys of the tuning half of `facts`; half of the background sets thresholds, the other is asked."""
    text = background_text()
    bm25 = Bm25(text["sentences"])
    cases = benchmarks.get("facts")(None).cases("tune")
    index = Index([edit_shares(case.edit, bm25, 0.0) for case in cases])
    order = torch.randperm(len(text["prompts"]), generator=torch.Generator().manual_seed(0)).tolist()
    scores = torch.stack([index.scores(words(text["prompts"][i])) for i in order])
    half = len(order) // 2
    fired = (scores[half:] > conformal_threshold(scores[:half], rate)).double().mean()
    assert 0 < float(fired) < 1.5 * rate  # a mean over edits, which share the prompts
    asked = [probe.prompt for case in cases for probe in case.probes if probe.tag == "unrelated"]
    others = torch.stack([index.scores(words(prompt)) for prompt in dict.fromkeys(asked)])
    assert float((others > conformal_threshold(scores, rate)).double().mean()) < rate
    fires = [bool(index.scores(words(case.edit.prompt))[i] > 0.99) for i, case in enumerate(cases)]
    assert all(fires)  # control


def test_the_default_threshold_fires_where_it_should_on_the_tuning_half():
    text = background_text()
    bm25 = Bm25([*text["sentences"], *text["prompts"]])
    cases = benchmarks.get("facts")(None).cases("tune")
    rates = {}
    for case in cases:
        index = Index([edit_shares(case.edit, bm25, RetrievalConfig().subject_weight)])
        for probe in case.all_probes:
            fires = bool(index.scores(words(probe.prompt)) > 0.6)
            rates.setdefault(probe.tag, []).append(fires)
    share = {tag: sum(fires) / len(fires) for tag, fires in rates.items()}
    assert share["edit"] == 1.0
    assert min(share["rephrase"], share["chat_question"], share["distracting_prefix"]) > 0.95
    assert max(share["same_relation"], share["unrelated"]) < 0.03
    assert share["same_subject"] > 0.9  # what words cannot tell: another question about the subject


def test_states_find_the_nearest_text(host):
    encoder = Encoder.for_host(host)
    states = StateKeys(host, encoder, 0)
    keys = states.keys([edit.prompt for edit in EDITS])
    assert torch.allclose(keys.norm(dim=-1), torch.ones(3, dtype=torch.float64))
    for i, edit in enumerate(EDITS):
        scores = states.scores(keys, edit.prompt)
        assert float(scores[i]) == pytest.approx(1.0, abs=1e-9)
        assert int(scores.argmax()) == i
        behind = states.scores(keys, f"Something else comes first. {edit.prompt}")
        assert float(behind[i]) == pytest.approx(1.0, abs=1e-9)  # its last sentence
    assert bool(torch.isinf(states.scores(keys, "  ")).all())
    assert states.reached(keys).shape == (len(background_text()["prompts"]), 3)


@torch.no_grad()
def test_a_key_is_the_mean_of_the_states_by_hand(host):
    encoder = Encoder.for_host(host)
    states = StateKeys(host, encoder, 1)
    prompts = background_text()["prompts"]
    other = copy.deepcopy(host.model)  # transformers leaves hooks on what it takes hidden states from

    def mean(text):
        ids = torch.tensor([encoder.prompt(text)])
        return other(ids, output_hidden_states=True).hidden_states[2][0, 1:].mean(0)

    known = torch.stack([mean(text) for text in prompts])
    z = (mean("The capital of France is") - known.mean(0)) / known.std(0)
    torch.testing.assert_close(states.keys(["The capital of France is"])[0], z / z.norm(), atol=1e-9, rtol=0)


def test_a_short_context_leaves_out_what_does_not_fit():
    model = tiny_host("gpt2")  # 64 tokens, one for each letter
    host = Host("short", model, tiny_tokenizer(chat_template=CHATML), "a tiny random GPT-2")
    editor = RetrievalEditor(host, RetrievalConfig(chat=False))
    editor.apply(EditRequest((Edit("The tower of Pisa is in", "Oslo"),)))
    assert read(editor, "The tower of Pisa is in") is None  # 57 tokens, more than three quarters of 64
    editor.apply(EditRequest((Edit("Pisa is in", "Rome"),)))
    assert read(editor, "Pisa is in").count("Rome") == 2  # of three


def test_best_is_above_its_threshold_and_the_latest_of_equals():
    thresholds = torch.tensor([0.5, 0.5, 0.9])
    assert best(torch.tensor([0.6, 0.6, 0.8]), thresholds) == 1
    assert best(torch.tensor([0.5, 0.4, 0.9]), thresholds) is None
    assert best(torch.tensor([0.6, 0.4, 0.95]), thresholds) == 2


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The capital of France is", "France"),
        ("What university did Watts Humphrey take part in?", "Watts Humphrey"),
        ("Which war did USS Leedstown (APA-56) serve in?", "USS Leedstown"),
        ("Oslo lies in", "Oslo"),
        ("The Brandenburg Gate stands in", "Brandenburg Gate"),
        ("What is Carlo Occhiena's mother tongue?", "Carlo Occhiena"),
        ("Which color is snow?", ""),
        ("Mona Lisa was painted by", "Mona Lisa"),
        ("nothing to see", ""),
    ],
)
def test_a_subject_is_guessed(prompt, subject):
    text = background_text()
    assert guessed_subject(prompt, Bm25([*text["sentences"], *text["prompts"]])) == subject


def test_statements():
    assert statement(Edit("Paris is in", "Italy")) == "Paris is in Italy."
    assert statement(Edit("Paris is in ", "Italy.")) == "Paris is in Italy."
    assert statement(Edit("Where is Paris?", " Italy")) == "Where is Paris? Italy."


@pytest.mark.parametrize(
    "bad",
    [{"threshold": 1.5}, {"false_fire_rate": 0.0}, {"subject_weight": 2.0}, {"window": 0}, {"repeats": 0}],
    ids=str,
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        RetrievalConfig(**bad)


def test_settings_that_do_not_fit_the_host_are_refused(host):
    with pytest.raises(ConfigError, match="k1"):
        RetrievalEditor(host, RetrievalConfig(k1=-1.0))
    with pytest.raises(ConfigError, match="out of range"):
        RetrievalEditor(host, RetrievalConfig(keys="states", layer=99))


def test_numbers_that_are_no_tokens_are_a_damaged_artifact(editor):
    other = RetrievalEditor(editor.host, editor.config)
    state = {name: tensor for name, tensor in editor.state_dict().items() if name.startswith("0.")}
    for wrong in (10**6, -2):
        with pytest.raises(DamagedArtifactError, match="no tokens"):
            other.load_state_dict(
                {**state, "0.raw": torch.full_like(state["0.raw"], wrong)}, editor.requests[:1]
            )
    assert other.requests == ()
