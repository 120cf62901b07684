"""Harder ways to put a probe's question: behind a distraction, far into a text or a chat, negated, doubted.

Each is a pure function of its arguments. The fillers are the project's own sentences, the same that gates
are set against; which of them a probe gets depends on its prompt alone. The tag of a rendered probe ends in
`+` and the rendering, so that it is never taken for a question as the benchmark puts it.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice

from baft.errors import ConfigError, InputError
from baft.evals.experiment import Rendering
from baft.hosts.background import background_text
from baft.hosts.encoding import Encoder
from baft.types import EditCase, Probe

DOUBT = "Are you sure?"
_CONVERSATION = (
    ("system", "This is the help desk of a library. Be kind, and do not speculate."),
    ("user", "Can I bring back a book a day late?"),
    ("assistant", "Yes, there is a grace period of three days."),
)
_VERBS = re.compile(r"\b(?:is|are|was|were|can|could|will|would|has|have|had)\b")


def with_renderings(case: EditCase, renderings: Sequence[Rendering], encoder: Encoder) -> EditCase:
    """A case with further probes: the edit's own prompt and its first rephrasing, asked in harder ways.

    The own prompt so asked is no longer the one that was trained on, so it is asked for generality, under
    the tag `edit+...`; what is negated for locality. The distracting sentence names the answer that was right
    before the edit, where the case tells it. Doubt needs a reply first, and makes no probe.

    Args:
        case: The case.
        renderings: Which.
        encoder: Counts the unrelated tokens.
    """
    made = tuple(probe for how in renderings for probe in _renderings(case, how, encoder))
    return replace(case, probes=(*case.probes, *made))


def _renderings(case: EditCase, how: Rendering, encoder: Encoder) -> Iterator[Probe]:
    edit = case.edit
    own = Probe(edit.id, "generality", edit.prompt, edit.target, "edit")
    others = [
        probe
        for probe in case.probes
        if probe.kind == "generality" and probe.target == edit.target and not probe.chat
    ]
    for probe in (own, *others[:1]):
        match how:
            case "distracting_prefix":
                yield with_distracting_prefix(probe, edit.ground_truth)
            case "after_unrelated_tokens":
                yield after_unrelated_tokens(probe, encoder)
            case "after_unrelated_words":
                yield after_unrelated_words(probe)
            case "negated":
                yield negated(probe)
            case "in_conversation":
                yield in_conversation(probe)
            case "doubted":
                return


def with_distracting_prefix(probe: Probe, distractor: str | None = None) -> Probe:
    """The probe behind a sentence that leads elsewhere.

    Args:
        probe: The probe.
        distractor: A wrong answer to put into the model's mind, best the one that was right before the edit;
            without it the sentence is about something else altogether.

    Raises:
        InputError: If the distractor is blank.
    """
    if distractor is not None and not distractor.strip():
        raise InputError(f"the distractor is blank ({distractor!r}): give a wrong answer, or None")
    prefix = _sentences(probe)[0] if distractor is None else f"Everybody keeps talking about {distractor}."
    return _rendered(probe, "distracting_prefix", f"{prefix} {probe.prompt}")


def after_unrelated_tokens(probe: Probe, encoder: Encoder, n: int = 200) -> Probe:
    """The probe behind unrelated whole sentences, the fewest that have `n` tokens together.

    Raises:
        ConfigError: If `n` is not positive.
    """

    def n_tokens(text: str) -> int:
        return len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])

    return _rendered(probe, "after_unrelated_tokens", _filler(probe, n, "token", n_tokens) + probe.prompt)


def after_unrelated_words(probe: Probe, n: int = 200) -> Probe:
    """The probe behind unrelated whole sentences, the fewest that have `n` words together.

    Raises:
        ConfigError: If `n` is not positive.
    """
    filler = _filler(probe, n, "word", lambda text: len(text.split()))
    return _rendered(probe, "after_unrelated_words", filler + probe.prompt)


def _filler(probe: Probe, n: int, unit: str, length: Callable[[str], int]) -> str:
    if n < 1:
        raise ConfigError(f"there must be at least 1 {unit} before the prompt, got n={n}")
    filler, so_far = "", 0
    for sentence in cycle(_sentences(probe)):
        filler += f"{sentence} "
        so_far += length(f"{sentence} ")
        if so_far >= n:
            return filler
    raise AssertionError("a cycle does not end")


def in_conversation(probe: Probe) -> Probe:
    """The probe as the last of a chat that has a system prompt and an earlier question with its answer."""
    return replace(_rendered(probe, "in_conversation", probe.prompt), chat=True, earlier=_CONVERSATION)


def negated(probe: Probe) -> Probe:
    """The probe's statement denied, or its question asked for what is not the answer.

    What was the right answer is now a wrong one and no right one is known: a locality probe, whose `bleed`
    says that the edited model still gives the edit's target where the host did not. The denial is put in by
    rule and is not always good English.
    """
    prompt = probe.prompt.rstrip()
    verbs = list(_VERBS.finditer(prompt))
    if prompt.endswith("?"):
        text = f"{prompt} The answer is not"
    elif verbs:
        end = verbs[-1].end()  # the last: earlier ones may stand inside a name
        text = f"{prompt[:end]} not{prompt[end:]}"
    else:
        text = f"It is not true that {prompt}"
    return replace(_rendered(probe, "negated", text), kind="locality", target=None, aliases=())


def doubted(probe: Probe, said: str) -> list[dict[str, str]]:
    """The chat in which the model has answered a probe and is asked whether it is sure.

    Args:
        probe: The probe.
        said: What the model replied to it in the chat.

    Raises:
        InputError: If it said nothing.
    """
    if not said.strip():
        raise InputError(f"a blank reply ({said!r}) cannot be doubted: leave this probe out, and count it")
    return [
        {"role": "user", "content": probe.prompt},
        {"role": "assistant", "content": said.strip()},
        {"role": "user", "content": DOUBT},
    ]


def _rendered(probe: Probe, how: str, prompt: str) -> Probe:
    return replace(probe, prompt=prompt, tag=f"{probe.tag or probe.kind}+{how}")


def _sentences(probe: Probe) -> list[str]:
    """The project's sentences, from a place on that depends on the prompt."""
    sentences = background_text()["sentences"]
    start = int.from_bytes(hashlib.sha256(probe.prompt.encode()).digest()[:4], "big") % len(sentences)
    return list(islice(cycle(sentences), start, start + len(sentences)))
