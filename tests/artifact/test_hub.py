"""The real client of the hub against a server on this machine."""

import base64
import errno
import hashlib
import http.server
import json
import os
import threading
from dataclasses import replace

import pytest
from huggingface_hub import close_session, constants

from baft.artifact import CONFIG, StoredEdit, fetch_from_hub, is_artifact, pieces, push_to_hub, read
from baft.errors import ArtifactError, DamagedArtifactError
from baft.types import Edit
from edit_sets import FILES, HOST, independent, names, same, small, written


class Hub(http.server.BaseHTTPRequestHandler):
    """The few endpoints of the hub that the client uses; `server.repos` holds the files of each commit."""

    def answer(self, status, plain=None, raw=b"", **headers):
        raw = raw if plain is None else json.dumps(plain).encode()
        self.send_response_only(status)  # without a line in the log
        for key, value in {"Content-Length": len(raw), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def post(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repos, path = self.server.repos, self.path.split("?")[0]
        if path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self.answer(200, {"warnings": [], "errors": []})
        elif self.headers["Authorization"] != "Bearer good":
            self.answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = name in repos
            repos.setdefault(name, [{".gitattributes": b""}])
            self.server.private[name] = asked.get("visibility", asked.get("private"))
            self.answer(409 if known else 200, {"url": f"{self.server.url}/{name}"})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        else:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            operations = [json.loads(line) for line in body.splitlines()]
            files = dict(repos[name][-1])
            for one in operations:
                if one["key"] == "file":
                    files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
                elif one["key"] == "deletedFile":
                    del files[one["value"]["path"]]
            repos[name].append(files)
            commit = f"{len(repos[name]):040x}"
            self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})

    def get(self):
        repos = self.server.repos
        name = next((name for name in repos if f"/{name}/" in self.path), None)
        if name is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        commits = {"main": len(repos[name])} | {f"{n:040x}": n for n in range(1, len(repos[name]) + 1)}
        asked, _, rest = self.path.split("?")[0].split(f"/{name}/")[1].partition("/")
        revision, _, file = rest.partition("/")
        if revision not in commits:
            return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        commit = f"{commits[revision]:040x}"
        files = repos[name][commits[revision] - 1]
        oids = {path: hashlib.sha1(raw).hexdigest() for path, raw in files.items()}
        if asked == "revision":
            return self.answer(
                200, {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
            )
        if asked == "tree":
            rows = [{"type": "file", "path": p, "size": len(raw), "oid": oids[p]} for p, raw in files.items()]
            return self.answer(200, rows)
        return self.answer(200, raw=files[file], ETag=f'"{oids[file]}"', X_Repo_Commit=commit)


for verb, method in {"do_POST": Hub.post, "do_GET": Hub.get, "do_HEAD": Hub.get}.items():
    setattr(Hub, verb, method)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.repos, server.private, server.cards = {}, {}, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(
            constants.ENDPOINT, server.url
        ),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "no token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    close_session()
    yield server
    close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def test_pushed_and_fetched(rome, hub, capfd):
    address = push_to_hub(read(rome), "me/rome", token="good", private=True)
    assert address == f"{hub.url}/me/rome/commit/{2:040x}"
    assert hub.private["me/rome"] in (True, "private")  # as older and newer clients put it
    assert hub.repos["me/rome"][-1].keys() == FILES | {"README.md", ".gitattributes"}
    push_to_hub(small(seed=8), "me/rome", token="good")  # the repository is there already
    latest = fetch_from_hub("me/rome")
    assert is_artifact(latest)
    assert names(latest) == FILES  # the card is not asked for
    assert same(read(latest), small(seed=8))
    assert same(read(fetch_from_hub("me/rome", revision=f"{2:040x}", token="good")), small())
    constants.HF_HUB_OFFLINE = True  # what was fetched stays; the fixture puts it back
    assert same(read(fetch_from_hub("me/rome")), small(seed=8))
    assert capfd.readouterr() == ("", "")


def test_every_piece_is_pushed_and_fetched(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 64)
    path = written(tmp_path / "many.baft", independent(*((f"{i} is", "x") for i in range(4))))
    assert len(names(path)) > 4
    push_to_hub(read(path), "me/many", token="good")
    found = fetch_from_hub("me/many")
    assert names(found) == names(path)
    assert same(read(found), read(path))
    others = {
        "state_dict.safetensors",
        "state-1-of-3.safetensors",
        "state-1/x.safetensors",
        "x/state.safetensors",
    }
    hub.repos["me/many"][-1] |= dict.fromkeys(others, b"another's")
    push_to_hub(small(), "me/many", token="good")  # of fewer pieces
    assert hub.repos["me/many"][-1].keys() == FILES | others | {"README.md", ".gitattributes"}
    found = fetch_from_hub("me/many")
    assert names(found) == FILES
    assert same(read(found), small())


def test_a_piece_that_did_not_come_is_missed(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 64)
    path = written(tmp_path / "many.baft", independent(*((f"{i} is", "x") for i in range(4))))
    push_to_hub(read(path), "me/many", token="good")
    found = fetch_from_hub("me/many")
    (found / "state-2.safetensors").unlink()  # as if the line had gone dead
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ArtifactError, match="me/many could not be fetched: .*; unset HF_HUB_OFFLINE"):
            fetch_from_hub("me/many")
    assert same(read(fetch_from_hub("me/many")), read(path))
    del hub.repos["me/many"][-1]["state-2.safetensors"]
    hub.repos["me/many"].append(hub.repos["me/many"][-1])
    with pytest.raises(ArtifactError, match=r"be fetched: state-2\.safetensors is missing: fetch it again"):
        fetch_from_hub("me/many")
    hub.repos["me/many"].append(hub.repos["me/many"][-1] | {CONFIG: b"{"})
    with pytest.raises(DamagedArtifactError, match=r"me/many could not be fetched: .*not valid JSON"):
        fetch_from_hub("me/many")


def test_the_card_tells_what_is_in_it(rome, hub):
    push_to_hub(read(rome), "me/rome", token="good")
    (card,) = hub.cards
    assert card == hub.repos["me/rome"][-1]["README.md"].decode()
    assert card.startswith(
        "---\nlibrary_name: baft\ntags: [baft, knowledge-editing]\nbase_model: owner/tiny\n---\n"
    )
    assert "| The Eiffel Tower is in | Rome | yes |\n| 東京 \\| is in the | İtaly 🙂 | no |\n" in card
    assert 'baft.load_from_hub("me/rome")\n' in card
    assert "can read every prompt and target" in card


@pytest.mark.parametrize("source", ["{folder}/own llama", "~/own llama", "./own llama"])
def test_where_the_host_lies_on_this_machine_stays_on_it(tmp_path, hub, source):
    source = source.format(folder=tmp_path)
    made = small(host=replace(HOST, name=source), host_source=source)
    path = written(tmp_path / "x.baft", made)
    before = (path / "config.json").read_bytes()
    push_to_hub(read(path), "me/x", token="good")
    found = read(fetch_from_hub("me/x"))  # whose checksums are right
    assert same(found, replace(made, host=replace(HOST, name="own llama"), host_source=""))
    pushed = hub.repos["me/x"][-1]
    assert not [name for name, raw in pushed.items() if source.encode() in raw]
    assert b"# 2 knowledge edits for own llama\n" in pushed["README.md"]
    assert b'baft.load_from_hub("me/x", host=...)\n' in pushed["README.md"]
    assert (path / "config.json").read_bytes() == before
    push_to_hub(small(host=made.host, host_source=""), "me/x", token="good")
    assert (
        read(fetch_from_hub("me/x")).host.name == "own llama"
    )  # a live host is called what it was loaded from


def test_what_tells_no_path_is_pushed_as_it_is(rome, hub):
    push_to_hub(read(rome), "me/rome", token="good")
    pushed = hub.repos["me/rome"][-1]
    for name in FILES - {CONFIG}:
        assert pushed[name] == (rome / name).read_bytes()
    there, here = json.loads(pushed[CONFIG]), json.loads((rome / CONFIG).read_bytes())
    for one in (there, here):  # it is written anew
        del one["created"], one["sha256"]
    assert there == here


def test_a_long_card_is_cut(tmp_path, hub):
    edits = tuple(StoredEdit(Edit(f"{n} <b>" + "x" * 300, "{y}`"), n, True) for n in range(250))
    push_to_hub(small(edits=edits, host_source=str(tmp_path)), "me/x", token="good")
    (card,) = hub.cards
    assert "base_model" not in card
    assert str(tmp_path) not in card
    assert "| 0 &lt;b&gt;" in card
    assert "| {y}\\` | yes |" in card
    assert "199 &lt;b&gt;" in card
    assert "200 &lt;b&gt;" not in card
    assert "and 50 more" in card
    assert max(len(line) for line in card.splitlines()) < 250


def test_the_hub_refuses(rome, hub, monkeypatch):
    hub.repos["me/host"] = [{"config.json": b"{}", "model.safetensors": b""}]
    with pytest.raises(
        ArtifactError, match="could not be pushed to me/rome: .*give a token that may do this"
    ):
        push_to_hub(read(rome), "me/rome", token="bad")
    with pytest.raises(ArtifactError, match="could not be pushed to a/b/c: .*like owner/name"):
        push_to_hub(read(rome), "a/b/c", token="good")
    with pytest.raises(ArtifactError, match="me/absent could not be fetched: .*check the name, log in"):
        fetch_from_hub("me/absent")
    with pytest.raises(ArtifactError, match="me/host could not be fetched: .*the revision$"):
        fetch_from_hub("me/host", revision="absent")
    with pytest.raises(
        ArtifactError, match=r"me/host could not be fetched: it is no edit set, as edits\.jsonl is"
    ):
        fetch_from_hub("me/host")
    (rome / "edits.jsonl").unlink()
    with pytest.raises(DamagedArtifactError, match=r"edits\.jsonl is missing"):
        push_to_hub(read(rome), "me/rome", token="good")
    assert "me/rome" not in hub.repos


def test_no_room_to_make_the_files(hub, monkeypatch):
    def refuse(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(
        ArtifactError, match=r"could not be pushed to me/rome: .*: No space left.*; make room"
    ):
        push_to_hub(small(), "me/rome", token="good")
    assert "me/rome" not in hub.repos


def test_the_hub_is_out_of_reach(rome, hub, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ArtifactError, match="could not be pushed to me/rome: .*; unset HF_HUB_OFFLINE$"):
            push_to_hub(read(rome), "me/rome", token="good")
        with pytest.raises(ArtifactError, match="me/rome could not be fetched: .*; unset HF_HUB_OFFLINE$"):
            fetch_from_hub("me/rome")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ArtifactError, match="could not be pushed to me/rome: .*; check the network$"):
        push_to_hub(read(rome), "me/rome", token="good")
