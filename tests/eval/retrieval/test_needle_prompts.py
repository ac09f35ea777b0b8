"""Needles, token by token: where they stand, what is asked, and that trials are pairs."""

import numpy as np
import pytest

from atma.eval.retrieval.haystacks import haystack
from atma.eval.retrieval.needles import NEEDLES, Writer, draw, needle_prompt
from atma.eval.retrieval.prompts import Encoder

KINDS = ("synthetic", "prose")


class Bench:
    """Prompts of one tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer, self.writer = tokenizer, Writer(Encoder(tokenizer))
        self.texts = {kind: haystack(kind, tokenizer) for kind in KINDS}

    def prompt(self, task, length=400, depth=50, index=0, kind="prose", absent=False):
        depth = None if task in ("multivalue", "multiquery") else depth
        return needle_prompt(self.writer, task, self.texts[kind], draw(7, index), length, depth, absent)

    def text(self, prompt):
        return self.tokenizer.decode(prompt.ids[1:].tolist())


@pytest.fixture(scope="module")
def bench(tokenizer):
    return Bench(tokenizer)


@pytest.fixture(scope="module")
def in_bytes(byte_level):
    return Bench(byte_level)


@pytest.mark.parametrize("task", NEEDLES)
@pytest.mark.parametrize("length", [600, 1000, 4096])
def test_a_length_counts_every_token_in_any_tokenizer(bench, task, length):
    for index in range(4):
        prompt = bench.prompt(task, length, index=index)
        assert len(prompt.ids) == length and prompt.ids[0] == bench.tokenizer.eot
        assert (prompt.ids[1:] != bench.tokenizer.eot).all()


@pytest.mark.parametrize("task", NEEDLES)
def test_every_answer_stands_after_its_cue_as_it_does_in_the_needle(bench, task):
    prompt = bench.prompt(task, 1200)
    text, drawn = bench.text(prompt), draw(7, 0)
    assert len(prompt.asks) == (4 if task in ("multivalue", "multiquery") else 1)
    for ask in prompt.asks:
        answer = bench.tokenizer.decode(prompt.ids[ask.start : ask.stop].tolist())
        assert answer.strip() == ask.outputs[0] and ask.stop - ask.start == 5
        cue = bench.tokenizer.decode(prompt.ids[ask.start - 12 : ask.start].tolist())
        assert text.count(cue[-6:] + answer) == 2
    assert prompt.asks[-1].stop == 1200
    if task != "passkey":
        assert f" The access code for record {drawn.records[0]} is" in text


def test_the_byte_layout_is_eot_haystack_needle_haystack_cue_value(in_bytes):
    prompt, drawn = in_bytes.prompt("passkey", 300, depth=50), draw(7, 0)
    value = "".join(map(str, drawn.values[0]))
    needle = f" The pass key is {value}"
    text = in_bytes.text(prompt)
    assert text.endswith(needle) and text.count(needle) == 2
    size = 300 - 1 - 2 * len(needle)
    first, second = text[: text.index(needle)], text[text.index(needle) + len(needle) : -len(needle)]
    place = in_bytes.texts["prose"].end(drawn.end)
    assert first + second == in_bytes.tokenizer.decode(in_bytes.texts["prose"].take(place - size, size).tolist())
    assert abs(len(first) - size / 2) <= size // 32 and second[0] in " \n"


@pytest.mark.parametrize("depth", [0, 10, 50, 90, 100])
def test_a_needle_stands_within_reach_of_its_depth(bench, depth):
    prompt = bench.prompt("niah", 4096, depth)
    fact = bench.writer.facts("niah", draw(7, 0))[0]
    needle = [*fact.cue, *fact.value]
    size = 4096 - 1 - 2 * len(needle)
    ids = prompt.ids.tolist()
    place = next(i for i in range(len(ids)) if ids[i : i + len(needle)] == needle) - 1
    assert abs(place - size * depth / 100) <= (64 if 0 < depth < 100 else 0)


def test_a_trial_is_the_same_at_every_depth_length_and_count(bench):
    ends = [bench.prompt("niah", length, depth).ids[-300:] for length in (2000, 3000) for depth in (10, 50)]
    assert all((end == ends[0]).all() for end in ends)
    assert draw(7, 3) == draw(7, 3) != draw(7, 4) and draw(8, 3) != draw(7, 3)
    one = draw(7, 3)
    assert len(set(one.records)) == len(set(one.values)) == 4


def test_an_absent_needle_leaves_text_and_the_same_end(bench):
    present, absent = (bench.prompt("niah", 800, 50, absent=absent) for absent in (False, True))
    assert len(absent.ids) == 800 and absent.asks == present.asks
    [answer] = present.asks[0].outputs
    assert bench.text(present).count(answer) == 2 and bench.text(absent).count(answer) == 1
    assert (present.ids[-300:] == absent.ids[-300:]).all()


def test_absent_of_many_keys_is_the_one_that_is_asked(in_bytes):
    text, drawn = in_bytes.text(in_bytes.prompt("multikey", 900, absent=True)), draw(7, 0)
    counts = [text.count("".join(map(str, value))) for value in drawn.values]
    assert counts == [1, 1, 1, 1] and text.count(drawn.records[0]) == 1
    assert not text[:-60].count(drawn.records[0])


def test_many_values_are_asked_in_the_order_in_which_they_stand(bench):
    """Also where a short haystack has one place for two of them, as it has for some of these trials."""
    for index in range(100):
        prompt = bench.prompt("multivalue", 480, index=index, kind="synthetic")
        text = bench.tokenizer.decode(prompt.ids[1 : prompt.asks[0].start].tolist())
        first = [text.index(f"is {ask.outputs[0]}") for ask in prompt.asks]
        assert first == sorted(first)


def test_a_haystack_is_tokenised_once_whatever_is_built_from_it(tokenizer, monkeypatch):
    bench = Bench(tokenizer)
    sizes = []
    encode = tokenizer.encode_many
    monkeypatch.setattr(tokenizer, "encode_many", lambda texts: sizes.extend(map(len, texts)) or encode(texts))
    prompt = bench.prompt("niah", 1 << 20)
    assert len(prompt.ids) == 1 << 20 and sum(sizes) < 200


def test_a_length_without_room_is_refused(in_bytes):
    with pytest.raises(ValueError, match="fixed parts alone take 89 tokens"):
        in_bytes.prompt("niah", 89)
    assert len(in_bytes.prompt("niah", 90).ids) == 90


def test_rows_of_a_task_have_answers_in_the_same_places(bench):
    found = [bench.prompt("passkey", 512, 10, index) for index in range(5)]
    assert len({prompt.asks[0].start for prompt in found}) == 1
    assert len({tuple(np.asarray(prompt.ids[-5:])) for prompt in found}) == 5
