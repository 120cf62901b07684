"""One of a thousand edits of `baft-bank` is taken out: do the others answer as if it had never been added?

    python experiments/remove_one.py [HOST] [--edits 1000]

The edits are found by real keys, of CounterFact's prompts (flat form, `edit` split), and have random bases.
Next-token logits after each edit's prompt, after those and the probes of the one, and after ordinary prompts,
one at a time, are compared bit for bit: with all edits in force, with one removed (`Model.remove`), and in a
model that never had it, where the others' keys are read and their bases are drawn anew. The one is such that
another edit acts on its prompt once it is gone, if there is such a one.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

import baft
from baft.data.counterfact import CounterFactFlat
from baft.hosts.background import background_text
from baft.methods.bank import BankEditor
from baft.types import Edit

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bank_scale import fill


def editor_of(model: baft.Model) -> BankEditor:
    """The editor of the default method that a model has, or would take."""
    editor = model._editor_for("baft-bank", "default", 0, {})
    assert isinstance(editor, BankEditor), "it is the default"
    return editor


def put(model: baft.Model, edits: list[Edit], *, like: Edit) -> None:
    """Puts edits into force, with bases of the shape that one has."""
    model.edit(like)
    editor = editor_of(model)
    fill(editor, edits)
    model._put_in_force(editor, "default", tuple((True,) for _ in edits))


def main() -> None:
    """Compares, and says how many outputs differ."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("host", nargs="?", default="smollm2")
    made.add_argument("--edits", type=int, default=1000)
    args = made.parse_args()
    torch.set_num_threads(1)
    plain = baft.load(args.host)
    pair = (plain.host, plain.tokenizer)
    cases = CounterFactFlat(Path(os.environ["BAFT_DATA"])).cases("edit")
    chosen = list({case.edit.prompt: case for case in cases}.values())[: args.edits]
    edits = [case.edit for case in chosen]
    full, never = baft.load(pair), baft.load(pair)
    put(full, edits, like=edits[0])
    heard = editor_of(full).heard([edit.prompt for edit in edits])
    shared = [
        i
        for i, ways in enumerate(heard)
        if i and len(ways[0].firing) > 1 and ways[0].acting == edits[i].id  # the first lends its shape
    ]
    case = chosen[shared[0] if shared else len(chosen) // 2]
    out = case.edit
    left = [edit for edit in edits if edit != out]
    put(never, left, like=edits[0])
    own = [out.prompt, *(probe.prompt for probe in case.probes)]
    asked = [*(edit.prompt for edit in left), *own, *background_text()["canaries"]]
    before = [full.logits(prompt) for prompt in asked]
    full.remove(out.id)
    after = [full.logits(prompt) for prompt in asked]
    differ = sum(not torch.equal(now, never.logits(prompt)) for prompt, now in zip(asked, after, strict=True))
    changed = sum(not torch.equal(now, was) for now, was in zip(after, before, strict=True))
    assert changed, "the edit acted nowhere, so that nothing is shown"
    others = sum(not torch.equal(full.logits(prompt), plain.logits(prompt)) for prompt in own)
    print(
        f"{args.host}: of {len(asked)} outputs with {len(left)} edits left {differ} differ from those of a "
        f"model that never had {out.prompt!r}, and {changed} from those with it in force; on {others} of its "
        f"own {len(own)} prompts another edit acts now; {len(shared)} of {len(edits)} share their prompts"
    )


if __name__ == "__main__":
    main()
