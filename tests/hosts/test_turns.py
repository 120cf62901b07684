"""Where a user's words stand, in templates of several kinds."""

import pytest

from baft.hosts.encoding import Encoder
from baft.hosts.turns import Turns
from tiny import CHATML, tiny_tokenizer

WITH_SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
ONE_TURN = (
    "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
    "<|im_start|>user\n{{ messages[0]['content'] }}<|im_end|>\n<|im_start|>assistant\n"
)
QUESTION = "Who built the tower?"


def spoken(template, messages):
    encoder = Encoder(tiny_tokenizer(chat_template=template), eos_ids=(2,))
    turns = Turns(encoder)
    row = encoder.chat(messages)
    start, end = turns.words(row)
    return encoder.text(row[start:end]), turns, row


@pytest.mark.parametrize("template", [CHATML, WITH_SYSTEM, BRACKETS, ONE_TURN])
def test_the_only_turn(template):
    text, turns, row = spoken(template, [{"role": "user", "content": QUESTION}])
    assert text.strip() == QUESTION
    assert turns.is_chat(row)


@pytest.mark.parametrize("template", [CHATML, WITH_SYSTEM, BRACKETS])
def test_the_last_of_several_turns(template):
    said = [("user", "Hello"), ("assistant", "Hi!"), ("user", QUESTION)]
    text, turns, row = spoken(template, [{"role": role, "content": text} for role, text in said])
    assert text.strip() == QUESTION
    start, _ = turns.words((*row, *row))  # the last one counts
    assert start > len(row)


def test_a_system_prompt_of_the_user_s_own():
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    assert spoken(CHATML, said)[0] == QUESTION


def test_what_follows_the_prompt_is_left_out():
    _, turns, row = spoken(CHATML, [{"role": "user", "content": QUESTION}])
    assert turns.words((*row, 70, 71, 72)) == turns.words(row)


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_raw_prompt_begins_after_special_tokens(template):
    encoder = Encoder(tiny_tokenizer(chat_template=template))
    turns, row = Turns(encoder), encoder.prompt(QUESTION)
    assert turns.words(row) == (1, len(row))
    assert not turns.is_chat(row)
    assert turns.words(row[:1]) == (0, 1)
    assert (turns.seams is None) == (template is None)


def test_what_stands_between_turns():
    turns = Turns(Encoder(tiny_tokenizer(chat_template=WITH_SYSTEM)))
    assert turns.seams == ("<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n")
    assert Turns(Encoder(tiny_tokenizer(chat_template=ONE_TURN))).seams is None
