"""Heads that are trained in next to no time: for tests that want one, and not a good one."""

import pytest

from baft.hosts.background import background_text
from baft.scope import calibration, text

LITTLE = {"n_groups": 2, "n_at_once": 2, "n_uses": 1, "n_dims": 8, "n_hidden": 4, "n_calibrate": 60}


def read_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves a few of the ordinary texts; sentences of both parts are among them."""
    few = {kind: texts[:40] for kind, texts in background_text().items()}
    for module in (calibration, text):
        monkeypatch.setattr(module, "background_text", lambda: few)
