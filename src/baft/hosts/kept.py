"""What is computed of a host once and kept on disk: named by what it depends on, written whole, evicted."""

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from baft.hosts.architecture import n_hooks
from baft.hosts.embedded import cache_folder
from baft.hosts.identity import identify
from baft.hosts.models import Host

logger = logging.getLogger(__name__)

_LEFT_BEHIND_S = 3600.0  # a half-written file that nobody has added to for so long is a killed process's


def kept_path(kind: str, host: Host, what: object) -> Path | None:
    """Where something is kept that depends on a host, on its tokenizer, and on `what`.

    Nowhere while others' hooks may change what the host computes. The name is made of samples of every
    parameter (`identity.py`), which may miss a change of single entries: then set another `BAFT_CACHE`.

    Args:
        kind: What it is; the folder.
        host: The host.
        what: All else that it depends on, as data whose `repr` tells it.
    """
    if n_hooks(host.model):
        return None
    one = identify(host)
    who = (one.weights_hash, one.n_parameters, one.architecture, one.config_hash, one.dtype)
    given = (what, one.tokenizer_hash)
    host_hash, what_hash = (hashlib.sha256(repr(part).encode()).hexdigest()[:32] for part in (who, given))
    return cache_folder() / kind / f"{host_hash}-{what_hash}.safetensors"


def read_kept(path: Path | None) -> dict[str, Tensor] | None:
    """What is kept there; None where nothing is, or it is damaged."""
    if path is None:
        return None
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        kept = {name: _read_one(path, name) for name in names}
    except (OSError, SafetensorError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used now: the last to be evicted
    return kept


def _read_one(path: Path, name: str) -> Tensor:
    """A copy of one tensor; the file is let go of each time, so that not all of it is in memory twice.

    A copy, since a tensor in the file stands at any address, and on that depends how products are rounded.
    """
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name).clone()
    return tensor


def keep(path: Path | None, tensors: Mapping[str, Tensor], what: str, *, most_bytes: int) -> None:
    """Writes tensors there, all or nothing, and makes room for them.

    A cache that cannot be written costs time and nothing else: it is logged.

    Args:
        path: Where, by `kept_path`; None for nowhere.
        tensors: On the CPU.
        what: What they are, for the log.
        most_bytes: What the folder may hold; what was used longest ago is deleted, the newest never. What
            other processes are writing is left alone, and does not count.
    """
    if path is None:
        return
    try:
        write_whole(path, tensors)
        _evict(path, most_bytes)
    except (OSError, SafetensorError) as error:
        logger.warning("could not keep the %s in %s: %s", what, path, error)


def write_whole(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Writes tensors to a file, all or nothing: to a name beside it that begins with a dot, then renamed.

    Args:
        path: Where; folders on the way are made.
        tensors: On the CPU.
        about: What is said of them in the file's head.

    Raises:
        OSError: If it cannot be written.
        SafetensorError: If it cannot be written, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.parent.name}-")
    os.close(handle)
    try:
        save_file(dict(tensors), name, about)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _evict(newest: Path, most_bytes: int) -> None:
    kept, others = newest.stat().st_size, []
    for path in newest.parent.iterdir():
        with contextlib.suppress(OSError):  # another process may have deleted it
            about = path.stat()
            if path.name.startswith("."):  # half-written: another process is at it, or was killed
                if time.time() - about.st_mtime > _LEFT_BEHIND_S:
                    path.unlink()
            elif path != newest:
                others.append((about.st_mtime_ns, about.st_size, path))
    for _, n_bytes, path in sorted(others, reverse=True):
        kept += n_bytes
        if kept > most_bytes:
            path.unlink(missing_ok=True)
