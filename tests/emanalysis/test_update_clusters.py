import numpy as np
import pytest

from emanalysis.update_clusters import cluster


def cosines(group: np.ndarray, *, within: float, across: float) -> np.ndarray:
    found = np.where(group[:, None] == group, within, across) + np.random.default_rng(0).normal(
        0, 0.01, (len(group),) * 2
    )
    found = (found + found.T) / 2
    np.fill_diagonal(found, 1)
    return found


def test_groups_that_point_the_same_way_are_found() -> None:
    group = np.array([0, 1, 0, 1, 2, 2, 0, 1, 2])
    found = cluster(cosines(group, within=0.8, across=0.05))
    assert found is not None
    assert found.groups == 3
    assert found.agreement(group) == 1
    assert found.agreement(np.array([0, 0, 1, 1, 0, 1, 2, 2, 2])) < 0  # one of each group in each
    assert [len(set(group[found.order[start : start + 3]])) for start in (0, 3, 6)] == [1, 1, 1]


def test_directions_that_are_all_alike_are_one_group() -> None:
    found = cluster(cosines(np.arange(8), within=1.0, across=0.3))
    assert found is not None
    assert found.groups == 1
    assert np.isnan(found.agreement(np.arange(8)))


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_three_runs_are_too_few(runs: int) -> None:
    assert cluster(np.eye(runs)) is None
