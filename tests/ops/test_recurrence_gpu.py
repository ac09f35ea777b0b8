"""The Triton delta rule against the token-by-token oracle: on a GPU where there is one, else interpreted."""

import importlib.metadata
import itertools
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from tests.ops.on_gpu import DEVICE, LENGTHS, draw, error, is_real, placed, results  # isort: skip (before Triton)

from atma.ops import gated_delta, use_backend
from atma.ops.recurrent import fla, gpu, gpu_tiles, reference


def case(length, packed=False, groups=1, width=16, depth=24, batch=1):
    """Two query heads on `groups` key/value heads; unit keys and queries; a memory from before."""
    heads = 2
    q, k = (F.normalize(draw(batch, n, length, width, seed=n), dim=-1) for n in (heads, groups))
    v, memory = draw(batch, groups, length, depth, seed=7), draw(batch, heads, depth, width)
    log_decay, beta = F.logsigmoid(draw(batch, heads, length) + 2), torch.sigmoid(draw(batch, heads, length, seed=3))
    cuts = torch.tensor([[length // 3, length // 2], [length // 5, length - 1]])[:batch]
    ids = (torch.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1) if packed else None
    return [q, k, v, log_decay, beta, memory, ids]


def oracle(*arguments):
    return reference.recurrence(*arguments, "delta")


def delta(*arguments):
    return gpu.recurrence(*arguments, "delta")


def fla_delta(*arguments):
    return fla.recurrence(*arguments, "delta")


def lowered(arguments, dtype):
    """q, k, v in `dtype`, the rest as they are."""
    return [x.to(dtype) for x in arguments[:3]] + arguments[3:]


def single(arguments):
    return [x.float() if is_real(x) and x.dtype == torch.float64 else x for x in arguments]


@pytest.mark.parametrize(
    ("packed", "length"), [*((True, length) for length in LENGTHS), (False, 2), (False, 64), (False, 65)]
)
def test_outputs_memory_and_gradients_equal_the_oracle(packed, length):
    arguments = case(length, packed)
    exact = results(oracle, placed(arguments, device="cpu"))
    found = results(delta, placed(single(arguments)))
    assert max(error(found, exact)) <= 1e-5


@pytest.mark.parametrize(("groups", "width", "depth"), [(2, 16, 16), (1, 5, 40), (1, 40, 5), (2, 32, 128)])
def test_any_width_and_number_of_key_heads(groups, width, depth):
    arguments = case(20, True, groups, width, depth, batch=2 if width < 32 else 1)
    exact = results(oracle, placed(arguments, device="cpu"))
    found = results(delta, placed(single(arguments)))
    assert max(error(found, exact)) <= 1e-5


def test_chunks_of_64_are_as_exact(monkeypatch):
    """The chunk of low precision, in float32: its solution joins blocks twice."""
    monkeypatch.setitem(gpu_tiles.CHUNK, torch.float32, 64)
    arguments = case(130, True)
    exact = results(oracle, placed(arguments, device="cpu"))
    found = results(delta, placed(single(arguments)))
    assert max(error(found, exact)) <= 1e-5


def test_one_token_over_and_over_is_solved_without_cancellation():
    """Equal keys, no decay, full writes: powers of A would grow like binomials."""
    q, k, v, log_decay, beta, memory, ids = case(70)
    arguments = [q, k[:, :, :1].expand_as(k), v, log_decay * 0, beta * 0 + 1, memory, ids]
    exact = results(oracle, placed(arguments, device="cpu"))
    found = results(delta, placed(single(arguments)))
    assert max(error(found[:2], exact[:2])) <= 1e-5


def test_strong_decay_between_tokens_that_hardly_decay_keeps_its_digits():
    q, k, v, log_decay, beta, memory, ids = case(70)
    log_decay = torch.where(torch.arange(70) % 40 < 30, -30.0, -0.01).double().expand_as(log_decay).contiguous()
    arguments = [q, k, v, log_decay, beta, memory, ids]
    exact = results(oracle, placed(arguments, device="cpu"))
    found = results(delta, placed(single(arguments)))
    assert max(error(found[:2], exact[:2])) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_low_precision_is_within_twice_the_error_of_plain_low_precision(packed, dtype):
    low = single(lowered(case(100, packed, width=32, depth=32), dtype))
    exact = results(oracle, placed([x.double() if is_real(x) else x for x in low], device="cpu"))
    plain = results(oracle, placed(low, dtype, device="cpu"))
    found = results(delta, placed(low))
    assert [x.dtype for x in found] == [dtype, torch.float32, dtype, dtype, dtype, *[torch.float32] * 3]
    for ours, theirs in zip(error(found, exact), error(plain, exact), strict=True):
        assert ours <= 2 * theirs


def test_a_document_sees_nothing_of_the_one_before_it():
    """Bit-identical outputs, memory and gradients when the first document, its gates and the first memory change."""
    packed = single(case(70, groups=2))
    packed[6] = (torch.arange(70) >= 41).long()[None]
    seen = []
    for seed in (0, 5):
        arguments = [*packed[:3], -packed[3].abs(), packed[4], packed[5] * (1 + seed), packed[6]]
        for at in range(5):
            arguments[at] = arguments[at].clone()
            arguments[at][:, :, :41] *= 1 + seed / 9
        arguments = placed(arguments)
        out, after = delta(*arguments)
        given = [draw(*x.shape, seed=9, dtype=torch.float32).to(DEVICE) for x in (out, after)]
        gradients = torch.autograd.grad((out, after), arguments[:5], given)
        seen.append([after.detach(), out[:, :, 41:].detach(), *(x[:, :, 41:] for x in gradients)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("cut", [1, 40])
def test_two_calls_with_the_memory_carried_equal_one(cut):
    arguments = placed(single(case(50)))
    with torch.no_grad():
        whole, after = delta(*arguments)
        first, memory = delta(*(x[:, :, :cut] for x in arguments[:5]), *arguments[5:])
        second, end = delta(*(x[:, :, cut:] for x in arguments[:5]), memory, None)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_token_without_gradient_takes_the_step_and_leaves_the_old_memory_alone(groups, dtype, monkeypatch):
    low = single(lowered(case(1, groups=groups, width=20, depth=40, batch=2), dtype))
    exact = oracle(*(x.double() if is_real(x) else x for x in low))
    arguments = placed(low)
    monkeypatch.setattr(gpu, "by_token", None)
    with torch.no_grad():
        out, after = delta(*arguments)
    assert out.dtype == dtype
    assert error([after.cpu()], exact[1:])[0] <= 1e-6
    assert error([out.cpu()], exact[:1])[0] <= (1e-6 if dtype == torch.float32 else 2**-8)
    assert torch.equal(arguments[5].cpu(), low[5])


def test_queries_and_keys_that_a_norm_has_widened_are_taken_in_the_precision_of_the_values():
    q, k, v, *gates = placed(single(lowered(case(9), torch.bfloat16)))
    with use_backend("gpu"):
        wide, low = gated_delta(q.float(), k.float(), v, *gates), gated_delta(q, k, v, *gates)
    assert wide[0].dtype == torch.float32
    assert torch.equal(wide[0], low[0].float()) and torch.equal(wide[1], low[1])


def test_heads_beside_tokens_in_memory_need_no_copy():
    """q, k and v as the projections leave them, (B, T, H, K) in memory, give the same bits."""
    arguments = placed(single(case(40)))
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in arguments[:3]]
    given = results(delta, arguments), results(delta, turned + arguments[3:])
    assert all(torch.equal(a, b) for a, b in zip(*given, strict=True))


def test_the_gradient_has_the_same_bits_every_time():
    first, second = (results(delta, placed(single(case(33, groups=2)))) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_custom_operator_keeps_its_contract(packed):
    torch.library.opcheck(torch.ops.atma.recurrence_gpu.default, (*placed(single(case(5, packed))), True))


def test_the_step_keeps_its_contract_too():
    step = torch.ops.atma.recurrence_step_gpu.default
    torch.library.opcheck(step, (*(x.detach() for x in placed(single(case(1)))[:6]), True, False))


def test_it_compiles_without_a_graph_break():
    arguments = placed(single(case(5)))
    compiled = torch.compile(delta, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, arguments), results(delta, arguments), strict=True):
        assert torch.equal(a, b)
    token = [x if x is None else x.detach() for x in placed(single(case(1)))]
    with torch.no_grad():
        for a, b in zip(compiled(*token), delta(*token), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a, "float16, bfloat16 or float32, not torch.float64"),
        (lambda a: [a[0].float(), *a[1:]], "not torch.float32, torch.float64 and torch.float64"),
        (lambda a: lowered(a, torch.float32), "log_decay, beta and memory must be float32 .*, not torch.float64"),
        (
            lambda a: single([F.pad(a[0], (0, 250)), F.pad(a[1], (0, 250)), *a[2:]]),
            "keys of at most 256 .* or backend .*, not 266",
        ),
        (
            lambda a: single([*a[:2], F.pad(a[2], (0, 1001)), *a[3:]]),
            "values of at most 1024 .* or backend .*, not 1025",
        ),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        delta(*change(case(2)))


def imitation(scale_power=1, keys_first=True):
    """What stands in for flash-linear-attention: its arguments, its layout, by our reference."""

    def kernel(*, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
        assert output_final_state
        inputs = [x.transpose(1, 2).float() for x in (q * scale**scale_power, k, v, g, beta)]
        bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        state = initial_state.mT if keys_first else initial_state
        outs, states = [], []
        for n, (start, end) in enumerate(itertools.pairwise(bounds)):
            held = state if cu_seqlens is None else state[n : n + 1]
            out, after = reference.recurrence(*(x[:, :, start:end] for x in inputs), held, None, "delta")
            outs.append(out)
            states.append(after.mT if keys_first else after)
        return torch.cat(outs, 2).transpose(1, 2).to(q.dtype), torch.cat(states)

    return kernel


@pytest.fixture
def install(monkeypatch):
    """Put an imitation of flash-linear-attention where it would be imported from."""

    def place(version="0.6.0", chunk=None, step=None):
        module = types.ModuleType("fla.ops.gated_delta_rule")
        module.chunk_gated_delta_rule = chunk or imitation()
        module.fused_recurrent_gated_delta_rule = step or imitation()
        monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
        monkeypatch.setitem(sys.modules, "fla.ops", types.ModuleType("fla.ops"))
        monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)

    fla._checked.cache_clear()
    yield place
    fla._checked.cache_clear()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_flash_linear_attention_is_called_in_its_own_layout(packed, groups, install):
    install()
    arguments = case(9, packed, groups)
    exact = results(oracle, placed(arguments, device="cpu"))
    found = results(fla_delta, placed(single(arguments), device="cpu"))
    assert max(error(found, exact)) <= 1e-5


def test_flash_linear_attention_takes_its_recurrent_kernel_for_one_token_without_gradient(install):
    def never(**arguments):
        assert arguments["q"].shape[1] > 1
        return imitation()(**arguments)

    install(chunk=never)
    arguments = single(case(1))
    with torch.no_grad():
        for a, b in zip(fla_delta(*arguments), oracle(*arguments), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("part", "length"), [("chunk", 70), ("step", 1)])
def test_flash_linear_attention_that_means_something_else_is_an_error(part, length, install):
    install(**{part: imitation(keys_first=False)})
    with pytest.raises(RuntimeError, match=f"is off by .* on {length} tokens"):
        fla_delta(*single(case(2)))


@pytest.mark.parametrize("version", ["0.4.2", "0.7.0", "1.0"])
def test_an_unknown_version_of_flash_linear_attention_is_refused(version, install):
    install(version)
    with pytest.raises(ValueError, match=rf"knows flash-linear-attention >=0.5,<0.7, not {version}: pip install"):
        fla_delta(*single(case(2)))


def test_without_flash_linear_attention_the_error_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    fla._checked.cache_clear()
    with pytest.raises(ValueError, match=r"pip install atma-lm\[fla\]"):
        fla_delta(*single(case(2)))


@pytest.mark.parametrize(
    ("change", "rule", "found"),
    [
        ({}, "add", r"rule 'add', log_decay \(1, 2, 2\)"),
        ({3: None}, "delta", "log_decay None"),
        ({3: draw(1, 2, 2, 16)}, "delta", r"log_decay \(1, 2, 2, 16\)"),
        ({4: None}, "delta", "beta None"),
    ],
)
def test_flash_linear_attention_takes_the_gated_delta_rule_alone(change, rule, found):
    arguments = [change.get(at, x) for at, x in enumerate(single(case(2)))]
    with pytest.raises(ValueError, match=f"takes rule 'delta' .*{found}.*; use another backend"):
        fla.recurrence(*arguments, rule)
    with pytest.raises(ValueError, match="not decays on the value axis; use another backend"):
        fla.by_value(*arguments)


def test_flash_linear_attention_takes_packed_documents_in_one_row_only(install):
    install()
    with pytest.raises(ValueError, match="in one row, not 2"):
        fla_delta(*single(case(9, packed=True, batch=2)))
