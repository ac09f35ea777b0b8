"""Feature maps, and recurrences normalised by their sums, against the golden vectors and their polynomial."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from atma.mixers.features import FEATURES, Narrow, Poly
from atma.mixers.recurrent_reading import Inputs, recur
from atma.mixers.recurrent_systems import RecurrenceConfig
from atma.ops import use_backend
from tests.test_linear_recurrence import EXACT, inputs


def vectors(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def feature(name, held):
    """The feature map of a golden file, with what it learned as leaves of its graph."""
    kind = "poly" if name.startswith("poly") else name
    made = FEATURES[kind](2, 4, int(name[4:] or 2) if kind == "poly" else 2)
    learned = {key: held[key].clone().requires_grad_() for key in ("weight", "shift", "raw") if key in held}
    for key, value in learned.items():
        delattr(made, key)
        setattr(made, key, value)
    return (made.lift if isinstance(made, Poly) else made), learned


def assert_golden(found, held, gradients):
    """To 1e-9 of each tensor's largest magnitude, as section 9 of mixers.md asks."""
    for name, x in found.items():
        torch.testing.assert_close(x, held[name], rtol=0, atol=1e-9 * float(held[name].abs().max()))
    total = sum((x * held[f"out_grad.{name}"]).sum() for name, x in found.items())
    for name, gradient in zip(gradients, torch.autograd.grad(total, [*gradients.values()]), strict=True):
        wanted = held[f"grad.{name}"]
        torch.testing.assert_close(
            gradient, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()), msg=f"gradient {name}"
        )


@pytest.mark.parametrize("name", ["elu1", "taylor", "hedgehog", "poly2", "poly3"])
def test_feature_maps_and_their_gradients_are_the_golden_ones(name, golden_mixers):
    held = vectors(golden_mixers / f"feature_{name}.safetensors")
    phi, learned = feature(name, held)
    x = held["x"].clone().requires_grad_()
    assert_golden({"out": phi(x)}, held, {"x": x, **learned})


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["elu1", "taylor", "hedgehog"])
def test_normalised_recurrences_and_their_gradients_are_the_golden_ones(name, backend, golden_mixers):
    held = vectors(golden_mixers / f"normalised_{name}.safetensors")
    phi, learned = feature(name, held)
    q, k, v, memory = (held[key].clone().requires_grad_() for key in ("q", "k", "v", "memory_in"))
    config = RecurrenceConfig("linear", feature=name)
    with use_backend(backend):
        out, after = recur(Inputs(phi(q), phi(k), v, None, None), memory, None, config, False)
    assert_golden({"out": out, "memory_out": after}, held, {"q": q, "k": k, "v": v, "memory_in": memory, **learned})


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_poly_features_of_unit_vectors_have_a_polynomial_of_their_cosine_as_product(degree):
    phi = FEATURES["poly"](1, 5, degree).double()
    with torch.no_grad():
        phi.raw.copy_(torch.linspace(0.3, -1, degree + 1))
    x, y = F.normalize(inputs(7, 5), dim=-1), F.normalize(inputs(7, 5, seed=1), dim=-1)
    a, cosine = phi.raw.exp(), (x * y).sum(-1, keepdim=True)
    expected = (a * cosine ** torch.arange(degree + 1)).sum(-1) / a.sum()
    torch.testing.assert_close((phi(x) * phi(y)).sum(-1), expected, **EXACT)
    torch.testing.assert_close(phi(x).norm(dim=-1), torch.ones(7, dtype=torch.float64), **EXACT)
    assert phi(x).shape[-1] == phi.width == math.comb(5 + degree, degree)


@torch.no_grad()
@pytest.mark.parametrize("width", [8, 32])
def test_what_is_alike_in_a_mixers_queries_and_keys_is_alike_when_they_are_narrower(width):
    narrow = Narrow(4, 2, width).double()
    narrow.init_weights(torch.Generator().manual_seed(0))
    x = inputs(1, 5, 2 * width)
    k = x.unflatten(-1, (2, width)).transpose(1, 2)
    q, k = narrow(k.repeat_interleave(2, 1), k)
    assert q.shape == (1, 4, 5, 16) and torch.equal(q, k)
    assert not torch.allclose(q[:, 0], q[:, 1])  # heads of one group look each in a direction of its own
    if width == 8:  # nothing is lost of narrower ones
        torch.testing.assert_close(q.norm(dim=-1)[:, 0], x[..., :8].norm(dim=-1), rtol=1e-6, atol=1e-6)
