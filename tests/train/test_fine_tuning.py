"""Training on from a model: all of it or adapters, in epochs, to the best validation loss, and after stops."""

import dataclasses
import itertools
import json
import shutil

import pytest
import torch
from tiny_run import VOCABULARY, rows, tiny_model, tiny_recipe, tiny_source

from atma.checkpoint import load_model, save_model
from atma.config import Recipe, TrainConfig, dump_toml, identity, load_recipe
from atma.lora import LoraConfig, load_adapters, merge
from atma.model import Model
from atma.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from atma.train import Stopped, read_record, train
from atma.train.loop import fit
from atma.train.source import Source
from atma.train.start import load_run_recipe, resolved
from atma.weights import load_tensors

LORA = LoraConfig(rank=2, train=("norm_mixer",))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder, and how a model published elsewhere is talked to."""
    folder = tmp_path_factory.mktemp("models") / "base"
    model = Model(tiny_model(), torch.Generator().manual_seed(5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)))
    save_model(folder, model, None)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


def recipe(base, lora: LoraConfig | None = LORA, **changes) -> Recipe:
    changes = {"lora_rate": 0.01, "adamw_rate": 0.003, "optimiser": "adamw", "init_from": str(base)} | changes
    made = tiny_recipe(**changes)
    return resolved(dataclasses.replace(made, lora=lora))


def asked_after(times: int):
    """A run asks whether to stop after each step and each batch of validation; yes, after so many times."""
    answers = itertools.chain([False] * times, itertools.repeat(True))
    return lambda: next(answers)


def weights(folder):
    return load_tensors(folder / "model.safetensors")


def losses(out, kind="train"):
    return [(row["step"], row["loss"]) for row in read_record(out) if row["kind"] == kind]


@pytest.mark.parametrize("lora", [None, LORA], ids=["all", "adapters"])
def test_a_stopped_run_ends_with_the_bits_of_one_that_was_not(base, tmp_path, lora):
    whole = fit(recipe(base, lora), tmp_path / "whole", tiny_source())
    with pytest.raises(Stopped):
        fit(recipe(base, lora), tmp_path / "cut", tiny_source(), stop=asked_after(9))
    again = fit(recipe(base, lora), tmp_path / "cut", tiny_source(), resume=True)
    ours, theirs = weights(again), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("lora", [None, LORA], ids=["all", "adapters"])
def test_a_run_starts_from_the_weights_and_its_first_validation_tells_what_they_are_worth(base, tmp_path, lora):
    out = tmp_path / "run"
    fit(recipe(base, lora, tokens=64), out, tiny_source())
    model, _ = load_model(base)
    with torch.no_grad():
        batches = [rows(10_000 + i) for i in range(2)]
        nats = [model.loss(model(b.tokens, segment_ids=b.segment_ids)[0], b.targets) for b in batches]
    scored = sum(int((b.targets != -100).sum()) for b in batches)
    first = losses(out, "validation")[0]
    assert first == (0, pytest.approx(float(sum(x.sum() for x in nats)) / scored, rel=1e-5))


def test_of_adapters_the_base_stays_and_final_is_whole(base, tmp_path):
    final = fit(recipe(base), tmp_path / "run", tiny_source())
    before, after = weights(base), weights(final)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert {"blocks.0.norm_mixer.weight", "blocks.0.mlp.in_proj.weight"} <= changed
    assert not changed & {"embed.weight", "head.weight", "blocks.0.mlp.in_proj.bias", "blocks.0.norm_mlp.weight"}
    model, _ = load_model(base)
    load_adapters(model, tmp_path / "run" / "adapters")
    merge(model)
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_of_adapters_is_small_and_goes_on_where_the_base_has_moved(base, tmp_path):
    place = shutil.copytree(base, tmp_path / "here")
    with pytest.raises(Stopped):
        fit(recipe(place), tmp_path / "run", tiny_source(), stop=asked_after(9))
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert {path.name for path in newest.iterdir()} == {
        "adapters.json",
        "adapters.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
    }
    moved = place.rename(tmp_path / "there")
    kept = load_recipe(tmp_path / "run" / "recipe.toml")
    with pytest.raises(ValueError, match="no such model folder"):
        fit(kept, tmp_path / "run", tiny_source(), resume=True)
    there = dataclasses.replace(kept, train=dataclasses.replace(kept.train, init_from=str(moved)))
    final = fit(there, tmp_path / "run", tiny_source(), resume=True)
    assert (final / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    whole = fit(recipe(base), tmp_path / "whole", tiny_source())
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(final).items())


def test_all_weights_go_on_without_the_base(base, tmp_path):
    place = shutil.copytree(base, tmp_path / "here")
    with pytest.raises(Stopped):
        fit(recipe(place, None), tmp_path / "run", tiny_source(), stop=asked_after(9))
    shutil.rmtree(place)
    final = fit(load_recipe(tmp_path / "run" / "recipe.toml"), tmp_path / "run", tiny_source(), resume=True)
    assert (final / "chat_template.jinja").is_file()


def test_a_base_with_other_weights_is_refused(base, tmp_path):
    place = shutil.copytree(base, tmp_path / "here")
    asked = recipe(place)
    model, _ = load_model(place)
    with torch.no_grad():
        model.norm.weight.add_(1)
    shutil.rmtree(place)
    save_model(place, model, None)
    with pytest.raises(ValueError, match="not the weights that this run starts from"):
        fit(asked, tmp_path / "run", tiny_source())


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_needs_no_model_and_its_identity_knows_the_weights_and_not_the_place(base, tmp_path):
    text = '[train]\nlength = 16\nbatch_tokens = 64\ninit_from = "{}"\n'
    other = shutil.copytree(base, tmp_path / "other")
    one, two = (load_run_recipe(written(tmp_path / "r.toml", text.format(place))) for place in (base, other))
    assert one.model == tiny_model() and identity(one) == identity(two)
    plain = load_run_recipe(written(tmp_path / "r.toml", "[train]\nlength = 16\nbatch_tokens = 64\n"))
    assert identity(plain) != identity(one)
    assert load_recipe(written(tmp_path / "again.toml", dump_toml(one))) == dataclasses.replace(one)


def test_a_model_table_may_change_what_leaves_the_weights_and_nothing_else(base, tmp_path):
    head = f'[train]\nlength = 16\nbatch_tokens = 64\ntokens = 64\nevaluate_every = 0\ninit_from = "{base}"\n'
    windowed = load_run_recipe(written(tmp_path / "a.toml", head + "[model]\nwindow = 8\n"))
    assert windowed.model.window == 8
    fit(windowed, tmp_path / "windowed", tiny_source())
    wider = load_run_recipe(written(tmp_path / "b.toml", head + "[model]\nwidth = 32\n"))
    with pytest.raises(ValueError, match=r"changes width, and only what leaves the weights"):
        fit(wider, tmp_path / "wider", tiny_source())
    with pytest.raises(ValueError, match=r"'model.preset' 'nano': .* leave it out"):
        load_run_recipe(written(tmp_path / "c.toml", head + '[model]\npreset = "nano"\n'))


def test_adapters_without_a_model_to_adapt_are_refused(tmp_path):
    asked = dataclasses.replace(tiny_recipe(), lora=LORA)
    with pytest.raises(ValueError, match=r"\[lora\] trains adapters of a model there is"):
        fit(asked, tmp_path / "run", tiny_source())


def test_data_of_another_tokenizer_is_refused(tmp_path):
    model = Model(tiny_model(vocab_size=300))
    save_model(tmp_path / "base", model, byte_tokenizer())
    asked = resolved(Recipe(train=dataclasses.replace(tiny_recipe().train, init_from=str(tmp_path / "base"))))
    from atma.tokenizer import train_bpe

    other = dataclasses.replace(tiny_source(), tokenizer=train_bpe(["abc abc xyz xyz"], 260))
    with pytest.raises(ValueError, match=r"written with another tokenizer .* prepare it with --model"):
        fit(asked, tmp_path / "run", other)


@pytest.mark.parametrize("lora", [None, LORA], ids=["all", "adapters"])
def test_a_text_begins_as_it_did_for_the_base(tmp_path, lora):
    words = Tokenizer(byte_tokenizer().backend, 256, None, [])
    save_model(tmp_path / "base", Model(tiny_model(vocab_size=300)), words)
    asked = Recipe(train=dataclasses.replace(tiny_recipe().train, init_from=str(tmp_path / "base")), lora=lora)
    data = dataclasses.replace(tiny_source(), tokenizer=byte_tokenizer())
    with pytest.raises(Stopped):
        fit(resolved(asked), tmp_path / "run", data, stop=asked_after(3))
    final = fit(resolved(asked), tmp_path / "run", data, resume=True)
    assert load_tokenizer(final).beginning == ()
    assert json.loads((final / "tokenizer.json").read_text())["post_processor"] is None


def hopeless(i):
    """Validation that gets worse: its targets are others than those that training shows."""
    batch = rows(10_000 + i)
    return batch._replace(targets=(batch.tokens * 7 + 3) % VOCABULARY)


def test_a_run_ends_when_validation_no_longer_gets_better_and_keeps_the_best(base, tmp_path):
    out, source = tmp_path / "run", dataclasses.replace(tiny_source(), validation=hopeless)
    asked = recipe(base, None, early_stopping=2, keep_best=True, adamw_rate=0.03, tokens=16 * 48 * 10)
    final = fit(asked, out, source)
    told = losses(out, "validation")
    best = min(told, key=lambda pair: pair[1])
    last = told[-1][0]
    assert last < asked.train.steps and told[-3] == best
    assert json.loads((out / "best" / "config.json").read_text())["extra"]["step"] == best[0]
    assert json.loads((final / "config.json").read_text())["extra"]["step"] == last
    event = [row["event"] for row in read_record(out) if row["kind"] == "event"][-1]
    assert event.startswith("stopped early, 2 validations") and f"at step {best[0]}" in event and "best" in event
    assert fit(asked, out, source, resume=True) == final


def test_stopped_and_resumed_early_stopping_ends_alike(base, tmp_path):
    source = dataclasses.replace(tiny_source(), validation=hopeless)
    asked = recipe(base, early_stopping=2, keep_best=True, lora_rate=0.03, tokens=16 * 48 * 10)
    fit(asked, tmp_path / "whole", source)
    for _ in range(40):
        try:
            fit(asked, tmp_path / "cut", source, (tmp_path / "cut").exists(), stop=asked_after(5))
            break
        except Stopped:
            continue
    for name in ("final", "best"):
        ours, theirs = weights(tmp_path / "cut" / name), weights(tmp_path / "whole" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert losses(tmp_path / "cut", "validation") == losses(tmp_path / "whole", "validation")


@pytest.mark.parametrize("keep_best", [False, True])
def test_a_finished_run_that_goes_on_has_judged_its_last_validation(base, tmp_path, keep_best):
    """Its checkpoint is written before that validation, which is then made again."""
    source = dataclasses.replace(tiny_source(), validation=hopeless)
    asked = recipe(base, None, early_stopping=3, keep_best=keep_best, evaluate_every=1, adamw_rate=0.03, tokens=128)
    longer = dataclasses.replace(asked, train=dataclasses.replace(asked.train, tokens=256))
    fit(asked, tmp_path / "run", source)
    fit(longer, tmp_path / "run", source, resume=True)
    told = losses(tmp_path / "run", "validation")
    assert [step for step, _ in told] == list(range(len(told)))
    state = json.loads(sorted((tmp_path / "run" / "checkpoints").glob("*/state.json"))[-1].read_text())
    judged = told[:-1] if state["unvalidated"] else told
    best = min(range(len(judged)), key=lambda i: judged[i][1])
    assert (state["best_loss"], state["best_step"]) == (judged[best][1], best)
    assert state["waited"] == len(judged) - 1 - best


def goes_on(asked: Recipe, out, source, **changes) -> list[str]:
    """The events of a run that goes on with some settings changed."""
    fit(dataclasses.replace(asked, train=dataclasses.replace(asked.train, **changes)), out, source, resume=True)
    return [row["event"] for row in read_record(out) if row["kind"] == "event"]


def test_a_best_model_that_was_not_kept_is_found_anew_and_never_told_of_in_vain(base, tmp_path):
    out, source = tmp_path / "run", dataclasses.replace(tiny_source(), validation=hopeless)
    asked = recipe(base, None, evaluate_every=1, adamw_rate=0.03, tokens=256)
    fit(asked, out, source)
    events = goes_on(asked, out, source, keep_best=True)
    assert not (out / "best").exists() and not any("best" in event for event in events)
    events = goes_on(asked, out, source, keep_best=True, tokens=512)
    best = min(losses(out, "validation")[5:], key=lambda pair: pair[1])
    assert json.loads((out / "best" / "config.json").read_text())["extra"]["step"] == best[0]
    assert "found anew: its model, of step" in events[-2] and f"at step {best[0]}, its model in" in events[-1]


def test_the_lowest_loss_of_other_validations_is_not_compared_with(base, tmp_path):
    out, asked = tmp_path / "run", recipe(base, None, evaluate_every=1, tokens=128, keep_best=True)
    fit(asked, out, tiny_source())
    harder = dataclasses.replace(tiny_source(), validation=hopeless)
    events = goes_on(asked, out, harder, evaluation_tokens=64, tokens=256)
    assert "the lowest validation loss is found anew: it was of 128 evaluation tokens, now they are 64" in events
    assert json.loads((out / "best" / "config.json").read_text())["extra"]["step"] >= 2


def test_epochs_are_steps_by_the_rows_of_the_data(base, tmp_path):
    source = dataclasses.replace(tiny_source(), epoch_rows=10, told="ten rows")
    out = tmp_path / "run"
    fit(recipe(base, epochs=2.0), out, source)
    assert losses(out)[-1][0] == 5  # 20 rows, 4 a step
    events = [row["event"] for row in read_record(out) if row["kind"] == "event"]
    assert "2 epochs = 5 steps of 64 tokens" in events and "ten rows" in events
    with pytest.raises(ValueError, match="the data has no epochs"):
        fit(recipe(base, epochs=2.0), tmp_path / "other", tiny_source())


def test_the_loss_is_over_all_answers_of_a_batch_however_it_is_cut(base, tmp_path):
    def uneven(step: int):
        batch = rows(step)
        targets = batch.targets.clone()
        targets[0, 1:] = -100  # a row with one answer, beside rows full of them
        return batch._replace(targets=targets)

    source = Source(uneven, uneven, 0, "uneven", VOCABULARY)
    finals = [
        fit(recipe(base, None, accumulation=cut, evaluate_every=0, tokens=192), tmp_path / str(cut), source)
        for cut in (1, 4)
    ]
    one, four = map(weights, finals)
    assert all(torch.allclose(one[name], four[name], rtol=0, atol=2e-5) for name in one)


def test_settings_that_need_validation_are_refused_without_it():
    with pytest.raises(ValueError, match="'evaluate_every' must be 1 or more for early_stopping"):
        TrainConfig(evaluate_every=0, early_stopping=1)
    with pytest.raises(ValueError, match="'evaluate_every' must be 1 or more for keep_best"):
        TrainConfig(evaluate_every=0, keep_best=True)


def test_from_a_packaged_model_on_conversations_the_answers_are_learned(tmp_path):
    from atma.data.prepare import Preparation, prepare

    lines = [{"prompt": f"{a} plus {b}?", "completion": f"It is {a + b}."} for a in range(8) for b in range(8)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prepare(tmp_path / "sums.jsonl", tmp_path / "data", Preparation(model="nano", chat_template="plain"))
    text = f"""[data]\npath = "{tmp_path / "data"}"\n[train]\ninit_from = "nano"\nlength = 128\nbatch_tokens = 512
    epochs = 1\nlora_rate = 1e-2\nevaluate_every = 100\nprecision = "float32"\n[lora]\nrank = 4\n"""
    out = tmp_path / "run"
    train(load_run_recipe(written(tmp_path / "r.toml", text)), out, device="cpu")
    told = losses(out, "validation")
    assert told[-1][1] < told[0][1] - 0.5


def test_what_the_base_says_of_itself_is_kept(base, tmp_path):
    place = shutil.copytree(base, tmp_path / "here")
    config = json.loads((place / "config.json").read_text())
    config["extra"] = {"layout": "somebody's", "name": "old"}
    (place / "config.json").write_text(json.dumps(config))
    (place / "manifest.json").unlink()
    final = fit(recipe(place), tmp_path / "run", tiny_source())
    extra = json.loads((final / "config.json").read_text())["extra"]
    assert extra["layout"] == "somebody's" and extra["name"] == "tiny"


def test_a_checkpoint_of_transformers_is_tuned_by_adapters_and_exported_again(tmp_path):
    transformers = pytest.importorskip("transformers")
    from atma.cli import main

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32, "tie_word_embeddings": True}
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes)).save_pretrained(tmp_path / "theirs")
    assert main(["import", f"hf:{tmp_path / 'theirs'}", str(tmp_path / "ours")]) == 0
    asked = dataclasses.replace(recipe(tmp_path / "ours"), model=Recipe().model)
    asked = resolved(dataclasses.replace(asked, train=dataclasses.replace(asked.train, init_hash="")))
    final = fit(asked, tmp_path / "run", tiny_source())
    assert losses(tmp_path / "run", "validation")[-1][1] < losses(tmp_path / "run", "validation")[0][1]
    assert main(["export", str(final), str(tmp_path / "back")]) == 0
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    model, _ = load_model(final)
    tokens = rows(3).tokens
    torch.testing.assert_close(back(tokens).logits, model.logits(model(tokens)[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("template", "kept", "told"),
    [(None, "theirs", ""), ("", None, "was written without one"), ("ours", "ours", "was written with another")],
)
def test_the_final_model_is_talked_to_as_its_data_was_written(base, tmp_path, template, kept, told):
    place, out = shutil.copytree(base, tmp_path / "here"), tmp_path / "run"
    (place / "manifest.json").unlink()
    (place / "chat_template.jinja").write_text("theirs")
    (place / "tokenizer_config.json").write_text('{"eos_token": "x", "chat_template": "theirs too"}')
    final = fit(recipe(place), out, dataclasses.replace(tiny_source(), template=template))
    path, settings = final / "chat_template.jinja", json.loads((final / "tokenizer_config.json").read_text())
    assert (path.read_text() if path.is_file() else None) == kept
    assert settings["eos_token"] == "x" and ("chat_template" in settings) == (template is None)
    events = [row["event"] for row in read_record(out) if row["kind"] == "event"]
    assert [event for event in events if "is not kept" in event] == (
        [f"the chat template of {place} is not kept, for the data {told}"] if told else []
    )


def test_the_best_model_is_written_again_with_the_template_of_the_base(base, tmp_path):
    out = tmp_path / "run"
    fit(recipe(base, keep_best=True), out, tiny_source())
    validations = losses(out, "validation")
    assert sum(loss < min([x for _, x in validations[:i]], default=9) for i, (_, loss) in enumerate(validations)) > 1
    assert (out / "best" / "chat_template.jinja").is_file()
