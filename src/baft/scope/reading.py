"""What a scope reads of a prompt: early states of the words that a user wrote, wherever they stand."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from baft.hosts.early import early_features
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.hosts.turns import Row, Turns
from baft.scope.names import Names, read_names

LAST = 48  # tokens of a prompt that are compared
_ROWS = 24  # of one run of the host, of like length, so that little of it is padding


class Reader:
    """Reads prompts with a host.

    Args:
        host: The host; it is run up to its last early block.
        encoder: Its encoder.
    """

    def __init__(self, host: Host, encoder: Encoder):
        self.host, self.encoder = host, encoder
        self._turns = Turns(encoder)

    def words(self, rows: Sequence[Row]) -> list[Float[Tensor, "_ n_features"]]:
        """What is read of the last user turn of each row, or of a raw prompt, a few of like length at a time.

        All that stands before has its say in the states; special tokens and the template are not among them.
        Of many words it is the last `LAST`: what is asked stands at the end, and the more there is to match,
        the more matches by chance.

        Args:
            rows: Tokens of raw prompts and of rendered chats.
        """
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), _ROWS):
            chosen = order[start : start + _ROWS]
            texts = [rows[i] for i in chosen]
            places = [self._place(row) for row in texts]
            found |= zip(chosen, early_features(self.host, self.encoder, texts, places), strict=True)
        return [found[i] for i in range(len(rows))]

    def names(self, row: Row, weights: Float[Tensor, "channel place"]) -> Names:
        """What the words of which `words` reads name.

        Args:
            row: The tokens.
            weights: What each of the words' tokens counts in every channel; what comes after them is padding.
        """
        ids = row[self._place(row)]
        return read_names(self.encoder.text, ids, weights[:, : len(ids)])

    def _place(self, row: Row) -> slice:
        begin, end = self._turns.words(row)
        if begin >= end:  # an empty turn: all that there is
            begin, end = 0, len(row)
        return slice(max(begin, end - LAST), end)


def padded(
    texts: Sequence[Float[Tensor, "_ n_features"]],
) -> tuple[Float[Tensor, "text place n_features"], Bool[Tensor, "text place"]]:
    """Texts of unequal length as one tensor, in float32, and which of its places are no padding."""
    lengths = torch.tensor([len(one) for one in texts], device=texts[0].device)
    features = pad_sequence([one.float() for one in texts], batch_first=True)
    return features, torch.arange(features.shape[1], device=lengths.device) < lengths.unsqueeze(1)
