"""How well a scope head tells what a prompt is about, on cases for choosing settings, never scored on.

    BAFT_DATA=../shared/data python experiments/scope_dev.py smollm2 --head FILE
    BAFT_DATA=../shared/data python experiments/scope_dev.py smollm2 --train n_dims=96 n_uses=4

    BAFT_DATA=../shared/data python experiments/scope_dev.py smollm2 --untrained --subjects

Without --head or --train it is the head that baft would use; --untrained reads by words alone, as on a host
without one. With --subjects edits say their subject. Data: the first 300 cases of
zsre_mend_train.1000, of counterfact-train.first5000 and of KnowEdit's train_cf; all cases of facts/tune; and
dev_common.toml, things that have no name.

At the head's own thresholds: which share of the probes of every kind reach their own edit among all
(`right`), fire it where it is alone (`alone`), fire any (`any`); and for the rephrasings of the first 60
cases the same as they are, behind 200 words of other text, and in a chat with a system prompt and an earlier
turn.
"""

import argparse
import json
import os
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from baft.data.counterfact import CounterFactFlat
from baft.data.facts import Facts
from baft.data.knowedit import WikidataCounterfact
from baft.data.zsre import Zsre
from baft.hosts.background import background_text
from baft.hosts.encoding import Encoder
from baft.hosts.models import load_host
from baft.hosts.turns import Row
from baft.scope.heads import Head, find_head, read_head, train_head
from baft.scope.index import Judge, ScopeIndex
from baft.scope.reading import Reader
from baft.scope.scope import Scope
from baft.scope.training import ScopeConfig
from baft.scope.untrained import untrained_head
from baft.types import Edit, EditCase, Probe

N_CASES, N_IN_CONTEXT, N_WORDS = 300, 60, 200
BATCH = 64


@dataclass
class Asked:
    """Probes of one kind: log-probabilities, minus infinity where they do not pass, and the edit of each."""

    passing: Tensor
    own: Tensor

    def right(self) -> float:
        """The share that reach their own edit among all."""
        return float(((self._own() > -torch.inf) & (self.passing.argmax(-1) == self.own)).float().mean())

    def alone(self) -> float:
        """The share that fire their own edit."""
        return float((self._own() > -torch.inf).float().mean())

    def any(self) -> float:
        """The share that fire any edit."""
        return float((self.passing > -torch.inf).any(-1).float().mean())

    def _own(self) -> Tensor:
        return self.passing.gather(1, self.own.unsqueeze(1)).squeeze(1)


def plain(encoder: Encoder) -> Callable[[Probe], Row]:
    def row(probe: Probe) -> Row:
        if probe.chat and encoder.has_chat:
            return encoder.chat([{"role": "user", "content": probe.prompt}])
        return encoder.prompt(probe.prompt)

    return row


def behind_text(encoder: Encoder) -> Callable[[Probe], Row]:
    words = " ".join(background_text()["sentences"][:20]).split()[:N_WORDS]
    return lambda probe: encoder.prompt(f"{' '.join(words)}. {probe.prompt}")


def in_chat(encoder: Encoder) -> Callable[[Probe], Row]:
    before = [
        ("system", "You are a helpful assistant. Answer briefly."),
        ("user", "What is a baker's dozen?"),
    ]
    before.append(("assistant", "A baker's dozen is thirteen."))
    messages = [{"role": role, "content": content} for role, content in before]
    return lambda probe: encoder.chat([*messages, {"role": "user", "content": probe.prompt}])


def ask(
    scope: Scope, cases: Sequence[EditCase], row: Callable[[Probe], Row], *, subjects: bool = False
) -> dict[str, Asked]:
    """All probes of some cases, by kind and tag, against all of their edits."""
    edits = [
        Edit(case.edit.prompt, case.edit.target, subject=case.edit.subject if subjects else None)
        for case in cases
    ]
    index = ScopeIndex(scope.head, scope.keys(edits))
    kinds: dict[str, list[tuple[int, Probe]]] = {}
    for i, case in enumerate(cases):
        for probe in case.probes:
            kinds.setdefault(f"{probe.kind}, {probe.tag}", []).append((i, probe))
    found = {}
    for kind, probes in kinds.items():
        rows = [row(probe) for _, probe in probes]
        parts = [scope.read(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
        passing = torch.cat([index.passing(one) for one in parts])
        found[kind] = Asked(passing, torch.tensor([i for i, _ in probes]))
    return found


def show(name: str, found: dict[str, Asked], aliases: str = "") -> None:
    for kind, one in found.items():
        if not kind.startswith("portability") or kind == aliases:
            print(
                f"{name:22}   {kind:36} right {one.right():.3f}  alone {one.alone():.3f}  any {one.any():.3f}"
            )


def settings(given: Sequence[str]) -> ScopeConfig:
    pairs = (pair.partition("=")[::2] for pair in given)
    return ScopeConfig(**{name: json.loads(value) for name, value in pairs})


@torch.no_grad()
def evaluate(head: Judge, reader: Reader, folder: Path, *, subjects: bool) -> None:
    if isinstance(head, Head):
        about, n_bytes = head.about, sum(2 * one.numel() for one in head.net.parameters())
        print(f"{about.config}\nseed {about.seed}, {about.seconds:.0f} s, {n_bytes} bytes")
        print(f"{about.calibration}\n")
    scope, encoder = Scope(reader, head), reader.encoder
    sets = {
        "zsre": Zsre(folder).cases("train")[:N_CASES],
        "counterfact": CounterFactFlat(folder).cases("train")[:N_CASES],
        "facts": Facts().cases("tune"),
        "wikidata-counterfact": WikidataCounterfact(folder).cases("train")[:N_CASES],
        "common things": common_things(),
    }
    for name, cases in sets.items():
        show(name, ask(scope, cases, plain(encoder), subjects=subjects), "portability, subject_aliasing")
    ways = {"behind 200 words": behind_text}
    if encoder.has_chat:
        ways["in a chat"] = in_chat
    for how, row in ways.items():
        for name in ("zsre", "facts"):
            some = [replace(case, probes=_rephrased(case)) for case in sets[name][:N_IN_CONTEXT]]
            show(name, ask(scope, some, plain(encoder), subjects=subjects))
            show(f"{name}, {how}", ask(scope, some, row(encoder), subjects=subjects))


def common_things() -> list[EditCase]:
    rows = tomllib.loads(Path(__file__).with_name("dev_common.toml").read_text(encoding="utf-8"))["cases"]
    found = []
    for prompt, *asked, other in rows:
        edit = Edit(prompt, "seven")
        probes = [Probe(edit.id, "generality", one, edit.target, "rephrase") for one in asked]
        spared = Probe(edit.id, "locality", other, None, "other_subject")
        found.append(EditCase(prompt, edit, (*probes, spared)))
    return found


def _rephrased(case: EditCase) -> tuple[Probe, ...]:
    return tuple(probe for probe in case.probes if probe.kind == "generality")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("host", nargs="?", default="smollm2")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--head", type=Path, help="a file that `baft scope train --out` wrote")
    which.add_argument("--train", nargs="*", metavar="KEY=VALUE", help="train a head by these settings")
    which.add_argument("--untrained", action="store_true", help="read by words alone")
    parser.add_argument("--subjects", action="store_true", help="edits say their subject")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to keep what --train trained")
    given = parser.parse_args()
    host = load_host(given.host)
    reader = Reader(host, Encoder.for_host(host))
    head: Judge | None
    if given.untrained:
        head = untrained_head(reader)
    elif given.train is not None:
        out = given.out or Path(tempfile.mkdtemp()) / "head.safetensors"
        head = train_head(host, settings(given.train), seed=given.seed, path=out)
    else:
        head = read_head(given.head, host) if given.head else find_head(host)
        if head is None:
            parser.error(f"there is no head for {given.host}: give --head, --train or --untrained")
    evaluate(head, reader, Path(os.environ["BAFT_DATA"]), subjects=given.subjects)


if __name__ == "__main__":
    main()
