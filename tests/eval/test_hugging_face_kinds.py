"""Kinds of models of transformers: with a cache, without one, with positions that end, and those that are refused."""

import importlib.util

import numpy as np
import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed: pip install 'atma-lm[hf]'", allow_module_level=True)

import transformers

from atma.eval.hugging_face import HuggingFace
from atma.eval.stream import Streaming
from atma.tokenizer import byte_tokenizer
from tests.eval.test_hugging_face import ATOL, plainly, tokens

PLAIN = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = PLAIN | {"num_key_value_heads": 1, "intermediate_size": 64, "max_position_embeddings": 64}
GPT = {"vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_positions": 64}
MAMBA = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
SEES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
CONFIGS = {
    "codegen": lambda: transformers.CodeGenConfig(**GPT, n_head=4, rotary_dim=4),
    "ctrl": lambda: transformers.CTRLConfig(**GPT, n_head=2, dff=64),
    "dynamic": lambda: transformers.LlamaConfig(**LLAMA, rope_parameters=DYNAMIC),
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=LLAMA | {"head_dim": 16},
        vision_config=SEES | {"image_size": 28, "patch_size": 14},
        image_token_index=256,
    ),
    "gptj": lambda: transformers.GPTJConfig(**GPT, n_head=2, rotary_dim=8),
    "longrope": lambda: transformers.LlamaConfig(**LLAMA | {"max_position_embeddings": 256}, rope_parameters=LONG),
    "mamba": lambda: transformers.MambaConfig(**MAMBA),
    "mamba2": lambda: transformers.Mamba2Config(**MAMBA, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    "openai-gpt": lambda: transformers.OpenAIGPTConfig(**GPT, n_head=2),
    "recurrent-gemma": lambda: transformers.RecurrentGemmaConfig(
        **PLAIN | {"num_hidden_layers": 3}, intermediate_size=64, lru_width=32, attention_window_size=40
    ),
    "roberta": lambda: transformers.RobertaConfig(**PLAIN, intermediate_size=64, max_position_embeddings=66),
}


def made(kind, truncate=False):
    """A random model whose weights are large enough for what it reads to matter."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return HuggingFace(model, byte_tokenizer(), kind, Streaming(chunk=9), truncate)


def greedily(model: HuggingFace, ids, most):
    """The likeliest token again and again, by a pass over all of the text each."""
    for _ in range(most):
        with torch.inference_mode():
            likeliest = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :257].argmax()
        ids = [*ids, int(likeliest)]
    return ids[-most:]


@pytest.mark.parametrize("kind", ["gemma3", "mamba", "mamba2", "openai-gpt", "recurrent-gemma"])
def test_any_causal_model_is_read_whether_it_has_a_cache_to_go_on_from_or_not(kind):
    model, ids = made(kind), tokens(41)
    assert model.pieces or kind != "gemma3"
    assert not model.pieces or kind != "openai-gpt"
    np.testing.assert_allclose(model.score(ids, 7), plainly(model, ids)[0][:, -7:], atol=ATOL)
    prompt, most = ids[0].tolist(), 4
    written = greedily(model, prompt, most)
    assert 256 not in written and model.generate(prompt, most) == written


@pytest.mark.parametrize("kind", ["codegen", "ctrl", "gptj"])
def test_a_table_of_positions_that_was_computed_ends_like_one_that_was_learned(kind):
    model = made(kind)
    assert model.longest == 64 and model.score(tokens(65), 5).shape == (2, 5)
    with pytest.raises(ValueError, match="65 tokens pass the 64 positions"):
        model.score(tokens(66), 5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_frequencies_that_change_with_the_length_are_measured_as_far_as_they_stay(kind):
    model, ids = made(kind), tokens(201)
    np.testing.assert_allclose(model.score(ids[:, :65]), plainly(model, ids[:, :65])[0], atol=ATOL)
    with pytest.raises(ValueError, match=f"200 tokens pass the 64 .* its '{kind}' rotary frequencies change"):
        model.score(ids)
    shorter = made(kind, truncate=True)
    np.testing.assert_allclose(shorter.score(ids, 5), plainly(model, ids[:, -65:])[0][:, -5:], atol=ATOL)


def test_positions_that_a_model_lacks_unexpectedly_are_one_line(monkeypatch):
    monkeypatch.setattr("atma.eval.hugging_face._longest", lambda model: (None, ""))
    with pytest.raises(ValueError, match="ctrl cannot read 100 tokens: index 64 is out of bounds"):
        made("ctrl").score(tokens(101))


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(ValueError, match="roberta: not a causal language model: what it makes of a text depends"):
        made("roberta")
