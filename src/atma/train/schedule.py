"""How the learning rate moves over a run: up, level, down to zero. A pure function of the step."""

from atma.config import TrainConfig


def rate_multiplier(step: int, train: TrainConfig) -> float:
    """Factor in [0, 1] on every learning rate for the 0-based `step`. Source: maths.md, section 6.

    Rises linearly over `warmup_share` of the steps (step 0 already moves), stays 1 until `constant_share`, then falls
    linearly and reaches 0 just past the last step, so that no step is spent without moving.
    """
    steps = train.steps
    warm, level = train.warmup_share * steps, train.constant_share * steps
    if step + 1 < warm:
        return (step + 1) / warm
    if step < level:
        return 1.0
    return max(0.0, (steps - step) / max(steps - level, 1.0))
