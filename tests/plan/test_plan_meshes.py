"""What ranks hold and send, and which way of placing a training is told first."""

from dataclasses import replace

import pytest
import torch
from tiny_plan import Said, costs, tiny

from atma.plan import Mesh, Sheet, device_named, held, meshes, plan, rows, sent


def test_meshes_are_all_products_over_which_rows_and_tokens_divide():
    train = tiny().train  # eight rows of 64 tokens
    assert meshes(train, 1) == [Mesh(1, 1, 1)]
    assert set(meshes(train, 4)) == {
        Mesh(*sizes) for sizes in ((4, 1, 1), (2, 1, 2), (1, 1, 4), (2, 2, 1), (1, 2, 2), (1, 4, 1))
    }
    assert all(mesh.data * mesh.shard <= 8 and mesh.ranks == 128 for mesh in meshes(train, 128))
    assert meshes(train, 4)[0] == Mesh(4, 1, 1)


@pytest.mark.parametrize("gpus", [0, -1])
def test_no_devices_are_refused(gpus):
    with pytest.raises(ValueError, match=f"--gpus {gpus}: at least 1"):
        meshes(tiny().train, gpus)


def test_a_batch_that_divides_over_no_mesh_is_told_with_one_that_does():
    with pytest.raises(ValueError, match=r"--gpus 3: no mesh takes micro-batches of 8 rows of 64.*= 192, not 512"):
        meshes(tiny().train, 3)


def test_a_shard_holds_its_share_and_all_ranks_share_the_state_of_the_optimisers():
    found = costs()
    one, four = held(found, Mesh(), False, 0.0), held(found, Mesh(1, 1, 4), False, 0.0)
    assert four.parts["optimiser"] == one.parts["optimiser"] / 4
    for part in ("weights", "gradients"):  # of what it moves it has the whole besides
        assert four.parts[part] == one.parts[part] / 4 + 4 * found.size.trained / 4
    assert one.parts["weights"] == 4 * found.size.total
    two = held(found, Mesh(2, 2, 1), False, 0.0)
    assert one.parts["optimiser"] == 4 * two.parts["optimiser"] and two.parts["weights"] == one.parts["weights"]


@pytest.mark.parametrize("mesh", [Mesh(2, 1, 1), Mesh(1, 2, 1), Mesh(1, 1, 2)], ids=str)
def test_every_direction_halves_the_activations(mesh):
    one, two = (held(costs(), place, False, 0.0).parts["activations"] for place in (Mesh(), mesh))
    assert two == pytest.approx(one / 2, rel=0.01)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block():
    found = costs()
    kept, again = (held(found, Mesh(), again, 0.0).parts["activations"] for again in (False, True))
    largest = max(saved.at(512, 64) for saved in found.saved.values())
    assert again == 4 * 32 * 512 * 4 + largest < kept


def test_of_two_blocks_one_computed_again_is_half_of_each_name():
    found = costs(depth=8, checkpointing_every=2)
    kept, again = (held(found, Mesh(), again, 0.0).parts["activations"] for again in (False, True))
    largest = max(saved.at(512, 64) for saved in found.saved.values())
    assert found.again == {"local": 2, "rope": 2} and again == pytest.approx(kept / 2 + 4 * 32 * 512 * 4 + largest)


def test_the_most_is_the_larger_of_the_two_moments_and_what_a_process_has_besides_is_added():
    found = costs()
    alone, besides = (held(found, Mesh(2), False, program) for program in (0.0, 1000.0))
    assert besides.peak == alone.peak + 1000 and alone.when == "forward"
    short = costs(length=1, batch_tokens=2, tokens=20)
    assert held(short, Mesh(2), False, 0.0).when == "update"


def test_accumulation_keeps_the_gradients_of_the_micro_batches_before():
    one, two = costs(), costs(accumulation=2)
    halved = held(one, Mesh(), False, 0.0).parts["activations"] / 2
    again = held(two, Mesh(), False, 0.0)
    assert again.parts["activations"] == pytest.approx(halved, rel=0.01)
    gaps = min(again.parts["gradients"], again.parts["activations"])
    assert again.parts["gaps"] == gaps > 0 == held(one, Mesh(), False, 0.0).parts["gaps"]
    assert again.peak > again.parts["weights"] + again.parts["gradients"] + again.parts["activations"] + gaps


def test_one_rank_sends_nothing_and_replicas_send_every_gradient_around_the_ring():
    found = costs()
    assert sent(found, Mesh(), False) == []
    (message,) = sent(found, Mesh(4), False)
    assert message.bytes == 2 * 3 / 4 * 4 * found.size.trained and message.span == 4


def test_shards_gather_weights_twice_a_micro_batch_and_contexts_gather_keys():
    found, twice = costs(), costs(accumulation=2)
    weights = {one.what: one.bytes for one in sent(found, Mesh(1, 1, 2), False)}
    blocks, ends = found.size.total - found.size.ends.numbers, found.size.ends.numbers
    assert ends == 2 * 96 * 32 + 96 + 32  # embedding, head and norm stay from the forward pass on
    assert weights["weights of shards, forward and backward"] == 1 / 2 * 4 * (2 * blocks + ends)
    again = {one.what: one.bytes for one in sent(twice, Mesh(1, 1, 2), False)}
    assert again["weights of shards, forward and backward"] == 2 * weights["weights of shards, forward and backward"]
    part = 4 * found.size.trained / 2  # of gradients, once a micro-batch; half of each goes to its owner, and all back
    summed, back = "gradients of shards, and to their owners", "weights back from their owners"
    assert weights[summed] == part + part / 2 and again[summed] == 2 * part + part / 2
    assert weights[back] == again[back] == part / 2
    copies = {one.what: one for one in sent(found, Mesh(2, 1, 2), False)}["gradients over copies of the weights"]
    assert copies.bytes == 2 * 1 / 2 * part and copies.span == 4
    keys = {one.what: one.bytes for one in sent(found, Mesh(1, 2, 1), False)}["keys and values over the context"]
    assert keys == 2 * 1 / 2 * (2 * 2 * 2 * 8) * 512 * 4  # two rope layers, two key heads of 8, 512 tokens, float32


def test_shares_are_equal_work_and_equal_where_attention_is_nothing():
    found = costs()
    first, second = found.shares(2)
    length = found.recipe.train.length
    part, whole = (tokens * sum(found.products(tokens).values()) for tokens in (length * first / 100, length))
    assert (
        first + second == pytest.approx(100, abs=0.2) and first > second and part == pytest.approx(whole / 2, rel=0.01)
    )
    still = found._replace(layers={name: one._replace(count=0) for name, one in found.layers.items()})
    assert still.shares(4) == [25.0] * 4 and found.shares(1) == [100.0]


def test_what_fits_comes_first_and_of_it_the_fastest():
    made = plan(costs(), 2, Said())
    assert made.best.mesh == Mesh(2, 1, 1) and not made.best.checkpointing
    seconds = [one.seconds for one in made.options]
    assert seconds == sorted(seconds) and len(seconds) == 6
    assert made.best.seconds == pytest.approx(256e-6 + 0.5e-6 + made.best.communication)
    assert made.best.tokens_per_second(tiny()) == pytest.approx(512 / made.best.seconds)
    assert made.best.hours(tiny()) == pytest.approx(10 * made.best.seconds / 3600)


def test_less_room_is_made_use_of_by_what_needs_less():
    needs = sorted({one.held.peak for one in plan(costs(), 1, Said()).options})
    best = plan(costs(), 1, Said(room=(needs[0] + needs[1]) / 2)).best
    assert best.checkpointing and best.held.peak == needs[0]


def test_what_fits_nowhere_says_what_is_short_by_how_much_and_the_mend():
    made = plan(costs(), 1, Said(room=1000.0))
    with pytest.raises(
        ValueError, match=r"nothing fits: mesh 1 × 1 × 1 .* of 1000 B, .* short; most of it is .*"
    ) as told:
        _ = made.best
    assert "--set train.accumulation=2" in str(told.value)


def test_a_thousand_devices_and_a_million_tokens_are_planned_without_running_anything():
    recipe = tiny(("local", "rope"), length=1 << 20, batch_tokens=1 << 27, tokens=1 << 40)
    found = costs()._replace(recipe=recipe)
    slow, fast = (plan(found, 1024, Sheet(found, device_named("h100"), mfu)) for mfu in (0.1, 0.4))
    assert all(one.mesh.context > 1 for one in slow.options)  # there are 128 rows
    assert fast.options[0].seconds < slow.options[0].seconds
    assert any("10%" in text and "assumed" in text for text in slow.assumptions)


def test_links_between_machines_carry_what_spans_more_than_one():
    found = costs()
    near, far = plan(found, 8, Sheet(found, device_named("h100"), 0.1)), device_named("H100")._replace(per_node=4)
    across = plan(found, 8, Sheet(found, far, 0.1))
    first, second = (next(o for o in made.options if o.mesh == Mesh(8)).communication for made in (near, across))
    assert second == pytest.approx(first * 450 / 50)


def test_rows_hold_everything_that_is_told():
    made = rows(plan(costs(), 2, Said()))
    kinds = [row["kind"] for row in made]
    assert kinds[0] == "recipe" and kinds.count("mesh") == 6 and {"parameters", "products", "assumption"} < set(kinds)
    assert sum(row["count"] for row in made if row["kind"] == "parameters") == made[0]["parameters"]


def test_bfloat16_keeps_half_of_most_and_copies_of_weights():
    low, full = costs(torch.bfloat16), costs()
    assert low.saved["rope"].each < full.saved["rope"].each and low.saved["rope"].fixed > full.saved["rope"].fixed
    two, sharded, wide = held(low, Mesh(2), False, 0.0), *(held(x, Mesh(1, 1, 2), False, 0.0) for x in (low, full))
    matrices = sum(rows * columns for rows, columns in low.size.matrices)
    assert low.size.low == matrices + 96 * 32 and low.size.ends.low == 96 * 32  # of the layers, and the head
    assert (
        two.parts["activations"] - sharded.parts["activations"] == 2 * matrices
    )  # no copies: they are what is gathered
    assert two.parts["loss"] - sharded.parts["loss"] == 2 * 96 * 32
    largest = low.size.largest
    assert wide.parts["gathered weights"] == 4 * (2 * largest.numbers + low.size.ends.numbers)
    assert sharded.parts["gathered weights"] == wide.parts["gathered weights"] - 2 * (2 * largest.low + 96 * 32)
    first, second = (sent(x, Mesh(1, 1, 2), False)[0].bytes for x in (full, low))
    assert first - second == 1 / 2 * (2 * 2 * matrices + 2 * 96 * 32)


def test_offloaded_weights_are_in_the_processors_memory_where_that_is_another():
    found, away = costs(torch.bfloat16), costs(torch.bfloat16, offload=True)
    one, other = held(away, Mesh(1, 1, 2), False, 0.0), held(away, Mesh(1, 1, 2), False, 0.0, apart=True)
    assert one.host == 0 and one.peak == held(found, Mesh(1, 1, 2), False, 0.0).peak
    assert other.host == sum(other.parts[name] for name in ("weights", "gradients", "optimiser", "message"))
    lasting = other.parts["weights"] + other.parts["optimiser"]
    assert other.peak == one.peak - lasting and other.parts == one.parts
    alone = {message.what: message for message in sent(away, Mesh(), False)}
    (message,) = alone.values()
    numbers = 2 * away.size.total - away.size.ends.numbers + away.size.trained
    assert message.span == 0 and message.bytes == 4 * (numbers + 2 * sum(a * b for a, b in away.size.matrices))
    sheets = [Sheet(x, device_named("h100"), 0.1) for x in (found, away)]
    assert sheets[1].update(1) > sheets[0].update(1) and sheets[1].send(message) == message.bytes / 20e9
    assert any("train.offload" in text for text in sheets[1].assumptions())


def test_the_trained_share_alone_has_gradients():
    found = costs()
    frozen = found._replace(size=replace_size(found.size, trained=10))
    assert held(frozen, Mesh(), False, 0.0).parts["gradients"] == 40


def replace_size(size, **changes):
    return size._replace(**changes)


def test_a_longer_plan_is_as_many_steps_longer():
    found = costs()
    longer = found._replace(recipe=replace(found.recipe, train=replace(found.recipe.train, tokens=51_200)))
    first, second = (plan(one, 1, Said()).best.hours(one.recipe) for one in (found, longer))
    assert second == pytest.approx(10 * first)
