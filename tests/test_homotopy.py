"""Between softmax and polar attention: golden vectors, and both ends."""

import json
import math

import pytest
import torch
from safetensors import safe_open

from atma.mixers.base import Place
from atma.mixers.heads import Heads
from atma.mixers.homotopy import RopeHomotopy, RopeHomotopyConfig, fold_between
from atma.mixers.polar import PolarConfig, PolarCore
from atma.mixers.rope import RopeConfig, RopeCore
from atma.ops.polar import fold, statistics_of, temperature_and_floor, visible_range

HEADS = Heads(Place(16, 1e-6), 2, 1, 8, None)


def core(mix, fade=0.0):
    made = RopeHomotopy(RopeHomotopyConfig(start_mix=mix, start_fade=fade), HEADS).double()
    made.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return made


def heads(length=9):
    draw = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, n, length, 8, generator=draw, dtype=torch.float64) for n in (2, 1, 1))


@pytest.mark.parametrize("mix", ["0.0", "0.3", "1.0"])
def test_it_reproduces_its_golden_vector(golden_mixers, mix):
    with safe_open(golden_mixers / f"homotopy_{mix}.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
        x = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    inputs = [x[name].requires_grad_() for name in about["inputs"]]
    q, k, v = (x[name][None, None] for name in "qkv")
    scalars = [x[name][None] for name in ("length_gain", "null_base", "null_slope")]
    share, scale = about["config"]["mix"], about["config"]["scale"]
    first, last = visible_range(q, None, None, None)
    whole, floor = temperature_and_floor((last - first).double(), *scalars)
    temperature = 1 + share * (whole - 1)
    S, L, Q, M = statistics_of("reference", q)(q, k, v, temperature * scale, first, last)
    slope, null, radius = torch.zeros(1).double(), x["null_value"][None], x["radius"][None]
    if share == 0:
        out = S / L[..., None]
    elif share == 1:
        out = fold(S, L, Q, temperature * floor - M, slope, null)[0] * radius
    else:
        logit = temperature * floor + math.log(share) - M
        out = fold_between((S, L, Q), logit, slope, null, radius, share)[0]
    torch.testing.assert_close(out[0, 0], x["out"], rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad((out[0, 0] * x["out_grad.out"]).sum(), inputs, allow_unused=True)
    for name, found in zip(about["inputs"], gradients, strict=True):
        found = torch.zeros_like(x[name]) if found is None else found
        torch.testing.assert_close(found, x[f"grad.{name}"], rtol=1e-8, atol=1e-8)


def test_at_zero_it_is_the_softmax_core_to_the_bit():
    q, k, v = heads()
    made, plain = core(0.0), RopeCore(RopeConfig(), HEADS)
    turned = made.turn(q, k, None, None)
    assert all(torch.equal(*pair) for pair in zip(turned, plain.turn(q, k, None, None), strict=True))
    assert torch.equal(made(*turned, v, None, None)[0], plain(*turned, v, None, None)[0])


def test_at_one_it_is_the_polar_core_with_its_scale_and_radius():
    q, k, v = heads()
    made, polar = core(1.0, 1.0), PolarCore(PolarConfig(direction_radius=1.0), HEADS).double()
    polar.load_state_dict({name: value for name, value in made.state_dict().items() if name in polar.state_dict()})
    read, added = made(*made.turn(q, k, None, None), v, None, None)
    direction, count = polar(q * made.scale * 8**0.5, k, v, None, None)
    torch.testing.assert_close(read, direction * made.log_radius.exp()[:, None, None])
    torch.testing.assert_close(added, count)


def test_between_it_comes_near_to_either_end():
    q, k, v = heads()
    with torch.no_grad():
        for end in (0.0, 1.0):
            exact, near = core(end), core(abs(end - 1e-9))
            turned = exact.turn(q, k, None, None)
            torch.testing.assert_close(near(*turned, v, None, None)[0], exact(*turned, v, None, None)[0])


@pytest.mark.parametrize("values", [{"start_mix": 1.5}, {"start_fade": -0.1}, {"count_limit": 0}, {"sharpening": -1.0}])
def test_what_no_mix_can_be_is_refused(values):
    with pytest.raises(ValueError, match=f"'{next(iter(values))}'"):
        RopeHomotopyConfig(**values)
