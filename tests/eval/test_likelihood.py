"""Likelihood by length: the same bytes for every tokenizer, figures of plain passes, and what the command says."""

import json
import math

import numpy as np
import pytest
import torch

from atma.cli import main
from atma.eval.language_model import OwnModel
from atma.eval.likelihood import Likelihood
from atma.eval.likelihood.reading import from_beginning, to_end
from atma.eval.likelihood.texts import Text, beginning, choose, ending, stretches, tokens_of
from atma.eval.ragged import predict_each, score_each
from atma.eval.results import read_rows
from atma.eval.suite import run
from atma.tokenizer import Tokenizer, byte_tokenizer, train_bpe

ATOL = 1e-4
WORDS = "the quick brown fox jumps over the lazy dog, naïve café — ünïcödé 漢字 tokens; "


@pytest.fixture
def corpus(tmp_path):
    """A file of nine documents of about 400 to 1,700 bytes, all different."""
    rng = np.random.default_rng(3)
    pieces = WORDS.split(" ")
    texts = [" ".join(rng.choice(pieces, 60 + 20 * i)) for i in range(9)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path / "corpus.jsonl"


@pytest.fixture
def small(corpus):
    def make(**options):
        chosen = {"lengths": (32, 64, 128), "documents": 4, "target_bytes": 40, "text_bytes": 600} | options
        return Likelihood(texts=str(corpus), **chosen)

    return make


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([WORDS * 3], 290)


def kinds(rows, kind):
    return [row for row in rows if row["kind"] == kind]


def with_tokenizer(tiny, tokenizer):
    """The tiny model reading another tokenizer's ids, folded into its vocabulary."""

    class Folded(OwnModel):
        def score(self, tokens, last=None, progress=None):
            return super().score(tokens.clamp(max=256), last, progress)

    model = Folded(tiny)
    model.tokenizer = tokenizer
    return model


def test_fixed_targets_are_the_cost_of_the_last_bytes_after_so_many_tokens(tiny, small, corpus):
    model, suite = OwnModel(tiny), small(measures=("fixed",))
    rows = kinds(run(suite, model), "fixed")
    texts, _ = choose([json.loads(line)["text"] for line in corpus.read_text().splitlines()], 600, 4, 1234)
    for row in rows:
        costs = []
        for text in texts:
            data = text.whole.encode()
            goal = ending(text.whole, 40).encode()
            window = [256, *data[: len(data) - len(goal)][-(row["length"] - 1) :], *goal]
            nats = model.score(torch.tensor([window]), len(goal))
            costs.append(float(nats.sum()) / math.log(2) / len(goal))
        assert row["document_losses"] == pytest.approx(costs, abs=ATOL)
        assert row["mean_bits_per_byte"] == pytest.approx(np.mean(costs), abs=ATOL)
        assert row["context_bytes"] == 4 * (row["length"] - 1)


@pytest.mark.parametrize("unit", ["tokens", "bytes"])
def test_clean_text_costs_what_a_pass_over_each_prefix_does(tiny, small, corpus, unit):
    model = OwnModel(tiny)
    rows = run(small(measures=("clean",), unit=unit), model)
    texts, _ = choose([json.loads(line)["text"] for line in corpus.read_text().splitlines()], 600, 4, 1234)
    for row in kinds(rows, "clean"):
        costs = []
        for text in texts:
            data = text.whole.encode()
            part = data[: row["length"]] if unit == "tokens" else beginning(text.whole, row["length"]).encode()
            costs.append(float(model.score(torch.tensor([[256, *part]])).sum()) / math.log(2) / len(part))
        assert row["document_losses"] == pytest.approx(costs, abs=ATOL)
    places = kinds(rows, "position")
    assert [(row["start"], row["length"]) for row in places] == [(0, 16), (16, 32), (32, 64), (64, 128)]
    whole = kinds(rows, "clean")[-1]
    assert sum(row["bytes"] for row in places) == whole["bytes"]
    bits = sum(row["bits_per_byte"] * row["bytes"] for row in places)
    assert bits == pytest.approx(whole["bits_per_byte"] * whole["bytes"], rel=1e-9)


def test_end_of_text_in_junk_is_read_but_not_counted(tiny):
    tokenizer = byte_tokenizer()
    read = from_beginning(Text(("abc", "defg")), [2, 5, 8], "tokens", tokenizer, junk=True)
    assert read.ids.tolist() == [97, 98, 99, 256, 100, 101, 102, 103]
    assert read.sizes.tolist() == [1, 1, 1, 0, 1, 1, 1, 1] and read.stops == {2: 2, 5: 5, 8: 8}
    read = from_beginning(Text(("abc", "defg")), [2, 5, 7], "bytes", tokenizer, junk=True)
    assert read.stops == {2: 2, 5: 6, 7: 8}


def test_two_tokenizers_have_the_same_target_bytes_and_in_bytes_the_same_text(tiny, small, bpe):
    models = [OwnModel(tiny), with_tokenizer(tiny, bpe)]
    for unit, alike in (("tokens", ("fixed",)), ("bytes", ("fixed", "clean", "junk", "position"))):
        first, second = (run(small(unit=unit), model) for model in models)
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert one["measurement"] == other["measurement"]
            if one["kind"] in alike:
                assert one["trials_sha256"] == other["trials_sha256"] and one["bytes"] == other["bytes"]
                assert one["prompts_sha256"] != other["prompts_sha256"]
            elif one["kind"] != "trend":
                assert one["trials_sha256"] != other["trials_sha256"]


def test_two_models_are_compared_in_pairs(tiny, small, bpe, tmp_path, capsys):
    for name, tokenizer in (("one", byte_tokenizer()), ("two", bpe)):
        run(small(measures=("fixed",)), with_tokenizer(tiny, tokenizer), tmp_path / name)
    assert main(["eval", "diff", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert "paired" in capsys.readouterr().out
    first, second = (read_rows(tmp_path / name)[0] for name in ("one", "two"))
    assert first["trials_sha256"] == second["trials_sha256"]


@pytest.mark.parametrize("size", [1, 2, 7, 16, 33])
def test_texts_are_cut_between_characters(size):
    for cut in (beginning(WORDS, size), ending(WORDS, size)):
        assert size - 3 < len(cut.encode()) <= size
    assert WORDS.startswith(beginning(WORDS, size)) and WORDS.endswith(ending(WORDS, size))


@pytest.mark.parametrize("size", [9, 10, 11, 12])
def test_a_place_within_a_character_moves_before_it(bpe, size):
    text = Text(("12345678é漢x" * 3,))
    read = from_beginning(text, [size, 20], "bytes", bpe, junk=False)
    assert bpe.decode(read.ids[: read.stops[size]]) == beginning(text.whole, size)
    end = to_end(text, [size], 4, "bytes", bpe)
    assert bpe.decode(end.context.ids[-end.counts[size] :]).encode()[-size:].decode("utf-8", "ignore")
    assert bpe.decode(end.sequence(size, bpe.eot)[1:]).endswith(text.whole[-3:])


def test_long_documents_come_first_and_more_of_them_change_none(corpus):
    sources = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    few, none = choose(sources, 900, 2, 7)
    more, joined = choose(sources, 900, 7, 7)
    assert more[:2] == few and none == 0 and joined == sum(len(text.parts) > 1 for text in more) > 0
    with pytest.raises(ValueError, match="the source has"):
        choose(sources, 10**6, 2, 7)


def test_junk_goes_on_where_the_last_stretch_ended():
    texts = stretches(["abcdefg", "hi", "jklmnop"], 4, 9, go_on=True)
    assert [text.parts for text in texts] == [("abcd",), ("efg", "h"), ("i", "jkl"), ("mnop",)]
    assert [text.parts for text in stretches(["abcdefg", "hi", "jklmnop"], 4, 9)] == [("abcd",), ("hi", "jk")]


def test_a_tokenizer_that_changes_text_is_refused():
    from tokenizers import normalizers

    tokenizer = byte_tokenizer()
    lower = Tokenizer(tokenizer.backend, tokenizer.eot)
    lower.backend.normalizer = normalizers.Lowercase()
    lower._raw = False
    with pytest.raises(ValueError, match="does not keep this text"):
        tokens_of(["Abc"], lower)


def test_sequences_of_different_lengths_cost_what_each_alone_does(tiny):
    model, rng = OwnModel(tiny), np.random.default_rng(0)
    sequences = [rng.integers(0, 256, size) for size in (2, 63, 7, 64, 65, 1000, 7)]
    lasts, told = [1, 5, 6, 63, 1, 200, 2], []
    found = score_each(model, sequences, lasts, told.append)
    seen = predict_each(model, sequences, lasts)
    for ids, last, nats, one in zip(sequences, lasts, found, seen, strict=True):
        expected = model.predict(torch.from_numpy(ids)[None], last)
        np.testing.assert_allclose(nats, expected.nats[0], atol=ATOL)
        np.testing.assert_allclose(one.nats, expected.nats[0], atol=ATOL)
        assert (one.right == expected.right[0]).all()
    assert sum(told) == sum(len(ids) - 1 for ids in sequences)


def test_progress_sums_to_the_tokens_told(tiny, small):
    done = {}
    run(small(), OwnModel(tiny), progress=lambda name, now, of: done.update({name: (now, of)}))
    assert set(done) == {"clean", "junk", "fixed targets"} and all(now == of for now, of in done.values())


def test_lengths_that_the_texts_do_not_reach_are_skipped_and_said(tiny, small, bpe):
    model = with_tokenizer(tiny, bpe)
    trends = kinds(run(small(lengths=(32, 64, 550), measures=("clean", "fixed")), model), "trend")
    assert {row["task"]: row["skipped_lengths"] for row in trends} == {
        "clean": [550],
        "clean by position": [],
        "fixed": [550],
    }
    with pytest.raises(ValueError, match="do not reach 590 tokens"):
        run(small(lengths=(590, 599)), model)


def test_a_length_past_what_a_model_can_read_is_refused_before_anything_is_measured(tiny, small):
    model = OwnModel(tiny)
    model.longest = 100
    with pytest.raises(ValueError, match="128 tokens pass the 100 positions"):
        run(small(measures=("clean",)), model)
    with pytest.raises(ValueError, match="167 tokens pass the 100 positions"):
        run(small(measures=("fixed",)), model)


def test_the_command_prints_a_table_and_a_verdict(corpus, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    options = ["--texts", str(corpus), "--lengths", "16", "32", "--documents", "2", "--text-bytes", "200"]
    options += ["--target-bytes", "20", "--out", str(out)]
    assert main(["eval", "likelihood", "--model", "nano", *options]) == 0
    told = capsys.readouterr().out
    assert "mean over texts (2 of clean, " in told and "fixed: undecided" in told
    assert {row["kind"] for row in read_rows(out)} == {"clean", "junk", "fixed", "position", "trend"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--lengths", "8", "4"], "lengths must be 2 or more and strictly increasing"),
        (["--documents", "0"], "'documents' must be 1 or more, not 0"),
        (["--margin", "0"], "'margin' must be above 0"),
        (["--measures", "clean", "clean"], "must be distinct"),
        (["--budget", "1m"], "choose --documents"),
    ],
)
def test_a_mistake_is_one_line(options, told, capsys):
    assert main(["eval", "likelihood", *options]) == 2
    assert told in capsys.readouterr().err
