from itertools import pairwise

from atma.config import TrainConfig
from atma.train.schedule import rate_multiplier


def plan(**changes) -> TrainConfig:
    return TrainConfig(length=1, batch_tokens=1, tokens=100, **changes)


def test_the_rate_rises_over_the_warm_up_stays_level_and_falls_to_zero_after_the_last_step():
    train = plan(warmup_share=0.1, constant_share=0.3)
    rates = [rate_multiplier(step, train) for step in range(101)]
    assert rates[:10] == [(step + 1) / 10 for step in range(9)] + [1.0]
    assert rates[10:30] == [1.0] * 20
    falls = [before - after for before, after in pairwise(rates[30:])]
    assert max(abs(fall - 1 / 70) for fall in falls) < 1e-12
    assert rates[100] == 0.0


def test_no_step_is_spent_without_moving():
    for warm in (0.0, 0.02, 1.0):
        for level in (0.0, 0.3, 1.0):
            rates = [rate_multiplier(step, plan(warmup_share=warm, constant_share=level)) for step in range(100)]
            assert min(rates) > 0 and max(rates) <= 1


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert rate_multiplier(0, plan(warmup_share=0.0)) == 1.0


def test_a_run_of_one_step_moves():
    assert rate_multiplier(0, TrainConfig(length=1, batch_tokens=1, tokens=1)) == 1.0
