"""Strict reading, what the messages say, the way back to plain data, and the hash."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baft.config import canonical_hash, from_dict, read_json, read_toml, to_dict
from baft.errors import ConfigError


@dataclass(frozen=True)
class Gate:
    start: Literal["closed", "open"] = "closed"
    sharpness: float = 1.0


@dataclass(frozen=True)
class Decay:
    rate: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    lr: float
    n_steps: int = 40
    layers: tuple[int, ...] | None = None
    name: str | int = "settings"
    stop_early: bool = True
    weights: dict[str, float] = field(default_factory=dict)
    gate: Gate = Gate()
    gates: tuple[Gate, ...] = ()
    schedule: Gate | Decay | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"lr must be positive, got {self.lr}")


numbers = st.floats(allow_nan=False, allow_infinity=False)
gates = st.builds(Gate, start=st.sampled_from(["closed", "open"]), sharpness=numbers)
settings = st.builds(
    Settings,
    lr=numbers.filter(lambda value: value > 0),
    n_steps=st.integers(-(2**63), 2**63),
    layers=st.none() | st.lists(st.integers()).map(tuple),
    name=st.text(alphabet=st.characters(exclude_categories=["Cs"])) | st.integers(),
    stop_early=st.booleans(),
    weights=st.dictionaries(st.text(alphabet="abc. "), numbers),
    gate=gates,
    gates=st.lists(gates, max_size=3).map(tuple),
    schedule=st.none() | gates | st.builds(Decay, rate=numbers),
)


def refused(data: object, where: str = "run.toml") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_dict(Settings, data, where=where)
    return str(caught.value).splitlines()


@given(settings)
def test_settings_survive_json(config: Settings) -> None:
    back = from_dict(Settings, json.loads(json.dumps(to_dict(config))))
    assert back == config
    assert canonical_hash(back) == canonical_hash(config)


def test_arrays_become_tuples_and_integers_floats() -> None:
    config = from_dict(Settings, {"lr": 1, "layers": [3, 4], "gates": [{"sharpness": 2}]})
    assert config == Settings(lr=1.0, layers=(3, 4), gates=(Gate(sharpness=2.0),))
    assert type(config.lr) is float
    assert type(config.gates[0].sharpness) is float
    assert type(config.layers) is tuple


def test_what_is_not_given_keeps_its_default() -> None:
    config = from_dict(Settings, {"lr": 0.5})
    assert (config.n_steps, config.stop_early, config.schedule) == (40, True, None)


def test_a_union_takes_the_branch_that_fits() -> None:
    schedule = from_dict(Settings, {"lr": 0.5, "schedule": {"rate": 2}}).schedule
    assert isinstance(schedule, Decay)
    assert schedule.rate == 2.0
    assert from_dict(Settings, {"lr": 0.5, "schedule": {"start": "open"}}).schedule == Gate("open")


def test_tuples_and_dataclasses_are_taken_as_well() -> None:
    assert from_dict(Settings, {"lr": 0.5, "layers": (3,), "gate": Gate("open")}).gate == Gate("open")


def test_a_misspelt_key_is_told_with_the_nearest_and_all_keys() -> None:
    assert refused({"lr": 0.1, "n_step": 3}) == [
        "run.toml: unknown key 'n_step'; did you mean 'n_steps'? The keys are: "
        "gate, gates, layers, lr, n_steps, name, schedule, stop_early, weights"
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"gate": {"begin": 1}}, "run.toml: gate: unknown key 'begin'; the keys are: sharpness, start"),
        (
            {"gates": [{}, {"sharpnes": 1}]},
            "run.toml: gates[1]: unknown key 'sharpnes'; did you mean 'sharpness'? "
            "The keys are: sharpness, start",
        ),
        ({"n_steps": "many"}, "run.toml: n_steps: expected a valid integer, got 'many' (str)"),
        ({"n_steps": 2.0}, "run.toml: n_steps: expected a valid integer, got 2.0 (float)"),
        ({"n_steps": True}, "run.toml: n_steps: expected a valid integer, got True (bool)"),
        ({"stop_early": 1}, "run.toml: stop_early: expected a valid boolean, got 1 (int)"),
        ({"layers": [1, "2"]}, "run.toml: layers[1]: expected a valid integer, got '2' (str)"),
        ({"layers": 3}, "run.toml: layers: expected a valid array, got 3 (int)"),
        ({"name": 2.5}, "run.toml: name: expected a valid string or a valid integer, got 2.5 (float)"),
        ({"gate": {"start": "ajar"}}, "run.toml: gate.start: expected 'closed' or 'open', got 'ajar' (str)"),
        ({"gate": 3}, "run.toml: gate: expected an object, got 3 (int)"),
        ({"schedule": "never"}, "run.toml: schedule: expected an object, got 'never' (str)"),
        ({"weights": {"a": None}}, "run.toml: weights.a: expected a valid number, got None (NoneType)"),
        ({"weights": {"a": math.nan}}, "run.toml: weights.a: expected a finite number, got nan"),
        ({"layers": [-math.inf]}, "run.toml: layers[0]: expected a finite number, got -inf"),
        ({"weights": {3: 1.0}}, "run.toml: weights: expected texts as keys, got 3 (int)"),
        ({"name": b"x"}, "run.toml: name: expected text, a number, a list or a table, got b'x' (bytes)"),
        ({"lr": -1}, "run.toml: lr must be positive, got -1.0"),
    ],
)
def test_what_is_wrong_is_told_with_place_got_and_expected(data: dict[str, Any], message: str) -> None:
    assert refused({"lr": 0.1, **data}) == [message]


def test_a_missing_field_is_told() -> None:
    assert refused({}) == ["run.toml: field 'lr' is missing"]


def test_every_fault_is_told_at_once() -> None:
    assert len(refused({"n_steps": "x", "gate": {"begin": "open"}, "stop_early": 3})) == 4


def test_unknown_keys_in_a_union_name_the_keys_of_each_branch() -> None:
    lines = refused({"lr": 0.1, "schedule": {"rat": 0.5}})
    assert "run.toml: schedule: unknown key 'rat'; the keys are: sharpness, start" in lines
    assert "run.toml: schedule: unknown key 'rat'; did you mean 'rate'? The keys are: rate" in lines


@pytest.mark.parametrize("data", [[1], "text", None, 3])
def test_other_things_than_a_mapping_are_refused(data: object) -> None:
    assert refused(data)[0].startswith("run.toml: expected an object, got ")


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(refused({"lr": "x" * 1000})[0]) < 120


def test_plain_data_of_a_dataclass_only() -> None:
    for odd in (Settings, {"lr": 1}, 3):
        with pytest.raises(ConfigError, match="expected a dataclass instance, got"):
            to_dict(odd)
    assert to_dict(Settings(lr=1.0, layers=(1,)))["layers"] == [1]
    with pytest.raises(ConfigError, match=r"Gate: sharpness: expected a finite number, got inf"):
        to_dict(Gate(sharpness=math.inf))


def test_a_field_that_is_no_argument_is_left_out() -> None:
    @dataclass(frozen=True)
    class Derived:
        n: int
        twice: int = field(init=False, default=0)

    assert to_dict(Derived(3)) == {"n": 3}
    assert from_dict(Derived, {"n": 3}) == Derived(3)
    with pytest.raises(ConfigError, match="twice"):
        from_dict(Derived, {"n": 3, "twice": 6})


@given(numbers, st.integers(-(2**70), 2**70))
def test_the_hash_knows_numbers_not_their_spelling(number: float, whole: int) -> None:
    assert canonical_hash({"x": number}) == canonical_hash({"x": float(str(number))})
    assert (canonical_hash([whole]) == canonical_hash([float(whole)])) == (whole == float(whole))
    assert canonical_hash([0.0]) == canonical_hash([-0.0]) == canonical_hash([0])
    assert canonical_hash([True]) != canonical_hash([1])


def test_the_hash_knows_no_order_of_keys_and_no_class() -> None:
    assert canonical_hash({"a": 1, "b": 2}) == canonical_hash({"b": 2, "a": 1})
    assert canonical_hash([1, 2]) != canonical_hash([2, 1])
    config = Settings(lr=1.0, layers=(1, 2))
    assert canonical_hash(config) == canonical_hash(to_dict(config))
    assert canonical_hash(config) != canonical_hash(replace(config, layers=(2, 1)))


def test_the_hash_is_the_same_on_every_machine_and_in_every_release() -> None:
    # The SHA-256 of '{"sharpness":1,"start":"closed"}', by any tool.
    assert canonical_hash(Gate()) == "7c79c2570ddbb6f519fde4f5aca15c6443fd99fa0112a8fedce05b13a3a4c2d1"


def test_the_hash_refuses_what_has_no_canonical_form() -> None:
    for odd in (math.nan, object(), {1: 2}, {"x": {1, 2}}):
        with pytest.raises(ConfigError, match="^config: "):
            canonical_hash(odd)


def test_toml_is_read_and_its_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("\ufefflr = 5e-4\nlayers = [1, 2]\n[gate]\nstart = 'open'\n", encoding="utf-8")
    assert from_dict(Settings, read_toml(path)) == Settings(lr=5e-4, layers=(1, 2), gate=Gate("open"))


def test_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"lr": 5e-4, "name": "tour Eiffel à Rome"}', encoding="utf-8")
    assert from_dict(Settings, read_json(str(path))) == Settings(lr=5e-4, name="tour Eiffel à Rome")


@pytest.mark.parametrize("read", [read_toml, read_json])
def test_files_that_cannot_be_read_are_told(read: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent: no such file"):
        read(tmp_path / "absent")
    with pytest.raises(ConfigError, match="cannot be read: "):
        read(tmp_path)
    (tmp_path / "latin").write_bytes(b"x = '\xe9'")
    with pytest.raises(ConfigError, match="latin: not UTF-8 text: .* at byte 5"):
        read(tmp_path / "latin")


@pytest.mark.parametrize("text", ["lr = ", "lr = 1\nlr = 2", "[a", "n = " + "9" * 5000])
def test_bad_toml_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML: "):
        read_toml(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"lr": }', "not valid JSON: .* line 1 column 8"),
        ("", "not valid JSON: "),
        ('{"lr": 1, "n": 2, "lr": 1}', "not valid JSON: key 'lr' is given twice"),
        ('{"a": {"b": 1, "b": 2}}', "not valid JSON: key 'b' is given twice"),
        ('{"lr": NaN}', "not valid JSON: NaN is not a number in JSON"),
        ('{"lr": -Infinity}', "not valid JSON: -Infinity is not a number in JSON"),
        ("[1, 2]", r"expected a JSON object, got \[1, 2\] \(list\)"),
    ],
)
def test_bad_json_is_told(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"bad\.json: {message}"):
        read_json(tmp_path / "bad.json")


def test_a_number_too_large_for_json_is_not_let_through(tmp_path: Path) -> None:
    (tmp_path / "huge.json").write_text('{"lr": 1e999}')
    assert refused(read_json(tmp_path / "huge.json")) == ["run.toml: lr: expected a finite number, got inf"]
