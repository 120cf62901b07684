"""Who is compared: our passes, our whole edit, LoRA through peft, the host itself, and the memory's speed."""

import contextlib
import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from baft.hosts.architecture import Site, find_architecture, intervention_dtype
from baft.hosts.encoding import EncodedEdit
from baft.hosts.passes import FullPass
from baft.hosts.positions import PositionSpec
from baft.hosts.suffix import SuffixPass
from baft.methods.baft import BaftEditor
from baft.methods.base import EditOutcome
from baft.methods.training import train
from baft.nn.gates import ConditionedGate, Gate, LogisticGate, OpenGate
from baft.nn.interventions import SubspaceIntervention
from baft.nn.losses import target_margins
from harness import summarize, timed
from workload import Workload

N_TIMED = 3  # successive steps whose mean is one measurement; one more goes before them
LORA_STEPS = 70  # the published setting (EasyEdit's): r = 8 on q and v, alpha 32, Adam, 5e-3
IGNORED = -100


class PassSteps:
    """Training steps of ours on one pass, by the library's own loop.

    The gates are of the preset's kind and open, but set to nothing in particular, which costs the same.
    """

    def __init__(self, work: Workload, pass_class: type[FullPass] | type[SuffixPass]):
        self.work, self.pass_class = work, pass_class
        self.preparation_s: list[float] = []
        self.config = replace(work.config, max_steps=N_TIMED + 1, stop_margin=None, stop_loss=None)

    def __call__(self, number: int) -> float:
        """Seconds of one step; what goes before the first is in `preparation_s`."""
        work = self.work
        positions = PositionSpec(work.config.last_prompt, work.config.outputs)
        began = time.perf_counter()
        run = self.pass_class(work.host, work.encoder, positions, work.texts(number), work.sites)
        self.preparation_s.append(time.perf_counter() - began)
        ends: list[float] = []
        train(run, self._parts(), {}, self.config, on_step=lambda *_: ends.append(time.perf_counter()))
        return (ends[-1] - ends[0]) / N_TIMED

    def _parts(self) -> dict[Site, SubspaceIntervention]:
        work = self.work
        model, rank = work.host.model, work.config.rank
        d_model, dtype = find_architecture(model).d_model, intervention_dtype(model)
        parts = {}
        for site in work.sites:
            gate: Gate = OpenGate(1, rank)
            if work.config.gate == "logistic":
                zero, one = torch.zeros(d_model, dtype=dtype), torch.ones(d_model, dtype=dtype)
                gate = ConditionedGate(1, rank, mean=zero, scale=one)
            elif work.config.gate == "closed_form":
                slopes = torch.zeros(1, rank, d_model, dtype=dtype)
                gate = LogisticGate(slopes, slopes[..., 0] + 4.0, threshold=work.config.hard_zero)
            generator = torch.Generator().manual_seed(site.layer)
            parts[site] = SubspaceIntervention.identity(
                1, rank, d_model, gate, generator=generator, dtype=dtype
            )
        return parts


class WholeEdit:
    """One edit from text to being in force, then taken back (which is not timed).

    Args:
        work: What is edited.
        editor: Makes the edits.
        full: Whether the whole host runs at every step, as it does for hosts that cannot be run in parts.
    """

    def __init__(self, work: Workload, editor: BaftEditor, *, full: bool = False):
        self.work, self.editor, self.full = work, editor, full
        self.outcomes: list[EditOutcome] = []

    def __call__(self, number: int) -> float:
        """Seconds of one edit."""
        held = mock.patch("baft.hosts.suffix.why_full", return_value="it is measured")
        with held if self.full else contextlib.nullcontext():
            began = time.perf_counter()
            outcome = self.editor.apply(self.work.request(number))
            took = time.perf_counter() - began
        self.editor.reset()
        if (outcome.why_full is not None) != self.full:
            raise SystemExit(
                f"the edit was to run {'in full' if self.full else 'in part'}: {outcome.why_full}"
            )
        self.outcomes.append(outcome)
        return took

    def results(self) -> dict[str, Any]:
        """Steps taken and edits decoded."""
        return {
            "n_steps": summarize([outcome.n_steps for outcome in self.outcomes]),
            "decoded": sum(all(outcome.decoded) for outcome in self.outcomes) / len(self.outcomes),
        }


class PlainForward:
    """The host alone on the edit's own prompt and target: the unit that an edit is counted in.

    Args:
        work: What is edited.
        inside: A context to run in; without one the host runs as its users run it.
    """

    def __init__(
        self, work: Workload, inside: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    ):
        self.work, self.inside = work, inside

    @torch.no_grad()
    def __call__(self, number: int) -> float:
        """Seconds of one pass; one more goes before it."""
        model, row = self.work.host.model, self.work.plain_row(number)
        with self.inside():
            model(row, use_cache=False)
            return timed(lambda: model(row, use_cache=False))


class Lora:
    """LoRA through peft on a copy of the host, on the texts that the preset trains."""

    def __init__(self, work: Workload, *, n_steps: int = LORA_STEPS):
        from peft import LoraConfig, get_peft_model

        self.work, self.n_steps = work, n_steps
        names = {name.rpartition(".")[2] for name, _ in work.host.model.named_modules()}
        if not {"q_proj", "v_proj"} <= names:
            raise SystemExit("LoRA is compared on hosts with q_proj and v_proj: give another --model")
        config = LoraConfig(
            r=8, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        self.model: Any = get_peft_model(copy.deepcopy(work.host.model), config)
        self.model.train()  # the hosts compared have no dropout, and the adapter none either
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.stopped_after: list[int] = []
        self.decoded: dict[str, list[bool]] = {"fixed": [], "stopped": []}

    def forget(self) -> None:
        """Forgets what was counted so far."""
        self.stopped_after, self.decoded = [], {"fixed": [], "stopped": []}

    def step(self, number: int) -> float:
        """Seconds of one training step."""
        ends: list[float] = []

        def note(_: tuple[float, float]) -> bool:
            ends.append(time.perf_counter())
            return False

        self._run(number, N_TIMED + 1, note)  # from one look at the predictions to the next is one step
        return (ends[-1] - ends[0]) / N_TIMED

    def results(self) -> dict[str, Any]:
        """Steps taken and edits decoded."""
        return {
            "n_steps": self.n_steps,
            "stopped_after": summarize(self.stopped_after),
            "decoded": {name: sum(flags) / len(flags) for name, flags in self.decoded.items()},
        }

    def fixed(self, number: int) -> float:
        """Seconds of an edit with the published number of steps."""
        took, _, decoded = self._run(number, self.n_steps, lambda _: False)
        self.decoded["fixed"].append(decoded)
        return took

    def stopped(self, number: int) -> float:
        """Seconds of an edit that stops by our rule, after as many steps at most."""
        config = self.work.config

        def stop(found: tuple[float, float]) -> bool:
            loss, margin = found
            if config.stop_margin is not None and margin >= config.stop_margin:
                return True
            return config.stop_loss is not None and loss < config.stop_loss

        took, n_steps, decoded = self._run(number, self.n_steps, stop)
        self.stopped_after.append(n_steps)
        self.decoded["stopped"].append(decoded)
        return took

    def _run(
        self, number: int, n_steps: int, stop: Callable[[tuple[float, float]], bool]
    ) -> tuple[float, int, bool]:
        """Seconds, steps taken, and whether the target is decoded at the last look."""
        ids, mask, labels = rows_of(self.work.texts(number), self.work.encoder.pad_id)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_A" in name:
                    torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
                elif "lora_B" in name:
                    parameter.zero_()
        began = time.perf_counter()
        optimizer = torch.optim.Adam(self.parameters, lr=5e-3)
        margin, taken = float("-inf"), 0
        while taken < n_steps:
            taken += 1
            output = self.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
            seen = labels[:, 1:] != IGNORED
            margin = float(target_margins(output.logits[:, :-1][seen].detach(), labels[:, 1:][seen]).min())
            if stop((output.loss.item(), margin)):
                break
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - began, taken, margin > 0


def rows_of(texts: list[EncodedEdit], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Texts as peft and pyreft train on them: ids, mask, and labels on target tokens, each `[row, pos]`."""
    width = max(len(text.prompt_ids) + len(text.target_ids) for text in texts)
    ids = torch.full((len(texts), width), pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, text in enumerate(texts):
        n_prompt, n_all = len(text.prompt_ids), len(text.prompt_ids) + len(text.target_ids)
        ids[i, :n_all] = torch.tensor(text.prompt_ids + text.target_ids)
        mask[i, :n_all] = 1
        labels[i, n_prompt:n_all] = torch.tensor(text.target_ids)
    return ids, mask, labels


class Streaming:
    """How fast weights can be read: a buffer far larger than the caches, in the two ways torch reads one."""

    def __init__(self, n_bytes: int):
        self.matrix = torch.ones(n_bytes // 4 // 4096, 4096)
        self.vector = torch.ones(4096)
        self.n_bytes = self.matrix.numel() * 4

    def sum(self, _: int) -> float:
        """Seconds of a sum over all of it."""
        return timed(self.matrix.sum)

    def product(self, _: int) -> float:
        """Seconds of a matrix-vector product."""
        return timed(lambda: self.matrix @ self.vector)
