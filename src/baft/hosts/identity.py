"""Who a host is: enough of its config and weights to tell it from every other, in a few kilobytes.

Edits are made on one host and mean nothing on another. The same host in another precision is still the same
host, though, so a cast must be told from a small fine-tune. Rounding is deterministic: where weights were
merely cast, rounding the finer side gives exactly the coarser one, whereas training by as little as 0.1 %
moves some of the samples over a rounding boundary. So hashes of the rounded samples are compared too. A
float16 and a bfloat16 copy must have an original that both can be rounded from. Only quantized weights are
compared with a tolerance.
"""

import contextlib
import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from baft.errors import DamagedArtifactError, HostMismatchError
from baft.hosts.architecture import accelerate_hooks, active_adapters
from baft.hosts.models import Host

N_HASHED_VALUES = 16
N_SAMPLED_VALUES = 8
N_SAMPLED_PARAMETERS = 64
QUANTIZED_BOUND = 0.15  # int4 in groups of 128 is off by 0.12 of the weights' spread; another model by 1.4

_CASTS = (torch.bfloat16, torch.float16)
# What a config says about the run, the file or the labels, and not about what the weights compute.
_IRRELEVANT = frozenset((
    "architectures", "attn_implementation", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "gradient_checkpointing", "id2label", "initializer_range", "label2id",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
    "quantization_config", "return_dict", "torch_dtype", "transformers_version", "unk_token_id",
    "use_cache",
))  # fmt: skip
_PROBE = "The Eiffel Tower (1889) isn't in Rome;\n  naïve café 東京 🙂 x=3.14"


@dataclass(frozen=True)
class HostIdentity:
    """A host's fingerprint.

    Attributes:
        name: What the host was called; for messages, never compared.
        architecture: Class of the model.
        config_hash: Of what the config says about the computation, and of which adapters are active.
        weights_hash: Of 16 values of every parameter, exactly as they are.
        cast_hashes: Of the same values rounded to bfloat16 and to float16.
        n_parameters: How many parameters the hashes cover.
        dtype: The precision of most weights; "quantized" is added where some are no plain floats.
        samples: 8 values of up to 64 parameters by name; codes of a quantization are left out.
        inexact: Which of the samples were read back from a quantization.
        tokenizer_hash: Of the vocabulary size, a probe text's tokens and the chat template; `compare` leaves
            it to the caller, for whom another tokenizer may be an error or a warning.
    """

    name: str
    architecture: str
    config_hash: str
    weights_hash: str
    cast_hashes: dict[str, str]
    n_parameters: int
    dtype: str
    samples: dict[str, tuple[float, ...]]
    inexact: tuple[str, ...]
    tokenizer_hash: str

    def to_dict(self) -> dict[str, Any]:
        """The identity as plain data for JSON; floats survive exactly."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "HostIdentity":
        """Reads what `to_dict` wrote.

        Args:
            row: The plain data.

        Returns:
            The identity.

        Raises:
            DamagedArtifactError: If a field is missing, unknown or of the wrong kind.
        """
        try:
            fields = dict(row)
            fields["samples"] = {
                str(name): tuple(float(value) for value in values) for name, values in row["samples"].items()
            }
            fields["inexact"] = tuple(str(name) for name in row["inexact"])
            fields["cast_hashes"] = {str(name): str(digest) for name, digest in row["cast_hashes"].items()}
            return cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedArtifactError(f"the host's identity cannot be read: {error!r}") from error

    @property
    def is_quantized(self) -> bool:
        """Whether some of the weights are no plain floats."""
        return self.dtype.endswith("quantized")


@torch.no_grad()
def identify(host: Host) -> HostIdentity:
    """Takes the fingerprint of a host; it reads a few values of each parameter, so this is quick.

    Args:
        host: The host, without edits in force.

    Returns:
        Its identity.
    """
    model: Any = host.model
    base = _base(model)
    parameters = _parameters(model)
    values = dict(_values((name, _within_reach(model, name, one)) for name, one in parameters))
    samples = _samples(values, [(name, parameter.ndim > 1) for name, parameter in parameters])
    return HostIdentity(
        name=host.name,
        architecture=type(base).__name__,
        config_hash=_digest(_relevant(base.config.to_dict() | {"adapters": list(active_adapters(model))})),
        weights_hash=_weights_hash(values),
        cast_hashes={_name(dtype): _weights_hash(values, dtype) for dtype in _CASTS},
        n_parameters=len(values),
        dtype=_precision(parameters),
        samples=samples,
        inexact=tuple(name for name in samples if values[name].kind == "read back"),
        tokenizer_hash=_tokenizer_hash(host.tokenizer),
    )


def compare(expected: HostIdentity, actual: HostIdentity) -> Literal["same", "same_weights_other_precision"]:
    """Tells whether two identities are of the same host.

    Args:
        expected: The host that something was made on.
        actual: The host that is here.

    Returns:
        "same", or "same_weights_other_precision" where one is the other cast or quantized (of which the
        caller should warn).

    Raises:
        HostMismatchError: If the architecture or the weights differ.
    """
    if expected.config_hash != actual.config_hash or expected.architecture != actual.architecture:
        raise _mismatch(
            expected, actual, f"another architecture or config ({_config_words(expected, actual)})"
        )
    complete = expected.n_parameters == actual.n_parameters
    if complete and expected.weights_hash == actual.weights_hash:
        # Equal values in another dtype still compute otherwise.
        return "same" if expected.dtype == actual.dtype else "same_weights_other_precision"
    if complete and not (expected.is_quantized or actual.is_quantized):
        _require_cast(expected, actual)
    else:
        _require_close_samples(expected, actual)
    return "same_weights_other_precision"


def _require_cast(expected: HostIdentity, actual: HostIdentity) -> None:
    """Every parameter of both is in the hashes, so the hashes of the rounded values decide."""
    for dtype, digest in expected.cast_hashes.items():
        # In one and the same dtype, weights differ by a cast only if one side is on the coarser grid.
        coarse = expected.dtype != actual.dtype or digest in (expected.weights_hash, actual.weights_hash)
        if coarse and digest == actual.cast_hashes.get(dtype):
            return
    if {expected.dtype, actual.dtype} != {_name(dtype) for dtype in _CASTS}:
        raise _mismatch(expected, actual, "other weights, and not by a change of precision")
    # Both halves may have been rounded from a finer original, and then neither rounds to the other.
    _require_close_samples(expected, actual)


def _require_close_samples(expected: HostIdentity, actual: HostIdentity) -> None:
    """The hashes are of different things, so the values that both sides show decide."""
    errors = []
    for name in _common(expected, actual):
        before, after = torch.tensor(expected.samples[name]), torch.tensor(actual.samples[name])
        if before.shape != after.shape:
            raise _mismatch(expected, actual, f"other weights: {name} has another size")
        if _is_cast(before, after) or _share_original(before, after) or _share_original(after, before):
            continue
        if name not in expected.inexact + actual.inexact:
            raise _mismatch(expected, actual, f"other weights: {name} differs, and not by its precision")
        # A parameter counts by its own size, or the large ones would drown the small.
        errors.append(float((before - after).square().mean() / before.square().mean().clamp_min(1e-30)))
    difference = math.sqrt(statistics.fmean(errors)) if errors else 0.0
    if not difference < QUANTIZED_BOUND:  # written so that NaN is a mismatch
        raise _mismatch(expected, actual, f"other weights: samples differ by {difference:.2g} of their size")


def _common(expected: HostIdentity, actual: HostIdentity) -> list[str]:
    names = [name for name in expected.samples if name in actual.samples]
    if not names or 2 * len(names) < len(expected.samples):
        few = f"{len(names)} of {len(expected.samples)} sampled parameters are here, too few to tell"
        raise _mismatch(expected, actual, few)
    return names


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT wraps the model


def _mismatch(expected: HostIdentity, actual: HostIdentity, what: str) -> HostMismatchError:
    return HostMismatchError(
        f"this host ({actual.name}, {actual.dtype}) is not the one expected "
        f"({expected.name}, {expected.dtype}): {what}. "
        f"Load {expected.name}, or make the edits anew on {actual.name}"
    )


def _config_words(expected: HostIdentity, actual: HostIdentity) -> str:
    if expected.architecture != actual.architecture:
        return f"{actual.architecture}, expected {expected.architecture}"
    return f"{actual.architecture} with config {actual.config_hash[:8]}, expected {expected.config_hash[:8]}"


class _Values(NamedTuple):
    """Some values of a parameter: as they are, read back from a quantization, or the codes of one."""

    values: Tensor
    kind: Literal["plain", "read back", "code"]


def _parameters(model: Any) -> list[tuple[str, Any]]:
    """All parameters by name, each once: offloading tears apart those that a host shares."""
    tied = getattr(_base(model), "all_tied_weights_keys", None) or {}

    def is_shared(name: str) -> bool:
        return name.removeprefix("base_model.model.").replace(".base_layer", "") in tied  # PEFT's renaming

    return sorted(
        (name, one) for name, one in model.named_parameters() if not (one.is_meta and is_shared(name))
    )


def _within_reach(model: Any, name: str, parameter: Any) -> Any:
    """The weights of a parameter; those that accelerate keeps elsewhere it is asked for, and may not have."""
    if not parameter.is_meta:
        return parameter.detach()
    owner, _, own_name = name.rpartition(".")
    for hook in accelerate_hooks(model.get_submodule(owner)):
        with contextlib.suppress(KeyError, TypeError):
            return hook.weights_map[own_name]
    return None


def _values(parameters: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, _Values]]:
    """Strided values of each parameter within reach."""
    for name, weights in parameters:
        kind: Literal["plain", "read back", "code"] = "plain"
        if weights is None:
            continue
        if is_traceable_wrapper_subclass(weights):  # quantized by torchao
            try:
                weights, kind = weights.dequantize(), "read back"  # type: ignore[attr-defined]
            except (RuntimeError, NotImplementedError, TypeError, AttributeError):
                continue
        elif _is_code(weights):
            kind = "code"
        flat = weights.reshape(-1)
        # An odd stride: an even one could walk down a single column of a matrix.
        stride = max(1, (flat.numel() // N_HASHED_VALUES - 1) | 1)
        yield name, _Values(flat[::stride][:N_HASHED_VALUES].to("cpu", torch.float32), kind)


def _is_code(parameter: Tensor) -> bool:
    """Integers and one-byte floats encode weights: they tell models apart, but are no weights."""
    return not parameter.is_floating_point() or parameter.element_size() == 1


def _samples(values: Mapping[str, _Values], names: list[tuple[str, bool]]) -> dict[str, tuple[float, ...]]:
    """Values of parameters evenly spread over the names: half of them matrices, half of them vectors.

    The names are spread over all parameters, quantized or not, so that both sides choose the same; vectors
    (norms, biases) are what quantization leaves alone.
    """
    matrices = [name for name, is_matrix in names if is_matrix]
    vectors = [name for name, is_matrix in names if not is_matrix]
    n_vectors = min(len(vectors), N_SAMPLED_PARAMETERS // 2)
    chosen = _spread(matrices, N_SAMPLED_PARAMETERS - n_vectors) + _spread(vectors, n_vectors)
    thinning = N_HASHED_VALUES // N_SAMPLED_VALUES
    seen = [name for name in sorted(chosen) if name in values and values[name].kind != "code"]
    return {name: tuple(values[name].values[::thinning].tolist()) for name in seen}


def _spread(names: list[str], n: int) -> list[str]:
    n = min(n, len(names))
    return [names[position * len(names) // n] for position in range(n)]


def _precision(parameters: list[tuple[str, Tensor]]) -> str:
    counts: Counter[str] = Counter()
    quantized = False
    for _, parameter in parameters:
        is_code = _is_code(parameter)
        quantized = quantized or is_code or is_traceable_wrapper_subclass(parameter)
        if not is_code:
            counts[_name(parameter.dtype)] += parameter.numel()
    most = counts.most_common(1)[0][0] if counts else "none"
    return f"{most}, quantized" if quantized else most


def _weights_hash(values: Mapping[str, _Values], rounded_to: torch.dtype = torch.float32) -> str:
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(name.encode())
        digest.update(values[name].values.to(rounded_to).float().numpy().tobytes())
    return digest.hexdigest()


def _is_cast(one: Tensor, other: Tensor) -> bool:
    """Whether the values are equal, or those of one are those of the other rounded to a half precision."""
    rounded = [(a.to(dtype).float(), b) for dtype in _CASTS for a, b in ((one, other), (other, one))]
    return any(torch.equal(a, b) for a, b in [(one, other), *rounded])


def _share_original(half: Tensor, brain: Tensor) -> bool:
    """Whether some values round to `half` in float16 and to `brain` in bfloat16."""
    grid = half.half().numpy()
    if not (torch.equal(half.half().float(), half) and torch.equal(brain.bfloat16().float(), brain)):
        return False
    below, above = (
        torch.from_numpy(np.nextafter(grid, np.float16(end))).float() for end in (-np.inf, np.inf)
    )
    lowest, highest = ((half + neighbor) / 2 for neighbor in (below, above))  # what float16 rounds to `half`
    return bool(((lowest.bfloat16() <= brain) & (brain <= highest.bfloat16())).all())


def _relevant(config: Any) -> Any:
    """The config without what is irrelevant or unset, as a later transformers adds fields that are unset."""
    if isinstance(config, Mapping):
        kept = {str(key): _relevant(value) for key, value in config.items() if _is_relevant(str(key))}
        return {key: value for key, value in kept.items() if value not in (None, False, {}, [])}
    if isinstance(config, (list, tuple)):
        return [_relevant(value) for value in config]
    return config if isinstance(config, (str, int, float, bool, type(None))) else str(config)


def _is_relevant(key: str) -> bool:
    return key not in _IRRELEVANT and not key.startswith("_")  # private: where it came from, how it is run


def _tokenizer_hash(tokenizer: Any) -> str:
    tokens = tokenizer(_PROBE)["input_ids"]
    return _digest([tokenizer.vocab_size, tokens, tokenizer.chat_template])


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
