"""Gates in closed form: open at an edit's own states, shut on ordinary ones, nothing to train.

Our own construction, not the paper's. The background's mean and covariance give, for each state of the
edit, the linear score that is one there and varies least elsewhere (`Whitening.gate`); a logistic of that
score, with a hard zero, is BaFT's gate.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baft.hosts.architecture import Site
from baft.hosts.background import Background, Slot
from baft.hosts.encoding import EncodedEdit
from baft.hosts.passes import Pass
from baft.methods.baft_config import BaftConfig
from baft.nn.gates import LogisticGate
from baft.nn.whitening import Whitening

EditKeys = tuple[Float[Tensor, "_ d_model"], Int[Tensor, " _"]]  # of one edit: states, and their slots

_ORDINARY_QUANTILE = 0.999
_ROWS = 256  # states looked at in one piece
_HIGHEST_MIDPOINT = 0.8  # a gate whose midpoint reached one would not open at its own key


def key_slots(run: Pass, texts: Sequence[EncodedEdit]) -> Int[Tensor, " state"]:
    """For every edited token, the kind of key it is: last prompt token, output token, or -1 for none.

    Tokens before the last of a prompt are edited too where a gate opens, but are no keys: their states say
    which words end the prompt, and hardly what it is about (experiments/LOG.md).
    """
    in_chat = torch.tensor([text.is_chat for text in texts], device=run.state_rows.device)[run.state_rows]
    last = torch.where(in_chat, int(Slot.LAST_CHAT), int(Slot.LAST_RAW))
    is_key = torch.where(run.state_offsets >= 0, int(Slot.TEXT), -1)
    return torch.where(run.state_offsets == -1, last, is_key)


class ClosedFormGates:
    """Makes the gates of one site for one request.

    Args:
        config: The `gate_...` settings, `slot_share` and `rank`.
        negatives: States at which gates shall stay shut.
        site: The site.
        device: Where its states live.
    """

    def __init__(self, config: BaftConfig, negatives: Background, site: Site, device: torch.device):
        self.config = config
        self.states = negatives.states[site].to(device)
        self._slots = negatives.slots.to(device)
        self._unrelated = self._slots == Slot.UNRELATED
        self._fits: dict[int, Whitening] = {}

    def fit(self, slot: int) -> Whitening:
        """Background statistics for keys at a slot: part of the weight is on states at that very slot.

        Where the user named unrelated prompts, a share is on theirs: there are few of them, and they matter.
        """
        if slot not in self._fits:
            here = (self._slots == slot).double()
            weights = torch.full_like(here, 1.0 / len(here))
            if slot != Slot.TEXT and bool(here.any()):
                share = self.config.slot_share
                weights = (1.0 - share) * weights + share * here / here.sum()
            if bool(self._unrelated.any()):
                share, theirs = self.config.unrelated_share, self._unrelated.double()
                weights = (1.0 - share) * weights + share * theirs / theirs.sum()
            self._fits[slot] = Whitening.fit(self.states, weights, shrinkage=self.config.gate_shrinkage)
        return self._fits[slot]

    def blocks(
        self, of_edits: Sequence[EditKeys]
    ) -> tuple[Float[Tensor, "edit rank d_model"], Float[Tensor, "edit rank"]]:
        """The gates of the bases of each edit, in float64.

        Basis k opens at key k and, where there are more keys than bases, at keys k + rank, k + 2 rank ..;
        where there are fewer, several bases share a key. Keys that share a basis are set against the
        background of the first one's slot. A gate's midpoint keeps clear of the score that
        ordinary states reach, and those of the user's unrelated prompts above all.

        Args:
            of_edits: The states of each edit, all its renderings one after the other, with their slots.
        """
        config = self.config
        made: list[tuple[Tensor, Tensor]] = []
        lowest, spread = [], []
        for keys, slots in of_edits:
            first, n = len(made), min(config.rank, len(keys))
            for k in range(n):
                whitening = self.fit(int(slots[k]))
                made.append(
                    whitening.gate(keys[k :: config.rank], sharpness=config.gate_sharpness, midpoint=0.0)
                )
            is_output = slots[:n] == Slot.TEXT
            lowest.append(torch.where(is_output, config.output_midpoint, config.gate_midpoint))
            spread.append(first + torch.arange(config.rank, device=keys.device) % n)
        U, c = (torch.stack(parts) for parts in zip(*made, strict=True))
        clear = (self._ordinary(U, c) + config.gate_clearance).clamp(max=_HIGHEST_MIDPOINT)
        c = c - config.gate_sharpness * torch.maximum(torch.cat(lowest).to(c), clear)
        of_basis = torch.stack(spread)
        return U[of_basis], c[of_basis]

    def _ordinary(
        self, U: Float[Tensor, "gate d_model"], c: Float[Tensor, " gate"]
    ) -> Float[Tensor, " gate"]:
        """The score that all but a thousandth of the states stay below; and every one that the user named."""
        place = _ORDINARY_QUANTILE * (len(self.states) - 1)
        below = int(place)
        highest = U.new_full((0, len(U)), 0.0)
        named = U.new_full((len(U),), -torch.inf)
        for states, unrelated in zip(self.states.split(_ROWS), self._unrelated.split(_ROWS), strict=True):
            scores = (torch.addmm(c, states.double(), U.T)) / self.config.gate_sharpness
            highest = torch.cat([highest, scores])
            highest = highest.topk(min(len(highest), len(self.states) - below), dim=0).values
            if bool(unrelated.any()):
                named = torch.maximum(named, scores[unrelated].amax(0))
        lower = highest[-1]
        upper = highest[max(len(highest) - 2, 0)]
        return torch.maximum(torch.lerp(lower, upper, place - below), named)

    def gate(self, of_edits: Sequence[EditKeys], dtype: torch.dtype) -> LogisticGate:
        """The gates of several edits, a block each."""
        U, c = self.blocks(of_edits)
        return LogisticGate(U.to(dtype), c.to(dtype), threshold=self.config.gate_threshold)


def edit_keys(run: Pass, texts: Sequence[EncodedEdit], n_edits: int, site: Site) -> list[EditKeys]:
    """The keys of each edit of a request at one site, with their slots."""
    slots, states = key_slots(run, texts), run.states()[site]
    edit_of_row = torch.arange(n_edits, device=slots.device).repeat_interleave(len(texts) // n_edits)
    edit_of_state = edit_of_row[run.state_rows]
    found = []
    for edit in range(n_edits):
        mine = (edit_of_state == edit) & (slots >= 0)
        found.append((states[mine.to(states.device)], slots[mine]))
    return found
