"""Landmark attention: its golden vector, its weights by the formula, what few blocks leave out, and refusals."""

import json

import pytest
import torch
from safetensors import safe_open

from atma.config import ModelConfig
from atma.mixers import landmark
from tests.laws.conftest import randomise

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def laid(k, v, landmarks, block):
    """Keys, values and landmarks of one head in blocks, the last filled up with zeros."""
    pages = -(-len(k) // block)
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, pages * block - len(x))).view(1, 1, pages, block, -1) for x in (k, v))
    landmarks = torch.nn.functional.pad(landmarks, (0, 0, 0, pages - len(landmarks)))
    return landmark.Blocks(k, v, landmarks[None, None])


def attended(q, k, v, landmarks, block, count=None):
    """What one head reads (T, K) of a text from its first token on."""
    index = torch.arange(len(q))[None]
    stand = landmark.Standing(index // block, index % block, torch.zeros_like(index))
    q, blocks = q[None, None], laid(k, v, landmarks, block)
    return landmark.landmark_attention(q, q, blocks, stand, q.shape[-1] ** -0.5, count)[0, 0]


def test_it_reproduces_its_golden_vector(golden_mixers):
    with safe_open(golden_mixers / "landmark_attention.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
        x = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    inputs = [x[name].requires_grad_() for name in about["inputs"]]
    found = attended(*inputs, about["config"]["block"])
    torch.testing.assert_close(found, x["out"], rtol=0, atol=1e-9 * float(x["out"].abs().max()))
    gradients = torch.autograd.grad((found * x["out_grad.out"]).sum(), inputs)
    for name, got in zip(about["inputs"], gradients, strict=True):
        expected = x[f"grad.{name}"]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def drawn(tokens, width=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, width, generator=generator, dtype=torch.float64) for _ in range(4)]


def by_formula(q, k, v, landmarks, block, chosen):
    """(5.4) of one query, the last: its own block's tokens and the landmarks of `chosen` share one softmax."""
    scale, opening = q.shape[-1] ** -0.5, (len(k) - 1) // block * block
    own = k[opening:] @ q * scale
    common = torch.cat([own, landmarks[chosen] @ q * scale]).softmax(0)
    read = common[: len(own)] @ v[opening:]
    for share, g in zip(common[len(own) :], chosen, strict=True):
        page = slice(g * block, (g + 1) * block)
        read = read + share * (k[page] @ q * scale).softmax(0) @ v[page]
    return read


@pytest.mark.parametrize("count", [None, 1, 2, 3, 9])
def test_a_query_reads_the_blocks_of_the_best_landmarks_alone(count):
    q, k, v, landmarks = drawn(23)
    found = attended(q, k, v, landmarks[:4], 5, count)
    for i in (0, 4, 5, 12, 22):
        earlier = range(i // 5)
        best = sorted(earlier, key=lambda g: -float(q[i] @ landmarks[g]))[:count]
        torch.testing.assert_close(found[i], by_formula(q[i], k[: i + 1], v[: i + 1], landmarks, 5, best), **CLOSE)


def test_of_equal_landmarks_the_first_is_read():
    q, k, v, landmarks = drawn(23)
    found = attended(q, k, v, landmarks[:1].expand(4, -1), 5, 1)
    torch.testing.assert_close(found[22], by_formula(q[22], k, v, landmarks[:1], 5, [0]), **CLOSE)


def test_within_its_first_block_it_is_softmax_attention():
    options = {"width": 16, "depth": 1, "query_heads": 2, "key_value_heads": 1, "head_width": 8}
    mixers = [ModelConfig(16, pattern=(name,), **options).mixer(0) for name in ("landmark", "rope")]
    randomise(mixers[0])
    mixers[1].double().load_state_dict(mixers[0].state_dict(), strict=False)
    x = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(mixers[0](x)[0], mixers[1](x)[0], **CLOSE)
    longer = torch.cat([x, x[:, :1]], 1)
    assert not torch.allclose(mixers[0](longer)[0][:, 50], mixers[1](longer)[0][:, 50])


@pytest.mark.parametrize(
    ("option", "value"), [("block", 0), ("blocks_read", 0), ("window", 8), ("core", "polar"), ("core", "persistent")]
)
def test_what_it_cannot_take_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"'{option}'"):
        ModelConfig(16, width=16, depth=1, pattern=("landmark",), **{option: value})
