"""Which of the original facts of the benchmark `facts` a host knows, recorded beside the facts.

    python experiments/facts_known.py smollm2

Asks every edit's prompt of both splits greedily, 8 new tokens each. A fact is known if the original answer,
or another name of it, stands in the reply as whole words, whatever the case, accents and punctuation. The
host's entry in src/baft/data/facts_known.json is written anew, the others are left as they are.
"""

import argparse
import json
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

import baft
from baft.data.facts import Facts

RECORD = Path(__file__).parent.parent / "src" / "baft" / "data" / "facts_known.json"
BATCH, NEW_TOKENS = 16, 8


def words(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return f" {' '.join(re.findall(r'[a-z0-9]+', plain))} "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("host", help="a host's name, such as smollm2")
    parser.add_argument("--replies", action="store_true", help="print the replies to unknown facts")
    given = parser.parse_args()

    facts, model = Facts(), baft.load(given.host)
    cases = [case for split in facts.splits for case in facts.cases(split)]
    replies: list[str] = []
    for start in range(0, len(cases), BATCH):
        prompts = [case.edit.prompt for case in cases[start : start + BATCH]]
        replies += model.generate(prompts, max_new_tokens=NEW_TOKENS)

    known, relations = {}, defaultdict(list)
    for case, reply in zip(cases, replies, strict=True):
        answers = facts.answers(case.edit.ground_truth or "")
        known[case.id] = any(words(answer) in words(reply) for answer in answers)
        relations[case.id.split("/")[0]].append(known[case.id])
        if given.replies and not known[case.id]:
            print(f"{case.edit.prompt} [{case.edit.ground_truth}] {reply!r}")
    for name, found in sorted(relations.items()):
        print(f"{name:18} {sum(found):3} of {len(found)}")
    print(f"{given.host} knows {sum(known.values())} of {len(known)}")

    record = json.loads(RECORD.read_text(encoding="utf-8"))
    record[given.host] = {"asked": facts.asked(), "known": dict(sorted(known.items()))}
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
