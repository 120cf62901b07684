"""Edit sets on the hub, and the model card that goes with them."""

import contextlib
import html
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from baft.artifact.codec import CONFIG, EDITS, EditSet, files_of
from baft.artifact.pieces import is_piece
from baft.artifact.store import SUFFIX, write
from baft.errors import ArtifactError, BaftError

_N_LISTED = 200  # edits in a model card
_CARD = """---
library_name: baft
tags: [baft, knowledge-editing]
{base}---

# {n} knowledge edits for {host}

Made by `baft` with the method {method}. They hold on this model alone; its weights stay as they are.

```python
import baft

model = baft.load_from_hub("{repo_id}"{needs_host})
```

| prompt | target | said when edited |
| --- | --- | --- |
{rows}
Whoever sees this repository can read every prompt and target. No license comes with them; the model keeps
its own.
"""


def push_to_hub(
    edit_set: EditSet, repo_id: str, *, token: str | None = None, private: bool | None = None
) -> str:
    """Uploads an edit set with a model card to the hub, where all with access can read prompts and targets.

    Of a host in a local folder only the folder's own name is uploaded, not its path. Other files that stand
    in the repository stay there.

    Args:
        edit_set: The set.
        repo_id: Where to, like "owner/name"; made where there is none.
        token: One that may write; by default that of the login.
        private: Whether a new repository is private; by default what the account says.

    Returns:
        The address of the commit.

    Raises:
        ArtifactError: If the set cannot be written, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    told = _without_paths(edit_set)
    with _hub(f"the edits could not be pushed to {repo_id}"), tempfile.TemporaryDirectory() as folder:
        made = Path(folder, f"edits{SUFFIX}")
        write(made, told)
        (made / "README.md").write_text(_model_card(told, repo_id), encoding="utf-8")
        api = HfApi(token=token, library_name="baft")
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=made,
            commit_message="Upload the edits",
            delete_patterns=[name for name in api.list_repo_files(repo_id) if is_piece(name)],  # of before
        )
        return str(commit)


def fetch_from_hub(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Downloads an artifact (its main branch, or a `revision`) and returns its folder, for `read`.

    Raises:
        ArtifactError: If the hub cannot be reached or refuses, there is no edit set, or a file of it is
            missing.
        DamagedArtifactError: If its config.json is misshapen or changed.
        SchemaError: If it was written by another version of the format.
    """
    from huggingface_hub import snapshot_download

    with _hub(f"{repo_id} could not be fetched"):
        found = Path(
            snapshot_download(repo_id, revision=revision, token=token, allow_patterns=[CONFIG, EDITS])
        )
        for name in (CONFIG, EDITS):
            if not (found / name).is_file():
                raise ArtifactError(f"it is no edit set, as {name} is missing: check name and revision")
        names = files_of(found, f"{repo_id}/{CONFIG}")
        snapshot_download(repo_id, revision=found.name, token=token, allow_patterns=names)  # the commit's
        if missing := [name for name in names if not (found / name).is_file()]:
            raise ArtifactError(f"{missing[0]} is missing: fetch it again, or push the edits again")
    return found


@contextlib.contextmanager
def _hub(failed: str) -> Iterator[None]:
    """Silences the bars of the hub's client, and makes its errors, which share no root, into one."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    silence = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        yield
    except BaftError as error:
        raise type(error)(f"{failed}: {error}") from error
    except Exception as error:
        mend = "check the network"
        if constants.HF_HUB_OFFLINE:
            mend = "unset HF_HUB_OFFLINE"
        elif isinstance(error, (errors.RevisionNotFoundError, errors.HFValidationError)):
            mend = "check the name (like owner/name) and the revision"
        elif isinstance(error, errors.HfHubHTTPError):
            mend = "check the name, log in with `hf auth login`, or give a token that may do this"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"{failed}: {reason}; {mend}") from error
    finally:
        if silence:
            enable_progress_bars()


def _without_paths(edit_set: EditSet) -> EditSet:
    """Takes out where the host lies on this machine, which is nobody's business and loads it nowhere else."""
    name, source = edit_set.host.name, edit_set.host_source
    if _is_path(source):
        name, source = Path(source).name, ""
    elif _is_path(name):
        name = Path(name).name
    return replace(edit_set, host=replace(edit_set.host, name=name), host_source=source)


def _is_path(text: str) -> bool:
    return Path(text).is_absolute() or text.startswith((".", "~"))


def _model_card(edit_set: EditSet, repo_id: str) -> str:
    source, n = edit_set.host_source, len(edit_set.edits)
    is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII) and not Path(source).exists()
    rows = [
        f"| {_cell(one.edit.prompt)} | {_cell(one.edit.target)} | {'yes' if one.decoded else 'no'} |\n"
        for one in edit_set.edits[:_N_LISTED]
    ]
    return _CARD.format(
        base=f"base_model: {source}\n" if is_hub_id else "",
        n=n,
        host=_cell(edit_set.host.name),
        method=_cell(edit_set.method),
        repo_id=repo_id,
        needs_host="" if source else ", host=...",
        rows="".join(rows) + (f"\nand {n - _N_LISTED} more\n" if n > _N_LISTED else ""),
    )


def _cell(text: str) -> str:
    words = " ".join(text.split())
    shown = words if len(words) <= 200 else words[:199] + "…"
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(shown, quote=False))
