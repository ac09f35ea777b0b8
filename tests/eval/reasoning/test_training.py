"""Training documents, rows of which only answers are scored, and fine-tuning from a model's weights."""

import json
from dataclasses import replace

import pytest
import torch

from atma.checkpoint import save_model
from atma.data.sources import documents
from atma.eval.language_model import OwnModel
from atma.eval.reasoning.suite import Reasoning
from atma.eval.reasoning.training import FineTuning, Rows, fine_tune, write_documents
from atma.loading import load
from atma.ops.loss import NOT_SCORED


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "background.txt"
    path.write_text("\n".join(f"line {i} of the background." for i in range(200)), encoding="utf-8")
    return Reasoning(("qa1", "qa6"), (0, 512), 3, background=str(path))


def rows_of(tiny, suite, loss="answer", batch_tokens=4096):
    tuning = FineTuning(batch_tokens=batch_tokens, loss=loss)
    return Rows(suite.maker(OwnModel(tiny), "train"), suite, tuning.config(suite), loss)


def test_only_answers_are_scored_and_each_follows_its_question(tiny, suite):
    batch, tokenizer = rows_of(tiny, suite).batch(0), tiny.tokenizer
    assert batch.tokens.shape == batch.targets.shape == (8, 512)
    for ids, targets, segments in zip(*batch, strict=True):
        scored = targets != NOT_SCORED
        answers = tokenizer.decode(targets[scored].tolist()).split("\n")[:-1]
        texts = [tokenizer.decode(ids[segments == s].tolist()) for s in segments.unique()]
        texts = [text.removeprefix("<|endoftext|>") for text in texts if "Question: " in text]
        assert answers and len(answers) == len(texts)
        for text, answer in zip(texts, answers, strict=True):
            assert text.partition("Answer:")[2] == answer and text.count("Question: ") == 1


def test_all_tokens_are_scored_where_that_is_wanted(tiny, suite):
    batch = rows_of(tiny, suite, "all").batch(0)
    documents = batch.tokens[0] != tiny.tokenizer.eot
    scored = batch.targets[0] != NOT_SCORED
    assert scored.sum() >= documents.sum()
    inside = scored[:-1] & scored[1:]
    assert (batch.targets[0, :-1] == batch.tokens[0, 1:])[inside].all()


def test_a_batch_is_a_function_of_its_step(tiny, suite):
    one, other = rows_of(tiny, suite), rows_of(tiny, suite)
    assert (one.batch(3).tokens == other.batch(3).tokens).all()
    assert not torch.equal(one.batch(3).tokens, one.batch(4).tokens)


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_fine_tuning_lowers_the_loss_and_leaves_the_model_as_it_was(tiny, suite, tmp_path):
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    fine_tune(OwnModel(tiny), suite, FineTuning(tokens=8 * 1024, batch_tokens=1024, rate=1.0), tmp_path / "run")
    found = losses(tmp_path / "run")
    assert len(found) == 8 and found[-1] < found[0] - 0.1
    assert all(torch.equal(before[name], value) for name, value in tiny.model.state_dict().items())


def test_fine_tuning_begins_with_the_weights_and_a_folder_holds_one_run(tiny, suite, tmp_path):
    """At a rate of next to nothing the final weights are the first ones, to a millionth."""
    model, tuning, out = OwnModel(tiny), FineTuning(tokens=512, batch_tokens=512, rate=1e-9), tmp_path / "run"
    fine_tune(model, suite, tuning, out)
    trained = load(out)
    assert trained.tokenizer is not None and trained.model.config == tiny.model.config
    for name, value in trained.model.state_dict().items():
        torch.testing.assert_close(value, tiny.model.state_dict()[name], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="holds a run already"):
        fine_tune(model, suite, tuning, out)
    fine_tune(model, suite, tuning, out, resume=True)


def test_documents_are_what_prepare_takes(tiny, suite, tmp_path):
    path = tmp_path / "train" / "documents.jsonl"
    assert write_documents(OwnModel(tiny), suite, path) == 2 * 2 * 3
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [document.text for document in documents(path)]
    assert texts == [row["text"] for row in rows]
    for row in rows:
        assert row["text"].endswith(f"Answer: {row['answer']}\n") and row["task"] in suite.tasks
        assert len(tiny.tokenizer.encode(row["text"])) <= row["length"] or row["length"] == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rate": 0.0}, "'rate' must be positive"),
        ({"rate": float("inf")}, "'rate' must be positive"),
        ({"row": 0}, "'row' must be 1 token or more, not 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(suite, options, told):
    with pytest.raises(ValueError, match=told):
        FineTuning(**options).config(replace(suite, lengths=(0,)))


def test_published_rows_are_not_trained_on(tiny, suite, tmp_path):
    published = replace(suite, data=tmp_path)
    with pytest.raises(ValueError, match="leave out --data"):
        write_documents(OwnModel(tiny), published, tmp_path / "documents.jsonl")
    with pytest.raises(ValueError, match="leave out --data"):
        fine_tune(OwnModel(tiny), published, FineTuning(), tmp_path / "run")
    assert not list(tmp_path.glob("[dr]*"))


def test_a_model_in_8_bits_is_fine_tuned_from_floats(tiny, suite, tmp_path):
    save_model(tmp_path / "floats", tiny.model, tiny.tokenizer)
    floats = load(tmp_path / "floats")
    model = OwnModel(load(tmp_path / "floats", weights="int8"))
    fine_tune(model, suite, FineTuning(tokens=512, batch_tokens=512, rate=1e-9), tmp_path / "run")
    torch.testing.assert_close(load(tmp_path / "run").model.embed.weight, floats.model.embed.weight, atol=1e-6, rtol=0)
