"""Tasks of lm-eval on our models and on those of transformers: figures, rows, pairs, and mistakes told in one line."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch

from atma.cli import main
from atma.eval.language_model import OwnModel
from atma.eval.results import read_rows
from atma.eval.stream import DEFAULT
from atma.eval.suite import run
from atma.eval.tasks import Tasks
from atma.tokenizer import byte_tokenizer

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed: pip install 'atma-lm[lm-eval]'")
LIBRARIES = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
ATOL = 1e-4
QUESTIONS = [
    {"question": "def f(x):\n    return", "choices": [" x", " import", "\n\n"], "answer": 0},
    {"question": "import", "choices": [" os", " (", " 1234"], "answer": 1},
    {"question": "for i in", "choices": [" range", ")", " class X"], "answer": 0},
    {"question": "x = [1, 2, 3" + "4" * 200, "choices": ["]", "}", ")"], "answer": 2},
]
KINDS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
    "written": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["\\n"]
  do_sample: false
  max_gen_toks: 24
metric_list:
  - metric: exact_match
""",
}


@pytest.fixture
def folder(tmp_path):
    """Three tasks of four documents, as YAML beside their data."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for kind, config in KINDS.items():
        where = f"data_files: {{test: {tmp_path}/data.jsonl}}\n  cache_dir: {tmp_path}/cache"
        head = f"task: local_{kind}\ndataset_path: json\ndataset_kwargs:\n  {where}\ntest_split: test\n"
        head += "metadata:\n  version: 3\n"
        (tmp_path / f"{kind}.yaml").write_text(head + config)
    return tmp_path


@pytest.fixture
def suite(folder):
    def make(kind, **options):
        return Tasks(tasks=(f"local_{kind}",), include_path=folder, **options)

    return make


def alone(model, context, continuation):
    """The log-likelihood of a continuation after end-of-text and a context, and whether it is greedy, by one pass."""
    eot, encode = model.tokenizer.eot, model.tokenizer.encode
    whole = [eot, *encode(context + continuation)]
    last = len(whole) - 1 - len(encode(context))
    found = model.predict(torch.tensor([whole]), last)
    return -float(found.nats.sum()), bool(found.right.all())


@needs_lm_eval
@LIBRARIES
def test_choices_are_scored_as_by_passes_of_their_own(tiny, suite):
    model = OwnModel(tiny)
    [row] = run(suite("choices"), model)
    best = [np.argmax([alone(model, q["question"], choice)[0] for choice in q["choices"]]) for q in QUESTIONS]
    right = [int(chosen == q["answer"]) for chosen, q in zip(best, QUESTIONS, strict=True)]
    assert row["outcomes"] == right and row["acc"] == np.mean(right) and row["trials"] == 4
    assert row["acc_stderr"] == pytest.approx(np.std(right, ddof=1) / 2)
    assert row["version"] == "3" and row["outcome"] == "acc" and len(row["prompts_sha256"]) == 64


@needs_lm_eval
@LIBRARIES
def test_log_likelihoods_are_those_of_one_pass_whether_the_context_is_read_once_or_again(tiny):
    from lm_eval.api.instance import Instance

    from atma.eval.eleuther import AtmaLM

    model = OwnModel(tiny)
    pairs = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]] + [("", "abc")]
    asked = [Instance("loglikelihood", {}, pair, i, ("t", i, 1)) for i, pair in enumerate(pairs)]
    found = AtmaLM(model).loglikelihood(asked, disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        expected = alone(model, context, continuation)
        assert value == pytest.approx(expected[0], abs=ATOL) and greedy == expected[1]


@needs_lm_eval
@LIBRARIES
def test_the_perplexity_of_texts_is_that_of_one_pass_over_each(tiny, suite):
    model = OwnModel(tiny)
    [row] = run(suite("rolling"), model)
    own = [alone(model, "", q["question"])[0] for q in QUESTIONS]
    sizes = [len(q["question"].encode()) for q in QUESTIONS]
    assert row["bits_per_byte"] == pytest.approx(-sum(own) / sum(sizes) / math.log(2), rel=1e-5)
    each = [-value / size / math.log(2) for value, size in zip(own, sizes, strict=True)]
    assert row["document_losses"] == pytest.approx(each, rel=1e-5)


class Scripted:
    """Says one text, whatever it has read, and counts how many tokens it was asked for."""

    name, longest, truncated, streaming = "scripted", None, 0, DEFAULT

    def __init__(self, text: str) -> None:
        self.tokenizer, self.asked = byte_tokenizer(), []
        self.ids = self.tokenizer.encode(text)

    def generate(self, prompt, most, stop=()):
        self.asked.append(most)
        return self.ids[len(prompt) - 3 :][:most]


def answer(model, context, **options):
    from lm_eval.api.instance import Instance

    from atma.eval.eleuther import AtmaLM

    asked = Instance("generate_until", {}, (context, options), 0, ("t", 0, 1))
    return AtmaLM(model, "off").generate_until([asked])[0]


@needs_lm_eval
@LIBRARIES
def test_answers_end_before_the_first_stop_string_wherever_a_piece_of_them_ends():
    text = "abcdefghij" * 3 + "klmnop\nqrst" * 40
    for stops in (["\n"], ["qr", "nop"], "mno", ["lm", "never"]):
        first = min(text.index(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop in text)
        assert answer(Scripted(text), "abc", until=stops, max_gen_toks=200) == text[:first]
    model = Scripted(text)
    assert answer(model, "abc", until=["never"], max_gen_toks=200) == text[:200] and model.asked == [32, 128, 40]
    assert answer(Scripted("short"), "abc", max_gen_toks=200) == "short"
    model.longest, model.asked = 40, []
    assert answer(model, "abc", until=["never"], max_gen_toks=50) == text[:50] and model.asked == [20, 20, 10]


@needs_lm_eval
@LIBRARIES
def test_answers_are_the_models_greedy_continuation_and_sampling_is_refused(tiny, suite):
    model, text = OwnModel(tiny), "def f(x):"
    greedy = model.tokenizer.decode(model.generate(model.tokenizer.encode(text), 40))
    assert answer(model, text, max_gen_toks=40, do_sample=False) == greedy
    assert len(run(suite("written"), model)[0]["outcomes"]) == 4
    with pytest.raises(ValueError, match="asks for sampling"):
        answer(model, text, do_sample=True, temperature=0.7)


@needs_lm_eval
@LIBRARIES
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bos"])
def test_results_of_transformers_are_those_of_lm_evals_own_model(kind, suite, tmp_path):
    pytest.importorskip("accelerate", reason="lm-eval's own model needs accelerate: pip install accelerate")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from atma.eval.eleuther import AtmaLM
    from atma.eval.hugging_face import load
    from tests.eval.test_hugging_face import made

    path = made(kind, tmp_path / kind)
    manager = TaskManager(include_path=str(suite("choices").include_path), include_defaults=False)
    ours = AtmaLM(load(str(path), truncate=True))
    theirs = HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=2, max_length=64)
    if kind != "gpt2":  # it reads any length, so that only lm-eval cuts
        ours.model.longest = 64
    names = ["local_choices", "local_rolling"][: 1 if kind == "bos" else 2]  # theirs reads it twice in whole texts
    one, other = (lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager) for lm in (ours, theirs))
    for name in names:
        for mine, their in zip(one["samples"][name], other["samples"][name], strict=True):
            np.testing.assert_allclose(numbers(mine["resps"]), numbers(their["resps"]), atol=ATOL)


def numbers(responses):
    """The log-likelihoods of lm-eval's responses to one document."""
    return [one[0][0] if isinstance(one[0], tuple | list) else one[0] for one in responses]


@needs_lm_eval
@LIBRARIES
def test_a_measurement_resumes_and_two_models_compare_in_pairs(tiny, copier, suite, tmp_path, capsys):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    rows = run(suite("choices"), OwnModel(tiny), first)
    assert run(suite("choices"), OwnModel(tiny), first) == rows == read_rows(first)
    run(suite("choices"), OwnModel(copier), second)
    capsys.readouterr()
    assert main(["eval", "diff", str(first), str(second)]) == 0
    assert read_rows(first)[0]["trials_sha256"] == read_rows(second)[0]["trials_sha256"]


@needs_lm_eval
@LIBRARIES
def test_the_command_prints_each_figure_and_writes_rows(folder, capsys):
    out = folder / "rows.jsonl"
    options = ["--tasks", "local_choices,local_rolling", "--include-path", str(folder), "--limit", "2"]
    assert main(["eval", "tasks", "--model", "nano", *options, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("local_choices", "acc_norm", "bits_per_byte"))
    assert [(row["task"], row["trials"]) for row in read_rows(out)] == [("local_choices", 2), ("local_rolling", 2)]


@needs_lm_eval
@LIBRARIES
def test_lm_eval_finds_the_model_by_name_and_takes_its_arguments():
    from lm_eval.api.registry import get_model

    from atma.integrations.lm_eval import AtmaLM

    assert get_model("atma") is AtmaLM
    lm = AtmaLM.create_from_arg_string("pretrained=nano,add_bos_token=False", {"batch_size": 1, "device": None})
    assert lm.model.name == "nano" and not lm.prefixed
    with pytest.raises(ValueError, match="no option 'pretraned' of atma"):
        AtmaLM.create_from_arg_string("pretraned=nano")


@needs_lm_eval
@LIBRARIES
def test_an_unknown_task_is_told_with_those_near_it(tiny, suite, monkeypatch):
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=str(suite("choices").include_path), include_defaults=False)
    monkeypatch.setattr(Tasks, "manager", lambda suite: own)  # lm-eval's own thousands take half a minute to list
    with pytest.raises(ValueError, match="no task 'local_choice'; near it: local_choices"):
        run(Tasks(tasks=("local_choice",), include_path=suite("choices").include_path), OwnModel(tiny))


@pytest.mark.parametrize(
    ("options", "told"),
    [([], "no tasks: give --tasks"), (["--limit", "-1"], "must be 0 or more"), (["--budget", "1m"], "choose --limit")],
)
def test_a_mistake_is_one_line(options, told, capsys):
    assert main(["eval", "tasks", *options]) == 2
    assert told in capsys.readouterr().err


def test_without_lm_eval_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.import_module", refusing(importlib.import_module))
    assert main(["eval", "tasks", "--tasks", "piqa"]) == 2
    assert "pip install 'atma-lm[lm-eval]'" in capsys.readouterr().err


def refusing(importer):
    def load(name, package=None):
        if name == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return importer(name, package)

    return load
