"""What a task is measured with and what its key holds: its group's settings, its documents, the functions it names."""

import importlib.util
import json

import pytest

from atma.eval.language_model import OwnModel
from atma.eval.suite import run
from atma.eval.tasks import Tasks

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed: pip install 'atma-lm[lm-eval]'", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
TASK = """
task: local_pair
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/data.jsonl, train: {folder}/shots.jsonl}}
  cache_dir: {folder}/cache
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
GROUP = "group: local_group\ntask:\n  - task: local_pair\n    num_fewshot: 2\n"


def write(path, *questions):
    rows = [{"question": question, "choices": [" os", " ("], "answer": 0} for question in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """A task of four documents and four examples, and a group that has it with two examples."""
    write(tmp_path / "data.jsonl", "import", "from", "import a", "import b")
    write(tmp_path / "shots.jsonl", "x", "y", "z", "w")
    (tmp_path / "pair.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "group.yaml").write_text(GROUP)
    return tmp_path


def key(folder, tiny, name="local_pair", **options):
    """What decides a task's rows besides the model."""
    [measurement] = Tasks(tasks=(name,), include_path=folder, **options).measurements(OwnModel(tiny), {})
    return measurement.spec


def test_a_task_of_a_group_is_measured_with_the_groups_settings(tiny, folder, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # seconds, for what no row holds
    [own] = run(Tasks(tasks=("local_pair",), include_path=folder), OwnModel(tiny))
    [grouped] = run(Tasks(tasks=("local_group",), include_path=folder), OwnModel(tiny))
    assert (own["num_fewshot"], grouped["num_fewshot"]) == (0, 2)
    assert own["config_sha256"] != grouped["config_sha256"] and own["prompts_sha256"] != grouped["prompts_sha256"]


def test_a_task_asked_for_with_two_settings_is_refused_and_with_the_same_measured_once(tiny, folder):
    twice = Tasks(tasks=("local_pair", "local_group"), include_path=folder)
    with pytest.raises(ValueError, match="local_pair is asked for twice, with different settings"):
        twice.measurements(OwnModel(tiny), {})
    (folder / "group.yaml").write_text("group: local_group\ntask:\n  - local_pair\n")
    assert [one.name for one in twice.measurements(OwnModel(tiny), {})] == ["local_pair"]


def test_other_documents_in_the_same_file_have_another_key(tiny, folder):
    first, limited, shown = key(folder, tiny), key(folder, tiny, limit=2), key(folder, tiny, num_fewshot=1)
    assert key(folder, tiny) == first
    write(folder / "data.jsonl", "import", "from", "import a", "import c")
    assert key(folder, tiny) != first and key(folder, tiny, limit=2) == limited
    write(folder / "data.jsonl", "import", "from", "import a", "import b")
    write(folder / "shots.jsonl", "x", "y", "z", "v")
    assert key(folder, tiny) == first and key(folder, tiny, num_fewshot=1) != shown


def test_functions_of_a_task_go_into_its_key_by_their_source(tiny, folder):
    named = "fewshot_config:\n  doc_to_text: !function few.few\n"
    (folder / "pair.yaml").write_text(TASK.format(folder=folder) + named)
    asked, keys, kept = Tasks(tasks=("local_pair",), include_path=folder), [], []
    for end in ("", "", " + '!'"):
        (folder / "few.py").write_text(f"def few(doc):\n    return doc['question']{end}\n")
        kept += asked.measurements(OwnModel(tiny), {})  # as long as a function is kept no other has its address
        keys.append(kept[-1].spec["config_sha256"])
    assert keys[0] == keys[1] != keys[2]
