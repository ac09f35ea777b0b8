"""Models of transformers behind the same protocol: random tiny ones, written to a folder and loaded from it."""

import importlib.util

import numpy as np
import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed: pip install 'atma-lm[hf]'", allow_module_level=True)

from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, processors

from atma.cli import main
from atma.eval.hugging_face import HuggingFace, load
from atma.eval.stream import Streaming
from atma.tokenizer import byte_tokenizer

KINDS = ("gpt2", "llama", "lfm2")
ATOL = 1e-4


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A model folder as transformers writes it, with a byte tokenizer."""
    return made(request.param, tmp_path_factory.mktemp(request.param))


def made(kind, path):
    """Written to a folder: gpt2, llama, lfm2, or "bos", a Llama whose texts begin with a token of their own."""
    import transformers

    shape = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "intermediate_size": 64, "max_position_embeddings": 64}
    ends = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=2, n_positions=64, **ends)
    elif kind == "bos":
        config = transformers.LlamaConfig(**shape | {"vocab_size": 258}, **ends | {"bos_token_id": 257})
    elif kind == "llama":
        config = transformers.LlamaConfig(**shape, **ends)
    else:
        config = transformers.Lfm2Config(**shape, **ends, layer_types=["conv", "full_attention"])
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer, named = byte_tokenizer(), {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    if kind == "bos":
        named["bos_token"] = "<s>"
        tokenizer.backend.add_special_tokens([AddedToken("<s>", special=True)])
        first = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
        tokenizer.backend.post_processor = first
    tokenizer.save(path / "tokenizer.json")
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), **named).save_pretrained(path)
    return path


def tokens(length, rows=2):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(1))


def plainly(model: HuggingFace, ids):
    """Nats of every target and the likeliest tokens, by one plain call."""
    with torch.inference_mode():
        log_p = model.model(input_ids=ids[:, :-1], use_cache=False).logits.double().log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None])[..., 0].numpy(), log_p.argmax(-1).numpy()


@pytest.mark.parametrize("last", [1, 7, 40])
def test_scores_are_those_of_one_plain_call(folder, last):
    model, ids = load(str(folder), streaming=Streaming(chunk=9, batch_tokens=50)), tokens(41)
    nats, likeliest = plainly(model, ids)
    found = model.predict(ids, last)
    np.testing.assert_allclose(found.nats, nats[:, -last:], atol=ATOL)
    np.testing.assert_allclose(model.score(ids, last), found.nats)
    assert (found.right == (likeliest[:, -last:] == ids[:, -last:].numpy())).all()


def test_progress_tells_every_token(folder):
    seen = []
    load(str(folder), streaming=Streaming(chunk=9)).score(tokens(41), 3, seen.append)
    assert sum(seen) == 2 * 40


def test_the_continuation_is_that_of_transformers(folder):
    model, prompt = load(str(folder)), tokens(20, 1)
    theirs = model.model.generate(prompt, max_new_tokens=10, do_sample=False)[0, 20:].tolist()
    assert model.generate(prompt[0].tolist(), 10) == [token for token in theirs if token != 256]


def test_a_text_longer_than_learned_positions_is_an_error_or_truncated_and_counted(tmp_path):
    made("gpt2", tmp_path)
    model, ids = load(str(tmp_path)), tokens(101)
    assert model.longest == 64
    with pytest.raises(ValueError, match="100 tokens pass the 64 positions"):
        model.score(ids, 5)
    shorter = load(str(tmp_path), truncate=True)
    np.testing.assert_allclose(shorter.score(ids, 5), model.score(ids[:, -65:], 5))
    assert shorter.truncated == 2 * 36 and model.truncated == 0


def test_the_beginning_of_a_prompt_is_dropped_but_never_all_of_it(tmp_path):
    model, prompt = load(str(made("gpt2", tmp_path)), truncate=True), tokens(80, 1)[0].tolist()
    assert model.generate(prompt, 10) == model.generate(prompt[-54:], 10) and model.truncated == 26
    assert model.generate(prompt, 63) == model.generate(prompt[-1:], 63)
    for most in (64, 65, 200):
        with pytest.raises(ValueError, match=f"{most} tokens to write leave .* none of its 64 for a prompt"):
            model.generate(prompt, most)


def test_computed_positions_have_no_longest_context(tmp_path):
    made("llama", tmp_path)
    model = load(str(tmp_path))
    assert model.longest is None and model.score(tokens(101), 5).shape == (2, 5)


def test_a_cache_that_cannot_be_read_on_from_is_not_used(tmp_path, monkeypatch):
    made("llama", tmp_path)
    monkeypatch.setattr("atma.eval.hugging_face._reads_in_pieces", lambda model, name: False)
    whole = load(str(tmp_path), streaming=Streaming(chunk=9))
    assert not whole.provenance()["in_pieces"]
    np.testing.assert_allclose(whole.score(tokens(41), 7), plainly(whole, tokens(41))[0][:, -7:], atol=ATOL)


def test_provenance_names_weights_and_library(folder):
    stamp = load(str(folder)).provenance()
    assert (
        len(stamp["weights_sha256"]) == len(stamp["model_config_sha256"]) == 64
        and stamp["core"] in KINDS
        and stamp["transformers"]
    )


def test_what_is_no_model_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="cannot be loaded as a causal language model of transformers"):
        load(str(tmp_path))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def narrow(path):
    save_file({name: value[:8].clone() for name, value in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (truncate, "cannot be loaded as a causal language model of transformers"),
        (
            narrow,
            "weights do not fit its config.json: 'lm_head.weight' is [8, 32] in the files, [257, 32] in",
        ),
    ],
)
def test_damaged_weights_are_one_line(damage, why, tmp_path, capsys):
    damage(made("llama", tmp_path) / "model.safetensors")
    assert main(["eval", "likelihood", "--model", f"hf:{tmp_path}"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("atma: error: ") and why in told


def test_weights_that_the_files_lack_are_named_not_drawn(tmp_path):
    weights = load_file(made("llama", tmp_path) / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for 'model\.layers\.1\.mlp\.down_proj\.weight', one of 3"):
        load(str(tmp_path))


def test_weights_that_two_layers_share_need_be_there_once(tmp_path):
    weights = load_file(made("gpt2", tmp_path) / "model.safetensors")
    assert "lm_head.weight" not in weights and load(str(tmp_path)).score(tokens(5)).shape == (2, 4)


def test_ids_and_targets_outside_are_refused(folder):
    model = load(str(folder))
    with pytest.raises(ValueError, match="token id 400 is outside"):
        model.score(torch.tensor([[1, 400]]))
    with pytest.raises(ValueError, match="cannot score the last 3 of 1 tokens"):
        model.score(tokens(2), 3)
