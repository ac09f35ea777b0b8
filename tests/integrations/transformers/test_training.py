"""Training by other people's trainers: PEFT's adapters, transformers' Trainer, TRL's SFTTrainer, torch.export."""

import copy
from itertools import pairwise

import pytest
import torch

from atma.integrations.transformers import AtmaForCausalLM
from tests.integrations.transformers.conftest import EVERY, NAMES, configuration, some_tokens, wrapped
from tests.integrations.transformers.test_folders import saved
from tests.integrations.transformers.test_modeling import gradients, own

WORDS = ["the cat sat on the mat", "a dog", "one two three four five", "to be or not to be, that is it", "x y z"]


def adapted(model: AtmaForCausalLM, **options):
    """A model with an adapter on every projection that is not what it was."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    made = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return made.eval()


@pytest.mark.parametrize(("name", "i"), EVERY, ids=NAMES)
@torch.no_grad()
def test_an_adapter_on_every_projection_of_every_mixer_is_as_if_merged(make, name, i):
    model, tokens = make(name, i), some_tokens(2, 9)
    before = model(tokens).logits.clone()
    count = sum(isinstance(module, torch.nn.Linear) for module in model.model.modules())
    made = adapted(model)
    adapters = [module for module in made.modules() if hasattr(module, "lora_B")]
    assert len(adapters) == count
    with_adapter = made(tokens).logits
    assert (with_adapter - before).abs().max() > 1e-3
    with made.disable_adapter():
        assert (made(tokens).logits - before).abs().max() < 1e-9
    assert (made.merge_and_unload()(tokens).logits - with_adapter).abs().max() < 1e-9


def test_an_adapter_is_saved_and_read_and_merged_into_a_folder_of_atma(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    import atma

    folder, _ = saved(tmp_path / "model")
    made, tokens = adapted(AutoModelForCausalLM.from_pretrained(folder)), some_tokens(2, 9)
    with torch.no_grad():
        expected = made(tokens).logits
        made.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
        assert (again(tokens).logits - expected).abs().max() < 1e-5
        named = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert (named(tokens).logits - expected).abs().max() < 1e-5
        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = atma.load(tmp_path / "merged").model
        # The merged weight is rounded once more: an error of 2⁻²⁴ of each of 16 products, through two blocks.
        assert (merged.logits(merged(tokens)[0]) - expected).abs().max() < 1e-5 * expected.abs().max()
        text = made.generate(input_ids=tokens, max_new_tokens=5, do_sample=False)
        assert torch.equal(text, again.generate(input_ids=tokens, max_new_tokens=5, do_sample=False))


def test_a_head_with_an_adapter_or_of_its_own_copy_is_what_is_trained(make):
    peft = pytest.importorskip("peft")
    tokens = some_tokens(2, 9)
    for options in ({"target_modules": ["head"]}, {"target_modules": ["k_proj"], "modules_to_save": ["head", "embed"]}):
        model = make().train()
        made = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
        out = made(tokens, labels=tokens, skip_logits=False)
        expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert (out.loss - expected).abs() < 1e-9 and out.logits.abs().max() < 15
        out.loss.backward()
        trained = [name for name, value in made.named_parameters() if value.grad is not None and value.grad.any()]
        assert any("head" in name for name in trained)
        assert "modules_to_save" not in options or any("embed" in name for name in trained)


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "model", depth=4, pattern=("local", "atma"))[0]


def test_the_trainer_trains_evaluates_and_goes_on_from_a_checkpoint(folder, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer
    from transformers import TrainingArguments as Arguments

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer(text) for text in WORDS * 4]
    arguments = {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4, "learning_rate": 3e-3}
    arguments |= {"report_to": "none", "logging_steps": 5, "save_steps": 10, "disable_tqdm": True, "use_cpu": True}
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    how = {"train_dataset": texts, "eval_dataset": texts[:5], "data_collator": collator}
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(folder), Arguments(max_steps=20, **arguments), **how)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-10")
    again = Trainer(last, Arguments(max_steps=20, **arguments), **how)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    for one, other in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert (one - other).abs().max() < 1e-5


def trainer_of(folder, where, model=None, **options):
    """TRL's trainer of a few texts."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "max_length": 64}
    arguments |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 10, "save_strategy": "no"}
    config = trl.SFTConfig(output_dir=str(where), **(arguments | options))
    return trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder) if model is None else model,
        args=config,
        train_dataset=Dataset.from_dict({"text": WORDS * 8}),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def test_trl_trains_by_the_logits_of_the_model(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path / "run", max_steps=1)
    model = trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    fused = model(**batch, fused_lm_head=True)
    plain = model(**batch, skip_logits=False)
    targets = batch["labels"][:, 1:]
    log_probs = plain.logits[:, :-1].log_softmax(-1)
    picked = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets == -100, 0)
    assert (fused.log_probs - picked).abs().max() < 1e-5
    assert (fused.loss - plain.loss).abs() < 1e-5
    entropy = -(log_probs.exp() * log_probs).sum(-1).masked_fill(targets == -100, 0)
    assert (fused.entropy - entropy).abs().max() < 1e-4
    assert torch.equal(fused.is_top1.bool(), (plain.logits[:, :-1].argmax(-1) == targets) & (targets != -100))
    assert plain.logits.abs().max() < 15 and not hasattr(model.config, "final_logit_softcapping")


def test_a_fused_head_that_is_not_known_is_refused(make):
    model = make()

    def forward(self, fused_lm_head=False):
        return None

    with pytest.raises(ValueError, match=r"fused head unlike that of 1\.16"):
        model.forward = forward.__get__(model)


def test_packed_batches_of_trl_have_the_gradients_of_each_text_alone(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path / "run", packing=True, max_steps=1)
    model = trainer.model.double().train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    assert "attention_mask" not in batch and (batch["position_ids"] == 0).sum() > 3
    trainer.compute_loss(model, dict(batch)).backward()
    packed = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    edges = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), batch["input_ids"].shape[1]]
    count = (batch["labels"] != -100).sum()
    for begin, end in pairwise(edges):
        part = {name: batch[name][:, begin:end] for name in ("input_ids", "labels")}
        model(**part, num_items_in_batch=count).loss.backward()
    for name, value in model.named_parameters():
        assert (packed[name] - value.grad).abs().max() < 1e-6 * max(1.0, value.grad.abs().max().item())


@pytest.mark.parametrize("packing", [False, True])
def test_trl_teaches_an_adapter_and_leaves_what_is_frozen_as_it_was(folder, tmp_path, packing):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    before = copy.deepcopy(model.state_dict())
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = trainer_of(folder, tmp_path / "run", made, packing=packing, max_steps=20, learning_rate=1e-2)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    after = made.unload().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.slow
def test_trl_trains_a_model_for_two_hundred_steps_and_its_loss_falls(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path / "run", packing=True, max_steps=200, logging_steps=20)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print("losses of 20 steps each:", losses)
    assert all(later < earlier for earlier, later in pairwise(losses[:5])) and losses[-1] < 0.3 * losses[0]


def test_checkpointing_with_an_adapter_gives_the_same_gradients(make):
    tokens = some_tokens(2, 9)
    model = adapted(make()).train()
    plain = gradients(model, tokens)
    model.base_model.model.activation_checkpointing_enable()
    again = gradients(model, tokens)
    assert plain.keys() == again.keys() and all((again[key] - value).abs().max() < 1e-9 for key, value in plain.items())


def test_a_model_is_exported_for_any_number_of_rows_and_tokens():
    model, tokens = wrapped(configuration("atma")).float(), some_tokens(2, 40)
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    asked = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    shapes = {"input_ids": free, "attention_mask": free, "use_cache": None}
    program = torch.export.export(model, (), asked, dynamic_shapes=shapes).module()
    more, mask = some_tokens(3, 57), torch.ones(3, 57, dtype=torch.long)
    mask[1, :5] = 0
    found = program(input_ids=more, attention_mask=mask, use_cache=False).logits
    with torch.no_grad():
        assert (found - model(more, attention_mask=mask, use_cache=False).logits).abs().max() < 1e-4
        assert (found[0] - own(model).float().logits(own(model).float()(more[:1])[0])[0]).abs().max() < 1e-4
