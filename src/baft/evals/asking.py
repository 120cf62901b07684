"""Asking an edited model a benchmark's questions: what it predicts, what it says, raw and in a chat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from baft.errors import ConfigError, InputError
from baft.evals.renderings import doubted
from baft.evals.teacher_forced import N_COMPARED, Asked, Forced, Span, published_span, read_spans, under
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder, Messages
from baft.hosts.models import Host
from baft.hosts.speaking import Row, Speaker
from baft.registry import unknown_name
from baft.types import Probe

Question = tuple[Row, int, int]  # a prompt, the length limit of its reply, and the edit it is asked under
EVERYTHING = frozenset({"teacher_forced", "generate", "generate_chat"})
OBSERVATIONS = EVERYTHING | {"chat_questions"}  # a part of generate_chat


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model says by itself, greedily.

    Args:
        ids: Its tokens, the one that ends it last if it ended.
        text: The same as text, special tokens left out.
        stopped: Whether it ended by itself, within the tokens it was given.
        place: Shape of the batch of prompts it was generated in, and its row there.
    """

    ids: Row
    text: str
    stopped: bool
    place: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """What was seen of a model on one probe; None where it was not asked for.

    Args:
        forced: The predictions over the answer. A locality probe without a known answer has the unedited
            host's own reply in its place: the first `N_COMPARED` tokens, its end included.
        raw: The reply to the prompt as it is.
        chat: The reply to the prompt as the last user turn of a chat.
        skipped: Why the probe was not asked at all, or None.
        doubted: The reply to "Are you sure?" after the reply in the chat.
        undoubted: Why there was a reply in the chat and it was not doubted, or None.
    """

    forced: Forced | None = None
    raw: Reply | None = None
    chat: Reply | None = None
    skipped: str | None = None
    doubted: Reply | None = None
    undoubted: str | None = None

    @property
    def target_logprob(self) -> float | None:
        """Mean log-probability of the target's tokens, teacher-forced, in nats."""
        return None if self.forced is None else self.forced.mean_logprob


@dataclass(frozen=True, slots=True)
class _Plan:
    """The tokens in which a probe is asked."""

    budget: int = 0
    raw: Row = ()
    chat: Row | None = None
    span: Span | None = None
    wants_raw: bool = False
    wants_own_span: bool = False
    skipped: str | None = None
    owner: int = 0

    def needs_raw(self, before: object | None) -> bool:
        """Whether the reply to the raw prompt is needed, be it only for the answer of a span."""
        return self.wants_raw or (self.wants_own_span and before is None)

    @property
    def ask_raw(self) -> Question:
        """The question to the raw prompt."""
        return self.raw, self.budget, self.owner

    @property
    def ask_chat(self) -> Question:
        """The question in the chat."""
        return self.chat or (), self.budget, self.owner

    @property
    def n_tokens(self) -> int:
        """The longest sequence that asking this probe shows the host."""
        rows = [self.raw if self.wants_raw or self.wants_own_span else (), self.chat or ()]
        return max([len(row) + self.budget for row in rows if row] + [len(self.span.ids) if self.span else 0])


class Asker:
    """Asks one host, with whatever edits are in force on it.

    A reply may be as long as the smallest multiple of `max_new_tokens` that holds twice the longest right
    answer. Rows of equal length limit and like length share a batch, and equal rows are asked once.

    A probe that with its reply does not fit the host's context is skipped, as is one for the chat alone
    where there is no chat; it has no scores then, whatever else could be asked, and `skipped` says why.

    Args:
        host: The host.
        batch_size: Rows asked at once.
        max_new_tokens: Length limit of replies to short targets.
        chat: Whether chat is asked too, on a host that has a chat template.

    Raises:
        ConfigError: If a number is not positive.
    """

    def __init__(self, host: Host, *, batch_size: int = 16, max_new_tokens: int = 16, chat: bool = True):
        for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.host, self.batch_size, self.max_new_tokens = host, batch_size, max_new_tokens
        self.speaker = Speaker(host)
        self.chat = chat and self.speaker.encoder.has_chat
        self._encoder = Encoder.for_host(host)  # without a limit: what is too long is counted, not refused

    def observe(
        self,
        asked: Asked,
        probes: Sequence[Probe],
        want: frozenset[str] = EVERYTHING,
        *,
        before: Sequence[Observation] | None = None,
        owners: Sequence[int] | None = None,
    ) -> list[Observation]:
        """Asks all probes.

        Floating point rounds differently in batches of different shapes. Sameness is therefore judged only
        between two observations of the same probes, in one call each (their order does not matter).

        Args:
            asked: The model; or, for edits that do not see each other, the one that puts every row of a batch
                under its own.
            probes: What to ask.
            want: Which of `OBSERVATIONS`.
            before: What was seen of the unedited host on the same probes; left out when it is the host that
                is asked. Locality probes without a known answer take the host's reply from here.
            owners: The edit under which each probe is asked, where there are several models; the host is then
                asked with the same, so that its batches are the same.

        Returns:
            One observation for each probe.

        Raises:
            UnknownNameError: If something unknown is wanted.
            InputError: If `before` does not belong to these probes, or a text cannot be encoded.
        """
        for name in sorted(want - OBSERVATIONS):
            raise unknown_name("observation", name, sorted(OBSERVATIONS))
        if before is not None and len(before) != len(probes):
            raise InputError(
                f"got {len(before)} earlier observations for {len(probes)} probes: give one for each"
            )
        under_one = [0] * len(probes) if owners is None else owners
        plans = [
            replace(self._plan(probe, want), owner=owner)
            for probe, owner in zip(probes, under_one, strict=True)
        ]
        # Apart, so that batches of the one do not depend on whether the other is asked.
        raw = self._generate(asked, [plan.ask_raw for plan in plans if plan.needs_raw(before)])
        chat = self._generate(asked, [plan.ask_chat for plan in plans if plan.chat])
        spans = [
            _own_span(plan, raw, None if before is None else before[i])
            if plan.wants_own_span
            else plan.span and replace(plan.span, owner=plan.owner)
            for i, plan in enumerate(plans)
        ]
        forced = read_spans(
            asked,
            self.speaker,
            {span for span in spans if span},
            batch_size=self.batch_size,
            keep_logits={s for s, probe in zip(spans, probes, strict=True) if s and probe.kind == "locality"},
        )
        return [
            Observation(
                forced=forced[span] if span else None,
                raw=raw[plan.ask_raw] if plan.wants_raw else None,
                chat=chat[plan.ask_chat] if plan.chat else None,
                skipped=plan.skipped,
            )
            for plan, span in zip(plans, spans, strict=True)
        ]

    def converse(
        self, edited: EditedModel, conversations: Sequence[Messages], *, max_new_tokens: int | None = None
    ) -> list[Reply]:
        """The replies to conversations of any number of turns, such as those that `doubted` makes.

        Raises:
            ConfigError: If the host has no chat template.
            InputError: If a conversation is malformed, or it and its reply do not fit the host's context.
        """
        n = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        asked = [(self.speaker.encoder.chat(messages), n, 0) for messages in conversations]
        longest, limit = max((len(row) + n for row, *_ in asked), default=0), self.speaker.encoder.max_tokens
        if limit is not None and longest > limit:
            raise InputError(
                f"a conversation and its reply take {longest} tokens, this host's context holds {limit}: "
                "shorten it, or lower max_new_tokens"
            )
        replies = self._generate(edited, asked)
        return [replies[one] for one in asked]

    def doubt(
        self,
        asked: Asked,
        probes: Sequence[Probe],
        seen: Sequence[Observation],
        owners: Sequence[int] | None = None,
    ) -> list[Observation]:
        """Asks "Are you sure?" after each reply to an edit's own prompt in chat, and adds what is then said.

        The reply may be twice as long as the first one, for it may begin with an assurance. Of other kinds of
        probes, and where there was no chat, the observations stay as they are.

        Args:
            asked: The model, or the one of each row.
            probes: What was asked.
            seen: What it said, from `observe`.
            owners: The edit under which each probe is asked, as for `observe`.
        """
        questions: dict[int, Question] = {}
        found, limit = list(seen), self.speaker.encoder.max_tokens
        for i, (probe, one) in enumerate(zip(probes, seen, strict=True)):
            if probe.kind != "reliability" or one.chat is None:
                continue
            if not one.chat.text.strip():
                found[i] = replace(one, undoubted="its reply in the chat was blank")
                continue
            row, n = self._encoder.chat(doubted(probe, one.chat.text)), 2 * self._budget(probe)
            if limit is not None and len(row) + n > limit:
                found[i] = replace(one, undoubted=f"its chat with a second reply exceeds {limit} tokens")
                continue
            questions[i] = row, n, 0 if owners is None else owners[i]
        replies = self._generate(asked, list(questions.values()))
        for i, key in questions.items():
            found[i] = replace(found[i], doubted=replies[key])
        return found

    def _plan(self, probe: Probe, want: frozenset[str]) -> _Plan:
        if probe.chat and not self.chat:
            return _Plan(skipped="it is for the chat alone, which is not asked or not to be had")
        encoder, budget = self._encoder, self._budget(probe)
        wants_raw = "generate" in want and not probe.chat
        wants_forced = "teacher_forced" in want and not probe.chat
        raw, chat, span = encoder.prompt(probe.prompt), None, None
        if self.chat and ("generate_chat" in want or (probe.chat and "chat_questions" in want)):
            try:
                chat = encoder.chat(probe.messages)
            except InputError as error:  # some templates take no system prompt
                if not probe.earlier:
                    raise
                return _Plan(skipped=str(error))
        if wants_forced and probe.target is not None:
            span = published_span(encoder, probe.prompt, probe.target)
            if not span.answer:
                return _Plan(skipped="by the published rule its target adds no token to the prompt")
        plan = _Plan(budget, raw, chat, span, wants_raw, wants_forced and span is None)
        limit = self.speaker.encoder.max_tokens
        if limit is not None and plan.n_tokens > limit:
            return _Plan(skipped=f"it takes {plan.n_tokens} tokens, and the host's context holds {limit}")
        return plan

    def _budget(self, probe: Probe) -> int:
        answers = [] if probe.target is None else [probe.target, *probe.aliases]
        lengths = [len(self._encoder.edit(probe.prompt, one, eos=False).target_ids) for one in answers]
        return self.max_new_tokens * max(1, -(-2 * max(lengths, default=0) // self.max_new_tokens))

    @torch.no_grad()
    def _generate(self, asked: Asked, questions: Sequence[Question]) -> Mapping[Question, Reply]:
        """The reply to each row, cut at its limit; a batch ends when all its rows have ended."""
        found: dict[Question, Reply] = {}
        stops = self.speaker.encoder.stop_ids()
        # One limit to a batch: with several, a row's limit would bend to the context that its company fills.
        ordered = sorted(set(questions), key=lambda one: (one[1], len(one[0]), one[0], one[2]))
        for budget, group in groupby(ordered, key=lambda one: one[1]):
            several = list(group)
            for start in range(0, len(several), self.batch_size):
                chunk = several[start : start + self.batch_size]
                rows, owners = [row for row, *_ in chunk], [owner for *_, owner in chunk]
                shape = (len(rows), len(rows[-1]))
                replies = self.speaker.replies(under(asked, owners), rows, budget)
                for i, (question, ids) in enumerate(zip(chunk, replies, strict=True)):
                    stopped = bool(ids) and ids[-1] in stops
                    text = self.speaker.text(ids)
                    found[question] = Reply(tuple(ids), text, stopped, (*shape, i))
        return found


def _own_span(plan: _Plan, replies: Mapping[Question, Reply], before: Observation | None) -> Span:
    """A prompt with the beginning of what the unedited host says after it."""
    if before is None:
        answer = replies[plan.ask_raw].ids[:N_COMPARED]
    elif before.forced is None:
        raise InputError(
            "the host was not asked for teacher_forced: observe it with the same probes and want"
        )
    else:
        answer = before.forced.answer
    return Span(plan.raw + answer, len(plan.raw), plan.owner)
