"""An imported checkpoint is loaded by transformers as a model of atma, too, and computes what it did before."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import atma.integrations.transformers
from atma.integrations.transformers import AtmaForCausalLM
from atma.layouts import import_checkpoint
from tests.layouts.checkpoints import FORMS, checkpoint

TOKENS = torch.randint(3, 99, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_logits_losses_and_texts_are_those_of_the_checkpoint(tmp_path, form):
    theirs = checkpoint(tmp_path / "theirs", form)
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert isinstance(ours, AtmaForCausalLM) and atma.integrations.transformers
    assert (ours(TOKENS).logits - theirs(TOKENS).logits).abs().max() <= 1e-4
    told, wanted = (model(TOKENS, labels=TOKENS).loss for model in (ours, theirs))
    assert abs(told - wanted) <= 1e-5
    texts = [
        model.generate(TOKENS, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
        for model in (ours, theirs)
    ]
    assert torch.equal(*texts)
