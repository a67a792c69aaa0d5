"""Every schedule: the contract that all of them keep, values by hand, and the schedulers of transformers and torch."""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emtrain.lookup import lookup, names
from emtrain.schedule import Schedule, build, trace
from emtrain.spec import ScheduleSpec

NAMES = names("emtrain.schedules")
MAKERS: dict[str, Callable[..., Schedule]] = {name: lookup("emtrain.schedules", name) for name in NAMES}

# --- the contract, kept by every file in emtrain/schedules -----------------------------------------------------------


def assert_contract(schedule: Schedule, total_steps: int) -> None:
    """Finite and from 0 to 1 at every update and at ``total_steps``; the same again in another order."""
    steps = range(total_steps + 1)
    values = [schedule(step) for step in steps]
    assert all(math.isfinite(value) and 0 <= value <= 1 for value in values), values
    assert [schedule(step) for step in reversed(steps)] == values[::-1]


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of an argument's type, many of them out of any sensible range."""
    if annotation is int:
        return st.integers(1, 30) | st.integers(-2, 0)
    if annotation is float:
        return st.floats(0, 1) | st.floats(1, 10) | st.floats()
    if get_origin(annotation) is Literal:
        return st.sampled_from([*get_args(annotation), "no-such-choice"])
    pair = st.tuples(st.floats(0, 1), st.floats(0, 1.1))
    return st.lists(pair, max_size=4).map(lambda inner: [(0.0, 1.0), *sorted(inner), (1.0, 0.5)]) | st.lists(
        pair, max_size=3
    )


def assert_names_an_argument(error: ValueError, arguments: dict[str, Any]) -> None:
    assert any(str(error).startswith(f"{name} is {value!r}; it must be ") for name, value in arguments.items())


def keyword_parameters(name: str) -> list[inspect.Parameter]:
    first, *rest = inspect.signature(MAKERS[name]).parameters.values()
    assert first.name == "total_steps"
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in rest)
    return rest


@pytest.mark.parametrize("name", NAMES)
def test_defaults_keep_the_contract_for_every_short_run(name: str) -> None:
    for total_steps in range(1, 40):
        assert_contract(MAKERS[name](total_steps), total_steps)


@pytest.mark.parametrize("name", NAMES)
@given(total_steps=st.integers(1, 400), data=st.data())
def test_any_arguments_keep_the_contract_or_are_refused_by_name(
    name: str, total_steps: int, data: st.DataObject
) -> None:
    """Whatever a search proposes is either a schedule from 0 to 1 or an error that names an argument and its value."""
    arguments = {
        parameter.name: data.draw(values_of(parameter.annotation), label=parameter.name)
        for parameter in keyword_parameters(name)
    }
    try:
        schedule = MAKERS[name](total_steps, **arguments)
    except ValueError as error:
        assert_names_an_argument(error, arguments)
    else:
        assert_contract(schedule, total_steps)


# Two schedules do not promise the peak: at these the top falls between two updates, or before the envelope has shrunk.
PEAK_AT_LEAST = {"one_cycle": 0.999, "cyclic_exp_range_per_step": 0.0}


@pytest.mark.parametrize("name", NAMES)
def test_the_peak_of_a_run_is_the_learning_rate(name: str) -> None:
    for total_steps in (332, 60, 59):
        assert PEAK_AT_LEAST.get(name, 1.0) <= max(trace(MAKERS[name](total_steps), total_steps)) <= 1.0


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_has_a_default_and_the_file_says_what_it_computes(name: str) -> None:
    assert all(parameter.default is not parameter.empty for parameter in keyword_parameters(name))
    assert inspect.getdoc(MAKERS[name])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cosine_restarts", {"cycles": 0}, "cycles is 0; it must be at least 1"),
        ("cosine_to_minimum", {"min_ratio": 1.5}, "min_ratio is 1.5; it must be from 0 to 1"),
        ("sgdr", {"growth": 0.5}, "growth is 0.5; it must be from 1 to 10"),
        ("cyclic_exp_range", {"gamma": math.nan}, "gamma is nan; it must be from 0 to 1"),
        ("wsd", {"decay": "sqrt"}, "decay is 'sqrt'; it must be one of cosine, linear, 1-sqrt"),
        ("polynomial", {"power": 0.0}, "power is 0.0; it must be above 0 and finite"),
        ("piecewise", {"points": [(0, 1)]}, "at least two"),
        ("piecewise", {"points": [(0, 1), (0.5, 0)]}, "fractions from 0 to 1"),
        ("piecewise", {"points": [(0, 1), (0.6, 1), (0.5, 0), (1, 0)]}, "in order of fraction"),
        ("piecewise", {"points": [(0, 1), (1, 2)]}, "multipliers from 0 to 1"),
    ],
)
def test_an_argument_out_of_range_is_named_with_its_range(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAKERS[name](10, **arguments)
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ScheduleSpec(name=name, **arguments)


# --- values by hand --------------------------------------------------------------------------------------------------

S = math.sqrt(0.5)  # cos 45°


@pytest.mark.parametrize(
    ("name", "total_steps", "arguments", "expected"),
    [
        ("constant", 3, {}, [1, 1, 1]),
        ("linear", 4, {}, [1, 3 / 4, 2 / 4, 1 / 4]),
        # (1 + cos) / 2 at 0, 45, 90 and 135 degrees.
        ("cosine", 4, {}, [1, (1 + S) / 2, 1 / 2, (1 - S) / 2]),
        # Two cycles of 2: phases 0 and 1/2, then again.
        ("cosine_restarts", 4, {"cycles": 2}, [1, 1 / 2, 1, 1 / 2]),
        # Two cycles of 1.5: phases 0, 2/3 (cos 120° = -1/2), then 1/3 (cos 60° = 1/2) half a step after the restart.
        ("cosine_restarts", 3, {"cycles": 2}, [1, 1 / 4, 3 / 4]),
        # 0.2 + 0.8 * cosine.
        ("cosine_to_minimum", 2, {"min_ratio": 0.2}, [1, 0.6]),
        # Cycles of 2 and 4 steps; the second starts at half the peak.
        ("sgdr", 6, {"cycles": 2, "peak_decay": 0.5}, [1, 1 / 2, 1 / 2, (1 + S) / 4, 1 / 4, (1 - S) / 4]),
        # 7 steps in ratio 1:2 are 2.33 and 4.67: rounded to 2 and 5, so the restart at step 2 is at its peak.
        ("sgdr", 7, {"cycles": 2}, [1, 1 / 2] + [(1 + math.cos(math.pi * k / 5)) / 2 for k in range(5)]),
        # Cycles of less than half a step get one each, and the third does not fit.
        ("sgdr", 2, {"cycles": 3, "growth": 10.0, "peak_decay": 0.5}, [1, 1 / 2]),
        # Half-cycles of 8 // 4 = 2: bottom, halfway, peak, halfway.
        ("cyclic_triangular", 8, {"cycles": 2, "min_ratio": 0.2}, [0.2, 0.6, 1, 0.6] * 2),
        # Half-cycles of 7 // 4 = 1; the three steps left over begin another cycle and a half.
        ("cyclic_triangular", 7, {"cycles": 2, "min_ratio": 0.0}, [0, 1, 0, 1, 0, 1, 0]),
        ("cyclic_triangular2", 8, {"cycles": 2, "min_ratio": 0.2}, [0.2, 0.6, 1, 0.6, 0.2, 0.4, 0.6, 0.4]),
        # The second triangle is 0.25 as high: 0.2 + 0.8 * 0.25 = 0.4 at its top.
        ("cyclic_exp_range", 8, {"cycles": 2, "min_ratio": 0.2, "gamma": 0.25}, [0.2, 0.6, 1, 0.6, 0.2, 0.3, 0.4, 0.3]),
        # gamma**step is 1, 1/2, 1/4, 1/8: the peak of the wave, at step 2, is already down to 1/4.
        ("cyclic_exp_range_per_step", 4, {"cycles": 1, "min_ratio": 0.0, "gamma": 0.5}, [0, 1 / 4, 1 / 4, 1 / 16]),
        # The last round(0.5 * 8) = 4 steps decay.
        ("wsd", 8, {"decay_fraction": 0.5, "decay": "linear"}, [1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("wsd", 8, {"decay_fraction": 0.5, "decay": "1-sqrt"}, [1, 1, 1, 1, 1, 1 / 2, 1 - S, 1 - math.sqrt(3) / 2]),
        ("wsd", 4, {"decay_fraction": 0.5, "min_ratio": 0.2}, [1, 1, 1, 0.6]),
        # round(0.25 * 7) = 2 steps decay.
        ("wsd", 7, {"decay_fraction": 0.25}, [1, 1, 1, 1, 1, 1, 1 / 2]),
        ("wsd", 2, {"decay_fraction": 0.0}, [1, 1]),
        # Peak at update 0.5 * 6 - 1 = 2, last update 5 at the final ratio; phases thirds of 180° on the way down.
        ("one_cycle", 6, {"peak_at": 0.5, "initial_ratio": 0.2, "final_ratio": 0.0}, [0.2, 0.6, 1, 3 / 4, 1 / 4, 0]),
        # Shorter than 1 / peak_at: starts at the peak.
        ("one_cycle", 2, {"final_ratio": 0.1}, [1, 0.1]),
        ("polynomial", 4, {"power": 2.0}, [1, 9 / 16, 4 / 16, 1 / 16]),
        ("polynomial", 2, {"power": 2.0, "min_ratio": 0.2}, [1, 0.4]),
        # One timescale (2 steps) in, 1 / sqrt(2); three in, 1 / sqrt(4).
        (
            "inverse_sqrt",
            8,
            {"timescale": 0.25},
            [1, math.sqrt(2 / 3), S, math.sqrt(2 / 5), math.sqrt(1 / 3), math.sqrt(2 / 7), 1 / 2, math.sqrt(2 / 9)],
        ),
        ("step", 6, {"drops": 2, "factor": 0.1}, [1, 1, 0.1, 0.1, 0.01, 0.01]),
        # Drops are due at 5/3 and 10/3: felt at updates 2 and 4.
        ("step", 5, {"drops": 2, "factor": 0.5}, [1, 1, 1 / 2, 1 / 2, 1 / 4]),
        # A cosine over 4 steps, 2 steps up to 0.5, a cosine over 2 steps.
        (
            "rewarm",
            8,
            {"at": 0.5, "warmup": 0.5, "peak": 0.5},
            [1, (1 + S) / 2, 1 / 2, (1 - S) / 2, 0, 1 / 4, 1 / 2, 1 / 4],
        ),
        ("sawtooth", 4, {"cycles": 2, "min_ratio": 0.5}, [1, 3 / 4, 1, 3 / 4]),
        ("piecewise", 4, {}, [1, 1, 1, 1 / 2]),
        # A jump at half the run: the later of the two points holds there.
        ("piecewise", 4, {"points": [(0, 0), (0.5, 1), (0.5, 0.2), (1, 0.2)]}, [0, 1 / 2, 0.2, 0.2]),
    ],
)
def test_values_by_hand(name: str, total_steps: int, arguments: dict[str, Any], expected: list[float]) -> None:
    assert trace(MAKERS[name](total_steps, **arguments), total_steps) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_every_schedule_has_values_by_hand() -> None:
    marks = [mark for mark in test_values_by_hand.pytestmark if mark.name == "parametrize"]
    assert {case[0] for case in marks[0].args[1]} == set(NAMES)


def test_sgdr_without_growth_is_equal_restarts() -> None:
    ours, equal = MAKERS["sgdr"](120, cycles=4, growth=1.0), MAKERS["cosine_restarts"](120, cycles=4)
    assert trace(ours, 120) == pytest.approx(trace(equal, 120), abs=1e-12)


def test_gamma_per_step_is_gone_within_a_hundred_steps_and_gamma_per_cycle_is_not() -> None:
    """0.95**90 < 0.01 < 0.95**89, so after 90 steps a triangle is less than 1 % of the way to the peak."""
    per_step = MAKERS["cyclic_exp_range_per_step"](332, min_ratio=0.0, gamma=0.95)
    per_cycle = MAKERS["cyclic_exp_range"](332, min_ratio=0.0, gamma=0.95)
    assert max(trace(per_step, 332)) == pytest.approx(0.175, abs=5e-4)  # at step 19 or 20: 20 / 41 * 0.95**20 = 0.1749
    assert max(per_step(step) for step in range(90, 332)) < 0.01
    assert max(per_cycle(step) for step in range(246, 328)) == pytest.approx(0.95**3)  # the fourth cycle's peak


# --- transformers and torch ------------------------------------------------------------------------------------------

PEAK = 1e-3


def used_learning_rates(make: Callable[[Any], Any], total_steps: int, learning_rate: float = PEAK) -> list[float]:
    """What each update of a run really uses under another library's scheduler, read before the update."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    scheduler = make(optimizer)
    used = []
    for _ in range(total_steps):
        used.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return used


def ours(total_steps: int, warmup_steps: int, name: str, arguments: dict[str, Any]) -> list[float]:
    schedule = build(ScheduleSpec(name=name, warmup_steps=warmup_steps, **arguments), total_steps)
    return [PEAK * multiplier for multiplier in trace(schedule, total_steps)]


@pytest.mark.parametrize("warmup_steps", [0, 5, 30])
@pytest.mark.parametrize("total_steps", [332, 61])
@pytest.mark.parametrize(
    ("name", "arguments", "theirs", "specific"),
    [
        ("constant", {}, "constant_with_warmup", {}),
        ("linear", {}, "linear", {}),
        ("cosine", {}, "cosine", {}),
        ("cosine_restarts", {"cycles": 4}, "cosine_with_restarts", {"num_cycles": 4}),
        ("cosine_restarts", {"cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
        ("cosine_to_minimum", {"min_ratio": 0.3}, "cosine_with_min_lr", {"min_lr_rate": 0.3}),
        ("polynomial", {"power": 2.0, "min_ratio": 0.1}, "polynomial", {"power": 2.0, "lr_end": 0.1 * PEAK}),
    ],
)
def test_agrees_with_transformers(
    name: str, arguments: dict[str, Any], theirs: str, specific: dict[str, Any], total_steps: int, warmup_steps: int
) -> None:
    from transformers.optimization import get_scheduler

    reference = used_learning_rates(
        lambda optimizer: get_scheduler(theirs, optimizer, warmup_steps, total_steps, specific), total_steps
    )
    assert ours(total_steps, warmup_steps, name, arguments) == pytest.approx(reference, rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("decay", ["cosine", "linear", "1-sqrt"])
def test_wsd_agrees_with_transformers(decay: str) -> None:
    """50 of the 250 steps after the warm-up decay; the minimum is 0, where both warm up from 0."""
    from transformers.optimization import get_wsd_schedule

    reference = used_learning_rates(
        lambda optimizer: get_wsd_schedule(optimizer, 10, 50, num_training_steps=260, decay_type=decay), 260
    )
    assert ours(260, 10, "wsd", {"decay_fraction": 0.2, "decay": decay}) == pytest.approx(
        reference, rel=1e-9, abs=1e-18
    )


@pytest.mark.parametrize(("warmup_steps", "timescale_steps"), [(20, 20), (20, 7), (0, 100)])
def test_inverse_sqrt_agrees_with_transformers(warmup_steps: int, timescale_steps: int) -> None:
    """A timescale equal to the warm-up is the transformers default and the schedule of the first transformer."""
    from transformers.optimization import get_inverse_sqrt_schedule

    reference = used_learning_rates(
        lambda optimizer: get_inverse_sqrt_schedule(optimizer, warmup_steps, timescale_steps), 120
    )
    arguments = {"timescale": timescale_steps / (120 - warmup_steps)}
    assert ours(120, warmup_steps, "inverse_sqrt", arguments) == pytest.approx(reference, rel=1e-9)


@pytest.mark.parametrize("total_steps", [332, 64, 37])
@pytest.mark.parametrize(
    ("name", "arguments", "specific"),
    [
        ("cyclic_triangular", {}, {"mode": "triangular"}),
        ("cyclic_triangular2", {}, {"mode": "triangular2"}),
        ("cyclic_exp_range_per_step", {"gamma": 0.95}, {"mode": "exp_range", "gamma": 0.95}),
        ("cyclic_exp_range", {"gamma": 0.7}, {"scale_fn": lambda cycle: 0.7 ** (cycle - 1), "scale_mode": "cycle"}),
    ],
)
def test_cyclic_schedules_agree_with_torch(
    name: str, arguments: dict[str, Any], specific: dict[str, Any], total_steps: int
) -> None:
    from torch.optim.lr_scheduler import CyclicLR

    def make(optimizer: Any) -> CyclicLR:
        return CyclicLR(optimizer, 0.2 * PEAK, PEAK, total_steps // 6, cycle_momentum=False, **specific)

    reference = used_learning_rates(make, total_steps)
    arguments = {**arguments, "cycles": 3, "min_ratio": 0.2}
    assert ours(total_steps, 0, name, arguments) == pytest.approx(reference, rel=1e-9)


@pytest.mark.parametrize("peak_at", [0.3, 0.5, 0.05])
@pytest.mark.parametrize("total_steps", [332, 40, 21])
def test_one_cycle_agrees_with_torch(peak_at: float, total_steps: int) -> None:
    from torch.optim.lr_scheduler import OneCycleLR

    def make(optimizer: Any) -> OneCycleLR:
        return OneCycleLR(optimizer, PEAK, total_steps=total_steps, pct_start=peak_at, cycle_momentum=False)

    reference = used_learning_rates(make, total_steps)
    assert ours(total_steps, 0, "one_cycle", {"peak_at": peak_at}) == pytest.approx(reference, rel=1e-9)


@pytest.mark.parametrize(("first", "growth", "cycles"), [(10, 2, 3), (8, 3, 3), (25, 1, 4)])
def test_sgdr_agrees_with_torch(first: int, growth: int, cycles: int) -> None:
    """torch is told the length of the first cycle; here it follows from the run that the cycles fill."""
    from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

    total_steps = sum(first * growth**cycle for cycle in range(cycles))
    reference = used_learning_rates(
        lambda optimizer: CosineAnnealingWarmRestarts(optimizer, T_0=first, T_mult=growth), total_steps
    )
    assert ours(total_steps, 0, "sgdr", {"cycles": cycles, "growth": growth}) == pytest.approx(
        reference, rel=1e-9, abs=1e-18
    )


def test_step_agrees_with_torch() -> None:
    from torch.optim.lr_scheduler import StepLR

    reference = used_learning_rates(lambda optimizer: StepLR(optimizer, 25, gamma=0.3), 100)
    assert ours(100, 0, "step", {"drops": 3, "factor": 0.3}) == pytest.approx(reference, rel=1e-9)
