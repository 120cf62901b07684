"""Names, folders, live models and artifacts to models that can be edited."""

import os
from pathlib import Path
from typing import Any

import torch

from baft import artifact
from baft.artifact import EditSet
from baft.errors import ArtifactError, ConfigError
from baft.hosts.embedded import EMBEDDED
from baft.hosts.models import DeviceMap, load_host
from baft.model import Model

Source = str | os.PathLike[str] | tuple[Any, Any]


def load(
    source: Source,
    *,
    host: Source | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
) -> Model:
    """Loads a model to edit, or an edited one.

    Args:
        source: An embedded host's name, a folder, a hub id, or a live `(model, tokenizer)`; or an artifact
            (`NAME.baft`), whose host is then loaded too (`load_from_hub` takes an artifact's hub id).
        host: The host of an artifact, where it is not to be loaded from where it was.
        dtype: Precision of the host.
        device: Where to put it; "auto" lets accelerate spread it.
        device_map: In place of one device, one for each module by name; "cpu" and "disk" are possible.
        offload_folder: Where weights on "disk" are written, if they have to be.
        accept_terms: Accept the terms of an embedded host that has some.

    Raises:
        HostError: If the host cannot be loaded.
        ArtifactError: If the artifact is damaged, or belongs to another host.
    """
    saved: EditSet | None = None
    if isinstance(source, (str, os.PathLike)) and artifact.is_artifact(Path(source)):
        saved = artifact.read(Path(source))
        if host is None and not saved.host_source:
            raise ConfigError(
                f"{os.fspath(source)} does not say where its host ({saved.host.name}) is loaded from: "
                "give host="
            )
        source = saved.host_source if host is None else host
    elif isinstance(source, (str, os.PathLike)) and Path(source).suffix == artifact.SUFFIX:
        raise ArtifactError(f"{os.fspath(source)} does not exist: check the path of the edit set")
    elif host is not None:
        raise ConfigError(f"host= goes with an artifact (NAME.baft), and {source!r} is none")
    found = load_host(
        source,
        dtype=dtype,
        device=device,
        device_map=device_map,
        offload_folder=offload_folder,
        accept_terms=accept_terms,
    )
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    is_folder = bool(name) and name not in EMBEDDED and Path(name).expanduser().is_dir()
    return Model(found, source=str(Path(name).expanduser().resolve()) if is_folder else name, saved=saved)


def load_from_hub(
    repo_id: str, *, revision: str | None = None, token: str | None = None, **options: Any
) -> Model:
    """Loads an edited model whose artifact is on the hub; `options` as for `load`."""
    return load(artifact.fetch_from_hub(repo_id, revision=revision, token=token), **options)
