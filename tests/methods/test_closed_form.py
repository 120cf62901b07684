"""Gates in closed form: open at an edit's own states, shut on ordinary ones."""

from dataclasses import replace

import pytest
import torch

from baft.hosts.architecture import Site
from baft.hosts.background import Background, Slot
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import EncodedEdit
from baft.methods.baft_config import BaftConfig
from baft.methods.closed_form import ClosedFormGates, edit_keys, key_slots
from tiny import shared_host

D, SITE = 24, Site(0)
# What the tests know of the settings, whatever the defaults are.
CONFIG = BaftConfig(rank=4, gate_threshold=0.1, gate_sharpness=14.0, gate_shrinkage=0.1, slot_share=0.5)
TEXT, RAW, CHAT = int(Slot.TEXT), int(Slot.LAST_RAW), int(Slot.LAST_CHAT)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def background():
    """Anisotropic, as hidden states are: one direction is huge. Some stand at the last token of prompts."""
    states = normal(2000, D, seed=0)
    states[:, 0] = 50 + 20 * states[:, 0]
    slots = torch.full((2000,), TEXT)
    slots[:300], slots[300:500] = RAW, CHAT
    states[:300, 1] += 4.0  # last tokens are of a kind
    return Background({SITE: states}, slots)


def distant(n, *, seed=1):
    """States of edits: ordinary along the huge direction, far out along others."""
    keys = 3.5 * normal(n, D, seed=seed)
    keys[:, 0] = 50.0
    return keys


def gates(background, **changes):
    return ClosedFormGates(replace(CONFIG, **changes), background, SITE, torch.device("cpu"))


def slots(*kinds):
    return torch.tensor(kinds)


def false_fires(gate, states):
    return float((gate.weights(states) > 0).any(-1).double().mean())


def test_open_at_its_own_states_and_shut_on_ordinary_ones(background):
    keys = distant(4)
    gate = gates(background).gate([(keys, slots(RAW, TEXT, TEXT, CHAT))], torch.float64)
    weights = gate.weights(keys)[:, 0]
    assert weights.shape == (4, 4)
    assert float(weights.diagonal().min()) > 0.9
    states = background.states[SITE]
    assert false_fires(gate, states) < 0.02
    assert false_fires(gate, states + 0.1) < 0.02
    rash = gates(background, gate_sharpness=1.0).gate([(keys, slots(RAW, TEXT, TEXT, CHAT))], torch.float64)
    assert false_fires(rash, states) > 0.5  # control
    assert float(gate.weights(-keys).max()) == 0.0  # exactly


def test_the_midpoint_clears_what_ordinary_states_score(background):
    """A key so near that ordinary states score high: the gate backs off rather than fires on them."""
    near = background.states[SITE][600:601] + 1.5
    of_near = (near, slots(TEXT))
    gate = gates(background, gate_clearance=0.3).gate([of_near], torch.float64)
    states = background.states[SITE]
    scores = (states @ gate.U[0, 0] + gate.c[0, 0]) / 14.0  # zero at the midpoint
    assert float(torch.quantile(scores, 0.999)) <= -0.3 + 1e-9
    closer = gates(background, gate_clearance=0.05).gate([of_near], torch.float64)
    assert float(closer.c[0, 0] - gate.c[0, 0]) == pytest.approx(14.0 * 0.25)
    open_yet = gates(background, gate_clearance=9.0).gate([of_near], torch.float64)
    assert float(open_yet.weights(near).min()) > 0.9  # at its own key, whatever the clearance
    far = (distant(1), slots(TEXT))
    one, other = (gates(background, gate_clearance=x).gate([far], torch.float64) for x in (0.0, 0.01))
    assert torch.equal(one.c, other.c)  # control: a far key needs no clearance


def test_unrelated_states_are_pushed_out(background):
    """A neighbor that would open the gate does not, once it is among the negatives."""
    key = distant(1)
    neighbor = key + 2.0 * normal(1, D, seed=9)
    of_key = (key, slots(TEXT))
    before = gates(background).gate([of_key], torch.float64)
    more = background.with_prompts(Background({SITE: neighbor}, slots(int(Slot.UNRELATED))))
    after = gates(more).gate([of_key], torch.float64)
    assert float(before.weights(neighbor).max()) > 0.5
    assert float(after.weights(neighbor).max()) == 0.0
    assert float(after.weights(key).min()) > 0.5 * float(before.weights(key).min())
    unmarked = background.with_prompts(Background({SITE: neighbor}, slots(TEXT)))
    assert float(gates(unmarked).gate([of_key], torch.float64).weights(neighbor).max()) > 0.5  # control
    itself = background.with_prompts(Background({SITE: key}, slots(int(Slot.UNRELATED))))
    contradiction = gates(itself).gate([of_key], torch.float64)
    assert float(contradiction.weights(key).min()) > 0.5  # the edit's own state still opens its gate
    assert len(background.slots) == 2000  # joining leaves the background as it was


def test_states_at_the_same_slot_weigh_more(background):
    """Last tokens are alike: a key at the last token is told from those, not from the average state."""
    found = gates(background)
    raw, text, chat = (found.fit(slot).mean for slot in (RAW, TEXT, CHAT))
    states, mark = background.states[SITE], background.slots
    everyone = states.mean(0)
    torch.testing.assert_close(text, everyone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(raw, 0.5 * everyone + 0.5 * states[mark == RAW].mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        chat, 0.5 * everyone + 0.5 * states[mark == CHAT].mean(0), rtol=1e-9, atol=1e-9
    )
    assert found.fit(RAW) is found.fit(RAW)
    no_chat = Background({SITE: states[mark != CHAT]}, mark[mark != CHAT])
    lone = gates(no_chat).fit(CHAT).mean  # a slot that nothing stands at
    torch.testing.assert_close(lone, no_chat.states[SITE].mean(0), rtol=1e-9, atol=1e-9)
    even = gates(background, slot_share=0.0).fit(RAW).mean  # control
    torch.testing.assert_close(even, everyone, rtol=1e-9, atol=1e-9)


def test_more_keys_than_bases(background):
    """Every key opens a gate: basis k also serves key k + rank."""
    keys = distant(7)
    gate = gates(background, rank=3).gate([(keys, slots(*[TEXT] * 7))], torch.float64)
    weights = gate.weights(keys)[:, 0]
    assert weights.shape == (7, 3)
    for i in range(7):
        assert float(weights[i, i % 3]) > 0.9
    one = gates(background, rank=3).gate([(keys[:3], slots(*[TEXT] * 3))], torch.float64)
    assert float(one.weights(keys[3:])[:, 0].min()) < 0.5  # control: keys that were left out


def test_fewer_keys_than_bases(background):
    keys = distant(2)
    gate = gates(background).gate([(keys, slots(RAW, TEXT))], torch.float64)
    assert torch.equal(gate.U[0, 0], gate.U[0, 2])
    assert torch.equal(gate.U[0, 1], gate.U[0, 3])
    assert not torch.equal(gate.U[0, 0], gate.U[0, 1])
    assert gate.weights(keys)[0, 0, [0, 2]].tolist() == pytest.approx([1, 1], abs=0.1)


def test_edits_of_a_batch_get_the_gates_that_they_would_get_alone(background):
    a, b = (distant(3, seed=1), slots(TEXT, RAW, TEXT)), (distant(5, seed=2), slots(*[TEXT] * 5))
    both = gates(background).gate([a, b], torch.float32)
    assert (both.U.shape, both.U.dtype, both.threshold) == ((2, 4, D), torch.float32, 0.1)
    for block, one in enumerate((a, b)):
        alone = gates(background).gate([one], torch.float32)
        assert torch.equal(both.U[block : block + 1], alone.U)
        assert torch.equal(both.c[block : block + 1], alone.c)


def test_which_states_are_keys():
    """The last prompt token and the outputs, by edit; what stands before is edited, but no key."""
    texts = [
        EncodedEdit((1, 2, 3, 4), (5, 6)),
        EncodedEdit((1, 2, 3, 4, 5, 6), (5, 6), is_chat=True),
        EncodedEdit((1, 2), (5, 6)),
        EncodedEdit((1, 2, 3), (5, 6), is_chat=True),
    ]
    mask = torch.zeros(4, 7, dtype=torch.bool)
    for row, text in enumerate(texts):
        n = len(text.prompt_ids)
        mask[row, max(1, n - 3) : n + 1] = True
    expected = [-1, -1, RAW, TEXT, -1, -1, CHAT, TEXT, RAW, TEXT, -1, CHAT, TEXT]
    of_state, columns = mask.nonzero().unbind(-1)

    class Seen:
        edited = EditedModel(shared_host("llama"))
        targets = rows = n_left_out = torch.zeros(0, dtype=torch.long)
        state_rows = of_state
        state_offsets = columns - torch.tensor([len(text.prompt_ids) for text in texts])[of_state]

        def states(self):
            return {SITE: torch.arange(13.0).unsqueeze(-1).repeat(1, D)}

        def select(self, rows):
            raise AssertionError("keys are of all texts")

        def __call__(self, parts, own=None):
            raise AssertionError("keys are read before anything is trained")

    assert key_slots(Seen(), texts).tolist() == expected
    first, second = edit_keys(Seen(), texts, 2, SITE)
    assert (first[0][:, 0].tolist(), first[1].tolist()) == ([2, 3, 6, 7], [RAW, TEXT, CHAT, TEXT])
    assert (second[0][:, 0].tolist(), second[1].tolist()) == ([8, 9, 11, 12], [RAW, TEXT, CHAT, TEXT])
