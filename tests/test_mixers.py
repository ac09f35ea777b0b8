"""Mixers by name: the table, tables of a recipe, entry points of other packages, and what travels between layers."""

import importlib.metadata
import sys
import types
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from atma.config import ModelConfig, Recipe, dump_toml, from_dict, identity, load_recipe, preset, recipe_of, to_dict
from atma.generation import Generation
from atma.layers import Linear, init_linear
from atma.mixers import MIXERS, Call, Mixer, find, names, small, table
from atma.mixers.attention import Attention
from atma.mixers.heads import Core, Heads, Memory
from atma.model import Model
from atma.ops import softmax_attention
from atma.serve import Engine
from atma.settings import Settings
from atma.state import leaves
from atma.tokenizer import byte_tokenizer
from tests.conftest import tiny
from tests.laws.conftest import randomise

OWN = {"query_heads": 2, "key_value_heads": 1, "head_width": 8}


class Nothing(NamedTuple):
    """No state at all."""


@dataclass(frozen=True)
class Config:
    share: float = 0.5


class Skip(Mixer):
    """Adds a share of the embedding; leaves a note to the layers after it."""

    Config = Config
    reads_call = True

    def __init__(self, config: Config, place) -> None:
        super().__init__()
        self.share = config.share

    def init_weights(self, generator) -> None:
        """There are none."""

    def init_state(self, batch: int, capacity: int) -> Nothing:
        return Nothing()

    def forward(self, x: Tensor, state=None, *, segment_ids=None, call: Call | None = None):
        assert call is not None
        call.left["seen"] = [*call.left.get("seen", []), len(x)]
        return self.share * call.embedding * len(call.left["seen"]), state


@pytest.fixture
def installed(monkeypatch):
    """Makes entry points of a package named "others" out of names and what they stand for."""

    def install(**found: str) -> None:
        module = types.ModuleType("others")
        module.Skip = Skip
        monkeypatch.setitem(sys.modules, "others", module)
        points = [importlib.metadata.EntryPoint(name, value, "atma.mixers") for name, value in found.items()]
        monkeypatch.setattr(table, "_points", lambda what: tuple(points) if what == "mixer" else ())
        find.cache_clear()

    yield install
    find.cache_clear()


def test_every_name_of_the_table_makes_a_model_over_its_tiny_options():
    for name in MIXERS:
        for options in small(name):
            model = Model(ModelConfig(23, width=16, depth=2, pattern=("local", name), **options))
            hidden, _ = model(torch.zeros(1, 5, dtype=torch.long), model.init_state(1, 5))
            assert hidden.shape == (1, 5, 16)


def test_a_name_fixes_its_options_and_the_others_are_shared():
    config = ModelConfig(23, width=16, depth=3, pattern=("gated_conv", "atma", "rope"), window=5, local_taps=2, **OWN)
    one, other = (config.mixer(layer) for layer in (1, 2))
    assert isinstance(one, Attention) and isinstance(other, Attention)
    assert [(mixer.config.core, mixer.config.memory, mixer.config.window) for mixer in (one, other)] == [
        ("polar", True, 5),
        ("rope", False, 5),
    ]
    with pytest.raises(ValueError, match="'core' is 'polar' by the kind 'atma', not 'nope'"):
        ModelConfig(pattern=("gated_conv", "atma"), core="nope")


def test_a_table_of_its_own_wins_over_shared_options_and_comes_back_from_toml(tmp_path):
    path = tmp_path / "far.toml"
    path.write_text(
        '[model]\nwidth = 16\ndepth = 2\npattern = ["near", "far"]\nwindow = 7\nquery_heads = 2\nkey_value_heads = 1\n'
        '[model.mixers.near]\nkind = "polar"\n[model.mixers.far]\nkind = "nope"\nwindow = 9\nhead_width = 4\n'
    )
    recipe = load_recipe(path)
    options = {name: one.options for name, one in recipe.model.named().items()}
    assert [(options[name]["window"], options[name]["head_width"]) for name in ("near", "far")] == [(7, 128), (9, 4)]
    again = tmp_path / "again.toml"
    again.write_text(dump_toml(recipe))
    assert load_recipe(again) == recipe and identity(load_recipe(again)) == identity(recipe)
    assert Recipe(model=to_dict(recipe.model)).model == recipe.model


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"pattern": ["gated_con"]}, r"'model.pattern': no mixer 'gated_con'; did you mean 'gated_conv'\?"),
        ({"mixers": {"far": {"window": 3}}}, "'model.mixers.far' has no kind"),
        ({"mixers": {"far": 3}}, "'model.mixers.far' must be a table, not 3"),
        ({"mixers": 3}, "'model.mixers' must be tables, not 3"),
        ({"mixers": {"far": {"kind": "attn"}}}, "no mixer 'attn'; did you mean"),
        ({"mixers": {"far": {"kind": "nope", "windw": 3}}}, r"'model.mixers.far.windw'; did you mean '.*window'\?"),
        ({"mixers": {"far": {"kind": "nope", "window": "3"}}}, "'model.mixers.far.window' must be of type int"),
        ({"mixers": {"far": {"kind": "nope", "core": "rope"}}}, "'model.mixers.far.core' must be left out, or 'nope'"),
        ({"mixers": {"polar": {"kind": "nope"}}}, "'model.mixers.polar': there is a mixer 'polar' already"),
        ({"pattern": ["atma"], "local_taps": 5}, "unknown key 'model.local_taps'; did you mean"),
        ({"memory": "dleta"}, r"'model.memory': no memory 'dleta'; did you mean 'delta'\?"),
    ],
)
def test_what_names_nothing_is_one_line_with_the_nearest_name(model, told):
    with pytest.raises(ValueError, match=told) as caught:
        recipe_of({"model": model})
    assert "\n" not in str(caught.value)


def test_a_preset_with_another_pattern_keeps_the_options_that_it_has():
    changed = preset("nano").changed({"pattern": ["nope"]})
    assert changed.named()["nope"].options["head_width"] == 64 and "max_half_life" not in changed.options
    assert preset("nano").changed({"core": "rope"}).core == "rope"


def test_a_package_joins_the_table_by_an_entry_point(installed):
    installed(skip="others:Skip")
    assert "skip" in names()
    model = Model(ModelConfig(23, width=16, depth=3, pattern=("skip", "local", "skip"), share=2.0))
    tokens = torch.arange(4)[None]
    x = model.embed(tokens)
    expected = model.norm(x + 2 * x + 2 * x * 2)  # the second of them finds what the first has left
    torch.testing.assert_close(model(tokens)[0], expected)
    torch.testing.assert_close(model(tokens)[0], expected)  # and the next call nothing of the last


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("others:Nobody", "the mixer 'skip' of .* cannot be imported: AttributeError"),
        ("nowhere_at_all:Skip", "the mixer 'skip' of .* cannot be imported: ModuleNotFoundError"),
        ("others:torch", "cannot be imported"),
        ("builtins:dict", "the mixer 'skip' of .* is builtins:dict, which is no atma.mixers.Mixer"),
    ],
)
def test_an_entry_point_that_is_no_mixer_is_one_line(installed, value, told):
    installed(skip=value)
    with pytest.raises(ValueError, match=told) as caught:
        ModelConfig(pattern=("skip",))
    assert "\n" not in str(caught.value)


def test_two_mixers_of_one_name_are_refused(installed):
    installed(polar="others:Skip")
    with pytest.raises(ValueError, match="two packages have a mixer 'polar': atma-lm and others:Skip; uninstall one"):
        ModelConfig(pattern=("polar",))
    assert ModelConfig(pattern=("nope",), **OWN).layers[0] == "nope"


@dataclass(frozen=True)
class Sharpness:
    sharpness: float = 2.0


class CosineCore(Core):
    """A core of another package: softmax attention whose scores are cosines."""

    Config = Sharpness

    def __init__(self, config: Sharpness, heads: Heads) -> None:
        super().__init__(heads)
        self.scale = config.sharpness

    def forward(self, q, k, v, start, segment_ids):
        unit_q, unit_k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        return softmax_attention(unit_q, unit_k, v, self.scale, start, segment_ids, self.window), None


class TallyMemory(Memory):
    """A memory of another package: the sum of all values so far."""

    Config = Config

    def __init__(self, config: Config, heads: Heads) -> None:
        super().__init__()
        self.width = heads.groups * heads.head_width
        self.out_proj = Linear(self.width, heads.place.width)

    def init_weights(self, generator) -> None:
        init_linear(self.out_proj, generator, zero=True)

    def init_state(self, batch: int) -> Tensor:
        return self.out_proj.weight.new_zeros(batch, self.width)

    def forward(self, x, q, k, v, memory, *, segment_ids=None):
        flat = v.transpose(1, 2).flatten(2)
        if segment_ids is not None:
            together = (segment_ids[:, :, None] == segment_ids[:, None]).tril().to(flat.dtype)
            return self.out_proj(together @ flat), None
        sums = flat.cumsum(1) + (0 if memory is None else memory[:, None])
        return self.out_proj(sums), sums[:, -1]


def test_a_core_and_a_memory_of_another_package_are_options_of_attention(monkeypatch):
    module = types.ModuleType("parts")
    module.CosineCore, module.TallyMemory = CosineCore, TallyMemory
    monkeypatch.setitem(sys.modules, "parts", module)
    found = {"core": ("cosine", "parts:CosineCore"), "memory": ("tally", "parts:TallyMemory")}
    points = {what: (importlib.metadata.EntryPoint(*point, "atma"),) for what, point in found.items()}
    monkeypatch.setattr(table, "_points", lambda what: points.get(what, ()))
    find.cache_clear()
    config = ModelConfig(257, width=16, depth=2, pattern=("local", "global"), **OWN, core="cosine", memory="tally")
    config = config.changed({"sharpness": 5.0, "share": 0.25})
    model = randomise(Model(config))
    tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, state = model(tokens), model.init_state(2, 40)
        first, state = model(tokens[:, :17], state)
        rest, state = model(tokens[:, 17:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole[0], rtol=1e-10, atol=1e-10)
    assert from_dict(ModelConfig, to_dict(config)) == config and config.sharpness == 5.0
    generation = Generation(model.float(), byte_tokenizer(), Settings(max_tokens=20, temperature=0, ignore_end=True))
    generation.feed("some text")
    assert "".join(generation.write()) and generation.ended == "length"
    find.cache_clear()


class HalfState(NamedTuple):
    """A place for every second token."""

    sums: Tensor

    grows = {"sums": 1}  # noqa: RUF012


class Half(Skip):
    def init_state(self, batch: int, capacity: int) -> HalfState:
        return HalfState(torch.zeros(batch, -(-capacity // 2), 4))


def test_a_mixer_that_grows_and_cannot_be_paged_is_one_line(installed):
    installed(half="others:Half")
    sys.modules["others"].Half = Half
    model = Model(ModelConfig(257, width=16, depth=1, pattern=("half",)))
    with pytest.raises(
        ValueError, match=r"'blocks.0.sums' of HalfState cannot be served: .* must be \(2, 3, 4\)"
    ) as told:
        Engine(model, byte_tokenizer())
    assert "\n" not in str(told.value)


def test_the_record_of_a_call_costs_a_compiled_model_nothing_of_its_graph():
    model = Model(tiny()).eval()
    tokens = torch.arange(6)[None] % 23
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens)[0], model(tokens)[0])


@torch.no_grad()
@pytest.mark.parametrize("name", names())
def test_a_state_keeps_its_dtypes_under_autocast(name):
    for options in small(name):
        mixer = ModelConfig(16, width=16, depth=2, pattern=(name,), **options).mixer(1)
        mixer.init_weights(torch.Generator().manual_seed(0))
        x, before = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1)), mixer.init_state(2, 3)
        with torch.autocast("cpu", torch.bfloat16):
            _, after = mixer(x, before, **({"call": Call(x)} if mixer.reads_call else {}))
        assert [leaf.tensor.dtype for leaf in leaves(after)] == [leaf.tensor.dtype for leaf in leaves(before)]
