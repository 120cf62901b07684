import logging
import time
from pathlib import Path

import peft
import pytest
import torch
from transformers import (
    AutoConfig,
    BertConfig,
    BertLMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as hf_logging

from baft.errors import ConfigError, HostError, UnknownNameError, UnsupportedHostError
from baft.hosts.models import load_host
from tiny_llama import tiny_config, tiny_model, tiny_tokenizer

PEFT_IS_BEHIND = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tiny-llama"
    tiny_model().bfloat16().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


class TestFoldersAndHub:
    def test_folder_keeps_the_precision_of_its_checkpoint(self, folder):
        host = load_host(folder)
        assert host.model.dtype == torch.bfloat16
        assert host.name == str(folder)
        assert host.label == "LlamaForCausalLM, folder tiny-llama"
        assert not host.model.training
        assert load_host(str(folder), dtype=torch.float32, device="cpu").model.dtype == torch.float32
        assert load_host(folder, dtype="float16", device="auto").model.dtype == torch.float16

    def test_loading_is_silent_and_leaves_the_settings_of_transformers(self, folder, capfd):
        verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
        hf_logging.enable_progress_bar()
        hf_logging.set_verbosity(logging.INFO)
        try:
            load_host(folder)
            assert hf_logging.is_progress_bar_enabled()
            assert hf_logging.get_verbosity() == logging.INFO
        finally:
            hf_logging.set_verbosity(verbosity)
            if not bars:
                hf_logging.disable_progress_bar()
        assert capfd.readouterr() == ("", "")

    @PEFT_IS_BEHIND
    def test_folder_of_an_adapter(self, folder, tmp_path):
        peft.get_peft_model(LlamaForCausalLM.from_pretrained(folder), peft.LoraConfig(r=2)).save_pretrained(
            tmp_path / "adapter"
        )
        tiny_tokenizer().save_pretrained(tmp_path / "adapter")
        assert load_host(tmp_path / "adapter").label == "LlamaForCausalLM, folder adapter"

    @pytest.mark.parametrize(
        "source", ["./nowhere", "/no/where", "~/no-where-at-all", "a/b/c", Path("nowhere")]
    )
    def test_missing_folder(self, source):
        with pytest.raises(HostError, match="there is no folder"):
            load_host(source)

    def test_folder_without_config(self, tmp_path):
        with pytest.raises(HostError, match=r"holds no config\.json"):
            load_host(tmp_path)

    def test_file(self, folder):
        with pytest.raises(HostError, match="is a file"):
            load_host(folder / "config.json")

    def test_folder_without_weights(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(HostError, match="Check that the folder holds"):
            load_host(folder)

    @pytest.mark.parametrize("near", ["smolm2", "SmolLM2", "gemma-270m"])
    def test_did_you_mean(self, near):
        with pytest.raises(
            UnknownNameError, match=r"did you mean '(smollm2|gemma3-270m)'.*smollm2, gemma3-270m"
        ):
            load_host(near)

    def test_hub_that_cannot_be_reached(self, monkeypatch):
        def offline(*_, **__):
            raise OSError("We couldn't connect")

        monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
        with pytest.raises(HostError, match=r"hub model owner/name: We couldn't connect.*local folder"):
            load_host("owner/name")

    def test_unknown_dtype(self, folder):
        for dtype in ("float31", "int8", torch.int8, "nn"):
            with pytest.raises(ConfigError, match="dtype must be"):
                load_host(folder, dtype=dtype)

    def test_unknown_device(self, folder):
        with pytest.raises(HostError, match="device"):
            load_host(folder, device="nowhere")

    def test_encoder_decoder_and_bidirectional_models_are_refused(self, tmp_path):
        T5Config(d_model=16, num_layers=1).save_pretrained(tmp_path / "t5")
        with pytest.raises(UnsupportedHostError, match="encoder-decoder"):
            load_host(tmp_path / "t5")
        BertConfig().save_pretrained(tmp_path / "bert")
        with pytest.raises(UnsupportedHostError, match="not causal"):
            load_host(tmp_path / "bert")


class TestLive:
    def test_is_put_in_evaluation_mode_and_left_alone(self):
        model, tokenizer = tiny_model().train(), tiny_tokenizer()
        host = load_host((model, tokenizer))
        assert host.model is model
        assert host.tokenizer is tokenizer
        assert not model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert (host.name, host.label) == ("LlamaForCausalLM", "LlamaForCausalLM, live")

    def test_is_called_what_it_was_loaded_from(self, folder):
        loaded = load_host(folder)
        assert load_host((loaded.model, loaded.tokenizer)).name == str(folder)

    @PEFT_IS_BEHIND
    def test_peft_model(self):
        wrapped = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        host = load_host((wrapped, tiny_tokenizer()))
        assert host.model is wrapped
        assert host.label == "LlamaForCausalLM, live"

    def test_refuses_to_convert_or_move_it(self):
        for options in ({"dtype": "float16"}, {"device": "cpu"}):
            with pytest.raises(ConfigError, match="keeps its dtype and device"):
                load_host((tiny_model(), tiny_tokenizer()), **options)

    @pytest.mark.parametrize(
        "source",
        [(tiny_tokenizer(), tiny_model()), (tiny_model(), None), (torch.nn.Linear(1, 1), tiny_tokenizer())],
    )
    def test_what_is_no_pair(self, source):
        with pytest.raises(ConfigError, match=r"pair \(model, tokenizer\); got"):
            load_host(source)

    def test_models_that_cannot_be_hosts(self):
        t5 = T5Config(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1, vocab_size=8)
        bert = BertConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
        )
        refused = {
            "encoder-decoder": T5ForConditionalGeneration(t5),
            "not causal": BertLMHeadModel(bert),
            "does not generate": LlamaModel(tiny_config()),
        }
        for why, model in refused.items():
            with pytest.raises(UnsupportedHostError, match=why):
                load_host((model, tiny_tokenizer()))


@pytest.mark.real_host
def test_smollm2_knows_the_capital_of_france():
    host = load_host("smollm2")
    assert "Q4_1" in host.label
    prompt = host.tokenizer("The capital of France is", return_tensors="pt")
    answer = host.model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert host.tokenizer.decode(answer[0, -1]) == " Paris"
    assert host.tokenizer.chat_template
    start = time.perf_counter()
    load_host("smollm2")
    assert time.perf_counter() - start < 10  # about 0.4 s; conversion would take 30
