"""Ways of generating: those that must be right, and those that must be refused."""

import copy
import threading

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    TextIteratorStreamer,
)

from baft.errors import GenerationError, InputError
from baft.hosts.architecture import Site
from baft.hosts.edited_model import EditedModel
from baft.hosts.live_view import live_view
from tiny import (
    EOS_ID,
    N_LAYERS,
    PAD_ID,
    open_part,
    pad_rows,
    positions_of,
    random_ids,
    shared_host,
    shut_part,
    some_interventions,
    tiny_host,
    tiny_tokenizer,
)

PEFT_IS_BEHIND = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
OPTIONS = {"max_new_tokens": 5, "do_sample": False}


def counts(*numbers):
    return torch.tensor(numbers)


def test_streamed_pieces_make_up_the_text(edited):
    tokenizer = tiny_tokenizer()
    ids = tokenizer("The city of", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=edited.generate, args=(ids,), kwargs={"streamer": streamer, **OPTIONS})
    thread.start()
    pieces = "".join(streamer)
    thread.join()
    assert pieces == tokenizer.decode(edited.generate(ids, **OPTIONS)[0, ids.shape[1] :])
    assert pieces != tokenizer.decode(edited.host.generate(ids, **OPTIONS)[0, ids.shape[1] :])


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_conversation_goes_on_from_its_cache(family, padded):
    """What the cache holds stays as it was edited; of the new tokens, the rule picks the last three."""
    host = shared_host(family)
    edited = EditedModel(host, some_interventions(host))
    ids, mask = pad_rows([random_ids(1, 7)[0], random_ids(1, 4 if padded else 7, seed=5)[0]], "left")
    cache = DynamicCache(config=host.config)
    first = edited.generate(ids, attention_mask=mask, past_key_values=cache, **OPTIONS)
    question = torch.randint(5, 200, (2, 6), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([first, question], -1)
    mask = torch.cat([mask, torch.ones(2, 11, dtype=torch.long)], -1)
    n_cached = cache.get_seq_length()
    assert n_cached == first.shape[1] - 1
    slow = copy.deepcopy(cache)
    second = edited.generate(ids, attention_mask=mask, past_key_values=cache, **OPTIONS)
    short = copy.deepcopy(slow)  # the new tokens alone may be given as well, under the whole mask
    alone = edited.generate(ids[:, n_cached:], attention_mask=mask, past_key_values=short, **OPTIONS)
    assert torch.equal(alone[:, -5:], second[:, -5:])

    n_prompt_tokens, width, said = mask.sum(-1), ids.shape[1], []
    for _ in range(5):
        new = ids[:, slow.get_seq_length() :]
        out = edited(
            new,
            mask,
            n_prompt_tokens=n_prompt_tokens,
            position_ids=positions_of(mask)[:, -new.shape[1] :],
            past_key_values=slow,
        )
        said.append(out.logits[:, -1].argmax(-1, keepdim=True))
        ids = torch.cat([ids, said[-1]], -1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
    assert torch.equal(second[:, width:], torch.cat(said, -1))
    if family == "mistral":  # all of its layers have forgotten the earlier reply
        return
    # Control: a fresh run edits no earlier reply, so that its states differ from the cache's.
    fresh = DynamicCache(config=host.config)
    edited.generate(second[:, :width], attention_mask=mask[:, :width], past_key_values=fresh, **OPTIONS)
    layer = N_LAYERS - 2  # a full attention layer where there are both kinds
    a, b = cache.layers[layer].keys, fresh.layers[layer].keys
    assert a.shape == b.shape
    assert not torch.allclose(a, b)


def test_bos_is_known_where_only_the_new_tokens_are_given():
    """Left padding, the cache full of padding alone: the first new token of that row is its BOS."""
    host = shared_host("llama")
    edited = EditedModel(host, {Site(0): [open_part()]})
    row = random_ids(1, 5)
    ids, mask = pad_rows([random_ids(1, 8)[0], row[0]], "left")
    cache = DynamicCache(config=host.config)
    positions = positions_of(mask)
    edited(ids[:, :3], mask[:, :3], position_ids=positions[:, :3], past_key_values=cache)
    got = edited(ids[:, 3:], mask, position_ids=positions[:, 3:], past_key_values=cache).logits[1]
    torch.testing.assert_close(got, edited(row).logits[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "arguments",
    [
        {"assistant_model": "the host"},
        {"assistant_early_exit": 1},
        {"use_mtp": True},
        {"prompt_lookup_num_tokens": 2},
        {"custom_generate": "someone/code"},
        {"custom_generate": lambda **_: None},
        {"trust_remote_code": True},
        {"token_healing": True},
        {"guidance_scale": 1.5},
        {"cache_implementation": "paged"},
        {"inputs_embeds": torch.zeros(1, 6, 32, dtype=torch.float64)},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)},
        {"generation_config": GenerationConfig(guidance_scale=2.0)},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_unsafe_ways_of_generating_are_refused(host, edited, arguments):
    if arguments == {"assistant_model": "the host"}:
        arguments = {"assistant_model": host}
    with pytest.raises(GenerationError):
        edited.generate(random_ids(1, 6), **arguments)
    with pytest.raises(GenerationError):
        live_view(edited).generate(random_ids(1, 6), **arguments)


def test_the_host_s_own_settings_count_too():
    host = tiny_host("llama")
    edited = EditedModel(host, some_interventions(host))
    ids = random_ids(1, 6)
    edited.generate(ids, guidance_scale=1, trust_remote_code=False, **OPTIONS)  # neutral: no refusal
    host.generation_config = GenerationConfig(prompt_lookup_num_tokens=2, pad_token_id=PAD_ID)
    with pytest.raises(GenerationError, match="prompt_lookup_num_tokens"):
        edited.generate(ids, **OPTIONS)
    with edited.disabled():
        assert edited.generate(ids, **OPTIONS).shape == (1, 11)


def test_continuous_batching_is_refused_while_edits_are_in_force(edited, monkeypatch):
    view = live_view(edited)
    names = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
    for name in names:
        with pytest.raises(GenerationError, match="continuous batching"):
            getattr(view, name)([[1, 5, 6]])
        monkeypatch.setattr(type(edited.host), name, lambda _, inputs: ("the host", inputs))
    with edited.disabled():
        assert [getattr(view, name)([[1]]) for name in names] == [("the host", [[1]])] * 3


def test_inputs_that_cannot_be_right_are_refused(edited):
    ids, mask = pad_rows([random_ids(1, 6)[0], random_ids(1, 3)[0]], "right")
    with pytest.raises(InputError, match="left"):
        edited.generate(ids, attention_mask=mask)
    with pytest.raises(InputError, match="left"):
        edited.generate(ids)  # by the pad token
    with pytest.raises(InputError, match="axes"):
        edited.generate(ids, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(InputError, match="axes"):
        live_view(edited)(ids, torch.ones(2, 1, 6, 6))
    for nothing in (None, torch.zeros(1, 0, dtype=torch.long)):
        with pytest.raises(InputError, match="no tokens"):
            edited.generate(nothing)
    with pytest.raises(InputError, match="does not fit"):
        edited(ids, mask, n_prompt_tokens=counts(6, 4))
    with pytest.raises(InputError, match="does not fit"):
        edited(ids, mask, n_prompt_tokens=counts(-1, 2))
    with pytest.raises(InputError, match="cover"):
        edited(ids, mask[:, :5])
    with pytest.raises(InputError, match="nothing"):
        live_view(edited)()
    cache = DynamicCache(config=edited.host.config)
    edited(ids, mask, past_key_values=cache)
    with pytest.raises(InputError, match="cover"):
        edited(ids, mask, past_key_values=cache)


@pytest.mark.parametrize("how", ["argument", "config", "host"])
@pytest.mark.parametrize("eos", [None, EOS_ID, [EOS_ID, 9], [PAD_ID, 9], PAD_ID])
def test_without_a_mask_padding_is_guessed_as_the_host_does(how, eos):
    host = tiny_host("llama")
    shut = EditedModel(host, {Site(0): [shut_part()]})
    host.generation_config = GenerationConfig()
    settings = {"pad_token_id": PAD_ID, "eos_token_id": eos}
    arguments = {
        "argument": {**settings},
        "config": {"generation_config": GenerationConfig(**settings)},
        "host": {},
    }[how]
    if how == "host":
        host.generation_config = GenerationConfig(**settings)
    ids, mask = pad_rows([random_ids(1, 8)[0], random_ids(1, 3)[0]], "left")
    want = logits_of(host, ids, arguments)
    assert torch.equal(logits_of(shut, ids, arguments), want)
    other = torch.ones_like(mask) if eos in (None, EOS_ID, [EOS_ID, 9]) else mask
    assert not torch.equal(logits_of(host, ids, {**arguments, "attention_mask": other}), want)  # control


def logits_of(model, ids, arguments):
    out = model.generate(
        input_ids=ids,
        output_logits=True,
        return_dict_in_generate=True,
        max_new_tokens=2,
        do_sample=False,
        **arguments,
    )
    return torch.stack(out.logits)
