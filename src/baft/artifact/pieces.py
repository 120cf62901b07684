"""The tensors of an edit set as files: pieces, in the order in which edits added them.

A piece that is full is never written again: it is mapped when it is read, and linked to when its folder is
written anew. So one more edit is an append.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baft.errors import ArtifactError, DamagedArtifactError

PIECE_BYTES = 4 << 20  # of tensors: a piece that holds as many is full

_RESERVED = "__metadata__"  # the one name that safetensors keeps for itself; ours gets a sign in front
_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool}
    | {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
    | {torch.int64, torch.int32, torch.int16, torch.int8}
    | {torch.uint64, torch.uint32, torch.uint16, torch.uint8}
)


def state_file(number: int) -> str:
    """The name of a piece, counted from 0."""
    return f"state-{number}.safetensors" if number else "state.safetensors"


def is_piece(name: str) -> bool:
    """Whether a piece has such a name; the inverse of `state_file`."""
    return re.fullmatch(r"state(-[1-9][0-9]*)?\.safetensors", name) is not None


class Stamp(NamedTuple):
    """What tells a file from others, and from itself once it is changed."""

    device: int
    inode: int
    size_bytes: int
    changed_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> "Stamp":
        """The stamp of a file."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def is_file_of(self, other: "Stamp") -> bool:
        """Whether both are of one file, changed or not."""
        return self[:2] == other[:2]


@dataclass(frozen=True)
class Checksum:
    """What a file must hold."""

    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, raw: bytes) -> "Checksum":
        """The checksum of a file's content."""
        return cls(len(raw), hashlib.sha256(raw).hexdigest())

    @property
    def is_full(self) -> bool:
        """Whether nothing is added to a piece of this size."""
        return self.size_bytes >= PIECE_BYTES


@dataclass(frozen=True, eq=False)
class Piece:
    """A full piece, and the tensors that it holds.

    Args:
        path: The file.
        stamp: What tells whether it is still the same.
        checksum: Of its content.
        tensors: The tensors, by name.
        is_mapped: Whether they stand in the file itself, so that who changes it changes them.
    """

    path: Path
    stamp: Stamp
    checksum: Checksum
    tensors: Mapping[str, Tensor]
    is_mapped: bool


class KnownPieces:
    """The pieces that hold tensors of a set which is to be written: where they are linked, and what they map.

    Whoever changed a mapped file changed the tensors in force, and cut short it ends the process that reads
    them. So all are looked at before any tensor is.

    Args:
        state: The tensors of the set.
        pieces: What is known of files; those without a tensor of the set do not count.

    Raises:
        DamagedArtifactError: If a mapped file was changed in place.
        OSError: If one that seems changed cannot be read.
    """

    def __init__(self, state: Mapping[str, Tensor], pieces: Iterable[Piece]):
        held = {id(tensor) for tensor in state.values()}
        self._pieces = list[Piece]()
        self._gone = dict[int, Piece]()  # by tensor: those whose files are out of sight
        for piece in pieces:
            if held.isdisjoint(map(id, piece.tensors.values())):
                continue
            found = _looked_at(piece) if piece.is_mapped else piece
            if found is None:
                self._gone |= dict.fromkeys(map(id, piece.tensors.values()), piece)
            self._pieces.append(found or piece)

    def inside(self, folder: Path) -> list[Piece]:
        """Those whose files stand in a folder."""
        return [piece for piece in self._pieces if piece.path.parent == folder]

    def mapped(self) -> list[Piece]:
        """Those that are mapped."""
        return [piece for piece in self._pieces if piece.is_mapped]

    def require_as_read(self, tensors: Mapping[str, Tensor]) -> None:
        """Compares mapped tensors, of whose files only the system knows where they are, with their checksums.

        Raises:
            DamagedArtifactError: If they differ.
        """
        for piece in {self._gone[id(one)] for one in tensors.values() if id(one) in self._gone}:
            if Checksum.of(_content(piece.tensors)) != piece.checksum:
                raise _changed(piece)
            for tensor in piece.tensors.values():
                self._gone.pop(id(tensor), None)


def _looked_at(piece: Piece) -> Piece | None:
    """A mapped piece with the stamp of now, or None where its path no longer leads to it."""
    try:
        found = Stamp.of(piece.path.stat())
    except OSError:
        return None
    if not found.is_file_of(piece.stamp):
        return None
    if found == piece.stamp:
        return piece
    if found.size_bytes != piece.checksum.size_bytes:
        raise _changed(piece)
    with piece.path.open("rb") as file:  # never the mapping, which may end before it does
        if hashlib.file_digest(file, "sha256").hexdigest() != piece.checksum.sha256:
            raise _changed(piece)
    return replace(piece, stamp=found)  # touched


def _changed(piece: Piece) -> DamagedArtifactError:
    return DamagedArtifactError(
        f"{piece.path} was changed in place since it was read, and with it the edits in force: load them "
        "anew from a copy"
    )


def cut(
    state: Mapping[str, Tensor], known: Sequence[Piece]
) -> Iterator[tuple[dict[str, Tensor], Piece | None]]:
    """Cuts tensors, in the order of a table, where a piece is full.

    Args:
        state: The tensors.
        known: Pieces that may hold the first ones.

    Yields:
        The tensors of each piece, with the one that holds them already.
    """
    items, start = list(state.items()), 0
    for piece in known:
        here = dict(items[start : start + len(piece.tensors)])
        same = here.keys() == piece.tensors.keys() and all(
            piece.tensors[name] is tensor for name, tensor in here.items()
        )
        if not same:
            break
        yield here, piece
        start += len(here)
    here, n_bytes = dict[str, Tensor](), 0
    for name, tensor in items[start:]:
        here[name] = tensor
        n_bytes += tensor.numel() * tensor.element_size()  # `nbytes` fails for what is refused later
        if n_bytes >= PIECE_BYTES:
            yield here, None
            here, n_bytes = {}, 0
    if here or not items:
        yield here, None


def serialize(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a piece; it depends on names and values alone.

    Raises:
        ArtifactError: If a tensor is not finite, not dense, or of a kind that the format does not know.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            kind = f"{tensor.dtype}, {tensor.layout}".replace("torch.", "")
            raise ArtifactError(
                f"tensor {name!r} is of a kind that safetensors files do not hold ({kind}): make it dense, "
                "and of floats of at most 64 bits, complex64, integers or bool"
            )
        if not _is_finite(tensor):
            raise ArtifactError(f"tensor {name!r} holds NaN or infinity")
    return _content(tensors)


def _content(tensors: Mapping[str, Tensor]) -> bytes:
    copies = {  # as safetensors stores no shared memory
        _escape(name): tensor.detach().to("cpu", copy=True).contiguous().resolve_conj()
        for name, tensor in tensors.items()
    }
    return safetensors.torch.save(copies)


def read_piece(path: Path, expected: Checksum, where: str) -> Piece:
    """Reads a piece; a full one is mapped, and read from the disk as it is used.

    Args:
        path: The file.
        expected: What it must hold.
        where: What messages call it.

    Raises:
        DamagedArtifactError: If it is truncated, misshapen, changed or not finite.
        OSError: If it cannot be read.
    """
    is_mapped = expected.is_full and _is_utf8(path)  # safetensors opens no other paths
    try:
        with path.open("rb") as file:
            stamp = Stamp.of(os.fstat(file.fileno()))
            require_size(stamp.size_bytes, expected, where)
            if is_mapped:
                require_sum(hashlib.file_digest(file, "sha256").hexdigest(), expected.sha256, where)
                with safe_open(path, "pt") as opened:
                    tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                if Stamp.of(path.stat()) != stamp:
                    raise DamagedArtifactError(f"{where} was replaced while it was read")
            else:
                raw = file.read()
                require_sum(Checksum.of(raw).sha256, expected.sha256, where)
                tensors = safetensors.torch.load(raw)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise DamagedArtifactError(f"{where}: not a safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise DamagedArtifactError(f"{where}: tensor {_unescape(name)!r} holds NaN or infinity")
    state = {_unescape(name): tensors[name] for name in sorted(tensors)}
    return Piece(path, stamp, expected, state, is_mapped)


def require_size(n: int, expected: Checksum, where: str) -> None:
    """Compares the length of a file.

    Raises:
        DamagedArtifactError: If it differs.
    """
    if n != expected.size_bytes:
        what = "is truncated" if n < expected.size_bytes else "is too long"
        raise DamagedArtifactError(f"{where} {what}: {n} bytes, expected {expected.size_bytes}")


def require_sum(actual: str, expected: object, where: str) -> None:
    """Compares checksums.

    Raises:
        DamagedArtifactError: If they differ.
    """
    if actual != expected:
        raise DamagedArtifactError(f"{where} was changed: its sha256 is {actual}, expected {expected!r}")


def _is_finite(tensor: Tensor) -> bool:
    is_byte = tensor.is_floating_point() and tensor.element_size() == 1  # a float8 knows no isfinite
    return bool(torch.isfinite(tensor.float() if is_byte else tensor).all())


def _is_utf8(path: Path) -> bool:
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _escape(name: str) -> str:
    return f"+{name}" if name.lstrip("+") == _RESERVED else name


def _unescape(name: str) -> str:
    return name[1:] if name.lstrip("+") == _RESERVED else name
