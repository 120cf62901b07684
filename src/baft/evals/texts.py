"""What edits do to running text: perplexity, changes where none should be, and how fluent the model stays.

Held-out text has no prompt. Its first token is taken for the prompt and all others for output, as if the
model had written them: an edit that acts on output tokens then acts on every one of them, the worst case.
BOS itself is never edited.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from baft.errors import ConfigError, InputError
from baft.evals.metrics import ngram_entropy
from baft.hosts.calls import Recording
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder, TokenBatch
from baft.hosts.models import Host
from baft.hosts.speaking import Row, Speaker
from baft.nn.interventions import intervene


@dataclass(frozen=True, slots=True)
class TextLoss:
    """How surprised a model is by texts.

    Args:
        nll: Negative log-likelihood of each text, in nats, summed over its predicted tokens.
        n_tokens: How many those are: all of a text but its first.
    """

    nll: tuple[float, ...]
    n_tokens: tuple[int, ...]

    @property
    def perplexity(self) -> float:
        """`exp` of the mean over all tokens of all texts."""
        return math.exp(math.fsum(self.nll) / sum(self.n_tokens))


@dataclass(frozen=True, slots=True)
class FalseFires:
    """Where edits moved unrelated text.

    Args:
        n_changed: For each text, at how many tokens any logit differs from the unedited model's by any bit;
            an edit that acts on one token changes those after it too.
        n_fired: For each text, at how many tokens any gate opens, and an edit acts.
        n_tokens: How many tokens each text has, the first not counted.
    """

    n_changed: tuple[int, ...]
    n_fired: tuple[int, ...]
    n_tokens: tuple[int, ...]

    @property
    def changed_tokens(self) -> float:
        """Share of all tokens at which a logit differs."""
        return sum(self.n_changed) / sum(self.n_tokens)

    @property
    def fired_tokens(self) -> float:
        """Share of all tokens at which a gate opens."""
        return sum(self.n_fired) / sum(self.n_tokens)

    @property
    def changed_texts(self) -> float:
        """Share of the texts in which a logit differs anywhere."""
        return sum(n > 0 for n in self.n_changed) / len(self.n_changed)

    @property
    def fired_texts(self) -> float:
        """Share of the texts in which a gate opens anywhere."""
        return sum(n > 0 for n in self.n_fired) / len(self.n_fired)


@torch.no_grad()
def text_loss(
    host: Host, edited: EditedModel, texts: Sequence[str], *, window: int = 512, batch_size: int = 4
) -> TextLoss:
    """The loss of an edited model on held-out texts.

    A text begins with BOS once, where the tokenizer adds it. A text longer than a window is read in windows
    that begin half a window apart, and every token is predicted once: in the first window that holds it.

    Args:
        host: The host.
        edited: The model to measure.
        texts: The texts.
        window: Tokens the model sees at once; no more than the host's context is used.
        batch_size: Windows shown at once.

    Raises:
        ConfigError: If the window holds fewer than two tokens.
        InputError: If there is no text, or one has nothing to predict.
    """
    speaker = Speaker(host)
    limit = speaker.encoder.max_tokens
    window = window if limit is None else min(window, limit)
    if window < 2:
        raise ConfigError(f"a window holds at least 2 tokens, got {window}")
    rows = _encoded(host, texts)
    pieces = [(i, *piece) for i, row in enumerate(rows) for piece in _windows(row, window)]
    nll = [0.0] * len(rows)
    for start in range(0, len(pieces), batch_size):
        chunk = pieces[start : start + batch_size]
        batch = _as_output(speaker, [ids for _, ids, _ in chunk])
        for (i, ids, n_seen), logits in zip(chunk, _logits(edited, batch), strict=True):
            precise = logits[n_seen - 1 : len(ids) - 1].to(torch.promote_types(logits.dtype, torch.float32))
            targets = torch.tensor(ids[n_seen:], device=logits.device)
            nll[i] += torch.nn.functional.cross_entropy(precise, targets, reduction="sum").item()
    return TextLoss(tuple(nll), tuple(len(row) - 1 for row in rows))


def perplexity(host: Host, edited: EditedModel, texts: Sequence[str]) -> float:
    """`text_loss` as one number."""
    return text_loss(host, edited, texts).perplexity


@torch.no_grad()
def false_fires(
    host: Host, edited: EditedModel, texts: Sequence[str], *, n_tokens: int = 100, batch_size: int = 8
) -> FalseFires:
    """At how many tokens of unrelated texts the edits change anything.

    Each batch is shown twice, with the edits and without, so that both round alike.

    Args:
        host: The host.
        edited: The model to measure.
        texts: Texts that no edit is about; the first `n_tokens` tokens of each are shown.
        n_tokens: Where texts are cut; no more than the host's context.
        batch_size: Texts shown at once.

    Raises:
        ConfigError: If texts are cut below two tokens.
        InputError: If there is no text, or one has fewer than two tokens.
    """
    speaker = Speaker(host)
    limit = speaker.encoder.max_tokens
    n_tokens = n_tokens if limit is None else min(n_tokens, limit)
    if n_tokens < 2:
        raise ConfigError(f"texts are cut to at least 2 tokens, got n_tokens={n_tokens}")
    rows = [row[:n_tokens] for row in _encoded(host, texts)]
    changed: list[int] = []
    fired: list[int] = []
    for start in range(0, len(rows), batch_size):
        batch = _as_output(speaker, rows[start : start + batch_size])
        seen = Recording()
        with edited.disabled():
            without = _logits(edited, batch)
        differs = (_logits(edited, batch, seen) != without).any(-1) & batch.attention_mask.bool()
        changed += differs[:, 1:].sum(-1).tolist()
        fired += _open(edited, seen, batch)[:, 1:].sum(-1).tolist()
    return FalseFires(tuple(changed), tuple(fired), tuple(len(row) - 1 for row in rows))


def fluency(
    host: Host, edited: EditedModel, prompts: Sequence[str], *, n_tokens: int = 100, batch_size: int = 16
) -> tuple[float, ...]:
    """The n-gram entropy of what a model goes on to say after each prompt.

    Greedy and therefore deterministic, unlike the published score, which samples. Exactly `n_tokens` new
    tokens, the end of sequence barred, or a model that stops early would look dull; without the prompt.

    Args:
        host: The host.
        edited: The model to measure.
        prompts: The prompts.
        n_tokens: Tokens to generate.
        batch_size: Prompts asked at once.

    Raises:
        InputError: If there is no prompt, or one leaves no room in the host's context.
    """
    speaker = Speaker(host)
    rows, limit = speaker.rows(prompts, None), speaker.encoder.max_tokens
    longest = max(len(row) for row in rows)
    if limit is not None and longest + n_tokens > limit:
        raise InputError(
            f"a prompt of {longest} tokens and {n_tokens} new ones exceed this host's context of {limit}: "
            "shorten it, or lower n_tokens"
        )
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), rows[i]))
    found = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        replies = speaker.replies(edited, [rows[i] for i in chunk], n_tokens, {"min_new_tokens": n_tokens})
        for i, ids in zip(chunk, replies, strict=True):
            found[i] = ngram_entropy(speaker.text(ids))
    return tuple(found)


def _encoded(host: Host, texts: Sequence[str]) -> list[Row]:
    if not texts:
        raise InputError("no text given: the list is empty")
    encoder = Encoder.for_host(host)  # texts may be longer than the context
    rows = [encoder.prompt(text) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) < 2:
            raise InputError(f"the text {text!r} is a single token, of which nothing can be predicted")
    return rows


def _windows(row: Row, size: int) -> Iterator[tuple[Row, int]]:
    """Windows of a text, each with how many of its first tokens are context alone."""
    yield row[:size], 1
    done, stride = min(size, len(row)), max(1, size // 2)
    while done < len(row):
        end = min(done + stride, len(row))
        yield row[end - size : end], size - (end - done)
        done = end


def _as_output(speaker: Speaker, rows: Sequence[Row]) -> TokenBatch:
    """Running text as a batch, the first token of each row standing for its prompt."""
    return speaker.encoder.pad(rows, [1] * len(rows), side="right", device=speaker.device)


def _logits(
    edited: EditedModel, batch: TokenBatch, recording: Recording | None = None
) -> Float[Tensor, "batch pos vocab"]:
    output = edited(
        batch.input_ids,
        batch.attention_mask,
        n_prompt_tokens=batch.n_prompt_tokens,
        recording=recording,
        use_cache=False,
    )
    logits: Tensor = output.logits
    return logits


def _open(edited: EditedModel, seen: Recording, batch: TokenBatch) -> Bool[Tensor, "batch pos"]:
    """At which tokens of a recorded call any gate opened."""
    is_open = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    for site, parts in edited.interventions.items():
        if parts:
            mask = seen.masks[0].to(is_open.device)
            is_open[mask] |= intervene(parts, seen.at(site))[1].to(is_open.device)
    return is_open
