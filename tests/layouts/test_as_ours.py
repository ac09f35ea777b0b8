"""An imported checkpoint has what our own models have: exact serving, recorded steps, diagnosis, suites, a command."""

import json
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

import atma
from atma.checkpoint import save_model
from atma.decoding import RECORDED, Decoder
from atma.generation import Generation
from atma.layouts import import_checkpoint
from atma.ops import native
from atma.serve.engine import Engine
from atma.serve.exact import Served
from atma.serve.request import Request
from atma.serve.settings import EngineConfig
from atma.settings import Settings
from atma.tokenizer import byte_tokenizer, load_tokenizer
from tests.harness.invariance import alone, differences, random_requests, together
from tests.layouts.checkpoints import FORMS, checkpoint

compiled = pytest.mark.skipif(not native.available(torch.float32), reason=str(native.status().reason))
BYTES = {"vocab_size": 257, "eos_token_id": 256, "bos_token_id": 256, "pad_token_id": None}
SERVED = [
    "llama, biases",
    "llama, head width",
    "qwen2",
    "qwen2, windows",
    "smollm3",
    "olmo2",
    "gemma3",
    "lfm2",
    "qwen3.5",
]


def folder_of(tmp_path, form):
    """A checkpoint whose vocabulary is bytes, with its tokenizer and a chat template."""
    checkpoint(tmp_path / "theirs", form, **BYTES)
    byte_tokenizer().save(tmp_path / "theirs/tokenizer.json")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    settings = {"eos_token": "<|endoftext|>", "chat_template": template}
    (tmp_path / "theirs/tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path / "theirs"


@compiled
@pytest.mark.parametrize("form", SERVED)
def test_it_is_served_the_same_bits_alone_and_in_company(tmp_path, form):
    model = import_checkpoint(folder_of(tmp_path, form), tmp_path / "ours").float()
    requests = random_requests(12, list(b"a text of bytes, which is read in pieces"), seed=1, prompt=60, answer=12)
    one = alone(Engine(model, byte_tokenizer(), EngineConfig(64 << 20, 0, max_rows=1)), requests)
    engine = Engine(model, byte_tokenizer(), EngineConfig(64 << 20, 16 << 20))
    other, _ = together(engine, requests, seed=2)
    assert engine.served.exact
    assert differences(one, other) == (0, 0, 0)


@compiled
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_recorded_and_has_a_form_for_serving(tmp_path, form):
    checkpoint(tmp_path / "theirs", form)
    model = import_checkpoint(tmp_path / "theirs", tmp_path / "ours").float().eval()
    decoder = Decoder(model, model.init_state(1, 8))
    with torch.inference_mode():
        steps = torch.stack([decoder.step(torch.tensor([[i + 3]])).clone() for i in range(6)], 1)
        whole = model.logits(model(torch.arange(3, 9)[None])[0])
    assert decoder.how.startswith(RECORDED)
    assert (steps - whole).abs().max() <= 1e-4
    assert Served(model).exact


def test_its_tokenizer_template_and_end_go_with_it(tmp_path):
    import_checkpoint(folder_of(tmp_path, "llama"), tmp_path / "ours")
    loaded = atma.load(tmp_path / "ours")
    assert loaded.tokenizer is not None and loaded.tokenizer.eot == 256
    assert "chat_template" in json.loads((tmp_path / "ours/tokenizer_config.json").read_text())
    assert loaded.info["extra"]["transformers"]["config"]["model_type"] == "llama"


@pytest.mark.parametrize("first", [[], ["<|begin|>"]])
def test_a_text_begins_with_what_its_tokenizer_puts_there(tmp_path, first):
    source = folder_of(tmp_path, "llama")
    backend = Backend.from_file(str(source / "tokenizer.json"))
    for token in first:
        backend.add_special_tokens([token])
        pair = (token, backend.token_to_id(token))
        backend.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[pair])
    backend.save(str(source / "tokenizer.json"))
    checkpoint(source, "llama", **BYTES | {"vocab_size": 258})
    model = import_checkpoint(source, tmp_path / "ours").float()
    tokenizer = atma.load(tmp_path / "ours").tokenizer
    begun = [257] if first else []
    assert tokenizer is not None and list(tokenizer.beginning) == begun
    writing = Generation(model, tokenizer, Settings(max_tokens=3, temperature=0))
    writing.feed("ab")
    list(writing.write())
    assert writing.tokens[: len(begun) + 2] == [*begun, 97, 98]
    engine = Engine(model, tokenizer, EngineConfig(64 << 20, 0))
    request = Request("ab", max_tokens=3, temperature=0.0)
    assert engine.prepare(request) == [*begun, 97, 98]


@pytest.mark.parametrize("template", [None, "$A", "<|begin|> $A", "$A <|endoftext|>"])
def test_saved_again_its_tokenizer_begins_a_text_as_it_did(tmp_path, template):
    source = folder_of(tmp_path, "llama")
    backend = Backend.from_file(str(source / "tokenizer.json"))
    backend.add_special_tokens(["<|begin|>"])
    if template:
        pairs = [(name, backend.token_to_id(name)) for name in ("<|begin|>", "<|endoftext|>") if name in template]
        backend.post_processor = TemplateProcessing(single=template, special_tokens=pairs)
    backend.save(str(source / "tokenizer.json"))
    checkpoint(source, "llama", **BYTES | {"vocab_size": 258})
    import_checkpoint(source, tmp_path / "ours")
    loaded = atma.load(tmp_path / "ours")
    save_model(tmp_path / "again", loaded.model, loaded.tokenizer)
    again = Backend.from_file(str(tmp_path / "again/tokenizer.json"))
    assert again.encode("ab").ids == backend.encode("ab").ids
    assert load_tokenizer(tmp_path / "again").hash() == load_tokenizer(source).hash()


def test_a_tokenizer_with_a_token_beyond_the_vocabulary_is_refused(tmp_path):
    source = folder_of(tmp_path, "llama")
    backend = Backend.from_file(str(source / "tokenizer.json"))
    backend.add_special_tokens(["<|one_too_many|>"])
    backend.save(str(source / "tokenizer.json"))
    with pytest.raises(ValueError, match="token 257 is beyond the model's vocabulary of 257"):
        import_checkpoint(source, tmp_path / "ours")


def command(*arguments):
    run = [sys.executable, "-m", "atma", *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_command_imports_evaluates_and_exports(tmp_path):
    source, text = folder_of(tmp_path, "qwen2"), tmp_path / "text.txt"
    text.write_text("Some text to measure a loss on. " * 200)
    told = command("import", f"hf:{source}", tmp_path / "ours")
    assert (told.returncode, "imported: " in told.stdout) == (0, True), told.stderr
    for arguments in (
        ("info", tmp_path / "ours"),
        ("diagnose", tmp_path / "ours", "--text", text, "--out", tmp_path / "page"),
        ("generate", "--model", tmp_path / "ours", "--max-tokens", "3", "Some"),
    ):
        told = command(*arguments)
        assert told.returncode == 0, told.stderr
    assert command("export", tmp_path / "ours", tmp_path / "back").returncode == 0
    assert (tmp_path / "back/model.safetensors").stat().st_size > 0


def test_the_command_names_what_it_lacks(tmp_path):
    told = command("import", "hf:someone/a-model", tmp_path / "ours")
    assert told.returncode == 2
    assert "hf download someone/a-model" in told.stderr
    source = folder_of(tmp_path, "qwen2")
    told = command("import", source, tmp_path / "ours")
    assert told.returncode == 2
    assert f"write hf:{source}" in told.stderr
