"""Second moments of what goes into a linear module: `C = E[k k^T]`, over the tokens of ordinary text.

Methods that solve for a weight's change in closed form (ROME, MEMIT, AlphaEdit) ask by it that the module's
output on ordinary inputs stay as it is. The moments are not centered, every token of the text counts alike,
and sums are taken in float64. They are computed once for a host, module and text, and kept in the cache.
"""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from baft.errors import ConfigError, InputError
from baft.hosts.architecture import find_architecture
from baft.hosts.background import background_text
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.hosts.kept import keep, kept_path, read_kept
from baft.hosts.kernels import fast_linears
from baft.hosts.models import Host
from baft.hosts.passes import show_prompts
from baft.hosts.patches import EnoughError, Seen, by_row, weight_shape

logger = logging.getLogger(__name__)

CALIBRATION = "general/wikitext-2-valid.txt"  # perplexity is scored on the test text, never on this
_WINDOW_TOKENS = 256  # longest piece of text; as in training, most tokens have some context
_ROWS = 8
_WORTH_KEEPING_S = 1.0
_FORMAT = 1
_KEPT_BYTES = 4 << 30  # of all hosts together


@dataclass(frozen=True, slots=True)
class Corpus:
    """Ordinary text.

    Args:
        name: What it is, for people.
        pieces: Its paragraphs.
    """

    name: str
    pieces: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """What tells this text from others."""
        return hashlib.sha256("\0".join(self.pieces).encode()).hexdigest()


_public_files: ContextVar[Path | None] = ContextVar("baft_public_files", default=None)


@contextlib.contextmanager
def texts_from(folder: Path | None) -> Iterator[None]:
    """Inside, `corpus` looks for public text in this folder; with None in the one that `BAFT_DATA` names."""
    token = _public_files.set(folder)
    try:
        yield
    finally:
        _public_files.reset(token)


def corpus(named: str | None) -> Corpus:
    """The text that moments are taken on.

    A file or folder of text files if one is named; else the validation text of WikiText-2, where the folder
    of `texts_from`, or that `BAFT_DATA` names, has it; else the project's own background text, which is
    small.

    Raises:
        ConfigError: If what is named is not there, or holds no text.
    """
    if named is not None:
        path = Path(named).expanduser()
        files = sorted(one for one in path.rglob("*.txt")) if path.is_dir() else [path]
        try:
            pieces = [piece for one in files for piece in _paragraphs(one)]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"moments_text {named!r} cannot be read as UTF-8 text: {error}") from None
        if not pieces:
            raise ConfigError(
                f"moments_text {named!r} holds no text: name a text file, or a folder with .txt files"
            )
        return Corpus(path.name, tuple(pieces))
    data = _public_files.get() or os.environ.get("BAFT_DATA")
    if data and (path := Path(data).expanduser() / CALIBRATION).is_file():
        return Corpus("WikiText-2 (validation)", tuple(_paragraphs(path)))
    text = background_text()
    pieces = [*text["sentences"], *text["prompts"]]
    logger.warning(
        "moments are taken on the project's own background text, which is small: name a text with "
        "moments_text, or a folder that holds %s with BAFT_DATA",
        CALIBRATION,
    )
    return Corpus("the project's background text", tuple(pieces))


def second_moments(
    host: Host, encoder: Encoder, modules: Sequence[str], text: Corpus, n_tokens: int
) -> dict[str, Float[Tensor, "d_in d_in"]]:
    """`E[k k^T]` of the inputs of linear modules, in float64 on the CPU, from the cache where they are there.

    Args:
        host: The host; no edit is in force.
        encoder: Its encoder.
        modules: Names of linear modules.
        text: What is read.
        n_tokens: How much of it: pieces evenly spread over it, until there are that many tokens.

    Raises:
        InputError: If no piece of the text has tokens.
        UnsupportedHostError: If a module is not linear.
    """
    paths = {
        name: kept_path("moments", host, (name, text.sha256, n_tokens, _WINDOW_TOKENS, _FORMAT))
        for name in modules
    }
    found: dict[str, Tensor] = {}
    for name, path in paths.items():
        d_in = weight_shape(host.model.get_submodule(name))[1]
        kept = (read_kept(path) or {}).get("moments")
        if kept is not None and kept.shape == (d_in, d_in):
            found[name] = kept
    missing = [name for name in modules if name not in found]
    if missing:
        began = time.monotonic()
        made = _compute(host, _pieces(host, encoder, text, n_tokens), encoder, missing)
        seconds_s = time.monotonic() - began
        logger.info("moments of %d modules on %s: %.1f s", len(missing), text.name, seconds_s)
        for name, moments in made.items():
            found[name] = moments
            if seconds_s > _WORTH_KEEPING_S:
                keep(paths[name], {"moments": moments}, "moments", most_bytes=_KEPT_BYTES)
    return {name: found[name] for name in modules}


def regularized(moments: Float[Tensor, "d_in d_in"], ridge: float) -> Float[Tensor, "d_in d_in"]:
    """The moments with `ridge` times their mean diagonal added to it, so that they can be inverted.

    A text of fewer tokens than the module has inputs leaves directions that it says nothing about; so do
    inputs that depend on each other.
    """
    return moments + ridge * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)


class _Sum:
    """A patch that adds up `k k^T` over real tokens and changes nothing.

    Args:
        d_in: Inputs of the module.
        waiting: The sums that have not seen these rows yet, this one among them. The last ends the run, for
            nothing behind it is asked for.
    """

    def __init__(self, d_in: int, waiting: "set[_Sum]"):
        self.total = torch.zeros(d_in, d_in, dtype=torch.float64)
        self.n_tokens = 0
        self.waiting = waiting

    def __call__(
        self,
        module: nn.Module,
        inputs: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        seen: Seen,
    ) -> None:
        keys = by_row(inputs, seen)[seen.prompt.to(inputs.device)].to("cpu", torch.float64)
        self.total.addmm_(keys.T, keys)
        self.n_tokens += len(keys)
        self.waiting.discard(self)
        if not self.waiting:
            raise EnoughError


@torch.no_grad()
def _compute(
    host: Host, rows: Sequence[tuple[int, ...]], encoder: Encoder, modules: Sequence[str]
) -> dict[str, Tensor]:
    waiting: set[_Sum] = set()
    sums = {name: _Sum(weight_shape(host.model.get_submodule(name))[1], waiting) for name in modules}
    watched = EditedModel(host.model)
    watched.patches = sums
    rows = sorted(rows, key=len)
    for start in range(0, len(rows), _ROWS):
        chunk = rows[start : start + _ROWS]
        waiting.update(sums.values())
        with fast_linears(), contextlib.suppress(EnoughError):
            show_prompts(watched, encoder, chunk)
    return {name: one.total / one.n_tokens for name, one in sums.items()}


def _pieces(host: Host, encoder: Encoder, text: Corpus, n_tokens: int) -> list[tuple[int, ...]]:
    """Windows of the text, from pieces evenly spread over it."""
    most = find_architecture(host.model).max_positions
    window = _WINDOW_TOKENS if most is None else min(_WINDOW_TOKENS, most)
    free = Encoder(encoder.tokenizer, eos_ids=encoder.eos_ids)  # pieces are cut here, and may be longer
    # Golden-ratio steps visit all of the text evenly, wherever they stop.
    order = sorted(range(len(text.pieces)), key=lambda i: (i * 0.6180339887498949) % 1.0)
    rows: list[tuple[int, ...]] = []
    left = n_tokens
    for i in order:
        if left <= 0:
            break
        ids = free.prompt(text.pieces[i])[:left]
        cut = [ids[start : start + window] for start in range(0, len(ids), window)]
        rows += [row for row in cut if len(row) > 1]
        left -= len(ids)
    if not rows:
        raise InputError(f"{text.name} has no piece of two tokens: name a longer text with moments_text")
    return rows


def _paragraphs(path: Path) -> list[str]:
    """The lines of a file that are no blanks and no headings of WikiText."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not (line.startswith("= ") and line.endswith(" ="))]
