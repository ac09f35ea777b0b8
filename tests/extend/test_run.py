"""An extension: it begins as its teacher, goes on bit for bit after a stop, ends as an ordinary model, and refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atma.checkpoint import load_model, save_model
from atma.cli import main
from atma.config import ModelConfig, Recipe, TrainConfig
from atma.extend.run import Extension, adopt, fit, recipe_for
from atma.extend.settings import ExtendConfig
from atma.extend.ways import way_of
from atma.loading import load, load_floats
from atma.lora import LoraConfig, adapter_tensors, attach, save_adapters
from atma.model import Model
from atma.narrow import narrow, width_in
from atma.tokenizer import byte_tokenizer, train_bpe
from atma.train.loop import Stopped
from atma.train.record import read_record
from atma.train.source import Source
from atma.weights import TensorWriter, load_tensors
from tests.laws.conftest import randomise

VOCABULARY, LENGTH = 31, 16
TEACHER = {"query_heads": 2, "key_value_heads": 1, "head_width": 8, "mlp_multiple": 2}
CHOICES = [
    {"way": "polar"},
    {"way": "polar", "fade_share": 0.0, "memory": "none"},
    {"way": "polar", "trained": "low-rank", "rank": 2, "hidden_weight": 1.0},
    {"way": "window-memory", "window": 6, "memory": "kda", "trained": "new"},
    {"way": "window-memory", "window": 6, "memory": "delta", "sinks": 2, "teacher_share": 0.5},
    {"way": "linear", "window": 4},
    {"way": "linear", "window": 4, "trained": "low-rank"},
]


class Killed(Exception):
    """Stands for a stop at any moment."""


class Rows(tuple):
    tokens = property(lambda self: self[0])
    targets = property(lambda self: self[1])
    segment_ids = property(lambda self: self[2])


def rows(step: int) -> Rows:
    start = torch.randint(VOCABULARY, (4, 1), generator=torch.Generator().manual_seed(step))
    ids = (start + torch.arange(LENGTH + 1)) % VOCABULARY
    segments = (torch.arange(LENGTH) >= LENGTH // 2).int().expand(4, LENGTH)
    return Rows((ids[:, :-1], ids[:, 1:].clone(), segments))


def source(killed_at: int | None = None) -> Source:
    def make(step: int) -> Rows:
        if step == killed_at:
            raise Killed
        return rows(step)

    return Source(make, lambda i: rows(1000 + i), 1, "counting", VOCABULARY)


@pytest.fixture(params=[("rope", {"rope_canon": True}), ("rotary", {})], ids=["rope", "rotary"])
def teacher(request, tmp_path):
    return trained(tmp_path, *request.param)


def trained(tmp_path: Path, core: str, options: dict):
    kind = "grouped_query" if core == "rotary" else "attention"
    table = {"kind": kind, "core": core, "memory": False, **options}
    model = Model(ModelConfig(32, 16, 2, ("local", "whole"), {"whole": table}, TEACHER))
    randomise(model)
    save_model(tmp_path / "teacher", model, None)
    return load(tmp_path / "teacher")


def extension(teacher, choice) -> Extension:
    settings = ExtendConfig(**choice)
    train = TrainConfig(LENGTH, 4 * LENGTH, 6 * 4 * LENGTH, evaluate_every=3, checkpoint_every=2, precision="float32")
    recipe = recipe_for(teacher, settings, Recipe().data, train, "extended")
    return Extension(teacher, recipe, settings)


@pytest.mark.parametrize("choice", CHOICES[:5], ids=str)
def test_at_the_start_a_student_is_its_teacher_to_the_bit(teacher, choice):
    choice = choice | ({"window": LENGTH} if choice["way"] == "window-memory" else {})
    settings, tokens = ExtendConfig(**choice), rows(0).tokens
    way = way_of(settings, LENGTH, 0)
    student = Model(way.student(teacher.model.config))
    adopt(student, teacher.model)
    way.begin(student, teacher.model, tokens)
    with torch.no_grad():
        wanted, _ = teacher.model(tokens)
        assert torch.equal(student(tokens)[0], wanted)
        cached, found = student.init_state(4, LENGTH), []
        mine = teacher.model.init_state(4, LENGTH)
        for part in tokens.split(5, 1):
            y, cached = student(part, cached)
            z, mine = teacher.model(part, mine)
            found.append(torch.equal(y, z))
    assert all(found)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_stopped_extension_goes_on_bit_for_bit_and_ends_as_a_model_that_loads(teacher, choice, tmp_path):
    whole = fit(extension(teacher, choice), tmp_path / "whole", source())
    with pytest.raises(Killed):
        fit(extension(teacher, choice), tmp_path / "parts", source(killed_at=3))
    parts = fit(extension(teacher, choice), tmp_path / "parts", source(), resume=True)
    one, two = (load_model(folder)[0].state_dict() for folder in (whole, parts))
    assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
    losses = [[row.get("loss") for row in read_record(tmp_path / run)] for run in ("whole", "parts")]
    assert [x for x in losses[0] if x is not None] == [x for x in losses[1] if x is not None]


@pytest.mark.parametrize("choice", CHOICES[:1] + CHOICES[3:5], ids=str)
def test_what_is_folded_at_the_end_computes_what_the_student_did(teacher, choice):
    settings = ExtendConfig(**choice)
    way = way_of(settings, LENGTH, 0)
    student = randomise(Model(way.student(teacher.model.config))).double()
    way.at(student, 6, 6)
    tokens = rows(0).tokens
    with torch.no_grad():
        found, wanted = way.settled(student)(tokens)[0], student(tokens)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_polar_student_ends_as_the_polar_core_of_the_table(teacher):
    way = way_of(ExtendConfig(), LENGTH, 0)
    student = Model(way.student(teacher.model.config))
    options = way.settled(student).config.named()["extended_whole"].options
    assert options["core"] == "polar" and options["count_limit"] == LENGTH


def test_only_what_is_new_is_trained_where_that_is_asked_for(teacher, tmp_path):
    choice = {"way": "window-memory", "window": 6, "memory": "delta", "trained": "new"}
    final = load_model(fit(extension(teacher, choice), tmp_path / "run", source()))[0].state_dict()
    before = teacher.model.state_dict()
    assert all(torch.equal(final[name], value) for name, value in before.items())
    assert final["blocks.1.mixer.memory.out_proj.weight"].any()


def test_a_window_is_validated_as_the_finished_one_also_after_a_stop_before_it(teacher, tmp_path):
    choice = {"way": "window-memory", "window": 6, "memory": "delta", "sinks": 2, "window_range": (2, 12)}
    asked = iter([False, False, True, True])  # after two steps, before the validation of the third, after it
    with pytest.raises(Stopped):
        fit(extension(teacher, choice), tmp_path / "parts", source(), stop=lambda: next(asked))
    fit(extension(teacher, choice), tmp_path / "parts", source(), resume=True)
    fit(extension(teacher, choice), tmp_path / "whole", source())
    one, two = (
        [row["loss"] for row in read_record(tmp_path / run) if row["kind"] == "validation"]
        for run in ("whole", "parts")
    )
    assert one == two and len(one) == 2


def test_a_model_without_softmax_attention_is_refused(tmp_path):
    config = ModelConfig(32, 16, 2, ("local", "polar"), options=TEACHER)
    with pytest.raises(ValueError, match=r"no layer of softmax attention with positions to give length to: .*polar"):
        way_of(ExtendConfig(), LENGTH, 0).student(config)


def test_a_folder_begun_otherwise_is_refused(teacher, tmp_path):
    fit(extension(teacher, CHOICES[0]), tmp_path / "run", source())
    other = extension(teacher, {"way": "polar", "logits_weight": 2.0})
    with pytest.raises(ValueError, match=r"extend\.json: begun with another settings"):
        fit(other, tmp_path / "run", source(), resume=True)


@pytest.fixture
def talking(tmp_path):
    """A teacher with a tokenizer and a chat template."""
    model = Model(ModelConfig(257, 16, 1, ("attention",), {}, TEACHER, core="rope", memory=False))
    randomise(model)
    save_model(tmp_path / "talking", model, byte_tokenizer())
    (tmp_path / "talking/chat_template.jinja").write_text("{{ messages }}")
    return load(tmp_path / "talking")


def test_the_end_is_talked_to_as_the_beginning_was(talking, tmp_path):
    final = fit(extension(talking, CHOICES[1]), tmp_path / "run", replace(source(), tokenizer=byte_tokenizer()))
    assert (final / "chat_template.jinja").read_text() == "{{ messages }}"
    assert load(final).tokenizer is not None


def test_adapters_are_a_teacher_with_their_base(talking, tmp_path):
    attached = attach(talking.model, LoraConfig(rank=2))
    with torch.no_grad():
        for name, value in adapter_tensors(talking.model).items():
            value.add_(0.1 if name.endswith("lora_b") else 0.0)
    save_adapters(tmp_path / "adapters", talking.model, attached, str(talking.path))
    final = fit(extension(load(tmp_path / "adapters"), CHOICES[1]), tmp_path / "run", source())
    assert (final / "chat_template.jinja").read_text() == "{{ messages }}"
    with pytest.raises(ValueError, match="begun with another teacher"):
        fit(extension(load(talking.path), CHOICES[1]), tmp_path / "run", source(), resume=True)


def test_a_teacher_may_lie_in_several_files(teacher, tmp_path):
    tensors = load_tensors(teacher.path / "model.safetensors")
    shards = {f"model-0000{i}-of-00002.safetensors": dict(list(tensors.items())[i - 1 :: 2]) for i in (1, 2)}
    for name, part in shards.items():
        TensorWriter(part)(teacher.path / name)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (teacher.path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("model.safetensors", "manifest.json"):
        (teacher.path / name).unlink()
    assert fit(extension(load(teacher.path), CHOICES[1]), tmp_path / "run", source()).is_dir()


def test_data_of_another_tokenizer_is_refused(talking, tmp_path):
    other = replace(source(), tokenizer=train_bpe(["abab"], 258))
    with pytest.raises(ValueError, match="written with another tokenizer than"):
        fit(extension(talking, CHOICES[1]), tmp_path / "run", other)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"fade_share": 0.9}, "'fade_share' must be at most 1 − mix_share = 0.8, not 0.9"),
        ({"window": 0}, "'window' must be at least 1"),
        ({"window_range": (8, 4)}, "'window_range'"),
        ({"rate": -1.0}, "'rate' must be 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, told):
    with pytest.raises(ValueError, match=told):
        ExtendConfig(**values)


def test_a_teacher_in_8_bits_is_read_as_the_floats_that_it_stands_for(teacher, tmp_path, monkeypatch):
    narrow(teacher.model, "int8")
    save_model(tmp_path / "narrow", teacher.model, None)
    floats, given = load_floats(tmp_path / "narrow").model, []
    student = Model(floats.config)
    assert adopt(student, floats) == [] and torch.equal(student.embed.weight, floats.embed.weight)
    with pytest.raises(ValueError, match="extending needs weights in floats, not in int8"):
        adopt(student, teacher.model)

    def stub(extension, *_rest):
        given.append(extension.loaded.model)
        raise ValueError("seen")

    monkeypatch.setattr("atma.extend.run.extend", stub)
    assert main(["extend", str(tmp_path / "narrow"), str(tmp_path / "out"), "--threads", "1"]) == 2
    assert [width_in(model) for model in given] == [None]
