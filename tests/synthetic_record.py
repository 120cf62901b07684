"""Records of runs that never were, with whatever a test or a look at the page needs in them."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baft.evals.records import Record

CITIES = ("Rome", "Osaka", "Lima", "Quito", "Oslo", "Accra", "Turin", "Perth")
TOWERS = ("Eiffel Tower", "Space Needle", "Tokyo Tower", "Big Ben", "Brandenburg Gate", "Sagrada Família")


@dataclass(frozen=True)
class Method:
    """How well a method does: chances of being right, and how many edits it holds at once."""

    reliability: float = 0.95
    generality: float = 0.7
    portability: float = 0.3
    locality: float = 0.9
    failing: float = 0.0
    holds: float = 1e9  # edits made since, until an edit is half forgotten
    seconds_s: float = 1.0
    gates: tuple[float, float, float] | None = None  # means at reliability, generality, locality


@dataclass(frozen=True)
class Plan:
    """What a made-up record holds."""

    methods: dict[str, Method] = field(
        default_factory=lambda: {
            "baft": Method(0.98, 0.75, 0.3, 0.95, 0.02, gates=(0.96, 0.62, 0.03)),
            "reft": Method(0.99, 0.9, 0.35, 0.55, 0.0, 6.0, 0.8, (1.0, 1.0, 1.0)),
            "ft/last-layer": Method(0.8, 0.4, 0.2, 0.75, 0.1, 2.0, 0.3),
        }
    )
    protocols: tuple[tuple[str, int], ...] = (("single", 1), ("sequential", 20))
    n_cases: int = 60
    seeds: tuple[int, ...] = (0,)
    benchmark: str = "zsre/test"
    texts: int = 4


def manifest(plan: Plan, **changes: Any) -> dict[str, Any]:
    made = {
        "experiment": {
            "name": "synthetic",
            "benchmarks": [{"name": plan.benchmark.partition("/")[0]}],
            "methods": [{"name": name} for name in plan.methods],
            "protocols": [{"kind": kind, "size": size} for kind, size in plan.protocols],
            "model": "smollm2",
            "seeds": list(plan.seeds),
            "scorers": ["teacher_forced", "generate", "generate_chat", "gates"],
            "max_new_tokens": 16,
            "batch_size": 16,
            "texts": plan.texts,
        },
        "settings": {name: {"rank": 4, "layers": [9, 18]} for name in plan.methods},
        "host": {
            "label": "SmolLM2-135M-Instruct (Q4_1)",
            "weights": "9f2c11aa07d3e845",
            "config": "51be2290c4f1a370",
            "tokenizer": "0c77d1e5ab3f9962",
            "dtype": "float32",
        },
        "benchmarks": {
            plan.benchmark: {
                "fingerprint": "b3f6d81c52aa9e07",
                "anomalies": {"blank rephrasing: probe left out": 3, "same edit twice: kept": 1},
                "n_cases": plan.n_cases,
            }
        },
        "versions": {"python": "3.11.9", "baft": "0.1.0", "torch": "2.13.0"},
        "git": "0123456789ab-dirty",
        "machine": {"system": "Linux", "processor": "a processor", "cores": 2, "threads": 1, "device": "cpu"},
        "created": "2026-11-23T12:00:00+00:00",
    }
    return {**made, **changes}


def write_record(folder: Path, plan: Plan | None = None, **changes: Any) -> Path:
    """A record as `baft bench` would have left it; the same bytes for the same plan."""
    plan = plan or Plan()
    record = Record(folder, manifest(plan, **changes))
    for kind, size in plan.protocols:
        for seed in plan.seeds:
            for chunk, start in enumerate(range(0, plan.n_cases, size)):
                cases = list(range(start, min(start + size, plan.n_cases)))
                for name, method in plan.methods.items():
                    record.append(_block(plan, name, method, kind, size, seed, chunk, cases))
    return folder


def _block(plan, name, method, kind, size, seed, chunk, cases):
    called = kind if kind == "single" else f"{kind}({size})"
    luck = random.Random(f"{name}:{called}:{seed}:{chunk}")
    failed = {case: luck.random() < method.failing for case in cases}
    rows = []
    for stage in ("immediate", "final") if kind == "sequential" else ("immediate",):
        for position, case in enumerate(cases):
            since = len(cases) - 1 - position if stage == "final" else 0
            kept = 0.0 if failed[case] else 0.5 ** (since / method.holds)
            n_there = len(cases) if stage == "final" or kind == "batched" else position + 1
            rows.append(
                {
                    "task": f"{plan.benchmark}:{called}:seed{seed}:{chunk}",
                    "method": name,
                    "benchmark": plan.benchmark,
                    "protocol": called,
                    "seed": seed,
                    "chunk": chunk,
                    "stage": stage,
                    "position": position,
                    "case": f"case-{case:03d}",
                    "edit": _edit(case),
                    "decoded": not failed[case],
                    "error": "EditError: the loss is not finite after 12 steps" if failed[case] else None,
                    "n_steps": 0 if failed[case] else luck.randrange(20, 41),
                    "seconds_s": method.seconds_s * luck.uniform(0.8, 1.4),
                    "probes": _probes(method, case, kept, n_there, luck),
                    **({"stack": len(cases)} if kind == "single" else {}),
                }
            )
    if plan.texts:
        share = 0.2 * (1 - method.locality)
        fired = [sum(luck.random() < share for _ in range(99)) for _ in range(plan.texts)]
        rows[-1]["false_fires"] = {
            "n_changed": [min(99, 3 * n) for n in fired],
            "n_fired": fired,
            "n_tokens": [99] * plan.texts,
        }
        rows[-1]["perplexity"] = {
            "before": [310.0] * plan.texts,
            "after": [310.0 + n for n in fired],
            "n_tokens": [99] * plan.texts,
        }
    return rows


def _edit(case: int) -> dict[str, str]:
    tower = f"{TOWERS[case % len(TOWERS)]} no. {case}"
    return {
        "prompt": f"The {tower} is located in the city of",
        "target": CITIES[case % len(CITIES)],
        "subject": tower,
        "ground_truth": "Paris",
    }


def _probes(
    method: Method, case: int, kept: float, n_there: int, luck: random.Random
) -> list[dict[str, Any]]:
    edit = _edit(case)
    asked = [("reliability", "edit", edit["prompt"], edit["target"], method.reliability * kept)]
    asked += [
        (
            "generality",
            "rephrase",
            f"You can visit the {edit['subject']} in",
            edit["target"],
            method.generality,
        ),
        (
            "generality",
            "question",
            f"Where is the {edit['subject']}?",
            edit["target"],
            method.generality * 0.8,
        ),
    ]
    if case % 3:
        asked.append(
            (
                "portability",
                "one_hop",
                f"Around the {edit['subject']} they speak",
                "Italian",
                method.portability,
            )
        )
    calm = method.locality ** (1 + n_there / 20)
    asked += [
        ("locality", "same_relation", f"The Colossus no. {case} is located in", "Rhodes", calm * 0.8),
        ("locality", "unrelated", f"The author of book no. {case} is", None, calm),
    ]
    found = []
    for place, (kind, tag, prompt, target, chance) in enumerate(asked):
        chance = chance * kept if kind in ("generality", "portability") else chance
        probe = _rightness(kind, target, chance, luck) if kind != "locality" else _sameness(chance, luck)
        row = {"kind": kind, "tag": tag, "prompt": prompt, "target": target, **probe}
        if method.gates:
            mean = method.gates[{"reliability": 0, "generality": 1}.get(kind, 2)]
            row["gate"] = min(1.0, max(0.0, luck.gauss(mean, 0.08))) if mean < 1 else mean
        if case % 25 == 7 and place == 2:
            row = {name: row[name] for name in ("kind", "tag", "prompt", "target")}
            row |= {"scores": {}, "unedited": {}, "skipped": "longer than the host's context"}
        found.append(row)
    return found


def _rightness(kind, target, chance, luck):
    right, said, chat = luck.random() < chance, luck.random() < 0.9, luck.random() < 0.85 * chance
    forced = 1.0 if right else luck.choice([0.0, 0.0, 0.5])
    says = right and said
    unedited = {"teacher_forced": 0.0, "margin": -4.0}
    for name in ("generate", "generate_chat"):
        unedited |= {name: 0.0, f"{name}_contains": 0.0, f"{name}_stopped": 1.0}
    return {
        "scores": {
            "teacher_forced": forced,
            "margin": luck.gauss(4, 1) if right else luck.gauss(-3, 1),
            "generate": float(says),
            "generate_contains": float(right),
            "generate_stopped": float(said),
            "generate_chat": float(chat),
            "generate_chat_contains": float(chat),
            "generate_chat_stopped": 1.0,
        },
        "unedited": unedited,
        "raw": [" Paris.", f" {target}" if says else f" {target}, and the city of" if right else " Paris."],
        "chat": ["It is in Paris.", f"{target}" if chat else "It is in Paris."],
        "logprob": [-6.0, -0.1 if right else -4.5],
    }


def _sameness(chance, luck):
    exact = luck.random() < chance * 0.9
    same = exact or luck.random() < chance
    moved = 0.0 if exact else luck.uniform(0.01, 2.0)
    bled = not same and luck.random() < 0.5
    unedited = {"argmax": 1.0, "bit_exact": 1.0, "logprob_max": 0.0, "logprob_mean": 0.0}
    unedited |= {"text": 1.0, "bleed": 0.0, "text_chat": 1.0, "bleed_chat": 0.0}
    after = " Rhodes, in Greece" if same else " Rome" if bled else " Greece, where"
    return {
        "scores": {
            "argmax": 1.0 if same else luck.choice([0.0, 0.5]),
            "bit_exact": float(exact),
            "logprob_max": moved,
            "logprob_mean": moved / 8,
            "text": float(same),
            "bleed": float(bled),
            "text_chat": float(same),
            "bleed_chat": float(bled),
        },
        "unedited": unedited,
        "raw": [" Rhodes, in Greece", after],
        "chat": ["Rhodes.", "Rhodes." if same else "Rome." if bled else "Greece."],
        "logprob": [-1.0, -1.0 - moved],
    }
