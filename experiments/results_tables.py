"""The tables of docs/results.md, out of records that `baft bench` wrote.

    python experiments/results_tables.py RUN...

Prints, for each benchmark and protocol of the runs, the tables of teacher-forced and generated scores, that
by tag, and what making the edits cost.
"""

import re
import sys
import tempfile
from pathlib import Path

from baft.evals.report import write_report

WANTED = ("**Teacher-forced**", "**Generated**", "### By tag", "### Making the edits")


def tables(text: str) -> str:
    """The wanted tables, under the headings of their benchmarks."""
    found, keep, table_over = [], False, False
    for line in text.splitlines():
        if line.startswith("## "):
            keep = " · " in line
            if keep:
                found.append(f"\n### {line[3:]}\n")
            table_over = True
        elif line in WANTED:
            table_over = False
            found.append(f"\n**{line.strip('#* ')}**\n")
        elif keep and not table_over and line.startswith("|"):
            found.append(line)
        elif line and not line.startswith("|"):
            table_over = True
    return re.sub(r"\n{3,}", "\n\n", "\n".join(found)).strip()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_report([Path(run) for run in sys.argv[1:]], Path(folder))
        print(tables((Path(folder) / "report.md").read_text(encoding="utf-8")))
