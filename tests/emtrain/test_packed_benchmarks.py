"""The packing benchmarks run, and say so where they can't."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def lines(script: str, *arguments: str) -> list[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.slow
def test_the_gpu_benchmark_runs_every_arm_at_toy_size() -> None:
    table = lines("packed_gpu.py", "--cpu-smoke")
    arms = [line[:24].strip() for line in table[2:]]
    assert arms[0] == "published"
    assert arms[1].startswith("tuned (micro-batch ")
    assert arms[2:] == ["2 processes", "loop, 1 runs", "engine, 1 runs", "loop, 3 runs", "engine, 3 runs"]
    for line in table[2:]:
        steps_per_second, _, wait, _, _, loss = line[24:].split()
        assert float(steps_per_second) > 0
        assert float(wait) > 0
        assert loss == "-" or float(loss) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_that_there_is_no_gpu() -> None:
    assert lines("packed_gpu.py") == ["no GPU here, so nothing to measure; --cpu-smoke runs all arms at toy size"]


@pytest.mark.slow
def test_the_cpu_benchmark_trains_the_same_runs_in_every_arm() -> None:
    table = lines("packed.py", "--runs", "2", "--repeats", "1")
    assert len(table) == 3 + 5
    for line in table[3:]:
        assert float(line.split()[-1]) < 1e-5  # the largest relative difference of a loss
