import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from baft.errors import ConfigError, InputError
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from tiny import BOS, BOS_ID, CHATML, EOS, EOS_ID, PAD_ID, SPECIALS, tiny_host, tiny_tokenizer

TURN_START_ID, TURN_END_ID = SPECIALS.index("<|im_start|>"), SPECIALS.index("<|im_end|>")


def encoder(**options):
    chat = options.pop("chat_template", None)
    limits = {name: options.pop(name) for name in ("max_tokens", "eos_ids") if name in options}
    return Encoder(tiny_tokenizer(chat_template=chat, **options), **limits)


def text(encoder, ids):
    return encoder.tokenizer.decode(list(ids))


# --- the seam -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "target", "said"),
    [
        ("The city of", "Rome", " Rome"),
        ("The city of", " Rome", " Rome"),
        ("The city of ", "Rome", "Rome"),
        ("The city of ", " Rome", "Rome"),  # never two spaces
        ("The city of\n", "Rome", "Rome"),
        ("The city of", "\nRome", "\nRome"),
        ("def f():\n", "    return", "    return"),  # an indent is no double space
    ],
)
def test_one_space_stands_at_the_seam(prompt, target, said):
    encoded = encoder().edit(prompt, target, eos=False)
    assert encoded.prompt_ids == encoder().prompt(prompt)
    assert text(encoder(), encoded.target_ids) == said


def test_where_the_joint_ids_do_not_begin_with_the_prompt_s_generation_s_view_wins():
    this = encoder()
    joint = tuple(this.tokenizer("in Rome").input_ids)
    assert joint[: len(this.prompt("in "))] != this.prompt("in ")  # control: " R" is one token
    encoded = this.edit("in ", "Rome", eos=False)
    assert encoded.prompt_ids == this.prompt("in ")
    assert encoded.target_ids == tuple(this.tokenizer("Rome", add_special_tokens=False).input_ids)
    assert this.prompt("in ") + encoded.target_ids != joint
    whole = this.edit("in", "Rome", eos=False)
    assert whole.prompt_ids + whole.target_ids == joint


# --- special tokens -----------------------------------------------------------------------------------


def test_a_tokenizer_that_puts_a_space_before_whatever_it_is_given_puts_no_second_one():
    """SentencePiece's way, as in Llama 2."""
    words = ("<unk>", "</s>", "▁X", "▁is", "▁", "▁Rome", "1", "▁1", "\n", "Rome")
    model = models.Unigram([(word, -1.0) for word in words], unk_id=0)
    bare = Tokenizer(model)
    parts = {
        "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first"),
        "decoder": decoders.Metaspace(),
    }
    for name, part in parts.items():
        setattr(bare, name, part)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", eos_token="</s>")
    for prompt in ("X is", "X is "):
        found = Encoder(tokenizer).edit(prompt, "Rome", eos=False)
        said = tokenizer.decode((*found.prompt_ids, *found.target_ids))
        assert said == "X is Rome", prompt


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("prompt", ["Rome", BOS + "Rome"])
def test_bos_stands_once_and_only_where_it_is_asked_for(adds_bos, prompt):
    ids = encoder(adds_bos=adds_bos).prompt(prompt)
    assert ids.count(BOS_ID) == (1 if adds_bos or prompt.startswith(BOS) else 0)
    assert BOS_ID not in ids[1:]


def test_a_bos_of_the_text_does_not_part_prompt_and_target():
    this = encoder()
    own, brought = this.edit("city of", "Rome"), this.edit(BOS + "city of", "Rome")
    assert own == brought


@pytest.mark.parametrize("bos_is_eos", [False, True])
def test_a_closing_eos_is_taken_off_and_one_of_the_text_stays(bos_is_eos):
    closing = encoder(adds_eos=True, adds_bos=not bos_is_eos, bos_is_eos=bos_is_eos)
    plain = encoder(adds_bos=not bos_is_eos, bos_is_eos=bos_is_eos)
    assert tuple(closing.tokenizer("Rome").input_ids)[-1] == EOS_ID  # control
    assert closing.prompt("Rome") == plain.prompt("Rome")
    assert closing.prompt("Rome" + EOS) == plain.prompt("Rome" + EOS)
    assert closing.prompt("Rome" + EOS)[-1] == EOS_ID
    assert closing.edit("city of", "Rome") == plain.edit("city of", "Rome")
    both = encoder(adds_eos=True, bos_is_eos=True)  # as a tokenizer of the GPT-2 kind would
    assert both.prompt("R") == (EOS_ID, *plain.tokenizer("R", add_special_tokens=False).input_ids)


def test_eos_is_trained_once_or_not_at_all():
    this = encoder()
    bare = this.edit("city of", "Rome", eos=False).target_ids
    assert EOS_ID not in bare
    assert this.edit("city of", "Rome").target_ids == (*bare, EOS_ID)
    assert this.edit("city of", "Rome" + EOS).target_ids == (*bare, EOS_ID)


def test_without_an_eos_token_it_cannot_be_trained():
    this = encoder(eos=False)
    assert this.eos_ids == ()
    assert this.edit("city of", "Rome", eos=False).target_ids
    with pytest.raises(ConfigError, match="end-of-sequence"):
        this.edit("city of", "Rome")


@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_a_prompt_is_encoded_alone_and_nothing_is_lost(prompt, target):
    this = encoder()
    encoded = this.edit(prompt, target, eos=False)
    assert encoded.prompt_ids == this.prompt(prompt)
    assert text(this, encoded.target_ids).strip() == target.strip()


# --- chat ---------------------------------------------------------------------------------------------


def test_a_chat_is_the_template_and_nothing_more():
    this = encoder(chat_template=CHATML)
    messages = [{"role": "user", "content": "Where?"}]
    rendered = "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    assert this.has_chat
    assert this.render(messages) == rendered
    ids = this.chat(messages)
    assert BOS_ID not in ids
    assert (ids.count(TURN_START_ID), ids.count(TURN_END_ID)) == (2, 1)
    assert ids == tuple(this.tokenizer(rendered, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("target", ["Rome", " Rome"])
def test_a_reply_begins_as_the_template_has_it_and_ends_its_turn(target):
    this = encoder(chat_template=CHATML)
    encoded = this.edit("Where?", target, chat=True)
    assert encoded.is_chat
    assert encoded.prompt_ids == this.chat([{"role": "user", "content": "Where?"}])
    assert text(this, encoded.target_ids) == "Rome<|im_end|>"
    raw = this.edit("Where?", target)
    assert (raw.is_chat, text(this, raw.target_ids)) == (False, " Rome" + EOS)


@pytest.mark.parametrize(
    ("after_prompt", "before_reply", "said"),
    [
        ("<|im_start|>", "", "Rome"),  # a template that ends a prompt in a special token alone
        ("[/INST]", " ", " Rome"),
        ("[/INST]", "<think></think>", " Rome"),  # more than space: the rule of raw text
    ],
)
def test_the_template_says_what_parts_prompt_and_reply(after_prompt, before_reply, said):
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        + before_reply
        + "{{ message['content'] }}</s>{% else %}{{ message['content'] }}"
        + after_prompt
        + "{% endif %}{% endfor %}"
    )
    this = encoder(chat_template=template)
    assert text(this, this.edit("Where?", "Rome", chat=True, eos=False).target_ids) == said


def test_the_end_of_a_turn_need_not_be_a_named_special_token():
    this = encoder(chat_template=CHATML)
    assert TURN_END_ID not in this.tokenizer.all_special_ids  # as in the tokenizers of Gemma and Phi-3
    assert this.end_of_turn(chat=True) == TURN_END_ID
    assert this.end_of_turn(chat=False) == EOS_ID
    assert this.stop_ids() == (EOS_ID, TURN_END_ID)
    assert encoder(eos_ids=[7, EOS_ID]).stop_ids() == (EOS_ID, 7)


def test_a_template_that_ends_turns_in_plain_text_leaves_eos():
    plain = "{% for message in messages %}{{ message['content'] }} END{% endfor %}"
    assert encoder(chat_template=plain).end_of_turn(chat=True) == EOS_ID
    nothing = encoder(chat_template=plain, eos=False)
    assert nothing.stop_ids() == ()
    with pytest.raises(ConfigError, match="end-of-sequence"):
        nothing.end_of_turn(chat=True)


def test_what_no_chat_can_be_made_of_is_refused():
    with pytest.raises(ConfigError, match="no chat template"):
        encoder().render([{"role": "user", "content": "Where?"}])
    assert not encoder().has_chat
    this = encoder(chat_template=CHATML)
    with pytest.raises(InputError, match="empty"):
        this.chat([])
    for message in ({"role": "user"}, {"content": "x"}, {"role": "user", "content": " "}):
        with pytest.raises(InputError, match="role and a content"):
            this.chat([message])
    strict = encoder(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="roles must alternate"):
        strict.chat([{"role": "user", "content": "x"}])


# --- limits and padding -------------------------------------------------------------------------------


@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
def test_blank_texts_are_refused(blank):
    with pytest.raises(InputError, match="prompt is empty"):
        encoder().prompt(blank)
    with pytest.raises(InputError, match="prompt is empty"):
        encoder().edit(blank, "Rome")
    with pytest.raises(InputError, match="target is empty"):
        encoder().edit("Rome", blank)


def test_a_target_without_tokens_is_refused():
    this = encoder(normalizer=normalizers.Replace("?", ""))
    with pytest.raises(InputError, match="no tokens"):
        this.edit("Rome ", "?")


def test_texts_longer_than_the_context_are_refused():
    this = encoder(max_tokens=8)
    assert len(this.prompt("1234567")) == 8
    for run in (
        lambda: this.prompt("12345678"),
        lambda: this.edit("12345", "12"),
        lambda: encoder(max_tokens=8, chat_template=CHATML).chat([{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(InputError, match="shorten"):
            run()
    assert len(encoder(max_tokens=None).prompt("1" * 500)) == 501


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_on_the_side_that_is_asked_for(side):
    batch = encoder().pad([(5, 6, 7), (8,)], [2, 1], side=side)
    ids, mask = batch.input_ids.tolist(), batch.attention_mask.tolist()
    assert ids[0] == [5, 6, 7]
    assert ids[1] == ([PAD_ID, PAD_ID, 8] if side == "left" else [8, PAD_ID, PAD_ID])
    assert mask == [[1, 1, 1], [0, 0, 1] if side == "left" else [1, 0, 0]]
    assert batch.n_prompt_tokens.tolist() == [2, 1]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.long


def test_bad_padding_is_refused():
    with pytest.raises(ConfigError, match="'Left'"):
        encoder().pad([(5,)], [1], side="Left")
    with pytest.raises(InputError, match="no rows"):
        encoder().pad([], [], side="left")


def test_any_token_will_do_for_padding():
    assert encoder().pad_id == PAD_ID
    assert encoder(pad=False).pad_id == EOS_ID
    assert encoder(pad=False, eos=False, eos_ids=[9]).pad_id == 9
    assert encoder(pad=False, eos=False).pad_id == 0


def test_ids_become_text_without_special_tokens():
    this = encoder()
    assert this.text((*this.prompt(" Rome is , here"), EOS_ID)) == " Rome is , here"


@pytest.mark.parametrize(("eos", "want"), [(None, ()), (9, (9,)), ([9, 8], (9, 8))])
def test_a_host_s_own_stop_tokens_count(eos, want):
    model = tiny_host("llama")
    model.generation_config.eos_token_id = eos
    host = Host("tiny", model, tiny_tokenizer(), "tiny")
    assert Encoder.for_host(host, max_tokens=5).eos_ids == (EOS_ID, *want)
    assert Encoder.for_host(host, max_tokens=5).max_tokens == 5
    model.generation_config = None
    assert Encoder.for_host(host).eos_ids == (EOS_ID,)
