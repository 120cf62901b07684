"""An edit set on disk: a folder `NAME.baft/` of plain files, none of which can execute anything.

    config.json         what made the edits, on which host, and the checksums of everything
    edits.jsonl         one edit a line, in the order in which they were made
    state.safetensors   the tensors that the edits added; of many edits the first 4 MB, and so on in
                        state-1.safetensors, ...

The `codec` knows these files, `pieces` those of the tensors; the `store` keeps them in their folder, the
`algebra` puts sets together, and the `hub` shares them.
"""

from baft.artifact.algebra import memory_of, merge, subset, without
from baft.artifact.codec import CONFIG, EDITS, SCHEMA_VERSION, EditSet, StoredEdit
from baft.artifact.hub import fetch_from_hub, push_to_hub
from baft.artifact.pieces import Piece
from baft.artifact.store import SUFFIX, delete, is_artifact, read, require_free, write

__all__ = [
    "CONFIG",
    "EDITS",
    "SCHEMA_VERSION",
    "SUFFIX",
    "EditSet",
    "Piece",
    "StoredEdit",
    "delete",
    "fetch_from_hub",
    "is_artifact",
    "memory_of",
    "merge",
    "push_to_hub",
    "read",
    "require_free",
    "subset",
    "without",
    "write",
]
