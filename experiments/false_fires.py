"""On how much ordinary running text any of many edits acts.

    export BAFT_DATA=../shared/data
    python experiments/false_fires.py smollm2 --texts general/wikitext-2-valid.txt --split train
    python experiments/false_fires.py smollm2 --texts general/wikitext-2-test.txt

Texts are the paragraphs of a file in pieces of so many tokens; what is left over is left out. Edits are the
first of zsRE and of CounterFact (flat form), those for choosing settings with `--split train`. No edit is
made: which one acts is told by its prompt and by fixed parameters of the host alone. Where one does, every
token of the text is changed, so that the share of texts is that of tokens, too.
"""

import argparse
import os
from pathlib import Path

import torch

from baft.data.counterfact import CounterFactFlat
from baft.data.zsre import Zsre
from baft.hosts.encoding import Encoder
from baft.hosts.models import load_host
from baft.hosts.turns import Row
from baft.scope.calibration import share_bound
from baft.scope.heads import read_head
from baft.scope.index import ScopeIndex
from baft.scope.reading import Reader
from baft.scope.scope import Scope, scope_of
from baft.types import EditCase

BATCH = 20


def texts_of(encoder: Encoder, file: Path, n_tokens: int) -> list[Row]:
    """The paragraphs of a file in pieces of so many tokens."""
    found = []
    for line in file.read_text("utf-8").splitlines():
        row = encoder.prompt(line.strip()) if line.strip() else ()
        inner = encoder.inner(line.strip())
        first = row[: len(row) - len(inner)]  # what the tokenizer puts before a text
        found += [(*first, *inner[start : start + n_tokens]) for start in range(0, len(inner), n_tokens)]
    rows = [row for row in found if len(row) >= n_tokens]
    if not rows:
        raise SystemExit(f"{file} has no paragraph of {n_tokens} tokens: give another, or fewer --tokens")
    return rows


@torch.no_grad()
def acting(scope: Scope, cases: tuple[EditCase, ...], rows: list[Row]) -> list[tuple[int, int]]:
    """Texts, and the edit that acts on each."""
    index = ScopeIndex(scope.head, scope.keys([case.edit for case in cases]))
    found: list[tuple[int, int]] = []
    for start in range(0, len(rows), BATCH):
        chosen = index.find(scope.read(rows[start : start + BATCH])).tolist()
        found += [(start + i, edit) for i, edit in enumerate(chosen) if edit >= 0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("host", nargs="?", default="smollm2")
    parser.add_argument("--head", type=Path, help="a file that `baft scope train --out` wrote")
    parser.add_argument("--texts", required=True, help="a text file in the folder of the data")
    parser.add_argument("--split", choices=("test", "train"), default="test")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--show", type=int, default=0, help="so many of the texts on which an edit acts")
    given = parser.parse_args()
    host, folder = load_host(given.host), Path(os.environ["BAFT_DATA"])
    encoder = Encoder.for_host(host)
    scope = (
        Scope(Reader(host, encoder), read_head(given.head, host)) if given.head else scope_of(host, encoder)
    )
    rows = texts_of(encoder, folder / given.texts, given.tokens)
    for benchmark, split in (
        (Zsre(folder), given.split),
        (CounterFactFlat(folder), {"test": "edit"}.get(given.split, "train")),
    ):
        cases = benchmark.cases(split)[: given.edits]
        found = acting(scope, cases, rows)
        share, bound = len(found) / len(rows), share_bound(len(found), len(rows))
        print(
            f"{benchmark.name} {split}, {len(cases)} edits: {len(found)} of {len(rows)} texts of "
            f"{given.tokens} tokens, {share:.2%}, at most {bound:.2%} with a confidence of 95 %",
            flush=True,
        )
        for text, edit in found[: given.show]:
            print(f"    {cases[edit].edit.prompt!r} on ...{encoder.text(rows[text][-48:])!r}")


if __name__ == "__main__":
    main()
