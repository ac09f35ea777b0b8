"""Every suite begins a text with the token that a model's tokenizer has for that, which need not be end-of-text."""

import importlib.util

import pytest

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed: pip install 'atma-lm[hf]'", allow_module_level=True)

from atma.eval.hugging_face import HuggingFace, load
from atma.eval.likelihood import Likelihood
from atma.eval.reasoning.suite import Reasoning
from atma.eval.retrieval import Retrieval
from atma.eval.suite import run
from tests.eval.test_hugging_face import made

ALONE = {"lengths": (0,), "tasks": ("qa1",), "per_cell": 1}
NEEDLES = {"lengths": (400,), "per_cell": 1, "haystacks": ("synthetic",), "depths": (50,)}


@pytest.fixture
def suites(tmp_path):
    """One small suite of each way in which texts are made."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return [
        Likelihood(texts=str(text), lengths=(32, 64), documents=1, target_bytes=40),
        Retrieval(**NEEDLES, tasks=("passkey", "induction")),
        Retrieval(**NEEDLES | {"lengths": (900,)}, tasks=("vt",)),
        Reasoning(**ALONE),
    ]


@pytest.mark.parametrize(("kind", "start"), [("bos", 257), ("llama", 256)])
def test_every_suite_begins_a_text_with_the_tokenizers_start(kind, start, suites, tmp_path, monkeypatch):
    model, read = load(str(made(kind, tmp_path / kind))), HuggingFace._read
    begun = []

    def watched(self, inputs, last, cache=None, progress=None):
        begun.extend(inputs[:, 0].tolist() if cache is None else [])
        return read(self, inputs, last, cache, progress)

    monkeypatch.setattr(HuggingFace, "_read", watched)
    for suite in suites:
        run(suite, model)
        assert set(begun) == {start}
        begun.clear()
    assert model.tokenizer.eot == 256 and model.provenance()["start"] == start
