"""What `atma bench` measures, as checked options; nothing heavy is imported here."""

import dataclasses
import shlex
from dataclasses import dataclass

from atma.config import preset
from atma.strict import check_fields

KINDS = ("ops", "train", "decode", "prefill")
DTYPES = ("float32", "bfloat16", "float16")
WIDTHS = ("int8", "int4")
OPERATIONS = ("polar", "delta", "kda", "gla", "mamba2", "conv", "loss")


@dataclass(frozen=True)
class Plan:
    """Sizes and ways of measuring. Lengths and contexts are tokens."""

    lengths: tuple[int, ...] = (256, 1024, 4096)
    """Tokens of an operation (for one query or step: keys held), of a training row, or of a prompt."""
    contexts: tuple[int, ...] = (1024, 16_384)
    """Tokens already read when `decode` writes the next."""
    batch: int = 1
    """Rows at once."""
    operations: tuple[str, ...] = OPERATIONS
    """Which of polar, the recurrences delta, kda, gla and mamba2, conv and loss `ops` measures."""
    heads: int = 8
    """Query heads of an operation; heads × head-width channels for conv and loss."""
    key_value_heads: int = 2
    """Key and value heads of an operation, a divisor of heads."""
    head_width: int = 64
    """Channels of a head."""
    vocabulary: int = 4096
    """Tokens that the loss of `ops` chooses from."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """float32, bfloat16, float16. Training keeps float32 weights and computes in these."""
    weights: tuple[str, ...] = ()
    """int8, int4: of decode and prefill, rows with the model's large weights in so few bits, on the CPU."""
    preset: str = "nano"
    """Configuration of the model of train, decode and prefill, with random weights."""
    backends: tuple[str, ...] = ("auto",)
    """Backends of the model, a row each; `ops` measures every one that is there."""
    repeats: int = 7
    """Timed rounds after the warm-up; in each, everything in a group runs once, in turn."""
    threads: int = 0
    """Threads of the CPU; 0 leaves the number to PyTorch."""
    device: str | None = None
    """cpu, cuda or a certain GPU such as cuda:1; a GPU if there is one by default."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("lengths", "contexts", "operations", "dtypes", "backends"):
            _require(len(getattr(self, name)) > 0, name, getattr(self, name), "one or more")
        for name in ("lengths", "contexts"):
            _require(min(getattr(self, name)) >= 1, name, getattr(self, name), "1 token or more each")
        for name in ("batch", "heads", "key_value_heads", "head_width", "repeats"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(self.head_width <= 256, "head_width", self.head_width, "at most 256")
        _require(self.vocabulary >= 2, "vocabulary", self.vocabulary, "2 or more")
        _require(self.threads >= 0, "threads", self.threads, "0 (PyTorch's own choice) or more")
        divides = self.heads % self.key_value_heads == 0
        _require(divides, "key_value_heads", self.key_value_heads, f"a divisor of heads = {self.heads}")
        for name, known in (("operations", OPERATIONS), ("dtypes", DTYPES), ("weights", WIDTHS)):
            for value in getattr(self, name):
                _require(value in known, name, value, f"from {', '.join(known)}")
        preset(self.preset)

    @property
    def channels(self) -> int:
        return self.heads * self.head_width

    def command(self, kind: str) -> str:
        """The command line that measures this again."""
        words = ["atma", "bench", kind]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                words += [f"--{field.name.replace('_', '-')}", *_words(value)]
        return shlex.join(words)


def _words(value: object) -> list[str]:
    return [str(part) for part in value] if isinstance(value, tuple) else [str(value)]


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"'{name}' must be {rule}, not {value!r}")
