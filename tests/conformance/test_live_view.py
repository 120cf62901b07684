"""The live view: a `PreTrainedModel` for any library, with the edits in force."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    pipeline,
)

from baft.errors import UnsupportedHostError
from baft.hosts.architecture import Site
from baft.hosts.edited_model import EditedModel
from baft.hosts.live_view import live_view
from tiny import (
    CHATML,
    PAD_ID,
    open_part,
    random_ids,
    shared_host,
    some_interventions,
    tiny_host,
    tiny_tokenizer,
)

PEFT_IS_BEHIND = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
OPTIONS = {"max_new_tokens": 5, "do_sample": False}


def counts(*numbers):
    return torch.tensor(numbers)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "opt"])
def test_the_live_view_is_the_host_s_class_with_the_edits_in_force(family):
    host = shared_host(family)
    edited = EditedModel(host, some_interventions(host))
    view = live_view(edited)
    assert isinstance(view, PreTrainedModel)
    assert isinstance(view, type(host))
    assert (type(view).__name__, type(view).__module__) == (type(host).__name__, type(host).__module__)
    ids = random_ids(2, 9)
    assert torch.equal(view(ids).logits, edited(ids).logits)
    assert torch.equal(view(input_ids=ids).logits, edited(ids).logits)
    n = counts(6, 4)
    assert torch.equal(view(ids, n_prompt_tokens=n).logits, edited(ids, n_prompt_tokens=n).logits)
    assert not torch.equal(view(ids).logits, host(ids).logits)
    for given in ((ids,), ()):
        named = {} if given else {"input_ids": ids}
        assert torch.equal(view.generate(*given, **named, **OPTIONS), edited.generate(ids, **OPTIONS))
    with edited.disabled():
        assert torch.equal(view(ids).logits, host(ids).logits)
        assert torch.equal(view.generate(ids, **OPTIONS), host.generate(ids, **OPTIONS))
    assert [id(p) for p in view.parameters()] == [id(p) for p in host.parameters()]
    assert view(inputs_embeds=host.get_input_embeddings()(ids)).logits.shape == (2, 9, host.config.vocab_size)


def test_the_live_view_hands_on_keywords_that_the_host_only_catches():
    seen = []
    host = tiny_host("llama")
    view = live_view(EditedModel(host, {Site(0): [open_part()]}))
    inner = host.model.forward

    def forward(*args, **keywords):
        seen.append(keywords)
        return inner(*args, **keywords)

    host.model.forward = forward
    view(random_ids(1, 4), num_items_in_batch=3)
    assert seen[0]["num_items_in_batch"] == 3
    assert "kwargs" not in seen[0]


def test_a_generation_config_put_on_the_view_is_obeyed(host, edited):
    view = live_view(edited)
    ids = random_ids(1, 6)
    before = view.generate(ids, max_new_tokens=2).shape[1]
    view.generation_config = GenerationConfig(max_new_tokens=7, pad_token_id=PAD_ID)
    assert (before, view.generate(ids).shape[1]) == (8, 13)
    assert host.generation_config.max_new_tokens is None


def test_a_pipeline_runs_on_the_view(host, edited):
    tokenizer = tiny_tokenizer(side="left", chat_template=CHATML)
    for model in (live_view(edited), host):
        run = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        texts = ["Rome is", "The capital of the country"]
        got = run(texts, batch_size=2, return_tensors=True, **OPTIONS)
        for text, (row,) in zip(texts, got, strict=True):
            ids = tokenizer(text, return_tensors="pt").input_ids
            alone = edited.generate(ids, **OPTIONS)[0, ids.shape[1] :].tolist()
            same = row["generated_token_ids"][-5:] == alone
            assert same == (model is not host)


def test_what_the_view_saves_is_the_host(host, edited, tmp_path):
    live_view(edited).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(again) is type(host)
    ids = random_ids(1, 7)
    # Rounding: a reloaded host makes the frequencies of its positions in float64 at once.
    torch.testing.assert_close(again(ids).logits, host(ids).logits, rtol=0, atol=1e-5)
    assert (again(ids).logits - edited(ids).logits).abs().max() > 1e-2  # control


def test_a_view_is_no_host(edited):
    with pytest.raises(UnsupportedHostError, match="live view"):
        EditedModel(live_view(edited))
