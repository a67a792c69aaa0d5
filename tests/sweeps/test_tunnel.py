"""What is said when there is no cluster to open a tunnel to. The tunnel itself is tested in tests/cluster."""

from pathlib import Path

import pytest

from sweeps import tunnel


@pytest.mark.parametrize(
    "content", ["cluster_name: mine\n", "a list\n", "{"], ids=["no provider", "no mapping", "no YAML"]
)
def test_a_file_that_describes_no_cluster_is_named(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "taken", lambda port: None)
    file = tmp_path / "cluster.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file}: no cluster is up that this file describes"):
        tunnel.command(file, port=5000)
