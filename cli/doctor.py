"""`saekit doctor`: what is installed, on what it runs, and whether what came with saekit is whole."""

import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .output import columns, write_facts

PACKAGES = ("saekit", "torch", "transformers", "transformer-lens", "tokenizers", "safetensors", "numpy", "triton")
MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")
# what else comes with saekit, beside the bundled model
BUNDLED = {
    "pystd_sae/layers.2": ("cfg.json", "sae_weights.safetensors"),
    "adaptive/a-vit": ("config.json", "model.safetensors", "control.safetensors"),
    "adaptive/adatape": ("config.json", "model.safetensors"),
    "adaptive/duo-llm": ("config.json", "model.safetensors"),
    "adaptive/rin": ("config.json", "model.safetensors"),
}
GB = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Doctor:
    """Say which versions, devices and kernels are in use, and whether the bundled files are whole.

    The exit code is 1 when a problem is found, and the last lines say what to do about it.

    Example:
        saekit doctor
    """

    json: bool = False
    """Print the facts as one JSON object."""

    def run(self) -> int:
        facts = diagnose()
        write_facts(facts, as_json=self.json, text=lambda: _as_text(facts))
        return 1 if facts["problems"] else 0


def diagnose() -> dict[str, Any]:
    """Everything the command prints. Loads torch, but no model and no other library."""
    from saekit.index import index_path
    from saekit.pretrained import bundled_model_path

    model = check_files(bundled_model_path(), MODEL_FILES)
    others = [check_files(bundled_model_path().parent / name, files) for name, files in BUNDLED.items()]
    index = index_path()
    cache = check_cache()
    problems = [model["problem"], *(other["problem"] for other in others), cache["problem"]]
    if not index.is_file():
        problems.append(f"no index of published SAEs at {index}; install saekit again")
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "devices": list_devices(),
        "bundled_model": model,
        "bundled_others": others,
        "index": index,
        "cache": cache,
        "problems": [problem for problem in problems if problem],
    }


def list_devices() -> list[dict[str, Any]]:
    """Each device that torch can use, with the kernels that run there and the reason."""
    import torch

    from saekit.kernels.backend import choose_backend, has_fast_bf16

    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "bf16": has_fast_bf16(),
        }
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            memory = device.total_memory / GB
            found.append({"device": f"cuda:{i}", "name": device.name, "memory_gb": memory, "bf16": bf16})
    for entry in found:
        backend = choose_backend(entry["device"])
        entry["kernels"] = {"name": backend.name, "reason": backend.reason}
    return found


def check_files(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Whether a bundled folder is whole: its JSON parses and its weights are as long as their header says."""
    from safetensors import SafetensorError, safe_open

    facts: dict[str, Any] = {"path": folder, "parameters": None, "problem": None}
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        return facts | {"problem": f"what comes with saekit lacks {', '.join(missing)} in {folder}; install it again"}
    shapes: list[list[int]] = []
    try:
        for name in names:
            if name.endswith(".json"):
                json.loads((folder / name).read_text(encoding="utf-8"))
                continue
            with safe_open(folder / name, framework="pt") as weights:
                shapes += [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118  not a dict
    except (OSError, ValueError, SafetensorError) as error:
        return facts | {"problem": f"{folder}, which comes with saekit, is damaged ({error}); install it again"}
    return facts | {"parameters": sum(_product(shape) for shape in shapes)}


def check_cache() -> dict[str, Any]:
    """The folder that downloads go to, whether it can be written, and the space left there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    writable = os.access(nearest, os.W_OK | os.X_OK)
    problem = None if writable else f"downloads go to {folder}, which cannot be written; set HF_HOME to another folder"
    free = shutil.disk_usage(nearest).free / GB
    return {"path": folder, "writable": writable, "free_gb": free, "problem": problem}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _as_text(facts: dict[str, Any]) -> str:
    model, cache = facts["bundled_model"], facts["cache"]
    parameters = "not usable" if model["parameters"] is None else f"{model['parameters'] / 1e6:.2f} M parameters"
    parts = [
        "versions",
        columns((name, found or "not installed") for name, found in facts["versions"].items()),
        "devices",
        columns((entry["device"], _describe(entry)) for entry in facts["devices"]),
        "kernels",
        columns(
            (entry["device"], f"{entry['kernels']['name']}: {entry['kernels']['reason']}") for entry in facts["devices"]
        ),
        "files",
        columns(
            [
                ("bundled model", f"{parameters}, {model['path']}"),
                *(("beside it", str(other["path"])) for other in facts["bundled_others"] if not other["problem"]),
                ("index", str(facts["index"])),
                ("downloads", f"{cache['free_gb']:.0f} GB free, {cache['path']}"),
            ]
        ),
        *(f"problem: {problem}" for problem in facts["problems"]),
    ]
    return "\n".join(parts)


def _describe(entry: dict[str, Any]) -> str:
    bf16 = "bf16" if entry["bf16"] else "no fast bf16"
    if entry["device"] == "cpu":
        return f"{entry['name']}, {entry['cores']} cores, {entry['threads']} threads, {entry['instructions']}, {bf16}"
    memory = f", {entry['memory_gb']:.0f} GB" if "memory_gb" in entry else ""
    return f"{entry['name']}{memory}, {bf16}"
