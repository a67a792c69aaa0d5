"""The file of a cluster's secrets."""

import stat
import subprocess
from pathlib import Path

import pytest

from sweeps import cluster_env


def test_new_secrets_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "cluster.env"
    assert cluster_env.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_no_two_clusters_have_the_same_secrets(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    cluster_env.create(first)
    cluster_env.create(second)
    ours, theirs = cluster_env.read(first), cluster_env.read(second)
    assert set(ours) == {
        "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY", "RAY_AUTH_TOKEN",
    }  # fmt: skip
    for name in set(ours) - {"MLFLOW_TRACKING_USERNAME"}:
        assert len(ours[name]) >= 32
        assert ours[name] != theirs[name]


def test_secrets_that_are_there_are_left_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "cluster.env"
    cluster_env.create(path)
    before = path.read_text()
    assert not cluster_env.create(path)
    assert path.read_text() == before


def test_a_shell_reads_the_same_as_we_do(tmp_path: Path) -> None:
    """Nodes source the file, and this machine parses it; a key that was added by hand counts for both."""
    path = tmp_path / "cluster.env"
    cluster_env.create(path)
    with path.open("a") as file:
        file.write("OPENAI_API_KEY=sk-a$b\n".replace("$b", "\\$b"))
        file.write("EMPTY=\n")
    read = subprocess.run(
        ["bash", "-c", f"set -a; . {path}; env"], capture_output=True, text=True, env={}, check=True
    ).stdout.splitlines()
    ours = cluster_env.read(path)
    ours.pop("OPENAI_API_KEY")
    assert all(f"{name}={value}" in read for name, value in ours.items())
    assert "EMPTY" not in ours


def test_a_quoted_secret_is_refused_by_name(tmp_path: Path) -> None:
    """bash takes the quotes off, Kubernetes' secrets keep them."""
    path = tmp_path / "cluster.env"
    cluster_env.create(path)
    with path.open("a") as file:
        file.write('OPENAI_API_KEY="sk-a"\n')
    with pytest.raises(ValueError, match=r"line \d+: OPENAI_API_KEY is quoted"):
        cluster_env.read(path)


def test_secrets_that_others_can_read_are_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "cluster.env"
    cluster_env.create(path)
    path.chmod(0o640)
    with pytest.raises(ValueError, match=f"chmod 600 {path}"):
        cluster_env.read(path)


def test_a_missing_file_is_answered_with_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"make it with: python -m sweeps\.cluster_env"):
        cluster_env.read(tmp_path / "cluster.env")
