"""Generation by transformers over our states: what it writes is what the model alone says, however it is asked."""

import threading

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer, TextStreamer, pipeline

from tests.integrations.transformers.conftest import ONE_EACH, some_tokens
from tests.integrations.transformers.test_folders import saved
from tests.integrations.transformers.test_modeling import padded

IDS = [name for name, _ in ONE_EACH]
A_QUARTER = [pytest.param(*one, marks=pytest.mark.slow if i % 4 else ()) for i, one in enumerate(ONE_EACH)]
HYBRID = {"depth": 3, "pattern": ("local", "atma", "raven")}


def greedy(model, tokens, count: int) -> torch.Tensor:
    """The likeliest continuation of one text, every token from the whole text before it."""
    for _ in range(count):
        best = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], 1)
    return tokens


@pytest.mark.parametrize(("name", "i"), A_QUARTER, ids=IDS)
@torch.no_grad()
def test_greedy_text_of_padded_rows_is_that_of_each_alone(make, name, i):
    model, tokens, lengths = make(name, i), some_tokens(3, 6), [6, 2, 4]
    ids, mask = padded(tokens, lengths)
    for how in ({}, {"use_cache": False}, {"prefill_chunk_size": 3}):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, **how)
        for row, length in enumerate(lengths):
            assert out[row, -length - 5 :].tolist() == greedy(model, tokens[row : row + 1, :length], 5)[0].tolist()


@torch.no_grad()
def test_beams_are_those_without_a_cache(make):
    model, (ids, mask) = make(**HYBRID), padded(some_tokens(3, 6), [6, 2, 4])
    asked = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 4, "num_return_sequences": 3, "pad_token_id": 0}
    with_cache, without = model.generate(ids, **asked), model.generate(ids, use_cache=False, **asked)
    assert torch.equal(with_cache, without) and with_cache.shape[0] == 9


@torch.no_grad()
def test_a_seed_samples_the_same_text_with_a_cache_and_without(make):
    model, tokens = make(**HYBRID), some_tokens(2, 5)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(4)
        how = {"do_sample": True, "top_k": 8, "max_new_tokens": 9, "pad_token_id": 0}
        found.append(model.generate(tokens, use_cache=use_cache, **how))
    assert torch.equal(*found)


@torch.no_grad()
def test_a_long_text_outgrows_the_room_of_its_state(make):
    model, tokens = make(**HYBRID), some_tokens(1, 300)
    out = model.generate(tokens, max_new_tokens=300, do_sample=False, return_dict_in_generate=True)
    assert out.cache.get_seq_length() == 599
    assert (
        model(out.sequences[:, -1:], cache=out.cache).logits - model(out.sequences).logits[:, -1:]
    ).abs().max() < 1e-9


@torch.no_grad()
def test_a_cache_goes_on_in_another_call(make):
    model, tokens = make(**HYBRID), some_tokens(1, 7)
    first = model.generate(tokens, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    more = torch.cat([first.sequences, some_tokens(1, 3, seed=9)], 1)
    second = model.generate(more, cache=first.cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(second, greedy(model, more, 4))


@pytest.mark.parametrize("drafted", [{"prompt_lookup_num_tokens": 3}, {}])
@torch.no_grad()
def test_assisted_decoding_gives_the_same_text(make, drafted):
    model, tokens = make(**HYBRID), some_tokens(1, 9).repeat(1, 2)
    how = drafted or {"assistant_model": make(depth=1)}
    out = model.generate(tokens, max_new_tokens=12, do_sample=False, **how)
    assert torch.equal(out, greedy(model, tokens, 12))


@pytest.mark.parametrize(("name", "i"), ONE_EACH, ids=IDS)
@torch.no_grad()
def test_tokens_are_taken_back_where_the_past_is_recorded(make, name, i):
    model, tokens = make(name, i), some_tokens(2, 12)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(tokens[:, :4], cache=cache)
    model(some_tokens(2, 5, seed=7), cache=cache)
    model(some_tokens(2, 1, seed=8), cache=cache)
    cache.crop(-6)
    assert cache.get_seq_length() == 4
    model(torch.cat([tokens[:, 4:7], some_tokens(2, 2, seed=3)], 1), cache=cache)
    cache.crop(-1)
    cache.crop(-1)
    out = model(tokens[:, 7:], cache=cache)
    assert (out.logits - model(tokens).logits[:, 7:]).abs().max() < 1e-9 and cache.get_seq_length() == 12


@torch.no_grad()
def test_what_only_grows_is_cut_back_and_a_memory_is_not(make):
    tokens = some_tokens(2, 9)
    plain = make("minimal")
    cache = plain(tokens).cache
    if cache.is_croppable:
        cache.crop(-4)
        assert (plain(tokens[:, 5:], cache=cache).logits - plain(tokens).logits[:, 5:]).abs().max() < 1e-9
    cache = make("mamba2")(tokens).cache
    assert not cache.is_croppable
    with pytest.raises(ValueError, match=r"cannot forget tokens it has read: call cache.activate_past_recording\(\)"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="a negative number of tokens, not 3"):
        cache.crop(3)


@torch.no_grad()
def test_rows_of_a_cache_are_chosen_repeated_and_forgotten(make):
    model, tokens = make(**HYBRID), some_tokens(2, 6)
    cache, more = model(tokens).cache, some_tokens(4, 1, seed=2)
    cache.batch_repeat_interleave(2)
    expected = model(torch.cat([tokens.repeat_interleave(2, 0), more], 1)).logits[:, -1:]
    assert (model(more, cache=cache).logits - expected).abs().max() < 1e-9
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert cache.batch_size == 2
    cache.reset()
    assert cache.get_seq_length() == 0
    assert (model(tokens, cache=cache).logits - model(tokens).logits).abs().max() < 1e-9


@torch.no_grad()
def test_text_streams_and_pipelines(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = saved(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(["hello there", "a"], return_tensors="pt", padding=True)
    whole = tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=9, do_sample=False)[:, -9:])
    one = tokenizer("hello there", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    asked = {**one, "max_new_tokens": 9, "do_sample": False}
    thread = threading.Thread(target=model.generate, kwargs=asked | {"streamer": streamer})
    thread.start()
    assert "".join(streamer) == whole[0]
    thread.join()
    model.generate(**asked, streamer=TextStreamer(tokenizer))
    write = pipeline("text-generation", model=str(folder), batch_size=2)
    found = write(["hello there", "a"], max_new_tokens=9, do_sample=False, return_full_text=False)
    assert [one[0]["generated_text"] for one in found] == [text.replace(tokenizer.eos_token, "") for text in whole]


@torch.no_grad()
def test_transformers_writes_what_atma_writes(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from atma.generation import Settings, generate
    from atma.tokenizer import byte_tokenizer

    folder, own = saved(tmp_path / "model", **HYBRID)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("hello there", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs.input_ids.shape[1] :]
    text = generate(own, byte_tokenizer(), "hello there", Settings(max_tokens=20, temperature=0))
    assert bytes(token for token in out.tolist() if token < 256).decode(errors="replace") == text
