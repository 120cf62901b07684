"""pyreft in an environment of its own, and one of its training steps at a time.

pyreft 0.1.0 pins an old transformers. Installed without its dependencies, into an environment that sees
this project's packages, it runs on the present one. It is a contender here and nothing more.
"""

import json
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import baft
from baft.hosts.embedded import cache_folder
from contenders import IGNORED, N_TIMED, rows_of
from workload import Workload

REQUIREMENTS = ("pyreft==0.1.0", "pyvene==0.1.8")
WORKER = Path(__file__).with_name("pyreft_worker.py")


def environment_folder() -> Path:
    """Where the environment is made."""
    return cache_folder() / "benchmarks" / "pyreft-0.1.0"


def ensure_environment() -> Path:
    """Makes the environment, unless it is there.

    Returns:
        Its interpreter.

    Raises:
        SystemExit: If pip cannot install pyreft.
    """
    folder = environment_folder()
    python, done = folder / "bin" / "python", folder / "complete"
    if done.is_file():
        _show_this_project(folder)
        return python
    venv.EnvBuilder(clear=True).create(folder)
    _show_this_project(folder)
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    made = subprocess.run([*command, *REQUIREMENTS], capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(
            f"pip could not install {' '.join(REQUIREMENTS)}: use --without pyreft\n{made.stderr}"
        )
    done.touch()
    return python


def _show_this_project(folder: Path) -> None:
    """Lets the environment see the packages of the checkout at work, be it the one that made it or not."""
    [own] = folder.glob("lib/python*/site-packages")
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    (own / "project.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")


def remove_environment() -> None:
    """Removes the environment."""
    shutil.rmtree(environment_folder(), ignore_errors=True)


class PyreftSteps:
    """LoReFT of the same rank at the same layers and tokens, on the same texts, trained by pyreft.

    It runs in another process that has the same host, and works only when told to.

    Args:
        work: What is edited.
        threads: Threads of one operation.
    """

    def __init__(self, work: Workload, threads: int):
        self.work = work
        self.losses: list[float] = []  # of the last steps taken: that it trains can be seen
        python = ensure_environment()
        source = str(Path(baft.__file__).parent.parent)
        self._process = subprocess.Popen(
            [str(python), "-c", _START.format(source=source, worker=str(WORKER))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        layers = [site.layer for site in work.sites]
        self._order(do="load", model=work.host.name, layers=layers, rank=work.config.rank, threads=threads)

    def __call__(self, number: int) -> float:
        """Seconds of one training step."""
        texts, config = self.work.texts(number), self.work.config
        ids, mask, labels = rows_of(texts, self.work.encoder.pad_id)
        places = []
        for text in texts:
            n_prompt, n_all = len(text.prompt_ids), len(text.prompt_ids) + len(text.target_ids)
            # The last target token is only ever predicted: it is no place to edit, here or in our passes.
            places.append(list(range(max(0, n_prompt - config.last_prompt), n_all - 1)))
        n_places = max(len(row) for row in places)
        # pyvene wants as many places in every row; a place named twice is written twice, with the same state.
        places = [row + row[-1:] * (n_places - len(row)) for row in places]
        assert int((labels != IGNORED).sum()) == sum(len(text.target_ids) for text in texts)
        answer = self._order(
            do="steps",
            ids=ids.tolist(),
            mask=mask.tolist(),
            labels=labels.tolist(),
            positions=places,
            n_steps=N_TIMED + 1,
        )
        self.losses = answer["losses"]
        return float(sum(answer["seconds"][1:]) / N_TIMED)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _order(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(
                "the process that runs pyreft ended: remove its environment with --remove-pyreft"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"pyreft failed: {answer['error']}")
        return answer


# The project's own code comes before the copy that the environment may know.
_START = "import sys, runpy; sys.path.insert(0, {source!r}); runpy.run_path({worker!r}, run_name='__main__')"
