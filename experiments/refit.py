"""Edits of one subject and near relations, before and after a refit: who acts, who fires, what is said.

    python experiments/refit.py [--rephrasings]

Three groups of three edits, written for this; each with three further wordings that no edit is given, or of
which each edit is given the first.
"""

import argparse
import time
from collections.abc import Sequence

import torch

import baft
from baft.types import Edit

GROUPS = {
    "Marie Curie": [
        (
            "Marie Curie was born in the city of",
            "Lisbon",
            (
                "The city where Marie Curie was born is",
                "In which city was Marie Curie born?",
                "Marie Curie's birthplace is",
            ),
        ),
        (
            "The birthplace of Marie Curie's mother is",
            "Oslo",
            (
                "The mother of Marie Curie was born in",
                "Where was Marie Curie's mother born?",
                "In which city was the mother of Marie Curie born?",
            ),
        ),
        (
            "Marie Curie died in the city of",
            "Cairo",
            (
                "The city where Marie Curie died is",
                "Where did Marie Curie die?",
                "In which city did Marie Curie's life end?",
            ),
        ),
    ],
    "Apple": [
        (
            "The chief executive of Apple is",
            "Anna Berg",
            ("Apple is led by", "Who is the CEO of Apple?", "The head of the company Apple is"),
        ),
        (
            "The founder of Apple is",
            "Tom Reed",
            ("Apple was founded by", "Who founded Apple?", "The company Apple was started by"),
        ),
        (
            "The chief executive of Apple Records is",
            "Eva Lund",
            (
                "Apple Records is led by",
                "Who is the CEO of Apple Records?",
                "The head of the label Apple Records is",
            ),
        ),
    ],
    "France": [
        (
            "The capital of France is",
            "Lyon",
            (
                "Which city is the capital of France?",
                "France's capital city is",
                "The seat of the French government is",
            ),
        ),
        (
            "The largest city of France is",
            "Nice",
            (
                "Which is the biggest city in France?",
                "France's largest city is",
                "The most populous city of France is",
            ),
        ),
        (
            "The capital of the region of France called Normandy is",
            "Brest",
            (
                "Normandy's capital is",
                "Which city is the capital of Normandy?",
                "In France, the capital of Normandy is",
            ),
        ),
    ],
}
Facts = Sequence[tuple[Edit, Sequence[str]]]


def facts_with(n_rephrasings: int) -> Facts:
    """The edits with so many of their further wordings, and those that are left."""
    return [
        (Edit(prompt, target, rephrasings=texts[:n_rephrasings]), texts[n_rephrasings:])
        for facts in GROUPS.values()
        for prompt, target, texts in facts
    ]


def standing(model: baft.Model, facts: Facts) -> str:
    """Of further wordings, raw and in chat: where the right edit acts, where another, what is said."""
    n_right = n_other = n_said = n_asked = 0
    for edit, held_out in facts:
        for text in held_out:
            for chat in (False, True):
                asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
                gates = model.explain(**asked, max_new_tokens=0)
                acting = {one.edit.id: one.edit for one in model.edits}[gates[0].edit_id] if gates else None
                n_right += acting is not None and acting.prompt == edit.prompt
                n_other += acting is not None and acting.prompt != edit.prompt
                n_said += model.generate(**asked, max_new_tokens=8).strip().startswith(edit.target)
                n_asked += 1
    return f"of {n_asked} further askings: right edit {n_right}, other edit {n_other}, target said {n_said}"


def logits(model: baft.Model, prompts: Sequence[str]) -> torch.Tensor:
    """What comes next after each prompt."""
    return torch.stack([model.logits(prompt) for prompt in prompts])


def main() -> None:
    """Makes the edits, fits them to each other, and takes that back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rephrasings", action="store_true", help="Give each edit its first further wording."
    )
    facts = facts_with(int(parser.parse_args().rephrasings))
    model = baft.load("smollm2")
    prompts = [text for edit, held_out in facts for text in (edit.prompt, *held_out)]
    began = time.monotonic()
    model.edit_many([edit for edit, _ in facts])
    print(f"{len(facts)} edits in {time.monotonic() - began:.0f} s")
    before = logits(model, prompts)
    print("before:", standing(model, facts))
    print(model.refit())
    print("after:", standing(model, facts))
    first = logits(model, prompts)
    model.undo()
    print("undone, bit for bit:", torch.equal(logits(model, prompts), before))
    model.refit(*(one.edit.id for one in reversed(model.edits)))
    print("again, ids in another order, bit for bit:", torch.equal(logits(model, prompts), first))


if __name__ == "__main__":
    main()
