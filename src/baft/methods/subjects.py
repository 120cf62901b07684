"""What a prompt is about, and where in it that is said: for methods that edit at the subject's last token.

A subject that the edit names must stand in the prompt. Where none is named, the longest run of capitalized
words is taken, small words inside it included ("Battle of the Nile"); articles, question words and the like
at the prompt's beginning are capitalized for another reason and do not count.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from baft.errors import InputError
from baft.hosts.background import background_text
from baft.hosts.encoding import EncodedEdit, Encoder
from baft.types import Edit

_WORD = re.compile(r"[^\W_](?:[\w'’.&-]*[^\W_])?")
_JOINTS = re.compile("and|da|den?|der|di|du|for|in|la|le|of|the|van|von|y")
_OPENERS = re.compile(
    "an?|and|are|as|at|by|can|could|did|do|does|for|from|had|has|have|how|if|in|is|it|its|my|name|of|on|our"
    "|that|the|there|these|this|those|to|was|were|what|when|where|which|who|whom|whose|why|will|with|would|your"
)


@dataclass(frozen=True, slots=True)
class Placed:
    """A prompt with its target, and where in the prompt its subject ends.

    Args:
        text: The tokens.
        place: Index of the subject's last token.
    """

    text: EncodedEdit
    place: int


def subject_span(edit: Edit) -> tuple[int, int]:
    """Where in the prompt the subject begins and ends; the last time it is said, where it is said twice.

    As whole words if it is there as such, and as it is spelled if it is there so: "US" is not in "thus".

    Raises:
        InputError: If the subject is not in the prompt, or none is named and none can be told.
    """
    prompt = edit.prompt
    if edit.subject and edit.subject.strip():
        named = edit.subject.strip()
        part = re.escape(named)
        whole = rf"(?<!\w){part}(?!\w)"
        for pattern, flags in ((whole, 0), (whole, re.IGNORECASE), (part, 0), (part, re.IGNORECASE)):
            found = list(re.finditer(pattern, prompt, flags))
            if found:
                return found[-1].span()
        raise InputError(
            f"the subject {named!r} is not in the prompt {prompt!r}: give subject= as the prompt says it"
        )
    spans = _capitalized(prompt)
    if not spans:
        raise InputError(
            f"cannot tell what {prompt!r} is about, for it names nothing in capitals: give subject="
        )
    return max(spans, key=lambda span: span[1] - span[0])


def _capitalized(prompt: str) -> list[tuple[int, int]]:
    """Where runs of capitalized words begin and end."""
    spans: list[tuple[int, int]] = []
    joins = False  # whether only small words stand between the last run and here
    for number, word in enumerate(_WORD.finditer(prompt)):
        said = word.group()
        if said[0].isupper() and not (number == 0 and _OPENERS.fullmatch(said.lower())):
            between = prompt[spans[-1][1] : word.start()] if spans else ""
            if joins and not re.search(r"[,;:?!()\"]", between):
                spans[-1] = (spans[-1][0], word.end())
            else:
                spans.append((word.start(), word.end()))
            joins = True
        else:
            joins = joins and bool(_JOINTS.fullmatch(said))
    return spans


def prefixes(n: int, seed: int) -> tuple[str, ...]:
    """Beginnings of sentences that no edit is about, of 2, 5 and 10 words in turn, each closed by a period.

    The authors of ROME let the host write such texts; these are the project's own, drawn from the seed, so
    that nothing has to be generated.
    """
    drawn = random.Random(seed).sample(background_text()["sentences"], n)
    lengths = (2, 5, 10)
    return tuple(
        " ".join(text.split()[: lengths[i % 3]]).rstrip(".,;:") + ". " for i, text in enumerate(drawn)
    )


def placed(encoder: Encoder, edit: Edit, before: Sequence[str], *, eos: bool) -> list[Placed]:
    """An edit's prompt with its target, alone and behind each of some texts that leave it room.

    Raises:
        InputError: If the edit itself does not fit the host, or its subject cannot be found.
    """
    _, end = subject_span(edit)
    found = [_placed(encoder, edit.prompt, edit.target, end, eos)]
    for text in before:
        try:
            found.append(_placed(encoder, text + edit.prompt, edit.target, len(text) + end, eos))
        except InputError:  # together they are longer than the host's context
            continue
    return found


def essence(encoder: Encoder, edit: Edit) -> Placed:
    """The prompt "{subject} is a", at whose end ROME keeps the host's prediction; its target is idle."""
    start, end = subject_span(edit)
    named = edit.prompt[start:end]
    return _placed(encoder, f"{named} is a", "thing", len(named), False)


def _placed(encoder: Encoder, prompt: str, target: str, end: int, eos: bool) -> Placed:
    return Placed(encoder.edit(prompt, target, eos=eos), encoder.token_at(prompt, end - 1))
