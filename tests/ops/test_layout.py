"""Kernels take their fields by name: a wrong, missing or surplus one is refused before anything is read."""

import re

import pytest
import torch

from atma.ops import native
from atma.ops.native import build
from tests.ops.backends import NATIVE

pytestmark = pytest.mark.parametrize("backend", [NATIVE])
X, WEIGHT = torch.arange(6.0).view(2, 3), torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
VALUES = {"rows": 2, "inputs": 3, "outputs": 2, "x": X.data_ptr(), "weight": WEIGHT.data_ptr(), "bias": 0, "threads": 1}


def product(**changes: int) -> torch.Tensor:
    """X · WEIGHTᵀ by the kernel `linear`, its fields in the order given here."""
    y = torch.empty(2, 2)
    problem = {**changes, **{name: x for name, x in VALUES.items() if name not in changes}, "y": y.data_ptr()}
    native.call("linear", torch.float32, " ".join(problem), tuple(problem.values()))
    return y


def test_fields_may_be_given_in_any_order(backend):
    expected = [[8.0, 1.0], [26.0, 4.0]]
    assert product().tolist() == product(threads=1, outputs=2).tolist() == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            "rows inputs outputs x weights bias y threads",
            "linear_float32 has no field 'weights'; it takes rows",
        ),
        ("rows inputs outputs x weight bias y threads more", "linear_float32 has no field 'more'"),
        ("rows inputs outputs x weight y threads", "linear_float32 is not given its field 'bias'"),
        ("rows rows inputs outputs x weight bias y threads", "linear_float32 is given its field 'rows' twice"),
    ],
)
def test_a_field_that_is_wrong_surplus_missing_or_given_twice_is_named(backend, fields, message):
    with pytest.raises(ValueError, match=message):
        native.call("linear", torch.float32, fields, (0,) * len(fields.split()))


@pytest.mark.parametrize("count", [7, 9])
def test_as_many_values_as_fields_are_asked_for(backend, count):
    fields = "rows inputs outputs x weight bias y threads"
    with pytest.raises(ValueError, match=f"linear takes 8 values for its fields {fields}, not {count}"):
        native.call("linear", torch.float32, fields, (0,) * count)


def test_every_exported_kernel_tells_what_it_takes(backend):
    library, kernels = native.status().library, []
    for path in build.sources():
        text = path.read_text()
        assert len(re.findall('extern "C" void', text)) == len(re.findall(r"^TELLS\(", text, re.MULTILINE))
        kernels += [f"{name}float32" for name in re.findall(r"KERNEL\((\w+)##NAME,", text)]
        kernels += re.findall(r"^(?:KERNEL|TELLS)\((\w+),", text, re.MULTILINE)
    assert {"polar_forward_float32", "hold", "newton_schulz_float64"} <= set(kernels)
    for name in kernels:
        assert hasattr(library, f"{name}_layout")
