"""Training a scope head for a host, on the project's own words; minutes on a laptop, once for a host."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from baft.errors import ConfigError
from baft.hosts.architecture import find_architecture, input_device
from baft.hosts.background import background_text
from baft.hosts.early import early_features, n_features
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.nn.scope import ScopeHead, ScopeKeys, contrast, late_interaction
from baft.scope.text import Fact, ScopeText

_WARM_UP = 20  # steps
_ROWS = 24  # of one run of the host or of one comparison, of like length, so that little of it is padding


@dataclass(frozen=True, kw_only=True)
class ScopeConfig:
    """Settings of a scope head and its training.

    Args:
        n_dims: Width of the vectors of tokens.
        n_hidden: Width of the networks that weigh an edit's tokens.
        n_steps: Steps; each is on text of its own.
        n_groups: Groups of three facts in a step.
        n_asked: In how many other wordings each fact is asked.
        n_unrelated: Ordinary sentences in a step, which are about none of the facts.
        learning_rate: Of Adam, at its highest; a warm-up and half a cosine.
        channel_weight: Of the losses of the channels by themselves, beside that of both together.
        hard_share: Of pairs that do not belong together, so many for every fact count, the worst.

    Raises:
        ConfigError: If a number is not positive.
    """

    n_dims: int = 64
    n_hidden: int = 64
    n_steps: int = 350
    n_groups: int = 16
    n_asked: int = 2
    n_unrelated: int = 6
    learning_rate: float = 2e-3
    channel_weight: float = 0.5
    hard_share: int = 4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} is out of range: got {value}, expected above 0")


def train_scope(
    host: Host,
    encoder: Encoder,
    config: ScopeConfig,
    *,
    seed: int = 0,
    on_step: Callable[[int, int, float], None] | None = None,
) -> ScopeHead:
    """A scope head for a host.

    Args:
        host: The host; it is run up to its last early block, and not changed.
        encoder: Its encoder.
        config: Settings.
        seed: Of the text and of the first weights.
        on_step: Called after every step with its number, how many there are, and the loss.
    """
    text, draw = ScopeText("train", seed), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of no accelerator: they are not forked
        width = n_features(find_architecture(host.model))
        head = ScopeHead(width, n_dims=config.n_dims, n_hidden=config.n_hidden)
    head = head.to(input_device(host.model))
    optimizer = torch.optim.Adam(head.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / config.n_steps)),
    )
    ordinary = background_text()["sentences"]
    for step in range(config.n_steps):
        facts = [fact for _ in range(config.n_groups) for fact in text.group(config.n_asked)]
        chosen = torch.randint(len(ordinary), (config.n_unrelated,), generator=draw)
        loss = _loss(host, encoder, head, config, facts, [ordinary[i] for i in chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, config.n_steps, loss.item())
    return head.requires_grad_(False)


def _loss(
    host: Host,
    encoder: Encoder,
    head: ScopeHead,
    config: ScopeConfig,
    facts: Sequence[Fact],
    unrelated: Sequence[str],
) -> Float[Tensor, ""]:
    asked = [(text, fact) for fact in facts for text in fact.asked]
    prompts = [*(text for text, _ in asked), *unrelated]
    none = [None] * len(unrelated)
    whom = _same([fact.subject for fact in facts], [*(fact.subject for _, fact in asked), *none])
    what = _same([fact.relation for fact in facts], [*(fact.relation for _, fact in asked), *none])
    keys = _keys(host, encoder, head, [fact.prompt for fact in facts])
    scores = _scores(host, encoder, head, keys, prompts)
    whom, what = whom.to(scores.device), what.to(scores.device)
    n_hard = config.hard_share * len(facts)
    loss = contrast(head.log_probability(scores), whom & what, n_hard=n_hard)
    for channel, is_about in enumerate((whom, what)):
        alone = head.log_of_channel(scores[channel], channel)
        loss = loss + config.channel_weight * contrast(alone, is_about, n_hard=n_hard)
    return loss


def _same(names: Sequence[str], others: Sequence[str | None]) -> Bool[Tensor, "other name"]:
    return torch.tensor([[name == other for name in names] for other in others])


def _keys(host: Host, encoder: Encoder, head: ScopeHead, prompts: Sequence[str]) -> ScopeKeys:
    return head.keys(*early_features(host, encoder, [encoder.prompt(text) for text in prompts]))


def _scores(
    host: Host, encoder: Encoder, head: ScopeHead, keys: ScopeKeys, prompts: Sequence[str]
) -> Float[Tensor, "channel prompt edit"]:
    """The scores of prompts, a few of like length at a time."""
    rows = [encoder.prompt(text) for text in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = []
    for start in range(0, len(order), _ROWS):
        features, real = early_features(host, encoder, [rows[i] for i in order[start : start + _ROWS]])
        found.append(late_interaction(keys, head.vectors(features), real))
    return torch.cat(found, 1)[:, torch.tensor(order).argsort().to(keys.weights.device)]
