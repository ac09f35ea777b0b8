"""The suite: its presets, its rows, what it promises to comparisons, and its command."""

import json
from dataclasses import replace

import numpy as np
import pytest

from atma.checkpoint import save_model
from atma.cli import main
from atma.eval import needle
from atma.eval.compare import compare
from atma.eval.hugging_face import HuggingFace
from atma.eval.language_model import OwnModel, Scored
from atma.eval.retrieval import PRESETS, Maker, Retrieval, settings, suite
from atma.eval.retrieval.haystacks import haystack
from atma.eval.retrieval.heat_map import page
from atma.eval.retrieval.prompts import Ask
from atma.eval.retrieval.ruler import RULER
from atma.eval.retrieval.scoring import forced, found_share, free
from atma.eval.suite import run
from atma.loading import load
from atma.model import Model
from atma.tokenizer import byte_tokenizer

SMALL = Retrieval(lengths=(500,), per_cell=3, haystacks=("prose",), depths=(10, 90))


def test_stage_two_is_4800_trials_of_a_model_and_24000_of_the_papers_five():
    chosen = Retrieval(preset="stage-two")
    assert not any(setting.absent for setting in settings(chosen.grid()))
    assert chosen.trials() == {1024 << i: 50 for i in range(1, 9)}
    assert {setting.task for setting in settings(chosen.grid())} == {"passkey", "niah"}
    assert chosen.cells() == 2 * 2 * 3
    assert 5 * chosen.cells() * sum(chosen.trials().values()) == 24_000


def test_induction_is_sixteen_trials_from_2k_to_64k_with_their_baseline():
    chosen = Retrieval(preset="induction")
    assert chosen.trials() == {2048 << i: 16 for i in range(6)}
    assert [(setting.task, setting.absent) for setting in settings(chosen.grid())] == [
        ("induction", False),
        ("induction", True),
    ]


def test_ruler_is_thirteen_tasks_by_free_writing():
    made = settings(PRESETS["ruler"])
    assert [setting.task for setting in made] == list(RULER) and len(RULER) == 13
    assert {setting.scoring for setting in made} == {"greedy"} and all(setting.depth is None for setting in made)


def test_a_perfect_copier_finds_every_needle_and_none_that_is_absent(finder):
    tasks = ("passkey", "niah", "multikey", "multiquery", "induction")
    rows = run(replace(SMALL, tasks=tasks), finder)
    assert {row["task"] for row in rows} == set(tasks)
    for row in rows:
        if row["kind"] == "retrieval":
            assert row["exact_accuracy"] == row["token_accuracy"] == 1.0 and row["outcomes"] == [1, 1, 1]
            assert row["cross_entropy"] == 0.0
        else:
            assert row["exact_accuracy"] == 0.0 and row["token_accuracy"] < 0.5


def test_writing_freely_finds_exactly_the_trials_that_are_right_token_for_token(finder):
    tasks = ("niah", "multikey", "multivalue", "multiquery")
    rows = run(replace(SMALL, tasks=tasks, scoring="both", baseline="off", depths=(50,)), finder)
    forced, free = ([row for row in rows if row["scoring"] == name] for name in ("forced", "greedy"))
    assert [row["task"] for row in forced] == [row["task"] for row in free] == list(tasks)
    assert [row["outcomes"] for row in forced] == [row["outcomes"] for row in free]
    assert [row["prompts_sha256"] for row in forced] == [row["prompts_sha256"] for row in free]
    [values] = [row for row in free if row["task"] == "multivalue"]
    assert values["exact_accuracy"] == 0.0 and 0 < values["recall"] < 1 and len(values["written"]) == 3


class Speller:
    """Writes the value in the tokens of its own tokenizer, however the needle spells it."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.ids = tokenizer, tokenizer.encode(f" {prompt.asks[0].outputs[0]}")

    def generate(self, prompt, most):
        return self.ids[:most]

    def predict(self, tokens, last, progress=None):
        wanted = (self.ids + [self.tokenizer.eot] * last)[:last]
        right = tokens[:, -last:].numpy() == np.array([wanted])
        return Scored(np.where(right, 0.0, 10.0), right)


def test_a_free_answer_counts_however_it_is_spelled_and_a_forced_one_as_five_digits(joins_digits):
    maker = Maker(replace(SMALL, tasks=("niah",), haystacks=("synthetic",)), joins_digits)
    [prompt] = maker.prompts(maker.settings[0], 500, range(1))
    speller = Speller(joins_digits, prompt)
    assert len(speller.ids) < 5
    assert free(speller, prompt).exact and forced(speller, [prompt])[0].right == 0


def test_texts_are_found_whatever_their_case():
    ask = Ask(0, 0, 9, ("Red", "blue"))
    assert found_share("it was RED, then red", ask) == 0.5 and found_share("blue red", ask) == 1.0
    assert found_share("some blue", ask._replace(any=True)) == 1.0 and found_share("", ask) == 0.0


def test_all_tasks_of_ruler_are_measured_either_way(tiny):
    chosen = Retrieval(
        preset="ruler", lengths=(2400,), per_cell=1, scoring="both", tasks=("niah_single_3", "vt", "qa_1")
    )
    seen = {}
    rows = run(chosen, OwnModel(tiny), progress=lambda what, done, total: seen.__setitem__(what, (done, total)))
    assert [(row["task"], row["scoring"]) for row in rows[:2]] == [
        ("niah_single_3", "forced"),
        ("niah_single_3", "greedy"),
    ]
    assert len(rows) == 6 and all(json.loads(json.dumps(row, allow_nan=False)) == row for row in rows)
    assert len(seen) == 3 and all(done == total for done, total in seen.values())


def test_progress_sums_to_the_tokens_of_each_measurement(finder, monkeypatch):
    monkeypatch.setattr(suite, "AT_ONCE", 1000)
    chosen = replace(SMALL, tasks=("niah", "multiquery"), scoring="both", depths=(50,))
    for measurement in chosen.measurements(finder, chosen.trials()):
        told = []
        measurement.run(told.append)
        assert sum(told) == measurement.tokens and min(told) >= 0


def test_rows_do_not_depend_on_how_many_trials_are_held_at_once(finder, monkeypatch):
    rows = run(SMALL, finder)
    monkeypatch.setattr(suite, "AT_ONCE", 500)
    assert run(SMALL, finder) == rows


def test_fewer_trials_are_the_first_of_more(finder):
    few, many = (run(replace(SMALL, tasks=("multikey",), per_cell=n), finder) for n in (2, 4))
    assert [row["outcomes"] for row in few] == [row["outcomes"][:2] for row in many]


def test_models_of_two_tokenizers_are_compared_in_pairs(make_finder):
    chosen = replace(SMALL, tasks=("niah", "niah_single_2"), lengths=(1600,), scoring="forced", baseline="off")
    first, second = (run(chosen, make_finder(one, "m")) for one in (byte_tokenizer(), load("nano").tokenizer))
    assert [row["trials_sha256"] for row in first] == [row["trials_sha256"] for row in second]
    assert all(a["prompts_sha256"] != b["prompts_sha256"] for a, b in zip(first, second, strict=True))
    wrong = [row | {"outcomes": [0] * 3, "exact_accuracy": 0.0} for row in second]
    changes = [change for change in compare(first, wrong).changes if change.metric == "exact_accuracy"]
    assert changes and all(", p = " in change.chance for change in changes)


def test_induction_is_the_needle_of_the_lengths_suite(tiny):
    rows = run(Retrieval(preset="induction", haystacks=("prose",), lengths=(128,), per_cell=5), OwnModel(tiny))
    [theirs] = needle(OwnModel(tiny), haystack("prose", tiny.tokenizer).ids, [128], 5, seed=1234)
    for row, prefix in zip(rows, ("", "absent_"), strict=True):
        for name in ("token_accuracy", "exact_accuracy", "cross_entropy", "token_low", "exact_high"):
            assert row[name] == pytest.approx(theirs[prefix + name], abs=1e-12)


def test_what_does_not_fit_is_said_before_anything_is_read(finder):
    with pytest.raises(ValueError, match="length 150 has no room for multikey: its fixed parts alone"):
        run(Retrieval(lengths=(150, 4096), haystacks=("prose",)), finder)
    finder.longest = 1024
    with pytest.raises(ValueError, match="4096 tokens pass the 1024 positions that finder"):
        run(Retrieval(lengths=(512, 4096), haystacks=("prose",)), finder)
    finder.longest = None
    with pytest.raises(ValueError, match=r"^length 50 has no room for a needle"):
        run(Retrieval(preset="induction", lengths=(50,), haystacks=("prose",)), finder)
    assert finder.read == 0


def test_another_error_is_not_told_as_want_of_room(byte_level, monkeypatch):
    maker = Maker(replace(SMALL, tasks=("niah", "vt")), byte_level)
    monkeypatch.setattr(maker.encoder, "many", lambda texts: int("a word"))
    for setting in maker.settings:
        with pytest.raises(ValueError, match=r"^invalid literal"):
            maker.prompts(setting, 4096, range(1))


def test_a_trial_that_does_not_fit_is_told_before_the_first_is_read(finder):
    """The first two questions of this seed have room at this length, the third has not."""
    chosen = Retrieval(preset="ruler", tasks=("qa_1",), lengths=(343,), scoring="forced")
    assert len(run(replace(chosen, per_cell=2), finder)) == 1
    before = finder.read
    with pytest.raises(ValueError, match="length 343 has no room for qa_1"):
        run(replace(chosen, per_cell=3), finder)
    assert finder.read == before


def test_a_model_of_transformers_is_measured_in_the_same_way():
    transformers = pytest.importorskip("transformers", reason="pip install 'atma-lm[hf]'")
    shape = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**shape, intermediate_size=64, bos_token_id=256, eos_token_id=256)
    model = HuggingFace(transformers.AutoModelForCausalLM.from_config(config), byte_tokenizer(), "tiny")
    rows = run(replace(SMALL, tasks=("niah", "niah_single_2"), lengths=(900,), scoring="both", depths=(50,)), model)
    assert [(row["kind"], row["scoring"]) for row in rows] == [
        ("retrieval", "forced"),
        ("retrieval", "greedy"),
        ("absent", "forced"),
        ("retrieval", "forced"),
        ("retrieval", "greedy"),
    ]
    assert rows[0]["outcomes"] == rows[1]["outcomes"] and rows[0]["cross_entropy"] > 4
    assert rows[0]["trials_sha256"] == run(replace(SMALL, tasks=("niah",), lengths=(900,)), model)[0]["trials_sha256"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tasks": ("niha",)}, "no retrieval task 'niha'; known: induction, passkey"),
        ({"tasks": ("niah", "niah")}, "tasks must be distinct"),
        ({"lengths": (512, 256)}, "strictly increasing"),
        ({"depths": (101,)}, "percentages from 0 to 100"),
        ({"per_cell": -1}, "must be 0 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Retrieval(**options)


def test_a_page_has_a_map_for_each_task_and_asks_the_network_for_nothing(finder, tmp_path):
    rows = run(replace(SMALL, tasks=("niah", "passkey", "multiquery"), lengths=(400, 600)), finder)
    text = page(rows, tmp_path / "deep" / "map.html", "atma <eval>").read_text()
    assert text.count("<figure>") == 3 and "atma &lt;eval&gt;" in text
    assert "default-src 'none'" in text and '<link rel="stylesheet"' not in text and 'src="http' not in text
    assert "100.0% [43.9%, 100.0%] of 3" in text and "Without the needle at most" in text
    figures = [json.loads(part.split("</script>")[0]) for part in text.split('id="f0d">')[1:]]
    [trace] = figures[0]["data"]
    assert trace["type"] == "heatmap" and trace["y"] == ["depth 10%", "depth 90%"] and np.shape(trace["z"]) == (2, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    path = tmp_path_factory.mktemp("models") / "tiny"
    assert isinstance(tiny.model, Model)
    save_model(path, tiny.model, byte_tokenizer(), {})
    return path


def test_the_command_measures_shows_and_writes(folder, tmp_path, capsys):
    options = ["--tasks", "niah", "vt", "--haystacks", "synthetic", "--lengths", "1000", "--per-cell", "2"]
    files = ["--out", str(tmp_path / "r.jsonl"), "--page", str(tmp_path / "m.html")]
    assert main(["eval", "retrieval", "--model", str(folder), *options, *files]) == 0
    said = capsys.readouterr().out
    assert "niah, synthetic, depth 50%" in said and "8 trials" in said
    assert (tmp_path / "m.html").stat().st_size > 1 << 20
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 5


def test_the_command_writes_prompts_and_measures_nothing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(OwnModel, "predict", None)
    options = ["--preset", "ruler", "--lengths", "5000", "--per-cell", "1", "--prompts", str(tmp_path / "p.jsonl")]
    assert main(["eval", "retrieval", "--model", str(folder), *options]) == 0
    assert "13 prompts: " in capsys.readouterr().out
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 13


def test_a_mistake_is_one_line_and_status_2(folder, capsys):
    assert main(["eval", "retrieval", "--model", str(folder), "--lengths", "60"]) == 2
    assert "length 60 has no room for niah" in capsys.readouterr().err
