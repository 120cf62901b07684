"""What the scores are called and mean, and those that are computed from texts and token ids alone.

Synonyms from the literature stand in every summary. Teacher-forced and generated scores never share a name.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from baft.errors import InputError
from baft.registry import unknown_name

MetricKind = Literal["reliability", "generality", "portability", "locality", "run"]

# --- names ---


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """A score that records may hold.

    Args:
        name: Its name, `kind@how` for scores of probes.
        kind: The kind of probe it is taken on; `run` for what is measured once a run.
        better: Whether higher or lower is better.
        summary: What it means, with its published synonyms.
        bounds: The least and the greatest value it can take.
    """

    name: str
    kind: MetricKind
    better: Literal["higher", "lower"]
    summary: str
    bounds: tuple[float, float] = (0.0, 1.0)


_ASKED: Mapping[MetricKind, tuple[str, str]] = {
    "reliability": ("the edit's own prompt", "efficacy, ES, edit success, rewrite_acc"),
    "generality": ("a rephrased prompt", "paraphrase, PS, rephrase_acc"),
    "portability": ("a prompt whose answer follows from the edit", "portability_acc, ripple effects"),
}


def _success(kind: MetricKind) -> list[MetricSpec]:
    where, synonyms = _ASKED[kind]
    exact = "the greedy reply equals an accepted answer after normalization and ends by itself"
    specs = [
        MetricSpec(
            f"{kind}@teacher_forced",
            kind,
            "higher",
            f"On {where}, the share of the target's tokens that are the argmax when the target's own tokens "
            f"before them are given; published as {synonyms}.",
        )
    ]
    in_chat = f"{where} inside the chat template"
    asked_how = {"generate": where, "generate_chat": in_chat}
    if kind == "reliability":
        asked_how["generate_doubted"] = f'{in_chat}, and then "Are you sure?" after the model\'s own reply'
    for how, asked in asked_how.items():
        specs += [
            MetricSpec(f"{kind}@{how}", kind, "higher", f"On {asked}, whether {exact}; exact match, EM."),
            MetricSpec(
                f"{kind}@{how}_contains",
                kind,
                "higher",
                f"On {asked}, whether the greedy reply holds an accepted answer as whole words; the looser "
                "match of question answering.",
            ),
            MetricSpec(
                f"{kind}@{how}_stopped",
                kind,
                "higher",
                f"On {asked}, whether the greedy reply ends by itself before the limit, right or wrong.",
            ),
        ]
    specs.append(
        MetricSpec(
            f"{kind}@margin",
            kind,
            "higher",
            f"On {where}, the least lead of a target token over the best other token under teacher forcing, "
            "in nats, negative where the target is not what greedy decoding says.",
            (-math.inf, math.inf),
        )
    )
    return specs


_POSITIVE = (0.0, math.inf)
_SPECS = (
    *_success("reliability"),
    *_success("generality"),
    *_success("portability"),
    MetricSpec(
        "locality@argmax",
        "locality",
        "higher",
        "On an unrelated prompt, the share of positions of its answer, which is given, where the argmax is "
        "the unedited host's; published as locality, specificity, neighborhood score (NS), *_acc.",
    ),
    MetricSpec(
        "locality@text",
        "locality",
        "higher",
        "On an unrelated prompt, whether the greedy reply is the unedited host's, token by token.",
    ),
    MetricSpec(
        "locality@text_chat",
        "locality",
        "higher",
        "On an unrelated prompt inside the chat template, whether the greedy reply is the unedited host's, "
        "token by token.",
    ),
    MetricSpec(
        "locality@bit_exact",
        "locality",
        "higher",
        "On an unrelated prompt and its answer, whether every logit is bit for bit the unedited host's.",
    ),
    MetricSpec(
        "locality@logprob_max",
        "locality",
        "lower",
        "On an unrelated prompt and its answer, the largest absolute change of a log-probability, in nats.",
        _POSITIVE,
    ),
    MetricSpec(
        "locality@logprob_mean",
        "locality",
        "lower",
        "On an unrelated prompt and its answer, the mean absolute change of log-probabilities, in nats.",
        _POSITIVE,
    ),
    MetricSpec(
        "locality@bleed",
        "locality",
        "lower",
        "On an unrelated prompt, whether the greedy reply holds the edit's new target where the unedited "
        "host's does not.",
    ),
    MetricSpec(
        "locality@bleed_chat",
        "locality",
        "lower",
        "On an unrelated prompt inside the chat template, whether the greedy reply holds the edit's new "
        "target where the unedited host's does not.",
    ),
    MetricSpec(
        "fluency",
        "run",
        "higher",
        "Weighted entropy of the bigrams and trigrams of generated text, in bits; generation entropy (GE), "
        "ngram_entropy, in tables often times 100.",
        _POSITIVE,
    ),
    MetricSpec(
        "perplexity_ratio",
        "run",
        "lower",
        "Perplexity of ordinary text under the edited model over that under the unedited host; 1 is no harm.",
        _POSITIVE,
    ),
    MetricSpec(
        "false_fires_tokens",
        "run",
        "lower",
        "The share of tokens of ordinary text at which some gate is open.",
    ),
    MetricSpec(
        "false_fires_texts",
        "run",
        "lower",
        "The share of ordinary texts in which some gate is open at some token.",
    ),
    MetricSpec(
        "sentiment",
        "run",
        "higher",
        "How far replies of the wanted sentiment are likelier than those of the opposite one, less what they "
        "lost against the unedited host; ConvSent's edit success.",
    ),
)

METRICS: Mapping[str, MetricSpec] = {spec.name: spec for spec in _SPECS}


def metric(name: str) -> MetricSpec:
    """The metric of that name.

    Raises:
        UnknownNameError: If there is none; suggests the nearest name.
    """
    if name not in METRICS:
        raise unknown_name("metric", name, list(METRICS))
    return METRICS[name]


# --- replies ---

_ARTICLES = frozenset({"a", "an", "the"})


def normalize(text: str) -> str:
    """The text as it is compared: NFKC, lower case, no punctuation, no articles, single spaces.

    After the evaluation of SQuAD 1.1 (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250), which drops
    punctuation without leaving a gap: "U.S." becomes "us", "Franco-German" "francogerman". Differing from it:
    all of Unicode's punctuation goes, not ASCII's alone. A text of articles alone keeps them, and one of
    punctuation alone keeps it, so that the answers "The The" and "!" do not become equal to nothing.
    """
    words = _words(text, gap="")
    content = [word for word in words if word not in _ARTICLES]
    return " ".join(content or words) or " ".join(_fold(text).split())


def exact_match(reply: str, answers: Sequence[str]) -> bool:
    """Whether the reply is one of the answers after normalization.

    Raises:
        InputError: If there is no answer, or a blank one.
    """
    _check_answers(answers)
    return normalize(reply) in {normalize(answer) for answer in answers}


def contains(reply: str, answers: Sequence[str]) -> bool:
    """Whether the reply holds one of the answers as consecutive whole words after normalization.

    Punctuation is read both as nothing and as a gap, the same way in reply and answer: "U.S." is found in
    "the US", and "Rome" in "Rome/Lazio", but never in "Romeo". What matches exactly is contained.

    Raises:
        InputError: If there is no answer, or a blank one.
    """
    _check_answers(answers)
    return any(_holds(reply, answer) for answer in answers)


def _holds(reply: str, answer: str) -> bool:
    for gap in ("", " "):
        inside, wanted = _words(reply, gap=gap), _words(answer, gap=gap)
        if any(word not in _ARTICLES for word in wanted):
            inside = [word for word in inside if word not in _ARTICLES]
            wanted = [word for word in wanted if word not in _ARTICLES]
        if wanted and f" {' '.join(wanted)} " in f" {' '.join(inside)} ":
            return True
    return not _words(answer, gap="") and normalize(answer) in _fold(reply)


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())


def _words(text: str, *, gap: str) -> list[str]:
    """The words without punctuation, for each mark of which `gap` is put."""
    kept = (gap if _is_punctuation(character) else character for character in _fold(text))
    return unicodedata.normalize("NFKC", "".join(kept)).split()


def _is_punctuation(character: str) -> bool:
    """Unicode's punctuation, and the signs of ASCII that SQuAD counts too, such as $ and +."""
    category = unicodedata.category(character)
    return category.startswith("P") or (character < "\x7f" and category.startswith("S"))


def _check_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str):
        raise InputError(f"answers must be a sequence of texts, got the text {answers!r}: put it into a list")
    if not answers:
        raise InputError("no answer to compare the reply with: give at least one")
    if not all(answer.strip() for answer in answers):
        raise InputError(f"a blank answer matches nothing of sense: {list(answers)!r}")


# --- sameness ---


def share_changed(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> float:
    """The share of replies that are not token by token what they were.

    Raises:
        InputError: If there is no reply, or the two differ in number.
    """
    _check_pairs(before, after, "replies")
    return sum(list(old) != list(new) for old, new in zip(before, after, strict=True)) / len(before)


def token_agreement(before: Sequence[int], after: Sequence[int]) -> float:
    """The share of positions of one span that hold the same token; `locality@argmax` of one probe.

    Raises:
        InputError: If the span is empty, or the two differ in length.
    """
    _check_pairs(before, after, "tokens")
    return sum(old == new for old, new in zip(before, after, strict=True)) / len(before)


def _check_pairs(before: Sequence[object], after: Sequence[object], what: str) -> None:
    if len(before) != len(after):
        raise InputError(
            f"{len(before)} {what} before and {len(after)} after: they cannot be compared one by one"
        )
    if not before:
        raise InputError(f"no {what} to compare")


# --- fluency ---

_TOKEN = re.compile(r"\w+|[^\w\s]")


def ngram_entropy(text: str | Sequence[str] | Sequence[int]) -> float:
    """Fluency of one generated text, in bits: low where it repeats itself.

    `(2/3 H_2 + 4/3 H_3) / 2`, with `H_n = -sum f log2 f` over the relative frequencies `f` of the n-grams.
    The weights are those of ROME (Meng et al. 2022, https://arxiv.org/abs/2202.05262); their halving, which
    makes it a mean, is in ROME's and EasyEdit's code, whose tables show it times 100. A text is split into
    runs of word characters and single other signs, not by NLTK as there, so numbers differ a little. Give
    the same text as they do, prompt included, to compare. With fewer than four tokens there are not two
    trigrams, and below three not two bigrams; an entropy of one n-gram or none is 0, so a short text counts
    as not fluent.

    Args:
        text: A text, or its tokens.
    """
    tokens: Sequence[str] | Sequence[int] = _TOKEN.findall(text) if isinstance(text, str) else text
    return (2 / 3 * _entropy(tokens, 2) + 4 / 3 * _entropy(tokens, 3)) / 2


def _entropy(tokens: Sequence[str] | Sequence[int], n: int) -> float:
    counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    total = counts.total()
    return math.fsum(count / total * math.log2(total / count) for count in counts.values())


# --- sentiment ---


class SentimentScore(NamedTuple):
    """Edit success on ConvSent: `score = z_sent * z_topic`, each between 0 and 1."""

    score: float
    z_sent: float
    z_topic: float


def sentiment_score(
    wanted: Sequence[Sequence[float]],
    opposite: Sequence[Sequence[float]],
    wanted_before: Sequence[Sequence[float]],
) -> SentimentScore:
    """Whether an edit of sentiment took, without forgetting the topic.

    `z_sent = sigmoid(mean log p_edited(wanted) - mean log p_edited(opposite))` and `z_topic = min(1,
    exp(mean log p_edited(wanted) - mean log p_host(wanted)))` (SERAC, Mitchell et al. 2022,
    https://arxiv.org/abs/2206.06520). The means go over all tokens of all replies, so a long reply weighs
    more, as in the authors' code. `p_host` must come from before the edit: EasyEdit asks one model for both
    where a method changes weights in place, and its `z_topic` is then 1 whatever happened.

    Args:
        wanted: For each reply of the sentiment edited in, the log-probability of each token, in nats.
        opposite: The same for replies of the opposite sentiment.
        wanted_before: For the replies of `wanted`, the same under the unedited host.

    Raises:
        InputError: If one of them has no token or a value that is not finite, or the lengths of
        `wanted_before`
            are not those of `wanted`.
    """
    if [len(reply) for reply in wanted] != [len(reply) for reply in wanted_before]:
        raise InputError("wanted and wanted_before must hold the same replies, token by token")
    new, other = _token_mean("wanted", wanted), _token_mean("opposite", opposite)
    old = _token_mean("wanted_before", wanted_before)
    z_sent = 0.5 * (1 + math.tanh((new - other) / 2))  # the sigmoid, without overflow
    z_topic = math.exp(min(0.0, new - old))
    return SentimentScore(z_sent * z_topic, z_sent, z_topic)


def _token_mean(name: str, replies: Sequence[Sequence[float]]) -> float:
    values = [value for reply in replies for value in reply]
    if not values:
        raise InputError(f"{name} has no token: give the log-probabilities of at least one reply")
    if not all(math.isfinite(value) for value in values):
        raise InputError(f"{name} has a log-probability that is not finite")
    return math.fsum(values) / len(values)
