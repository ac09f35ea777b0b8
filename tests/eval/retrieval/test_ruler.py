"""The thirteen tasks: as long as asked for in any tokenizer, and each with an answer that its text holds."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from atma.eval.retrieval import Maker, Retrieval, exported
from atma.eval.retrieval.ruler import RULER

WITHIN = 32
FIELDS = ("index", "task", "haystack", "target", "length", "input", "outputs", "any", "room", "seed")


@pytest.fixture(scope="module")
def maker(tokenizer):
    return Maker(Retrieval(preset="ruler", per_cell=2, lengths=(4096, 6000)), tokenizer)


@pytest.fixture(scope="module")
def in_bytes(byte_level):
    return Maker(Retrieval(preset="ruler", per_cell=2, lengths=(8192,)), byte_level)


def trial(maker, task, length=8192, index=0):
    """The text of a trial and what is asked for."""
    setting = next(setting for setting in maker.settings if setting.task == task)
    [prompt] = maker.prompts(setting, length, range(index, index + 1))
    [ask] = prompt.asks
    return maker.encoder.tokenizer.decode(prompt.ids[1 : ask.start].tolist()), ask, prompt


@pytest.mark.parametrize("task", RULER)
@pytest.mark.parametrize("length", [4096, 6000])
def test_a_text_and_its_answer_take_the_length_asked_for(maker, task, length):
    text, ask, prompt = trial(maker, task, length, 1)
    assert 0 <= length - (ask.start + ask.room) < WITHIN
    assert abs(1 + len(maker.encoder.tokenizer.encode(text)) + ask.room - length) <= WITHIN
    assert ask.stop == len(prompt.ids) and ask.room >= ask.stop - ask.start


@pytest.mark.parametrize("task", RULER)
def test_the_question_is_the_same_in_every_tokenizer_and_at_every_length(maker, in_bytes, task):
    text, ask, _ = trial(maker, task, 6000)
    theirs, other, _ = trial(in_bytes, task)
    assert ask.outputs == other.outputs
    assert text[text.rindex("Question:") :] == theirs[theirs.rindex("Question:") :]


@pytest.mark.parametrize("task", [task for task in RULER if task.startswith("niah")])
def test_the_answers_are_the_values_of_the_keys_asked_for(in_bytes, task):
    text, ask, _ = trial(in_bytes, task)
    told = re.findall(r"The secret (?:number|code) for (\S+) is (\S+)\.", text)
    question = text[text.rindex("Question:") :]
    assert [value for key, value in told if re.search(rf"\b{key}\b", question)] != []
    assert {value for key, value in told if re.search(rf"\b{key}\b", question)} == set(ask.outputs)
    expected = {"niah_multivalue": (4, 1), "niah_multiquery": (4, 4), "niah_multikey_1": (1, 4)}
    count, keys = expected.get(task, (1, None))
    assert len(ask.outputs) == count
    assert len({key for key, _ in told}) == keys if keys else True
    if task in ("niah_multikey_2", "niah_multikey_3"):
        assert len(told) > 50 and len({key for key, _ in told}) == len(told)


def test_following_the_assignments_gives_the_variables(in_bytes):
    text, ask, _ = trial(in_bytes, "vt")
    body = text[text.index("Text:") :]
    held = {}
    for name, of in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})\.", body):
        held[name] = held.get(of, of)
    value = re.findall(r"hold the value (\d+)\?", body)[-1]
    assert [name for name in held if held[name] == value] == list(ask.outputs) and len(ask.outputs) == 5


def test_the_common_words_are_the_most_common(in_bytes):
    text, ask, _ = trial(in_bytes, "cwe")
    listed = re.findall(r"(\d+)\. (\w+)", text[text.index("List:") : text.rindex("Question:")])
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counts = Counter(word for _, word in listed)
    assert {word for word, _ in counts.most_common(10)} == set(ask.outputs)
    assert {counts[word] for word in ask.outputs} == {30} and max(counts[w] for w in counts.keys() - ask.outputs) == 3


def test_a_short_list_has_fewer_of_each(in_bytes):
    text, ask, _ = trial(in_bytes, "cwe", 4096)
    counts = Counter(word for _, word in re.findall(r"(\d+)\. (\w+)", text[text.index("List:") :]))
    assert {counts[word] for word in ask.outputs} == {6}


def test_the_frequent_words_fall_as_the_square_of_their_rank(in_bytes):
    text, ask, _ = trial(in_bytes, "fwe")
    counts = Counter(re.findall(r" ([a-z]{6})(?= )", text[text.index("Text:") : text.rindex("\n")]))
    (_, second), (_, third), (_, fourth) = counts.most_common(3)
    assert [word for word, _ in counts.most_common(3)] == list(ask.outputs)
    assert second / third == pytest.approx(9 / 4, rel=0.05) and third / fourth == pytest.approx(16 / 9, rel=0.05)


def test_one_passage_answers_the_first_kind_of_question_and_two_the_second(in_bytes):
    text, ask, _ = trial(in_bytes, "qa_1")
    passages = [one.strip() for one in re.split(r"Passage \d+:\n", text[: text.rindex("Question:")])]
    name = re.findall(r"[A-Z][a-z]+", text[text.rindex("Question:") + 12 :])
    assert sum(ask.outputs[0] in one and any(one.startswith(n) for n in name) for one in passages) == 1
    text, ask, _ = trial(in_bytes, "qa_2")
    [ship] = re.findall(r"the ship (\w+) was built", text[text.rindex("Question:") :])
    [town] = re.findall(rf"The ship {ship} was built in (\w+)\.", text)
    [passage] = re.findall(rf"\n({town} is a town .*)", text)
    assert ask.outputs[0] in passage and ask.any


def test_a_million_tokens_have_room_for_distinct_keys(in_bytes):
    text, _, _ = trial(in_bytes, "niah_multikey_2", 1 << 20)
    keys = re.findall(r"The secret number for (\S+) is", text)
    assert len(keys) > 15_000 and len(set(keys)) == len(keys)


def test_a_length_without_room_names_length_and_task(in_bytes):
    for task, why in (("cwe", "10 words"), ("qa_2", "room for the 2 things"), ("vt", "alone take")):
        with pytest.raises(ValueError, match=f"length 500 has no room for {task}: .*{why}"):
            trial(in_bytes, task, 500)


PROGRAM = """
import sys
from pathlib import Path
from atma.eval.retrieval import Maker, Retrieval, exported
from atma.tokenizer import byte_tokenizer
suite = Retrieval(preset="ruler", lengths=(4096,), per_cell=1, tasks=tuple(sys.argv[2:]))
exported(Maker(suite, byte_tokenizer()), Path(sys.argv[1]))
"""


def test_the_same_seed_gives_the_same_bytes_in_any_process(tmp_path):
    digests = []
    for seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        path = tmp_path / f"{seed}.jsonl"
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(path), *RULER, "passkey", "niah"], env=environment, check=True
        )
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert digests == ["9d2e8611a3af48e72bc2e1f3dda6d771599bffea3b7423a1d69eea1e44dc5e19"] * 2


def test_an_export_has_a_line_a_question(tmp_path, byte_level):
    suite = Retrieval(tasks=("niah_single_1", "multiquery"), haystacks=("prose",), lengths=(900,), per_cell=2, seed=3)
    maker = Maker(suite, byte_level)
    assert exported(maker, tmp_path / "deep" / "p.jsonl") == 2 * 1 + 2 * 4
    lines = [json.loads(line) for line in (tmp_path / "deep" / "p.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["niah_single_1"] * 2 + ["multiquery"] * 8
    assert [line["index"] for line in lines] == [0, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    for line in lines:
        assert tuple(line) == FIELDS
        assert line["target"] == 900 and line["seed"] == 3
        assert line["length"] == 1 + len(line["input"].encode()) + line["room"] <= 900
    assert lines[5]["length"] == 900 and lines[2]["outputs"][0] in lines[3]["input"]
