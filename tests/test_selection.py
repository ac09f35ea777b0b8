"""Selection policies on layers: every policy over the laws that a trained layer obeys, chosen by one text."""

import dataclasses
from itertools import product

import pytest
import torch

from atma import state as trees
from atma.config import ModelConfig
from atma.decoding import Decoder
from atma.mixers.table import POLICIES, find, small
from atma.model import Model
from atma.ops import use_backend
from atma.selection import counting, select
from tests.conftest import tiny
from tests.laws.conftest import randomise
from tests.laws.test_laws import TOLERANCE, assert_same_state
from tests.ops.backends import FAST

CORES = ("polar-memory", "nope", "rope")
TRAINED = ("pages",)
"""What says how much is read by mixers that learned what to read."""
POLAR_ALONE = ("shadows",)
"""What certifies reads of polar layers alone."""
CASES = [
    (name, i, core)
    for name in POLICIES
    if name not in TRAINED
    for i, core in product(range(len(small(name, "policy"))), CORES)
    if core.startswith("polar") or name not in POLAR_ALONE
]


def text_of(name: str, i: int) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in small(name, "policy")[i].items())])


def made(core: str, text: str | None = None) -> Model:
    kind, *rest = core.split("-")
    torch.manual_seed(0)
    config = dataclasses.replace(tiny(kind, "memory" in rest), depth=3, pattern=("global", "local", "global"))
    return select(randomise(Model(config)), text)


def tokens(model: Model, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model, x, state, sizes):
    pieces = []
    for part in x.split(sizes, 1):
        y, state = model(part, state)
        pieces.append(y)
    return torch.cat(pieces, 1), state


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case on each fast backend. In the quick suite each policy's options have one core on each, in turn."""
    if "core" not in metafunc.fixturenames or "name" not in metafunc.fixturenames:
        metafunc.parametrize("backend", FAST, indirect=True)
        return
    turns = {case: turn for turn, case in enumerate(dict.fromkeys(case[:2] for case in CASES))}
    found = []
    for n, backend in enumerate(FAST):
        value, marks = getattr(backend, "values", (backend,))[0], getattr(backend, "marks", ())
        for name, i, core in CASES:
            quick = name in POLAR_ALONE or core == CORES[(turns[name, i] + n) % len(CORES)]
            marked = marks if quick else (*marks, pytest.mark.slow)
            found.append(pytest.param(value, name, i, core, marks=marked, id=f"{value}-{name}-{i}-{core}"))
    metafunc.parametrize(("backend", "name", "i", "core"), found, indirect=["backend"])


@pytest.fixture(autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param


@torch.no_grad()
def test_any_cut_gives_the_same_outputs_and_state(name, i, core):
    model = made(core, text_of(name, i))
    x = tokens(model, 2, 70)
    whole, state = run(model, x, model.init_state(2, 70), [70])
    fresh, _ = model(x)
    torch.testing.assert_close(fresh, whole, **TOLERANCE)
    for sizes in ([1] * 70, [63, 7]):
        parts, other = run(model, x, model.init_state(2, 70), sizes)
        torch.testing.assert_close(parts, whole, **TOLERANCE)
        assert_same_state(other, state)


@torch.no_grad()
def test_a_row_alone_equals_the_row_in_a_batch_at_any_position_and_capacity(name, i, core):
    model = made(core, text_of(name, i))
    more, states = tokens(model, 2, 9, 2), []
    for length in (11, 37):
        states.append(run(model, tokens(model, 1, length, length), model.init_state(1, 48), [length])[1])
    alone = [model(more[n : n + 1], trees.grow(trees.fork(states[n]), 64)) for n in range(2)]
    together, state = model(more, trees.stack(states))
    torch.testing.assert_close(together, torch.cat([y for y, _ in alone]), **TOLERANCE)
    for n in range(2):
        assert_same_state(trees.grow(trees.rows(state, [n]), 64), alone[n][1])


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it_and_all_tokens_matter(name, i, core):
    model = made(core, text_of(name, i))
    x, other = tokens(model, 1, 60), tokens(model, 1, 60, 1)
    changed = torch.cat([x[:, :40], other[:, 40:]], 1)
    torch.testing.assert_close(model(changed)[0][:, :40], model(x)[0][:, :40], **TOLERANCE)
    assert not torch.equal(model(x)[0], made(core)(x)[0])


@torch.no_grad()
def test_a_recorded_step_is_the_step(name, i, core, backend):
    if backend != "native":
        pytest.skip("steps are recorded where kernels are compiled")
    model = made(core, text_of(name, i)).float()
    x = tokens(model, 2, 30)
    _, state = model(x[:, :20], model.init_state(2, 40))
    called, decoder = trees.fork(state), Decoder(model, state)
    for at in range(20, 30):
        y, called = model(x[:, at : at + 1], called)
        torch.testing.assert_close(decoder.step(x[:, at : at + 1]), model.logits(y[:, -1]), rtol=1e-5, atol=1e-5)
    assert decoder.how.startswith("recorded")


@pytest.mark.parametrize("core", CORES)
@torch.no_grad()
def test_with_all_pages_chosen_it_is_full_attention(core):
    model = made(core)
    x = tokens(model, 2, 80)
    whole, _ = model(x)
    torch.testing.assert_close(select(model, "top_pages page=4 k=20 window=3")(x)[0], whole, **TOLERANCE)
    torch.testing.assert_close(select(model, None)(x)[0], whole, rtol=0, atol=0)


@torch.no_grad()
def test_windowed_layers_are_left_alone_and_a_model_of_them_alone_is_refused():
    model = Model(tiny("polar", True, 7))
    with pytest.raises(ValueError, match="no layer of this model holds the keys of a whole text"):
        select(model, "top_pages")
    assert model.selection is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("top_page", "did you mean 'top_pages'"),
        ("top_pages k", "KEY=VALUE"),
        ("top_pages kk=3", "unknown key 'top_pages kk'; did you mean 'top_pages k'"),
        ("top_pages k=-1", "'k' must be at least 0, not -1"),
        ("top_pages k=many", "k"),
        ("", "no policy ''"),
    ],
)
def test_a_policy_that_is_none_is_told(text, told):
    with pytest.raises(ValueError, match=told):
        select(Model(tiny("polar", True)), text)


@pytest.mark.parametrize("kind", ["polar_pages", "landmark"])
@torch.no_grad()
def test_of_mixers_that_learned_what_to_read_it_says_how_much(kind):
    options = dict(small(kind)[0]) | ({"blocks_read": 1} if kind == "landmark" else {"chosen": 1})
    model = randomise(Model(ModelConfig(23, width=16, depth=2, pattern=(kind,), **options)))
    x = tokens(model, 2, 90)
    few, _ = model(x)
    more, _ = select(model, "pages k=2")(x)
    every, _ = select(model, "pages k=99")(x)
    assert not torch.equal(more, few) and not torch.equal(every, more)
    torch.testing.assert_close(run(model, x, model.init_state(2, 90), [1, 50, 39])[0], every, **TOLERANCE)
    torch.testing.assert_close(select(model, None)(x)[0], few, rtol=0, atol=0)
    with pytest.raises(ValueError, match="it learned what to read: take the policy 'pages'"):
        select(model, "top_pages")
    with pytest.raises(ValueError, match="chooses pages by what it has learned"):
        select(made("polar-memory"), "pages")


def test_certified_shadows_are_refused_where_there_is_nothing_to_certify():
    with pytest.raises(ValueError, match="of SoftmaxCore nothing can be certified; take a polar layer, or int8"):
        select(Model(tiny("nope", False)), "shadows")


@torch.no_grad()
def test_shadows_with_a_tolerance_of_zero_read_everything_exactly():
    model = made("polar-memory")
    x = tokens(model, 2, 50)
    whole, _ = model(x)
    near, _ = select(model, "shadows")(x)
    exact, _ = select(model, "shadows direction_tolerance=0")(x)
    torch.testing.assert_close(exact, whole, **TOLERANCE)
    assert 0 < (near - whole).abs().max() < 0.5
    with pytest.raises(ValueError, match="direction_tolerance must be at least 0"):
        select(model, "shadows direction_tolerance=-1")


def test_a_core_that_cannot_leave_keys_out_is_told():
    config = ModelConfig(16, width=16, depth=1, pattern=("attention",), core="persistent", memory=False, query_heads=2,
                         key_value_heads=1, head_width=8)  # fmt: skip
    with pytest.raises(ValueError, match="PersistentCore cannot leave keys out"):
        select(Model(config), "top_pages")


@torch.no_grad()
def test_a_state_of_another_policy_is_refused():
    model = made("polar-memory")
    state = model.init_state(1, 8)
    with pytest.raises(ValueError, match="make a new state"):
        select(model, "top_pages")(tokens(model, 1, 3), state)


def test_what_a_policy_is_is_part_of_what_states_belong_to():
    from atma.hashes import model_hash

    model = made("polar-memory")
    hashes = [model_hash(select(model, text)) for text in (None, "top_pages", "top_pages k=3", "top_pages k=32")]
    assert len(set(hashes)) == 3 and hashes[1] == hashes[3]


def test_policies_have_names_and_tiny_options():
    assert all(find(name, "policy").cls.Config and small(name, "policy") for name in POLICIES)


def test_what_is_read_is_counted_however_a_text_is_cut(name, i, core):
    """And counting changes nothing, nor is anything counted afterwards."""
    model, told = made(core, text_of(name, i)), []
    x = tokens(model, 2, 37)
    with torch.no_grad():
        want = run(model, x, model.init_state(2, 40), [37])[0]
        for sizes in ([37], [9, 1, 20, 7]):
            with counting(model) as counts:
                got = run(model, x, model.init_state(2, 40), sizes)[0]
                Decoder(model, run(model, x, model.init_state(2, 40), sizes)[1]).step(x[:, :1])
            torch.testing.assert_close(got, want, **TOLERANCE)
            told.append(dataclasses.asdict(counts))
        run(model, x, model.init_state(2, 40), [37])
    assert dataclasses.asdict(counts) == told[0] | {key: told[1][key] for key in ("direction_error", "magnitude_error")}
    heads = sum(block.mixer.heads for block in model.blocks if getattr(block.mixer, "policy", None))
    assert counts.seen == heads * 2 * (2 * sum(range(1, 38)) + 38)
    assert 0 <= counts.read <= counts.seen
    if name in ("top_pages", "hip", "longheads", "evict"):
        assert counts.read < counts.seen


def test_a_query_that_sees_little_reads_it_all_and_one_that_sees_much_its_pages_and_window():
    model = made("polar", "top_pages page=4 k=2 window=6")
    x = tokens(model, 1, 64)
    with torch.no_grad(), counting(model) as counts:
        model(x, model.init_state(1, 64))
    # A window of 6 lies in 2 or 3 pages of 4; so position p sees p + 1 keys and reads these and two pages before.
    read = sum(min(p + 1, p + 1 - (p - 5) // 4 * 4 + 8) if p >= 5 else p + 1 for p in range(64))
    heads = sum(block.mixer.heads for block in model.blocks if getattr(block.mixer, "policy", None))
    assert counts.read == heads * read
    assert counts.row() == {"keys_read": heads * read / counts.seen}


@pytest.mark.parametrize("within", [0.0, 0.05])
def test_the_largest_certificate_is_told_and_a_tolerance_of_zero_says_that_all_was_read(within):
    model = made("polar", f"shadows direction_tolerance={within} magnitude_tolerance={within}")
    x = tokens(model, 1, 64)
    with torch.no_grad(), counting(model) as counts:
        model(x, model.init_state(1, 64))
    row = counts.row()
    if within == 0:
        assert row == {"keys_read": 1.0, "certificate_direction": 0.0, "certificate_magnitude": 0.0}
    else:
        assert 0 < row["certificate_direction"] <= within
        assert 0 < row["certificate_magnitude"] <= within
        assert row["keys_read"] < 1
