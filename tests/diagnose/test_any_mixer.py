"""A mixer that a package brings is diagnosed by what it tells of itself, and one that tells nothing by its losses."""

import importlib.metadata
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from atma.config import ModelConfig
from atma.diagnose.diagnosis import diagnose
from atma.diagnose.interventions import can_be_capped, capped, masked
from atma.diagnose.page import NOTHING, ONLY_LOSSES, figures, page, sentences
from atma.diagnose.parts import Head, Part, channel_masks, channels, held_by, memory_heads, parse_heads
from atma.diagnose.plan import Plan
from atma.diagnose.probe import Probe
from atma.diagnose.reading import read
from atma.diagnose.stress import gains
from atma.eval.likelihood.prefixes import Documents
from atma.eval.provenance import model_provenance
from atma.layers import Linear
from atma.mixers import Mixer, Place, table
from atma.model import Model
from atma.tokenizer import byte_tokenizer
from tests.diagnose.conftest import Loaded


@dataclass(frozen=True)
class Config:
    tally_heads: int = 3
    square: bool = True
    """Whether what is remembered is a square a head."""


class TallyState(NamedTuple):
    length: Tensor  # (B,)
    codes: Tensor  # (B, capacity, H·K)
    sums: Tensor  # (B, H, K, K) or (B, H, K)

    grows = {"codes": 1}  # noqa: RUF012


class Tally(Mixer):
    """The mean of all codes so far, and a fading sum of their squares (or of themselves) read by the token's own."""

    Config = Config
    reads_call = True

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.config, self.heads = config, config.tally_heads
        self.code_proj = Linear(place.width, 4 * self.heads)
        self.fade_proj = Linear(place.width, self.heads)
        self.mean_proj = Linear(4 * self.heads, place.width)
        self.fading_proj = Linear(4 * self.heads, place.width)

    def init_weights(self, generator) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def init_state(self, batch, capacity) -> TallyState:
        zeros, form = self.code_proj.weight.new_zeros, (4, 4) if self.config.square else (4,)
        length = torch.zeros(batch, dtype=torch.int32)
        return TallyState(length, zeros(batch, capacity, 4 * self.heads), zeros(batch, self.heads, *form))

    def log_decay(self, x: Tensor) -> Tensor:
        return nn.functional.logsigmoid(self.fade_proj(x) + 2).mT

    def bound(self, head: int) -> float:
        return 500.0

    def channels(self) -> dict[str, nn.Linear]:
        return {"mean": self.mean_proj, "fading": self.fading_proj}

    def forward(self, x, state=None, *, segment_ids=None, call=None):
        assert call.embedding.shape == x.shape
        held = self.init_state(x.shape[0], x.shape[1]) if state is None else state
        start, codes, gamma = int(held.length[0]), self.code_proj(x), self.log_decay(x).exp()
        held.codes[:, start : start + x.shape[1]] = codes
        seen = held.codes[:, : start + x.shape[1]].cumsum(1)
        counts = torch.arange(1, seen.shape[1] + 1)[:, None]
        sums, reads = held.sums, []
        for t, code in enumerate(codes.unflatten(-1, (self.heads, 4)).unbind(1)):
            fading = gamma[..., t, None, None] if self.config.square else gamma[..., t, None]
            sums = fading * sums + (code[..., None] * code[..., None, :] if self.config.square else code)
            reads.append(((sums @ code[..., None]).squeeze(-1) if self.config.square else sums).flatten(1))
        y = self.mean_proj((seen / counts)[:, start:]) + self.fading_proj(torch.stack(reads, 1))
        return y, None if state is None else TallyState(held.length + x.shape[1], held.codes, sums)


class Fading(Mixer):
    """A running sum of two heads of four channels, each channel with a decay of its own; no bound is told of."""

    fixed = False
    """Whether `forward` asks `log_decay` for its decays."""

    def __init__(self, config, place: Place) -> None:
        super().__init__()
        self.heads = 2
        self.in_proj, self.fade_proj = Linear(place.width, 8), Linear(place.width, 8)
        self.out_proj = Linear(8, place.width)

    def init_weights(self, generator) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def init_state(self, batch, capacity):
        return FadingState(torch.zeros(batch, dtype=torch.int32), self.in_proj.weight.new_zeros(batch, 2, 4))

    def channels(self) -> dict[str, nn.Linear]:
        return {"read": self.out_proj}

    def decays(self, x: Tensor) -> Tensor:
        return nn.functional.logsigmoid(self.fade_proj(x) + 2).unflatten(-1, (2, 4)).transpose(1, 2)

    def log_decay(self, x: Tensor) -> Tensor:
        return self.decays(x).mean(-1)

    def forward(self, x, state=None, *, segment_ids=None):
        held = self.init_state(x.shape[0], 1) if state is None else state
        own = self.decays(x)
        if not self.fixed:
            own = own + (self.log_decay(x) - own.mean(-1))[..., None]
        memory, reads = held.memory, []
        for value, gamma in zip(self.in_proj(x).unbind(1), own.exp().unbind(2), strict=True):
            memory = gamma * memory + value.unflatten(-1, (2, 4))
            reads.append(memory.flatten(1))
        y = self.out_proj(torch.stack(reads, 1))
        return y, None if state is None else FadingState(held.length + x.shape[1], memory)


class FadingState(NamedTuple):
    length: Tensor
    memory: Tensor  # (B, 2, 4)


class Stubborn(Fading):
    fixed = True


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    """As if a package had brought it."""
    brought = (Tally, Fading, Stubborn)
    group = table.GROUPS["mixer"]
    points = tuple(
        importlib.metadata.EntryPoint(x.__name__.lower(), f"{__name__}:{x.__name__}", group) for x in brought
    )
    monkeypatch.setattr(table, "_points", lambda what: points if what == "mixer" else ())
    table.find.cache_clear()
    yield
    table.find.cache_clear()


def made(*pattern, **options) -> Model:
    generator = torch.Generator().manual_seed(5)
    config = ModelConfig(257, 16, depth=len(pattern), pattern=pattern, mlp_multiple=2, **options)
    model = Model(config, generator).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


NEAR = {"query_heads": 2, "key_value_heads": 1, "head_width": 8, "window": 24}
TOKENS = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))


def diagnosed(model, **plan):
    documents = Documents(np.random.default_rng(1).integers(97, 123, (2, 200)), 256)
    return diagnose(Loaded(model, byte_tokenizer()), documents, Plan(lengths=(128, 192), records=1, **plan))


@torch.no_grad()
def hidden(model):
    return model(TOKENS)[0]


def of(rows, kind):
    return [row for row in rows if row["kind"] == kind]


def test_it_has_the_rows_of_what_it_has():
    rows = diagnosed(made("gated_conv", "tally", "polar", **NEAR), stress=1, heads="1.2", cap_half_life=5).rows
    assert [(row["layer"], row["head"], row["bound"]) for row in of(rows, "retention")] == [
        (1, i, 500) for i in (0, 1, 2)
    ]
    changes = [row["change"] for row in of(rows, "loss") if row["length"] == 128]
    assert changes == [
        "as it is",
        *(f"without the {channel} of layer 1" for channel in ("mean", "fading")),
        *(f"without the {channel} of layer 2" for channel in ("read", "count")),
        *(f"without head 1.{head}" for head in range(3)),
        *(f"without head 2.{head}" for head in range(2)),
        "head 1.2 capped at 5",
    ]
    assert {row["mixer"] for row in of(rows, "gain")} == {"gated_conv", "tally", "polar"}
    assert {key for row in of(rows, "branch") if row["layer"] == 1 for key in row if key.endswith("_cosine")} == {
        "residual_mean_cosine", "residual_fading_cosine", "mean_fading_cosine",
    }  # fmt: skip
    heads = {(row["layer"], row["head"]): row for row in of(rows, "channel")}
    assert set(heads) == {(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)}
    assert "memory_norm" in heads[1, 0] and not {"n_eff", "copy_score", "magnitude"} & set(heads[1, 0])
    assert {"n_eff", "copy_score", "magnitude", "null_mass"} <= set(heads[2, 0]) and "memory_norm" not in heads[2, 0]


@torch.no_grad()
def test_its_half_lives_and_norms_are_those_of_its_own_formula(text):
    model = made("tally", "gated_conv")
    probe, mixer = Probe(model, 64), model.blocks[0].mixer
    read(model, text, (160, 300), 100, probe)
    x = model.blocks[0].norm_mixer(model.embed(text.tokens[None, :300]))
    codes, gamma, sums = mixer.code_proj(x)[0].unflatten(-1, (3, 4)), mixer.log_decay(x)[0].exp(), torch.zeros(3, 4, 4)
    for t in range(300):
        sums = gamma[:, t, None, None] * sums + torch.einsum("hk,hl->hkl", codes[t], codes[t])
    found = [row["memory_norm"] for row in probe.rows() if row["kind"] == "channel" and row["length"] == 300]
    assert found == pytest.approx([float(x.norm()) for x in sums], rel=1e-9)
    [first, *_] = of(diagnosed(model, mask="none", stress=0).rows, "retention")
    bias = float(mixer.fade_proj.bias[0])
    assert first["gamma"] == pytest.approx(1 / (1 + math.exp(-bias - 2)))


@torch.no_grad()
def test_a_cap_and_a_mask_are_of_its_own_decays_and_columns():
    model = made("gated_conv", "tally")
    mixer, before = model.blocks[1].mixer, hidden(model)
    with capped(model, [Head(1, 1)], 2.0):
        found = hidden(model)
        assert float(mixer.log_decay(torch.randn(1, 99, 16).double())[:, 1].max()) <= -math.log(2) / 2
    own = mixer.log_decay
    bounds = torch.tensor([0, -math.log(2) / 2, 0], dtype=torch.float64)[:, None]
    mixer.log_decay = lambda x: own(x).minimum(bounds)
    assert torch.equal(found, hidden(model)) and not torch.equal(found, before)
    del mixer.log_decay
    with masked(model, Part((1,), ("mean",), 2)):
        found = hidden(model)
    mixer.mean_proj.weight[:, 8:] = 0
    torch.testing.assert_close(found, hidden(model), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_decays_by_channel_are_told_by_their_mean_and_capped_by_it():
    model = made("fading", "gated_conv")
    mixer, found = model.blocks[0].mixer, diagnosed(model, stress=0, heads="0.1", cap_half_life=2)
    bias = mixer.fade_proj.bias.unflatten(0, (2, 4)) + 2
    rows = of(found.rows, "retention")
    assert [row["gamma"] for row in rows] == pytest.approx(nn.functional.logsigmoid(bias).mean(1).exp().tolist())
    assert [row["bound"] for row in rows] == [None, None] and all(row["tokens"] == 2 * 192 for row in rows)
    names = {row["change"] for row in of(found.rows, "effect")}
    assert names == {"without the read of layer 0", "without head 0.0", "without head 0.1", "head 0.1 capped at 2"}
    before = hidden(model)
    with capped(model, [Head(0, 1)], 2.0):
        assert not torch.equal(hidden(model), before)
        assert float(mixer.log_decay(TOKENS.new_ones(1, 5, 16).double())[:, 1].max()) <= -math.log(2) / 2


def test_what_no_cap_reaches_is_not_capped_and_said_so_where_it_is_named():
    model = made("stubborn", "fading")
    assert can_be_capped(model) == [Head(1, 0), Head(1, 1)]
    rows = diagnosed(model, stress=0, heads="all", cap_half_life=2, mask="none").rows
    assert {row["change"] for row in of(rows, "effect")} == {
        "head 1.0 capped at 2", "head 1.1 capped at 2", "heads 1.0, 1.1 capped at 2",
    }  # fmt: skip
    assert len(of(rows, "retention")) == 4
    with pytest.raises(ValueError, match=r"what forgets in 0\.1 does not take its decays from its log_decay"):
        diagnosed(model, heads="0.1")


def test_maps_are_moved_where_there_are_any_and_chosen_among_these():
    model = made("tally", "fading", "polar", **NEAR)
    rows = diagnosed(model, stress=0, mask="none", heads="1.0", interpolate=("all=0.5",), choose_heads=1).rows
    [change] = {row["change"] for row in of(rows, "effect") if "strength" in row}
    assert change == "heads 2.0, 2.1 moved 0.5 to the identity"
    [choice] = of(rows, "choice")
    assert set(choice["tried"]) == {"2.0", "2.1"} and choice["rest_documents"] == 1
    with pytest.raises(ValueError, match=r"head 1\.0 has no map of weights"):
        diagnosed(model, interpolate=("1.0=0.5",))
    with pytest.raises(ValueError, match="no head of this model has a map of weights"):
        diagnosed(made("tally", "fading"), choose_heads=1)


def test_a_memory_of_another_form_has_no_norm():
    rows = diagnosed(made("tally", "gated_conv", square=False), mask="none", stress=0).rows
    assert of(rows, "retention") and of(rows, "branch") and not of(rows, "channel")
    assert sentences(rows, [])[0] == NOTHING


def test_a_cap_concerns_the_channels_that_what_forgets_writes_to():
    model = made("tally", "atma", **NEAR)
    assert held_by(Head(0, 2), model) == ["0.2 mean", "0.2 fading"]
    assert held_by(Head(1, 0), model) == ["1.0 memory"]


def test_layers_may_have_different_heads_and_channels():
    options = {"key_value_heads": 1, "head_width": 8}
    mixers = {"wide": {"kind": "nope", "query_heads": 4}, "two": {"kind": "atma", "query_heads": 2}}
    model = made("wide", "tally", "two", mixers=mixers, **options)
    assert channels(model) == ("read", "mean", "fading", "count", "memory")
    assert channel_masks(model)["without any read"] == Part((0, 2), ("read",))
    assert "without any memory" not in channel_masks(model)
    assert Part((0, 2), ("read",)).heads(model) == ["0.0", "0.1", "0.2", "0.3", "2.0", "2.1"]
    assert parse_heads("all", model) == memory_heads(model) == [*(Head(1, i) for i in range(3)), Head(2, 0), Head(2, 1)]
    with pytest.raises(ValueError, match=r"head 0\.0; layers with a memory: 1, heads 0 to 2; 2, heads 0 to 1"):
        parse_heads("0.0", model)


@torch.no_grad()
def test_what_a_disturbed_block_leaves_is_not_for_the_blocks_behind_it(text, monkeypatch):
    model, found = made("tally", "tally"), []
    own = Tally.forward

    def forward(self, x, state=None, *, segment_ids=None, call=None):
        found.append(dict(call.left))
        call.left[str(len(found))] = x
        return own(self, x, state, segment_ids=segment_ids, call=call)

    monkeypatch.setattr(Tally, "forward", forward)
    gains(model, text, (64,), 1, 64)
    assert [sorted(left) for left in found] == [[], [], ["2"], ["2"]]


def test_a_model_that_tells_nothing_of_itself_has_its_losses_and_gains(tmp_path):
    found = diagnosed(made("gated_conv", "gated_conv"), stress=1)
    assert {row["kind"] for row in found.rows} == {"loss", "far", "recall", "gain"}
    assert sentences(found.rows, found.findings) == [ONLY_LOSSES, NOTHING]
    titles = [figure.title for figure in figures(found.rows)]
    assert titles == ["Loss by length", "What far context is worth", "Recall by length", "Block gains"]
    written = page(tmp_path / "page.html", "plain", found.rows, found.findings, "atma diagnose plain")
    assert ONLY_LOSSES in written.read_text()


def test_a_channel_that_is_not_called_is_told_of(monkeypatch):
    monkeypatch.setattr(
        Fading, "channels", lambda self: {"read": self.out_proj, "spare": self.in_proj.__class__(8, 16)}
    )
    with pytest.raises(ValueError, match="layer 0 names channels that its forward does not call: spare"):
        diagnosed(made("fading"), mask="none", stress=0)


def test_rows_tell_of_a_core_and_a_memory_where_there_are_any():
    with_core, without = (
        model_provenance(Loaded(made("gated_conv", name, **options), byte_tokenizer()))
        for name, options in (("atma", NEAR), ("tally", {}))
    )
    assert with_core["core"] == "polar" and not {"core", "memory"} & set(without)
    assert without["pattern"] == ["gated_conv", "tally"]
