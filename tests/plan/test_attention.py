"""What the plan says about attention: the choice, its crossover, what it costs, and wishes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from dseek.core.attention_pattern import DENSE, WINDOWS, AttentionPattern, top_level
from dseek.core.errors import ConfigError, MemoryLimitError
from dseek.core.shape import ModelShape
from dseek.plan import Objective, Plan, cost, make
from dseek.plan.attention_loss import ERRORS_ADDED, MARGIN, MEASURED, SENSITIVITY, attention_loss, layer_losses
from dseek.plan.attention_wish import AttentionWish, pattern_text, patterns_text
from dseek.plan.chooser import TIE
from dseek.plan.explain import Alternative, Choice, loss_text
from dseek.plan.formats import VARIANTS
from dseek.plan.selection import pyramid_page_bytes, scored_cells, seen_tokens, skipped_share
from tests.plan.machines import SMALL, layout_of, machine, shape_of

LONG = shape_of(max_position_embeddings=131072)
BF16 = {"BF16": LONG.num_parameters()}
WINDOW = AttentionPattern(kind="window", window_tokens=(512,))
DYNAMIC = AttentionPattern(kind="dynamic", window_tokens=(256,), top_blocks=8)
FAR = dataclasses.replace(DYNAMIC, far=True)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DSEEK_PRECISION_MODE", "DSEEK_NUM_THREADS", "DSEEK_KERNELS"):
        monkeypatch.delenv(name, raising=False)


def planned(
    context: int, accepted: float, shape: ModelShape = LONG, wish: AttentionWish | None = None, **wishes: object
) -> Plan:
    objective = Objective(context_tokens=context, batch=1, max_quality_loss=accepted)
    return make(shape, machine(), objective, encodings=BF16, precision="bf16", attention=wish, **wishes)  # type: ignore[arg-type]


def choice(plan: Plan) -> Choice:
    return next(entry for entry in plan.choices if entry.name == "attention")


def taken(plan: Plan) -> Alternative:
    return next(entry for entry in choice(plan).alternatives if not entry.rejected)


def seconds(plan: Plan, entry: Alternative) -> float:
    prompt, answer = plan.objective.request(plan.context_tokens)
    return prompt / entry.prefill_tokens_s + answer / entry.decode_tokens_s


def test_dense_below_the_crossover_and_a_pattern_above_it() -> None:
    for context in (128, 512):
        short = planned(context, 10.0)
        assert set(short.attention_patterns) == {DENSE}
        assert [entry.value for entry in choice(short).alternatives] == ["dense"]
    middling = planned(1024, 10.0)
    assert choice(middling).alternatives[0].value == "dense"
    long = planned(32768, 10.0)
    assert DENSE not in long.attention_patterns
    dense = choice(long).alternatives[0]
    assert (dense.value, choice(long).chosen) == ("dense", patterns_text(long.attention_patterns))
    assert seconds(long, dense) > 2 * seconds(long, taken(long))
    assert "times as long" in dense.rejected


@pytest.mark.parametrize("context", [1024, 2048, 4096, 8192, 32768, 131072])
@pytest.mark.parametrize("accepted", [0.0, 0.005, 0.05, 0.5])
def test_no_pattern_without_need_or_beyond_the_accepted_loss(context: int, accepted: float) -> None:
    plan = planned(context, accepted)
    dense, chosen = choice(plan).alternatives[0], taken(plan)
    assert dense.value == "dense"
    if chosen is not dense:
        assert chosen.quality_loss <= accepted + 1e-9
        assert seconds(plan, dense) > TIE * seconds(plan, chosen)
        assert chosen.peak_bytes > dense.peak_bytes
    for entry in choice(plan).alternatives:
        if entry.quality_loss > max(accepted, dense.quality_loss) + 1e-9:
            assert "of quality" in entry.rejected
    if accepted == 0.0:
        assert set(plan.attention_patterns) == {DENSE}


def test_the_layers_that_lose_most_stay_dense() -> None:
    accepted = 0.1
    plan = planned(32768, accepted)
    sparse = [layer for layer, pattern in enumerate(plan.attention_patterns) if pattern != DENSE]
    assert 0 < len(sparse) < LONG.num_layers
    pattern = plan.attention_patterns[sparse[0]]
    losses = layer_losses(LONG, [pattern] * LONG.num_layers, plan.context_tokens)
    dense = [loss for layer, loss in enumerate(losses) if layer not in sparse]
    assert max(losses[layer] for layer in sparse) <= min(dense) + 1e-12
    # One more would be too much.
    left = accepted - taken(plan).quality_loss
    assert 0 <= left < min(dense)
    assert f"in {len(sparse)}" in choice(plan).chosen


def test_the_models_own_windows_stay() -> None:
    some = shape_of(max_position_embeddings=131072, sliding_window=512, window_layers=(True, False) * 15)
    plan = planned(65536, 10.0, some)
    assert plan.attention_patterns[::2] == (DENSE,) * 15
    assert DENSE not in plan.attention_patterns[1::2]


def test_a_plan_with_patterns_goes_there_and_back() -> None:
    plan = planned(8192, 0.005)
    heads = AttentionPattern(kind="dynamic", window_tokens=(64, 4096, 256), top_blocks=9, far=True)
    other = dataclasses.replace(plan, attention_patterns=(heads, WINDOW, *plan.attention_patterns[2:]))
    assert Plan.from_json(other.to_json()) == other
    jobs = {"prompt_tokens": 8192, "context_tokens": 8192, "batch": 1}
    assert other.predict(machine(), **jobs).prefill_tokens_s > plan.predict(machine(), **jobs).prefill_tokens_s


def test_wishes_are_granted_whatever_they_lose() -> None:
    for context in (256, 8192):
        for kind in ("dense", "window", "dynamic"):
            plan = planned(context, 0.0, wish=AttentionWish(kind=kind))
            assert {pattern.kind for pattern in plan.attention_patterns} == {kind}
    plan = planned(8192, 0.0, wish=AttentionWish(window_tokens=128))
    assert set(plan.attention_patterns) == {AttentionPattern(kind="window", window_tokens=(128,))}
    plan = planned(8192, 0.0, wish=AttentionWish(top_blocks=5, far=True))
    expected = AttentionPattern(kind="dynamic", window_tokens=(256,), top_blocks=5, far=True)
    assert set(plan.attention_patterns) == {expected}
    # Within what is accepted the wish for a kind leaves the search its choice.
    by_loss = [planned(8192, accepted, wish=AttentionWish(kind="window")) for accepted in (0.0, 0.03, 0.5)]
    windows = [plan.attention_patterns[0].window_tokens[0] for plan in by_loss]
    assert windows == sorted(windows, reverse=True)
    assert windows[0] > windows[-1]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"kind": "sparse"}, "one of auto, dense, window, dynamic"),
        ({"kind": "dense", "window_tokens": 64}, "dense attention with a wish about the window"),
        ({"kind": "window", "top_blocks": 4}, "about selected blocks"),
        ({"kind": "dense", "far": False}, "about selected blocks"),
        ({"window_tokens": 100}, "one of 64, 128"),
        ({"window_tokens": "automatic"}, "auto, or 64, 128"),
        ({"kind": "dense", "window_tokens": "auto"}, "dense attention with a wish about the window"),
        ({"top_blocks": 10**6}, "1 to 4096"),
        ({"top_blocks": 0}, "1 to 4096"),
    ],
)
def test_bad_wishes(wish: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttentionWish(**wish)  # type: ignore[arg-type]


def test_torch_kernels_are_dense() -> None:
    both = machine(with_torch=True)
    job = Objective(context_tokens=8192, batch=1, max_quality_loss=10.0)
    plan = make(SMALL, both, job, encodings=BF16, kernels="torch")
    assert set(plan.attention_patterns) == {DENSE}
    with pytest.raises(ConfigError, match="torch kernels do not compute"):
        make(SMALL, both, job, encodings=BF16, kernels="torch", attention=AttentionWish(kind="window"))
    # Where PyTorch is only the alternative it is shown for what it can run.
    told = make(SMALL, both, job, encodings=BF16, precision="bf16", attention=AttentionWish(kind="window"))
    assert told.choices[0].name == "kernels"
    assert "dense attention" in told.choices[0].alternatives[1].rejected


def test_a_plan_is_checked_against_wishes() -> None:
    mixed = (DENSE, DYNAMIC)
    for wish in ({}, {"kind": "auto"}, {"kind": "dynamic"}, {"top_blocks": 8}, {"top_blocks": 8, "window_tokens": 256}):
        AttentionWish(**wish).check_against(mixed, 3)  # type: ignore[arg-type]
    for wish in ({"kind": "dense"}, {"kind": "window"}, {"top_blocks": 9}, {"far": True}, {"window_tokens": 256}):
        with pytest.raises(ConfigError, match="contradicts the plan, which says"):
            AttentionWish(**wish).check_against(mixed, 3)  # type: ignore[arg-type]
    AttentionWish(kind="dense").check_against((DENSE, DENSE), 3)
    with pytest.raises(ConfigError, match="says dense"):
        AttentionWish(kind="window").check_against((DENSE, DENSE), 3)


def test_memory_of_the_pyramid_by_hand() -> None:
    layout = layout_of(SMALL, VARIANTS[1], "bf16")
    jobs = {"prompt_tokens": 4096, "context_tokens": 4096, "batch": 1}
    dense = cost.predict(SMALL, machine(), layout, **jobs).cache_bytes
    rows = dataclasses.replace(DYNAMIC, top_blocks=15, min_share=0.02)
    gated = dataclasses.replace(rows, gate=True, dense_heads=(1,))
    gate = (4 * 64 + 32) * 4  # statistics of 64 elements, the mean once more, and a key of the gate
    for pattern, beside, strips in (
        (WINDOW, 64, 0),
        (DYNAMIC, 64, 0),
        (dataclasses.replace(DYNAMIC, top_blocks=16), 128, 0),
        (rows, 64, 4 * 16 * 4),  # four strips of a block, of one level
        (gated, 64 + gate, 4 * 16 * 4),
    ):
        some = dataclasses.replace(layout, attention_patterns=(pattern, *layout.attention_patterns[1:]))
        # 128 pages, 30 layers, 3 heads, 3 levels; mean key and value of 64 floats.
        expected = 128 * 30 * 3 * (3 * (2 * 64 * 4 + beside) + strips)
        assert cost.predict(SMALL, machine(), some, **jobs).cache_bytes - dense == expected
    long = pyramid_page_bytes(SMALL, [DYNAMIC] * 30, 4096)
    assert long == 30 * 3 * 4 * (512 + 64)
    assert pyramid_page_bytes(SMALL, [DENSE] * 30, 4096) == 0
    limit = 100_000_000 + cost.predict(SMALL, machine(), layout, **jobs).peak_bytes
    objective = Objective(context_tokens=8192, batch=1, memory_limit_bytes=limit)
    wish = AttentionWish(kind="dynamic", top_blocks=4096)
    with pytest.raises(MemoryLimitError):
        make(SMALL, machine(), objective, encodings=BF16, precision="bf16", attention=wish)


def test_cost_follows_what_is_seen() -> None:
    layout = layout_of(LONG, VARIANTS[1], "bf16")
    layout = dataclasses.replace(layout, num_pages=1024)
    jobs = {"prompt_tokens": 32768, "context_tokens": 32768, "batch": 1}

    def rates(pattern: AttentionPattern) -> cost.Prediction:
        return cost.predict(
            LONG, machine(), dataclasses.replace(layout, attention_patterns=(pattern,) * LONG.num_layers), **jobs
        )

    ordered = [rates(AttentionPattern(kind="window", window_tokens=(window,))) for window in WINDOWS]
    ordered.append(rates(DENSE))
    for less, more in itertools.pairwise(ordered):
        assert less.prefill_tokens_s > more.prefill_tokens_s
        assert less.decode_tokens_s > more.decode_tokens_s
    few, many = (rates(dataclasses.replace(DYNAMIC, top_blocks=count)) for count in (4, 64))
    assert few.prefill_tokens_s > many.prefill_tokens_s
    assert few.decode_tokens_s > many.decode_tokens_s
    # Choosing costs: the same tokens are had for less by a window, and means of the rest are tokens too.
    window = rates(AttentionPattern(kind="window", window_tokens=(512,)))
    far = rates(dataclasses.replace(FAR, top_blocks=4))
    assert window.prefill_tokens_s > few.prefill_tokens_s > far.prefill_tokens_s


def test_enough_blocks_cost_no_less_than_dense_attention() -> None:
    enough = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=4096)
    layout = layout_of(LONG, VARIANTS[1], "bf16")
    jobs = {"prompt_tokens": 8192, "context_tokens": 8192, "batch": 1}
    dense = cost.predict(LONG, machine(), layout, **jobs)
    all_of_it = dataclasses.replace(layout, attention_patterns=(enough,) * LONG.num_layers)
    found = cost.predict(LONG, machine(), all_of_it, **jobs)
    assert 0.9 * dense.prefill_tokens_s < found.prefill_tokens_s <= 1.001 * dense.prefill_tokens_s
    assert 0.9 * dense.decode_tokens_s < found.decode_tokens_s <= 1.001 * dense.decode_tokens_s


@pytest.mark.parametrize("pattern", [DENSE, WINDOW, DYNAMIC])
def test_seen_tokens_one_by_one(pattern: AttentionPattern) -> None:
    for begin, end in ((0, 1), (0, 64), (5, 700), (1000, 3001)):
        one_by_one = [pattern.visible_tokens(position + 1, 3) for position in range(begin, end)]
        assert seen_tokens(pattern, begin, end, 3) == pytest.approx(sum(one_by_one) / (end - begin))
        earlier = [position + 1 for position in range(begin, end)]
        share = 1 - sum(one_by_one) / sum(earlier)
        assert skipped_share(pattern, end, 3, first_token=begin) == pytest.approx(share, abs=1e-12)


def descent(query_block: int, near: int, top_blocks: int, top: int, generator: random.Random) -> int:
    """Walk the cells of a query block, opening at random; gives how many were scored."""
    near_from, opened, tiled, met = max(0, query_block - near), [], 0, 0
    for level in range(top, -1, -1):
        size, cells = 8**level, [parent * 8 + child for parent in opened for child in range(8)]
        while tiled + size <= query_block:
            cells.append(tiled // size)
            tiled += size
        cells = [cell for cell in cells if cell * size < near_from and not (level == 0 and cell == 0)]
        forced = [cell for cell in cells if cell == 0 or (cell + 1) * size > near_from]
        free = [cell for cell in cells if cell not in forced]
        met += len(free)
        opened = forced + generator.sample(free, min(top_blocks, len(free)))
    return met


def test_scored_cells_bound_the_descent() -> None:
    generator = random.Random(0)
    for _ in range(300):
        query_block, window = generator.randint(0, 4000), generator.choice(WINDOWS)
        pattern = AttentionPattern(kind="dynamic", window_tokens=(window,), top_blocks=generator.randint(1, 40))
        top = top_level(query_block * 64)
        met = descent(query_block, window // 64, pattern.top_blocks, top, generator)
        bound = scored_cells(pattern, query_block * 64, top)
        assert met <= bound
    assert scored_cells(WINDOW, 10**6, 3) == 0


def test_the_loss_is_that_of_the_measured_points() -> None:
    heads, first = SMALL.num_kv_heads, 2192
    for pattern in (WINDOW, DYNAMIC, FAR):
        share = skipped_share(pattern, 8192, heads, first_token=first)
        point, rise, error = min(MEASURED[pattern.kind, pattern.far], key=lambda entry: abs(entry[0] - share))
        assert point == pytest.approx(share, abs=1e-3)
        expected = MARGIN * (math.exp(rise + ERRORS_ADDED * error) - 1)
        assert attention_loss(SMALL, [pattern] * 30, 8192) == pytest.approx(expected, rel=0.02)
        longer = [attention_loss(LONG, [pattern] * 30, context) for context in (512, 2048, 8192, 32768, 131072)]
        assert longer == sorted(longer)
        assert longer[-1] > 2 * longer[2]
    assert attention_loss(SMALL, [DENSE] * 30, 8192) == 0.0
    # Parts are charged with what they lose alone, which is more than their share, but never more than all of it.
    whole = attention_loss(SMALL, [WINDOW] * 30, 8192)
    sixths = [
        attention_loss(SMALL, [WINDOW if 5 * part <= layer < 5 * part + 5 else DENSE for layer in range(30)], 8192)
        for part in range(6)
    ]
    assert max(sixths) < whole < sum(sixths)
    assert sixths == pytest.approx([whole * factor / 6 for factor in SENSITIVITY["window"]])
    assert attention_loss(SMALL, [WINDOW] * 29 + [DENSE], 8192) <= whole


def test_names() -> None:
    assert [loss_text(loss) for loss in (0.0, 0.0049, 0.1, 1.07, 12.0)] == ["0 %", "0.49 %", "10 %", "107 %", "1200 %"]
    assert pattern_text(DENSE) == "dense"
    assert pattern_text(WINDOW) == "window 512"
    assert pattern_text(FAR) == "window 256 and 8 blocks, means of the rest"
    assert pattern_text(dataclasses.replace(WINDOW, window_tokens=(64, 512))) == "windows 64 to 512"
    assert patterns_text((DENSE, WINDOW, WINDOW)) == "window 512 in 2 of 3 layers, dense in 1"
