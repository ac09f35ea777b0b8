"""The cache of a model of transformers is found under either name, and no call of ours is a deprecated one."""

import importlib.util
import logging
import warnings
from collections import OrderedDict
from functools import wraps
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from atma.eval.transformers_cache import cache_argument, cache_of

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed: pip install 'atma-lm[hf]'", allow_module_level=True)

import transformers

from atma.bench.hugging_face import peers
from atma.config import preset
from atma.eval.hugging_face import HuggingFace
from atma.eval.stream import Streaming
from atma.tokenizer import byte_tokenizer

SHAPE = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1, "intermediate_size": 64, "max_position_embeddings": 64}
KINDS = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "lfm2": lambda: transformers.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
}


class Out(OrderedDict):
    """What a model returned: items that are attributes too."""

    __getattr__ = OrderedDict.__getitem__


def llama(name):
    """A Llama that takes its cache by this name alone and returns it by this name alone."""

    class Llama(transformers.LlamaForCausalLM):
        def answer(self, ids, cache, use, keep):
            given = {"use_cache": use, "logits_to_keep": keep, cache_argument(transformers.LlamaForCausalLM): cache}
            theirs = super().forward(input_ids=ids, **given)
            return Out(logits=theirs.logits, **{name: cache_of(theirs)})

    class Newer(Llama):
        def forward(self, input_ids=None, cache=None, use_cache=None, logits_to_keep=0):
            return self.answer(input_ids, cache, use_cache, logits_to_keep)

    class Older(Llama):
        def forward(self, input_ids=None, past_key_values=None, use_cache=None, logits_to_keep=0):
            return self.answer(input_ids, past_key_values, use_cache, logits_to_keep)

    torch.manual_seed(0)
    return {"cache": Newer, "past_key_values": Older}[name](KINDS["llama"]())


def tokens(length):
    return torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_model_is_read_in_pieces_by_the_name_that_it_takes(name):
    whole, model = llama(name), HuggingFace(llama(name), byte_tokenizer(), "llama", Streaming(chunk=9))
    assert model.pieces and cache_argument(whole) == name
    with torch.inference_mode():
        log_p = whole(input_ids=tokens(41)[:, :-1], use_cache=False).logits.double().log_softmax(-1)
    nats = -log_p.gather(-1, tokens(41)[:, 1:, None])[..., 0].numpy()
    np.testing.assert_allclose(model.score(tokens(41)), nats, atol=1e-4)


def test_the_argument_is_read_through_what_wraps_a_model():
    def both(input_ids, cache=None, past_key_values=None): ...

    @wraps(both)
    def hooked(*args, **kwargs): ...

    assert cache_argument(SimpleNamespace(forward=both)) == cache_argument(SimpleNamespace(forward=hooked)) == "cache"
    assert cache_argument(SimpleNamespace(forward=lambda input_ids, use_cache: None)) is None


def test_a_model_may_return_no_cache():
    assert cache_of(Out(logits=torch.zeros(1))) is None


@pytest.fixture
def told(monkeypatch):
    """What transformers says of arguments and names: its warnings and what it logs once."""
    said = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, *words: said.append(str(words)), raising=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield lambda: [
            words
            for words in [*said, *(str(warning.message) for warning in seen)]
            if "deprecated" in words and any(name in words for name in GIVEN)
        ]


GIVEN = ("input_ids", "use_cache", "logits_to_keep", "past_key_values", "cache_params", "`cache`", "`dtype`")


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluated_model_is_called_in_no_deprecated_way(kind, told):
    model = HuggingFace(
        transformers.AutoModelForCausalLM.from_config(KINDS[kind]()), byte_tokenizer(), kind, Streaming(chunk=9)
    )
    assert model.pieces
    model.score(tokens(41), 7)
    model.generate(tokens(20)[0].tolist(), 4)
    assert not told()


def test_the_peers_of_the_benchmarks_are_right_and_called_in_no_deprecated_way(told):
    notes = []
    found = peers(preset("nano"), torch.float32, torch.device("cpu"), notes)
    assert [peer.name for peer in found] == ["LFM2", "Qwen3-Next"] and not notes
    for peer in found:
        peer.check("decode")
        step, read = peer.tiny().decoder(1, 32)
        assert read > 0 and int(step()) == int(step())
    assert not told()
