"""Which settings of the closed-form gates let rephrasings in and keep the rest out; nothing is trained.

    BAFT_DATA=../shared/data python experiments/gate_settings.py gate_midpoint=0.42 gate_shrinkage=0.7,0.5

For every combination of the settings given, on SmolLM2: how many rephrasings open the gates of their edit
(`let in`), and on how many other tokens the gates of one edit open (`fires`). Data, all of it for choosing
settings and never scored on: experiments/dev_facts.toml; cases 0 to 59 of zsre_mend_train.1000.json as edits,
the `loc` questions of its cases 200 to 349 as other prompts; 60 paragraphs of wikitext-2-valid.txt.
"""

import itertools
import json
import os
import sys
import tomllib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

import baft
from baft.hosts.architecture import Site
from baft.hosts.background import Slot, _collect, background
from baft.hosts.models import load_host
from baft.hosts.passes import FullPass
from baft.methods.baft import BaftEditor
from baft.methods.closed_form import ClosedFormGates, edit_keys

N_EDITS, OTHERS, N_PARAGRAPHS = 60, slice(200, 350), 60
OPEN = 0.3  # of a rephrasing: this weight is enough for an edit to act


def load_cases(data: Path) -> list[tuple[str, str, list[str]]]:
    facts = tomllib.loads((Path(__file__).parent / "dev_facts.toml").read_text(encoding="utf-8"))["fact"]
    zsre = json.loads(
        (data / "easyedit_edit_data/zsre/zsre_mend_train.1000.json").read_text(encoding="utf-8")
    )
    cases = [(fact["prompt"], fact["target"], fact["rephrasings"]) for fact in facts]
    return cases + [(row["src"], row["alt"], [row["rephrase"]]) for row in zsre[:N_EDITS]]


def keys_of(editor: BaftEditor, texts: list, n_edits: int) -> dict[Site, list]:
    run = FullPass(editor.host, editor.encoder, editor.edited.positions, texts, editor.sites)
    return {site: edit_keys(run, texts, n_edits, site) for site in editor.sites}


@torch.no_grad()
def main() -> None:
    data = Path(os.environ["BAFT_DATA"])
    torch.manual_seed(0)
    host = load_host("smollm2")
    editor = BaftEditor(host, BaftEditor.preset("default"))
    encoder, sites = editor.encoder, editor.sites
    ordinary = background(host, encoder, sites)

    zsre = json.loads(
        (data / "easyedit_edit_data/zsre/zsre_mend_train.1000.json").read_text(encoding="utf-8")
    )
    lines = (data / "general/wikitext-2-valid.txt").read_text(encoding="utf-8").splitlines()
    paragraphs = [line.strip() for line in lines if len(line.split()) > 20][:N_PARAGRAPHS]
    others = [row["loc"] for row in zsre[OTHERS]]
    chats = [encoder.chat([{"role": "user", "content": text}]) for text in others]
    elsewhere = {
        "running text": _collect(
            host, encoder, sites, {Slot.TEXT: [encoder.prompt(p)[:100] for p in paragraphs]}
        ),
        "other prompts": _collect(host, encoder, sites, {Slot.LAST_RAW: [encoder.prompt(p) for p in others]}),
        "other chats": _collect(host, encoder, sites, {Slot.LAST_CHAT: chats}),
    }
    edits = []
    for prompt, target, rephrasings in load_cases(data):
        own = keys_of(editor, [encoder.edit(prompt, target, chat=chat) for chat in (False, True)], 1)
        texts = [encoder.edit(text, target, chat=chat) for text in rephrasings for chat in (False, True)]
        edits.append((own, keys_of(editor, texts, len(rephrasings))))

    settings = [item.partition("=")[::2] for item in sys.argv[1:]]
    grid = [[(name, json.loads(value)) for value in values.split(",")] for name, values in settings]
    for chosen in itertools.product(*grid):
        config = replace(editor.config, **dict(chosen))
        shares: dict[str, list[float]] = defaultdict(list)
        for site in sites:
            gates = ClosedFormGates(config, ordinary, site, torch.device("cpu"))
            for own, rephrased in edits:
                keys, slots = own[site][0]
                gate = gates.gate([(keys, slots)], torch.float32)
                for name, states in elsewhere.items():
                    there = states.states[site]
                    if name != "running text":
                        there = there[states.slots != Slot.TEXT]
                    fired = (gate.weights(there) > 0).flatten(1).any(-1).float().mean().item()
                    shares[f"fires: {name}, layer {site.layer}"].append(fired)
                for states, kinds in rephrased[site]:
                    weights = gate.weights(states).flatten(1).amax(-1)
                    for name, slot in (
                        ("raw", Slot.LAST_RAW),
                        ("chat", Slot.LAST_CHAT),
                        ("outputs", Slot.TEXT),
                    ):
                        here = weights[kinds == slot]
                        if len(here):
                            share = (here > OPEN).float().mean().item()
                            shares[f"let in: {name}, layer {site.layer}"].append(share)
        print(f"\n{dict(chosen) or 'preset'} (baft {baft.__version__}, {len(edits)} edits)")
        for name in sorted(shares):
            print(f"  {name:36} {sum(shares[name]) / len(shares[name]):.4f}")


if __name__ == "__main__":
    main()
