"""The bridge to lm-eval: against a stand-in, and against lm-eval itself where it is installed."""

import importlib.util
import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from baft.errors import ConfigError, DataError
from baft.evals.general import TaskScore, general_ability, require_lm_eval
from baft.hosts.architecture import Site
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.hosts.live_view import live_view
from tiny import open_part

LACKING = importlib.util.find_spec("lm_eval") is None
needs_lm_eval = pytest.mark.skipif(LACKING, reason="lm-eval is not installed: pip install 'baft[general]'")

QUESTIONS = ("The hat is", "The sky over the sea is", "The king of France is")


@pytest.fixture
def edited(host):
    return EditedModel(host.model, {Site(1): [open_part()]})


@pytest.fixture
def stand_in(monkeypatch):
    """Modules with the few names of lm-eval that are used; `asked` keeps what they were called with."""
    asked = []

    def simple_evaluate(model, **given):
        asked.append((model, given))
        if given["limit"] == 13:
            raise OSError("the hub is out of reach")
        score = 0.75 if hasattr(model.pretrained, "baft_edited_model") else 0.5
        scores = {"alias": "Toy", "acc,none": score, "acc_stderr,none": 0.1, "f1,strict": score}
        return {
            "results": {"toy": {**scores, "f1_stderr,strict": "N/A"}},
            "n-samples": {"toy": {"original": 9, "effective": 4}},
        }

    class TaskManager:
        def __init__(self, include_path):
            self.include_path = include_path

        def match_tasks(self, names):
            return [name for name in names if name == "toy"]

    parts = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models")}
    parts["lm_eval"].simple_evaluate = simple_evaluate
    parts["lm_eval"].tasks = parts["lm_eval.tasks"]
    parts["lm_eval.tasks"].TaskManager = TaskManager
    parts["lm_eval.models"].huggingface = ModuleType("lm_eval.models.huggingface")
    parts["lm_eval.models"].huggingface.HFLM = SimpleNamespace
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, name, part)
    return asked


@pytest.fixture
def measured(host, edited):
    def measure(*tasks, **more):
        return general_ability(host.model, live_view(edited), host.tokenizer, tasks, **more)

    return measure


def test_both_models_are_asked_the_same(stand_in, measured, host, tmp_path):
    found = measured("toy", limit=4, batch_size=2, folder=tmp_path)
    assert found == [
        TaskScore("toy", "acc", 0.5, 0.1, 0.75, 0.1, 4),
        TaskScore("toy", "f1 (strict)", 0.5, None, 0.75, None, 4),
    ]
    assert stand_in[0][0].pretrained is host.model
    assert all(model.tokenizer is host.tokenizer and model.batch_size == 2 for model, _ in stand_in)
    (_, first), (_, second) = stand_in
    assert first == second
    assert (first["tasks"], first["limit"], first["task_manager"].include_path) == (["toy"], 4, str(tmp_path))


def test_what_cannot_be_measured_is_told(stand_in, measured):
    with pytest.raises(ConfigError, match="no task given"):
        measured()
    with pytest.raises(ConfigError, match="lm-eval knows no task 'tay': `lm-eval ls tasks` lists them"):
        measured("toy", "tay")
    for name in ("limit", "batch_size"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
            measured("toy", **{name: 0})
    assert not stand_in  # nothing was asked in vain
    with pytest.raises(DataError, match="could not run toy: the hub is out of reach. Where questions"):
        measured("toy", limit=13)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"cannot be imported .*pip install 'baft\[general\]'"):
        require_lm_eval()


@needs_lm_eval
@pytest.mark.filterwarnings("default")  # its own
def test_the_live_model_is_what_is_scored(host, edited, tmp_path):
    """Its perplexity of given answers is that of the logits of the live model, and of the host's before."""
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": one}) + "\n" for one in QUESTIONS))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " red",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }
    live = live_view(edited)
    (score,) = general_ability(host.model, live, host.tokenizer, [task], batch_size=2)
    assert (score.task, score.metric, score.n) == ("tiny", "perplexity", 3)
    assert score.before == pytest.approx(perplexity(host, host.model))
    assert score.after == pytest.approx(perplexity(host, live))
    assert score.after != pytest.approx(score.before, rel=1e-3)  # control


@torch.no_grad()
def perplexity(host, model):
    encoder, nll = Encoder.for_host(host), []
    for question in QUESTIONS:
        begin, ids = len(encoder.prompt(question)), torch.tensor([encoder.prompt(f"{question} red")])
        logprobs = model(ids[:, :-1]).logits.float().log_softmax(-1)
        nll.append(-logprobs.gather(-1, ids[:, 1:, None])[0, begin - 1 :].sum().item())
    return math.exp(math.fsum(nll) / len(nll))
