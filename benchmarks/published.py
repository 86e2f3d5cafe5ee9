"""Published sizes of models, with their sources, for `tests/plan/test_what_if.py` and the row `plan-what-if`.

Parameters: the model cards (Llama 2 and 3.1: the number of elements in the weight files; Qwen3: "Number of Parameters";
DeepSeek-V3: technical report, section 4.2; GPT-3: Brown et al. 2020, table D.1). Active parameters: DeepSeek-V3's
README_WEIGHTS.md (36.6B, head included); Qwen3: model cards.
Operations of training: Zhao et al. 2025, "Insights into DeepSeek-V3", table 2 (4096 tokens); GPT-3: table D.1.
"""

from __future__ import annotations

PARAMETERS: dict[str, float] = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen3-0.6b": 0.6e9,
    "qwen3-1.7b": 1.7e9,
    "qwen3-4b": 4.0e9,
    "qwen3-8b": 8.2e9,
    "qwen3-14b": 14.8e9,
    "qwen3-32b": 32.8e9,
    "qwen3-30b-a3b": 30.5e9,
    "qwen3-235b-a22b": 235e9,
    "deepseek-v3": 671e9,
    "gpt3-175b": 174.6e9,
}

ACTIVE: dict[str, tuple[float, bool]] = {
    "deepseek-v3": (36.6e9, False),
    "qwen3-30b-a3b": (3.3e9, True),
    "qwen3-235b-a22b": (22e9, True),
}
"""Parameters that a token passes, and whether the figure counts the embedding, which is a look-up."""

TRAINING_FLOPS: dict[str, tuple[int, float]] = {
    "deepseek-v3": (4096, 250e9),
    "llama-3.1-405b": (4096, 2448e9),
    "gpt3-175b": (2048, 3.14e23 / 300e9),
}
"""Length of the sequences, and operations a token."""
