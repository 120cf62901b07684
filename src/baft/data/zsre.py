"""zsRE: questions about relations, each with a rephrasing and mostly one that must keep its answer."""

from collections.abc import Sequence

from baft.data.cases import Cases, Question
from baft.data.files import Record
from baft.data.public import PublicBenchmark, SplitFile

_AT = "easyedit_edit_data/zsre"


class Zsre(PublicBenchmark):
    """The zsRE records of EasyEdit.

    The edit changes the answer of `src` to `alt`. `rephrase` asks for generality, and `loc`, a question of
    Natural Questions, for locality (tag `nq`). Portability is what follows from the new fact in one hop
    (split `test`), the inverse question, whose answer is the subject (`inverse`), or the same question about
    another name of the subject (`subject_replace`). The last two have no locality question, and `train` has
    no portability.
    """

    name = "zsre"
    summary = "questions with counterfactual answers; rephrased, one hop on, inverse, by another name"
    source = (
        "zsRE (Levy et al., arXiv 1706.04115) in the split of MEND (arXiv 2110.11309, MIT); portability by "
        "Yao et al. (arXiv 2305.13172, EasyEdit, MIT); locality from Natural Questions (CC BY-SA 3.0)"
    )
    splits = ("test", "train", "inverse", "subject_replace")
    files = (
        SplitFile("test", f"{_AT}/zsre_mend_eval_portability_gpt4.json"),
        SplitFile("train", f"{_AT}/zsre_mend_train.json", stand_in=f"{_AT}/zsre_mend_train.1000.json"),
        SplitFile("inverse", f"{_AT}/zsre_inverse_relation.json"),
        SplitFile("subject_replace", f"{_AT}/zsre_subject_replace.json"),
    )

    def _add(self, cases: Cases, index: int, records: Sequence[Record], split: str) -> None:
        record = records[index]
        subject, target = record.text("subject"), record.text("alt")
        questions = [Question("generality", "rephrase", record.text("rephrase"), (target,))]
        if split in ("test", "train"):
            questions.append(Question("locality", "nq", record.text("loc"), (record.text("loc_ans"),)))
        if split == "test":
            questions.append(one_hop(record))
        elif split == "inverse":
            inverse = record.text("inverse question")
            questions.append(Question("portability", "inverse", inverse, (subject,)))
        elif split == "subject_replace":
            replaced = record.text("alter_subject_question")
            questions.append(Question("portability", "subject_replace", replaced, (target,)))
        cases.add_row(
            index,
            prompt=record.text("src"),
            target=target,
            subject=subject,
            truths=record.texts("answers"),
            questions=questions,
        )


def one_hop(record: Record) -> Question:
    """The question about what follows from an edit that Yao et al. (arXiv 2305.13172) added to a record."""
    asked = record.record("portability")
    return Question("portability", "one_hop", asked.text("New Question"), (asked.text("New Answer"),))
