"""Text in, text out."""

import pytest
import torch

from baft.errors import ConfigError, InputError
from baft.hosts.architecture import Site
from baft.hosts.edited_model import EditedModel
from baft.hosts.models import Host
from baft.hosts.speaking import Speaker
from tiny import CHATML, EOS_ID, open_part, tiny_host, tiny_tokenizer

PROMPTS = ["The capital", "A", "Who is the king of"]
CHAT = [{"role": "user", "content": "Who"}]


@pytest.fixture(scope="module")
def host():
    return Host("tiny", tiny_host("llama"), tiny_tokenizer(chat_template=CHATML), "tiny")


@pytest.fixture(scope="module")
def speaker(host):
    return Speaker(host)


@pytest.fixture(scope="module")
def edited(host):
    return EditedModel(host.model, {Site(1): [open_part()]})


def test_rows(speaker):
    assert speaker.rows("A", None) == [speaker.encoder.prompt("A")]
    assert speaker.rows(("A", "B"), None) == [speaker.encoder.prompt(one) for one in "AB"]
    assert speaker.rows(None, CHAT) == [speaker.encoder.chat(CHAT)]
    for prompt, messages, message in (
        (None, None, "give either a prompt or messages, got neither"),
        ("A", CHAT, "give either a prompt or messages, got both"),
        ([], None, "the list is empty"),
        ("", None, "blank"),
    ):
        with pytest.raises(InputError, match=message):
            speaker.rows(prompt, messages)
    with pytest.raises(ConfigError, match="no chat template"):
        Speaker(Host("raw", tiny_host("llama"), tiny_tokenizer(), "raw")).rows(None, CHAT)


def test_replies_do_not_depend_on_company(speaker, edited, host):
    rows = speaker.rows(PROMPTS, None)
    together = speaker.replies(edited, rows, 5)
    assert together == [speaker.replies(edited, [row], 5)[0] for row in rows]
    assert together != speaker.replies(EditedModel(host.model), rows, 5)  # control


def test_next_logits_do_not_depend_on_company(speaker, edited, host):
    rows = speaker.rows(PROMPTS, None)
    together = speaker.next_logits(edited, rows)
    for row, logits in zip(rows, together, strict=True):
        alone = edited(torch.tensor([row]), n_prompt_tokens=torch.tensor([len(row)])).logits[0, -1]
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-9)  # rounding: a batch of another shape
        assert float((logits - host.model(torch.tensor([row])).logits[0, -1]).abs().max()) > 1e-2  # control
    assert not together.requires_grad


def test_a_reply_ends_with_the_token_that_ends_it(speaker, edited, monkeypatch):
    [row] = speaker.rows("A", None)
    prompt = torch.tensor([row, row])
    after = torch.tensor([[30, EOS_ID, 0, 0], [30, 31, 32, 33]])
    monkeypatch.setattr(EditedModel, "generate", lambda *_, **__: torch.cat([prompt, after], -1))
    assert speaker.replies(edited, [row, row], 4) == [[30, EOS_ID], [30, 31, 32, 33]]


def test_what_rules_a_reply(speaker, edited, monkeypatch):
    seen = []

    def generate(self, ids, **settings):
        seen.append(settings)
        return ids

    monkeypatch.setattr(EditedModel, "generate", generate)
    [row] = speaker.rows("A", None)
    assert speaker.replies(edited, [row], 7) == [[]]
    speaker.replies(edited, [row], 70, {"do_sample": True})
    assert (seen[0]["max_new_tokens"], seen[0]["do_sample"]) == (7, False)
    assert seen[0]["eos_token_id"] == list(speaker.encoder.stop_ids())
    assert (seen[1]["max_new_tokens"], seen[1]["do_sample"]) == (64 - len(row), True)
    with pytest.raises(InputError, match="is 64 tokens long and fills this host's context of 64: shorten it"):
        speaker.replies(edited, [tuple(range(64))], 1)
    with pytest.raises(InputError, match="at least one token, got max_new_tokens=0"):
        speaker.replies(edited, [row], 0)


def test_text(speaker):
    ids = speaker.encoder.prompt("of  Rome ")
    assert speaker.text(ids) == "of  Rome "
