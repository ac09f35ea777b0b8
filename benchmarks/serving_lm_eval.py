"""lm-eval's `local-completions` against the server, beside the log-likelihoods of the model in this process.

    pip install 'lm-eval[api]' transformers
    python benchmarks/serving.py lm_eval --questions 40

The task is local: pieces of the package's own source, each with four continuations of which one is right. lm-eval asks
over HTTP, with token ids, `echo` and log-probabilities; every continuation's sum is then computed by the model read
plainly in one call, without engine or server. Exit status 1 where two differ by more than 1e-4, or in what is greedy.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from serving_client import served

import atma
from atma.loading import Loaded, load


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--questions", type=int, default=40)
    options = parser.parse_args(arguments)
    loaded = load(options.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _tokenizer(loaded, folder)
        (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, _questions(options.questions))))
        with served(options.model, folder / "log", "--model-name", options.model) as server:
            results = _evaluated(options.model, server.port, folder)
    pairs = [_compared(loaded, sample, folder) for sample in results["samples"]["pieces"]]
    rows = [row for pair in pairs for row in pair]
    worst = max(abs(theirs - own) for theirs, own, _ in rows)
    greedy = sum(not same for *_, same in rows)
    print({key: value for key, value in results["results"]["pieces"].items() if "acc" in key})
    print(f"{len(rows)} log-likelihoods; largest difference {worst:.1e}; greedy told otherwise: {greedy}")
    return int(worst > 1e-4 or greedy > 0)


def _tokenizer(loaded: Loaded, folder: Path) -> None:
    """As Hugging Face reads it."""
    assert loaded.tokenizer is not None
    loaded.tokenizer.save(folder / "tokenizer.json")
    end = loaded.tokenizer.backend.id_to_token(loaded.tokenizer.eot)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _questions(count: int) -> list[dict[str, Any]]:
    """Pieces of source with their next line and three others."""
    sources = sorted(Path(atma.__file__).parent.rglob("*.py"))
    lines = [line for path in sources for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    chance, made = random.Random(0), []
    for _ in range(count):
        at, right = chance.randrange(12, len(lines)), chance.randrange(4)
        choices = [chance.choice(lines).strip() for _ in range(4)]
        choices[right] = lines[at].strip()
        made.append({"text": "\n".join(lines[at - 12 : at]), "choices": choices, "right": right})
    return made


def _evaluated(model: str, port: int, folder: Path) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    task = {
        "task": "pieces",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "target_delimiter": "\n",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    settings = {
        "model": model,
        "base_url": f"http://127.0.0.1:{port}/v1/completions",
        "tokenizer": str(folder),
        "num_concurrent": 4,
        "max_length": 4096,
    }
    return simple_evaluate(
        model="local-completions", model_args=settings, tasks=[task], log_samples=True, bootstrap_iters=0
    )


@torch.inference_mode()
def _compared(loaded: Loaded, sample: dict[str, Any], folder: Path) -> list[tuple[float, float, bool]]:
    """Of each continuation: the server's log-likelihood, the model's own, and whether both say the same of greedy."""
    assert loaded.tokenizer is not None
    rows = []
    for (context, more), answered in zip(_arguments(sample), sample["filtered_resps"], strict=True):
        before, whole = loaded.tokenizer.encode(context), loaded.tokenizer.encode(context + more)
        hidden, _ = loaded.model(torch.tensor([whole]))
        logits = loaded.model.logits(hidden)[0, len(before) - 1 : -1, : loaded.tokenizer.vocab_size].float()
        wanted = torch.tensor(whole[len(before) :])
        own = logits.log_softmax(-1).gather(1, wanted[:, None]).double().sum().item()
        greedy = bool((logits.argmax(-1) == wanted).all())
        rows.append((float(answered[0]), own, _true(answered[1]) == greedy))
    return rows


def _arguments(sample: dict[str, Any]) -> list[tuple[str, str]]:
    given = sample["arguments"]
    rows = given.values() if isinstance(given, dict) else given
    return [(row["arg_0"], row["arg_1"]) if isinstance(row, dict) else (row[0], row[1]) for row in rows]


def _true(value: object) -> bool:
    return value is True or value == "True"
