"""One of a thousand edits of `baft-bank` is taken out: do the others answer as if it had never been added?

    python experiments/remove_one.py [HOST] [--edits 1000]

The edits are found by real keys, of CounterFact's prompts (flat form, `edit` split), and have random bases.
Next-token logits after each edit's prompt, and after ordinary prompts, one at a time, are compared bit for
bit: with all edits in force, with one removed (`Model.remove`), and with the others alone, loaded into a
model that never had it.
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
from baft.types import EditRequest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bank_scale import fill


def editor_of(model: baft.Model) -> BankEditor:
    """The editor of the default method that a model has, or would take."""
    editor = model._editor_for("baft-bank", "default", 0, {})
    assert isinstance(editor, BankEditor), "it is the default"
    return editor


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
    edits = list({case.edit.prompt: case.edit for case in cases}.values())[: args.edits]
    out = edits[len(edits) // 2]
    left = [edit for edit in edits if edit != out]
    full, never = baft.load(pair), baft.load(pair)
    full.edit(edits[0])  # the others get bases of its shape
    fill(editor_of(full), edits)
    full._put_in_force(editor_of(full), "default", tuple((True,) for _ in edits))
    tensors = editor_of(full).tensors().items()
    others = editor_of(never)
    others.load_state_dict(
        {name: one for name, one in tensors if name.partition(".")[0] != out.id},
        [EditRequest((edit,)) for edit in left],
    )
    never._put_in_force(others, "default", tuple((True,) for _ in left))
    asked = [*(edit.prompt for edit in left), *background_text()["canaries"]]
    before = [full.logits(prompt) for prompt in asked]
    acted = not torch.equal(full.logits(out.prompt), plain.logits(out.prompt))
    full.remove(out.id)
    changed = differ = 0
    for prompt, was in zip(asked, before, strict=True):
        now = full.logits(prompt)
        differ += not torch.equal(now, never.logits(prompt))
        changed += not torch.equal(now, was)
    gone = torch.equal(full.logits(out.prompt), never.logits(out.prompt))
    print(
        f"{args.host}: of {len(asked)} outputs with {len(left)} edits left {differ} differ from those of a "
        f"model that never had {out.prompt!r}, {changed} from those with it in force; after its own prompt "
        f"it acted: {acted}, and is gone: {gone}"
    )


if __name__ == "__main__":
    main()
