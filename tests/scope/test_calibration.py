"""Bounds against the binomial distribution, thresholds against scores one at a time."""

import copy
import math

import pytest
import torch

from baft.errors import ConfigError
from baft.hosts.background import background_text
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.nn.scope import ScopeHead, late_interaction
from baft.scope.calibration import (
    Calibration,
    _unrelated,
    calibrate,
    own_thresholds,
    read_ordinary,
    share_bound,
    tolerance_threshold,
)
from baft.scope.reading import Reader, padded
from baft.scope.text import Fact, ScopeText
from tiny import tiny_host, tiny_tokenizer


@pytest.fixture(scope="module")
def reader():
    model = tiny_host("llama", dtype=torch.float32, max_position_embeddings=4096)
    host = Host("tiny", model, tiny_tokenizer(), "tiny")
    return Reader(host, Encoder(host.tokenizer))


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(0)
    return ScopeHead(128, n_dims=6, n_hidden=4).requires_grad_(False)


@pytest.fixture(scope="module")
def ordinary(reader, head):
    return read_ordinary(reader, head)


def chance_of_at_most(k, n, share):
    return sum(math.comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(k + 1))


@pytest.mark.parametrize(("n", "share"), [(59, 0.05), (300, 0.05), (300, 0.2), (93, 0.05)])
def test_as_many_neighbors_pass_as_the_bound_allows(n, share):
    scores = torch.randperm(n, generator=torch.Generator().manual_seed(0)).float()
    n_above = int((scores > tolerance_threshold(scores, share)).sum())
    assert chance_of_at_most(n_above, n, share) <= 0.05 < chance_of_at_most(n_above + 1, n, share)


def test_too_few_neighbors_show_nothing():
    assert tolerance_threshold(torch.arange(59.0), 0.05) == 58.0
    with pytest.raises(ConfigError, match=r"58 pairs cannot show a share of 0.05: expected at least 59"):
        tolerance_threshold(torch.arange(58.0), 0.05)


def test_the_bound_of_a_share_is_that_of_clopper_and_pearson():
    assert share_bound(0, 300) == pytest.approx(1 - 0.05 ** (1 / 300), abs=1e-9)
    for n_found, n in ((1, 10), (7, 1000), (600, 1000)):
        assert chance_of_at_most(n_found, n, share_bound(n_found, n)) == pytest.approx(0.05, rel=1e-6)
    assert share_bound(10, 10) == 1.0


def test_an_edits_own_threshold_is_what_no_ordinary_text_exceeds(reader, head, ordinary, monkeypatch):
    assert sum(ordinary.lengths) == ordinary.vectors.shape[1]
    prompts = ["The capital of Norway is", "Who wrote it?"]
    keys = head.keys(*padded(reader.words([reader.encoder.prompt(one) for one in prompts])))
    best = torch.full((2,), math.log(0.5))
    for text in ordinary.vectors.split(ordinary.lengths, dim=1):
        scores = late_interaction(
            keys, text.unsqueeze(1), torch.ones(1, text.shape[1]).bool(), head.discounts
        )
        found = head.log_probability(scores)[0]
        best = torch.maximum(best, torch.where(found > math.log(0.99), -math.inf, found))
    torch.testing.assert_close(own_thresholds(head, ordinary, keys), best, rtol=0, atol=1e-5)
    assert best[0] != best[1]
    with monkeypatch.context() as patch:
        patch.setattr(head.midpoints, "data", torch.full((2,), 2.0))
        assert own_thresholds(head, ordinary, keys).tolist() == pytest.approx([math.log(0.5)] * 2)


def test_an_edit_of_what_an_ordinary_text_asks_is_not_shut_by_it(reader, head, ordinary, monkeypatch):
    monkeypatch.setattr(head.discounts, "data", torch.zeros(2))  # these prompts are long, letter by letter
    prompts = [reader.encoder.prompt(one) for one in background_text()["prompts"][:20]]
    words = [padded(reader.words([prompt])) for prompt in prompts]
    asked = [(head.keys(*one), one[1]) for one in words]
    sure = [
        head.log_probability(late_interaction(keys, keys.vectors, real, head.discounts))[0, 0]
        for keys, real in asked
    ]
    assert all(one > math.log(0.99) for one in sure)
    shut_by = [own_thresholds(head, ordinary, keys)[0] for keys, _ in asked]
    assert all(one > threshold for one, threshold in zip(sure, shut_by, strict=True))


def test_a_calibration_keeps_neighbors_out(reader, head, ordinary):
    found = []
    for share in (0.1, 0.5):
        one = copy.deepcopy(head)
        told = calibrate(
            reader, one, ordinary, other_subject=share, other_relation=share, n_groups=30, seed=1
        )
        groups = [text.group(1) for text in [ScopeText("calibrate", 1)] for _ in range(30)]
        encode = reader.encoder.prompt
        keys = one.keys(*padded(reader.words([encode(group[0].prompt) for group in groups])))
        for channel, place in enumerate((1, -1)):
            asked = padded(reader.words([encode(group[place].asked[0]) for group in groups]))
            scores = late_interaction(keys, one.keys(*asked).vectors, asked[1], one.discounts)
            above = scores[channel].diagonal() - one.midpoints[channel]
            n_passed = int((above > 1e-5).sum())
            assert chance_of_at_most(n_passed, 30, share) <= 0.05 < chance_of_at_most(n_passed + 1, 30, share)
        assert told == Calibration(share, share, 30, told.n_named, told.n_fired, told.n_asked, told.n_edits)
        assert told.n_asked == told.n_edits > 80
        assert told.named_bound == share_bound(told.n_named, 30)
        found.append((one.midpoints, told.n_fired))
    assert (found[0][0] > found[1][0]).all()
    assert found[0][1] <= found[1][1]


def test_names_keep_further_neighbors_out(reader, head, ordinary, monkeypatch):
    settings = {"other_subject": 0.5, "other_relation": 0.5, "n_groups": 30, "seed": 1}
    told = calibrate(reader, copy.deepcopy(head), ordinary, **settings)
    monkeypatch.setattr("baft.scope.names.COST", 0.0)
    free = calibrate(reader, copy.deepcopy(head), ordinary, **settings)
    assert told.n_named < free.n_named
    assert told.n_fired < free.n_fired


def test_only_what_shares_nothing_is_unrelated():
    facts = [Fact("a", "r", "", ()), Fact("b", "r", "", ()), Fact("a", "q", "", ()), Fact("c", "q", "", ())]
    assert _unrelated(facts).tolist() == [
        [False, False, False, True],
        [False, False, True, True],
        [False, True, False, False],
        [True, True, False, False],
    ]
