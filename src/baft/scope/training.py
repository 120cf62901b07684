"""Training a scope head for a host, on the project's own words; minutes on a laptop, once for a host."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from baft.errors import ConfigError
from baft.hosts.architecture import find_architecture, input_device
from baft.hosts.early import n_features
from baft.hosts.turns import Row
from baft.nn.scope import ScopeHead, ScopeKeys, contrast, late_interaction
from baft.scope.reading import Reader, padded
from baft.scope.text import Fact, ScopeText

Features = Float[Tensor, "text word n_features"]

_WARM_UP = 20  # steps
_READ = 256  # groups that are read at once
_ROWS = 24  # prompts that are compared at once, of like length
_IN_CHAT = 0.2  # of the prompts, where the host has a chat template
_MENTIONS = 0.25  # sentences with a subject in them that ask nothing, for every fact


@dataclass(frozen=True, kw_only=True)
class ScopeConfig:
    """Settings of a scope head and its training.

    Args:
        n_dims: Width of the vectors of tokens.
        n_hidden: Width of the networks that weigh an edit's tokens.
        n_groups: Groups of four facts to learn from; all are held in memory as the host reads them.
        n_uses: How often each group is learned from.
        n_at_once: Groups in a step.
        n_asked: In how many other wordings each fact is asked.
        n_unrelated: Ordinary sentences in a step, which are about none of the facts.
        hidden_share: So many of the numbers that are read of a token are hidden from the head, others each
            time, as in dropout.
        learning_rate: Of Adam, at its highest; a warm-up and half a cosine.
        channel_weight: Of the losses of the channels by themselves, beside that of both together.
        hard_share: Of pairs that do not belong together, so many for every fact count, the worst.
        other_subject_share: Of neighbors with the relation of an edit and another subject, at most this share
            shall pass before names are compared.
        other_relation_share: The same for another relation of the same subject.
        n_calibrate: Neighbors of each kind that this is set on.

    Raises:
        ConfigError: If a number is not positive.
    """

    n_dims: int = 64
    n_hidden: int = 64
    n_groups: int = 2048
    n_uses: int = 7
    n_at_once: int = 16
    n_asked: int = 2
    n_unrelated: int = 6
    hidden_share: float = 0.2
    learning_rate: float = 2e-3
    channel_weight: float = 0.5
    hard_share: int = 4
    other_subject_share: float = 0.15
    other_relation_share: float = 0.3
    n_calibrate: int = 300

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} is out of range: got {value}, expected above 0")


@dataclass(frozen=True, slots=True)
class Lesson:
    """A text, and whom and what it is about: nobody, nothing where it asks for nothing."""

    words: Float[Tensor, "word n_features"]
    subject: str | None
    relation: str | None


@dataclass(frozen=True, slots=True)
class Group:
    """The prompts of edits that are hard to tell apart, and prompts about them."""

    edits: tuple[Lesson, ...]
    prompts: tuple[Lesson, ...]


@dataclass(frozen=True, slots=True)
class Lessons:
    """Text as a host reads it: groups, and ordinary sentences."""

    groups: tuple[Group, ...]
    unrelated: tuple[Lesson, ...]


def train_scope(
    reader: Reader,
    config: ScopeConfig,
    *,
    seed: int = 0,
    on_step: Callable[[int, int, float], None] | None = None,
) -> ScopeHead:
    """A scope head for a host.

    What the host reads takes ten bytes a token and dimension of its states (five states, two bytes a number):
    3 GB with SmolLM2 by the settings that are the default, in main memory.

    Args:
        reader: Reads with the host, which is not changed.
        config: Settings.
        seed: Of the text and of the first weights.
        on_step: Called after every step with its number, how many there are, and the loss.
    """
    draw, text = random.Random(seed), ScopeText("train", seed)
    lessons = read_lessons(reader, text, config, draw)
    model = reader.host.model
    head = new_head(n_features(find_architecture(model)), config, seed).to(input_device(model))
    return fit(head, lessons, config, draw, on_step)


def read_lessons(reader: Reader, text: ScopeText, config: ScopeConfig, draw: random.Random) -> Lessons:
    """Draws text and has the host read it.

    Args:
        reader: Reads with the host.
        text: What is drawn from.
        config: Settings.
        draw: Of the contexts.
    """
    groups = [text.group(config.n_asked) for _ in range(config.n_groups)]
    parts = [groups[start : start + _READ] for start in range(0, len(groups), _READ)]
    return Lessons(
        tuple(group for part in parts for group in _read(reader, text, part, draw)),
        tuple(
            Lesson(words.half().cpu(), None, None)
            for words in reader.words([reader.encoder.prompt(one) for one in text.sentences])
        ),
    )


def _read(
    reader: Reader, text: ScopeText, groups: Sequence[Sequence[Fact]], draw: random.Random
) -> Iterator[Group]:
    encoder = reader.encoder

    def met(asked: str) -> Row:
        in_chat = encoder.has_chat and draw.random() < _IN_CHAT
        return encoder.chat(text.conversation(asked)) if in_chat else encoder.prompt(asked)

    said: list[tuple[int, bool, Row, str, str | None]] = []  # group, whether it is an edit's, and so on
    for i, facts in enumerate(groups):
        for fact in facts:
            said.append((i, True, encoder.prompt(fact.prompt), fact.subject, fact.relation))
            said += [(i, False, met(asked), fact.subject, fact.relation) for asked in fact.asked]
            if draw.random() < _MENTIONS:
                said.append((i, False, met(text.mention(fact.subject)), fact.subject, None))
    words = reader.words([row for _, _, row, _, _ in said])
    found: list[tuple[list[Lesson], list[Lesson]]] = [([], []) for _ in groups]
    for (i, is_edit, _, subject, relation), one in zip(said, words, strict=True):
        found[i][0 if is_edit else 1].append(Lesson(one.half().cpu(), subject, relation))
    return (Group(tuple(edits), tuple(prompts)) for edits, prompts in found)


def fit(
    head: ScopeHead,
    lessons: Lessons,
    config: ScopeConfig,
    draw: random.Random,
    on_step: Callable[[int, int, float], None] | None = None,
) -> ScopeHead:
    """Trains a head on text as it was read; see `train_scope`.

    Args:
        head: A new one; it is changed.
        lessons: What it learns from.
        config: Settings.
        draw: Of all that is drawn.
        on_step: See `train_scope`.
    """
    device = next(head.parameters()).device
    generator = torch.Generator(device).manual_seed(draw.getrandbits(32))
    kept = 1 - config.hidden_share

    def hidden(features: Features) -> Features:
        return features * torch.empty_like(features).bernoulli_(kept, generator=generator) / kept

    n_at_once = config.n_at_once
    n_steps = config.n_uses * math.ceil(len(lessons.groups) / n_at_once)
    optimizer = torch.optim.Adam(head.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / n_steps)),
    )
    step = 0
    for _ in range(config.n_uses):
        mixed = draw.sample(lessons.groups, len(lessons.groups))
        for start in range(0, len(mixed), n_at_once):
            unrelated = draw.sample(lessons.unrelated, config.n_unrelated)
            loss = _loss(head, config, mixed[start : start + n_at_once], unrelated, hidden)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            head.discounts.data.clamp_(min=0)
            schedule.step()
            step += 1
            if on_step is not None:
                on_step(step, n_steps, loss.item())
    return head.requires_grad_(False)


def new_head(width: int, config: ScopeConfig, seed: int) -> ScopeHead:
    """A head that has not learned yet."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of no accelerator: they are not forked
        return ScopeHead(width, n_dims=config.n_dims, n_hidden=config.n_hidden)


def _loss(
    head: ScopeHead,
    config: ScopeConfig,
    groups: Sequence[Group],
    unrelated: Sequence[Lesson],
    hidden: Callable[[Features], Features],
) -> Float[Tensor, ""]:
    edits = [one for group in groups for one in group.edits]
    prompts = sorted(
        [*(one for group in groups for one in group.prompts), *unrelated], key=lambda one: len(one.words)
    )
    features, real = _padded(edits, head)
    keys = head.keys(hidden(features), real)
    scores = _scores(head, keys, prompts, hidden)
    whom = _same([one.subject for one in edits], [one.subject for one in prompts]).to(scores.device)
    what = _same([one.relation for one in edits], [one.relation for one in prompts]).to(scores.device)
    n_hard = config.hard_share * len(edits)
    loss = contrast(head.log_probability(scores), whom & what, n_hard=n_hard)
    for channel, is_about in enumerate((whom, what)):
        alone = head.log_of_channel(scores[channel], channel)
        loss = loss + config.channel_weight * contrast(alone, is_about, n_hard=n_hard)
    return loss


def _same(names: Sequence[str | None], others: Sequence[str | None]) -> Bool[Tensor, "other name"]:
    return torch.tensor([[name == other is not None for name in names] for other in others])


def _scores(
    head: ScopeHead, keys: ScopeKeys, prompts: Sequence[Lesson], hidden: Callable[[Features], Features]
) -> Float[Tensor, "channel prompt edit"]:
    """The scores of prompts, which are sorted by their length, some at a time."""
    found = []
    for start in range(0, len(prompts), _ROWS):
        features, real = _padded(prompts[start : start + _ROWS], head)
        found.append(late_interaction(keys, head.vectors(hidden(features)), real, head.discounts))
    return torch.cat(found, 1)


def _padded(
    lessons: Sequence[Lesson], head: ScopeHead
) -> tuple[Float[Tensor, "text place n_features"], Bool[Tensor, "text place"]]:
    """Some lessons where the head is; all of them stay in main memory."""
    features, real = padded([one.words for one in lessons])
    return features.to(head.slopes.device), real.to(head.slopes.device)
