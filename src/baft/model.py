"""The user's object: a model that can be edited, asked, saved and set back.

```python
model = baft.load("smollm2")
model.edit("The Eiffel Tower is located in the city of", "Rome")
model.generate("Where is the Eiffel Tower?")
model.undo()
```
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baft import artifact, config
from baft.artifact import EditSet, Piece, StoredEdit
from baft.errors import ArtifactError, ConfigError, EditError, InputError, UndoError
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Messages
from baft.hosts.identity import HostIdentity, compare, identify
from baft.hosts.live_view import live_view
from baft.hosts.models import Host
from baft.hosts.speaking import Speaker
from baft.methods.base import (
    Capability,
    Editor,
    EditOutcome,
    GateReading,
    OnStep,
    StackedEditor,
    methods,
)
from baft.refit import Refit
from baft.report import AppliedEdit, EditReport, TokenGates
from baft.settling import (
    conflict_rows,
    conflicts_of,
    require_choice,
    require_new,
    settled,
    settled_beside,
)
from baft.types import DEFAULT_METHOD, Edit, EditRequest, OnConflict, as_edits, replaced
from baft.witness import Witness

logger = logging.getLogger(__name__)


class Model:
    """A host with a set of edits. Made by `baft.load`.

    Not safe for two threads that edit at once; asking from several threads is fine.

    Args:
        host: The host; its weights are never changed.
        source: What loads the host again, for artifacts; empty for a live one.
        saved: The edits of an artifact, to be put into force; None for none.

    Raises:
        HostMismatchError: If these edits were made on other weights.
        DamagedArtifactError: If tensors of theirs are missing, left over or misshapen.
    """

    def __init__(self, host: Host, *, source: str = "", saved: EditSet | None = None):
        self._host, self._source = host, source
        self._speaker = Speaker(host)
        self._editor: Editor | None = None
        self._preset = ""
        self._decoded: tuple[tuple[bool, ...], ...] = ()  # of every edit, by request
        self._pieces: tuple[Piece, ...] = ()  # files that hold tensors of the edits
        # One for good, so that `hf` follows; `_put_in_force` gives it what the editor has.
        self._edited = EditedModel(host.model)
        self._witness = Witness(self._speaker, self._edited)
        if saved is not None:
            self._restore(saved)

    def __repr__(self) -> str:
        method = f" by {self._editor.name}/{self._preset}" if self._editor and self.edits else ""
        return f"<baft.Model {self._host.name}: {self._host.label}; {len(self.edits)} edits{method}>"

    # -- what it is

    @property
    def host(self) -> PreTrainedModel:
        """The untouched host."""
        return self._host.model

    @cached_property
    def hf(self) -> PreTrainedModel:
        """The live model with the edits in force, for any library that takes a Hugging Face model.

        It follows later edits and undos. Called without `n_prompt_tokens` it cannot know where the prompt
        ends, and every token but BOS is edited.
        """
        return live_view(self._edited)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The host's tokenizer."""
        return self._host.tokenizer

    @property
    def label(self) -> str:
        """What the host is, in words."""
        return self._host.label

    @property
    def method(self) -> str | None:
        """The method of the edits in force, or None without any."""
        return self._editor.name if self._editor and self.edits else None

    @property
    def edits(self) -> tuple[AppliedEdit, ...]:
        """The edits in force, oldest first."""
        if self._editor is None:
            return ()
        out_of_force = replaced(self._editor.requests)
        return tuple(
            AppliedEdit(edit, decoded, i, edit.id in out_of_force)
            for i, (request, flags) in enumerate(zip(self._editor.requests, self._decoded, strict=True))
            for edit, decoded in zip(request.edits, flags, strict=True)
        )

    @cached_property
    def identity(self) -> HostIdentity:
        """The host's fingerprint."""
        return identify(self._host)

    # -- editing

    def edit(
        self,
        prompt: str | Edit | Sequence[Edit],
        target: str | None = None,
        *,
        method: str = DEFAULT_METHOD,
        preset: str = "default",
        subject: str | None = None,
        unrelated: Sequence[str] = (),
        seed: int = 0,
        on_conflict: OnConflict = "keep",
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> EditReport:
        """Makes the model say `target` after `prompt`, and stop.

        The edit comes on top of those in force. If anything goes wrong on the way, the model is as it was
        before. An edit that is not decoded in the end stays in force, but its report and `edits` say so.

        Args:
            prompt: The prompt; or an `Edit`, or several to be made in one optimization.
            target: The new answer, where `prompt` is text.
            method: Name of a method; `baft methods` lists them.
            preset: A set of its settings.
            subject: What the prompt is about, for methods that need it.
            unrelated: Prompts that shall stay as they are.
            seed: Of the method's randomness.
            on_conflict: What to do where a prompt could be about the new edit and about one in force that
                says something else, as methods whose edits have a scope can tell: `keep` both, and the
                likelier acts, of equals the new one; `replace` the other, which comes back when the new one
                is taken back; or `refuse`.
            on_step: Called after every optimizer step.
            settings: Single settings in place of the preset's.

        Returns:
            What happened, before and after.

        Raises:
            InputError: If a text is blank, too long, or given twice.
            ConfigError: If a setting is wrong, or does not go with the edits in force.
            ConflictError: If the edit conflicts with one in force, and that was to be refused.
            EditError: If training breaks down, or inside `disabled()`.
        """
        editor = self._editor_for(method, preset, seed, settings)
        request = EditRequest(as_edits(prompt, target, subject), _texts(unrelated))
        if len(request.edits) > 1 and Capability.BATCH not in editor.capabilities:
            raise ConfigError(
                f"method {method} makes one edit at a time, got {len(request.edits)}: edit in a loop"
            )

        def make(requests: Sequence[EditRequest]) -> Sequence[EditOutcome]:
            return [editor.apply(one, on_step=on_step) for one in requests]

        return self._make(editor, preset, [request], on_conflict, make)

    def edit_many(
        self,
        edits: Sequence[Edit],
        *,
        method: str = DEFAULT_METHOD,
        preset: str = "default",
        unrelated: Sequence[str] = (),
        seed: int = 0,
        on_conflict: OnConflict = "keep",
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> EditReport:
        """Makes many edits, each by itself on the model as it stands, and puts all of them into force.

        They are trained in one batch, which costs a fraction of as many calls of `edit`; unlike edits given
        to one call of `edit` they share no optimization, so that each is what it would be alone. `undo`
        counts every one of them as a call.

        Args:
            edits: The edits.
            method: Name of a method that can (capability `stacked`).
            preset: A set of its settings.
            unrelated: Prompts that shall stay as they are.
            seed: Of the method's randomness.
            on_conflict: As for `edit`.
            on_step: Called after every optimizer step.
            settings: Single settings in place of the preset's.

        Returns:
            What happened, before and after.

        Raises:
            InputError: If a text is blank, too long, or given twice.
            ConflictError: As for `edit`.
            ConfigError: If the method cannot make edits apart, or a setting is wrong.
            EditError: If training breaks down, or inside `disabled()`; nothing has changed then.
        """
        editor = self._editor_for(method, preset, seed, settings)
        if not isinstance(editor, StackedEditor):
            raise ConfigError(f"method {method} makes no edits apart from each other: edit in a loop")
        named = _texts(unrelated)
        requests = [EditRequest((edit,), named) for edit in EditRequest(tuple(edits)).edits]

        def make(requests: Sequence[EditRequest]) -> Sequence[EditOutcome]:
            return editor.apply_apart(requests, on_step=on_step)

        return self._make(editor, preset, requests, on_conflict, make)

    def refit(self, *ids: str, on_step: OnStep | None = None) -> EditReport:
        """Fits edits in force that share a scope to each other.

        Each one that fires on a wording of another, which says something else, is trained anew with that
        wording among its `neighbors`, and replaces what it was; the others stay as they are, every bit. It is
        one request, which `undo` takes back. Edits still do not know each other; taking one out brings back
        the one that it replaced, unless that is taken out, too.

        Args:
            ids: Of the edits, as in `edits`, two at least, in any order; none for all of which one fires on
                a wording of another.
            on_step: Called after every optimizer step.

        Returns:
            What happened; its `refit` tells of each edit, before and after, where it acts and fires, and
            from what its scope cannot be kept.

        Raises:
            UnknownNameError: If no edit has such an id.
            InputError: If one edit alone is named, or one that was replaced.
            ConflictError: If two edits have a wording in common, and different targets.
            ConfigError: If edits of the method in force have no scope.
            EditError: If there is nothing to refit, no scope can be kept from another's wordings, training
                breaks down, or inside `disabled()`; nothing has changed then.
        """
        editor = self._editor
        if editor is None or not self.edits:
            raise EditError("there is no edit to refit: edit first")
        plan = Refit(editor, self._speaker, ids)

        def make(requests: Sequence[EditRequest]) -> Sequence[EditOutcome]:
            outcomes = [editor.apply(one, on_step=on_step) for one in requests]
            plan.look_again()
            return outcomes

        return plan.told(self._make(editor, self._preset, [plan.request], "keep", make))

    def _make(
        self,
        editor: Editor,
        preset: str,
        requests: Sequence[EditRequest],
        on_conflict: OnConflict,
        make: Callable[[Sequence[EditRequest]], Sequence[EditOutcome]],
    ) -> EditReport:
        """Has edits made, looks at what came of them, and takes them all back if anything breaks off."""
        if self._edited.is_disabled:
            raise EditError("edits are disabled here, and an edit could not be seen: edit outside disabled()")
        began = time.monotonic()
        edits = [edit for request in requests for edit in request.edits]
        require_new(edits, editor.requests)
        conflicts = conflicts_of(editor, requests)
        requests = settled(requests, conflicts, on_conflict)
        before = self._witness.says(edits)
        n_before, old = len(editor.requests), (self._editor, self._preset, self._decoded)
        try:
            with torch.inference_mode(False):  # training needs gradients wherever it is called
                outcomes = make(requests)
            self._put_in_force(editor, preset, (*old[2], *(outcome.decoded for outcome in outcomes)))
            older = [one.edit for one in self.edits[: -len(edits)] if one.decoded and not one.replaced]
            if Capability.INDEPENDENT in editor.capabilities:
                met = {one.old.id for one in conflicts}  # no other can have moved
                older = [edit for edit in older if edit.id in met]
            report = self._witness.report(
                editor, preset, edits, outcomes, before=before, older=older, began=began
            )
            report = replace(report, conflicts=tuple(conflict_rows(conflicts, on_conflict)))
            held = iter(row.decoded for row in report.rows)
            decoded = (tuple(next(held) for _ in request.edits) for request in requests)
            self._put_in_force(editor, preset, (*old[2], *decoded))
            return report
        except BaseException as error:  # Ctrl-C included: nothing half-made stays in force
            if len(editor.requests) > n_before:
                editor.undo(len(editor.requests) - n_before)
            self._put_in_force(*old)
            if isinstance(error, torch.OutOfMemoryError):
                raise EditError(f"out of memory while editing: edit fewer at once ({error})") from error
            raise

    def undo(self, n: int = 1) -> tuple[Edit, ...]:
        """Takes the last `n` calls of `edit` back, every bit of them, or none; without any the host is back.

        Each edit of `edit_many` counts as a call, and each call whose edits an artifact brought (`merge`);
        one of which a part only had been replaced there counts as two.
        What `remove` and `subset` took out is not brought back.

        Returns:
            The edits taken back, newest call first.

        Raises:
            UndoError: If fewer calls are left, or an artifact no longer remembers what was before them.
                Taking back all of them always works.
        """
        left = 0 if self._editor is None else len(self._editor.requests)
        if n < 1:
            raise UndoError(f"undo takes back at least one call of edit, got n={n}")
        if self._editor is None or n > left:
            raise UndoError(f"cannot take back {n} calls of edit: {left} are in force")
        try:
            gone = self._editor.undo(n)
            self._follow(self._editor)
        except BaseException:  # Ctrl-C included: what is listed and in force is what the editor holds
            self._follow(self._editor)
            raise
        return tuple(edit for request in gone for edit in request.edits)

    def remove(self, *ids: str) -> tuple[Edit, ...]:
        """Takes single edits out, whenever they were made; all others are as if these had never been.

        Methods can whose edits do not know each other (capability `independent`).

        Args:
            ids: Of the edits, as in `edits`.

        Returns:
            The edits taken out.

        Raises:
            UnknownNameError: If no edit has such an id.
            UndoError: If no id is given.
            ArtifactError: If the edits in force know each other, or there are none.
        """
        if not ids:
            raise UndoError("no edit is named: give the id of one, as in `edits`")
        gone = tuple(one.edit for one in self.edits if one.edit.id in ids)
        if self._editor is not None and gone and len(gone) == len(self.edits) == len(set(ids)):
            self.undo(len(self._editor.requests))
        else:
            self._restore(artifact.without(self._edit_set(), ids))
        return gone

    def subset(self, *ids: str) -> tuple[Edit, ...]:
        """Takes all edits out but these, which are as if the others had never been; see `remove`.

        Args:
            ids: Of the edits that stay, as in `edits`.

        Returns:
            The edits taken out.

        Raises:
            UnknownNameError: If no edit has such an id.
            ArtifactError: If no id is given, the edits in force know each other, or there are none.
        """
        gone = tuple(one.edit for one in self.edits if one.edit.id not in ids)
        self._restore(artifact.subset(self._edit_set(), ids))
        return gone

    def merge(self, path: str | os.PathLike[str], *, on_conflict: OnConflict = "keep") -> tuple[Edit, ...]:
        """Puts the edits of an artifact beside those in force, without training anything.

        Edits that are in force already are left out. One that the artifact replaced by another is replaced
        here, too, whatever is to be done about conflicts: that was settled there. (Two of which both are in
        force here stay so, unless a third that the artifact brings stands between them.) What an edit of here
        replaced there comes to stand before it, and `undo` counts calls in their order here.

        Args:
            path: The artifact.
            on_conflict: What to do where a prompt could be about one of its edits and about one in force that
                says something else, as in `edit`; if both are kept, a warning names them.

        Returns:
            The edits added.

        Raises:
            InputError: If `path` is no path.
            HostMismatchError: If they were made on another host.
            ArtifactError: If they were made in another way, or edits of that method know each other.
            ConfigError: If `on_conflict` is none of the three.
            ConflictError: If there is a conflict, and it was to be refused; nothing has changed then.
        """
        require_choice(on_conflict)
        if not isinstance(path, str | os.PathLike):
            raise InputError(
                f"merge takes the path of saved edits, got a {type(path).__name__}: save edits first"
            )
        known, other = {one.edit.id for one in self.edits}, artifact.read(Path(path))
        if self._editor is not None and known:
            other = artifact.merge(self._edit_set(), other)
            requests, state = settled_beside(self._editor, other.requests, other.state, on_conflict)
            other = replace(other, state=dict(state), memory=artifact.memory_of(requests))
        self._restore(other)
        return tuple(one.edit for one in self.edits if one.edit.id not in known)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Takes the edits out of force inside the `with` block, in this thread: logits are the host's."""
        with self._edited.disabled():
            yield

    # -- asking

    @overload
    def generate(self, prompt: str, *, max_new_tokens: int = ..., **generation: Any) -> str: ...
    @overload
    def generate(
        self, prompt: Sequence[str], *, max_new_tokens: int = ..., **generation: Any
    ) -> list[str]: ...
    @overload
    def generate(self, *, messages: Messages, max_new_tokens: int = ..., **generation: Any) -> str: ...
    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int = 32,
        **generation: Any,
    ) -> str | list[str]:
        """What the model says next: the new text only, spaces as they come.

        Args:
            prompt: Raw text to continue, or several.
            messages: A chat instead, `[{"role": "user", "content": ...}, ...]`, in the host's template.
            max_new_tokens: Most tokens of the reply.
            generation: For the host's `generate`; greedy unless they say otherwise.

        Raises:
            InputError: If the prompt is blank or does not fit the context, or both or neither is given.
            GenerationError: For ways of generating under which an edit cannot be right.
        """
        if prompt is not None and not isinstance(prompt, str):
            prompt = list(prompt)
        rows = self._speaker.rows(prompt, messages)
        texts = [self._speaker.text(ids) for ids in self._replies(rows, max_new_tokens, generation)]
        return texts if isinstance(prompt, list) else texts[0]

    def logits(
        self, prompt: str | None = None, *, messages: Messages | None = None
    ) -> Float[Tensor, " vocab"]:
        """The logits of the next token after a prompt or a chat."""
        [row] = self._speaker.rows(prompt, messages)
        return self._speaker.next_logits(self._edited, [row])[0]

    def check(self) -> list[tuple[AppliedEdit, str, bool]]:
        """Asks every edit's prompt again, raw: the edit, what the model says, whether that is the target.

        Edits that were replaced are asked too; that they are not said is no failure.
        """
        eos = self._editor is not None and self._editor.trains_eos
        checked = self._witness.check([one.edit for one in self.edits], eos=eos)
        return [(one, text, says) for one, (text, says) in zip(self.edits, checked, strict=True)]

    def explain(
        self, prompt: str | None = None, *, messages: Messages | None = None, max_new_tokens: int = 8
    ) -> tuple[TokenGates, ...]:
        """The gates of every basis at every edited token of a prompt and its reply, by layer and edit.

        Without edits in force, such as inside `disabled()`, there are none.
        """
        if self._editor is None or not self.edits or self._edited.is_disabled:
            return ()
        [row] = self._speaker.rows(prompt, messages)
        reply = self._replies([row], max_new_tokens)[0] if max_new_tokens else []
        ids = [*row, *reply]
        readings = self._editor.explain(ids, len(row))
        return tuple(self._token_gates(reading, ids, len(row)) for reading in readings)

    # -- keeping

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the edits to a folder `NAME.baft`: kilobytes, nothing of the host, no pickle.

        Of many edits full files of 4 MB that stand there already are taken over, so that one more edit costs
        little; elsewhere all is written, and is a copy. A model that was loaded reads its files as it needs
        them: never change them in place.

        Raises:
            ArtifactError: If there are no edits, or the folder cannot be written; one that was there stays.
            DamagedArtifactError: If a file that the model reads was changed in place.
        """
        self._keep(artifact.write(Path(path), self._edit_set()))
        return Path(path)

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
        """Uploads the edits to the hub; whoever can read them there reads prompts and targets.

        Returns:
            The address of the commit.

        Raises:
            ArtifactError: If there are no edits, or the hub cannot be reached or refuses.
        """
        return artifact.push_to_hub(self._edit_set(), repo_id, token=token, private=private)

    def _edit_set(self) -> EditSet:
        """The edits in force, as an artifact holds them."""
        editor = self._editor
        if editor is None or not self.edits:
            raise ArtifactError("there is no edit: edit first")
        return EditSet(
            method=editor.name,
            preset=self._preset,
            seed=editor.seed,
            settings=config.to_dict(editor.config),
            layers=tuple(site.layer for site in editor.sites),
            positions=config.to_dict(editor.edited.positions),
            host=self.identity,
            host_source=self._source,
            edits=tuple(StoredEdit(one.edit, one.request, one.decoded) for one in self.edits),
            memory=artifact.memory_of(editor.requests),
            state=editor.tensors(),
            pieces=self._pieces,
        )

    def _restore(self, saved: EditSet) -> None:
        """Puts the edits of an artifact into force.

        Raises:
            HostMismatchError: If they were made on other weights.
            DamagedArtifactError: If tensors are missing, left over or misshapen.
        """
        if compare(saved.host, self.identity) != "same":
            logger.warning(
                "these edits were made on %s in %s, and this host is in %s: check them (baft check)",
                saved.host.name,
                saved.host.dtype,
                self.identity.dtype,
            )
        if saved.host.tokenizer_hash != self.identity.tokenizer_hash:
            logger.warning(
                "these edits were made with another tokenizer or chat template than this host's: check them "
                "(baft check), or load the host with its own tokenizer"
            )
        kind = methods.get(saved.method)
        settings = config.from_dict(
            type(kind.preset("default")), saved.settings, where="config.json: settings"
        )
        editor = kind(self._host, settings, seed=saved.seed)
        editor.load_state_dict(saved.state, saved.requests)
        old = (self._editor, self._preset, self._decoded)
        try:
            self._put_in_force(editor, saved.preset, saved.decoded)
            self._keep(saved.pieces)
        except BaseException:  # Ctrl-C included
            self._put_in_force(*old)
            raise

    # -- inner workings

    def _put_in_force(
        self, editor: Editor | None, preset: str, decoded: tuple[tuple[bool, ...], ...]
    ) -> None:
        """Makes the edits that an editor holds those of this model."""
        self._editor, self._preset, self._decoded = editor, preset, decoded
        if not decoded:
            self._pieces = ()
        self._edited.follow(EditedModel(self._host.model) if editor is None else editor.edited)

    def _keep(self, pieces: tuple[Piece, ...]) -> None:
        """Remembers which files hold what, if the tensors last: edits that know each other have new ones."""
        editor = self._editor
        lasting = editor is not None and Capability.INDEPENDENT in editor.capabilities
        self._pieces = pieces if lasting else ()

    def _follow(self, editor: Editor) -> None:
        """Puts into force what an editor has left of the edits of this model."""
        self._put_in_force(editor, self._preset, self._decoded[: len(editor.requests)])

    def _editor_for(self, method: str, preset: str, seed: int, settings: Mapping[str, Any]) -> Editor:
        """The editor in force if it is the one asked for, or a new one if there are no edits yet."""
        kind = methods.get(method)
        chosen = kind.configured(preset, settings)
        editor = self._editor
        if editor and type(editor) is kind and editor.config == chosen and editor.seed == seed:
            return editor
        if editor and self.edits:
            raise ConfigError(
                f"the edits in force were made by {editor.name}/{self._preset} with seed {editor.seed}, "
                f"and {method}/{preset} with seed {seed} and the settings given does not go with them: "
                "undo them, use the same, or load a second model"
            )
        return kind(self._host, chosen, seed=seed)

    def _token_gates(self, reading: GateReading, ids: Sequence[int], n_prompt: int) -> TokenGates:
        place = reading.position
        token = str(self.tokenizer.decode([ids[place]]))
        return TokenGates(token, place, place >= n_prompt, reading.layer, reading.edit_id, reading.weights)

    def _replies(
        self,
        rows: Sequence[tuple[int, ...]],
        max_new_tokens: int,
        generation: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        return self._speaker.replies(self._edited, rows, max_new_tokens, generation)


def _texts(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
