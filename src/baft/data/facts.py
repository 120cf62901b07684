"""`facts`: the project's own benchmark, in its own words; nothing has to be fetched for it.

`facts.toml` holds relations, their wordings and their facts; `facts_attributes.toml` what follows from an
answer; `facts_unrelated.toml` ordinary text. All choices are made by the SHA-256 of a name, so the cases are
the same everywhere. A case asks, beside its edit:

- generality: three rephrasings (`rephrase`), the prompt behind a sentence about something else
  (`distracting_prefix`), and a question in the chat template (`chat_question`);
- locality: two other subjects of the same relation (`same_relation`), another relation of the same subject
  (`same_subject`), two ordinary texts (`unrelated`), and a sentence that denies the fact (`negation`);
- portability: two of the subject under another name (`alias`), from the answer back to the subject
  (`reverse`), and what follows from the new answer (`one_hop`).

How to read `negation`: after "It is not true that the capital of France is", an edited model must not be
forced to say the edit's answer. The edit does not say which of all the wrong answers comes next, so the right
reading is that the text stays what it was; there is no target.

Neighbors are never edited, in either split, and no probe's answer depends on another edit: all edits of a
split may be in force at once. The facts were chosen, and the prompts worded, so that SmolLM2-135M-Instruct
knows most of the originals; `Facts.known` says which, and which another host knows.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from baft.data.base import Benchmark, Loaded
from baft.errors import DataError
from baft.types import Edit, EditCase, Probe


@dataclass(frozen=True, slots=True)
class Fact:
    """A subject, the answer that was true, the one that the edit puts in its place."""

    subject: str
    was: str
    target: str
    also: tuple[str, ...]  # a prompt of another relation of the subject, its answer, other right answers
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class Relation:
    """The wordings of a relation and its facts; `facts.toml` says what each field is."""

    name: str
    answers: str
    prompt: str
    rephrasings: tuple[str, ...]
    questions: tuple[str, ...]
    negations: tuple[str, ...]
    near: tuple[tuple[str, str], ...]
    facts: tuple[Fact, ...]
    reverse: str | None = None
    alias_prompt: str | None = None
    one_hop: tuple[tuple[str, ...], ...] = ()


class Facts(Benchmark):
    """Famous facts that a small model knows, each with a wrong answer to learn.

    The splits are halves of every relation, with no subject, neighbor or ordinary text in common: choose
    settings on `tune`, score on `report`.
    """

    name = "facts"
    summary = "famous facts over many relations, with rephrasings, neighbors and consequences"
    source = "written for baft, part of the package, Apache-2.0"
    splits = ("report", "tune")

    def _load(self, split: str) -> Loaded:
        cases = (case for relation in self._relations for case in self._cases(relation, split))
        return Loaded(tuple(cases), {})

    def answers(self, answer: str) -> tuple[str, ...]:
        """An answer and its other names, such as `("New York", "New York City")`."""
        return (answer, *self._attributes["aliases"].get(answer, ()))

    def known(self, host: str) -> Mapping[str, bool]:
        """Whether a host knew the original fact of each case, of both splits, by the case's id.

        Recorded by `experiments/facts_known.py`, which asks every edit's prompt greedily.

        Raises:
            DataError: If nothing is recorded for the host, or the facts have changed since.
        """
        recorded = json.loads(_read("facts_known.json"))
        if host not in recorded:
            raise DataError(
                f"facts: it is not recorded what the host {host!r} knows; recorded are "
                f"{', '.join(sorted(recorded)) or 'none'}. Run experiments/facts_known.py {host}"
            )
        if recorded[host]["asked"] != self.asked():
            raise DataError(
                f"facts: what the host {host!r} knows was recorded for other prompts or answers than "
                f"today's; run experiments/facts_known.py {host} again"
            )
        return MappingProxyType(recorded[host]["known"])

    def asked(self) -> str:
        """16 hex digits of the SHA-256 of all prompts and original answers: what `known` depends on."""
        cases = [case for split in self.splits for case in self.cases(split)]
        rows = [[case.id, case.edit.prompt, *self.answers(case.edit.ground_truth or "")] for case in cases]
        return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:16]

    @cached_property
    def _relations(self) -> tuple[Relation, ...]:
        return tuple(_relation(row) for row in tomllib.loads(_read("facts.toml"))["relation"])

    @cached_property
    def _attributes(self) -> dict[str, dict[str, Any]]:
        return tomllib.loads(_read("facts_attributes.toml"))

    @cached_property
    def _unrelated(self) -> dict[str, list[str]]:
        return tomllib.loads(_read("facts_unrelated.toml"))

    def _cases(self, relation: Relation, split: str) -> Iterator[EditCase]:
        part = self.splits.index(split)
        ranked = sorted(relation.facts, key=lambda fact: _number(fact.subject))
        chosen = set(ranked[part::2])
        for fact in relation.facts:
            if fact in chosen:
                edit = Edit(_fill(relation.prompt, fact.subject), fact.target, fact.subject, fact.was)
                probes = (
                    *self._generality(relation, fact, edit, part),
                    *self._locality(relation, fact, edit, part),
                    *self._portability(relation, fact, edit),
                )
                yield EditCase(f"{relation.name}/{_slug(fact.subject)}", edit, probes)

    def _generality(self, relation: Relation, fact: Fact, edit: Edit, part: int) -> Iterator[Probe]:
        def ask(tag: str, prompt: str) -> Probe:
            aliases, chat = self.answers(fact.target)[1:], tag == "chat_question"
            return Probe(edit.id, "generality", prompt, fact.target, tag, aliases, chat)

        for wording in _draw(relation.rephrasings, 3, fact.subject):
            yield ask("rephrase", _fill(wording, fact.subject))
        [question] = _draw(relation.questions, 1, fact.subject)
        yield ask("chat_question", _fill(question, fact.subject))
        names = (fact.subject, fact.target, fact.was)
        pool = self._unrelated["prefixes"][part::2]
        [prefix] = _draw([text for text in pool if not any(name in text for name in names)], 1, edit.prompt)
        yield ask("distracting_prefix", f"{prefix} {edit.prompt}")

    def _locality(self, relation: Relation, fact: Fact, edit: Edit, part: int) -> Iterator[Probe]:
        near = [(subject, answer) for subject, answer in relation.near[part::2] if answer != fact.target]
        for subject, answer in _draw(near, 2, fact.subject):
            prompt = _fill(relation.prompt, subject)
            yield Probe(edit.id, "locality", prompt, answer, "same_relation", self.answers(answer)[1:])
        prompt, answer, *others = fact.also
        yield Probe(edit.id, "locality", prompt, answer, "same_subject", tuple(others))
        for text in _draw(self._unrelated["prompts"][part::2], 2, edit.prompt):
            yield Probe(edit.id, "locality", text, None, "unrelated")
        [negation] = _draw(relation.negations, 1, fact.subject)
        yield Probe(edit.id, "locality", _fill(negation, fact.subject), None, "negation")

    def _portability(self, relation: Relation, fact: Fact, edit: Edit) -> Iterator[Probe]:
        """Two probes: of as many tags as there are, drawn for each case, then more questions of one hop."""
        other = []
        if fact.alias:
            wording = relation.alias_prompt or relation.prompt
            other.append(("alias", _fill(wording, fact.alias), self.answers(fact.target)))
        if relation.reverse:
            other.append(("reverse", _fill(relation.reverse, "", fact.target), (fact.subject,)))
        hops = []
        for path, wording, *back in relation.one_hop:
            new = self._attribute(relation.answers, fact.target, path)
            old = self._attribute(relation.answers, fact.was, path)
            if old and not set(new) & set(old) and not self._edited(relation.answers, fact.target, path):
                subjects = [subject for name in back for subject in self._subjects(name)]
                moved = {_bare(name) for subject in subjects for name in self.answers(subject)}
                lasting = tuple(answer for answer in new if _bare(answer) not in moved)
                hops.append(("one_hop", _fill(wording, fact.subject), lasting))
        hops = [hop for hop in hops if hop[2]]
        hops = _draw(hops, len(hops), fact.subject)
        candidates = [*_draw([*other, *hops[:1]], len(other) + len(hops[:1]), fact.subject), *hops[1:]]
        for tag, prompt, answers in candidates[:2]:
            yield Probe(edit.id, "portability", prompt, answers[0], tag, tuple(answers[1:]))

    def _attribute(self, table: str, answer: str, path: str) -> tuple[str, ...]:
        """What an answer has under a path such as `country.language`, with other names; empty if nothing."""
        name, _, rest = path.partition(".")
        value = self._attributes.get(table, {}).get(answer, {}).get(name, [])
        values = [value] if isinstance(value, str) else value
        if rest:
            return self._attribute(name, values[0], rest) if values else ()
        return tuple(dict.fromkeys(known for value in values for known in self.answers(value)))

    def _edited(self, table: str, answer: str, path: str) -> bool:
        """Whether an edit changes what stands at the end of a path, so that it is no longer known.

        Attributes that a relation changes have the relation's name, such as `capital`.
        """
        *steps, last = path.split(".")
        for step in steps:
            answer = self._attribute(table, answer, step)[0]
            table = step
        return answer in self._subjects(last)

    def _subjects(self, name: str) -> list[str]:
        return [
            fact.subject for relation in self._relations if relation.name == name for fact in relation.facts
        ]


def _read(name: str) -> str:
    return files("baft.data").joinpath(name).read_text(encoding="utf-8")


def _relation(row: dict[str, Any]) -> Relation:
    facts = tuple(Fact(**{**fact, "also": tuple(fact["also"])}) for fact in row["facts"])
    lists = {name: _frozen(value) for name, value in row.items() if isinstance(value, list)}
    return Relation(**{**row, **lists, "facts": facts})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(one) for one in value) if isinstance(value, list) else value


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def _draw(pool: Sequence[Any], n: int, name: str) -> list[Any]:
    """`n` of the pool in an order that only `name` and the members decide."""
    return sorted(pool, key=lambda one: _number(f"{name}\n{one}"))[:n]


def _fill(template: str, subject: str, answer: str = "") -> str:
    names = {"subject": subject, "Subject": _capital(subject), "object": answer, "Object": _capital(answer)}
    return template.format_map(names)


def _bare(name: str) -> str:
    return name.removeprefix("the ").lower()


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
