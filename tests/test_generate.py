"""Text generation: what is chosen, what is shown, and that an interruption changes nothing."""

import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

import atma
from atma.config import preset
from atma.generation import Generation, Settings, generate, stream
from atma.model import Model
from atma.sampling import choose
from atma.serve.engine import Engine
from atma.serve.request import Request, RequestError
from atma.serve.settings import EngineConfig
from atma.text_stream import TextStream
from atma.tokenizer import Tokenizer, byte_tokenizer

WORDS = byte_tokenizer()


def fresh_model(seed=0, **changes):
    """A byte model whose head is not zero, so that it has opinions."""
    generator = torch.Generator().manual_seed(seed)
    model = Model(dataclasses.replace(preset("nano-test"), **changes), generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and not parameter.any():
                parameter.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def model():
    return fresh_model()


def pick(logits, seen=(), seed=0, **changes):
    mask = torch.zeros(len(logits), dtype=torch.bool)
    mask[list(seen)] = True
    return choose(torch.tensor(logits), Settings(**changes), mask, torch.Generator().manual_seed(seed))


def picks(logits, draws=300, **changes):
    random, mask = torch.Generator().manual_seed(0), torch.zeros(len(logits), dtype=torch.bool)
    return [choose(torch.tensor(logits), Settings(**changes), mask, random) for _ in range(draws)]


def test_temperature_zero_takes_the_most_likely_token():
    assert pick([0.0, 3.0, 2.9], temperature=0) == 1


def test_draws_follow_the_probabilities():
    draws = picks([0.0, 1.0, 2.0], draws=20_000, temperature=0.5)
    expected = torch.tensor([0.0, 2.0, 4.0]).softmax(0)
    found = torch.bincount(torch.tensor(draws), minlength=3) / len(draws)
    five_sigma = 5 * (expected * (1 - expected) / len(draws)).sqrt()
    assert ((found - expected).abs() < five_sigma).all()


def test_top_k_keeps_the_k_most_likely():
    assert set(picks([1.0, 0.9, 0.8, 0.7], top_k=2, temperature=1.0)) == {0, 1}


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert set(picks(logits, top_p=0.7, temperature=1.0)) == {0, 1}
    assert set(picks(logits, top_p=0.01, temperature=1.0)) == {0}


def test_min_p_keeps_what_is_likely_beside_the_best():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert set(picks(logits, min_p=0.2, temperature=1.0)) == {0, 1, 2}
    assert set(picks(logits, min_p=1.0, temperature=1.0)) == {0}


def test_filters_keep_what_order_of_tokens_hides():
    assert set(picks([0.1, 5.0, 0.2, 5.1], top_k=2, temperature=1.0)) == {1, 3}


def test_repetition_penalty_lowers_positive_and_negative_logits_of_the_text():
    assert pick([2.0, 1.5], seen=[0], temperature=0, repetition_penalty=2.0) == 1
    assert pick([-1.0, -1.5], seen=[0], temperature=0, repetition_penalty=2.0) == 1
    assert pick([2.0, 1.5], seen=[0], temperature=0, repetition_penalty=1.0) == 0


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(temperature, bad):
    with pytest.raises(ValueError, match="not finite"):
        pick([0.0, bad], temperature=temperature)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("stop", ("",)),
        ("seed", -1),
        ("prefill_chunk", 0),
    ],
)
def test_an_impossible_setting_is_named(name, value):
    with pytest.raises(ValueError, match=f"'{name}' must be"):
        Settings(**{name: value})


def pushed(parts, stop=()):
    text = TextStream(stop)
    shown = []
    for part in parts:
        shown.append(text.push(part))
        if text.stopped:
            return shown
    return [*shown, text.flush()]


def test_half_a_character_is_never_shown():
    assert pushed([b"\xf0\x9f", b"\x8c\x8d", "é".encode()[:1], "é".encode()[1:], b"\xf0\x9f"]) == [
        "",
        "🌍",
        "",
        "é",
        "",
        "",
    ]


def test_bytes_that_are_no_text_become_one_replacement():
    assert "".join(pushed([b"a\xff", b"b"])) == "a\ufffdb"


def test_a_stop_string_across_tokens_ends_the_text_before_it():
    assert pushed([b"one E", b"N", b"D two"], ["END"]) == ["one ", "", ""]
    assert "".join(pushed([b"one E", b"N", b"d two"], ["END"])) == "one ENd two"


def expected_text(text, stops):
    """The definition: reading one character at a time, end before the first stop string that completes."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(
    text=st.text("aabé🌍", max_size=30),
    stops=st.lists(st.text("aabé🌍", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)
def test_cuts_between_tokens_do_not_change_the_text(text, stops, cuts):
    data = text.encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(edges)]
    assert "".join(pushed(parts, stops)) == expected_text(text, stops)


@given(
    text=st.text("aabé🌍", max_size=20),
    stops=st.lists(st.text("aab", min_size=1, max_size=3), max_size=2),
    cut=st.integers(0, 40),
)
def test_a_stream_goes_on_from_its_memory(text, stops, cut):
    data = text.encode()
    first, whole = TextStream(stops), TextStream(stops)
    shown = first.push(data[:cut])
    if not first.stopped:
        second = TextStream(stops, first.memory())
        shown += second.push(data[cut:])
        shown += second.flush()
    expected = whole.push(data)
    assert shown == expected + whole.flush()


def test_greedy_text_is_what_the_model_finds_most_likely(model):
    tokens = [WORDS.eot, *WORDS.encode("def f")]
    with torch.inference_mode():
        for _ in range(20):
            hidden, _ = model(torch.tensor([tokens]))
            tokens.append(int(model.logits(hidden[0, -1]).argmax()))
    generation = Generation(model, WORDS, Settings(max_tokens=20, temperature=0, ignore_end=True))
    generation.feed("def f")
    list(generation.write())
    assert generation.tokens == tokens


def test_equal_seeds_give_equal_text_and_others_do_not(model):
    texts = [generate(model, WORDS, "x", Settings(max_tokens=40, seed=seed, temperature=1.5)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_list_of_prompts_gives_each_its_own_text(model):
    chosen = Settings(max_tokens=10)
    assert generate(model, WORDS, ["a", "b"], chosen) == [generate(model, WORDS, p, chosen) for p in "ab"]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_prefill_in_any_chunks_gives_the_same_greedy_tokens(model, chunk):
    def tokens(size):
        generation = Generation(
            model, WORDS, Settings(max_tokens=8, temperature=0, prefill_chunk=size, ignore_end=True)
        )
        generation.feed("a line of a prompt\n" * 15)
        list(generation.write())
        return generation.tokens

    assert tokens(chunk) == tokens(256)


def test_a_text_outgrows_its_first_capacity(model):
    generation = Generation(model, WORDS, Settings(max_tokens=300, temperature=0, ignore_end=True))
    generation.feed("a")
    list(generation.write())
    with torch.inference_mode():
        hidden, _ = model(torch.tensor([generation.tokens[:-1]]))
        expected = int(model.logits(hidden[0, -1]).argmax())
    assert len(generation.tokens) == 302
    assert generation.tokens[-1] == expected


def test_streamed_pieces_are_the_text(model):
    chosen = Settings(max_tokens=60, seed=3, temperature=1.5)
    pieces = list(stream(model, WORDS, "x", chosen))
    assert "".join(pieces) == generate(model, WORDS, "x", chosen)
    assert all(pieces)


def test_padding_of_the_vocabulary_is_never_chosen():
    padded = fresh_model(vocab_size=320)
    with torch.no_grad():
        padded.head.bias[257:] = 100.0
    generation = Generation(padded, WORDS, Settings(max_tokens=20, ignore_end=True))
    generation.feed("x")
    list(generation.write())
    assert max(generation.tokens) <= 256


def ending_model():
    """A model that always finds end-of-text most likely, then "A"."""
    model = fresh_model()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias[WORDS.eot] = 9.0
        model.head.bias[ord("A")] = 5.0
    return model


def test_end_of_text_ends_the_text_unless_ignored():
    generation = Generation(ending_model(), WORDS, Settings(temperature=0))
    generation.feed("x")
    assert list(generation.write()) == []
    assert generation.ended == "end"
    generation.settings = Settings(temperature=0, ignore_end=True, max_tokens=3)
    list(generation.write())
    assert generation.ended == "length"


def test_a_stop_token_ends_the_text_without_being_in_it(model):
    chosen = Settings(max_tokens=20, temperature=0, ignore_end=True)
    whole = Generation(model, WORDS, chosen)
    whole.feed("x")
    list(whole.write())
    stop = whole.tokens[6]
    ended = Generation(model, WORDS, dataclasses.replace(chosen, stop_tokens=(stop,)))
    ended.feed("x")
    text = "".join(ended.write())
    assert ended.ended == "end"
    assert ended.tokens == whole.tokens[: whole.tokens.index(stop, 2) + 1]
    assert chr(stop) not in text


def test_a_stop_token_outside_the_vocabulary_is_an_error(model):
    with pytest.raises(ValueError, match="'stop_tokens': token 257 is outside the vocabulary of 257"):
        Generation(model, WORDS, Settings(stop_tokens=(5, 257)))
    with pytest.raises(ValueError, match="'stop_tokens' must be token ids"):
        Settings(stop_tokens=(-1,))


def test_a_stop_string_ends_the_text():
    model = ending_model()
    with torch.no_grad():
        model.head.bias[WORDS.eot] = 0.0
    generation = Generation(model, WORDS, Settings(temperature=0, stop=("AAA",), max_tokens=0))
    generation.feed("x")
    assert "".join(generation.write()) == ""
    assert (generation.ended, len(generation.tokens)) == ("stop", 5)


@settings(max_examples=8)
@given(first=st.integers(1, 30), penalty=st.sampled_from([1.0, 1.3]), temperature=st.sampled_from([0, 1.2]))
def test_a_saved_text_goes_on_as_if_never_interrupted(tmp_path_factory, first, penalty, temperature):
    model, path = fresh_model(), tmp_path_factory.mktemp("state") / "text.state"
    chosen = Settings(max_tokens=60, temperature=temperature, repetition_penalty=penalty, ignore_end=True, top_p=0.95)
    whole = Generation(model, WORDS, chosen)
    whole.feed("prompt é")
    text = "".join(whole.write())
    before = Generation(model, WORDS, dataclasses.replace(chosen, max_tokens=first))
    before.feed("prompt é")
    shown = "".join(before.write())
    before.save(path)
    after = Generation.resume(path, model, WORDS, dataclasses.replace(chosen, max_tokens=60 - first))
    shown += "".join(after.write())
    assert after.tokens == whole.tokens
    assert shown == text
    ours, theirs = (atma.state.tensors(generation._state) for generation in (after, whole))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_saved_text_takes_more_prompt(model, tmp_path):
    chosen = Settings(max_tokens=5, temperature=0, ignore_end=True)
    generation = Generation(model, WORDS, chosen)
    generation.feed("one")
    list(generation.write())
    generation.save(tmp_path / "s")
    resumed = Generation.resume(tmp_path / "s", model, WORDS, chosen)
    for one in (generation, resumed):
        one.feed(" two")
        list(one.write())
    assert resumed.tokens == generation.tokens


def test_a_state_of_another_model_is_refused(model, tmp_path):
    generation = Generation(model, WORDS)
    generation.feed("x")
    generation.save(tmp_path / "s")
    with pytest.raises(ValueError, match="saved with another model"):
        Generation.resume(tmp_path / "s", fresh_model(seed=1), WORDS)


def test_a_damaged_or_foreign_state_is_one_clear_error(model, tmp_path):
    generation = Generation(model, WORDS)
    generation.feed("x")
    generation.save(tmp_path / "s")
    whole = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a saved state, or damaged"):
        Generation.resume(tmp_path / "s", model, WORDS)
    atma.state.save(model.init_state(1, 4), tmp_path / "plain")
    with pytest.raises(ValueError, match="not a saved text"):
        Generation.resume(tmp_path / "plain", model, WORDS)
    with pytest.raises(ValueError, match="no such state file"):
        Generation.resume(tmp_path / "none", model, WORDS)


def test_saving_leaves_nothing_beside_the_file(model, tmp_path):
    generation = Generation(model, WORDS)
    generation.feed("x")
    generation.save(tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    with pytest.raises(OSError, match="cannot be written"):
        generation.save(tmp_path / "missing" / "s")


def test_a_prompt_with_no_tokens_is_an_error(model):
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        generate(model, WORDS, "")


def test_a_tokenizer_larger_than_the_model_is_an_error():
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens, the model only 200"):
        Generation(fresh_model(vocab_size=200), WORDS)


def test_one_flipped_bit_in_a_saved_text_is_found(model, tmp_path):
    generation = Generation(model, byte_tokenizer(), Settings(max_tokens=2))
    generation.feed("hello")
    "".join(generation.write())
    generation.save(tmp_path / "text")
    whole = (tmp_path / "text").read_bytes()
    for at in (len(whole) - 1000, len(whole) // 2):
        (tmp_path / "text").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            Generation.resume(tmp_path / "text", model, byte_tokenizer())


def with_holes():
    """A byte tokenizer that lacks the ids 250 to 255, whose end of text has the id 256."""
    settings = json.loads(byte_tokenizer().backend.to_str())
    settings["model"]["vocab"] = {text: i for text, i in settings["model"]["vocab"].items() if i < 250}
    settings["model"]["vocab"]["<|endoftext|>"] = 256
    return Tokenizer(Backend.from_str(json.dumps(settings)), 256)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_id_that_no_token_has_is_never_written(temperature):
    model, tokenizer = fresh_model(), with_holes()
    assert tokenizer.holes.tolist() == [250, 251, 252, 253, 254, 255]
    with torch.no_grad():
        model.head.weight[250:256] = model.head.weight[40] * 3
        model.head.bias[250:256] = 50
    generation = Generation(model, tokenizer, Settings(max_tokens=40, temperature=temperature, ignore_end=True))
    generation.feed("ab")
    list(generation.write())
    assert not set(generation.tokens) & set(tokenizer.holes.tolist())
    engine = Engine(model, tokenizer, EngineConfig(memory_bytes=64 << 20))
    handle = engine.submit(
        Request("ab", max_tokens=40, temperature=temperature, ignore_end=True, logprobs=20, echo=True)
    )
    while engine.busy:
        engine.step()
    tokens = handle.outputs[0].tokens
    assert len(tokens) >= 40
    assert not set(tokens) & set(tokenizer.holes.tolist())
    with pytest.raises(RequestError, match="'prompt': no token of the tokenizer has the id 251"):
        engine.submit(Request([97, 251], max_tokens=2))
