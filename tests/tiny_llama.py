"""A tiny Llama and a tokenizer of whole words, to be saved and loaded."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("<unk>", "Paris", "Rome", "is", "in", "France", "Italy", "the")


def tiny_tokenizer():
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def tiny_config():
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config())
