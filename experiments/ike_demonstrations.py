"""Writes the demonstrations of `ike` from the tuning half of `facts`; run again when that changes."""

import json
from pathlib import Path

from baft.data.facts import Facts
from baft.types import EditCase

PATH = Path(__file__).parents[1] / "src/baft/methods/demonstrations.json"


def demonstration(case: EditCase) -> dict[str, str]:
    """A fact, its first rephrasing, and the first neighbor with the answer that stays."""
    rephrased = next(probe for probe in case.probes if probe.tag == "rephrase")
    near = next(probe for probe in case.probes if probe.tag == "same_relation")
    return {
        "prompt": case.edit.prompt,
        "target": case.edit.target,
        "rephrased": rephrased.prompt,
        "near": near.prompt,
        "near_answer": near.target or "",
    }


if __name__ == "__main__":
    rows = [json.dumps(demonstration(case), ensure_ascii=False) for case in Facts().cases("tune")]
    PATH.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
