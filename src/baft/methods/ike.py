"""`ike`: in-context knowledge editing, the new fact behind demonstrations of what to do with one.

Source: Zheng et al. 2023 (arXiv 2305.12740). Its steps, and where they are done here:

1. Demonstrations of three kinds, each a new fact, a prompt and its answer (section 3.2): *copy*, the fact's
   own prompt; *update*, another wording of it, with the new answer; *retain*, a neighbor, with the answer it
   has anyway. `Demonstration`. They are made of the tuning half of the benchmark `facts`
   (`experiments/ike_demonstrations.py`), and no edit is shown its own.
2. Of these the k whose facts are most like the new one, the most alike last, next to the prompt; kinds in the
   proportion 1 : 3 : 4 (section 4). `IkeEditor.store`. The authors compare sentence embeddings; here it is
   BM25, for no other model is at hand.
3. The new fact, and then the prompt itself. The authors test one fact at a time; with several in force it is
   the one whose prompt is nearest to what is asked. There is no threshold: every prompt is given a fact.

The line after "Prompt:" is new where the authors have a space: what is put in cannot change the tokens of
the prompt behind it. `paper` takes 16 demonstrations, as EasyEdit does, and plain text. `default` ends each
answer as a reply ends, so that the host's own reply ends, too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import ClassVar

import torch
from torch import Tensor

from baft.errors import ConfigError
from baft.hosts.background import background_text
from baft.hosts.models import Host
from baft.hosts.prompting import Row
from baft.methods.bm25 import Bm25, Index, words
from baft.methods.reading import Reader, ReadingEditor, edit_shares, latest_best, statement
from baft.methods.stateful import Layout, State
from baft.types import Edit, EditRequest

# One to copy and three to update for every four to retain, spread evenly.
_KINDS = ("retain", "update", "retain", "copy", "update", "retain", "update", "retain")


@dataclass(frozen=True, kw_only=True)
class IkeConfig:
    """Settings of `ike`.

    Args:
        n_demonstrations: How many are shown; fewer where the host's context has no room for them.
        copies: How many times the new fact's own prompt is shown with its answer, after the demonstrations;
            not in the paper, where a fact is stated and nothing more.
        ends: Whether answers of demonstrations end as replies do: by the end of the text, or of the turn.
        subject_weight: The least share that the words of the subject have when the nearest edit is looked up.
        k1: BM25's: how slowly a word's repetition stops counting.
        b: BM25's: how far long texts are weighed down.
        window: How many of a prompt's last words are looked up.
        chat: Whether an edit is measured in the chat template as well.

    Raises:
        ConfigError: If a value is out of range.
    """

    n_demonstrations: int = 3
    copies: int = 2
    ends: bool = True
    subject_weight: float = 0.7
    k1: float = 1.2
    b: float = 0.75
    window: int = 32
    chat: bool = True

    def __post_init__(self) -> None:
        for name in ("n_demonstrations", "copies"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.subject_weight <= 1:
            raise ConfigError(f"subject_weight must be between 0 and 1, got {self.subject_weight}")
        if self.window < 1:
            raise ConfigError(f"window must be at least 1 word, got {self.window}")


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A fact and what is asked about it.

    Args:
        prompt: The prompt that its edit would change.
        target: The new answer.
        rephrased: The same asked otherwise.
        near: A prompt that it must not change.
        near_answer: The answer to that.
    """

    prompt: str
    target: str
    rephrased: str
    near: str
    near_answer: str

    def asked(self, kind: str) -> tuple[str, str]:
        """The prompt and the answer that are shown to demonstrate one kind."""
        if kind == "retain":
            return self.near, self.near_answer
        return (self.prompt if kind == "copy" else self.rephrased), self.target


@cache
def demonstrations() -> tuple[Demonstration, ...]:
    """All that there are."""
    rows = json.loads(files("baft.methods").joinpath("demonstrations.json").read_text(encoding="utf-8"))
    return tuple(Demonstration(**row) for row in rows)


class IkeEditor(ReadingEditor):
    """The new fact and demonstrations, put before every prompt.

    Args:
        host: The host; never changed.
        config: The settings.
        seed: Without effect: nothing here is random.

    Raises:
        ConfigError: If BM25's numbers are out of range.
    """

    name: ClassVar[str] = "ike"
    summary: ClassVar[str] = "every prompt is given the new fact behind demonstrations (Zheng et al. 2023)"
    presets: ClassVar[Mapping[str, IkeConfig]] = {
        "default": IkeConfig(),
        "paper": IkeConfig(n_demonstrations=16, copies=0, ends=False),
    }
    config: IkeConfig

    def __init__(self, host: Host, config: IkeConfig, *, seed: int = 0):
        super().__init__(host, config, seed=seed)
        text = background_text()
        self._bm25 = Bm25([*text["sentences"], *text["prompts"]], k1=config.k1, b=config.b)

    def store(self, edits: Sequence[Edit]) -> Mapping[str, Tensor]:
        """Tokens of each edit's demonstrations, the nearest last, and of its fact."""
        near = [self._nearest(edit) for edit in edits]
        found = {}
        for how in self._ways:
            facts = [self.encoder.inner(_new_fact(edit)) for edit in edits]
            shown = [self._shown(one, kind, how) for several in near for one, kind in several]
            found[f"{how}.facts"] = self.table(facts)
            table = self.table(shown)
            found[f"{how}.demonstrations"] = table.view(len(edits), len(near[0]), table.shape[1])
        return found

    def layout(self, requests: Sequence[EditRequest], state: State) -> Layout:
        """For each edit of a request a row, and as many demonstrations as are asked for."""
        n_shown = min(self.config.n_demonstrations, len(demonstrations()) - 1) + self.config.copies
        found: dict[str, tuple[int | None, ...]] = {}
        for i, request in enumerate(requests):
            for how in self._ways:
                found[f"{i}.{how}.facts"] = len(request.edits), None
                found[f"{i}.{how}.demonstrations"] = len(request.edits), n_shown, None
        return found

    def reader(self, state: State, requests: Sequence[EditRequest]) -> Reader:
        """Gives every prompt the nearest edit."""
        edits = [edit for request in requests for edit in request.edits]
        index = Index([edit_shares(edit, self._bm25, self.config.subject_weight) for edit in edits])
        window = self.config.window

        def find(texts: Sequence[str]) -> list[int | None]:
            return [latest_best(index.scores(words(text)[-window:])) for text in texts]

        pieces = {}
        for how in self._ways:
            shown = self.rows_of(state, f"{how}.demonstrations", len(requests))
            facts = self.rows_of(state, f"{how}.facts", len(requests))
            pieces[how] = [[*some, *fact] for some, fact in zip(shown, facts, strict=True)]
        return Reader(self.encoder, self.turns, find, pieces["raw"], pieces[self._ways[-1]], self._limit)

    @property
    def _ways(self) -> tuple[str, ...]:
        return ("raw", "chat") if self.encoder.has_chat else ("raw",)

    def _nearest(self, edit: Edit) -> list[tuple[Demonstration, str]]:
        """The demonstrations whose facts are most like an edit, the most alike last, and what each shows."""
        index, pool = self._pool
        scores = index.scores(words(f"{edit.prompt} {edit.target}"))
        ranked = torch.argsort(scores, descending=True, stable=True).tolist()
        others = [pool[i] for i in ranked if pool[i].prompt != edit.prompt]
        n_shown = min(self.config.n_demonstrations, len(pool) - 1)
        shown = [(one, _KINDS[i % len(_KINDS)]) for i, one in enumerate(others[:n_shown])][::-1]
        own = Demonstration(edit.prompt, edit.target.strip(), edit.prompt, edit.prompt, edit.target)
        return [*shown, *[(own, "copy")] * self.config.copies]

    @cached_property
    def _pool(self) -> tuple[Index, tuple[Demonstration, ...]]:
        pool = demonstrations()
        return Index([self._bm25.weights(f"{one.prompt} {one.target}") for one in pool]), pool

    def _shown(self, one: Demonstration, kind: str, how: str) -> Row:
        prompt, answer = one.asked(kind)
        asked = _new_fact(Edit(one.prompt, one.target)) + prompt
        if self.config.ends and how == "chat" and self.turns.seams is not None:
            to_reply, to_user = self.turns.seams
            return self.encoder.inner(f"{asked}{to_reply}{answer}{to_user}")
        ids = self.encoder.inner(f"{asked} {answer}")
        if self.config.ends and how == "raw" and self.encoder.eos_ids:
            ids = (*ids, self.encoder.end_of_turn(chat=False))
        return (*ids, *self.encoder.inner("\n\n"))


def _new_fact(edit: Edit) -> str:
    return f"New Fact: {statement(edit).removesuffix('.')}\nPrompt:\n"
