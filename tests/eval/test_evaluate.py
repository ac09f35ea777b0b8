"""The whole evaluation: rows are plain JSON with their provenance, and nothing is measured twice."""

import json

import pytest
import torch

from atma.commands.eval_lengths import table
from atma.config import EvaluationConfig
from atma.data.dataset import TokenSet
from atma.data.prepare import Preparation, prepare
from atma.eval import OwnModel, evaluate, provenance, read_rows, write_rows
from atma.eval.lengths import plan
from atma.hashes import weights_hash
from atma.selection import select
from atma.tokenizer import train_bpe

SMALL = EvaluationConfig(lengths=(96, 128), documents=3, target_tokens=16, needle_trials=2)
PROVENANCE = {
    *(
        "weights_sha256",
        "model_config_sha256",
        "tokenizer_sha256",
        "data_hash",
        "code_sha256",
        "version",
        "torch",
        "dtype",
        "device",
        "seed",
    ),
    *("backend", "threads", "chunk", "batch_tokens", "model", "core", "memory", "parameters", "truncate"),
}


def test_rows_come_in_order_as_strict_json_with_all_provenance(tiny, split):
    rows = evaluate(tiny, split, SMALL)
    order = ["nested", "nested", *["position"] * 4, "summary", "fixed", "fixed", "summary"]
    assert [row["kind"] for row in rows] == [*order, "junk", "junk", "summary", "needle", "needle"]
    for row in rows:
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        stamp = row["provenance"]
        assert set(stamp) == PROVENANCE
        assert stamp["dtype"] == "float32" and len(stamp["weights_sha256"]) == len(stamp["code_sha256"]) == 64
        assert row["suite"] == "lengths" and len(row["key"]) == 16


def test_two_evaluations_agree(tiny, split):
    assert evaluate(tiny, split, SMALL) == evaluate(tiny, split, SMALL)


def test_results_are_kept_and_not_measured_again(tiny, split, tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    rows = evaluate(tiny, split, SMALL, results=path)
    assert read_rows(path) == rows
    monkeypatch.setattr(tiny.model, "forward", None)
    assert evaluate(tiny, split, SMALL, results=path) == rows


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tiny, split, tmp_path):
    path, seen = tmp_path / "results.jsonl", []

    def stop(what, done, total):
        seen.append(what)
        if what == "junk stream":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny, split, SMALL, stop, path)
    assert {row["kind"] for row in read_rows(path)} == {"nested", "position", "summary", "fixed"}
    assert evaluate(tiny, split, SMALL, results=path) == evaluate(tiny, split, SMALL)


def test_rows_of_other_weights_stay_in_the_file(tiny, split, tmp_path):
    path = tmp_path / "results.jsonl"
    write_rows(path, [{"kind": "nested", "key": "other"}])
    rows = evaluate(tiny, split, SMALL, results=path)
    assert read_rows(path) == [{"kind": "nested", "key": "other"}, *rows]


def test_progress_ends_at_the_total_of_each_measure(tiny, split):
    seen = {}
    evaluate(tiny, split, SMALL, lambda what, done, total: seen.__setitem__(what, (done, total)))
    assert list(seen) == ["nested prefixes", "fixed targets", "junk stream", "needles at 96", "needles at 128"]
    assert all(done == total for done, total in seen.values())


def test_lengths_without_text_are_named_and_needles_still_have_them(tiny, make_split):
    rows = evaluate(tiny, make_split([100, 40]), EvaluationConfig((96, 160), 2, 16, 1))
    losses = [row for row in rows if row["kind"] in ("nested", "fixed", "junk")]
    assert {row["length"] for row in losses} == {96}
    assert all(row["skipped_lengths"] == [160] for row in rows if row["kind"] == "summary")
    assert [row["length"] for row in rows if row["kind"] == "needle"] == [96, 160]


def test_whole_documents_only_when_asked(tiny, make_split):
    split = make_split([100, 40, 60])
    rows = evaluate(tiny, split, EvaluationConfig((96, 160), 2, 16, 0), joined=False)
    nested = [row for row in rows if row["kind"] == "nested"]
    assert [(row["length"], row["documents"], row["joined_documents"]) for row in nested] == [(96, 1, 0)]
    assert [row["length"] for row in rows if row["kind"] == "junk"] == [96, 160]


def test_a_split_shorter_than_the_first_length_is_refused(tiny, make_split):
    with pytest.raises(ValueError, match="has 50 tokens, less than the first length 96; choose shorter"):
        evaluate(tiny, make_split([30, 20]), SMALL)


def test_data_of_another_tokenizer_is_refused(tiny, make_split):
    other = train_bpe(["the cat sat on the mat"] * 5, 260)
    with pytest.raises(ValueError, match="another tokenizer"):
        provenance(tiny, make_split([10], other), 0)


def test_data_of_another_end_of_text_is_refused(tiny, split):
    split.eot = 0
    with pytest.raises(ValueError, match="end-of-text is id 0, the tokenizer's 256"):
        provenance(tiny, split, 0)


@pytest.mark.parametrize(
    ("impossible", "complaint"),
    [
        (EvaluationConfig((96,), 3, 97, 0), "97 target tokens"),
        (EvaluationConfig((80, 96), 3, 16, 1), "length 80 has no"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(tiny, split, impossible, complaint):
    def never(what, done, total):
        raise AssertionError(what)

    with pytest.raises(ValueError, match=complaint):
        evaluate(tiny, split, impossible, never)


def test_the_weights_hash_is_of_the_file_or_else_of_the_values(tiny, tmp_path):
    before = weights_hash(tiny.model, None)
    assert before == weights_hash(tiny.model, tmp_path)
    weight = next(tiny.model.parameters())
    with torch.no_grad():
        old = weight.clone()
        weight.view(-1)[0] += 1
        assert weights_hash(tiny.model, None) != before
        weight.copy_(old)
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert weights_hash(tiny.model, tmp_path) == sha


def test_a_results_file_with_a_broken_line_is_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind": "nested"}\n{"kind": \n')
    with pytest.raises(ValueError, match="line 2: not a result row"):
        read_rows(path)


def test_a_row_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.jsonl"
    write_rows(path, [{"loss": 1.0}])
    with pytest.raises(ValueError):
        write_rows(path, [{"loss": float("nan")}])
    assert read_rows(path) == [{"loss": 1.0}]


def test_prepared_text_is_evaluated_as_it_is(tiny, tmp_path):
    text = "".join(f"def function_{i}(x):\n    return x + {i}\n\n" for i in range(80))
    for name in range(12):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.py").write_text(f"# file {name}\n{text}")
    prepare(tmp_path / "texts", tmp_path / "data", Preparation(tokenizer="bytes", validation_share=0.3))
    token_set = TokenSet.open(tmp_path / "data", "validation")
    rows = evaluate(tiny, token_set, SMALL)
    assert {row["kind"] for row in rows} == {"nested", "position", "fixed", "junk", "needle", "summary"}
    nested = next(row for row in rows if row["kind"] == "nested")
    assert nested["provenance"]["data_hash"] == token_set.hash and nested["joined_documents"] == 0


def test_a_results_file_that_is_not_text_is_named_and_left(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: not a file of result rows"):
        read_rows(path)


def test_rows_that_cannot_be_written_name_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"rows\.jsonl: cannot be written: "):
        write_rows(tmp_path / "file" / "rows.jsonl", [{"loss": 1.0}])


def test_needles_are_told_with_their_number_and_interval():
    shares = {"token_accuracy": 1.0, "token_low": 0.7, "token_high": 1.0}
    shares |= {"exact_accuracy": 1.0, "exact_low": 0.34, "exact_high": 1.0}
    [cells] = table([{"kind": "needle", "length": 64, "trials": 2} | shares])
    assert cells == ["64", "–", "–", "100% [70%, 100%] of 10", "100% [34%, 100%] of 2"]


def test_measurements_keep_the_names_and_specifications_under_which_rows_are_on_disk(tiny, split):
    texts = {"lengths": [96, 128], "documents": 3}
    assert [(one.name, one.spec) for one in plan(OwnModel(tiny), split, SMALL)] == [
        ("nested prefixes", texts | {"joined": True, "measure": "nested"}),
        ("fixed targets", texts | {"joined": True, "measure": "fixed", "targets": 16}),
        ("junk stream", texts | {"measure": "junk"}),
        ("needles at 96", {"measure": "needle", "length": 96, "trials": 2}),
        ("needles at 128", {"measure": "needle", "length": 128, "trials": 2}),
    ]


@pytest.mark.parametrize("policy", ["shadows", "top_pages page=4 k=1 window=4"])
def test_rows_tell_what_a_selection_policy_has_read_and_what_is_certain_of_it(tiny, split, policy):
    select(tiny.model, policy)
    try:
        rows = evaluate(tiny, split, SMALL)
    finally:
        select(tiny.model, None)
    for row in rows:
        assert 0 < row["keys_read"] < 1
        assert row["provenance"]["selection"].startswith(policy.split()[0])
        certain = [row.get(f"certificate_{what}") for what in ("direction", "magnitude")]
        if policy == "shadows":
            assert all(0 < x <= within for x, within in zip(certain, (0.05, 0.02), strict=True))
        else:
            assert certain == [None, None]
    assert "keys_read" not in evaluate(tiny, split, SMALL)[0]
