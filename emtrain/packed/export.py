"""An adapter of the engine as the directory that PEFT saves."""

from pathlib import Path

from safetensors.torch import save_file

from emtrain.adapter import lora_config
from emtrain.packed.run import Run


def save_adapter(run: Run, directory: Path, *, base: str) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for ``PeftModel.from_pretrained``.

    ``base``: the name or path of the model that the adapter belongs to, kept in the configuration.
    """
    directory.mkdir(parents=True, exist_ok=True)
    matrices = run.row.split(run.row.values_P)
    save_file(
        {name.replace(".default.", "."): matrix.cpu().contiguous() for name, matrix in matrices.items()},
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = lora_config(run.adapter)
    if run.adapter.target_modules == "all-linear":
        config.target_modules = {layer.rpartition(".")[2] for layer in run.layers}
    config.base_model_name_or_path = base or None
    config.inference_mode = True
    config.save_pretrained(directory)
