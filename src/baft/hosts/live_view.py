"""An edited model in the clothes of its host, for libraries that want a `PreTrainedModel`."""

import copy
import functools
import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from baft.hosts.edited_model import EditedModel, PromptLengths
from baft.hosts.generation import no_continuous_batching


def live_view(edited: EditedModel) -> PreTrainedModel:
    """The edited model as a `PreTrainedModel`, for any library that wants one.

    It shares every module and weight with the host and is of the host's class (of a PEFT model, of the
    class that it wraps), but runs with the edits in force. Called without `n_prompt_tokens` (real tokens of
    each row's prompt, BOS included: one number for all rows, or one for each) it edits every token but BOS.
    What it saves is the host, without the edits.
    """
    whole: Any = edited.host
    host: Any = whole if isinstance(whole, PreTrainedModel) else whole.get_base_model()
    signature = inspect.signature(host.forward)

    @functools.wraps(type(host).forward)
    def forward(
        self: nn.Module,
        *args: Any,
        n_prompt_tokens: PromptLengths | None = None,
        **arguments: Any,
    ) -> Any:
        given = dict(signature.bind(*args, **arguments).arguments)
        given |= given.pop(_catch_all(signature), {})
        return edited.run(host.forward, given, n_prompt_tokens)

    def generate(
        self: Any, inputs: Tensor | None = None, generation_config: Any = None, **arguments: Any
    ) -> Any:
        if generation_config is not None:
            arguments["generation_config"] = generation_config
        if self.generation_config is not whole.generation_config:  # the view was given one of its own
            arguments.setdefault("generation_config", self.generation_config)
        ids = arguments.pop("input_ids", inputs)
        return edited.generate(ids, **arguments)

    def batching(name: str) -> Any:
        def method(self: nn.Module, *args: Any, **arguments: Any) -> Any:
            if edited.is_enabled:
                raise no_continuous_batching()
            return getattr(host, name)(*args, **arguments)

        return method

    overrides = {
        "forward": forward,
        "generate": generate,
        **{name: batching(name) for name in _CONTINUOUS_BATCHING},
        "baft_edited_model": edited,
        "__module__": type(host).__module__,
        "__qualname__": type(host).__qualname__,
    }
    view = copy.copy(host)
    view.__dict__.pop("forward", None)  # accelerate puts its own on the instance; the host's is called anyway
    view.__class__ = type(type(host).__name__, (type(host),), overrides)
    return view


_CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def _catch_all(signature: inspect.Signature) -> str:
    """Name of the `**kwargs` parameter, or an empty string."""
    kinds = signature.parameters.values()
    return next((p.name for p in kinds if p.kind is inspect.Parameter.VAR_KEYWORD), "")
