"""Text put into prompts: what comes back is what the host says of the longer rows, cut to what was shown."""

import pytest
import torch
from transformers import DynamicCache

from baft.errors import ConfigError, GenerationError, InputError
from baft.hosts.architecture import Site
from baft.hosts.calls import Recording
from baft.hosts.edited_model import EditedModel
from baft.hosts.live_view import live_view
from baft.hosts.patches import DeltaPatch, down_projection, weight_shape
from baft.hosts.prompting import Insertion
from tiny import (
    EOS_ID,
    FAMILIES,
    HOSTS,
    PAD_ID,
    open_part,
    pad_rows,
    positions_of,
    precision,
    random_ids,
    shared_host,
    tiny_host,
)

MORE = (31, 7, 99, 45, 12)
LENGTHS = (9, 5, 7, 6)
IN = {9: Insertion(1, MORE), 7: Insertion(3, MORE[:2])}  # what is put in, by the prompt's length


def some_rows(lengths=LENGTHS):
    return [random_ids(1, n, seed=n)[0] for n in lengths]


def prompted(host, where=IN):
    edited = EditedModel(host)
    edited.prompter = lambda prompts: [where.get(len(prompt)) for prompt in prompts]
    return edited


def longer(row, one):
    return torch.tensor([one.into(tuple(row.tolist()))])


def shown_columns(row, one):
    """The shown tokens of a longer row, found by hand."""
    return [*range(one.at), *range(one.at + len(one.ids), len(row) + len(one.ids))]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "attention"), HOSTS)
@torch.no_grad()
def test_logits_are_those_of_the_longer_row_and_other_rows_stay_bit_for_bit(family, attention, side):
    host, rows = shared_host(family, attention), some_rows()
    ids, mask = pad_rows(rows, side)
    got = prompted(host)(ids, mask).logits
    plain = host(ids, attention_mask=mask).logits
    near = 1e-9 if precision(attention) == torch.float64 else 1e-4
    for i, row in enumerate(rows):
        one = IN.get(len(row))
        if one is None:
            assert torch.equal(got[i], plain[i])
            continue
        want = host(longer(row, one)).logits[0, shown_columns(row, one)]
        torch.testing.assert_close(got[i, mask[i].bool()], want, atol=near, rtol=near)
        assert (want[-1] - host(row[None]).logits[0, -1]).abs().max() > 1e-2  # control
        assert not got[i, ~mask[i].bool()].any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [1, 3, 50, torch.tensor([2, 6, 8]), torch.tensor([8, 0])], ids=str)
@torch.no_grad()
def test_only_the_logits_that_are_asked_for_come_back(keep, side):
    host = shared_host("llama")
    for lengths in (LENGTHS, (9, 7)):  # some and all of the rows become longer
        ids, mask = pad_rows(some_rows(lengths), side)
        edited = prompted(host)
        whole, some = edited(ids, mask).logits, edited(ids, mask, logits_to_keep=keep).logits
        columns = torch.arange(ids.shape[1])
        columns = columns[-keep:] if isinstance(keep, int) else keep
        assert some.shape == (len(ids), len(columns), whole.shape[-1])
        for row, want, real in zip(some, whole[:, columns], mask[:, columns].bool(), strict=True):
            torch.testing.assert_close(row[real], want[real], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_rows_without_a_word_more_are_the_host_s_in_a_mixed_batch_and_alone():
    host = shared_host("gpt2")
    ids, mask = pad_rows(some_rows((5, 6)), "left")
    got, want = prompted(host)(ids, mask), host(ids, attention_mask=mask)
    assert torch.equal(got.logits, want.logits)
    assert got.past_key_values.get_seq_length() == ids.shape[1]  # whole, as the host gave it


@torch.no_grad()
def test_the_prompter_sees_the_prompt_alone_and_what_follows_is_kept():
    host, seen = shared_host("llama"), []
    edited = EditedModel(host)

    def prompter(prompts):
        seen.extend(prompts)
        return [Insertion(1, MORE) for _ in prompts]

    edited.prompter = prompter
    [row] = some_rows((9,))
    got = edited(row[None], n_prompt_tokens=torch.tensor([6])).logits[0]
    assert seen == [tuple(row[:6].tolist())]
    want = host(longer(row, Insertion(1, MORE))).logits[0, [0, *range(6, 14)]]
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_are_those_to_the_longer_prompt_alone(family):
    host, rows = shared_host(family, "eager" if family in ("gptj", "gemma2") else "sdpa"), some_rows()
    ids, mask = pad_rows(rows, "left")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD_ID}
    got = prompted(host).generate(ids, attention_mask=mask, **settings)
    plain = host.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(got[:, : ids.shape[1]], ids)
    n_other = 0
    for i, row in enumerate(rows):
        one = IN.get(len(row))
        if one is None:
            assert torch.equal(got[i], plain[i])
            continue
        alone = longer(row, one)
        want = host.generate(alone, attention_mask=torch.ones_like(alone), **settings)
        assert got[i, ids.shape[1] :].tolist() == want[0, alone.shape[1] :].tolist()
        n_other += not torch.equal(got[i], plain[i])
    assert n_other  # control


@pytest.mark.parametrize("lengths", [LENGTHS, (9, 7)], ids=["some", "all"])
@pytest.mark.parametrize("how", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2}], ids=str)
def test_beams_and_several_replies(how, lengths):
    host, rows = shared_host("llama"), some_rows(lengths)
    ids, mask = pad_rows(rows, "left")
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD_ID, **how}
    got = prompted(host).generate(ids, attention_mask=mask, **settings)
    n = how.get("num_return_sequences", 1)
    assert len(got) == n * len(rows)
    assert torch.equal(got[:, : ids.shape[1]], ids.repeat_interleave(n, 0))
    for i, row in enumerate(rows):
        one = IN.get(len(row))
        alone = row[None] if one is None else longer(row, one)
        want = host.generate(alone, attention_mask=torch.ones_like(alone), **settings)
        replies = got[i * n : (i + 1) * n, ids.shape[1] :]
        assert replies.tolist() == want[:, alone.shape[1] :].tolist()


def test_sampling_leaves_other_rows_as_the_host_samples_them():
    host = shared_host("llama")
    ids, mask = pad_rows(some_rows(), "left")
    settings = {"max_new_tokens": 5, "do_sample": True, "pad_token_id": PAD_ID, "top_k": 0}
    torch.manual_seed(3)
    want = host.generate(ids, attention_mask=mask, **settings)
    torch.manual_seed(3)
    got = prompted(host).generate(ids, attention_mask=mask, **settings)
    assert torch.equal(got[[1, 3]], want[[1, 3]])
    assert not torch.equal(got, want)  # control


@pytest.mark.parametrize("how", [{"max_length": 15}, {"max_length": 15, "min_length": 14}], ids=str)
def test_lengths_count_what_was_shown(how):
    """By argument, by a config, or by the host's own."""
    host = tiny_host("llama")
    ids, mask = pad_rows(some_rows(), "left")
    settings = {"do_sample": False, "pad_token_id": PAD_ID, "attention_mask": mask}
    if "min_length" in how:  # every token would end a reply
        settings["eos_token_id"] = list(range(3, host.config.vocab_size))
    got = prompted(host).generate(ids, **settings, **how)
    assert got.shape[1] == 15
    if "min_length" in how:
        assert bool((got[0, 9:14] < 3).all())  # no end before
        assert got[0, 14] >= 3
        return
    for name, value in how.items():
        setattr(host.generation_config, name, value)
    assert torch.equal(prompted(host).generate(ids, **settings), got)


def test_replies_of_unequal_length_are_filled_up():
    host, rows = shared_host("llama"), some_rows()
    ids, mask = pad_rows(rows, "left")
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    free = prompted(host).generate(ids, **settings, pad_token_id=PAD_ID)
    stop = int(free[0, ids.shape[1] + 1])  # ends the first row's reply early
    got = prompted(host).generate(ids, **settings, eos_token_id=stop, pad_token_id=EOS_ID)
    reply = got[0, ids.shape[1] :].tolist()
    end = reply.index(stop)
    assert reply[: end + 1] == free[0, ids.shape[1] : ids.shape[1] + end + 1].tolist()
    assert set(reply[end + 1 :]) <= {EOS_ID}


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
@torch.no_grad()
def test_what_does_not_fit_the_context_is_left_out_and_nothing_breaks(family):
    host = shared_host(family)  # a context of 64 tokens
    rows = some_rows((9, 61, 60))
    where = {9: IN[9], 61: Insertion(1, MORE), 60: Insertion(1, MORE[:2])}
    ids, mask = pad_rows(rows, "right")
    got, plain = prompted(host, where)(ids, mask).logits, host(ids, attention_mask=mask).logits
    assert torch.equal(got[1], plain[1])  # 66 tokens: left out
    assert not torch.equal(got[2], plain[2])  # 62: put in
    ids, mask = pad_rows(rows, "left")
    settings = {"do_sample": False, "pad_token_id": PAD_ID, "max_new_tokens": 3}
    reply = prompted(host, where).generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    plain = host.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    assert torch.equal(reply[1], plain[1])
    assert reply[2, 2] == PAD_ID  # 62 tokens and two more: the context's end ends the reply
    alone = longer(rows[0], where[9])
    want = host.generate(alone, attention_mask=torch.ones_like(alone), **settings)[:, alone.shape[1] :]
    assert torch.equal(reply[:1], want)  # and no other's
    full = {63: Insertion(1, (7,))}
    [row] = some_rows((63,))
    settings["max_new_tokens"] = 1
    assert torch.equal(
        prompted(host, full).generate(row[None], attention_mask=torch.ones(1, 63), **settings),
        host.generate(row[None], attention_mask=torch.ones(1, 63), **settings),
    )  # no room would be left for a reply


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 9, 32)}, "inputs_embeds"),
        ({"labels": torch.zeros(1, 9, dtype=torch.long)}, "labels"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"position_ids": torch.arange(9)[None]}, "position_ids"),
        ({"return_dict": False}, "return_dict=False"),
        ({"recording": Recording()}, "no states to record"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_would_need_more_than_the_prompt_is_refused(extra, message):
    with pytest.raises(InputError, match=message):
        prompted(shared_host("llama"))(random_ids(1, 9), **extra)


@torch.no_grad()
def test_a_cache_is_refused():
    host = shared_host("llama")
    cache = DynamicCache(config=host.config)
    host(random_ids(1, 4), past_key_values=cache)
    with pytest.raises(InputError, match="a prompt out of a cache"):
        prompted(host)(random_ids(1, 9), past_key_values=cache)
    with pytest.raises(GenerationError, match="past_key_values"):
        prompted(host).generate(random_ids(1, 9), past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize(
    "extra",
    [
        {"return_dict_in_generate": True},
        {"position_ids": positions_of(torch.ones(1, 9))},
        {"token_type_ids": torch.zeros(1, 9)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_ways_of_generating_that_are_refused(extra):
    with pytest.raises(GenerationError, match=next(iter(extra))):
        prompted(shared_host("llama")).generate(random_ids(1, 9), max_new_tokens=2, **extra)


def test_a_prompter_acts_alone():
    host = shared_host("llama")
    name = down_projection(host, 0)
    patch = DeltaPatch([torch.zeros(weight_shape(host.get_submodule(name)), dtype=torch.float64)])
    edited = prompted(host)
    for field, value in (("interventions", {Site(0): [open_part()]}), ("patches", {name: patch})):
        with pytest.raises(ConfigError, match="a prompter acts alone"):
            setattr(edited, field, value)
    assert edited.is_enabled
    edited.prompter = None
    assert not edited.is_enabled
    edited.patches = {name: patch}
    with pytest.raises(ConfigError, match="a prompter acts alone"):
        edited.prompter = lambda prompts: [None for _ in prompts]


@torch.no_grad()
def test_the_live_view_and_being_disabled():
    host = shared_host("llama")
    edited = prompted(host)
    view = live_view(edited)
    ids, mask = pad_rows(some_rows(), "left")
    assert torch.equal(view(ids, attention_mask=mask).logits, edited(ids, mask).logits)
    assert torch.equal(view(ids, mask).logits, edited(ids, mask).logits)
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD_ID}
    assert torch.equal(view.generate(ids, **settings), edited.generate(ids, **settings))
    plain, said = host(ids, attention_mask=mask).logits, host.generate(ids, **settings)
    assert not torch.equal(view(ids, attention_mask=mask).logits, plain)  # control
    with edited.disabled():
        assert torch.equal(view(ids, attention_mask=mask).logits, plain)
        assert torch.equal(edited(ids, mask).logits, plain)
        assert torch.equal(view.generate(ids, **settings), said)
        assert torch.equal(edited.generate(ids, **settings), said)
