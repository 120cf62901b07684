"""What edits do beyond the probes: to ordinary text, and to how the model goes on after their own prompts."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from baft.errors import DataError
from baft.evals.records import Row
from baft.evals.texts import TextLoss, false_fires, fluency, text_loss
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.hosts.speaking import Speaker

HELD_OUT = "general/wikitext-2-test.txt"
_TEXT_WORDS = 80  # a paragraph this long has 100 tokens
N_TOKENS = 100  # of a text whose fluency is taken


class Beyond:
    """Measures edited models beside the untouched host, which is asked once.

    Args:
        host: The host.
        texts: Held-out texts.
        batch_size: Prompts that the model goes on from at once.
    """

    def __init__(self, host: Host, texts: Sequence[str], *, batch_size: int):
        self._host, self._texts, self._batch_size = host, tuple(texts), batch_size
        self._untouched = EditedModel(host.model)
        self._fluency_before: dict[tuple[str, ...], tuple[float, ...]] = {}

    def on_texts(self, edited: EditedModel) -> Row:
        """What is kept of held-out texts: false fires, and the loss of each before and after."""
        if not self._texts:
            return {}
        fires = false_fires(self._host, edited, self._texts)
        before, after = self._loss_before, text_loss(self._host, edited, self._texts)
        loss = {"before": before.nll, "after": after.nll, "n_tokens": after.n_tokens}
        return {"false_fires": asdict(fires), "perplexity": loss}

    def fluency(self, edited: EditedModel, prompts: Sequence[str]) -> list[Row]:
        """The fluency after each prompt, before and after; nothing after one that leaves no room for it."""
        limit, encoder = Speaker(self._host).encoder.max_tokens, Encoder.for_host(self._host)
        asked = tuple(
            prompt for prompt in prompts if limit is None or len(encoder.prompt(prompt)) + N_TOKENS <= limit
        )
        if not asked:
            return [{} for _ in prompts]
        if asked not in self._fluency_before:
            self._fluency_before[asked] = self._measured(self._untouched, asked)
        before, after = self._fluency_before[asked], self._measured(edited, asked)
        found = dict(zip(asked, zip(before, after, strict=True), strict=True))
        return [{"fluency": list(found[prompt])} if prompt in found else {} for prompt in prompts]

    def _measured(self, edited: EditedModel, prompts: tuple[str, ...]) -> tuple[float, ...]:
        return fluency(self._host, edited, prompts, n_tokens=N_TOKENS, batch_size=self._batch_size)

    @cached_property
    def _loss_before(self) -> TextLoss:
        return text_loss(self._host, self._untouched, self._texts)


def held_out_texts(data: Path | None, n: int) -> tuple[str, ...]:
    """The first `n` long paragraphs of the held-out text that no method sees.

    Raises:
        DataError: If the file is not there, cannot be read, or does not hold so many.
    """
    if not n:
        return ()
    path = None if data is None else data / HELD_OUT
    if path is None or not path.is_file():
        raise DataError(
            f"texts={n} asks for held-out text, and {path or HELD_OUT} is not there: name the data folder "
            "(--data or BAFT_DATA), or set texts = 0"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Fetch it anew, or set texts = 0") from error
    found = [line.strip() for line in lines if len(line.split()) >= _TEXT_WORDS][:n]
    if len(found) < n:
        raise DataError(
            f"{path} has {len(found)} paragraphs of {_TEXT_WORDS} words, got texts={n}: ask for fewer"
        )
    return tuple(found)
