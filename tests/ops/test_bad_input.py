"""What an operation does not take is refused with the offending value, never read as something else."""

import pytest
import torch

from atma.ops import causal_conv, gated_delta, polar_attention, recurrence, softcap_loss, softmax_attention
from tests.ops.backends import FAST, NATIVE

META = torch.device("meta")


def polar(q=(1, 2, 3, 8), k=None, spoil=None, backend="auto", keys=3, **options):
    """A call with one argument replaced by what `spoil` makes of it."""
    heads, width = q[1], q[-1]
    given = {"q": torch.randn(q), "k": torch.randn(1, 1, keys, width), "v": torch.randn(1, 1, keys, width)}
    given |= {name: torch.randn(heads) for name in ("length_gain", "null_base", "null_slope", "magnitude_slope")}
    given["null_value"] = torch.randn(heads, width)
    return polar_attention(**spoiled(given, spoil), **options, backend=backend)


def softmax(spoil=None, backend="auto", **options):
    given = {name: torch.randn(1, heads, 3, 8) for name, heads in (("q", 2), ("k", 1), ("v", 1))}
    return softmax_attention(**spoiled(given, spoil), scale=0.3, **options, backend=backend)


def delta(spoil=None, backend="auto", length=3, **options):
    given = {name: torch.randn(1, heads, length, 8) * 0.3 for name, heads in (("q", 2), ("k", 1), ("v", 1))}
    given |= {"log_decay": -torch.rand(1, 2, length), "beta": torch.rand(1, 2, length)}
    return gated_delta(**spoiled(given | options, spoil), backend=backend)


def linear(spoil=None, backend="auto", **options):
    """A recurrence with everything by default, one argument replaced or given on top."""
    given = {name: torch.randn(1, heads, 3, 8) for name, heads in (("q", 4), ("k", 2), ("v", 1))}
    return recurrence(**spoiled(given | options, spoil), backend=backend)


def conv(spoil=None, backend="auto", **options):
    given = {"x": torch.randn(1, 5, 3), "weight": torch.randn(3, 4)}
    return causal_conv(**spoiled(given | options, spoil), backend=backend)


def spoiled(given, spoil):
    name, change = spoil or ("", None)
    return given | ({name: change(given[name])} if change else {})


def to(kind):
    return lambda x: x.to(kind)


KINDS = [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
TENSORS = [(polar, "q"), (polar, "k"), (polar, "null_value"), (softmax, "v"), (delta, "k"), (delta, "beta")]
TENSORS += [(linear, "q"), (linear, "v"), (conv, "x"), (conv, "weight")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("call", "name"), TENSORS)
def test_numbers_that_are_not_real_are_refused(call, name, kind):
    found = str(kind).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"^{name} must be a Tensor of float32, .*, not Tensor of {found}$"):
        call(spoil=(name, to(kind)))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("call", "name"), TENSORS)
def test_a_tensor_without_numbers_is_refused(call, name, backend):
    with pytest.raises(ValueError, match=f"^{name} is on the device meta"):
        call(spoil=(name, to(META)), backend=backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: polar((1, 2, 3, 0), backend=b), r"none 0, not \(1, 2, 3, 0\)"),
        (lambda b: polar((1, 2, 0, 8), keys=0, backend=b), r"none 0, not \(1, 2, 0, 8\)"),
        (lambda b: softmax(("q", lambda x: x[0]), b), r"must be \(B, H, T, K\)"),
        (lambda b: softmax(("k", lambda x: x[:, :0]), b), r"none 0, .*\(1, 0, 3, 8\)"),
        (
            lambda b: polar(spoil=("null_value", lambda x: x[:, :1]), backend=b),
            r"null_value must be \(2, 8\).*\(2, 1\)",
        ),
        (lambda b: polar(spoil=("magnitude_slope", lambda x: x[:1]), backend=b), r"magnitude_slope must be \(2,\)"),
        (lambda b: polar(count_limit=0, backend=b), "count_limit must be at least 1, not 0"),
        (lambda b: polar(start=torch.tensor([5]), backend=b), "room for 3 of 3 keys; found 5 to 5"),
        (lambda b: polar(start=torch.tensor([-2]), keys=9, backend=b), "found -2 to -2"),
        (lambda b: softmax(start=torch.tensor([0.0]), backend=b), "start must be integers, not float32"),
        (lambda b: softmax(start=torch.zeros(1, dtype=torch.int32, device=META), backend=b), "start must be on cpu"),
        (
            lambda b: softmax(segment_ids=torch.zeros(1, 4).int(), backend=b),
            r"segment_ids must be \(1, 3\), not \(1, 4\)",
        ),
        (lambda b: delta(("v", lambda x: x[..., 0]), b), r"v \(1, 1, 3\) must be"),
        (lambda b: delta(length=0, backend=b), "none of them 0"),
        (lambda b: delta(("beta", lambda x: x[:, :1]), b), r"beta must be \(1, 2, 3\), not \(1, 1, 3\)"),
        (
            lambda b: delta(memory=torch.zeros(1, 2, 4, 8), backend=b),
            r"memory must be \(1, 2, 8, 8\), not \(1, 2, 4, 8\)",
        ),
        (lambda b: delta(segment_ids=torch.zeros(1, 4).int(), backend=b), r"segment_ids must be \(1, 3\)"),
        (lambda b: linear(("k", lambda x: x[..., :4]), b), r"k \(1, 2, 3, 4\) and v \(1, 1, 3, 8\) do not fit"),
        (
            lambda b: linear(("v", lambda x: x.expand(1, 3, 3, 8)), b),
            "q, k and v have 4, 2 and 3 heads: give each a number that divides the largest, 4",
        ),
        (
            lambda b: linear(("v", lambda x: x.repeat(1, 6, 1, 1)), b),
            "q, k and v have 4, 2 and 6 heads: give each a number that divides the largest, 6",
        ),
        (lambda b: linear(("v", lambda x: x[:, :, :2]), b), r"v \(1, 1, 2, 8\) do not fit"),
        (lambda b: linear(("k", lambda x: x[:, :0]), b), r"k \(1, 0, 3, 8\) .*none of them 0"),
        (
            lambda b: linear(log_decay=-torch.ones(1, 4, 3, 5), backend=b),
            r"log_decay must be \(4,\), \(1, 4, 3\) or \(1, 4, 3, 8\), not \(1, 4, 3, 5\)",
        ),
        (
            lambda b: linear(log_decay=-torch.ones(1, 4, 3), decay_axis="value", backend=b),
            r"on the value axis must be \(1, 4, 3, 8\), not \(1, 4, 3\)",
        ),
        (lambda b: linear(decay_axis="value", backend=b), r"must be \(1, 4, 3, 8\), not None"),
        (
            lambda b: linear(log_decay=-torch.ones(1, 4, 3, 8), decay_axis="value", rule="delta", backend=b),
            "decay_axis 'value' is for rule 'add'",
        ),
        (lambda b: linear(decay_axis="row", backend=b), "decay_axis must be 'key' or 'value', not 'row'"),
        (lambda b: linear(rule="hebb", backend=b), "rule must be 'add' or 'delta', not 'hebb'"),
        (lambda b: linear(beta=torch.ones(4), backend=b), r"beta must be \(1, 4, 3\), not \(4,\)"),
        (
            lambda b: linear(memory=torch.zeros(1, 4, 8, 8), segment_ids=torch.zeros(1, 3).int(), backend=b),
            "a call with a memory continues one document",
        ),
        (lambda b: conv(("x", lambda x: x[0]), b), r"x must be \(batch, length, channels\)"),
        (lambda b: conv(("weight", lambda x: x[:, :0]), b), "taps ≥ 1"),
        (lambda b: conv(segment_ids=torch.zeros(1, 4).int(), backend=b), r"segment_ids must be \(1, 5\)"),
        (lambda b: conv(segment_ids=torch.zeros(1, 5), backend=b), "segment_ids must be integers, not float32"),
    ],
)
def test_shapes_and_positions_that_do_not_fit_are_refused(call, message, backend):
    with pytest.raises(ValueError, match=message):
        call(backend)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_decay": torch.tensor([-1, 0.25, -1, -1])}, "log_decay must not be above 0 .*found 0.25"),
        ({"log_decay": torch.full((1, 4, 3), 1e-3)}, "above 0 .*found 0.001"),
        ({"log_decay": torch.full((1, 4, 3, 8), 2.0)}, "above 0 .*found 2"),
        ({"log_decay": torch.full((1, 4, 3, 8), 2.0), "decay_axis": "value"}, "above 0 .*found 2"),
        ({"rule": "delta", "beta": torch.full((1, 4, 3), 2.5)}, "beta must be from 0 to 2 .*found 2.5"),
        ({"rule": "delta", "beta": torch.full((1, 4, 3), -0.5)}, "beta must be from 0 to 2 .*found -0.5"),
    ],
)
def test_a_memory_that_would_grow_is_refused(options, message, backend):
    with pytest.raises(ValueError, match=message):
        linear(backend=backend, **options)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_the_ends_of_what_is_taken_are_taken(backend):
    """No decay as 0, β of 0 and of 2; and by the rule `add` any β."""
    ends = torch.tensor([0.0, 2.0, 1.0]).expand(1, 4, 3)
    for rule, beta in (("delta", ends), ("add", 10 * ends - 5)):
        out, after = linear(log_decay=torch.zeros(1, 4, 3), beta=beta, rule=rule, backend=backend)
        assert out.isfinite().all() and after.isfinite().all()


@pytest.mark.parametrize("width", [1, 7, 512, 1024])
@pytest.mark.parametrize("backend", FAST)
def test_every_head_width_is_taken_on_the_cpu(backend, width):
    q, k, v = (torch.randn(1, n, 5, width, generator=torch.Generator().manual_seed(n)) for n in (2, 1, 1))
    fast, oracle = (softmax_attention(q, k, v, width**-0.5, backend=b) for b in (backend, "reference"))
    torch.testing.assert_close(fast, oracle)


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize("call", [polar, softmax, delta, conv])
def test_the_compiled_kernels_asked_for_by_name_say_what_they_take(call, backend):
    name = "x" if call is conv else "q"
    with pytest.raises(ValueError, match="takes float32, float64, bfloat16, not float16"):
        call(spoil=(name, to(torch.float16)), backend=backend)


@pytest.mark.parametrize("backend", ["gpu", "fla"])
def test_a_gpu_backend_asked_for_by_name_is_not_replaced(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("atma.ops.backend._decided", {})  # what was decided with the interpreter on
    with pytest.raises(ValueError, match=f"{backend} backend is not available here: .*CUDA device, not on cpu"):
        delta(backend=backend)


def test_a_backend_that_an_operation_has_not_is_refused():
    with pytest.raises(ValueError, match="conv has no backend 'fla'; it has reference, cpu, native, gpu"):
        conv(backend="fla")


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_an_id_that_comes_back_is_another_document(backend):
    """Ids 4 4 1 4 4 are three documents, to the convolution, the attention and the memory alike."""
    returning, counted = torch.tensor([[4, 4, 1, 4, 4]]), torch.tensor([[0, 0, 1, 2, 2]])
    q, k, v = (torch.randn(1, n, 5, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 1, 1))
    x, taps, rates = q.flatten(1, 2)[:, :5], torch.ones(8, 4), torch.full((1, 2, 5), 0.5)
    for call in (
        lambda ids: causal_conv(x, taps, None, ids, backend),
        lambda ids: softmax_attention(q, k, v, 0.3, None, ids, None, backend),
        lambda ids: gated_delta(q, k, v, -rates, rates, None, ids, backend)[0],
    ):
        torch.testing.assert_close(call(returning), call(counted), rtol=0, atol=0)


def test_the_loss_is_not_asked_of_a_backend_it_has_not():
    with pytest.raises(ValueError, match="loss has no backend 'fla'"):
        softcap_loss(torch.randn(2, 3), torch.randn(5, 3), None, torch.tensor([1, 2]), backend="fla")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(4)}, r"bias must be \(5,\)"),
        ({"weight": torch.zeros(5, 3, device="meta")}, "weight is on the device meta"),
        ({"weight": torch.zeros(5, 3, dtype=torch.float64)}, "must be of one dtype"),
        ({"weight": torch.zeros(0, 3)}, "neither D nor V 0"),
        ({"hidden": torch.zeros(3)}, "must be"),
        ({"targets": torch.zeros(2, 7)}, "targets must be integers"),
        ({"targets": torch.zeros(2, 6, dtype=torch.long)}, r"targets must be \(2, 7\)"),
        ({"targets": torch.full((2, 7), 5)}, "targets must be in"),
    ],
)
def test_a_loss_of_what_does_not_fit_names_what_is_wrong(change, message):
    given = {"hidden": torch.zeros(2, 7, 3), "weight": torch.zeros(5, 3), "bias": torch.zeros(5)}
    given |= {"targets": torch.zeros(2, 7, dtype=torch.long)} | change
    with pytest.raises(ValueError, match=message):
        softcap_loss(**given)
