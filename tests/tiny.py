"""Tiny random hosts of many families, tokenizers built on the spot, and interventions that do something."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from baft.hosts.architecture import Site, find_architecture, intervention_dtype
from baft.nn.gates import Gate, LogisticGate, OpenGate
from baft.nn.interventions import SubspaceIntervention
from baft.nn.orthonormal import random_orthonormal

SPECIALS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
PAD, BOS, EOS = SPECIALS[:3]
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
MERGES = (("Ġ", "R"), ("o", "f"))
VOCAB_SIZE = len(SPECIALS) + 256 + len(MERGES)
D_MODEL, N_LAYERS, SLIDING_WINDOW = 32, 3, 6
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_GPT2 = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
_MODERN = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "gpt_neox": {
        key: value for key, value in _MODERN.items() if key not in ("num_key_value_heads", "head_dim")
    },
    "opt": {
        "hidden_size": D_MODEL,
        "word_embed_proj_dim": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
        "init_std": 0.2,
    },
    "llama": _MODERN,
    "mistral": {**_MODERN, "sliding_window": SLIDING_WINDOW},
    "qwen2": _MODERN,
    "qwen3": _MODERN,
    "phi3": _MODERN,
    "gemma2": {
        **_MODERN,
        "sliding_window": SLIDING_WINDOW,
        "query_pre_attn_scalar": 8,
        "layer_types": _ALTERNATING,
    },
    "gemma3_text": {
        **_MODERN,
        "sliding_window": SLIDING_WINDOW,
        "query_pre_attn_scalar": 8,
        "layer_types": _ALTERNATING,
    },
    "mixtral": {**_MODERN, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
FAMILIES = tuple(_CONFIGS)
# Of these, transformers has only its own attention.
_EAGER_ONLY = ("gptj", "gemma2")
HOSTS = [(family, "eager" if family in _EAGER_ONLY else "sdpa") for family in FAMILIES] + [("llama", "eager")]


def tiny_host(
    family: str = "llama",
    *,
    attention: Literal["eager", "sdpa"] = "sdpa",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    device: str = "cpu",
    **overrides: Any,
) -> PreTrainedModel:
    """A random host, the same for the same arguments; its greedy texts vary and never end by themselves."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    config = CONFIG_MAPPING[family](**{**settings, **_CONFIGS[family], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"attn_implementation": attention, "dtype": torch.float32}
        if family == "mixtral":  # the grouped product of its experts knows no float64
            options["experts_implementation"] = "eager"
        host = AutoModelForCausalLM.from_config(config, **options)
        host = host.to(dtype=dtype, device=device).eval().requires_grad_(False)
    host.generation_config = GenerationConfig(pad_token_id=PAD_ID, bos_token_id=BOS_ID)
    return host


@functools.cache
def shared_host(family: str, attention: Literal["eager", "sdpa"] = "sdpa") -> PreTrainedModel:
    """A host that tests share, because none of them changes it.

    It is float64, but float32 with eager attention: transformers takes its softmax in float32 whatever
    the host, and a float64 row that is all padding comes out of that as NaN.
    """
    return tiny_host(family, attention=attention, dtype=precision(attention))


def precision(attention: str) -> torch.dtype:
    """In which precision hosts of this attention are compared."""
    return torch.float32 if attention == "eager" else torch.float64


def tiny_tokenizer(
    *,
    bos: bool = True,
    eos: bool = True,
    pad: bool = True,
    adds_bos: bool = True,
    adds_eos: bool = False,
    bos_is_eos: bool = False,
    chat_template: str | None = None,
    side: str = "right",
    normalizer: Any = None,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with two merges, " R" and "of", and the special tokens that are asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIALS, *alphabet, *(left + right for left, right in MERGES)]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(MERGES)))
    inner.add_special_tokens(list(SPECIALS))
    start = EOS if bos_is_eos else BOS
    template = [*([start] if bos and adds_bos else []), "$A", *([EOS] if eos and adds_eos else [])]
    parts = {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "post_processor": processors.TemplateProcessing(
            single=" ".join(template), special_tokens=[(BOS, BOS_ID), (EOS, EOS_ID)]
        ),
        "decoder": decoders.ByteLevel(),
    }
    for part, value in parts.items():
        setattr(inner, part, value)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=start if bos else None,
        eos_token=EOS if eos else None,
        pad_token=PAD if pad else None,
        chat_template=chat_template,
        padding_side=side,
    )


def random_ids(n_rows: int, n_tokens: int, *, seed: int = 0) -> Tensor:
    """Random rows that begin with BOS and hold no other special token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(SPECIALS), VOCAB_SIZE, (n_rows, n_tokens), generator=generator)
    ids[:, 0] = BOS_ID
    return ids


def pad_rows(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as a batch: token ids and attention mask."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), PAD_ID, device=rows[0].device)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def positions_of(mask: Tensor) -> Tensor:
    """Position ids as generation counts them: padding takes no position."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def open_part(*, seed: int = 0, dtype: torch.dtype = torch.float64, rank: int = 3) -> SubspaceIntervention:
    """A random intervention that acts on every state."""
    return _part(lambda n: OpenGate(n, rank), seed=seed, dtype=dtype, rank=rank)


def shut_part(*, seed: int = 0, dtype: torch.dtype = torch.float64, rank: int = 3) -> SubspaceIntervention:
    """A random intervention whose gate opens on no state."""

    def gate(n_blocks: int) -> Gate:
        slopes = torch.zeros(n_blocks, rank, D_MODEL, dtype=dtype)
        return LogisticGate(slopes, torch.full((n_blocks, rank), -20.0, dtype=dtype), threshold=0.5)

    return _part(gate, seed=seed, dtype=dtype, rank=rank)


def half_open_part(
    host: PreTrainedModel, site: Site, *, seed: int = 0, rank: int = 3
) -> SubspaceIntervention:
    """A random intervention whose gate is exactly zero on about half of the host's states at a site."""
    dtype = intervention_dtype(host)
    states = states_at(host, site, random_ids(8, 12, seed=seed + 7)).to(dtype)
    direction = _normal(D_MODEL, seed=seed + 1).to(dtype)
    direction = 6.0 * direction / (states @ direction).std()
    offset = -(states @ direction).median()

    def gate(n_blocks: int) -> Gate:
        slopes, intercepts = direction.expand(n_blocks, rank, -1), offset.expand(n_blocks, rank)
        return LogisticGate(slopes.contiguous(), intercepts.contiguous(), threshold=0.5)

    return _part(gate, seed=seed, dtype=dtype, rank=rank)


def some_interventions(host: PreTrainedModel) -> dict[Site, list[SubspaceIntervention]]:
    """Open and half open gates, one and two parts to a site."""
    first, last = Site(0), Site(N_LAYERS - 1)
    return {
        first: [half_open_part(host, first, seed=1), open_part(seed=2, dtype=intervention_dtype(host))],
        last: [half_open_part(host, last, seed=3)],
    }


def states_at(host: PreTrainedModel, site: Site, ids: Tensor) -> Tensor:
    """The host's own states at a site, `[token, d_model]`, by a hook of our own."""
    caught: list[Tensor] = []

    def catch(_: object, __: object, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = find_architecture(host).block(site).register_forward_hook(catch)
    try:
        host(ids.to(next(host.parameters()).device))
    finally:
        handle.remove()
    return caught[0].flatten(0, 1).cpu()


def _part(
    gate: Callable[[int], Gate], *, seed: int, dtype: torch.dtype, rank: int, n_blocks: int = 2
) -> SubspaceIntervention:
    generator = torch.Generator().manual_seed(seed)
    R = random_orthonormal(n_blocks, rank, D_MODEL, generator=generator, dtype=dtype)
    A = R + 0.5 * _normal(n_blocks, rank, D_MODEL, seed=seed + 100).to(dtype)
    b = 2.0 * _normal(n_blocks, rank, seed=seed + 200).to(dtype)
    return SubspaceIntervention(R, A, b, gate(n_blocks)).requires_grad_(False)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
