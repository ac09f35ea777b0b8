"""Block gains: the stated disturbance, and what a block makes of it."""

import pytest
import torch

from atma.diagnose.stress import direction, gain_rows, gains
from atma.diagnose.texts import Laid
from tests.diagnose.conftest import made


def test_a_direction_is_two_hundredths_of_every_token():
    x = torch.randn(1, 50, 16) * torch.linspace(0.1, 30, 50)[:, None]
    delta = direction(x, torch.Generator().manual_seed(0))
    ratio = delta.square().mean(-1).sqrt() / x.square().mean(-1).sqrt()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.02))


@torch.no_grad()
def test_gains_are_those_of_blocks_run_without_a_state(any_model, text):
    found = gains(any_model, text, (90, 200), 3, 1000)
    generator, x = torch.Generator().manual_seed(3), any_model.embed(text.tokens[None, :90])
    for i, block in enumerate(any_model.blocks):
        delta = direction(x, generator)
        after = block(x)[0]
        expected = (block(x + delta)[0] - after).norm() / delta.norm()
        assert found[i][0] == pytest.approx(float(expected), rel=1e-9)
        x = after
    assert min(map(min, found)) > 0 and found[1][0] != found[1][1]


@torch.no_grad()
@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_a_block_that_adds_nothing_has_gain_one_in_any_chunks(text, chunk):
    model = made()
    for block in model.blocks:
        for name, parameter in block.named_parameters():
            if "out_proj" in name or "count_proj" in name:
                parameter.zero_()
    assert gains(model, text, (90, 200), 1, chunk) == [[pytest.approx(1)] * 2] * 4


def test_one_random_direction_is_one_seed(model, text: Laid):
    first, same, other = (gains(model, text, (90,), seed, 1000) for seed in (1, 1, 2))
    assert first == same != other


def test_a_document_counts_once_whatever_its_directions(model):
    measured = [[[[1.0]] * 4, [[3.0]] * 4], [[[4.0]] * 4, [[4.0]] * 4]]
    rows = gain_rows(model, measured, (128,))
    assert [(row["layer"], row["mixer"]) for row in rows] == list(enumerate(["local", "global"] * 2))
    assert rows[0]["values"] == [2.0, 4.0] and rows[0]["gain"] == 3.0 and rows[0]["directions"] == 2
    assert rows[0]["gain_low"] < 3 < rows[0]["gain_high"]
