"""General ability before and after the edits, by the tasks of lm-eval: a bridge to another package.

lm-eval asks the live edited model (`model.hf`) as it would ask any other. It does not say where a prompt ends
when it scores given answers, so edits then act on every token but BOS: the worst case.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baft.errors import ConfigError, DataError

Task = str | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task.

    Args:
        task: The task, by lm-eval's name.
        metric: The metric, by lm-eval's name, with its filter where that is not `none`.
        before: The untouched host's score.
        before_stderr: Its standard error; None where lm-eval gives none.
        after: The edited model's score.
        after_stderr: Its standard error.
        n: How many questions.
    """

    task: str
    metric: str
    before: float
    before_stderr: float | None
    after: float
    after_stderr: float | None
    n: int | None


def general_ability(
    host: PreTrainedModel,
    live: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    folder: Path | None = None,
) -> list[TaskScore]:
    """The scores of the host and of the edited model on the same questions.

    Args:
        host: The untouched host (`model.host`).
        live: The edited model (`model.hf`).
        tokenizer: Their tokenizer.
        tasks: Names of tasks or groups, or tasks as lm-eval's YAML files define them, in plain data. Most
            named ones fetch their questions from the hub.
        limit: No more questions than this of each task.
        batch_size: Questions asked at once.
        folder: Where further definitions of tasks lie.

    Raises:
        ConfigError: If lm-eval is not installed, no task is given, a task is not known, or a number is not
            positive.
        DataError: If the questions of a task cannot be had.
    """
    if not tasks:
        raise ConfigError("no task given: name at least one, such as hellaswag")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    lm_eval, huggingface = require_lm_eval()
    manager = lm_eval.tasks.TaskManager(include_path=None if folder is None else str(folder))
    unknown = [one for one in tasks if isinstance(one, str) and not manager.match_tasks([one])]
    if unknown:
        raise ConfigError(f"lm-eval knows no task {unknown[0]!r}: `lm-eval ls tasks` lists them")
    found = []
    for model in (host, live):
        asked = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            found.append(
                lm_eval.simple_evaluate(
                    asked, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
                )
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"lm-eval could not run {_named(tasks)}: {error}. Where questions are fetched from the hub, "
                "it must be within reach, or they must be in its cache"
            ) from error
    return list(_scores(*found))


def require_lm_eval() -> tuple[ModuleType, ModuleType]:
    """lm-eval, and its module for live models, which take seconds to import.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.tasks
        from lm_eval.models import huggingface
    except ImportError as error:
        raise ConfigError(
            f"general ability is measured with lm-eval, which cannot be imported ({error}): "
            "pip install 'baft[general]'"
        ) from None
    return lm_eval, huggingface


def _scores(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[TaskScore]:
    """Two results of lm-eval side by side; what is no number, such as a task's alias, is left out."""
    found = []
    for task, scores in before["results"].items():
        n = before.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in scores.items():
            name, _, how = key.partition(",")
            if not how or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            beside = f"{name}_stderr,{how}"
            other = after["results"][task]
            metric = name if how == "none" else f"{name} ({how})"
            errors = [_number(one.get(beside)) for one in (scores, other)]
            found.append(TaskScore(task, metric, float(value), errors[0], float(other[key]), errors[1], n))
    return found


def _number(value: object) -> float | None:
    """A number; lm-eval writes `N/A` where it has none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _named(tasks: Sequence[Task]) -> str:
    return ", ".join(one if isinstance(one, str) else str(one.get("task")) for one in tasks)
