"""Names to hosts: the embedded models, a folder, a hub id, or a model that is live already.

Torch and transformers are imported where they are used, so that naming a host is quick.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baft.errors import BaftError, ConfigError, HostError, UnsupportedHostError
from baft.hosts.embedded import EMBEDDED, prefetch, quiet, unknown_host

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DeviceMap = str | Mapping[str, Any]
# Bidirectional families say `is_decoder=False`; these two say so as well, though they are causal.
_CAUSAL_IN_SPITE_OF_FLAG = frozenset({"gpt_neox", "gpt_neox_japanese"})


@dataclass(frozen=True, eq=False)
class Host:
    """A language model with its tokenizer.

    Attributes:
        name: What `load_host` was asked for; of a live model, its `name_or_path` or else its class.
        model: The model in evaluation mode; a live one may also be a PEFT model around one.
        tokenizer: The tokenizer that belongs to it.
        label: What it is, in words.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str


def load_host(
    source: str | os.PathLike[str] | tuple[Any, Any],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
) -> Host:
    """Loads a host.

    Args:
        source: An embedded name (`EMBEDDED` lists them), a folder, a hub id (`owner/name`), or a live pair
            `(model, tokenizer)`. A folder that has the name of an embedded host is written `./name`.
        dtype: Precision of the weights. By default float32 for an embedded host (which is made by
            de-quantization) and the checkpoint's own for others.
        device: Where to put the model; "auto" lets accelerate spread it. By default it stays where it loads.
        device_map: In place of one device, one for each module by name, for accelerate. "cpu" and "disk"
            keep weights there that do not fit elsewhere, and every pass has to fetch them.
        offload_folder: Where weights on "disk" are written, if they cannot be read from the checkpoint.
        accept_terms: Whether the terms of an embedded host that has some are accepted; asked for once.

    Returns:
        The host, in evaluation mode. Parameters of a model loaded here need no gradient. A live model is
        put in evaluation mode and otherwise left alone: precision, device and gradients are its owner's.

    Raises:
        UnknownNameError: If the name is neither embedded, nor a folder, nor formed like a hub id.
        ConfigError: If the dtype is unknown, both a device and a device map are given, or a live model is to
            be changed in precision or moved.
        DownloadError: If the files of an embedded host could not be fetched intact.
        TermsError: If its terms were not accepted.
        UnsupportedHostError: If the model does not generate from left to right with a decoder alone.
        HostError: If the host cannot be loaded for another reason.
    """
    placed = _placement(device, device_map, offload_folder)
    if not isinstance(source, (str, os.PathLike)):
        return _live_host(source, dtype, placed)
    if isinstance(source, str) and (spec := EMBEDDED.get(source)):
        folder = prefetch(source, accept_terms=accept_terms)
        return _load(str(folder), dtype or "float32", placed, name=source, label=spec.label)
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise HostError(f"{path} holds no config.json: give the folder that save_pretrained wrote")
        return _load(str(path), dtype, placed, name=name, label=f"folder {path.resolve().name}")
    if path.exists():
        raise HostError(f"{path} is a file: give the folder that holds config.json and the weights")
    if not isinstance(source, str) or name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise HostError(f"there is no folder {path}: check the path, or give a hub id like owner/name")
    if "/" not in name:
        raise unknown_host(name)
    return _load(name, dtype, placed, name=name, label=f"hub model {name}")


def _placement(
    device: str | torch.device | None,
    device_map: DeviceMap | None,
    offload_folder: str | os.PathLike[str] | None,
) -> dict[str, Any]:
    """Where the model goes, in the words of transformers; empty where nothing is asked for."""
    if device is not None and device_map is not None:
        raise ConfigError(f"give either device= or device_map=, got both ({device!r} and {device_map!r})")
    if device_map is None:
        device_map = "auto" if device == "auto" else None
    if offload_folder is not None and device_map is None:
        raise ConfigError('offload_folder= goes with device_map= (or device="auto"): give the map too')
    if device_map is None:
        return {} if device is None else {"device": device}
    placed: dict[str, Any] = {"device_map": device_map if isinstance(device_map, str) else dict(device_map)}
    return placed if offload_folder is None else {**placed, "offload_folder": os.fspath(offload_folder)}


def _load(
    where: str, dtype: str | torch.dtype | None, placed: Mapping[str, Any], *, name: str, label: str
) -> Host:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"dtype": _checked_dtype(dtype), **placed}
    device = options.pop("device", None)
    try:
        with quiet():
            if not Path(where, "adapter_config.json").is_file():  # before gigabytes are read in vain
                _require_causal(AutoConfig.from_pretrained(where), name)
            model: Any = AutoModelForCausalLM.from_pretrained(where, **options)
            tokenizer = AutoTokenizer.from_pretrained(where)
        if device is not None:
            model.to(device)
    except BaftError:
        raise
    except Exception as error:  # transformers, the hub, safetensors and torch share no root for their errors
        raise HostError(f"could not load {label}: {error}. {_mend(name, where)}") from error
    model.eval().requires_grad_(False)
    kind = type(model).__name__
    return Host(name, model, tokenizer, label if name in EMBEDDED else f"{kind}, {label}")


def _mend(name: str, where: str) -> str:
    if name in EMBEDDED:
        return f"If its files are damaged, delete {where}: it is then fetched again"
    if Path(where).is_dir():
        return "Check that the folder holds config.json, the weights and the tokenizer, undamaged"
    return "Without network or access to this repository, give a local folder or an embedded host instead"


def _checked_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    import torch

    if dtype is None or dtype == "auto":
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    raise ConfigError(f"dtype must be 'auto' or like 'float32', 'bfloat16', 'float16'; got {dtype!r}")


def _require_causal(config: Any, name: str) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    family = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedHostError(f"{name} ({family}) is an encoder-decoder: baft edits decoders alone")
    looks_both_ways = getattr(config, "is_decoder", None) is False and family not in _CAUSAL_IN_SPITE_OF_FLAG
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or looks_both_ways:
        raise UnsupportedHostError(f"{name} ({family}) is not causal: baft edits causal models alone")


def _live_host(source: tuple[Any, Any], dtype: str | torch.dtype | None, placed: Mapping[str, Any]) -> Host:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    model, tokenizer = source if isinstance(source, (tuple, list)) and len(source) == 2 else (source, None)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT wraps the model
    if not isinstance(base, PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        got = f"({type(model).__name__}, {type(tokenizer).__name__})" if tokenizer else type(model).__name__
        raise ConfigError(f"a host is a name, a folder, a hub id or a pair (model, tokenizer); got {got}")
    if dtype is not None or placed:
        raise ConfigError("a live model keeps its dtype and device: convert or move it before passing it")
    kind = type(base).__name__
    name = base.name_or_path or kind
    if not base.can_generate():
        raise UnsupportedHostError(f"{name} ({kind}) does not generate: give a model with a language head")
    _require_causal(base.config, name)
    model.eval()
    return Host(name, model, tokenizer, f"{kind}, live")
