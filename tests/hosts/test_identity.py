import copy
import dataclasses
import json
import time
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from baft.errors import DamagedArtifactError, HostMismatchError
from baft.hosts import identity
from baft.hosts.identity import HostIdentity, compare, identify
from baft.hosts.models import Host, load_host
from tiny import tiny_host

FLOATS = ("float32", "bfloat16", "float16")
OTHER = "same_weights_other_precision"


def tiny_tokenizer(words=("<unk>", "The", "in", "Rome")):
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**fields | changes))
    with torch.no_grad():
        for parameter in model.parameters():  # norms are ones at first, which every precision holds exactly
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model


def who(model, name="tiny", tokenizer=None):
    return identify(Host(name, model, tokenizer or tiny_tokenizer(), "a test"))


def cast(model, dtype):
    return copy.deepcopy(model).to(getattr(torch, dtype))


def tuned(model, relative):
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + relative * torch.randn(parameter.shape, generator=generator))
    return model


def coded(model):
    """The model with its matrices as 8-bit codes beside a scale, as bitsandbytes has them."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            codes = (module.weight / module.weight.abs().max() * 127).round().to(torch.int8)
            module.weight = torch.nn.Parameter(codes, requires_grad=False)
    return model


def off_by(model, relative):
    """The model as it looks after quantization and back: matrices are a little off, vectors are not."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(relative * parameter.std() * torch.randn_like(parameter))
    return model


def as_quantized(found):
    matrices = tuple(name for name in found.samples if "norm" not in name)
    return dataclasses.replace(found, dtype=f"{found.dtype}, quantized", inexact=matrices)


class TestSame:
    def test_itself_and_a_copy(self):
        model = tiny_model()
        assert compare(who(model), who(copy.deepcopy(model), "other name")) == "same"

    def test_after_a_round_trip_through_json(self):
        before = who(tiny_model())
        after = HostIdentity.from_dict(json.loads(json.dumps(before.to_dict())))
        assert after == before
        assert compare(before, after) == "same"

    def test_after_saving_and_loading(self, tmp_path):
        model, tokenizer = tiny_model(), tiny_tokenizer()
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        loaded = identify(load_host(tmp_path))
        assert compare(who(model, tokenizer=tokenizer), loaded) == "same"
        assert loaded.tokenizer_hash == who(model).tokenizer_hash

    def test_how_a_model_is_run_does_not_matter(self):
        model = tiny_model()
        before = who(model)
        model.config.update(
            {"use_cache": False, "pad_token_id": 3, "of_a_later_version": None, "another": []}
        )
        assert compare(before, who(model.eval())) == "same"


class TestPrecision:
    @pytest.mark.parametrize("expected", FLOATS)
    @pytest.mark.parametrize("actual", FLOATS)
    def test_casts_of_one_model(self, expected, actual):
        model = tiny_model()
        found = compare(who(cast(model, expected)), who(cast(model, actual)))
        assert found == ("same" if expected == actual else OTHER)

    def test_bfloat16_turned_into_float16_and_back_into_float32(self):
        brain = cast(tiny_model(), "bfloat16")
        assert compare(who(brain), who(cast(brain, "float16"))) == OTHER
        assert compare(who(brain), who(cast(brain, "float32"))) == OTHER
        assert compare(who(cast(brain, "float32")), who(tiny_model())) == OTHER

    def test_norms_kept_in_float32(self):
        model = tiny_model()
        mixed = cast(model, "bfloat16")
        mixed.model.norm.weight.data = model.model.norm.weight.data
        assert compare(who(model), who(mixed)) == OTHER
        assert compare(who(mixed), who(cast(model, "bfloat16"))) == OTHER

    @pytest.mark.parametrize("expected", FLOATS)
    @pytest.mark.parametrize("actual", FLOATS)
    @pytest.mark.parametrize("relative", [1e-3, 0.1])
    def test_a_fine_tune_is_no_cast(self, expected, actual, relative):
        model = tiny_model()
        with pytest.raises(HostMismatchError, match="other weights"):
            compare(who(cast(model, expected)), who(cast(tuned(model, relative), actual)))

    def test_one_changed_matrix_among_unsampled_ones(self):
        model = tiny_model(num_hidden_layers=16)
        changed = copy.deepcopy(model)
        before = who(model)
        name = next(name for name, _ in model.named_parameters() if name not in before.samples)
        changed.get_parameter(name).data.mul_(1.01)
        for dtype in FLOATS[:2]:
            with pytest.raises(HostMismatchError):
                compare(before, who(cast(changed, dtype)))


class TestOthers:
    def test_another_start(self):
        with pytest.raises(
            HostMismatchError, match=r"this host \(b, float32\).*expected \(a, float32\).*Load a"
        ):
            compare(who(tiny_model(0), "a"), who(tiny_model(1), "b"))

    def test_another_config(self):
        with pytest.raises(HostMismatchError, match="with config"):
            compare(who(tiny_model()), who(tiny_model(rms_norm_eps=1e-3)))

    def test_another_family(self):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=64, n_positions=16))
        with pytest.raises(HostMismatchError, match="GPT2LMHeadModel, expected LlamaForCausalLM"):
            compare(who(tiny_model()), who(gpt2))

    def test_the_tokenizer_is_left_to_the_caller(self):
        one, other = who(tiny_model()), who(tiny_model(), tokenizer=tiny_tokenizer(("<unk>", "Rome")))
        assert one.tokenizer_hash != other.tokenizer_hash
        assert compare(one, other) == "same"


class TestQuantized:
    def test_codes_are_hashed_but_not_sampled(self):
        model = tiny_model()
        plain, quantized = who(model), who(coded(model))
        assert quantized.dtype == "float32, quantized"
        assert quantized.is_quantized
        assert not plain.is_quantized
        assert quantized.n_parameters == plain.n_parameters
        assert set(quantized.samples) < set(plain.samples)
        assert compare(quantized, who(coded(tiny_model()))) == "same"
        with pytest.raises(HostMismatchError):
            compare(quantized, who(coded(tiny_model(1))))

    def test_what_is_not_quantized_decides(self):
        # Enough vectors for half of the samples, as in a real host.
        model = tiny_model(num_hidden_layers=16)
        assert compare(who(model), who(coded(model))) == OTHER
        assert compare(who(cast(model, "bfloat16")), who(coded(model))) == OTHER
        for another in (tiny_model(1, num_hidden_layers=16), tuned(model, 1e-3)):
            with pytest.raises(HostMismatchError, match="differs, and not by its precision"):
                compare(who(model), who(coded(another)))

    def test_too_little_is_not_quantized(self):
        with pytest.raises(HostMismatchError, match=r"of 21 sampled parameters are here, too few"):
            compare(who(tiny_model()), who(coded(tiny_model())))

    def test_weights_read_back_are_compared_with_a_tolerance(self):
        model = tiny_model()
        assert compare(who(model), as_quantized(who(off_by(model, 0.1)))) == OTHER
        with pytest.raises(HostMismatchError, match="of their size"):
            compare(who(model), as_quantized(who(off_by(model, 0.5))))
        with pytest.raises(HostMismatchError, match="differs"):
            compare(who(model), as_quantized(who(tuned(off_by(model, 0.1), 1e-3))))

    def test_nan_is_a_mismatch(self):
        model = tiny_model()
        broken = copy.deepcopy(model)
        broken.lm_head.weight.data.fill_(float("nan"))
        with pytest.raises(HostMismatchError, match="by nan"):
            compare(who(model), as_quantized(who(broken)))

    @pytest.mark.parametrize("readable", [True, False])
    def test_tensor_subclasses_are_read_back_where_they_can_be(self, monkeypatch, readable):
        class Packed:
            def dequantize(self):
                if not readable:
                    raise NotImplementedError
                return torch.ones(4)

        monkeypatch.setattr(
            identity, "is_traceable_wrapper_subclass", lambda value: isinstance(value, Packed)
        )
        found = dict(identity._values([("a", Packed()), ("b", torch.zeros(2)), ("c", torch.zeros(2).int())]))
        kinds = {name: values.kind for name, values in found.items()}
        assert kinds == ({"a": "read back"} if readable else {}) | {"b": "plain", "c": "code"}


class TestOffloaded:
    def test_what_is_here_decides(self):
        model = tiny_model()
        half = copy.deepcopy(model)
        half.model.layers[1].to("meta")
        found = who(half)
        assert found.n_parameters < who(model).n_parameters
        assert compare(who(model), found) == OTHER
        other = tuned(model, 1e-3)
        other.model.layers[1].to("meta")
        with pytest.raises(HostMismatchError, match="other weights"):
            compare(who(model), who(other))

    def test_nothing_is_here(self):
        with pytest.raises(HostMismatchError, match="0 of 21 sampled parameters"):
            compare(who(tiny_model()), who(copy.deepcopy(tiny_model()).to("meta")))

    def test_samples_of_another_size(self):
        one = who(tiny_model())
        name = next(iter(one.samples))
        other = dataclasses.replace(
            one, weights_hash="", n_parameters=1, samples=one.samples | {name: one.samples[name][:3]}
        )
        with pytest.raises(HostMismatchError, match="another size"):
            compare(one, other)


class TestPlainData:
    def test_is_small_and_bounded(self):
        found = who(tiny_model(num_hidden_layers=20))
        assert len(found.samples) == identity.N_SAMPLED_PARAMETERS
        assert all(len(values) == identity.N_SAMPLED_VALUES for values in found.samples.values())
        assert len(json.dumps(found.to_dict())) < 20_000

    @pytest.mark.parametrize(
        "damage",
        [
            lambda row: row.pop("samples"),
            lambda row: row.pop("dtype"),
            lambda row: row.update(color="red"),
            lambda row: row.update(samples={"a": ["x"]}),
            lambda row: row.update(cast_hashes=None),
        ],
    )
    def test_damage_is_told(self, damage):
        row = who(tiny_model()).to_dict()
        damage(row)
        with pytest.raises(DamagedArtifactError, match="identity cannot be read"):
            HostIdentity.from_dict(row)

    def test_a_peft_model_is_known_by_the_class_inside(self):
        inner = tiny_model()
        wrapped = SimpleNamespace(get_base_model=lambda: inner, named_parameters=inner.named_parameters)
        assert identity._base(wrapped) is inner


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT is behind
def test_adapters_are_told_apart_by_which_is_active():
    host = tiny_host("llama")
    wrapped = get_peft_model(host, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="first")
    wrapped.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    made = who(wrapped)
    assert compare(made, who(wrapped)) == "same"
    wrapped.set_adapter("second")
    with pytest.raises(HostMismatchError):
        compare(made, who(wrapped))
    wrapped.set_adapter("first")
    with wrapped.disable_adapter(), pytest.raises(HostMismatchError):
        compare(made, who(wrapped))
    assert compare(made, who(wrapped)) == "same"
    for module in wrapped.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("first", 32.0)
    with pytest.raises(HostMismatchError):
        compare(made, who(wrapped))


@pytest.mark.real_host
def test_real_host_in_three_precisions():
    found = {dtype: identify(load_host("smollm2", dtype=dtype)) for dtype in FLOATS}
    for expected in FLOATS:
        for actual in FLOATS:
            assert compare(found[expected], found[actual]) == ("same" if expected == actual else OTHER)
    host = load_host("smollm2")
    start = time.perf_counter()
    identify(host)
    assert time.perf_counter() - start < 1  # about 0.02 s
