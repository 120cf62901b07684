"""What a scope is learned from: questions about made-up facts, reworded, next to others nearly the same.

The words are the project's own (`words/`): some 490 relations in about 7,600 wordings, 9,900 names of 48
kinds of subjects, and parts that further names are put together from. No answer is needed, and none is there.
"""

import hashlib
import random
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from baft.hosts.background import background_text

Part = Literal["train", "calibrate"]

_SAME_GROUP = 0.6  # how often the other relation of a group is one that is easily taken for the first
_SIMILAR = 0.5  # how often the other subject shares a word with the first
_INVENTED = 0.5  # how often a subject is put together from parts, where its kind has such
_CALIBRATE_TENTHS = 2  # of relations, names and sentences: kept from training


@dataclass(frozen=True, slots=True)
class Relation:
    """What can be asked of subjects of some kinds.

    Args:
        name: Its name; the same in two files is one relation.
        subjects: The kinds.
        group: Relations of a group are easily taken for one another.
        wordings: Statements that break off before the answer, and questions; `{s}` stands for the subject.
    """

    name: str
    subjects: tuple[str, ...]
    group: str
    wordings: tuple[str, ...]

    def ask(self, subject: str, draw: random.Random) -> str:
        """One wording, about a subject."""
        text = draw.choice(self.wordings).replace("{s}", subject)
        return text[0].upper() + text[1:] if draw.random() < 0.9 else text


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that can be asked, as an edit might be about it, and how else it is asked.

    Args:
        subject: Whom or what it is about.
        relation: What of it.
        prompt: One wording.
        asked: Other wordings, with text around them.
    """

    subject: str
    relation: str
    prompt: str
    asked: tuple[str, ...]


class ScopeText:
    """Draws groups of facts that are hard to tell apart: two subjects and three relations.

    Args:
        part: Of relations, names and sentences, those to learn from, or those that are kept to check against.
        seed: Of the drawing.
    """

    def __init__(self, part: Part = "train", seed: int = 0):
        self._draw = random.Random(seed)
        self._names, self._parts = _names()
        self._names = {kind: [one for one in all_ if _is_in(part, one)] for kind, all_ in self._names.items()}
        self._relations: dict[str, list[Relation]] = {}
        for relation in relations():
            if _is_in(part, relation.name):
                for kind in relation.subjects:
                    self._relations.setdefault(kind, []).append(relation)
        self._kinds = sorted(kind for kind, there in self._relations.items() if len(there) > 1)
        # Kinds of which more can be asked come oftener, but not in proportion.
        self._weights = [len(self._relations[kind]) ** 0.5 for kind in self._kinds]
        self.sentences = tuple(one for one in background_text()["sentences"] if _is_in(part, one))

    def group(self, n_asked: int) -> tuple[Fact, ...]:
        """Four facts: one, that of another subject, and two of other relations, the first easily mistaken.

        Where no third thing can be asked of the subject, they are three.

        Args:
            n_asked: In how many other wordings each is asked.
        """
        draw = self._draw
        kind = draw.choices(self._kinds, self._weights)[0]
        there = self._relations[kind]
        first = draw.choice(there)
        near = [one for one in there if one.group == first.group and one is not first]
        others = near if near and draw.random() < _SAME_GROUP else [one for one in there if one is not first]
        second = draw.choice(others)
        third = draw.choice([one for one in there if one not in (first, second)] or [second])
        subject = self._subject(kind)
        other = subject
        while other == subject:
            other = self._similar(subject, kind) if draw.random() < _SIMILAR else self._subject(kind)
        pairs = dict.fromkeys([(subject, first), (other, first), (subject, second), (subject, third)])
        return tuple(
            Fact(
                whom,
                what.name,
                what.ask(whom, draw),
                tuple(self._with_text(what.ask(whom, draw)) for _ in range(n_asked)),
            )
            for whom, what in pairs
        )

    def mention(self, subject: str) -> str:
        """A sentence with a subject in it that asks nothing of it."""
        text = self._draw.choice(_MENTIONS).replace("{s}", subject)
        return text[0].upper() + text[1:]

    def conversation(self, asked: str) -> list[dict[str, str]]:
        """A chat that ends in a question; half of them have a system prompt, a third earlier turns."""
        draw = self._draw
        messages = [{"role": "user", "content": asked}]
        if draw.random() < 1 / 3:
            question = {"role": "user", "content": draw.choice(background_text()["prompts"])}
            reply = {"role": "assistant", "content": draw.choice((*_REPLIES, draw.choice(self.sentences)))}
            messages = [question, reply, *messages]
        if draw.random() < 1 / 2:
            messages = [{"role": "system", "content": draw.choice(_SYSTEM_PROMPTS)}, *messages]
        return messages

    def _subject(self, kind: str) -> str:
        invent = _INVENTORS.get(kind)
        if invent is not None and self._draw.random() < _INVENTED:
            return invent(self._draw, self._parts)
        return self._draw.choice(self._names[kind])

    def _similar(self, subject: str, kind: str) -> str:
        """Another subject of the kind, which shares its first or its last word if they have several."""
        words, other = subject.split(), self._subject(kind).split()
        if len(words) > 1 and len(other) > 1:
            other = [words[0], *other[1:]] if self._draw.random() < 0.5 else [*other[:-1], words[-1]]
        return " ".join(other)

    def _with_text(self, asked: str) -> str:
        """A wording as it may be met: alone, with an instruction, behind something else, said in passing."""
        draw, luck = self._draw, self._draw.random()
        if luck < 0.55:
            return f"{asked} {draw.choice(_TRAILERS)}" if luck < 0.08 and asked.endswith("?") else asked
        if luck < 0.74:
            return f"{draw.choice(self.sentences)} {asked}"
        if luck < 0.80:
            return " ".join([*draw.sample(self.sentences, draw.randint(2, 7)), asked])
        if luck < 0.87:
            return draw.choice(_OPENINGS) + asked
        if luck < 0.90:
            return asked.lower()
        if luck < 0.95:
            return asked[:-1] + draw.choice(_ENDINGS) if asked.endswith("?") else asked
        words = draw.choice(self.sentences).split()
        start = draw.randrange(max(1, len(words) - 4))
        return f"{' '.join(words[start : start + draw.randint(2, 7)])}. {asked}"


@cache
def relations() -> tuple[Relation, ...]:
    """All relations, those of one name as one."""
    found: dict[str, Relation] = {}
    for file in sorted(_words().iterdir(), key=lambda one: one.name):
        if not file.name.startswith("relations_"):
            continue
        for row in tomllib.loads(file.read_text(encoding="utf-8"))["relations"]:
            wordings = (*row["completions"], *row["questions"])
            one = Relation(row["name"], tuple(row["subjects"]), row["group"], wordings)
            same = found.get(one.name)
            if same is not None:
                kinds = tuple(dict.fromkeys((*same.subjects, *one.subjects)))
                one = Relation(one.name, kinds, same.group, tuple(dict.fromkeys((*same.wordings, *wordings))))
            found[one.name] = one
    return tuple(found.values())


Parts = Mapping[str, Sequence[str]]


@cache
def _names() -> tuple[dict[str, list[str]], Parts]:
    raw: dict[str, Any] = tomllib.loads(_words().joinpath("names.toml").read_text(encoding="utf-8"))
    parts = raw.pop("parts")
    return {kind: table["names"] for kind, table in raw.items()}, parts


def _words() -> Any:
    return files("baft.scope").joinpath("words")


def _is_in(part: Part, name: str) -> bool:
    """Whether a name, relation or sentence is of a part; told by its SHA-256, everywhere alike."""
    held_out = hashlib.sha256(name.encode()).digest()[0] % 10 < _CALIBRATE_TENTHS
    return held_out == (part == "calibrate")


# --- names that nobody bears


def _place(draw: random.Random, parts: Parts) -> str:
    if draw.random() < 0.5:
        return draw.choice(parts["town_prefixes"]) + draw.choice(parts["town_suffixes"])
    return "".join(draw.choices(parts["syllables"], k=draw.choice([2, 3]))).capitalize()


def _word(draw: random.Random, parts: Parts) -> str:
    return draw.choice(parts["nouns"]).capitalize()


def _person(draw: random.Random, parts: Parts) -> str:
    given, family, luck = draw.choice(parts["given_names"]), draw.choice(parts["family_names"]), draw.random()
    if luck < 0.10:
        return f"{draw.choice(parts['titles'])} {given} {family}"
    if luck < 0.15:
        return f"{given} {family} {draw.choice(parts['nicknames_roman'])}"
    if luck < 0.25:
        return f"{given} {draw.choice(parts['given_names'])} {family}"
    return f"{given[0]}. {family}" if luck < 0.30 else f"{given} {family}"


def _work(draw: random.Random, parts: Parts) -> str:
    quality, one, other = draw.choice(parts["adjectives"]), _word(draw, parts), _word(draw, parts)
    quality = quality.capitalize()
    forms = [f"The {quality} {one}", f"{quality} {one}", f"{one} and {other}", f"The {one} of {other}"]
    forms += [f"{draw.choice(parts['given_names'])}'s {one}", f"{one} {draw.randint(2, 9)}"]
    return draw.choice([*forms, f"A {one} in {_place(draw, parts)}", f"The {one}", one])


def _firm(draw: random.Random, parts: Parts) -> str:
    owner = draw.choice(
        [
            draw.choice(parts["family_names"]),
            f"{draw.choice(parts['adjectives']).capitalize()} {_word(draw, parts)}",
            _place(draw, parts),
        ]
    )
    return f"{owner} {draw.choice(parts['company_suffixes'])}"


def _building(draw: random.Random, parts: Parts) -> str:
    what = draw.choice(parts["building_words"])
    return f"{draw.choice([draw.choice(parts['family_names']), _place(draw, parts)])} {what}"


def _model(draw: random.Random, parts: Parts) -> str:
    maker = draw.choice([_place(draw, parts), draw.choice(parts["family_names"]), _word(draw, parts)])
    return f"{maker} {draw.choice(parts['model_codes'])}"


def _species(draw: random.Random, parts: Parts) -> str:
    return f"{draw.choice(parts['latin_genus'])} {draw.choice(parts['latin_species'])}"


def _form(text: str) -> Callable[[random.Random, Parts], str]:
    """Names of places that say what they are."""
    return lambda draw, parts: text.format(_place(draw, parts))


_INVENTORS: Mapping[str, Callable[[random.Random, Parts], str]] = {
    "person": _person,
    **dict.fromkeys(("city", "region", "country"), _place),
    "lake": _form("Lake {}"),
    "island": _form("{} Island"),
    "mountain": _form("Mount {}"),
    "river": _form("the {}"),
    "road": _form("{} Road"),
    "university": _form("University of {}"),
    **dict.fromkeys(("company", "organization"), _firm),
    **dict.fromkeys(
        ("film", "book", "song", "album", "painting", "tv_series", "video_game", "play", "band"), _work
    ),
    "building": _building,
    "ship": lambda draw, parts: f"{draw.choice(parts['ship_prefixes'])} {_word(draw, parts)}",
    **dict.fromkeys(("vehicle", "aircraft", "product", "software"), _model),
    "gene": lambda draw, parts: draw.choice(parts["gene_symbols"]),
    "species": _species,
}
_OPENINGS = (
    "Question: ",
    "Q: ",
    "Tell me: ",
    "Please answer: ",
    "I have a question. ",
    "Quick one: ",
    "Do you know this? ",
    "Hi! ",
    "Fill in the blank: ",
)
_TRAILERS = (
    "Answer briefly.",
    "Just the name, please.",
    "Please answer in one word.",
    "Reply with the answer and nothing else, no explanations.",
    "Thank you!",
    "I need it for a quiz tonight.",
    "One or two sentences are enough, and keep the language simple.",
    "If you are not sure, say so.",
    "My daughter asked me and I could not tell her.",
)
_ENDINGS = (" exactly?", ", please?", " again?")
_MENTIONS = (
    "I read about {s} yesterday.",
    "We talked about {s} for a while, and then it began to rain.",
    "{s} came up at dinner, but nobody had much to say.",
    "There was a poster of {s} in the hall, next to the fire extinguisher.",
    "My neighbor keeps mentioning {s}.",
    "Please write a short poem about {s}.",
    "Tell me something about {s}.",
    "The essay on {s} was handed in two days late.",
    "A photograph of {s} hung over the desk, and below it a calendar of last year.",
    "Yes, {s} again; the editor wants four hundred words by Monday.",
    "She had never heard of {s} before, and it did not bother her.",
    "The lecture began with {s} and ended with a quarrel about the microphone.",
    "Summarize what you know about {s} in one sentence.",
    "The quiz had a round about {s}, which our table lost.",
    "Two of the letters mention {s}, the third one is about the weather.",
    "In the archive, {s} is filed between a recipe and a railway timetable.",
    "I think that {s} deserves more attention than it gets.",
    "The documentary about {s} was shown late at night, when most people were asleep.",
    "Somebody had written {s} on the blackboard and underlined it twice.",
    "Do you like {s}?",
)
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a careful assistant. If you do not know something, say so.",
    "You answer questions in one or two words, without explanation.",
    "You are a friendly tutor who explains things to children. Use simple words and short sentences.",
    "Today is a Tuesday. The user is on a phone: keep replies short, use no tables and no headings.",
    "You work for a travel agency. Be polite, do not give legal advice, and never mention prices.",
    "Respond in plain English. Do not make anything up.",
)
_REPLIES = (
    "I am not sure.",
    "Good question! Let me think about it.",
    "Yes, that is right.",
    "There are several answers to that, and it depends on whom you ask.",
    "I do not know, but you could look it up in an encyclopedia.",
)
