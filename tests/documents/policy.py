"""What of a page's commands is really run: what is cut to seconds, what the reader is taken to have, what is left out.

A command that no rule names is run as it stands.
"""

import json
import re
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import atma
from atma.cli import main
from tests.documents.reading import Code, Command

NOT_RUN = {
    r"^\. |\b(pip|curl|export|git|hf|source|cd|sudo|apt-get|brew|uv) ": "the reader's own machine or network",
    r"^make\b": "the targets are what runs this; tests/documents/test_commands.py looks them up",
    r"^python3? (benchmarks/|-m )": "minutes to hours; tests/bench runs the scripts small",
    r"^atma (demo|bench)\b": "minutes; tests/test_demo.py and tests/bench run them small",
    r"^atma plan\b": "measures the machine or counts large models; tests/plan runs it small",
    r"^tensorboard\b": "goes on until it is stopped",
    r"^atma batch\b": "needs a file of requests; tests/serve/http/test_batch.py writes one",
    r"^atma (serve|chat)\b": "goes on until it is stopped; tests/serve/http and tests/test_generate.py run them",
    r"^atma train .*--launch ": "asks a cluster for machines; tests/launching runs it on this one",
    r"train\.compile=true": "compiles for a minute; tests/train/test_compiled.py does (slow)",
    r"^torchrun ": "several processes; tests/train/test_parallel.py runs them",
    r"^serve ": "starts a cluster; tests/serve/test_ray.py does (slow)",
    r"^atma sweep (run|work|status)\b": "of workers; tests/sweep/test_command.py runs them small",
    r"^atma compare\b": "of workers; tests/compare runs it small",
    r"^atma eval tasks\b": "downloads its questions; tests/eval/test_tasks.py runs a task of its own",
    r"models/qwen|^hf ": "a checkpoint on the reader's disk; tests/layouts makes some",
    r"\bhf:": "a model of another's, to be chosen by the reader; tests/eval/test_hugging_face.py makes some",
    r"…|\.\.\.|(^| )\[|(^| )[A-Z]+( |\.|$)": "the reader fills something in",
    r"--data babilong/": "the published rows, on the reader's disk; tests/eval/reasoning/test_published.py makes some",
    r"stage1_120_cells.csv": "the table of the paper; tests/sweep/test_analysis_published.py reads it where it is",
}
"""What a command or a block of Python matches is not run, for this reason."""
NOT_RUN_CODE = {
    r"import OpenAI|ray": "needs a server that runs; tests/serve/http/test_openai.py and test_ray.py have one",
    r"AsyncEngine": "goes on inside an event loop of the reader's; tests/serve/test_async.py has one",
    r"stage1_120_cells.csv": "the table of the paper; tests/sweep/test_analysis_published.py reads it where it is",
}
LENGTHS = ("--lengths", "128", "256")
CUTS = {
    ("generate",): [("--max-tokens", "4")],
    ("eval", "lengths"): [LENGTHS, ("--documents", "1"), ("--needle-trials", "1")],
    ("eval", "likelihood"): [LENGTHS, ("--documents", "1"), ("--target-bytes", "32")],
    ("eval", "retrieval"): [("--lengths", "256"), ("--tasks", "passkey"), ("--per-cell", "1")],
    ("eval", "reasoning"): [("--tasks", "qa1"), ("--lengths", "0"), ("--per-cell", "1")],
    ("eval", "recall"): [
        ("--tokens", "2048"),
        ("--mixers", "polar"),
        ("--rates", "1"),
        ("--seeds", "0"),
        ("--held-out", "8"),
        ("--trials", "8"),
    ],
    ("extend",): [
        ("--tokens", "2048"),
        ("--batch-tokens", "1024"),
        ("--factors", "1"),
        ("--documents", "1"),
        ("--needle-trials", "1"),
    ],
    ("diagnose",): [LENGTHS, ("--documents", "1"), ("--size", "quick"), ("--mask", "none")],
}
"""Options of a verb that are set so that it takes seconds."""
TRAINING = ("train.tokens=4096", "train.batch_tokens=1024", "data.copy_warmup_tokens=0")
TUNING = ("train.epochs=0.1", "train.batch_tokens=1024")
TRAINING += ("evaluation.lengths=[256]", "evaluation.documents=1", "evaluation.needle_trials=1")


def why_not(one: Command | Code) -> str | None:
    """The reason for which it is not run; None if it is."""
    rules = NOT_RUN_CODE if isinstance(one, Code) else NOT_RUN
    return next((reason for pattern, reason in rules.items() if re.search(pattern, one.text)), None)


def cut(words: tuple[str, ...]) -> list[str]:
    """The words of an `atma` command with its sizes cut."""
    for verb, settings in CUTS.items():
        if words[1 : 1 + len(verb)] == verb:
            for option, *values in settings:
                words = _with(words, option, values)
    if words[1] == "train":
        words = _set(words)
    if "--epochs" in words:
        words = _with(_with(words, "--epochs", ["1"]), "--examples", ["16"])
    if "--fine-tune" in words:
        words = _with(_with(words, "--tuning.tokens", ["1024"]), "--lengths", ["0", "256"])
    return list(words)


def _with(words: tuple[str, ...], option: str, values: list[str]) -> tuple[str, ...]:
    """The words with an option set, in the place of what it was set to."""
    if option not in words:
        return (*words, option, *values)
    first = words.index(option)
    last = next((n for n in range(first + 1, len(words)) if words[n].startswith("--")), len(words))
    return (*words[:first], option, *values, *words[last:])


def _set(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a training with its settings cut, those that it gives in their places."""
    chosen = TUNING if "--from" in words or "runs/tuned" in words else TRAINING
    small = {setting.partition("=")[0]: setting for setting in chosen}
    words = tuple(small.pop(word.partition("=")[0], word) for word in words)
    return (*words, *(part for setting in small.values() for part in ("--set", setting)))


def library() -> Path:
    """The standard library, and a good part of it that is read in a second."""
    return Path(sysconfig.get_paths()["stdlib"])


def texts(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("argparse.py", "ast.py", "datetime.py", "doctest.py", "inspect.py", "locale.py", "mailbox.py"):
        shutil.copy(library() / name, folder / name)
    for path in [*library().glob("a*.py"), *library().glob("t*.py")]:
        shutil.copy(path, folder / path.name)


def one_text(path: Path) -> None:
    path.write_text((library() / "argparse.py").read_text(encoding="utf-8")[:4000], encoding="utf-8")


def published(folder: Path) -> None:
    from tests.test_importer import published, write

    write(folder, *published()[1:])


def data(folder: Path) -> None:
    """Data of `atma prepare` with the tokenizer of the packaged models."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = folder.parent / "tokenizer.json"
    atma.load("nano").tokenizer.save(tokenizer)
    assert main(["prepare", "stdlib", "--out", str(folder), "--tokenizer", str(tokenizer)]) == 0


def chats(path: Path) -> None:
    """Short conversations, a line each."""
    turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(60)]
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns), encoding="utf-8")


def sweep(folder: Path) -> None:
    from tests.sweep.synthetic_sweep import write_sweep

    write_sweep(folder)


def rows(path: Path) -> None:
    """What an evaluation of the packaged model keeps."""
    options = "--lengths 256 --tasks passkey --per-cell 1 --out"
    assert main(["eval", "retrieval", *options.split(), str(path)]) == 0


def others(path: Path) -> None:
    """What the same evaluation keeps of another model."""
    mine = path.with_name("nano.jsonl")
    if not mine.exists():
        rows(mine)
    shutil.copy(mine, path)


def run(folder: Path) -> None:
    """A finished training."""
    shutil.copytree(atma.load("nano").path, folder / "final")


GIVEN: dict[str, Callable[[Path], None]] = {
    "my_texts": texts,
    "long_prompt.txt": one_text,
    "notes.txt": one_text,
    "chats.jsonl": chats,
    "book.txt": one_text,
    "published_checkpoint": published,
    "data/stdlib": data,
    "recipes/nano.toml": lambda path: data(path.parents[1] / "data/stdlib"),
    "runs/mine": run,
    "runs/sweep-nano": sweep,
    "runs/sweep-nano-24": sweep,
    "a.jsonl": rows,
    "b.jsonl": rows,
    "nano-rope.jsonl": others,
    "theirs.jsonl": others,
}
"""What a page takes for granted, made when a command names it and no command before it wrote it."""
WRITTEN = ("--out", "--page", "--save-state", "--json", "--prompts", "--fine-tune")
