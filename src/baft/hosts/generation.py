"""Ways of generating: what settings rule one, and which are refused while edits are in force."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from baft.errors import GenerationError


def generation_settings(host: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What rules one generation: what is given, before the given config, before the host's own."""
    layers = [host.generation_config, arguments.get("generation_config")]
    settings: dict[str, Any] = {}
    for config in layers:
        settings |= {} if config is None else {k: v for k, v in vars(config).items() if v is not None}
    return settings | {k: v for k, v in arguments.items() if v is not None}


def guess_mask(input_ids: Int[Tensor, "batch pos"], settings: Mapping[str, Any]) -> Int[Tensor, "batch pos"]:
    """The host's own guess where no mask is given: pad tokens are padding unless they end texts."""
    pad, eos = settings.get("pad_token_id"), settings.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [eos]
    if pad is None or pad in ends:
        return torch.ones_like(input_ids)
    return (input_ids != pad).long()


def refuse_unsafe_generation(settings: Mapping[str, Any]) -> None:
    """Refuses ways of generating in which an edit could not tell prompt from output.

    Raises:
        GenerationError: If the settings ask for one.
    """
    for name, what in (
        ("assistant_model", "assisted decoding"),
        ("assistant_early_exit", "assisted decoding by early exit"),
        ("use_mtp", "assisted decoding by multi-token prediction"),
        ("prompt_lookup_num_tokens", "prompt lookup decoding"),
        ("custom_generate", "custom generation code"),
        ("trust_remote_code", "custom generation code"),
        ("token_healing", "token healing"),
        ("inputs_embeds", "a prompt of embeddings"),
        ("guidance_scale", "classifier-free guidance"),
    ):
        value = settings.get(name)
        if value is None or value is False or (name == "guidance_scale" and value == 1):
            continue
        raise GenerationError(
            f"{what} ({name}) shows the host more than the prompt and what follows it, and an edit could not "
            f"tell prompt from output: generate without it, or inside disabled()"
        )
    if settings.get("cache_implementation") == "paged":
        raise no_continuous_batching()


def no_continuous_batching() -> GenerationError:
    """The error that refuses continuous batching."""
    return GenerationError(
        "continuous batching packs several requests into one row, and an edit could not tell prompt from "
        "output: use generate with a padded batch, or batch inside disabled()"
    )
