"""CounterFact: statements completed against the facts, in the original form and in EasyEdit's flat one."""

from collections.abc import Sequence

from baft.data.cases import Cases, Question
from baft.data.files import Record
from baft.data.public import PublicBenchmark, SplitFile
from baft.data.zsre import one_hop

_AT = "easyedit_edit_data/counterfact"
_SOURCE = "CounterFact (Meng et al., arXiv 2202.05262, MIT)"


class CounterFact(PublicBenchmark):
    """CounterFact in its original form, with what Yao et al. added to some of its records.

    Generality is `paraphrase_prompts`. Locality has the tags `same_relation` (`neighborhood_prompts`: other
    subjects of which the edit's old answer is true) and `attribute` (`attribute_prompts`: subjects of which
    its new answer was true before). `generation_prompts` are left out: they are for fluency and consistency,
    and no answer to them is right or wrong.

    The split `portability` has a one-hop question a case, `subject_replace` the edit's prompt about another
    name of the subject. `distracting_neighbor` has the one-hop question, the neighborhood prompts once more
    with the edited fact put before them (locality, tag `distracting_neighbor`), and a question about another
    attribute of the subject (locality, tag `other_attribute`).
    """

    name = "counterfact"
    summary = "counterfactual statements with 24 probes: paraphrases, two kinds of neighbors, one hop on"
    source = (
        f"{_SOURCE}; portability and distracting neighbors by Yao et al. (arXiv 2305.13172, EasyEdit, MIT)"
    )
    splits = ("portability", "distracting_neighbor", "subject_replace")
    files = (
        SplitFile("portability", f"{_AT}/counterfact_portability_gpt4.json"),
        SplitFile(
            "distracting_neighbor",
            f"{_AT}/counterfact_distracting_neighbor.json",
            stand_in=f"{_AT}/counterfact_distracting_neighbor.first200.json",
        ),
        SplitFile("subject_replace", f"{_AT}/counterfact_subject_replace.json"),
    )

    def _add(self, cases: Cases, index: int, records: Sequence[Record], split: str) -> None:
        record = records[index]
        rewrite = record.record("requested_rewrite")
        template, subject = rewrite.text("prompt"), rewrite.text("subject")
        if template.count("{}") != 1:
            rewrite.refuse("prompt", f"expected the place of the subject, {{}}, once, got {template!r}")
        old, new = (rewrite.record(name).text("str") for name in ("target_true", "target_new"))
        questions = [
            Question("generality", "paraphrase", one, (new,)) for one in record.texts("paraphrase_prompts")
        ]
        for tag, field, answer in (
            ("same_relation", "neighborhood_prompts", old),
            ("attribute", "attribute_prompts", new),
        ):
            questions += [Question("locality", tag, one, (answer,)) for one in record.texts(field)]
        if split == "subject_replace":
            replaced = template.replace("{}", record.text("alternative_subject").strip())
            questions.append(Question("portability", "subject_replace", replaced, (new,)))
        else:
            questions.append(one_hop(record))
        if split == "distracting_neighbor":
            distracted = record.texts("distracting_neighborhood_prompts")
            questions += [Question("locality", "distracting_neighbor", one, (old,)) for one in distracted]
            other = record.record("unrelated_relation")
            question, answers = other.text("question"), (other.text("object"),)
            questions.append(Question("locality", "other_attribute", question, answers))
        cases.add_row(
            index,
            prompt=template.replace("{}", subject.strip()),
            target=new,
            subject=subject,
            truths=(old,),
            questions=questions,
        )


class CounterFactFlat(PublicBenchmark):
    """CounterFact in EasyEdit's form: of each record one paraphrase and one neighbor.

    Generality has the tag `rephrase`, locality the tag `neighborhood`. The split `edit` is the one that is
    scored; `val` and `train`, which share no record with it, are for methods that are trained.
    """

    name = "counterfact-flat"
    summary = "counterfactual statements with one paraphrase and one neighbor each; 10,000 of them"
    source = f"{_SOURCE}, as EasyEdit distributes it (arXiv 2305.13172, MIT)"
    splits = ("edit", "val", "train")
    files = (
        SplitFile("edit", f"{_AT}/counterfact-edit.json"),
        SplitFile("val", f"{_AT}/counterfact-val.json"),
        SplitFile(
            "train", f"{_AT}/counterfact-train.json", stand_in=f"{_AT}/counterfact-train.first5000.json"
        ),
    )

    def _add(self, cases: Cases, index: int, records: Sequence[Record], split: str) -> None:
        record = records[index]
        target = record.text("target_new")
        neighbor, answer = record.text("locality_prompt"), record.text("locality_ground_truth")
        cases.add_row(
            index,
            prompt=record.text("prompt"),
            target=target,
            subject=record.text("subject"),
            truths=(record.text("ground_truth"),),
            questions=[
                Question("generality", "rephrase", record.text("rephrase_prompt"), (target,)),
                Question("locality", "neighborhood", neighbor, (answer,)),
            ],
        )
