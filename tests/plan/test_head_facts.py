"""Plans with what is known of a model's heads: windows of their own, heads that stay dense, a trained gate."""

from __future__ import annotations

import dataclasses
import math

import pytest

from dseek.core.attention_pattern import DENSE, EVERY_BLOCK, AttentionPattern
from dseek.core.errors import ConfigError
from dseek.core.shape import ModelShape
from dseek.plan import Objective, Plan, cost, make
from dseek.plan.attention_loss import ERRORS_ADDED, MARGIN, MEASURED, attention_loss, layer_losses
from dseek.plan.attention_wish import AttentionWish, dense_heads_text, patterns_text
from dseek.plan.formats import VARIANTS
from dseek.plan.head_facts import HeadFacts
from dseek.plan.selection import seen_tokens, skipped_share
from tests.plan.machines import SMALL, layout_of, machine, shape_of

BF16 = {"BF16": SMALL.num_parameters()}
ROWS = AttentionPattern(kind="dynamic", window_tokens=(64,), top_blocks=64, min_share=0.02)
WINDOWS = ((64, 128, 4096), (256, 512, 64), *((128, 128, 128),) * 28)
DENSE_HEADS = (*((),) * 7, (2,), *((),) * 10, (0, 1), *((),) * 11)
FACTS = HeadFacts(gate=True, dense_heads=DENSE_HEADS, windows=WINDOWS)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DSEEK_PRECISION_MODE", "DSEEK_NUM_THREADS", "DSEEK_KERNELS"):
        monkeypatch.delenv(name, raising=False)


def planned(wish: AttentionWish, heads: HeadFacts = FACTS, shape: ModelShape = SMALL, accepted: float = 0.0) -> Plan:
    objective = Objective(context_tokens=8192, batch=1, max_quality_loss=accepted)
    return make(shape, machine(), objective, encodings=BF16, precision="bf16", attention=wish, heads=heads)


def test_every_head_has_its_window_in_the_plan_and_in_its_file() -> None:
    for kind in ("window", "dynamic"):
        plan = planned(AttentionWish(kind=kind, window_tokens="auto"))
        assert {pattern.kind for pattern in plan.attention_patterns} == {kind}
        assert tuple(pattern.window_tokens for pattern in plan.attention_patterns) == WINDOWS
        again = Plan.from_json(plan.to_json())
        assert again == plan
        AttentionWish(window_tokens="auto", kind=kind).check_against(again.attention_patterns, 3)
    one = planned(AttentionWish(window_tokens=128)).attention_patterns
    with pytest.raises(ConfigError, match="says window 128"):
        AttentionWish(window_tokens="auto").check_against(one, 3)
    with pytest.raises(ConfigError, match=r"windows 64 to 4096 \(.* in the mean\) and shares"):
        AttentionWish(kind="dynamic", window_tokens=128).check_against(plan.attention_patterns, 3)
    with pytest.raises(ConfigError, match="heads were not measured"):
        planned(AttentionWish(window_tokens="auto"), HeadFacts())


def test_the_models_own_windows_stay_beside_those_of_heads() -> None:
    some = shape_of(sliding_window=512, window_layers=(True, False) * 15)
    patterns = planned(AttentionWish(window_tokens="auto"), shape=some).attention_patterns
    assert patterns[::2] == (DENSE,) * 15
    assert tuple(pattern.window_tokens for pattern in patterns[1::2]) == WINDOWS[1::2]


def test_a_selection_by_rows_follows_the_gate_there_is() -> None:
    wish = AttentionWish(kind="dynamic", min_share=0.02)
    plan = planned(wish)
    assert {pattern.gate for pattern in plan.attention_patterns} == {True}
    assert tuple(pattern.dense_heads for pattern in plan.attention_patterns) == DENSE_HEADS
    told = next(choice for choice in plan.choices if choice.name == "attention")
    assert told.why.endswith("; 3 of 90 key-value heads stay dense (retrieval heads found by training)")
    # Without a gate, and by numbers of blocks, no head is spared.
    for other in (planned(wish, HeadFacts()), planned(AttentionWish(kind="dynamic", top_blocks=8))):
        assert {(pattern.gate, pattern.dense_heads) for pattern in other.attention_patterns} == {(False, ())}
        assert not dense_heads_text(other.attention_patterns, 3)
    with_gate, without = (
        next(entry for entry in made.choices if entry.name == "attention").alternatives[0].quality_loss
        for made in (plan, planned(wish, HeadFacts()))
    )
    assert with_gate < without


def test_dense_heads_see_everything() -> None:
    one = dataclasses.replace(ROWS, dense_heads=(1,))
    assert one.near_blocks(3) == (1, EVERY_BLOCK, 1)
    opened = ROWS.visible_tokens(8192, 3)
    assert one.visible_tokens(8192, 3) == pytest.approx((2 * opened + 8192) / 3)
    assert dataclasses.replace(ROWS, dense_heads=(0, 1, 2)).visible_tokens(8192, 3) == 8192
    assert skipped_share(one, 8192, 3) == pytest.approx(2 / 3 * skipped_share(ROWS, 8192, 3))
    assert seen_tokens(one, 0, 64, 3) == seen_tokens(DENSE, 0, 64, 3)
    layout = layout_of(SMALL, VARIANTS[1], "bf16")
    rates = [
        cost.predict(
            SMALL,
            machine(),
            dataclasses.replace(layout, attention_patterns=(pattern,) * 30),
            prompt_tokens=8192,
            context_tokens=8192,
            batch=1,
        )
        for pattern in (ROWS, one, DENSE)
    ]
    assert rates[0].decode_tokens_s > rates[1].decode_tokens_s > rates[2].decode_tokens_s
    assert rates[0].prefill_tokens_s > rates[1].prefill_tokens_s


def test_the_loss_of_windows_by_head_is_that_of_their_mean_share() -> None:
    window = AttentionPattern(kind="window", window_tokens=(512,))
    # Layers with other windows that leave out the same pairs in the mean lose the same, and no cap is taken twice.
    by_head = [dataclasses.replace(window, window_tokens=(512, 512, 512))] * 30
    assert attention_loss(SMALL, by_head, 8192) == pytest.approx(attention_loss(SMALL, [window] * 30, 8192))
    narrow, wide = (dataclasses.replace(window, window_tokens=(tokens,)) for tokens in (64, 1024))
    mixed = [narrow, wide] * 15
    mean = sum(skipped_share(pattern, 8192, 3, first_token=2192) for pattern in (narrow, wide)) / 2
    low, high = (attention_loss(SMALL, [pattern] * 30, 8192) for pattern in (wide, narrow))
    assert low < attention_loss(SMALL, mixed, 8192) < high
    between = [
        attention_loss(SMALL, [dataclasses.replace(window, window_tokens=(tokens,))] * 30, 8192)
        for tokens in (512, 1024)
        if skipped_share(dataclasses.replace(window, window_tokens=(tokens,)), 8192, 3, first_token=2192) <= mean
    ]
    assert attention_loss(SMALL, mixed, 8192) >= max(between)
    assert layer_losses(SMALL, [DENSE] * 30, 8192) == [0.0] * 30


def test_the_loss_of_selection_by_rows_is_that_of_the_measured_points() -> None:
    dense_heads = {7: (2,), 17: (1,), 18: (2,), 20: (1, 2)}  # those of the gate it was measured with
    for share, place in ((0.1, 4), (0.05, 3), (0.03, 2), (0.02, 1), (0.01, 0)):
        for gate in (True, False):
            pattern = dataclasses.replace(ROWS, min_share=share, gate=gate)
            patterns = [
                dataclasses.replace(pattern, dense_heads=dense_heads.get(layer, ()) if gate else ())
                for layer in range(30)
            ]
            skipped = sum(skipped_share(some, 8192, 3, first_token=2192) for some in patterns) / 30
            point, rise, error = MEASURED["rows", gate][place]
            assert point == pytest.approx(skipped, abs=1e-3)
            expected = MARGIN * (math.exp(rise + ERRORS_ADDED * error) - 1)
            assert attention_loss(SMALL, patterns, 8192) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "values",
    [
        {"gate": True, "min_share": 0.0},
        {"dense_heads": (0,), "min_share": 0.0},
        {"dense_heads": (1, 0)},
        {"dense_heads": (1, 1)},
        {"dense_heads": (-1,)},
        {"share_factors": (1.0, 2.0, 0.5)},
        {"gate": True, "share_factors": (1.0, 0.0, 0.5)},
        {"gate": True, "share_factors": (1.0, 2000.0, 0.5)},
    ],
)
def test_bad_patterns(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(ROWS, **values)  # type: ignore[arg-type]


def test_a_plan_file_with_a_head_that_there_is_not_is_refused() -> None:
    plan = planned(AttentionWish(kind="dynamic", min_share=0.02))
    text = plan.to_json()
    beyond = dataclasses.replace(plan, attention_patterns=(dataclasses.replace(ROWS, dense_heads=(3,)),) * 30)
    with pytest.raises(ConfigError, match=r"attention_patterns\[0\] has a dense head 3"):
        Plan.from_json(beyond.to_json())
    other = dataclasses.replace(ROWS, gate=True, share_factors=(1.0, 2.0))
    with pytest.raises(ConfigError, match=r"attention_patterns\[0\] has 2 factors"):
        Plan.from_json(dataclasses.replace(plan, attention_patterns=(other,) * 30).to_json())
    with pytest.raises(ConfigError, match="plan of version 2"):
        Plan.from_json(text.replace('"version": 3', '"version": 2'))


def test_factors_on_the_least_share() -> None:
    pattern = dataclasses.replace(ROWS, gate=True, share_factors=(0.5, 1.0, 4.0))
    assert pattern.min_shares(3) == (ROWS.min_share * 0.5, ROWS.min_share, ROWS.min_share * 4)
    assert ROWS.min_shares(2) == (ROWS.min_share,) * 2
    with pytest.raises(ConfigError, match="3 factors"):
        pattern.min_shares(2)
    alone = [dataclasses.replace(ROWS, gate=True, min_share=share).expected_blocks for share in pattern.min_shares(3)]
    assert pattern.expected_blocks == pytest.approx(sum(alone) / 3)
    nothing = dataclasses.replace(pattern, share_factors=(1024.0, 1024.0, 1024.0))
    assert nothing.expected_blocks == 0
    dense = dataclasses.replace(pattern, dense_heads=(2,))
    assert dense.expected_blocks == pytest.approx(sum(alone[:2]) / 2)
    facts = HeadFacts(gate=True, dense_heads=((), (1,)), share_factors=((1.0, 1.0, 2.0), (0.5, 1.0, 1.0)))
    fitted = facts.fitted(ROWS, 2, own_windows=False)
    assert [one.share_factors for one in fitted] == [(1.0, 1.0, 2.0), (0.5, 1.0, 1.0)]
    assert patterns_text(fitted) == "window 64 and shares from 0.02, up to 64 blocks"
    assert not any(one.share_factors for one in HeadFacts().fitted(ROWS, 2, own_windows=False))


def test_names_of_windows_by_head() -> None:
    window = AttentionPattern(kind="window", window_tokens=(64, 64, 64))
    other = dataclasses.replace(window, window_tokens=(64, 128, 1024))
    assert patterns_text((window, window)) == "window 64"
    assert patterns_text((window, other)) == "windows 64 to 1024 (235 in the mean)"
    assert patterns_text((window, other, DENSE)) == "windows 64 to 1024 (235 in the mean) in 2 of 3 layers, dense in 1"
    dense_head = dataclasses.replace(ROWS, gate=True, dense_heads=(1,))
    assert (
        patterns_text((dataclasses.replace(ROWS, gate=True), dense_head))
        == "window 64 and shares from 0.02, up to 64 blocks"
    )
    assert dense_heads_text((ROWS, dense_head), 3).startswith("1 of 6 key-value heads stays dense")
