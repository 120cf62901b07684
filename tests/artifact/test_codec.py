import hashlib
import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baft.artifact import StoredEdit, codec, read, write
from baft.config import canonical_hash
from baft.errors import ArtifactError, BaftError, DamagedArtifactError, SchemaError
from baft.types import Edit
from edit_sets import FILES, HOST, ROME, TOKYO, names, same, small, written


def forge(path, *, raws=None, **changes):
    """Changes an artifact and makes its checksums right again, as no accident does."""
    for name, raw in (raws or {}).items():
        (path / name).write_bytes(raw)
    config = json.loads((path / "config.json").read_text())
    for name in config["files"]:
        raw = (path / name).read_bytes()
        config["files"][name] = {"size_bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    config |= changes
    config = {key: value for key, value in config.items() if value != "REMOVED"}
    config["sha256"] = canonical_hash({key: value for key, value in config.items() if key != "sha256"})
    (path / "config.json").write_text(json.dumps(config))


# Round trips


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "rome.baft"
    assert write(str(path), small()) == ()  # nothing to remember of a piece that is not full
    assert same(read(str(path)), small())
    assert not same(read(path), small(seed=8))  # the control
    assert names(tmp_path) == {"rome.baft"}
    assert names(path) == FILES
    assert read(path).layers == (3, 9)


FINITE = st.floats(allow_nan=False, allow_infinity=False)
FINITE32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
TABLES = st.dictionaries(st.text(), JSON, max_size=3)
TEXTS = st.text(min_size=1).filter(str.strip)
STORED = st.builds(
    StoredEdit,
    st.builds(Edit, TEXTS, TEXTS, st.none() | st.text(), st.none() | st.text()),
    st.integers(0, 99),
    st.booleans(),
)


@settings(max_examples=20, deadline=None)
@given(
    data=st.fixed_dictionaries({
        "method": st.text(), "preset": st.text(), "seed": st.integers(), "host_source": st.text(),
        "settings": TABLES, "positions": TABLES, "memory": TABLES,
        "layers": st.lists(st.integers()).map(tuple), "edits": st.lists(STORED, max_size=3).map(tuple),
    }),
    state=st.lists(st.text() | st.sampled_from(["__metadata__", "+__metadata__"]), max_size=4),
    samples=st.dictionaries(st.text(), st.lists(FINITE32).map(tuple), max_size=3),
)  # fmt: skip
def test_every_plain_part_survives(data, state, samples):
    made = small(
        **data,
        host=replace(HOST, samples=samples),
        state={name: torch.tensor([float(n)]) for n, name in enumerate(state)},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.baft")
        found = read(written(path, made))
    assert same(found, made)
    assert json.dumps(found.memory) == json.dumps(made.memory)  # 1 is not 1.0
    assert found.host.samples == samples


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float32",
        "bfloat16",
        "float16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "uint16",
        "complex64",
        "int64",
        "bool",
    ],
)
def test_every_kind_of_tensor_survives(tmp_path, dtype):
    whole = torch.arange(12).reshape(3, 4).to(getattr(torch, dtype))
    state = {"whole": whole, "turned": whole.T, "part": whole[1:, :2], "none": whole[:0], "one": whole[2, 3]}
    found = read(written(tmp_path / "x.baft", small(state=state))).state
    assert list(found) == sorted(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].tolist() == tensor.tolist()


def test_views_parameters_and_large_numbers_survive(tmp_path):
    state = {
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "large": torch.tensor([1e300], dtype=torch.float64),
        "wide": torch.ones(1).expand(3),
    }
    found = read(written(tmp_path / "x.baft", small(state=state))).state
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert not found["parameter"].requires_grad


def test_nothing_at_all_is_an_edit_set_too(tmp_path):
    made = small(
        edits=(), state={}, memory={}, settings={}, layers=(), positions={}, method="", host_source=""
    )
    assert same(read(written(tmp_path / "x.baft", made)), made)


def test_the_files_can_be_read_by_people(rome):
    text = (rome / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert '\n    "samples": {\n      "embed": [0.1, -1e-30, 3.4028234663852886e+38],\n' in text
    assert config["n_edits"] == 2
    assert config["created"].endswith("+00:00")
    assert config["host_source"] == "owner/tiny"
    assert "東京" in (rome / "edits.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (rome / "edits.jsonl").read_bytes().splitlines()]
    assert [row["id"] for row in rows] == [ROME.edit.id, TOKYO.edit.id]
    assert safetensors.torch.load_file(rome / "state.safetensors").keys() == small().state.keys()


def test_the_version_that_wrote_it_is_told(rome, tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "WRITER", "9.8.7")
    write(tmp_path / "x.baft", small())
    assert json.loads((tmp_path / "x.baft/config.json").read_text())["baft_version"] == "9.8.7"


# What write refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": {"R": torch.tensor([1.0, float("nan")])}}, "tensor 'R' holds NaN"),
        ({"state": {"R": torch.tensor([float("inf")])}}, "tensor 'R' holds NaN or infinity"),
        ({"state": {"R": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}}, "tensor 'R' holds NaN"),
        ({"state": {"\ud800": torch.ones(1)}}, "surrogates"),
        (
            {"state": {"R": torch.ones(2, 2).to_sparse()}},
            "'R' is of a kind .*float32, sparse_coo.: make it dense",
        ),
        ({"state": {"R": torch.ones(2, dtype=torch.complex128)}}, "'R' is of a kind .*complex128, strided"),
        ({"state": {"R": torch.ones(2).to(torch.float8_e8m0fnu)}}, "'R' is of a kind .*float8_e8m0fnu"),
        ({"state": {"R": torch.ones(2).byte().view(torch.float4_e2m1fn_x2)}}, "'R' is .*float4_e2m1fn_x2"),
        ({"state": {"R": torch.ones(2, device="meta")}}, "cannot be stored: .*meta"),
        ({"memory": {"x": [float("nan")]}}, r"memory\.x\[0\]: expected a finite number"),
        ({"memory": {"x": {1}}}, r"memory\.x: expected text, a number"),
        ({"memory": {"x": {1: 2}}}, "expected texts as keys"),
        ({"settings": {"x": torch.ones(1)}}, r"settings\.x: expected"),
        ({"settings": {"x": "\ud800"}}, "surrogate"),
        ({"edits": (StoredEdit(Edit("\ud800", "x"), 0, True),)}, "surrogates"),
        ({"edits": (StoredEdit(Edit("x", "y"), -1, True),)}, "expected a count"),
        ({"host": replace(HOST, samples={"w": (float("nan"),)})}, r"samples\.w\[0\]: expected a finite"),
    ],
)
def test_what_cannot_be_stored_is_refused(rome, tmp_path, changes, message):
    with pytest.raises(ArtifactError, match=rf"(?s)rome\.baft was not written.*{message}"):
        write(rome, small(**changes))
    assert same(read(rome), small())
    assert names(tmp_path) == {"rome.baft"}


@pytest.mark.parametrize("error", [KeyError("F6"), RuntimeError("no"), safetensors.SafetensorError("no")])
def test_whatever_goes_wrong_with_tensors_names_the_folder(rome, tmp_path, monkeypatch, error):
    def refuse(tensors):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save", refuse)
        with pytest.raises(
            ArtifactError, match=r"rome\.baft was not written: the edits cannot be stored: .*"
        ):
            write(rome, small(seed=8))
    assert same(read(rome), small())
    assert names(tmp_path) == {"rome.baft"}


def test_what_contains_itself_is_refused(tmp_path):
    loop = {}
    loop["again"] = loop
    with pytest.raises(ArtifactError, match="cannot be stored"):
        write(tmp_path / "x.baft", small(memory=loop))


# What read refuses


@pytest.mark.parametrize("name", ["edits.jsonl", "state.safetensors"])
def test_a_length_or_a_content_that_changed_is_named(rome, name):
    whole = (rome / name).read_bytes()
    for n in (0, 1, len(whole) // 2, len(whole) - 1):
        (rome / name).write_bytes(whole[:n])
        with pytest.raises(
            DamagedArtifactError, match=rf"{name} is truncated: {n} bytes, expected {len(whole)}"
        ):
            read(rome)
    (rome / name).write_bytes(whole + b"\n")
    with pytest.raises(DamagedArtifactError, match=rf"{name} is too long"):
        read(rome)
    changed = (
        whole.replace(b"true", b"null") if name == "edits.jsonl" else whole[:-1] + bytes([whole[-1] ^ 1])
    )
    (rome / name).write_bytes(changed)
    with pytest.raises(
        DamagedArtifactError, match=rf"{name}(, line 1: expected a count| was changed: its sha256)"
    ):
        read(rome)


def test_an_edit_that_changed_by_chance_is_found(rome):
    raw = (rome / "edits.jsonl").read_bytes()
    (rome / "edits.jsonl").write_bytes(raw.replace(b'"request": 0', b'"request": 1'))
    with pytest.raises(DamagedArtifactError, match=r"edits\.jsonl was changed: its sha256"):
        read(rome)


def test_a_config_that_is_no_json_says_where(rome):
    text = (rome / "config.json").read_text()
    (rome / "config.json").write_text(text.replace('"seed": 7,', '"seed": 7'))
    line = text.splitlines().index('  "seed": 7,') + 2
    with pytest.raises(DamagedArtifactError, match=rf"config\.json: not valid JSON: .*line {line} column"):
        read(rome)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON: 'utf-8'"),
        (b"[1]", "expected a JSON object, got list"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 5000, "not valid JSON"),
        (b"{}", "expected a whole number as schema_version, got None"),
        (b'{"schema_version": true}', "expected a whole number as schema_version, got True"),
        (b'{"schema_version": 2}', "field 'baft_version' is missing"),
    ],
)
def test_a_config_that_is_none(rome, raw, message):
    (rome / "config.json").write_bytes(raw)
    with pytest.raises(DamagedArtifactError, match=rf"config\.json: {message}"):
        read(rome)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "REMOVED"}, "field 'preset' is missing"),
        ({"shade": 1}, "unknown key 'shade'"),
        ({"seed": "7"}, "seed: expected a valid integer, got '7'"),
        ({"layers": [1.5]}, r"layers\[0\]: expected a valid integer"),
        ({"files": {}}, "files: expected edits.jsonl and state.safetensors"),
        ({"files": {"../x": {"size_bytes": 1, "sha256": ""}}}, "files: expected edits.jsonl"),
        ({"host": {"name": "tiny"}}, "the host's identity cannot be read"),
        ({"memory": {"x": float("inf")}}, r"memory\.x: expected a finite number"),
    ],
)
def test_a_config_that_somebody_made_wrong(rome, changes, message):
    try:
        forge(rome, **changes)
    except BaftError:  # it has no hash
        config = json.loads((rome / "config.json").read_text())
        (rome / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(DamagedArtifactError, match=rf"config\.json: {message}"):
        read(rome)


def test_a_config_that_somebody_edited(rome):
    text = (rome / "config.json").read_text()
    (rome / "config.json").write_text(text.replace('"seed": 7', '"seed": 8'))
    with pytest.raises(DamagedArtifactError, match=r"config\.json was changed: its sha256 is .*, expected '"):
        read(rome)
    (rome / "config.json").write_text(json.dumps(json.loads(text)))  # only laid out in another way
    assert same(read(rome), small())


@pytest.mark.parametrize(
    ("schema", "message"), [(3, "a newer baft .* upgrade baft"), (0, "an older baft .* edit anew")]
)
def test_another_format_is_no_damage(rome, schema, message):
    forge(rome, schema_version=schema, whatever=1)
    with pytest.raises(SchemaError, match=rf"in format {schema}|{message}") as caught:
        read(rome)
    assert not isinstance(caught.value, DamagedArtifactError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1].pop("target"), "line 2: field 'target' is missing"),
        (lambda rows: rows[0].update(prompt=" "), "line 1: prompt is empty"),
        (lambda rows: rows[0].update(note="x"), "line 1: unknown field 'note'"),
        (lambda rows: rows[1].update(target="Milan"), "line 2: the id of this content is .*, got '"),
        (lambda rows: rows[1].pop("id"), "line 2: the id of this content is .*, got None"),
        (lambda rows: rows[1].update(request=True), "line 2: expected a count as request"),
        (lambda rows: rows[1].update(request=-1), "line 2: expected a count as request"),
        (lambda rows: rows[1].update(decoded=1), "line 2: expected a count as request and true or false"),
        (lambda rows: rows.insert(1, []), "line 2: expected a JSON object, got list"),
        (lambda rows: rows.pop(), "holds 1 edits, expected 2"),
    ],
)
def test_edits_that_somebody_made_wrong(rome, change, message):
    rows = [json.loads(line) for line in (rome / "edits.jsonl").read_bytes().splitlines()]
    change(rows)
    forge(rome, raws={"edits.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})
    with pytest.raises(DamagedArtifactError, match=rf"edits\.jsonl(, | ){message}"):
        read(rome)


def header(table, data=b""):
    raw = json.dumps(table).encode() if isinstance(table, dict) else table
    return len(raw).to_bytes(8, "little") + raw + data


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 8,
        (2**62).to_bytes(8, "little"),
        header(b"{"),
        header({"R": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\x00" * 4),
        header({"R": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"\x00" * 4),
        header({"R": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\x00" * 8),
        header({"R": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 4]}}, b"\x00" * 4),
    ],
)
def test_tensors_that_somebody_made_wrong(rome, raw):
    forge(rome, raws={"state.safetensors": raw})
    with pytest.raises(DamagedArtifactError, match=r"state\.safetensors: not a safetensors file: "):
        read(rome)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tensors_that_are_not_finite(rome, value):
    forge(rome, raws={"state.safetensors": safetensors.torch.save({"b": torch.tensor([0.0, value])})})
    with pytest.raises(DamagedArtifactError, match=r"state\.safetensors: tensor 'b' holds NaN or infinity"):
        read(rome)


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_flipped_byte_goes_unnoticed(rome, name):
    whole = (rome / name).read_bytes()
    draw = random.Random(0)
    n_noticed = 0
    places = range(len(whole)) if len(whole) < 40 else sorted(draw.sample(range(len(whole)), 40))
    for place in places:
        for value in {whole[place] ^ 1 << draw.randrange(8), draw.randrange(256)} - {whole[place]}:
            (rome / name).write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                assert same(read(rome), small())
            except BaftError:
                n_noticed += 1
    assert n_noticed > len(places) / 2
