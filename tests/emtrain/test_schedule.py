import math

import pytest

from emtrain.schedule import build, half_cosine, join, linear_warmup, trace
from emtrain.spec import ScheduleSpec


def test_warmup_starts_at_zero_and_reaches_the_peak_at_its_length() -> None:
    """Update 0 of a warm-up of 4 steps has multiplier 0 and update 4 has 1, as in transformers."""
    assert trace(linear_warmup(4), 6) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_no_warmup_is_the_final_value_from_the_first_update() -> None:
    assert trace(linear_warmup(0, to=0.5), 2) == [0.5, 0.5]


def test_half_cosine_ends_at_zero_and_stays() -> None:
    assert [half_cosine(x) for x in (0.0, 1.0, 1.5)] == [1.0, 0.0, 0.0]
    assert half_cosine(1 / 3) == pytest.approx(0.75)  # cos 60° = 1/2


def test_join_hands_each_schedule_its_own_step_zero() -> None:
    joined = join([lambda step: 10.0 + step, lambda step: 20.0 + step, lambda step: 30.0 + step], boundaries=[2, 3])
    assert trace(joined, 6) == [10, 11, 20, 30, 31, 32]


def test_join_skips_a_schedule_without_steps() -> None:
    joined = join([lambda step: 1.0, lambda step: 2.0, lambda step: 3.0], boundaries=[1, 1])
    assert trace(joined, 3) == [1, 3, 3]


@pytest.mark.parametrize("boundaries", [[], [1, 2], [-1]])
def test_join_refuses_boundaries_that_do_not_fit(boundaries: list[int]) -> None:
    with pytest.raises(ValueError, match="boundaries"):
        join([lambda step: 1.0, lambda step: 1.0], boundaries=boundaries)


def test_build_gives_the_schedule_the_steps_after_the_warmup() -> None:
    """Linear over the 4 steps that 2 of warm-up leave of 6: 1, 3/4, 2/4, 1/4."""
    schedule = build(ScheduleSpec(name="linear", warmup_steps=2), 6)
    assert trace(schedule, 6) == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]


def test_warmup_rises_to_where_the_schedule_starts() -> None:
    """A triangle that starts at 0.2 is warmed up to 0.2, without a jump to the peak and back."""
    schedule = build(ScheduleSpec(name="cyclic_triangular", warmup_steps=2, cycles=1, min_ratio=0.2), 6)
    assert trace(schedule, 6) == pytest.approx([0.0, 0.1, 0.2, 0.6, 1.0, 0.6])


def test_inverse_sqrt_has_its_peak_at_the_end_of_any_warmup() -> None:
    for warmup_steps in (0, 1, 5, 50):
        schedule = build(ScheduleSpec(name="inverse_sqrt", warmup_steps=warmup_steps), 60)
        assert max(trace(schedule, 60)) == schedule(warmup_steps) == 1.0


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(5, 5), (80, 60), (0, 0)])
def test_a_warmup_that_leaves_no_step_is_an_error_with_both_numbers(warmup_steps: int, total_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"schedule\.warmup_steps is {warmup_steps} .* {total_steps} steps"):
        build(ScheduleSpec(name="linear", warmup_steps=warmup_steps), total_steps)


def test_the_longest_warmup_leaves_one_update_at_the_peak() -> None:
    assert trace(build(ScheduleSpec(name="cosine", warmup_steps=2), 3), 3) == [0.0, 0.5, 1.0]


def test_a_schedule_serves_lambda_lr_to_the_end_of_the_run() -> None:
    """LambdaLR also asks for the step after the last update; the updates see exactly the trace."""
    import torch

    schedule = build(ScheduleSpec(name="rewarm", warmup_steps=3), 20)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    used = []
    for _ in range(20):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert used == [0.5 * multiplier for multiplier in trace(schedule, 20)]
    assert math.isfinite(optimizer.param_groups[0]["lr"])
