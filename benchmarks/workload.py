"""What the benchmarks edit: real questions as tokens, a preset's settings, the bytes a step must read."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from baft.data.zsre import Zsre
from baft.hosts.architecture import Site, find_architecture
from baft.hosts.background import background_text
from baft.hosts.encoding import EncodedEdit, Encoder
from baft.hosts.models import Host
from baft.methods.baft import BaftEditor
from baft.methods.baft_config import BaftConfig
from baft.methods.texts import renderings
from baft.types import Edit, EditRequest

N_TOKENS = range(10, 21)  # of a short prompt
N_TOKENS_LONG = 128


def data_folder(given: Path | None) -> Path:
    """The folder of the public benchmark files.

    Raises:
        SystemExit: If nobody names one.
    """
    named = given or (Path(os.environ["BAFT_DATA"]) if os.environ.get("BAFT_DATA") else None)
    if named is None or not named.is_dir():
        raise SystemExit(f"name the folder of the benchmark files by --data or BAFT_DATA; got {named}")
    return named


def questions(data: Path, encoder: Encoder, n: int, lengths: range = N_TOKENS) -> list[Edit]:
    """The first edits of zsRE's training split whose raw prompts have so many tokens.

    Raises:
        SystemExit: If there are too few.
    """
    found: list[Edit] = []
    seen: set[str] = set()
    for case in Zsre(data).cases("train"):
        edit = case.edit
        if len(encoder.prompt(edit.prompt)) in lengths and edit.id not in seen:
            seen.add(edit.id)
            found.append(edit)
            if len(found) == n:
                return found
    raise SystemExit(f"zsre/train has {len(found)} prompts of {lengths[0]} to {lengths[-1]} tokens, not {n}")


def padded_out(edit: Edit, encoder: Encoder, n_tokens: int = N_TOKENS_LONG) -> Edit:
    """The same question behind ordinary text, `n_tokens` long in all.

    Raises:
        ValueError: If no stretch of the text has the right length.
    """
    words = " ".join(background_text()["sentences"]).split()
    for start in range(0, 1000, 10):
        for end in range(start + 1, start + n_tokens):
            prompt = " ".join([*words[start:end], edit.prompt])
            length = len(encoder.prompt(prompt))
            if length == n_tokens:
                return replace(edit, prompt=prompt)
            if length > n_tokens:
                break
    raise ValueError(f"no stretch of the background text makes {edit.prompt!r} {n_tokens} tokens long")


@dataclass(frozen=True)
class Workload:
    """Edits to be made on one host with the settings of one preset.

    Args:
        host: The host.
        encoder: Its encoder.
        config: The preset's settings.
        sites: Where it edits.
        edits: The edits; round `i` of a benchmark takes the i-th, and begins anew after the last.
    """

    host: Host
    encoder: Encoder
    config: BaftConfig
    sites: tuple[Site, ...]
    edits: tuple[Edit, ...]

    @classmethod
    def of(cls, editor: BaftEditor, edits: Sequence[Edit]) -> "Workload":
        """What an editor would do."""
        return cls(editor.host, editor.encoder, editor.config, editor.sites, tuple(edits))

    def edit(self, number: int) -> Edit:
        """The edit of a round."""
        return self.edits[number % len(self.edits)]

    def request(self, number: int) -> EditRequest:
        """The edit of a round, alone."""
        return EditRequest((self.edit(number),))

    def texts(self, number: int) -> list[EncodedEdit]:
        """The edit of a round in every rendering that the preset trains."""
        config = self.config
        return renderings(self.encoder, [self.edit(number)], chat=config.chat, eos=config.train_eos)

    def row_tokens(self, number: int) -> list[int]:
        """How many tokens, prompt and target, each row of a round has; all are padded to the longest."""
        return [len(text.prompt_ids) + len(text.target_ids) for text in self.texts(number)]

    def plain_row(self, number: int) -> Tensor:
        """The edit's own prompt and target as the host reads them, raw, `[1, pos]`."""
        text = self.texts(number)[0]
        return torch.tensor([text.prompt_ids + text.target_ids], device=self.host.model.device)


def bytes_above(model: nn.Module, site: Site) -> int:
    """Bytes of the weights that a step must read: the blocks above a site, the final norm, the head."""
    architecture, host = find_architecture(model), model
    embeddings: Any = host.get_input_embeddings()  # type: ignore[operator]
    head: Any = host.get_output_embeddings()  # type: ignore[operator]
    elsewhere = {id(p) for block in architecture.blocks for p in block.parameters()}
    elsewhere |= {id(p) for p in embeddings.parameters()}
    parameters = [p for block in architecture.blocks[site.layer + 1 :] for p in block.parameters()]
    parameters += [p for p in architecture.stack.parameters() if id(p) not in elsewhere]  # the final norm
    parameters += list(head.parameters())
    once = {id(p): p for p in parameters}
    return sum(p.numel() * p.element_size() for p in once.values())


def host_bytes(model: nn.Module) -> int:
    """Bytes of all weights of a host."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
