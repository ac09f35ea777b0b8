"""The forward pass as transformers calls it: every mixer, with a cache and without, padded and packed."""

import pytest
import torch
from transformers import DynamicCache

from atma.integrations.transformers import AtmaConfig, AtmaForCausalLM, AtmaModel, StateLayer
from atma.integrations.transformers.core import Core
from atma.model import Model
from tests.conftest import tiny
from tests.integrations.transformers.conftest import EVERY, NAMES, ONE_EACH, configuration, some_tokens, wrapped

EXACT = 1e-9


def own(model: AtmaForCausalLM) -> Model:
    """The model of atma with the same weights."""
    made = Model(model.config.model_config()).double()
    names = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    made.load_state_dict(names)
    return made.eval()


def padded(tokens: torch.Tensor, lengths: list[int], left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `lengths` tokens of each row with padding on one side, and the mask."""
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if left else slice(0, length)
        ids[row, place], mask[row, place] = tokens[row, :length], 1
    return ids, mask


@pytest.mark.parametrize(("name", "i"), EVERY, ids=NAMES)
@torch.no_grad()
def test_every_mixer_gives_what_atma_gives_with_a_cache_and_without(make, name, i):
    model, tokens = make(name, i), some_tokens(2, 19)
    expected = own(model).logits(own(model)(tokens)[0])
    for use_cache in (True, False):
        assert (model(tokens, use_cache=use_cache).logits - expected).abs().max() < EXACT


@pytest.mark.parametrize(("name", "i"), ONE_EACH, ids=[name for name, _ in ONE_EACH])
@torch.no_grad()
def test_token_by_token_is_the_whole_forward(make, name, i):
    model, tokens = make(name, i, depth=1), some_tokens(2, 12)
    whole = model(tokens, use_cache=False).logits
    cache, found = None, []
    for part in tokens.split([5, 1, 1, 3, 1, 1], 1):
        out = model(part, cache=cache, use_cache=True)
        cache = out.cache
        found.append(out.logits)
    assert (torch.cat(found, 1) - whole).abs().max() < EXACT
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize(("name", "i"), ONE_EACH, ids=[name for name, _ in ONE_EACH])
@torch.no_grad()
def test_rows_padded_on_the_left_give_what_each_gives_alone(make, name, i):
    model, tokens, lengths = make(name, i), some_tokens(4, 11), [11, 3, 7, 3]
    ids, mask = padded(tokens, lengths)
    more = some_tokens(4, 2, seed=5)
    for use_cache in (True, False):
        out = model(ids, attention_mask=mask, use_cache=use_cache)
        for row, length in enumerate(lengths):
            alone = model(tokens[row : row + 1, :length], use_cache=True)
            assert (out.logits[row, -length:] - alone.logits[0]).abs().max() < EXACT
            if not use_cache:
                continue
            after = model(more[row : row + 1], cache=alone.cache).logits[0]
            longer = torch.cat([mask, torch.ones(4, 2, dtype=torch.long)], 1)
            again = model(ids, attention_mask=mask, use_cache=True)
            together = model(more, attention_mask=longer, cache=again.cache).logits[row]
            assert (together - after).abs().max() < EXACT


@torch.no_grad()
def test_a_row_may_begin_in_a_later_call(make):
    model, tokens = make(), some_tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :9] = 0
    cache = DynamicCache(config=model.config)
    for begin in (0, 4, 8):
        out = model(tokens[:, begin : begin + 4], attention_mask=mask[:, : begin + 4], cache=cache)
    for row, begin in ((0, 0), (1, 9)):
        alone = model(tokens[row : row + 1, begin:]).logits[0, -1]
        assert (out.logits[row, -1] - alone).abs().max() < EXACT


@torch.no_grad()
def test_padding_on_the_right_changes_nothing_before_it_and_leaves_each_row_where_it_ends(make):
    model, tokens, lengths = make(), some_tokens(3, 9), [9, 2, 5]
    ids, mask = padded(tokens, lengths, left=False)
    for use_cache in (True, False):
        out = model(ids, attention_mask=mask, use_cache=use_cache)
        for row, length in enumerate(lengths):
            alone = model(tokens[row : row + 1, :length], use_cache=False).logits[0]
            assert (out.logits[row, :length] - alone).abs().max() < EXACT
    assert model(ids, attention_mask=mask).cache.layers[0].state.length.tolist() == lengths


def test_padding_between_tokens_is_refused(make):
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])
    with pytest.raises(ValueError, match="attention_mask: row 1 has padding between its tokens; pad on the left or"):
        make()(some_tokens(2, 4), attention_mask=mask)


@pytest.mark.parametrize(("name", "i"), ONE_EACH, ids=[name for name, _ in ONE_EACH])
@torch.no_grad()
def test_packed_documents_give_what_each_gives_alone(make, name, i):
    model, tokens, lengths = make(name, i), some_tokens(1, 14), [5, 1, 8]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    edges = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    told = (
        {"position_ids": positions},
        {"seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]},
        {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 8, "max_length_k": 8},
    )
    alone = torch.cat([model(part, use_cache=False).logits for part in tokens.split(lengths, 1)], 1)
    for how in told:
        out = model(tokens, use_cache=False, **how)
        assert (out.logits - alone).abs().max() < EXACT
        assert model(tokens, **how).cache is None
        with pytest.raises(ValueError, match="packed documents are for training"):
            model(tokens, use_cache=True, **how)


@torch.no_grad()
def test_positions_and_a_mask_of_padded_rows_are_no_packed_documents(make):
    model, tokens = make(), some_tokens(2, 8)
    ids, mask = padded(tokens, [8, 3])
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    out = model(ids, attention_mask=mask, position_ids=positions)
    assert out.cache is not None
    assert (out.logits[1, -3:] - model(tokens[1:, :3]).logits[0]).abs().max() < EXACT


@torch.no_grad()
def test_embeddings_may_be_given_in_place_of_tokens(make):
    model, tokens = make("static_qk"), some_tokens(2, 7)
    embeds = model.get_input_embeddings()(tokens)
    ids, mask = padded(tokens, [7, 4])
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens).logits)
    by_ids = model(ids, attention_mask=mask).logits
    assert torch.equal(model(inputs_embeds=model.model.embed(ids), attention_mask=mask).logits, by_ids)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_hidden_states_are_what_each_layer_reads_and_the_last_is_that_of_the_head(make, use_cache):
    model, tokens = make(depth=3), some_tokens(2, 9)
    ids, mask = padded(tokens, [9, 4])
    out = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=use_cache)
    assert len(out.hidden_states) == 4
    whole = model(tokens[1:, :4], output_hidden_states=True, use_cache=False)
    for found, expected in zip(out.hidden_states, whole.hidden_states, strict=True):
        assert (found[1, -4:] - expected[0]).abs().max() < EXACT
    assert torch.equal(model.logits(out.hidden_states[-1]), out.logits)


def test_a_loss_is_of_the_next_token_and_of_what_is_scored(make):
    model, tokens = make(), some_tokens(2, 9)
    labels = tokens.clone()
    labels[0, :5] = -100
    logits = model(tokens, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    out = model(tokens, labels=labels)
    assert out.cache is None and (out.loss - expected).abs() < EXACT and torch.equal(out.logits, logits)
    count = (labels[:, 1:] != -100).sum()
    assert (model(tokens, labels=labels, num_items_in_batch=2 * count).loss - expected / 2).abs() < EXACT
    shifted = torch.cat([labels[:, 1:], labels.new_full((2, 1), -100)], 1)
    assert (model(tokens, shift_labels=shifted).loss - expected).abs() < EXACT


def test_in_training_a_loss_is_computed_without_logits(make):
    model, tokens = make().train(), some_tokens(2, 9)
    out = model(tokens, labels=tokens)
    assert out.logits is None and out.cache is None
    assert model(tokens, labels=tokens, skip_logits=False).logits is not None
    assert model(tokens, labels=torch.full_like(tokens, -100)).loss == 0


@torch.no_grad()
def test_logits_of_the_last_tokens_only(make):
    model, tokens = make(), some_tokens(2, 9)
    whole = model(tokens).logits
    assert (model(tokens, logits_to_keep=2).logits - whole[:, -2:]).abs().max() < EXACT
    assert (model(tokens, logits_to_keep=torch.tensor([1, 4])).logits - whole[:, [1, 4]]).abs().max() < EXACT


def test_checkpointing_changes_no_gradient(make):
    for name in ("atma", "static_qk", "raven"):
        model, tokens = make(name).train(), some_tokens(2, 9)
        plain = gradients(model, tokens)
        for reentrant, every in ((False, 1), (True, 1), (False, 2)):
            model.activation_checkpointing_enable({"use_reentrant": reentrant}, every_n_layers=every)
            assert model.is_activation_checkpointing
            again = gradients(model, tokens)
            assert all((again[key] - value).abs().max() < EXACT for key, value in plain.items())
        model.activation_checkpointing_disable()
        assert not model.is_activation_checkpointing


def gradients(model: torch.nn.Module, tokens: torch.Tensor, **how) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens, **how).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@torch.no_grad()
def test_a_tuple_is_returned_where_it_is_asked_for(make):
    model, tokens = make(), some_tokens(2, 5)
    assert torch.equal(model(tokens, return_dict=False)[0], model(tokens).logits)
    assert isinstance(model.model(tokens), dict) and "last_hidden_state" in model.model(tokens)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "either input_ids or inputs_embeds"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, ValueError, r"input_ids must have 2 dimensions"),
        ({"input_ids": some_tokens(1, 3), "caches": 1}, TypeError, "unexpected argument 'caches'"),
        ({"input_ids": some_tokens(1, 3), "output_attentions": True}, ValueError, "give no attention maps"),
        ({"input_ids": some_tokens(1, 3), "attention_mask": torch.ones(1, 2)}, ValueError, r"attention_mask must be"),
        ({"input_ids": some_tokens(1, 3), "position_ids": torch.ones(1, 2)}, ValueError, r"position_ids must be"),
    ],
)
def test_what_does_not_fit_is_said(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make()(**arguments)


def test_a_cache_of_another_kind_or_of_other_rows_is_refused(make):
    model = make()
    keys = DynamicCache()
    keys.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    with pytest.raises(
        ValueError, match=r"1 layers of DynamicLayer, the model 2 states: make it DynamicCache\(config="
    ):
        model(some_tokens(1, 3), cache=keys)
    cache = model(some_tokens(2, 3)).cache
    with pytest.raises(ValueError, match="the cache holds 2 rows, the call has 3"):
        model(some_tokens(3, 1), cache=cache)
    with pytest.raises(ValueError, match="leave it out"):
        model.generate(some_tokens(1, 3), cache_implementation="static", max_new_tokens=2)


def test_an_empty_cache_of_no_kind_becomes_ours(make):
    cache = DynamicCache()
    assert make()(some_tokens(1, 3), cache=cache).cache is cache
    assert [type(layer) for layer in cache.layers] == [StateLayer] * 2


@torch.no_grad()
def test_a_vocabulary_grows_and_shrinks_with_its_head(make):
    for tied in (False, True):
        model, tokens = make(tied_head=tied), some_tokens(1, 5)
        before = model(tokens).logits
        for size in (30, 23):
            model.resize_token_embeddings(size)
            assert model.config.model_config().vocab_size == size and model.vocab_size == size
            assert model.get_output_embeddings().weight.shape[0] == model.get_input_embeddings().weight.shape[0] == size
            assert torch.equal(model(tokens).logits[..., :23], before)
        assert (model.head.weight is model.model.embed.weight) == tied
        model.resize_token_embeddings(30)
        weights = model.head.weight.clone()
        model.post_init()
        assert torch.equal(model.head.weight, weights)


def test_weights_are_those_that_atma_begins_with_and_a_seed_gives_them_again():
    torch.manual_seed(3)
    model = AtmaForCausalLM(AtmaConfig.of(tiny()))
    torch.manual_seed(3)
    again = AtmaForCausalLM(AtmaConfig.of(tiny()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not model.head.weight.any() and not model.model.blocks[2].mixer.out_proj.weight.any()
    own_model = Model(tiny(), torch.Generator().manual_seed(0))
    for name, value in own_model.named_parameters():
        other = model.get_parameter(name if name.startswith("head") else f"model.{name}")
        assert torch.isfinite(other).all() and value.any() == other.any()


def test_every_method_of_a_model_is_there_over_modules_that_others_hold():
    methods = {name for name, value in vars(Model).items() if callable(value) and not name.startswith("__")}
    assert methods - {"forward", "_check", "facts", "_repr_html_"} <= set(dir(Core))  # the last two show a model


def test_the_base_model_alone_gives_the_same_hidden_states(make):
    model, tokens = make(), some_tokens(2, 6)
    base = AtmaModel(model.config).double().eval()
    base.load_state_dict(model.model.state_dict())
    assert torch.equal(base(tokens).last_hidden_state, model.base_model(tokens).last_hidden_state)
    assert wrapped(configuration("atma")).base_model is not None
