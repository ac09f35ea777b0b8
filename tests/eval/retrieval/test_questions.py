"""Questions from a SQuAD or a HotpotQA file."""

import json
from pathlib import Path

import pytest

from atma.eval.retrieval import Maker, Retrieval
from atma.eval.retrieval.questions import read_hotpot, read_squad

COLOURS = ("red", "green", "blue", "white")


def squad(path: Path) -> Path:
    paragraphs = [
        {
            "context": f"The lamp of house {i} is {colour}.",
            "qas": [
                {"question": f"Which colour is lamp {i}? ", "answers": [{"text": colour}, {"text": colour}]},
                {"question": "Who lit it?", "answers": [], "is_impossible": True},
            ],
        }
        for i, colour in enumerate(COLOURS)
    ]
    path.write_text(json.dumps({"version": "2.0", "data": [{"title": "Lamps", "paragraphs": paragraphs}]}))
    return path


def hotpot(path: Path) -> Path:
    context = [[f"Title {i}", [f"First of {i}.", f" Second of {i}."]] for i in range(5)]
    row = {"question": "Which?", "answer": "Second of 3", "context": context}
    path.write_text(json.dumps([row | {"supporting_facts": [["Title 1", 0], ["Title 3", 1], ["Title 3", 0]]}]))
    return path


def test_squad_questions_have_their_paragraph_and_distinct_answers(tmp_path):
    found = read_squad(squad(tmp_path / "s.json"))
    assert len(found.questions) == 4 and len(found.pool) == 4
    assert found.questions[1] == ("Which colour is lamp 1?", ("green",), ("The lamp of house 1 is green.",))


def test_hotpot_questions_have_the_passages_of_their_supporting_facts(tmp_path):
    [question] = read_hotpot(hotpot(tmp_path / "h.json")).questions
    assert question.passages == ("Title 1\nFirst of 1. Second of 1.", "Title 3\nFirst of 3. Second of 3.")


def test_prompts_are_made_of_a_file_and_rows_know_it(tmp_path, byte_level):
    files = {"squad": squad(tmp_path / "s.json"), "hotpot": hotpot(tmp_path / "h.json")}
    maker = Maker(Retrieval(tasks=("qa_1", "qa_2"), lengths=(900,), **files), byte_level)
    for setting, needed in zip(maker.settings, (1, 2), strict=True):
        [prompt] = maker.prompts(setting, 900, range(1))
        text = byte_level.decode(prompt.ids[1 : prompt.asks[0].start].tolist())
        assert prompt.asks[0].start + prompt.asks[0].room == 900
        passages = maker.passages[setting.task]
        asked = next(q for q in passages.questions if q.text in text)
        assert len(asked.passages) == needed and all(passage in text for passage in asked.passages)
        assert prompt.asks[0].outputs == asked.answers and text.count("\nPassage ") > 4
        assert maker.hashes(setting)["questions_sha256"] == passages.sha256


@pytest.mark.parametrize("read", [read_squad, read_hotpot])
@pytest.mark.parametrize(("text", "complaint"), [("{", "not a JSON file"), ("[1]", "not a"), ('{"data": 3}', "not a")])
def test_another_file_is_refused(tmp_path, read, text, complaint):
    path = tmp_path / "q.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read(path)
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path / "none.json")


@pytest.mark.parametrize("answer", [5, None])
def test_an_answer_that_is_no_text_is_refused(tmp_path, answer):
    for read, path in ((read_squad, squad(tmp_path / "s.json")), (read_hotpot, hotpot(tmp_path / "h.json"))):
        text = path.read_text()
        for right in ('"green"', '"Second of 3"'):
            text = text.replace(right, json.dumps(answer))
        path.write_text(text)
        with pytest.raises(ValueError, match=f"must be texts, not {answer}"):
            read(path)


def test_an_empty_answer_is_none(tmp_path):
    """Every text holds it, so it would always be right."""
    path = squad(tmp_path / "s.json")
    path.write_text(path.read_text().replace('"answers": [{"text": "green"}', '"answers": [{"text": " "}'))
    assert [answer for question in read_squad(path).questions for answer in question.answers] == list(COLOURS)
    path.write_text(path.read_text().replace('{"text": "green"}', '{"text": ""}'))
    assert [question.answers[0] for question in read_squad(path).questions] == ["red", "blue", "white"]


def test_a_file_without_questions_is_refused(tmp_path):
    (tmp_path / "q.json").write_text('{"data": []}')
    with pytest.raises(ValueError, match="no question"):
        read_squad(tmp_path / "q.json")
