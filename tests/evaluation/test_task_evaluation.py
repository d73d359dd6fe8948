"""lm-eval's tasks on pruned models: its figures against plain loops over transformers, on a task made here."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyprune import InputError
from pyprune.evaluation.tasks import evaluate_tasks
from pyprune.job.config import PruneConfig
from pyprune.pipeline.run import prune
from pyprune.runtime.progress import silent

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

ON_CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
# What follows each beginning. The first of each is the answer; which one the model takes is for it to say.
QUESTIONS = {
    "The cat sat on the": ["table", "of", "blue"],
    "He was born in": ["the city", "a xylophone", "London"],
    "In the year": ["of the", "dog", "two"],
    "The film was": ["directed by", "a good film", "and"],
    "It is a": ["tablecloth", "very", "good"],
    "She went to the": ["house of the old king", "end", "was"],
    "The war began": ["in", "because the north had", "on"],
}

COMMON = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
task: local_choice
tag: local_tag
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
GENERATE = """
task: local_generate
tag: local_tag
output_type: generate_until
doc_to_target: "{{continuation}}"
generation_kwargs: {until: ["\\n\\n\\n"], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
GROUP = """
group: local_group
task: [local_choice]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""


@pytest.fixture(scope="module")
def pruned(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model without 30 % of its decoder linears: layers that differ, with biases."""
    output = tmp_path_factory.mktemp("model") / "pruned"
    sizes = {"samples": 8, "sequence_length": 32, "device": "cpu"}
    prune(PruneConfig(str(demo_model), output, "flap", 0.3, calibration="self", **sizes), silent)
    assert json.loads((output / "config.json").read_text())["model_type"] == "pyprune_llama"
    return output


@pytest.fixture(scope="module")
def questions(pruned: Path) -> list[dict[str, Any]]:
    """Every second generated answer is what the model says, so that its score is neither 0 nor 1."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32), load_tokenizer(pruned)
    rows = []
    for number, (question, choices) in enumerate(QUESTIONS.items()):
        encoded = tokenizer(question, return_tensors="pt")
        made = model.generate(**encoded, max_new_tokens=4, do_sample=False)[0, encoded.input_ids.shape[1] :]
        continuation = tokenizer.decode(made) if number % 2 else "something else"
        rows.append({"question": question, "choices": choices, "answer": 0, "continuation": continuation})
    return rows


@pytest.fixture
def tasks(questions: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in questions))
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(COMMON.format(data=data) + text)
    (folder / "group.yaml").write_text(GROUP)
    return folder


@pytest.fixture
def only_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval's own tasks, whose 14 000 files take seconds to list."""
    import lm_eval.tasks

    local = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", local)


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def choose(model: Any, tokenizer: Any, question: str, choices: list[str]) -> tuple[int, int]:
    """The choice of the highest log-likelihood, and the one of the highest a character."""
    start = len(tokenizer(question).input_ids)
    scores = []
    for choice in choices:
        ids = tokenizer(f"{question} {choice}", return_tensors="pt").input_ids
        with torch.no_grad():
            log_p = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)  # [tokens - 1, vocabulary]
        scores.append(log_p.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
    normed = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
    return scores.index(max(scores)), normed.index(max(normed))


@pytest.mark.slow
@pytest.mark.usefixtures("only_local")
def test_a_task_is_what_a_plain_loop_says(pruned: Path, tasks: Path) -> None:
    result = evaluate_tasks(pruned, ["local_tag"], tasks, **ON_CPU)
    assert list(result["tasks"]) == ["local_choice", "local_generate"]
    assert result["groups"] == {}
    assert (result["limit"], result["lm_eval"]) == (None, sys.modules["lm_eval"].__version__)
    assert result["seconds"] > 0

    model, tokenizer = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32), load_tokenizer(pruned)
    chosen = [choose(model, tokenizer, question, choices) for question, choices in QUESTIONS.items()]
    for place, metric in enumerate(("acc", "acc_norm")):
        right = sum(answer[place] == 0 for answer in chosen)
        found = result["tasks"]["local_choice"]["metrics"][metric]
        n = len(QUESTIONS)
        assert 0 < right < n, "the questions tell nothing"
        assert found["value"] == pytest.approx(right / n)
        assert found["standard_error"] == pytest.approx((right / n * (1 - right / n) / (n - 1)) ** 0.5)
        assert found["higher_is_better"]
    assert result["tasks"]["local_choice"]["examples"] == len(QUESTIONS)
    assert result["tasks"]["local_choice"]["few_shot"] == 0
    # Generated with the KV cache of layers of several sizes.
    assert result["tasks"]["local_generate"]["metrics"]["exact_match"]["value"] == pytest.approx(3 / 7)


@pytest.mark.usefixtures("only_local")
@pytest.mark.parametrize(("few_shot", "own"), [(None, None), (2, None), (2, 0), (None, 1)])
def test_figures_are_those_of_lm_evals_program(
    pruned: Path, tasks: Path, few_shot: int | None, own: int | None
) -> None:
    """Also with a limit, solved examples (as told, or as the task says), and a group's totals."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if own is not None:
        choice = tasks / "choice.yaml"
        choice.write_text(choice.read_text() + f"num_fewshot: {own}\n")
    result = evaluate_tasks(pruned, ["local_group"], tasks, limit=5, batch_size=3, few_shot=few_shot, **ON_CPU)
    expected = lm_eval.simple_evaluate(
        HFLM(AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32), tokenizer=load_tokenizer(pruned)),
        tasks=["local_group"],
        task_manager=lm_eval.tasks.TaskManager(include_path=tasks),
        num_fewshot=few_shot,
        limit=5,
    )
    choice, group = result["tasks"]["local_choice"], result["groups"]["local_group"]
    assert (choice["examples"], group["examples"], result["limit"]) == (5, 5, 5)
    assert choice["few_shot"] == expected["n-shot"]["local_choice"]
    assert "few_shot" not in group
    for kind, name, entry in (("results", "local_choice", choice), ("groups", "local_group", group)):
        for metric, figure in entry["metrics"].items():
            theirs = expected[kind][name]
            assert figure["value"] == theirs[f"{metric},none"], metric
            assert figure["standard_error"] == theirs[f"{metric}_stderr,none"], metric
    assert set(choice["metrics"]) == {"acc", "acc_norm"}
    assert set(group["metrics"]) == {"acc"}


@pytest.mark.slow
def test_a_task_that_lm_eval_has_not(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        evaluate_tasks(tmp_path, ["arc_esy"], **ON_CPU)
    assert str(error.value).startswith("lm-eval has no task 'arc_esy'; close to it: arc_easy, ")


@pytest.mark.usefixtures("only_local")
def test_unknown_tasks(tmp_path: Path, tasks: Path) -> None:
    with pytest.raises(InputError, match=r"tasks has a task 'local_chioce'; close to it: local_choice"):
        evaluate_tasks(tmp_path, ["local_choice", "local_chioce"], tasks, **ON_CPU)
    with pytest.raises(InputError, match=r"no task '\?\?\?'; `lm-eval ls tasks` lists"):
        evaluate_tasks(tmp_path, ["???"], **ON_CPU)
    with pytest.raises(InputError, match="no task is named"):
        evaluate_tasks(tmp_path, [], **ON_CPU)


@pytest.mark.usefixtures("only_local")
def test_tasks_that_cannot_be_run(tmp_path: Path, tasks: Path) -> None:
    with pytest.raises(InputError, match="local_choice is asked for twice: by local_choice and by local_group"):
        evaluate_tasks(tmp_path, ["local_choice", "local_group"], tasks, **ON_CPU)
    with pytest.raises(InputError, match="is not a folder of tasks"):
        evaluate_tasks(tmp_path, ["local_choice"], tasks / "choice.yaml", **ON_CPU)
    choice = tasks / "choice.yaml"
    choice.write_text(choice.read_text() + "unsafe_code: true\n")
    with pytest.raises(InputError, match="local_choice runs code that the model writes"):
        evaluate_tasks(tmp_path, ["local_choice"], tasks, **ON_CPU)
    (tasks / "questions.jsonl").unlink()
    with pytest.raises(
        InputError, match=r"task local_choice or its data cannot be loaded: .*questions\.jsonl"
    ) as error:
        evaluate_tasks(tmp_path, ["local_choice"], tasks, **ON_CPU)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("only_local")
def test_no_model(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a model folder"):
        evaluate_tasks(tmp_path, ["local_choice"], tasks, **ON_CPU)


@pytest.mark.parametrize("missing", ["lm_eval", "accelerate"])
def test_without_lm_eval(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("lm_eval", missing)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf"there is no {missing}: pip install 'pyprune\[eval\]'"):
        evaluate_tasks(tmp_path, ["arc_easy"], **ON_CPU)


@pytest.mark.usefixtures("only_local")
def test_command(pruned: Path, demo_model: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On tasks alone, beside a text, and against the dense model."""
    on_cpu = ("--include-path", tasks, "--device", "cpu", "--dtype", "float32")
    outcome = run(capsys, "evaluate", pruned, "--tasks", "local_choice, local_generate", *on_cpu, "--json")
    assert outcome.status == 0, outcome.err
    assert list(outcome.json) == ["task_evaluation"]
    assert list(outcome.json["task_evaluation"]["tasks"]) == ["local_choice", "local_generate"]
    accuracy = outcome.json["task_evaluation"]["tasks"]["local_choice"]["metrics"]["acc"]["value"]

    text = ("--text", "self", "--max-windows", 2, "--sequence-length", 32, "--reference", demo_model)
    outcome = run(capsys, "evaluate", pruned, "--tasks", "local_choice", *text, *on_cpu)
    assert outcome.status == 0, outcome.err
    rows = [line.split() for line in outcome.out.splitlines()]
    assert any(row[0] == "perplexity" for row in rows)
    (row,) = [row for row in rows if row[:2] == ["local_choice", "acc"]]
    assert row[2:4] == [str(len(QUESTIONS)), f"{accuracy:.4f}"]
    assert row.count("±") == 2, "one figure of each model"


def test_command_with_nothing_to_evaluate_on(pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(capsys, "evaluate", pruned)
    assert outcome.status == 2
    assert "give --text TEXT, --tasks NAME,NAME or both" in outcome.err
