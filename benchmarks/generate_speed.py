"""Tokens per second of greedy generation with one edit in force, against the host without edits.

    BAFT_DATA=<folder> python benchmarks/generate_speed.py --json generate_speed.json

Every turn generates the same number of new tokens for one prompt, from text that other edits ask about
(gates shut) or from the edit's own prompt (gates open). Host and edited model are alternated on the same
prompt. The share of tokens at which a gate opens is given, since a gate that is shut where it should be
open would be fast as well.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from baft.hosts.edited_model import EditedModel
from baft.hosts.models import load_host
from baft.methods.baft import BaftEditor
from baft.types import EditRequest
from harness import (
    Sheet,
    alternate,
    document,
    n_rounds,
    parser,
    ratios,
    seconds,
    summarize,
    timed,
    times,
    write,
)
from workload import data_folder, questions

N_NEW = 64


class Generation:
    """Greedy generation of a fixed number of tokens, round by round from another prompt.

    Args:
        model: Host or edited model.
        rows: Prompts as tokens; round `i` takes the i-th.
        n_new: New tokens.
        pad_id: Fills nothing up, but generation asks for it.
    """

    def __init__(self, model: EditedModel, rows: list[tuple[int, ...]], n_new: int, pad_id: int):
        self.model, self.rows, self.n_new, self.pad_id = model, rows, n_new, pad_id
        self.generated: dict[int, list[int]] = {}

    def __call__(self, number: int) -> float:
        """Seconds of one reply."""
        row = number % len(self.rows)
        ids = torch.tensor([self.rows[row]], device=self.model.host.device)  # type: ignore[arg-type]

        def reply() -> None:
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                repetition_penalty=1.0,
                min_new_tokens=self.n_new,
                max_new_tokens=self.n_new,
                pad_token_id=self.pad_id,
            )
            self.generated[row] = out[0].tolist()

        return timed(reply)


def share_open(editor: BaftEditor, generation: Generation) -> float:
    """At what share of the edited tokens of all replies a gate opens."""
    opened: list[bool] = []
    for row, ids in generation.generated.items():
        weights: dict[int, float] = {}
        for one in editor.explain(ids[:-1], len(generation.rows[row])):
            weights[one.position] = max(weights.get(one.position, 0.0), *one.weights)
        opened += [weight > 0 for weight in weights.values()]
    return sum(opened) / len(opened)


def measure(args: argparse.Namespace, sheet: Sheet) -> dict[str, Any]:
    """Gates shut and gates open."""
    torch.set_num_threads(args.threads)
    host = load_host(args.model)
    editor = BaftEditor(host, BaftEditor.preset(args.preset))
    rounds, n_new = n_rounds(args), 8 if args.quick else args.tokens
    edit, *others = questions(data_folder(args.data), editor.encoder, 1 + rounds)
    outcome = editor.apply(EditRequest((edit,)))
    plain = EditedModel(host.model)
    prompts = {
        "shut": [editor.encoder.prompt(other.prompt) for other in others],
        "open": [editor.encoder.prompt(edit.prompt)],
    }
    runs = {
        f"{who}, gates {state}": Generation(model, rows, n_new, editor.encoder.pad_id)
        for state, rows in prompts.items()
        for who, model in (("host", plain), ("edited", editor.edited))
    }
    sheet.tell("every contender once, not counted")
    alternate(runs, 1)
    took = alternate(runs, rounds, tell=sheet.tell)
    return {
        "n_new_tokens": n_new,
        "edit_decoded": all(outcome.decoded),
        "seconds": {name: summarize(values) for name, values in took.items()},
        "tokens_per_s": {name: summarize([n_new / one for one in values]) for name, values in took.items()},
        "edited / host, tokens per s": {
            state: summarize(ratios(took[f"host, gates {state}"], took[f"edited, gates {state}"]))
            for state in prompts
        },
        "share_of_tokens_with_an_open_gate": {
            state: share_open(editor, runs[f"edited, gates {state}"]) for state in prompts
        },
    }


def main(argv: list[str] | None = None) -> int:
    """Measures, shows and writes."""
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="folder of the benchmark files (default: $BAFT_DATA)")
    made.add_argument("--preset", default="default", help="settings of baft")
    made.add_argument("--tokens", type=int, default=N_NEW, help=f"new tokens a turn (default {N_NEW})")
    args, sheet = made.parse_args(argv), Sheet()
    results = measure(args, sheet)
    rows = [
        (name, seconds(results["seconds"][name]), f"{spread.median:.1f}")
        for name, spread in results["tokens_per_s"].items()
    ]
    title = f"{args.model}, preset {args.preset}, {results['n_new_tokens']} new tokens"
    sheet.table(title, ("", "one reply (quartiles)", "tokens per s"), rows)
    for state, spread in results["edited / host, tokens per s"].items():
        share = results["share_of_tokens_with_an_open_gate"][state]
        sheet.say(
            f"gates {state}: {times(spread)} of the host's speed; a gate opens at {share:.0%} of tokens"
        )
    write(args.json, document("generate_speed", args, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
