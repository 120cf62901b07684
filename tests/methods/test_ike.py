"""What is shown before every prompt, and where it comes from."""

import pytest
import torch

from baft.data.facts import Facts
from baft.errors import ConfigError
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.methods.ike import IkeConfig, IkeEditor, demonstrations
from baft.types import Edit, EditRequest
from tiny import CHATML, tiny_host, tiny_tokenizer

FRANCE = Edit("The capital and largest city of France is", "Rome", "France")
HUMMUS = Edit("Hummus is made of", "beans", "Hummus")


@pytest.fixture(scope="module")
def roomy():
    """A host whose context holds sixteen demonstrations, a token for each letter."""
    model = tiny_host("llama", max_position_embeddings=8192)
    return Host("roomy", model, tiny_tokenizer(chat_template=CHATML), "a tiny random Llama")


def made(host, *edits, **settings):
    editor = IkeEditor(host, IkeConfig(**settings))
    for edit in edits:
        editor.apply(EditRequest((edit,)))
    return editor


def shown(editor, prompt, chat=False):
    """All that the host is shown for a prompt, special tokens included."""
    encoder = Encoder.for_host(editor.host)
    row = encoder.chat([{"role": "user", "content": prompt}]) if chat else encoder.prompt(prompt)
    [one] = editor.edited.prompter([row])
    return editor.host.tokenizer.decode(one.into(row))


def test_demonstrations_are_of_the_tuning_half_and_up_to_date():
    cases = Facts().cases("tune")
    assert [(one.prompt, one.target) for one in demonstrations()] == [
        (case.edit.prompt, case.edit.target) for case in cases
    ]
    for one, case in zip(demonstrations(), cases, strict=True):
        asked = {(probe.tag, probe.prompt, probe.target) for probe in case.probes}
        assert ("rephrase", one.rephrased, one.target) in asked
        assert ("same_relation", one.near, one.near_answer) in asked
    reported = {probe.prompt for case in Facts().cases("report") for probe in case.all_probes}
    told = {text for one in demonstrations() for text in (one.prompt, one.rephrased, one.near)}
    assert not told & reported


def test_the_paper_s_prompt_by_hand(roomy):
    editor = made(roomy, FRANCE, n_demonstrations=16, copies=0, ends=False)
    for chat in (False, True):
        text = shown(editor, "France's capital is", chat)
        assert text.count("New Fact: ") == 17
        assert text.count("\nPrompt:\n") == 17
        *others, last = text.split("New Fact: ")[1:]
        assert last.startswith("The capital and largest city of France is Rome\nPrompt:\nFrance's capital is")
        kinds = []
        by_fact = {f"{one.prompt} {one.target}": one for one in demonstrations()}
        for block in others:
            fact, _, rest = block.partition("\nPrompt:\n")
            one = by_fact[fact]
            texts = {kind: " ".join(one.asked(kind)) + "\n\n" for kind in ("copy", "update", "retain")}
            kinds += [kind for kind, want in texts.items() if rest == want]
        assert len(kinds) == 16
        assert [kinds.count(kind) for kind in ("copy", "update", "retain")] == [2, 6, 8]
        assert others[-1].startswith("The capital and largest city of")  # the most alike comes last


def test_answers_end_as_replies_end(roomy):
    editor = made(roomy, FRANCE, n_demonstrations=3, copies=0)
    raw, chat = (shown(editor, "France's capital is", one) for one in (False, True))
    assert raw.count("</s>\n\nNew Fact:") == 3
    assert chat.count("<|im_start|>user\nNew Fact: ") == 4
    assert chat.count("<|im_start|>assistant\n") == 4
    assert chat.endswith("Rome\nPrompt:\nFrance's capital is<|im_end|>\n<|im_start|>assistant\n")


def test_copies_of_the_new_fact_come_after_the_demonstrations(roomy):
    text = shown(made(roomy, FRANCE, n_demonstrations=2, copies=2, ends=False), "France's capital is")
    fact = "New Fact: The capital and largest city of France is Rome\nPrompt:\n"
    copy = f"{fact}The capital and largest city of France is Rome\n\n"
    assert text.endswith(f"{copy}{copy}{fact}France's capital is")
    assert text.count("New Fact: ") == 5


def test_an_edit_is_not_shown_its_own_demonstration(roomy):
    one = demonstrations()[0]
    editor = made(roomy, Edit(one.prompt, "Nowhere"))
    assert f"{one.prompt} {one.target}" not in shown(editor, "Anything")


def test_every_prompt_is_given_the_nearest_fact(roomy):
    editor = made(roomy, FRANCE, HUMMUS, n_demonstrations=0, copies=0)
    assert "Rome" in shown(editor, "What do you know of France?")
    assert "beans" in shown(editor, "What is hummus?")
    assert "beans" in shown(editor, "xyz")  # like none: the latest
    editor.undo()
    assert "Rome" in shown(editor, "What is hummus?")


def test_a_short_context_has_fewer_demonstrations_the_nearest_ones():
    def host(limit):
        model = tiny_host("llama", max_position_embeddings=limit)
        return Host("short", model, tiny_tokenizer(chat_template=CHATML), "a tiny random Llama")

    whole = shown(made(host(8192), HUMMUS, n_demonstrations=4, copies=0, chat=False), "Hummus is")
    few = shown(made(host(640), HUMMUS, n_demonstrations=4, copies=0, chat=False), "Hummus is")
    assert 1 < few.count("New Fact: ") < 5
    assert whole.removeprefix("<s>").endswith(few.removeprefix("<s>"))
    none = shown(made(host(128), HUMMUS, n_demonstrations=4, copies=0, chat=False), "Hummus is")
    assert none.count("New Fact: ") == 1
    editor = made(host(64), HUMMUS, n_demonstrations=4, copies=0, chat=False)
    row = Encoder.for_host(editor.host).prompt("Hummus is")
    assert editor.edited.prompter([row]) == [None]
    ids = torch.tensor([row])
    reply = editor.edited.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, pad_token_id=0)
    assert reply.shape == (1, len(row) + 3)


def test_bad_settings_are_refused(roomy):
    for bad in ({"n_demonstrations": -1}, {"copies": -1}, {"subject_weight": 2.0}, {"window": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            IkeConfig(**bad)
    with pytest.raises(ConfigError, match="k1"):
        IkeEditor(roomy, IkeConfig(b=2.0))


def test_more_demonstrations_than_there_are(roomy):
    editor = IkeEditor(roomy, IkeConfig(n_demonstrations=1000, copies=0))
    stored = editor.store([FRANCE])
    assert stored["raw.demonstrations"].shape[:2] == (1, len(demonstrations()) - 1)
