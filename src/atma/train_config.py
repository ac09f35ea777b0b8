"""What a run trains on and how, as frozen data: the tables `[data]` and `[train]` of a recipe."""

import math
from dataclasses import dataclass, field
from typing import Literal

from atma.display import told
from atma.strict import LATER, PLACE, check_fields, require

Regulariser = Literal["none", "weak", "strong", "discrete", "zipfian"]
Precision = Literal["auto", "float32", "bfloat16"]
Optimiser = Literal["muon", "adamw"]
Scored = Literal["answers", "everything"]
TooLong = Literal["truncate", "skip"]


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from. Shares are fractions of the rows of a batch."""

    path: str = "data/stdlib"
    """A folder made by `atma prepare`, here or elsewhere (`s3://…`), or of .bin token shards."""
    recall_share: float = 0.0
    """Share of rows that are synthetic recall sequences: spans, keys and values to be repeated later."""
    recall_vocabulary: int = 0
    """The most token ids that one recall row draws its random tokens from; 0 is the whole vocabulary."""
    copy_warmup_tokens: int = 0
    """At the start, this many training tokens come from copy sequences over `copy_vocabulary` ids alone."""
    copy_vocabulary: int = 64
    """Token ids that the copy sequences at the start are drawn from."""
    scored: Scored = field(default="answers", metadata=LATER)
    """Which tokens of conversations have a loss: those of the answers, or all."""
    too_long: TooLong = field(default="truncate", metadata=LATER)
    """What becomes of a conversation that is longer than a row: its end is cut off, or it is left out."""

    def __repr__(self) -> str:
        return told(self)

    def __post_init__(self) -> None:
        check_fields(self)
        require(0 <= self.recall_share <= 1, "recall_share", self.recall_share, "between 0 and 1")
        require(self.recall_vocabulary >= 0, "recall_vocabulary", self.recall_vocabulary, "0 or more")
        require(self.copy_warmup_tokens >= 0, "copy_warmup_tokens", self.copy_warmup_tokens, "0 or more")
        require(self.copy_vocabulary >= 2, "copy_vocabulary", self.copy_vocabulary, "at least 2")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Lengths and batches are tokens, rates are per step. Source: maths.md, section 6."""

    length: int = 256
    """Tokens of a row, the length that the model is trained at."""
    batch_tokens: int = 8192
    """Tokens per optimiser step, of all processes; a multiple of length × accumulation × ranks / context_ranks."""
    tokens: int = 2_000_000
    """Training tokens in all, rounded up to whole steps."""
    accumulation: int = 1
    """Micro-batches of an optimiser step, one after the other; more need less memory."""
    muon_rate: float = 0.01
    """Highest rate of the matrices inside blocks, which Muon moves."""
    embedding_rate: float = 0.006
    """Highest rate of the embedding, which AdamW moves."""
    head_rate: float = 0.006
    """Highest rate of the head, which AdamW moves."""
    vector_rate: float = 0.006
    """Highest rate of norms, biases and other vectors, which AdamW moves."""
    momentum: float = 0.95
    """Of Muon, in the form of Nesterov."""
    weight_decay: float = 0.01
    """Share of the rate by which matrices shrink at every step."""
    beta1: float = 0.8
    """Of AdamW: how much of the mean gradient stays from step to step."""
    beta2: float = 0.95
    """Of AdamW: how much of the mean squared gradient stays."""
    epsilon: float = 1e-10
    """Of AdamW: added to the root of the mean squared gradient."""
    warmup_share: float = 0.02
    """Share of steps in which the rate rises from zero."""
    constant_share: float = 0.3
    """Share of steps, warm-up included, before the rate falls linearly to zero."""
    clip: float = 1.0
    """Norm of all gradients together beyond which they are scaled down to it."""
    seed: int = 0
    """Chooses initial weights, and the order of the data."""
    precision: Precision = "auto"
    """What a step computes in: "bfloat16" autocast, "float32", or "auto"."""
    regulariser: Regulariser = "none"
    """A further loss on what the blocks hand on (maths.md, section 6)."""
    regulariser_weight: float = 0.01
    """Share of that loss in the whole; the loss of the text has the rest."""
    distractor_weight: float = 0.0
    """Weight of the loss that attention gives to keys of noise (maths.md, section 6); 0 leaves it out."""
    checkpoint_every: int = 200
    """Steps from one checkpoint to the next."""
    keep_checkpoints: int = 2
    """The newest checkpoints that stay on disk."""
    evaluate_every: int = 100
    """Steps from one validation to the next; 0: never."""
    evaluation_tokens: int = 65_536
    """Held-out tokens that a validation reads."""
    init_from: str = field(default="", metadata=PLACE)
    """A model folder, a run or a packaged model to start from: its weights and configuration."""
    init_hash: str = field(default="", metadata=LATER)
    """SHA-256 of those weights; found from init_from and kept, so that a run knows its start wherever it lies."""
    epochs: float = field(default=0.0, metadata=LATER)
    """Passes over the data; `tokens` then follows from it. 0: as many `tokens` as are asked for."""
    optimiser: Optimiser = field(default="muon", metadata=LATER)
    """Muon for matrices and AdamW for the rest at four rates, or AdamW for everything at `adamw_rate`."""
    adamw_rate: float = field(default=2e-5, metadata=LATER)
    """The rate of every parameter under optimiser = "adamw"."""
    lora_rate: float = field(default=2e-4, metadata=LATER)
    """The rate of adapters, which AdamW moves under either optimiser."""
    context_ranks: int = field(default=1, metadata=LATER)
    """Neighbouring processes that share each row, for rows longer than one device can hold."""
    context_shares: tuple[float, ...] = field(default=(), metadata=LATER)
    """What each of them takes of a row, in proportion; (): equal stretches. Attention makes later tokens dearer."""
    shard_ranks: int = field(default=1, metadata=LATER)
    """Neighbouring processes that keep a part of every weight each, for models larger than one device can hold."""
    offload: bool = field(default=False, metadata=LATER)
    """Keep weights, gradients and optimiser state in the processor's memory, and bring a block at a time to the GPU."""
    checkpointing: bool = field(default=False, metadata=LATER)
    """Keep of each block only what it reads, and compute the rest again for its gradients: less memory, more time."""
    checkpointing_every: int = field(default=1, metadata=LATER)
    """Of so many blocks checkpointing is of one: 2 is of half of them, for some of the memory and of the time."""
    compile: bool = field(default=False, metadata=LATER)
    """Have torch.compile make code of each block, for steps alone: some minutes at the start. Meant for GPUs."""
    hang_seconds: float = field(default=600.0, metadata=LATER)
    """How long the others wait for one of several processes, and a run for its disk, before they end."""
    early_stopping: int = field(default=0, metadata=LATER)
    """Validations in a row without a new lowest loss that end the run; 0: never."""
    keep_best: bool = field(default=False, metadata=LATER)
    """Keep the model of the lowest validation loss, in best/ of the run folder."""
    sample_every: int = field(default=0, metadata=LATER)
    """Steps between texts that the model writes to show how it stands, after the validation of a step; 0: none."""
    sample_prompts: tuple[str, ...] = field(default=("",), metadata=LATER)
    """What they go on from; "" is the beginning of a text."""
    sample_tokens: int = field(default=64, metadata=LATER)
    """Tokens of each at the most."""

    def __repr__(self) -> str:
        return told(self)

    def __post_init__(self) -> None:
        check_fields(self)
        sizes = ("length", "batch_tokens", "tokens", "accumulation", "checkpoint_every", "keep_checkpoints")
        for name in (
            *sizes,
            "evaluation_tokens",
            "sample_tokens",
            "context_ranks",
            "shard_ranks",
            "checkpointing_every",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        ranks, shares = self.context_ranks, self.context_shares
        require(
            bool(shares) or self.length % ranks == 0, "length", self.length, f"a multiple of context_ranks = {ranks}"
        )
        right = len(shares) in (0, ranks) and all(share > 0 for share in shares)
        require(right, "context_shares", shares, f"() or {ranks} numbers above 0, one for each of context_ranks")
        require(self.evaluate_every >= 0, "evaluate_every", self.evaluate_every, "0 (never) or more")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, below 2^63")
        require(self.early_stopping >= 0, "early_stopping", self.early_stopping, "0 (never) or more")
        require(self.sample_every >= 0, "sample_every", self.sample_every, "0 (never) or more")
        require(bool(self.sample_prompts), "sample_prompts", self.sample_prompts, "one text or more")
        wanted = next((name for name in ("early_stopping", "keep_best") if getattr(self, name)), None)
        require(not wanted or self.evaluate_every > 0, "evaluate_every", self.evaluate_every, f"1 or more for {wanted}")
        whole = self.batch_tokens % (self.length * self.accumulation) == 0
        unit = self.length * self.accumulation
        require(whole, "batch_tokens", self.batch_tokens, f"a multiple of length × accumulation = {unit}")
        rates = ("muon_rate", "embedding_rate", "head_rate", "vector_rate", "adamw_rate", "lora_rate")
        for name in (*rates, "weight_decay", "distractor_weight", "epochs"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more, and finite")
        for name in ("warmup_share", "constant_share", "regulariser_weight"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        for name in ("momentum", "beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("clip", "epsilon", "hang_seconds"):
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")

    @property
    def steps(self) -> int:
        """Optimiser steps that consume at least `tokens`."""
        return -(-self.tokens // self.batch_tokens)
