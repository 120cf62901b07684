"""Values against a slow loop, and the texts that are set apart in their descent."""

import pytest
import torch

from baft.hosts.architecture import Site
from baft.hosts.encoding import Encoder
from baft.hosts.passes import FullPass
from baft.hosts.patches import down_projection
from baft.hosts.positions import PositionSpec
from baft.methods.key_value import AllButLast, KeyValueConfig, KeyValues
from baft.methods.subjects import Placed, essence, placed, prefixes
from baft.types import Edit

EDITS = (Edit("Paris is in Rome and", "dry", subject="Paris"), Edit("Nine hats of", "R", subject="hats"))
LAYER, N_STEPS = 1, 3
CONFIG = KeyValueConfig(
    learning_rate=0.5,
    schedule="constant",
    max_steps=N_STEPS,
    stop_margin=None,
    n_prefixes=1,
    n_key_prefixes=0,
    clamp=1e4,
    kl_weight=20.0,
    weight_decay=2.0,
)
WEIGHTS = torch.tensor([1.0, CONFIG.kl_weight, CONFIG.weight_decay], dtype=torch.float64)


def log_probabilities(model, module, ids, place, vector):
    """After every token of one text, with a vector added to what a module puts out at one token."""

    def add(_, __, output):
        at = torch.arange(output.shape[1]) == place
        return output + at.unsqueeze(-1) * vector

    handle = model.get_submodule(module).register_forward_hook(add)
    try:
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)
    finally:
        handle.remove()


def values_by_hand(host, module, lengths):
    """One edit, one text, one token after the other: the vectors, and the loss's terms at every step."""
    encoder, told = Encoder.for_host(host), []
    vectors = torch.zeros(len(EDITS), 32, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([vectors], lr=CONFIG.learning_rate)
    for step in range(N_STEPS + 1):
        of_edits = []
        for edit, vector, length in zip(EDITS, vectors, lengths, strict=True):
            of_texts = []
            for one in placed(encoder, edit, prefixes(CONFIG.n_prefixes, seed=0), eos=False):
                prompt, target = one.text.prompt_ids, one.text.target_ids
                found = log_probabilities(host.model, module, prompt + target, one.place, vector)
                of_tokens = [found[len(prompt) - 1 + i, token] for i, token in enumerate(target)]
                of_texts.append(-sum(of_tokens) / len(of_tokens))
            named, place = encoder.prompt(f"{edit.subject} is a"), essence(encoder, edit).place
            now, before = (
                log_probabilities(host.model, module, named, place, added)[-1] for added in (vector, 0.0)
            )
            divergence = sum(now.exp() * (now - before))
            decay = vector.norm() / length**2
            of_edits.append(WEIGHTS * torch.stack([sum(of_texts) / len(of_texts), divergence, decay]))
        told.append(sum(of_edits) / len(of_edits))
        if step < N_STEPS:
            adam.zero_grad()
            told[-1].sum().backward()
            adam.step()
    return vectors.detach(), torch.stack(told).detach()


def test_values_are_those_of_a_slow_loop(host):
    module = down_projection(host.model, LAYER)
    asked = KeyValues(host, Encoder.for_host(host), CONFIG, EDITS, seed=0)
    vectors, result, _ = asked.values({}, module, Site(LAYER), None)
    by_hand, terms = values_by_hand(host, module, asked.outputs({}, module).norm(dim=-1))
    torch.testing.assert_close(result.losses, tuple(terms.sum(-1).tolist()), atol=1e-9, rtol=0)
    torch.testing.assert_close(vectors, by_hand, atol=1e-6, rtol=0)
    assert float(terms[-1].min()) > 1e-2  # control: each of the terms is there


@pytest.mark.parametrize("idle", ["R", "thing"])
def test_the_last_text_of_each_edit_is_set_apart(host, idle):
    """At its prompt's end, whether its target is one token or several; edits have unequal numbers."""
    encoder = Encoder.for_host(host)

    def text(prompt, target):
        return Placed(encoder.edit(prompt, target, eos=False), 0)

    others = [[text("Paris is in", "Rome"), text("So. Paris is in", "Rome")], [text("A river", "R")]]
    lasts = [text("Paris is a", idle), text("A river is a", idle)]
    assert (len(lasts[0].text.target_ids) == 1) == (idle == "R")
    rows = [[*some, last] for some, last in zip(others, lasts, strict=True)]

    def run(found):
        return FullPass(host, encoder, PositionSpec(), [one.text for one in found], ())

    shown = AllButLast(run([one for some in rows for one in some]), rows)
    apart = run([one for some in others for one in some])
    assert torch.equal(shown.targets, apart.targets)
    assert torch.equal(shown.rows, apart.rows)
    assert len(shown.targets) > 3
    with torch.no_grad():
        torch.testing.assert_close(shown({}).logits, apart({}).logits)
        alone = [host.model(torch.tensor([one.text.prompt_ids])).logits[0, -1] for one in lasts]
        torch.testing.assert_close(shown.last, torch.stack(alone))
    assert not torch.allclose(*alone)  # control
