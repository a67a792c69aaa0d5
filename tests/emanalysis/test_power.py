import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestIndPower

from emanalysis.confirmation import choose, confirm, split
from emanalysis.power import (
    FIELD,
    Design,
    Noise,
    assumed,
    chosen_probability,
    design_of,
    designs_for,
    detectable_difference,
    detection_probability,
    estimate_noise,
    planned_design,
)
from emanalysis.score_matrix import ScoreMatrix

NOISE = Noise(seed=2.0, interaction=4.0, seed_question=3.0, response=20.0)


def sweep(noise: Noise, design: Design, rng: np.random.Generator, *, better_by: float = 0.0) -> ScoreMatrix:
    """A sweep with exactly this noise; all cells have the same loss but for a hair, and cell 0 is the better one."""
    cell = np.repeat(np.arange(design.cells), design.seeds)
    per = int(design.questions_per_cluster)
    cluster = np.repeat(np.arange(design.clusters), per)
    runs, questions = len(cell), design.clusters * per
    scores = 50 + better_by * (cell == 0)[:, None] + rng.normal(0, noise.seed, (runs, 1))
    scores = scores + rng.normal(0, noise.interaction, (design.cells, design.clusters))[cell][:, cluster]
    scores = scores + rng.normal(0, noise.seed_question, (runs, design.clusters))[:, cluster]
    scores = scores + rng.normal(0, noise.response / np.sqrt(design.samples), (runs, questions))
    return ScoreMatrix(
        scores=scores,
        response_sd=np.full(scores.shape, noise.response),
        responses=np.full(scores.shape, design.samples),
        loss=1 + 1e-6 * rng.permutation(runs),
        cell=cell,
        seed=np.tile(np.arange(design.seeds), design.cells),
        cluster=cluster,
    )


def test_noise_is_recovered_from_a_finished_sweep() -> None:
    design = Design(cells=60, seeds=6, clusters=30, questions_per_cluster=2, samples=10)
    matrix = sweep(NOISE, design, np.random.default_rng(0))
    found = estimate_noise(matrix)
    assert (found.seed, found.interaction) == pytest.approx((2.0, 4.0), rel=0.1)
    assert found.seed_question == pytest.approx(3.0, rel=0.1)
    assert found.response == pytest.approx(20.0)
    assert design_of(matrix) == design


def test_what_one_seed_can_not_show_is_missing() -> None:
    found = estimate_noise(sweep(NOISE, Design(20, 1, 30, 1, 10), np.random.default_rng(0)))
    assert np.isnan(found.seed)
    assert np.isnan(found.seed_question)
    assert found.interaction == pytest.approx(np.sqrt(4**2 + 3**2 + 20**2 / 10), rel=0.1)


@pytest.mark.parametrize("cells", [2, 5, 34])
@pytest.mark.parametrize("ahead", [0.0, 2.0, 5.0])
def test_chosen_probability_integrates_the_distribution_of_the_range(cells: int, ahead: float) -> None:
    z = stats.norm.ppf((np.arange(100) + 0.5) / 100)
    expected = stats.studentized_range.cdf(np.maximum(1e-9, ahead + np.sqrt(2) * z), cells, np.inf).mean()
    assert chosen_probability(cells, ahead) == pytest.approx(expected, abs=0.003)


def test_confirmation_alone_is_the_power_of_a_t_test() -> None:
    """With a choice that can't fail and luck of seeds only: 4 of 6 runs against 4, difference 5, SD 2."""
    noise = Noise(seed=2.0, interaction=0.0, seed_question=0.0, response=0.0)
    found = detection_probability(noise, Design(2, 6, 10), 5.0)
    chosen = chosen_probability(2, 5 / (2 / np.sqrt(2)))
    confirmed = TTestIndPower().power(effect_size=5 / 2, nobs1=4, alpha=0.05, alternative="larger")
    assert found == pytest.approx(chosen * confirmed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("design", "better_by"), [(Design(6, 6, 12, 2, 10), 7.0), (Design(3, 9, 20, 1, 10), 5.0), (Design(12, 5, 16), 10.0)]
)
def test_detection_probability_promises_no_more_than_simulated_sweeps_keep(design: Design, better_by: float) -> None:
    rng = np.random.default_rng(0)
    chosen = found = 0
    for _ in range(300):
        choosing, confirming = split(sweep(NOISE, design, rng, better_by=better_by), rng=rng)
        choice = choose(choosing)
        chosen += choice.better == 0
        found += choice.better == 0 and confirm(confirming, choice).score.p_greater <= 0.05
    sampling = 2 * np.sqrt(0.25 / 300)
    assert 0.2 < detection_probability(NOISE, design, better_by) < found / 300 + sampling
    assert chosen > found


def test_detectable_difference_is_detected_with_the_wanted_power() -> None:
    design = Design(8, 5, 10)
    difference = detectable_difference(NOISE, design, power=0.7)
    assert detection_probability(NOISE, design, difference) == pytest.approx(0.7)


def test_of_a_search_the_seeds_that_it_saw_choose_and_the_rest_confirm() -> None:
    plain, searched = Design(4, 6, 10), Design(4, 6, 10, search_seeds=4)
    assert (plain.choosing_seeds, searched.choosing_seeds) == (2, 4)
    # With 2 of 6 the search gives what a third of the seeds does.
    assert detectable_difference(NOISE, Design(4, 6, 10, search_seeds=2)) == detectable_difference(NOISE, plain)
    assert detectable_difference(NOISE, searched) > detectable_difference(NOISE, plain)
    assert detection_probability(NOISE, Design(4, 6, 10, search_seeds=5), 50.0) == 0.0


@pytest.mark.parametrize("design", [Design(1, 5, 9), Design(4, 2, 9), Design(4, 5, 2)])
def test_designs_without_a_held_back_half_detect_nothing(design: Design) -> None:
    assert detectable_difference(NOISE, design) == np.inf


def test_larger_designs_detect_what_was_asked_for_and_no_smaller_one_does() -> None:
    design = Design(6, 3, 8, 3, 10)
    ways = designs_for(NOISE, design, 5.0)
    assert "fewest responses" in ways
    for larger, detects in ways.values():
        assert detects == pytest.approx(detectable_difference(NOISE, larger))
        assert detects <= 5.0
    cheapest, _ = ways["fewest responses"]
    smaller = Design(6, cheapest.seeds - 1, cheapest.clusters, 3, 10)
    assert detectable_difference(NOISE, smaller) > 5.0


def test_more_samples_are_a_way_only_where_single_responses_are_the_noise() -> None:
    """With luck of responses alone (SD 40) the variance goes by 1 / samples: four times the samples, half the SD."""
    noise, design = Noise(seed=0.0, interaction=0.0, seed_question=0.0, response=40.0), Design(2, 5, 8, 1, 4)
    half = detectable_difference(noise, design) / 2
    larger, detects = designs_for(noise, design, half * 1.0001)["samples"]
    assert larger == Design(2, 5, 8, 1, 16)
    assert detects == pytest.approx(half)
    assert "samples" not in designs_for(NOISE, Design(6, 3, 8, 3, 10), 5.0)


@pytest.mark.parametrize(
    ("seeds", "topics", "expected"),
    [
        ([5, 5, 4], "aabbccddeeff", Design(3, 4, 6, 2, 8)),
        ([5, 1, 1, 4], "abcdabcd", Design(2, 4, 8, 1, 8)),  # four topics are too few to count by
        ([5, 1, 1], "abcde", Design(3, 1, 5, 1, 8)),
    ],
)
def test_a_planned_design_counts_what_the_verdict_will_go_by(seeds: list[int], topics: str, expected: Design) -> None:
    assert planned_design(seeds, [*topics], 8) == expected


def test_what_a_sweep_does_not_show_is_the_fields() -> None:
    noise, unknown = assumed(Noise(seed=np.nan, interaction=4.0, seed_question=np.nan, response=20.0))
    assert noise == Noise(FIELD.seed, 4.0, FIELD.seed_question, 20.0)
    assert unknown == ["seed", "seed_question"]


def test_a_difference_out_of_reach_has_no_design() -> None:
    assert designs_for(FIELD, Design(100, 3, 3), 0.1) == {}
