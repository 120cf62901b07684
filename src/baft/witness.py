"""Watching what an edit does to what a model says."""

import time
from collections.abc import Sequence
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from baft.hosts.background import background_text, fitting
from baft.hosts.edited_model import EditedModel
from baft.hosts.speaking import Speaker
from baft.methods.base import Editor, EditOutcome
from baft.report import EditReport, EditRow
from baft.types import Edit

_WATCHED_EDITS = 16  # earlier edits that a report looks at again; asked in one batch
_REPLY_TOKENS = 12  # shown of a reply in a report


class Witness:
    """Asks an edited model before and after an edit, and writes the report.

    Args:
        speaker: Asks the host.
        edited: The host with whatever edits are in force.
    """

    def __init__(self, speaker: Speaker, edited: EditedModel):
        self._speaker, self._edited = speaker, edited

    def says(self, edits: Sequence[Edit]) -> list[str]:
        """What the model says to the prompts of edits, as far as a report shows it."""
        texts: list[str] = []
        for start in range(0, len(edits), _WATCHED_EDITS):
            replies = self._replies(edits[start : start + _WATCHED_EDITS], _REPLY_TOKENS)
            texts += [self._speaker.text(ids) for ids in replies]
        return texts

    def check(self, edits: Sequence[Edit], *, eos: bool) -> list[tuple[str, bool]]:
        """What the model says to the prompt of each edit, and whether that is its target.

        Args:
            edits: The edits.
            eos: Whether the reply has to end after the target, or only to begin with it.
        """
        found = []
        for start in range(0, len(edits), _WATCHED_EDITS):
            chunk = edits[start : start + _WATCHED_EDITS]
            targets = self._targets(chunk, eos=eos)
            longest = max(len(target) for target in targets)
            replies = self._replies(chunk, max(_REPLY_TOKENS, longest + 1))
            found += [
                (self._speaker.text(ids), tuple(ids[: len(target)]) == target)
                for ids, target in zip(replies, targets, strict=True)
            ]
        return found

    def report(
        self,
        editor: Editor,
        preset: str,
        edits: Sequence[Edit],
        outcomes: Sequence[EditOutcome],
        *,
        before: Sequence[str],
        older: Sequence[Edit],
        began: float,
    ) -> EditReport:
        """What a call of `edit` or `edit_many` did.

        Args:
            editor: The method that made the edits; they are in force.
            preset: Its preset.
            edits: What it was asked.
            outcomes: How the optimization of all went, or that of each.
            before: What the model said before.
            older: Edits made before that were decoded then; the last of them are looked at again.
            began: When the call began, on the monotonic clock.
        """
        older = older[-_WATCHED_EDITS:]
        eos = editor.trains_eos
        after = self.check(edits, eos=eos)
        held = [says for _, says in self.check(older, eos=eos)]
        canaries, host = self._canaries
        mine = self._speaker.next_logits(self._edited, canaries)
        losses = [one.losses[-1] for one in outcomes if one.losses]
        rows = tuple(
            EditRow(
                edit.id,
                edit.prompt,
                edit.target,
                was,
                now,
                decoded and says,
                margin,
                self._gate(editor, edit),
            )
            for edit, was, (now, says), decoded, margin in zip(
                edits,
                before,
                after,
                [flag for one in outcomes for flag in one.decoded],
                [margin for one in outcomes for margin in one.margins],
                strict=True,
            )
        )
        return EditReport(
            method=editor.name,
            preset=preset,
            rows=rows,
            n_steps=max(one.n_steps for one in outcomes),
            stopped=", ".join(dict.fromkeys(one.stopped for one in outcomes)),
            loss=sum(losses) / len(losses) if losses else None,
            seconds_s=time.monotonic() - began,
            n_canaries=len(canaries),
            n_canaries_identical=int((mine == host).all(-1).sum()),
            n_canaries_same_token=int((mine.argmax(-1) == host.argmax(-1)).sum()),
            broken=tuple(edit.prompt for edit, says in zip(older, held, strict=True) if not says),
            why_full=outcomes[0].why_full,
            notes=editor.notes,
        )

    @cached_property
    def _canaries(self) -> tuple[list[tuple[int, ...]], Float[Tensor, "row vocab"]]:
        """Unrelated prompts, and the host's logits after each."""
        rows = fitting(self._speaker.encoder.prompt, background_text()["canaries"])
        with self._edited.disabled():
            return rows, self._speaker.next_logits(self._edited, rows)

    def _gate(self, editor: Editor, edit: Edit) -> float:
        """Largest weight over layers and bases, averaged over the edited tokens of an edit's own text."""
        text = self._speaker.encoder.edit(edit.prompt, edit.target, eos=False)
        readings = editor.explain((*text.prompt_ids, *text.target_ids), len(text.prompt_ids))
        largest: dict[int, float] = {}
        for reading in readings:
            if reading.edit_id not in (edit.id, None):
                continue
            largest[reading.position] = max(largest.get(reading.position, 0.0), *reading.weights)
        return sum(largest.values()) / len(largest) if largest else 0.0

    def _targets(self, edits: Sequence[Edit], *, eos: bool) -> list[tuple[int, ...]]:
        encoder = self._speaker.encoder
        return [encoder.edit(edit.prompt, edit.target, eos=eos).target_ids for edit in edits]

    def _replies(self, edits: Sequence[Edit], max_new_tokens: int) -> list[list[int]]:
        rows = [self._speaker.encoder.prompt(edit.prompt) for edit in edits]
        return self._speaker.replies(self._edited, rows, max_new_tokens)
