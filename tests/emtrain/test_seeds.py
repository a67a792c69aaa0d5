"""One seed, independent streams."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from emtrain.seeds import derive


def test_a_stream_is_the_same_in_every_process_and_version() -> None:
    """``printf '3/sample/60' | sha256sum`` begins with f782a4d3e6bb606e; the last bit of these 8 bytes is dropped."""
    assert derive(3, "sample", 60) == 0xF782A4D3E6BB606E // 2


def test_purposes_and_seeds_have_streams_of_their_own() -> None:
    purposes = [("adapter",), ("dropout",), ("order", 0), ("order", 1), ("sample", 0), ("sample", 1)]
    seeds = [derive(seed, *purpose) for seed, purpose in itertools.product(range(50), purposes)]
    assert len(set(seeds)) == len(seeds)


@given(st.integers(min_value=0), st.text())
def test_every_seed_is_one_that_torch_and_numpy_take(seed: int, purpose: str) -> None:
    derived = derive(seed, purpose)
    assert 0 <= derived < 2**63
    np.random.default_rng(derived)
