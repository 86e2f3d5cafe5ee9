"""The learning rate of each step: the schedules of transformers, under its names."""

from __future__ import annotations

import math

from dseek.train.config import TrainConfig


def warm_up(config: TrainConfig, num_steps: int) -> int:
    """Count the steps over which the rate rises.

    Args:
        config: `warmup_steps`, or else `warmup_ratio`.
        num_steps: of the whole training.
    """
    return config.warmup_steps or math.ceil(config.warmup_ratio * num_steps)


def learning_rate(config: TrainConfig, step_idx: int, num_steps: int) -> float:
    """Give the rate of a step.

    Args:
        config: the schedule.
        step_idx: steps that are done.
        num_steps: of the whole training.

    Source: transformers, `optimization.py` (`get_linear_schedule_with_warmup` and its siblings); for the last one, Hu
        et al. 2024, MiniCPM, section 4.3.
    """
    rise = warm_up(config, num_steps)
    kind, options = config.lr_scheduler_type, config.lr_scheduler_kwargs
    if kind == "constant":
        return config.learning_rate
    least = options.min_lr_ratio if kind in ("cosine", "warmup_stable_decay") else 0.0
    if step_idx < rise:
        first = least if kind == "warmup_stable_decay" else 0.0
        return config.learning_rate * (first + (1.0 - first) * step_idx / rise)
    if kind == "constant_with_warmup":
        share = 1.0
    elif kind == "warmup_stable_decay":
        fall = options.num_decay_steps if options.num_decay_steps is not None else math.ceil(num_steps / 10)
        done = (step_idx - (num_steps - fall)) / max(1, fall)
        share = 1.0 if done < 0 else least + (1.0 - least) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, done)))
    else:
        done = min(1.0, (step_idx - rise) / max(1, num_steps - rise))
        share = 1.0 - done if kind == "linear" else least + (1.0 - least) * (0.5 + 0.5 * math.cos(math.pi * done))
    return config.learning_rate * share
