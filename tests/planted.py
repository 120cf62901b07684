"""Methods that cheat, for a score to catch: each is registered by the test that plants it."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from baft.errors import HostError
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.methods.baft import ReftEditor
from baft.methods.base import Capability, Editor, EditOutcome
from rules import Ruled, prefers


@dataclass(frozen=True)
class NoSettings:
    pass


class Planted(Editor):
    """Makes no real edit; a subclass says what it does to the host."""

    name: ClassVar[str] = "planted"
    summary: ClassVar[str] = "a cheat"
    capabilities: ClassVar[frozenset[Capability]] = frozenset()
    presets: ClassVar[dict[str, Any]] = {"default": NoSettings()}

    def __init__(self, host, config, *, seed=0):
        super().__init__(host, config, seed=seed)
        self._edited = EditedModel(host.model)

    @property
    def edited(self):
        return self._edited

    def apply(self, request, *, on_step=None):
        self.requests = (*self.requests, request)
        ids = tuple(edit.id for edit in request.edits)
        n = len(ids)
        return EditOutcome(ids, (True,) * n, (1.0,) * n, (), 0, "closed_form", 0.0)

    def undo(self, n=1):
        raise AssertionError("no runner undoes")

    def reset(self):
        self.requests = ()
        self._edited = EditedModel(self.host.model)

    def state_dict(self):
        return {}

    def load_state_dict(self, state, requests):
        raise AssertionError("no runner loads")

    def explain(self, ids, n_prompt_tokens):
        return ()


class Nothing(Planted):
    """Claims to have edited."""


class Everywhere(Planted):
    """Biases the model toward the last target, whatever is asked."""

    def apply(self, request, *, on_step=None):
        target = request.edits[-1].target
        first = Encoder.for_host(self.host).edit("A", target, eos=False).target_ids[0]
        self._edited = Ruled(self.host.model, prefers(first))
        return super().apply(request)


class Forgetful(ReftEditor):
    """Remembers its last edit alone."""

    def apply(self, request, *, on_step=None):
        self.reset()
        return super().apply(request, on_step=on_step)


class PatientEditor(Planted):
    """Waits until the folder of its host holds a file `go`."""

    def apply(self, request, *, on_step=None):
        while not (Path(self.host.name) / "go").exists():
            time.sleep(0.1)
        return super().apply(request)


class DeadlyEditor(Planted):
    """Ends its process, as the system does where memory runs out."""

    def apply(self, request, *, on_step=None):
        os.kill(os.getpid(), signal.SIGKILL)


class RefusingEditor(Planted):
    """Fails in a way that is no matter of a single edit."""

    def apply(self, request, *, on_step=None):
        raise HostError("this host is not good enough")
