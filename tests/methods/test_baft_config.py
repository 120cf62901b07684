"""The settings: what they refuse, and the numbers of the paper."""

from dataclasses import fields, replace

import pytest

from baft.config import from_dict, to_dict
from baft.errors import BaftError, ConfigError
from baft.hosts.architecture import default_layers
from baft.methods.baft import BaftEditor, ReftEditor
from baft.methods.baft_config import DEFAULT, PAPER, BaftConfig
from baft.nn.interventions import n_parameters

INF, NAN = float("inf"), float("nan")
OUT_OF_RANGE = [
    ("last_prompt", 0),
    ("rank", 0),
    ("deepest_layers", 0),
    ("load_balance", -0.1),
    ("load_balance", INF),
    ("load_balance", NAN),
    ("locality", -0.1),
    ("locality", NAN),
    ("locality_from_step", -1),
    ("gate_threshold", -0.1),
    ("gate_threshold", 1.0),
    ("gate_threshold", NAN),
    ("gate_sharpness", 0.0),
    ("gate_sharpness", INF),
    ("gate_midpoint", 0.0),
    ("gate_midpoint", 1.0),
    ("output_midpoint", 0.0),
    ("output_midpoint", 1.0),
    ("gate_clearance", -0.1),
    ("gate_clearance", NAN),
    ("gate_shrinkage", 0.0),
    ("gate_shrinkage", 1.1),
    ("slot_share", -0.1),
    ("slot_share", 1.0),
    ("unrelated_share", -0.1),
    ("unrelated_share", 1.0),
    ("max_target_tokens", 0),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_what_is_out_of_range_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} is out of range: got {value}, expected .*\d"):
        BaftConfig(**{name: value})


def test_every_number_has_a_bound():
    checked = {name for name, _ in OUT_OF_RANGE}
    from_training = {
        "learning_rate",
        "gate_learning_rate",
        "max_steps",
        "stop_loss",
        "stop_margin",
        "edits_at_once",
    }
    numbers = {
        one.name
        for one in fields(BaftConfig)
        if one.type not in (bool, "bool") and "Literal" not in str(one.type)
    }
    assert numbers - checked - from_training - {"layers", "balance_form"} == set()
    assert BaftConfig(gate_threshold=0.0, slot_share=0.0, gate_shrinkage=1.0, locality_from_step=0)  # control


@pytest.mark.parametrize(("bases", "gate"), [("own", "logistic"), ("own", "open"), ("shared", "closed_form")])
def test_gates_and_bases_that_do_not_fit(bases, gate):
    with pytest.raises(ConfigError, match=f"gate='{gate}' and bases='{bases}' do not fit"):
        BaftConfig(bases=bases, gate=gate)


@pytest.mark.parametrize("layers", [(), (1, 1)])
def test_layers_are_named_once(layers):
    with pytest.raises(ConfigError, match="at least one layer, each once, got"):
        BaftConfig(layers=layers)


def test_nothing_edited_is_refused():
    with pytest.raises(ConfigError, match=r"last_prompt=0, outputs=False|last_prompt is out of range"):
        BaftConfig(last_prompt=0, outputs=False)


def test_the_hard_zero_belongs_to_gates_in_closed_form():
    assert BaftConfig(gate_threshold=0.3).hard_zero == 0.3
    assert replace(PAPER, gate_threshold=0.3).hard_zero == 0.0


def test_the_paper_is_as_the_method_page_says():
    """Section 2 of the method page."""
    expected = {
        "learning_rate": 2e-3,
        "schedule": "constant",
        "max_steps": 70,
        "stop_loss": 0.02,
        "stop_margin": None,
        "train_eos": False,
        "chat": False,
        "load_balance": 0.1,
        "balance_form": "running",
        "locality": 0.0,
        "locality_from_step": 3,
        "gate_learning_rate": 1e-3,
        "rank": 12,
        "last_prompt": 3,
        "outputs": True,
        "bases": "shared",
        "gate": "logistic",
        "layers": None,
        "deepest_layers": None,
        "hard_zero": 0.0,
    }
    assert {name: getattr(PAPER, name) for name in expected} == expected
    assert {**BaftEditor.presets} == {
        "default": DEFAULT,
        "paper": PAPER,
        "paper-rloc": replace(PAPER, locality=0.1),
    }
    reft = ReftEditor.presets["paper"]
    assert reft == replace(PAPER, gate="open", load_balance=0.0)
    # Parameters on LLaMA-2-7B, counted on the method page.
    counts = [n_parameters(d_model=4096, rank=PAPER.rank, n_layers=4, gated=gated) for gated in (True, False)]
    assert counts == [589_920, 393_264]


@pytest.mark.parametrize(
    ("n", "layers"),
    [(32, (9, 18, 24, 28)), (30, (8, 17, 23, 26)), (18, (5, 10, 14, 16)), (3, (1, 2)), (1, (0,))],
)
def test_the_layers_of_the_paper(n, layers):
    assert default_layers(n) == layers


def test_which_layers_an_editor_edits(host):
    def sites(**changes):
        return tuple(site.layer for site in BaftEditor(host, replace(PAPER, **changes)).sites)

    assert sites() == (1, 2)
    assert sites(deepest_layers=1) == (2,)
    assert sites(deepest_layers=9) == (1, 2)
    assert sites(layers=(2, 0)) == (0, 2)
    for changes, message in (
        ({"layers": (0, 3)}, "layer 3 is out of range: this host has 3 layers, counted from 0"),
        ({"layers": (-1,)}, "layer -1 is out of range"),
        ({"rank": 33}, "rank 33 is impossible: 32 hidden units have room for 1 to 32 bases"),
    ):
        with pytest.raises(ConfigError, match=message):
            sites(**changes)


@pytest.mark.parametrize("config", [*BaftEditor.presets.values(), *ReftEditor.presets.values()])
def test_settings_are_plain_data(config):
    assert from_dict(BaftConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match="unknown key 'learning_rat'; did you mean 'learning_rate'"):
        from_dict(BaftConfig, {"learning_rat": 1.0})
    with pytest.raises(BaftError):
        from_dict(BaftConfig, to_dict(config) | {"gate": "ajar"})


@pytest.mark.parametrize("gate", ["open", "closed_form"])
@pytest.mark.parametrize("term", ["load_balance", "locality"])
def test_terms_that_train_gates_need_gates_to_train(gate, term):
    bases = "own" if gate == "closed_form" else "shared"
    with pytest.raises(ConfigError, match=f"{term}=0.1 .* gate='{gate}' has none to train: set both to 0"):
        BaftConfig(gate=gate, bases=bases, **{term: 0.1})
