"""Only what a difference makes sure is told, in words with its figures; a doctored model is found out."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from atma.diagnose.diagnosis import diagnose
from atma.diagnose.effects import UNCHANGED, effect_rows, estimate, far_rows, reading_rows
from atma.diagnose.findings import findings
from atma.diagnose.parts import forgetting
from atma.diagnose.plan import Plan
from atma.diagnose.reading import Reading
from atma.diagnose.texts import documents_of_text
from atma.loading import load
from atma.statistics import mean_interval

LENGTHS = (256, 4096)
NOISE = (-0.01, 0.0, 0.01, 0.0)


def rows_of(change, losses, right=(5, 5), heads=(), cap=None, spread=NOISE):
    """Rows of four documents with such losses and right digits at the two lengths."""
    readings = [
        Reading([loss + noise for loss in losses], [0.0, 0.0], [[0.1], [0.1]], [[count] for count in right])
        for noise in spread
    ]
    touched = [name for name in ("read", "count", "memory") if name in change] or ["read", "count", "memory"]
    parts = [f"{head} {name}" for head in heads for name in (["memory"] if cap else touched)]
    about = {"heads": list(heads), "parts": parts, "cap": cap}
    return [row | about for row in reading_rows(change, readings, LENGTHS)]


def found_in(*changes, more=()):
    rows = [row for change in changes for row in change]
    return findings([*rows, *effect_rows(rows), *more])


def held(layer, head, median, zero):
    row = {"kind": "retention", "layer": layer, "head": head, "half_life_p50": median}
    return row | {"half_life_p90": median, "half_life": zero}


def mixed(change, worth, heads, cap=None):
    """A change that is worth this much at the two lengths, a little different on each document."""
    rows = rows_of(change, (2.0, 2.0), heads=heads, cap=cap)
    for row, by in zip(rows[:2], worth, strict=True):
        base = np.array(row["document_losses"])
        row["document_losses"] = (base + by + np.array([0.002, -0.001, -0.002, 0.001])).tolist()
    return rows


def test_a_factor_that_helps_is_told_by_its_own_words():
    change = mixed("the read of layer 2 times 0.5", (0.0, -0.3), ["2.0"])
    change = [row | {"subject": "Multiplying the read of layer 2 by 0.5", "factor": 0.5} for row in change]
    [found] = found_in(rows_of(UNCHANGED, (2.0, 2.0)), change)
    assert found.text.startswith("Multiplying the read of layer 2 by 0.5 lowers the loss at 4K tokens by 0.30 nats")
    assert found.rule == "change"


def test_a_model_that_does_not_fail_has_no_findings():
    base = rows_of(UNCHANGED, (2.0, 2.0))
    assert found_in(base) == []
    assert found_in(base, mixed("without the memory of layer 2", (0.1, 0.3), ["2.0", "2.1"])) == []


def test_a_part_that_costs_is_told_with_its_interval():
    base = rows_of(UNCHANGED, (2.0, 2.0))
    [finding] = found_in(base, mixed("without the memory of layer 2", (0.05, -0.3), ["2.0", "2.1"]))
    assert finding.text.startswith(
        "Going without the memory of layer 2 lowers the loss at 4K tokens by 0.30 nats [0.30, 0.30]; +0.05 nats at 256."
    )
    assert (finding.rule, finding.unit) == ("mask", "nats")
    assert finding.effect == pytest.approx(-0.3) and finding.low < finding.effect < finding.high < 0


def test_a_long_holding_head_is_told_in_tokens_and_explains_its_layer():
    base = rows_of(UNCHANGED, (2.0, 2.0))
    cap = mixed("head 2.5 capped at 256", (0.0, -0.2), ["2.5"], 256.0)
    mask = mixed("without the memory of layer 2", (0.0, -0.21), ["2.4", "2.5"])
    without = mixed("without head 2.5", (0.0, -0.2), ["2.5"])
    [finding] = found_in(base, mask, without, cap, more=[held(2, 5, 3.07e6, 3.07e6)])
    assert finding.text == (
        "Layer 2 head 5 holds 3.07M tokens (its median half-life). Capping it at 256 lowers the loss at 4K tokens by "
        "0.20 nats [0.19, 0.21]; +0.00 nats at 256."
    )


def test_a_channel_does_not_explain_another_of_more_heads():
    base = rows_of(UNCHANGED, (2.0, 2.0))
    memory = mixed("without any memory", (0.0, -0.3), ["2.0", "6.0"])
    count = mixed("without the count of layer 2", (0.0, -0.28), ["2.0"])
    assert [round(finding.effect, 2) for finding in found_in(base, memory, count)] == [-0.3, -0.28]


def test_findings_are_ranked_by_effect_and_a_larger_change_that_does_more_is_kept():
    base = rows_of(UNCHANGED, (2.0, 2.0))
    cap = mixed("head 2.5 capped at 256", (0.0, -0.1), ["2.5"], 256.0)
    mask = mixed("without the memory of layer 2", (0.0, -0.4), ["2.4", "2.5"])
    other = mixed("without head 6.0", (0.0, -0.2), ["6.0"])
    told = found_in(base, cap, mask, other, more=[held(2, 5, 900.0, 20.0)])
    assert [round(finding.effect, 2) for finding in told] == [-0.4, -0.2, -0.1]
    assert "holds 900 tokens (median; 20 at zero input)" in told[-1].text


def test_what_is_small_or_unsure_is_not_told():
    base = rows_of(UNCHANGED, (2.0, 2.0))
    assert found_in(base, mixed("without any count", (0.0, -0.015), ["2.0"])) == []
    unsure = mixed("without any count", (0.0, -0.1), ["2.0"])
    unsure[1]["document_losses"] = [1.4, 2.2, 1.9, 2.1]
    assert found_in(base, unsure) == []


def test_one_document_makes_nothing_sure():
    base = rows_of(UNCHANGED, (2.0, 3.0), spread=(0.0,))
    worse = rows_of("without any count", (1.0, 1.0), heads=["2.0"], spread=(0.0,))
    assert found_in(base, worse) == []


def test_rising_loss_and_falling_recall_are_symptoms():
    told = found_in(rows_of(UNCHANGED, (2.0, 2.4), right=(5, 2)))
    assert told[0].text == "Loss rises by 0.40 nats a token from 256 to 4K tokens [0.40, 0.40]."
    assert told[1].text == "Recall of the told records falls: 100% at 256 tokens, 40% at 4K (-60% [-60%, -60%])."


def test_far_context_that_harms_is_a_symptom():
    def far(harms):
        readings = [Reading([], [2.0, 2.0 + harm], [], []) for harm in harms]
        return far_rows(readings, [[2.0, 2.0]] * len(harms), LENGTHS)

    base = rows_of(UNCHANGED, (2.0, 2.0))
    [finding] = found_in(base, more=far([0.3, 0.31, 0.3, 0.29]))
    assert finding.text == (
        "Far context does harm: with all 4K tokens before them read, the same tokens cost 0.30 nats more [0.29, 0.31] "
        "than with the last 256 alone."
    )
    assert found_in(base, more=far([-0.3, -0.31, -0.3, -0.29])) == []
    assert found_in(base, more=far([0.3, -0.31, 0.3, -0.29])) == []


def test_heads_that_spread_are_companions():
    def channel(length, n):
        row = {"kind": "channel", "layer": 6, "head": 0, "length": length, "n_eff": n}
        return row | {"values": {"n_eff": [n * 0.9, n, n * 1.1, n]}}

    told = found_in(rows_of(UNCHANGED, (2.0, 2.4)), more=[channel(256, 29.0), channel(4096, 887.0)])
    assert told[-1].text == (
        "Beside it: layer 6 head 0 spreads its weight over ever more keys: 887 keys at 4K tokens, 29 at 256."
    )
    assert told[-1].effect == pytest.approx(math.log2(887 / 29))


def test_companions_are_told_only_beside_a_failure():
    def channel(length, null):
        row = {"kind": "channel", "layer": 6, "head": 1, "length": length, "null_mass": null}
        return row | {"values": {"null_mass": [null - 0.01, null, null + 0.01, null]}}

    more = [channel(256, 0.2), channel(4096, 0.9)]
    assert found_in(rows_of(UNCHANGED, (2.0, 2.0)), more=more) == []
    told = found_in(rows_of(UNCHANGED, (2.0, 2.4)), more=more)
    assert told[-1].text == (
        "Beside it: at 4K tokens layer 6 head 1 gives 90% of its weight to the null sink (20% at 256)."
    )
    assert len(told) == 2


def test_an_interval_of_many_is_wider_and_of_one_is_students():
    values = [0.1, 0.3, 0.2, 0.6]
    alone, many = estimate(values), estimate(values, 10)
    plain = mean_interval(values)
    assert (alone.value, alone.low, alone.high) == pytest.approx((plain.value, plain.t_low, plain.t_high))
    assert many.low < alone.low and many.high > alone.high
    # t with 3 degrees and 99.5% in the middle is 7.453 (tables); half-width = t s / sqrt(n)
    assert many.high - many.value == pytest.approx(7.4533 * np.std(values, ddof=1) / 2, rel=1e-4)


SOURCES = ("argparse", "typing", "inspect", "tarfile", "zipfile", "smtplib")


@pytest.fixture(scope="module")
def read_by_nano():
    """nano, four documents of Python's standard library, and a plan of caps alone."""
    loaded = load("nano")
    text = "".join(Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")[:9000] for name in SOURCES)
    documents = documents_of_text(loaded.tokenizer, text, 2048, 4)
    assert len(documents.tokens) == 4
    return loaded, documents, Plan(lengths=(256, 2048), mask="none", stress=0, records=1)


def test_a_healthy_model_is_not_blamed(read_by_nano):
    loaded, documents, plan = read_by_nano
    assert [one for one in diagnose(loaded, documents, plan).findings if one.rule in ("cap", "mask")] == []


def test_a_head_made_to_hold_three_million_tokens_is_found_and_its_cap_measured(read_by_nano):
    loaded, documents, _ = read_by_nano
    memory, gamma = forgetting(loaded.model)[6], 2 ** (-1 / 3.07e6)
    weights = {name: x.clone() for name, x in memory.state_dict().items()}
    bound, memory.max_half_life = memory.max_half_life, math.inf
    try:
        with torch.no_grad():
            memory.decay_proj.weight[0] = 0
            memory.decay_proj.bias[0] = math.log(gamma / (1 - gamma)) - memory.decay_bias
        plan = Plan(lengths=(256, 2048), mask="none", stress=0, records=1, cap_half_life=16, heads="worst1")
        diagnosis = diagnose(loaded, documents, plan)
    finally:
        memory.max_half_life = bound
        memory.load_state_dict(weights)
    [finding] = [one for one in diagnosis.findings if one.rule in ("cap", "mask")]
    assert finding.text.startswith("Layer 6 head 0 holds 3.07M tokens (its median half-life). Capping it at 16 lowers")
    by_kind = {(row["change"], row["length"]): row for row in diagnosis.rows if row["kind"] == "loss"}
    capped, plain = (by_kind[name, 2048]["loss"] for name in ("head 6.0 capped at 16", UNCHANGED))
    assert finding.effect == pytest.approx(capped - plain) and finding.high < 0
