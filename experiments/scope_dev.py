"""How well a scope head tells what a prompt is about, on cases for choosing settings, never scored on.

    BAFT_DATA=../shared/data python experiments/scope_dev.py smollm2 --head FILE
    BAFT_DATA=../shared/data python experiments/scope_dev.py smollm2 --train n_dims=96 n_uses=4

Without --head or --train it is the head that baft would use. Data: the first 300 cases of
zsre_mend_train.1000, of counterfact-train.first5000 and of KnowEdit's train_cf; all cases of facts/tune.

`right`: rephrasings (aliases in train_cf) that reach their own edit among all, where 1, 5 and 10 % of the
locality prompts fire any edit. `alone`: the same, each edit by itself against its own locality prompts. Then,
at the head's own thresholds, which share of the probes of every kind reach their own edit among all
(`right`), fire it where it is alone (`alone`), fire any (`any`); and for the rephrasings of the first 60
cases the same as they are, behind 200 words of other text, and in a chat with a system prompt and an earlier
turn.
"""

import argparse
import json
import os
import tempfile
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
from baft.nn.scope import late_interaction
from baft.scope.heads import Head, find_head, read_head, train_head
from baft.scope.reading import Reader, padded
from baft.scope.training import ScopeConfig
from baft.types import EditCase, Probe

N_CASES, N_IN_CONTEXT, N_WORDS, SHARES = 300, 60, 200, (0.01, 0.05, 0.10)
BATCH = 64


@dataclass
class Asked:
    """Probes of one kind: log-probabilities and margins, `[probe, edit]`, and the edit of each."""

    log_p: Tensor
    margin: Tensor
    own: Tensor

    def right(self, threshold: float | None = None) -> float:
        """The share that reach their own edit among all."""
        passed = self._own(self.margin) > 0 if threshold is None else self._own(self.log_p) > threshold
        best = self.margin if threshold is None else self.log_p
        return float((passed & (best.argmax(-1) == self.own)).float().mean())

    def alone(self, threshold: float | None = None) -> float:
        """The share that fire their own edit."""
        return float(
            ((self._own(self.margin) > 0) if threshold is None else (self._own(self.log_p) > threshold))
            .float()
            .mean()
        )

    def any(self) -> float:
        """The share that fire any edit."""
        return float((self.margin > 0).any(-1).float().mean())

    def quantile(self, share: float, *, alone: bool) -> float:
        """What the best log-probability (or that of the own edit) of a share of them exceeds."""
        return float((self._own(self.log_p) if alone else self.log_p.amax(-1)).quantile(1 - share))

    def _own(self, scores: Tensor) -> Tensor:
        return scores.gather(1, self.own.unsqueeze(1)).squeeze(1)


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
    head: Head, reader: Reader, cases: Sequence[EditCase], row: Callable[[Probe], Row]
) -> dict[str, Asked]:
    """All probes of some cases, by kind and tag, against all of their edits."""
    keys = head.keys(*padded(reader.words([reader.encoder.prompt(case.edit.prompt) for case in cases])))
    thresholds = head.thresholds(keys)
    kinds: dict[str, list[tuple[int, Probe]]] = {}
    for i, case in enumerate(cases):
        for probe in case.probes:
            kinds.setdefault(f"{probe.kind}, {probe.tag}", []).append((i, probe))
    found = {}
    for kind, probes in kinds.items():
        words = reader.words([row(probe) for _, probe in probes])
        parts = [padded(words[start : start + BATCH]) for start in range(0, len(words), BATCH)]
        scores = torch.cat(
            [late_interaction(keys, head.net.vectors(one), real, head.discounts) for one, real in parts], 1
        )
        own = torch.tensor([i for i, _ in probes])
        log_p = head.log_probability(scores)
        found[kind] = Asked(log_p, log_p - thresholds, own)
    return found


def show(name: str, found: dict[str, Asked], positive: str, negative: str) -> None:
    if positive in found and negative in found:
        yes, no = found[positive], found[negative]
        for how, alone in (("right", False), ("alone", True)):
            shares = [getattr(yes, how)(no.quantile(share, alone=alone)) for share in SHARES]
            print(f"{name:22} {how}: {' / '.join(f'{one:.3f}' for one in shares)}")
    for kind, one in found.items():
        if not kind.startswith("portability") or kind == positive:
            print(
                f"{name:22}   {kind:36} right {one.right():.3f}  alone {one.alone():.3f}  any {one.any():.3f}"
            )


def settings(given: Sequence[str]) -> ScopeConfig:
    pairs = (pair.partition("=")[::2] for pair in given)
    return ScopeConfig(**{name: json.loads(value) for name, value in pairs})


@torch.no_grad()
def evaluate(head: Head, reader: Reader, folder: Path) -> None:
    about, n_bytes = head.about, sum(2 * one.numel() for one in head.net.parameters())
    print(f"{about.config}\nseed {about.seed}, {about.seconds:.0f} s, {n_bytes} bytes, {about.calibration}\n")
    rephrased, aliased = "generality, rephrase", "portability, subject_aliasing"
    sets = [
        ("zsre", Zsre(folder).cases("train")[:N_CASES], rephrased, "locality, nq"),
        ("counterfact", CounterFactFlat(folder).cases("train")[:N_CASES], rephrased,
         "locality, neighborhood"),
        ("facts", Facts().cases("tune"), "generality, chat_question", "locality, same_subject"),
        ("wikidata-counterfact", WikidataCounterfact(folder).cases("train")[:N_CASES], aliased,
         "locality, relation_specificity"),
    ]  # fmt: skip
    for name, cases, positive, negative in sets:
        show(name, ask(head, reader, cases, plain(reader.encoder)), positive, negative)
    ways = {"behind 200 words": behind_text}
    if reader.encoder.has_chat:
        ways["in a chat"] = in_chat
    for how, row in ways.items():
        for name, cases, _, _ in sets[:3:2]:
            some = [replace(case, probes=_rephrased(case)) for case in cases[:N_IN_CONTEXT]]
            show(name, ask(head, reader, some, plain(reader.encoder)), "", "")
            show(f"{name}, {how}", ask(head, reader, some, row(reader.encoder)), "", "")


def _rephrased(case: EditCase) -> tuple[Probe, ...]:
    return tuple(probe for probe in case.probes if probe.kind == "generality")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("host", nargs="?", default="smollm2")
    parser.add_argument("--head", type=Path, help="a file that `baft scope train --out` wrote")
    parser.add_argument("--train", nargs="*", metavar="KEY=VALUE", help="train a head by these settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to keep what --train trained")
    given = parser.parse_args()
    host = load_host(given.host)
    if given.train is not None:
        out = given.out or Path(tempfile.mkdtemp()) / "head.safetensors"
        head = train_head(host, settings(given.train), seed=given.seed, path=out)
    else:
        head = read_head(given.head, host) if given.head else find_head(host)
        if head is None:
            parser.error(f"there is no head for {given.host}: give --head or --train")
    evaluate(head, Reader(host, Encoder.for_host(host)), Path(os.environ["BAFT_DATA"]))


if __name__ == "__main__":
    main()
