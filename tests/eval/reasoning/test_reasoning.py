"""The suite: exact lengths, equal trials for all models, both ways of scoring, resuming, errors."""

import copy
import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from knower import Knower

from atma.cli import main
from atma.commands.eval_reasoning import table
from atma.eval.compare import compare
from atma.eval.language_model import OwnModel
from atma.eval.reasoning.answers import Answered, answered, exact, generation_row, named
from atma.eval.reasoning.background import Background, lines_of
from atma.eval.reasoning.prompts import Maker, Prompt
from atma.eval.reasoning.suite import FACTS_ALONE, Reasoning
from atma.eval.reasoning.tasks import TASKS
from atma.eval.stream import Streaming
from atma.eval.suite import run
from atma.tokenizer import byte_tokenizer

LINES = [f"line {i} of the background." for i in range(200)]
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "background.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return str(path)


@pytest.fixture
def maker():
    tokenizer = byte_tokenizer()
    return Maker(tokenizer, Background(LINES, tokenizer), 5, 0, "test")


def last_room(text):
    """The answer to qa1, read from the prompt's lines."""
    who = text.rpartition("Where is ")[2].partition("?")[0]
    text = text.removeprefix("<|endoftext|>")
    lines = [line for line in text.split("\n") if line.startswith(f"{who} ") and line.endswith(".")]
    return lines[-1].removesuffix(".").split()[-1]


@pytest.mark.parametrize("length", [800, 1024, 5000, 20_000])
def test_a_prompt_and_the_longest_answer_fill_the_length_exactly(maker, length):
    for index in range(5):
        prompt = maker.prompt(TASKS["qa5"], length, index)
        assert len(prompt.ids) + max(map(len, prompt.candidates)) == length
        assert prompt.ids[0] == maker.writer.tokenizer.eot


@pytest.mark.parametrize("length", [0, 700, 3000, 20_000])
@pytest.mark.parametrize("name", ["qa1", "qa11", "qa16"])
def test_every_fact_stands_whole_and_in_order_between_whole_lines(maker, name, length):
    for index in range(5):
        sample = maker.sample(TASKS[name], index)
        text = maker.writer.tokenizer.decode(maker.prompt(TASKS[name], length, index).ids)
        *lines, question, cue = text.removeprefix("<|endoftext|>").split("\n")
        assert [line for line in lines if line in sample.facts] == list(sample.facts)
        rest = [line for line in lines if line not in sample.facts]
        assert rest[:1] == [] or LINES[0].endswith(rest[0]) or any(line.endswith(rest[0]) for line in LINES)
        assert set(rest[1:]) <= set(LINES)
        assert (question, cue) == (f"Question: {sample.question}", "Answer:")


def test_a_longer_text_is_the_shorter_one_with_more_around_its_facts(maker):
    short, long = (maker.prompt(TASKS["qa1"], length, 2) for length in (2000, 9000))
    facts = set(maker.sample(TASKS["qa1"], 2).facts)
    texts = [maker.writer.tokenizer.decode(prompt.ids).split("\n") for prompt in (short, long)]
    rest = [[line for line in text if line not in facts] for text in texts]
    assert rest[1][-len(rest[0]) + 1 :] == rest[0][1:]


def test_facts_are_spread_over_all_of_the_text(maker):
    """Depths of a uniform draw: the mean of 400 is within four standard errors of a half."""
    depths = []
    for index in range(80):
        _, *drawn = maker.places(TASKS["qa1"], index, 5)
        assert drawn == sorted(drawn)
        depths += drawn
    assert abs(np.mean(depths) - 0.5) < 4 * (1 / 12 / len(depths)) ** 0.5


def test_a_length_without_room_is_refused_before_anything_is_measured(source):
    model = Knower(last_room)
    with pytest.raises(ValueError, match=r"length 210 has no room for qa2: trial \d+'s facts and question take"):
        run(Reasoning(("qa2",), (0, 210), 20, background=source), model)
    with pytest.raises(ValueError, match="pass the 300 positions that knower has learned"):
        run(Reasoning(("qa1",), (0, 700), 5, background=source), Knower(last_room, 300))
    assert model.reads == 0


def test_a_model_is_measured_at_its_longest_length(source):
    rows = run(Reasoning(("qa1",), (700,), 3, background=source), Knower(last_room, 700))
    assert [row["kind"] for row in rows] == ["ranking", "generation"]
    assert {row["longest_prompt"] for row in rows} == {700 - len(" bathroom\n")}


def test_one_who_knows_is_right_everywhere_and_one_who_does_not_is_not(source):
    suite = Reasoning(("qa1",), (0, 600, 3000), 12, background=source)
    knows, guesses = run(suite, Knower(last_room)), run(suite, Knower(lambda text: "office"))
    assert [(row["kind"], row["length"], row["accuracy"]) for row in knows] == [
        (kind, length, 1.0) for length in (0, 600, 3000) for kind in ("ranking", "generation")
    ]
    for row, other in zip(knows, guesses, strict=True):
        offices = sum(TASKS["qa1"].answers[maker_true(source, i)] == "office" for i in range(12))
        assert other["accuracy"] == offices / 12 < 1 and sum(other["outcomes"]) == offices
        assert row["trials_sha256"] == other["trials_sha256"] and row["chance"] == pytest.approx(1 / 6)
        assert row["accuracy_low"] < 1.0 == row["accuracy_high"] and row["trials"] == 12
        assert offices / 12 <= row["majority"] < 1


def maker_true(source, index):
    tokenizer = byte_tokenizer()
    return (
        Maker(tokenizer, Background(lines_of(source), tokenizer), 1234, 0, "test").prompt(TASKS["qa1"], 0, index).true
    )


def test_two_models_are_compared_in_pairs(source):
    suite = Reasoning(("qa1",), (0,), 12)
    found = compare(run(suite, Knower(last_room)), run(suite, Knower(lambda text: "office")))
    assert {change.metric for change in found.changes} >= {"accuracy", "named"}
    assert all(", p = " in change.chance for change in found.changes if change.metric == "accuracy")


def test_our_model_scores_through_its_state_what_it_scores_at_once(tiny, maker):
    """Ranking after one reading, in chunks and groups, against reading prompt and answer at once; to 1e-4 a token."""
    model = OwnModel(tiny, Streaming(chunk=64, batch_tokens=1500))
    for name, length in (("qa1", 0), ("qa8", 600)):
        prompt, told = maker.prompt(TASKS[name], length, 1), []
        found = answered(model, prompt, "both", told.append)
        for candidate, nats in zip(prompt.candidates, found.nats, strict=True):
            whole = torch.from_numpy(np.concatenate([prompt.ids, candidate]))[None]
            assert nats == pytest.approx(float(model.score(whole, len(candidate)).sum()), abs=1e-4 * len(candidate))
        most = max(map(len, prompt.candidates)) + 8
        assert found.written == tiny.tokenizer.decode(model.generate(prompt.ids.tolist(), most, [10]))
        assert sum(told) == len(prompt.ids)


@pytest.mark.parametrize("scoring", ["ranking", "generation"])
def test_weights_that_are_not_finite_have_no_accuracy(tiny, maker, scoring):
    broken = OwnModel(tiny._replace(model=copy.deepcopy(tiny.model)))
    for weights in broken.loaded.model.parameters():
        torch.nn.init.constant_(weights, float("nan"))
    with pytest.raises(ValueError, match="not finite; check the model's weights"):
        answered(broken, maker.prompt(TASKS["qa1"], 0, 0), scoring, lambda n: None)


def test_ours_and_any_other_model_rank_alike(tiny, maker):
    """The same weights seen as a stranger's, which is asked for every answer by itself."""
    own = OwnModel(tiny)
    stranger = SimpleNamespace(
        tokenizer=own.tokenizer, predict=own.predict, generate=own.generate, longest=None, truncated=0
    )
    prompt = maker.prompt(TASKS["qa10"], 500, 0)
    ours, theirs = (answered(model, prompt, "both", lambda n: None) for model in (own, stranger))
    np.testing.assert_allclose(ours.nats, theirs.nats, atol=1e-3)
    assert ours.written == theirs.written


def test_a_model_of_transformers_is_measured(source, tmp_path):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: pip install 'atma-lm[hf]'")
    import transformers

    shape = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, intermediate_size=32, bos_token_id=256, eos_token_id=256)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save(tmp_path / "model" / "tokenizer.json")
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "model" / "tokenizer.json"), eos_token="<|endoftext|>"
    ).save_pretrained(tmp_path / "model")
    options = ["--tasks", "qa1", "--lengths", "0", "500", "--per-cell", "2", "--background", source]
    out = tmp_path / "rows.jsonl"
    assert main(["eval", "reasoning", "--model", f"hf:{tmp_path / 'model'}", *options, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["kind"], row["length"]) for row in rows] == [
        ("ranking", 0),
        ("generation", 0),
        ("ranking", 500),
        ("generation", 500),
    ]
    assert all(0 <= row["accuracy"] <= 1 and row["provenance"]["core"] == "llama" for row in rows)


def test_progress_sums_to_the_tokens_and_rows_are_not_made_twice(tiny, source, tmp_path):
    suite, path, told = Reasoning(("qa1", "qa9"), (0, 500), 2, background=source), tmp_path / "rows.jsonl", {}

    def progress(name, done, of):
        told[name] = (done, of)

    rows = run(suite, OwnModel(tiny), path, progress)
    assert len(told) == 4 and all(done == of > 0 for done, of in told.values())
    assert run(suite, Knower(lambda text: "no"), path) != rows
    assert run(suite, OwnModel(tiny), path) == rows and len(rows) == 8


def test_a_budget_counts_the_facts_alone_as_a_short_text():
    assert Reasoning(lengths=(0, 1024), per_cell=7).trials() == {FACTS_ALONE: 7, 1024: 7}


def test_examples_stand_before_the_text_and_are_of_training(maker):
    shown = Maker(maker.writer.tokenizer, maker.text, 5, 2, "test").prompt(TASKS["qa1"], 0, 0)
    text = maker.writer.tokenizer.decode(shown.ids)
    alone = maker.writer.tokenizer.decode(maker.prompt(TASKS["qa1"], 0, 0).ids).removeprefix("<|endoftext|>")
    assert text.endswith("\n\n" + alone) and text.count("Question: ") == 3
    for example in text.removesuffix(alone).removeprefix("<|endoftext|>").split("\n\n")[:2]:
        answer = example.rpartition("Answer: ")[2]
        assert last_room(example.rpartition("\nAnswer")[0]) == answer


@pytest.mark.parametrize(
    ("written", "is_exact", "is_named"),
    [
        (" kitchen", True, True),
        ("Kitchen.\nand", True, True),
        (" in the kitchen. Not the office", False, True),
        ("the office or the kitchen", False, False),
        ("before the garden it was in the kitchen", False, True),
        ("", False, False),
        ("kitchen, so she is in the kitchen", False, True),
        ("Sandra went\nto the kitchen", False, False),
        ("\n\nkitchen", False, False),
    ],
)
def test_written_answers(written, is_exact, is_named):
    question = "Where was the milk before the garden?"
    assert exact(written, "kitchen") is is_exact
    assert named(written, "kitchen", ROOMS, question) is is_named


def test_lists_are_named_in_any_order_and_paths_in_theirs():
    for written in ("milk, apple", "the apple and the milk"):
        assert named(written, "milk,apple", TASKS["qa8"].answers, "What is Mary carrying?")
    assert not named("milk", "milk,apple", TASKS["qa8"].answers, "What is Mary carrying?")
    for written, right in (("north, then east", True), ("east,north", False), ("north,north,east", False)):
        assert named(written, "north,east", TASKS["qa19"].answers, "?", path=True) is right


@pytest.mark.parametrize(("task", "named"), [("qa8", 1.0), ("qa19", 0.0)])
def test_only_a_path_must_be_named_in_its_order(task, named):
    answers = ("north,east", "east,north")
    prompt = Prompt(np.zeros(0, np.int64), (), 0, "?")
    assert generation_row([Answered(np.zeros(0), "east,north")], [prompt], task, answers)["named"] == named


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tasks": ("qa0",)}, "no reasoning task 'qa0'"),
        ({"lengths": (2048, 1024)}, "strictly increasing"),
        ({"lengths": (0, 100)}, "0 or above 200"),
        ({"per_cell": 0}, "'per_cell' must be 1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        Reasoning(**options)


def test_the_command_prints_a_table_and_keeps_rows(source, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    options = ["--tasks", "qa1", "--lengths", "0", "--per-cell", "2", "--background", source, "--out", str(out)]
    assert main(["eval", "reasoning", *options]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    head, body = table(rows)
    assert head[1:] == ["chance", "majority", "facts"] and [line[0] for line in body] == [
        "qa1 ranking",
        "qa1 generation",
    ]
    assert "qa1 ranking" in capsys.readouterr().out
    assert main(["eval", "reasoning", "--documents", "a", "--fine-tune", "b"]) == 2
