"""`retrieval`: stored edits are looked up, and the one that a prompt is about is put into it as text.

The baseline that parameter edits are measured against in the comparisons of WikiBigEdit (arXiv 2503.05683)
and of "Revisiting parameter-based knowledge editing" (arXiv 2606.00570). Neither fixes how to look up for
hosts of this size; ours is:

1. Keys. `bm25`: the words of an edit's prompt, weighed by BM25 (`bm25.py`) as shares of the edit's score for
   itself, those of its subject together no less than `subject_weight`. `states`: the mean, over the prompt's
   tokens, of the host's hidden state after one block, standardized by the background's prompts (`states.py`).
2. Query. The words of the user: those of the last user turn of a chat, or the raw prompt; of a long one its
   last `window` words (`bm25`), or the whole and its last sentence (`states`).
3. Threshold. The best edit counts if its score (for `states`, a cosine) exceeds `threshold`; where that is
   None, what at most the share `false_fire_rate` of prompts like the background's exceed
   (`conformal_threshold`). Otherwise nothing is put in, and the output is the host's, bit for bit.
4. What is put in. The edit as it was answered once: before a raw prompt the edit's, its target and the end of
   the text; in a chat an earlier turn, with the target as its reply. Or the plain statement (`form`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from baft.errors import ConfigError
from baft.hosts.background import background_text
from baft.hosts.models import Host
from baft.hosts.prompting import Row
from baft.methods.bm25 import Bm25, Index, words
from baft.methods.reading import Reader, ReadingEditor, edit_shares, latest_best, statement
from baft.methods.stateful import Layout, State
from baft.methods.states import StateKeys
from baft.types import Edit, EditRequest


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Settings of `retrieval`.

    Args:
        keys: By what edits are found: words, or states of the host.
        threshold: The score, between -1 and 1, above which an edit is put in; None to set it by
            `false_fire_rate`.
        false_fire_rate: The share of prompts like the background's that an edit may be put into.
        form: What is put in: an earlier answer, or a statement.
        repeats: How many times, or as many as the context has room for; small hosts copy what they have seen
            copied.
        subject_weight: The least share that the words of the subject have in an edit's score, from 0 to 1.
        k1: BM25's: how slowly a word's repetition stops counting.
        b: BM25's: how far long texts are weighed down.
        window: How many of a prompt's last words are looked up.
        layer: The block after which states are taken; None for a third of the host's depth.
        chat: Whether an edit is measured in the chat template as well.

    Raises:
        ConfigError: If a value is out of range.
    """

    keys: Literal["bm25", "states"] = "bm25"
    threshold: float | None = 0.6
    false_fire_rate: float = 0.01
    form: Literal["answer", "statement"] = "answer"
    repeats: int = 3
    subject_weight: float = 0.7
    k1: float = 1.2
    b: float = 0.75
    window: int = 32
    layer: int | None = None
    chat: bool = True

    def __post_init__(self) -> None:
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ConfigError(f"threshold must be between -1 and 1, or None, got {self.threshold}")
        if not 0 < self.false_fire_rate < 1:
            raise ConfigError(f"false_fire_rate must be between 0 and 1, got {self.false_fire_rate}")
        if not 0 <= self.subject_weight <= 1:
            raise ConfigError(f"subject_weight must be between 0 and 1, got {self.subject_weight}")
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1, got {self.repeats}")
        if self.window < 1:
            raise ConfigError(f"window must be at least 1 word, got {self.window}")


class RetrievalEditor(ReadingEditor):
    """Stored edits, looked up for each prompt.

    Args:
        host: The host; never changed.
        config: The settings.
        seed: Without effect: nothing here is random.

    Raises:
        ConfigError: If the host has no such layer, or BM25's numbers are out of range.
    """

    name: ClassVar[str] = "retrieval"
    summary: ClassVar[str] = "the stored edit that a prompt is about is put into it as text, or nothing is"
    presets: ClassVar[Mapping[str, RetrievalConfig]] = {
        "default": RetrievalConfig(),
        "paper": RetrievalConfig(threshold=None, subject_weight=0.0, form="statement", repeats=1),
        "states": RetrievalConfig(keys="states", threshold=None),
    }
    config: RetrievalConfig

    def __init__(self, host: Host, config: RetrievalConfig, *, seed: int = 0):
        super().__init__(host, config, seed=seed)
        self._states = StateKeys(host, self.encoder, config.layer)
        self.sites = (self._states.site,) if config.keys == "states" else ()
        text = background_text()
        self._bm25 = Bm25([*text["sentences"], *text["prompts"]], k1=config.k1, b=config.b)

    def store(self, edits: Sequence[Edit]) -> Mapping[str, Tensor]:
        """Tokens of what is put in, thresholds, and with `states` the keys."""
        found = {"raw": self.table([self._raw(edit) for edit in edits])}
        if self.encoder.has_chat:
            found["chat"] = self.table([self._chat(edit) for edit in edits])
        if self.config.keys == "states":
            found["keys"] = self._states.keys([edit.prompt for edit in edits])
        found["thresholds"] = self._thresholds(edits, found.get("keys")).to(found["raw"].device)
        return found

    def layout(self, requests: Sequence[EditRequest], state: State) -> Layout:
        """One row for each edit of a request."""
        found: dict[str, tuple[int | None, ...]] = {}
        for i, request in enumerate(requests):
            n = len(request.edits)
            found |= {f"{i}.raw": (n, None), f"{i}.thresholds": (n,)}
            if self.encoder.has_chat:
                found[f"{i}.chat"] = (n, None)
            if self.config.keys == "states":
                found[f"{i}.keys"] = (n, self._states.d_model)
        return found

    def reader(self, state: State, requests: Sequence[EditRequest]) -> Reader:
        """Looks edits up by their keys."""
        n = len(requests)
        thresholds = torch.cat([state[f"{i}.thresholds"] for i in range(n)]).double().cpu()
        raw = self._repeated(state, "raw", n)
        chat = self._repeated(state, "chat", n) if self.encoder.has_chat else raw
        if self.config.keys == "states":
            keys = torch.cat([state[f"{i}.keys"] for i in range(n)])

            def scores(text: str) -> Tensor:
                return self._states.scores(keys, text)
        else:
            index = Index([self._shares(edit) for request in requests for edit in request.edits])
            window = self.config.window

            def scores(text: str) -> Tensor:
                return index.scores(words(text)[-window:])

        def find(texts: Sequence[str]) -> list[int | None]:
            return [best(scores(text), thresholds) for text in texts]

        return Reader(self.encoder, self.turns, find, raw, chat, self._limit)

    def _repeated(self, state: State, name: str, n_requests: int) -> list[list[Row]]:
        return [pieces * self.config.repeats for pieces in self.rows_of(state, name, n_requests)]

    def _shares(self, edit: Edit) -> dict[str, float]:
        return edit_shares(edit, self._bm25, self.config.subject_weight)

    def _thresholds(self, edits: Sequence[Edit], keys: Tensor | None) -> Tensor:
        """One for each edit: the one that is set, or by the scores that background prompts reach."""
        if self.config.threshold is not None:
            return torch.full((len(edits),), self.config.threshold, dtype=torch.float64)
        if keys is not None:
            scores = self._states.reached(keys)
        else:
            index = Index([self._shares(edit) for edit in edits])
            scores = torch.stack([index.scores(words(text)) for text in background_text()["prompts"]])
        return conformal_threshold(scores, self.config.false_fire_rate)

    def _raw(self, edit: Edit) -> Row:
        if self.config.form == "statement":
            return self.encoder.inner(f"{statement(edit)}\n")
        encoded = self.encoder.edit(edit.prompt, edit.target, eos=bool(self.encoder.eos_ids))
        row = (*encoded.prompt_ids, *encoded.target_ids)
        return (*row[self.turns.words(row)[0] :], *self.encoder.inner("\n"))

    def _chat(self, edit: Edit) -> Row:
        if self.config.form == "statement" or self.turns.seams is None:
            return self.encoder.inner(f"{statement(edit)}\n")
        to_reply, to_user = self.turns.seams
        return self.encoder.inner(edit.prompt + to_reply + edit.target.strip() + to_user)


def best(scores: Tensor, thresholds: Tensor) -> int | None:
    """The best of the edits whose score exceeds their threshold, the latest of equals; None if none does."""
    passed = scores.cpu() > thresholds
    return latest_best(torch.where(passed, scores.cpu(), -torch.inf)) if bool(passed.any()) else None


def conformal_threshold(scores: Tensor, rate: float) -> Tensor:
    """What a further score, drawn like those given, exceeds with a probability of at most `rate`.

    Source: split conformal prediction (Vovk et al. 2005, "Algorithmic Learning in a Random World", chapter
    4): the `ceil((1 - rate) (n + 1))`-th smallest of `n`; infinite where `n` are too few for the rate.

    Args:
        scores: `[n, edit]`.
        rate: Between 0 and 1.
    """
    n = len(scores)
    rank = math.ceil((1 - rate) * (n + 1) - 1e-9)
    if rank > n:
        return torch.full_like(scores[0], torch.inf)
    return scores.sort(0).values[rank - 1]
