"""What ROME, MEMIT and AlphaEdit share: keys and values at a subject's last token.

A feed-forward part's down-projection is read as a memory: its input at the subject's last token is the *key*
by which a fact is looked up, what it writes is the *value* (Meng et al. 2022, arXiv 2202.05262, section 3.1;
Meng et al. 2023, arXiv 2210.07229, section 4). Here keys are read, and values are found that make the host
say the target; the methods differ in how they solve for the weight's change, and in which layers.

The value is found by descent on a vector added at that one token, for the prompt alone and behind short
texts: the target's cross-entropy, plus `kl_weight` times the divergence from the host on "{subject} is a",
plus `weight_decay` times the vector's length over the square of that of what was there. The vector is held
within `clamp` times that length. The decay's form is the published code's; the papers have none. Where paper
and code differ on the divergence, it is the paper's: at the prompt's end, not at the subject's last token.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from baft.errors import ConfigError
from baft.hosts.architecture import Site, intervention_dtype, site_device
from baft.hosts.calls import Parts
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.hosts.kernels import fast_linears
from baft.hosts.models import Host
from baft.hosts.passes import Own, Pass, Predictions, show_prompts
from baft.hosts.patches import EnoughError, Patch, Seen, by_row
from baft.hosts.positions import PositionSpec
from baft.hosts.suffix import quickest_pass, sites_below
from baft.methods.base import OnStep
from baft.methods.descent import Descent
from baft.methods.optimizer import DescentConfig
from baft.methods.subjects import Placed, essence, placed, prefixes
from baft.methods.texts import measured
from baft.methods.training import TrainingResult
from baft.types import Edit

Rows = Sequence[Sequence[Placed]]  # the texts of each edit

_EVERYWHERE = PositionSpec()
_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class KeyValueConfig(DescentConfig):
    """Settings of the methods that insert values at keys; the inherited ones are of the value's descent.

    Args:
        kl_weight: Of the divergence on "{subject} is a".
        weight_decay: Of the vector's length over the square of the value's.
        clamp: Longest vector, in lengths of the value that was there.
        n_prefixes: Short texts behind which the prompt is trained, beside the prompt alone.
        n_key_prefixes: Short texts over which a key is averaged, the prompt alone being one more.
        train_eos: Whether the target's end is trained.
        edits_at_once: Most edits of a request whose values are found side by side.
        moments_text: A text file, or a folder of .txt files, that second moments are taken on; None for
            WikiText-2's validation text where `BAFT_DATA` has it, else the project's own small text.
        moments_tokens: How much of it is read.
        moments_ridge: What is added to the diagonal of the moments, in means of it.

    Raises:
        ConfigError: If a value is out of range.
    """

    kl_weight: float = 0.0625
    weight_decay: float = 1e-3
    clamp: float = 4.0
    n_prefixes: int = 5
    n_key_prefixes: int = 20
    train_eos: bool = False
    edits_at_once: int = 8
    moments_text: str | None = None
    moments_tokens: int = 80_000
    moments_ridge: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kl_weight", "weight_decay", "moments_ridge"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be a number that is not negative, got {value}")
        if not (math.isfinite(self.clamp) and self.clamp > 0):
            raise ConfigError(f"clamp must be a positive number, got {self.clamp}")
        for name in ("n_prefixes", "n_key_prefixes"):
            if not 0 <= getattr(self, name) <= 300:
                raise ConfigError(f"{name} must be between 0 and 300, got {getattr(self, name)}")
        for name, least in (("moments_tokens", 2), ("edits_at_once", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")


class Chain:
    """Several patches of one module: each is shown what the one before made of the output."""

    def __init__(self, *patches: Patch):
        self.patches = patches

    def __call__(
        self,
        module: nn.Module,
        inputs: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        seen: Seen,
    ) -> Float[Tensor, "*batch d_out"] | None:
        """The output under all of them."""
        for patch in self.patches:
            made = patch(module, inputs, output, seen)
            output = output if made is None else made
        return output


@dataclass
class AddAt:
    """Adds a vector to each row's output at one token.

    Args:
        vectors: The vectors, `[edit, d_out]`.
        edits: Which of them each row gets, `[row]`.
        places: At which token, `[row]`.
    """

    vectors: Float[Tensor, "edit d_out"]
    edits: Int[Tensor, " row"]
    places: Int[Tensor, " row"]

    def __call__(
        self,
        module: nn.Module,
        inputs: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        seen: Seen,
    ) -> Float[Tensor, "*batch d_out"]:
        """The output with the vectors added."""
        at = torch.arange(len(self.places), device=output.device), self.places.to(output.device)
        more = self.vectors[self.edits].to(output)
        return by_row(output, seen).index_put(at, more, accumulate=True).view_as(output)


@dataclass
class Reading:
    """Reads what goes into a module, and out of it, at one token of each row, and ends the run there.

    Args:
        places: The tokens, `[row]`.
        inputs: What went in there at the last call, `[row, d_in]`.
        outputs: What came out, `[row, d_out]`.
    """

    places: Int[Tensor, " row"]
    inputs: Tensor = field(init=False)
    outputs: Tensor = field(init=False)

    def __call__(
        self,
        module: nn.Module,
        inputs: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        seen: Seen,
    ) -> None:
        """Reads.

        Raises:
            EnoughError: Always.
        """
        at = torch.arange(len(self.places), device=output.device), self.places.to(output.device)
        self.inputs, self.outputs = (by_row(one, seen)[at].detach() for one in (inputs, output))
        raise EnoughError


class KeyValues:
    """Keys and values of some edits on a host with edits in force.

    Args:
        host: The host.
        encoder: Its encoder.
        config: The settings.
        edits: The edits.
        seed: Draws the short texts before the prompts.

    Raises:
        InputError: If an edit does not fit the host, or its subject cannot be found.
    """

    def __init__(
        self, host: Host, encoder: Encoder, config: KeyValueConfig, edits: Sequence[Edit], *, seed: int
    ):
        self._host, self._encoder, self._config = host, encoder, config
        self.edits = tuple(edits)
        before = prefixes(max(config.n_prefixes, config.n_key_prefixes), seed)
        rows = [placed(encoder, edit, before, eos=config.train_eos) for edit in edits]
        self._alone = [of_edit[:1] for of_edit in rows]
        self._trained = [of_edit[: 1 + config.n_prefixes] for of_edit in rows]
        self._averaged = [of_edit[: 1 + config.n_key_prefixes] for of_edit in rows]

    def keys(
        self, patches: Mapping[str, Patch], module: str, *, by_group: bool = False
    ) -> tuple[Float[Tensor, "edit d_in"], Float[Tensor, "edit d_in"]]:
        """Each edit's key averaged over contexts, and that of the prompt alone, in float64 on the CPU.

        Args:
            patches: What is in force.
            module: The down-projection.
            by_group: Whether the prompt alone weighs as much in the mean as all contexts together, or as one.
        """
        found = [keys for keys, _ in self._read(patches, module, self._averaged)]
        alone = torch.stack([keys[0] for keys in found])
        if by_group and self._config.n_key_prefixes:
            return (alone + torch.stack([keys[1:].mean(0) for keys in found])) / 2, alone
        return torch.stack([keys.mean(0) for keys in found]), alone

    def outputs(self, patches: Mapping[str, Patch], module: str) -> Float[Tensor, "edit d_out"]:
        """What a module puts out at each subject's last token, for the prompt alone, in float64 on CPU."""
        return torch.cat([outputs for _, outputs in self._read(patches, module, self._alone)])

    def values(
        self, patches: Mapping[str, Patch], module: str, site: Site, on_step: OnStep | None
    ) -> tuple[Float[Tensor, "edit d_out"], TrainingResult, str | None]:
        """The vectors that make the host say the targets, added to a module's output, and how it went.

        Last comes why every step ran the whole host, or None if it did not have to.

        All edits are trained side by side, each on its own vector: Adam looks at every number by itself, so
        that is as one by one, but that the stop rule is that of all of them.

        Args:
            patches: What is in force.
            module: The module.
            site: The block that it is, or is in.
            on_step: Called after every step.

        Raises:
            EditError: If the loss is not finite.
        """
        config, model = self._config, self._host.model
        there = self.outputs(patches, module)
        lengths = there.norm(dim=-1).to(site_device(model, site), intervention_dtype(model))
        vectors = lengths.new_zeros(there.shape).requires_grad_()
        rows = [
            [*trained, essence(self._encoder, edit)]
            for trained, edit in zip(self._trained, self.edits, strict=True)
        ]
        run, why = self._pass_above(rows, patches, module, site, vectors)
        shown, before = AllButLast(run, rows), None

        def loss(cross_entropy: Float[Tensor, ""], seen: Predictions) -> Float[Tensor, ""]:
            nonlocal before
            decay = (vectors.norm(dim=-1) / lengths.square()).mean().to(cross_entropy)
            now = torch.log_softmax(shown.last.to(torch.promote_types(shown.last.dtype, torch.float32)), -1)
            before = now.detach() if before is None else before  # at the first step nothing is added yet
            apart = (now.exp() * (now - before)).sum(-1).mean().to(cross_entropy)
            return cross_entropy + config.kl_weight * apart + config.weight_decay * decay

        def hold() -> None:
            most = config.clamp * lengths / vectors.norm(dim=-1).clamp(min=1e-30)
            vectors.mul_(most.clamp(max=1.0).unsqueeze(-1))

        result = Descent([vectors], config, loss, hold).run(shown, on_step)
        return vectors.detach(), result, why

    def margins(self, patches: Mapping[str, Patch]) -> list[float]:
        """The smallest lead of any target token of each edit over the best other, for the prompt alone."""
        edited = EditedModel(self._host.model)
        edited.patches = patches
        return measured(self._host, self._encoder, edited, [one.text for [one] in self._alone])[0]

    def _pass_above(
        self,
        rows: Rows,
        patches: Mapping[str, Patch],
        module: str,
        site: Site,
        vectors: Float[Tensor, "edit d_out"],
    ) -> tuple[Pass, str | None]:
        """The host on some texts, with the edits' vectors added to what a module puts out.

        Tokens before the first of the places are not run again at every step, nor are blocks below.
        """
        flat = [one for of_edit in rows for one in of_edit]
        reach = max(len(one.text.prompt_ids) - one.place for one in flat)
        shown, why = quickest_pass(
            self._host,
            self._encoder,
            _EVERYWHERE,
            [one.text for one in flat],
            sites_below(site),
            reach=reach,
            patches=patches,
        )
        edits, places = _where(rows, vectors.device)
        added = AddAt(vectors, edits, places - shown.n_left_out.to(places.device))
        shown.edited.patches = with_patch(patches, module, added)
        return shown, why

    @torch.no_grad()
    def _read(self, patches: Mapping[str, Patch], module: str, rows: Rows) -> list[tuple[Tensor, Tensor]]:
        """What goes into a module and out of it, of every edit's texts at its subject, in float64."""
        flat = [one for of_edit in rows for one in of_edit]
        edited = EditedModel(self._host.model, {}, _EVERYWHERE)
        inputs, outputs = [], []
        for start in range(0, len(flat), _ROWS):
            chunk = flat[start : start + _ROWS]
            reading = Reading(torch.tensor([one.place for one in chunk]))
            edited.patches = with_patch(patches, module, reading)
            with fast_linears(), contextlib.suppress(EnoughError):
                show_prompts(edited, self._encoder, [one.text.prompt_ids for one in chunk])
            inputs.append(reading.inputs.to("cpu", torch.float64))
            outputs.append(reading.outputs.to("cpu", torch.float64))
        counts = [len(of_edit) for of_edit in rows]
        both = torch.cat(inputs).split(counts), torch.cat(outputs).split(counts)
        return list(zip(*both, strict=True))


class AllButLast:
    """A pass whose last text of each edit is set apart: of that, what follows its prompt is wanted.

    Args:
        run: The pass over all texts.
        rows: The texts of each edit; the target of the last is idle, however many tokens it has.

    Attributes:
        targets: The target tokens of the others, `[token]`.
        rows: Which of the others each belongs to, `[token]`.
        last: The logits at the prompt's end of the texts set apart, of the run before, `[edit, vocab]`.
    """

    last: Float[Tensor, "edit vocab"]

    def __init__(self, run: Pass, rows: Rows):
        self._run = run
        is_last = torch.tensor([i + 1 == len(of_edit) for of_edit in rows for i in range(len(of_edit))])
        is_last = is_last.to(run.rows.device)
        is_first = torch.ones_like(run.rows, dtype=torch.bool)  # of a text's target tokens
        is_first[1:] = run.rows[1:] != run.rows[:-1]
        self._is_other = ~is_last[run.rows]
        self._is_wanted = is_last[run.rows] & is_first
        self.targets = run.targets[self._is_other]
        self.rows = ((~is_last).cumsum(0) - 1)[run.rows[self._is_other]]

    def __call__(self, parts: Mapping[Site, Parts], own: Own | None = None) -> Predictions:
        """The predictions of the others."""
        seen = self._run(parts, own)
        self.last = seen.logits[self._is_wanted]
        return Predictions(seen.logits[self._is_other], seen.states, seen.state_rows)


def _where(rows: Rows, device: torch.device) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    """Which edit every text is of, and where in it the subject ends."""
    edits = [i for i, of_edit in enumerate(rows) for _ in of_edit]
    places = [one.place for of_edit in rows for one in of_edit]
    return torch.tensor(edits, device=device), torch.tensor(places, device=device)


def with_patch(patches: Mapping[str, Patch], module: str, patch: Patch) -> dict[str, Patch]:
    """The patches with one more, after what is in force on its module."""
    there = patches.get(module)
    return {**patches, module: patch if there is None else Chain(there, patch)}
