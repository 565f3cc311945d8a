"""The native folder of an SAE: two files that other tools can read too.

`cfg.json` — a superset of what SAELens (6 and later) writes:

    sae_lens_version            of the oldest SAELens whose folders are of this form: it takes others for older ones
    architecture                "topk" or "abstopk" with `k`, "jumprelu", "jumprelu_transcoder" or
                                "jumprelu_skip_transcoder"; "saekit" for what SAELens has no name for (a batch rule
                                not yet calibrated)
    d_in, d_sae                 width of the input, number of features; d_out as well for a transcoder
    dtype, device               of the weights on disk ("float32" or "float16"); "cpu"
    apply_b_dec_to_input        true: the encoder reads `x - b_dec`; false for a transcoder
    normalize_activations       "none" (whatever scaling training used is folded into the biases), "layer_norm",
                                "constant_norm_rescale", or "equal_norms", which only saekit knows
    reshape_activations         "none"
    metadata                    hook_name, model_name, context_size and what else the maker recorded
    saekit.format_version       this number; a folder with a higher one is refused
    saekit.rule                 name and arguments of the rule
    saekit.normalisation        name and arguments of what happens to each token before encoding

`sae_weights.safetensors` — `W_enc (d_in, d_sae)`, `b_enc (d_sae,)`, `W_dec (d_sae, d_out)`, `b_dec (d_out,)`
and, when the rule is a threshold, `threshold (d_sae,)`; `W_skip (d_out, d_in)` where there is a skip
connection; `ranks (d_sae,)`, int64, where FeatureChoice has given its features places on the curve.

A folder is written beside its place and renamed, so that it is there whole or not at all.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saekit.errors import FileError

FORMAT_VERSION = 1
CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"


_NORMALISATIONS = {
    "Plain": "none",
    "LayerNorm": "layer_norm",
    "ConstantNorm": "constant_norm_rescale",
    "EqualNorms": "equal_norms",
}


def describe(
    *,
    rule: Mapping[str, Any],
    normalisation: Mapping[str, Any],
    d_in: int,
    d_sae: int,
    d_out: int | None,
    skip: bool,
    dtype: str,
    apply_b_dec_to_input: bool,
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """The contents of `cfg.json`."""
    architecture = _architecture(rule, is_transcoder=d_out is not None, skip=skip)
    return {
        "sae_lens_version": "6.0.0",
        "architecture": architecture,
        **({"k": rule["k"]} if architecture in ("topk", "abstopk") else {}),
        "d_in": d_in,
        "d_sae": d_sae,
        **({} if d_out is None else {"d_out": d_out}),
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": apply_b_dec_to_input,
        "normalize_activations": _NORMALISATIONS[normalisation["name"]],
        "reshape_activations": "none",
        "metadata": dict(metadata),
        "saekit": {"format_version": FORMAT_VERSION, "rule": dict(rule), "normalisation": dict(normalisation)},
    }


def _architecture(rule: Mapping[str, Any], *, is_transcoder: bool, skip: bool) -> str:
    """SAELens' name for it, if it has one."""
    if not rule.get("relu", True):
        return "saekit"
    if rule["name"] == "Threshold" and is_transcoder:
        return f"jumprelu{'_skip' if skip else ''}_transcoder"
    if is_transcoder or skip:
        return "saekit"
    if rule["name"] == "TopK":
        return "topk"
    return {"Threshold": "jumprelu", "AbsTopK": "abstopk"}.get(rule["name"], "saekit")


def save(
    folder: Path, *, config: Mapping[str, Any], tensors: Mapping[str, Tensor], weights_file: str = WEIGHTS_FILE
) -> None:
    """Write both files, or neither.

    Raises:
        FileError: if there is no space or no right to write there, or something other than an SAE is there.
    """
    check_writable(folder, files=(CONFIG_FILE, weights_file))
    with written_whole(folder) as beside:
        (beside / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        write_tensors(beside / weights_file, tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that everyone may read."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o644)  # safetensors makes it private


def check_writable(
    folder: Path, *, files: Collection[str] = (CONFIG_FILE, WEIGHTS_FILE), holds: str = "an SAE"
) -> None:
    """Find out before hours of work, not after, that a folder of these files cannot be written here.

    Raises:
        FileError: if there is no right to, or if replacing the folder would delete other files in it.
    """
    check_place(folder)
    others = {path.name for path in folder.iterdir()} - set(files) if folder.exists() else set()
    if others:
        raise FileError(
            f"{folder} holds more than {holds} ({', '.join(sorted(others)[:3])}), which saving would delete; "
            "give a new or empty folder"
        )


def check_place(folder: Path) -> None:
    """Raises: FileError if there is no right to write a folder here, or a file is there."""
    try:
        if folder.exists():
            next(folder.iterdir(), None)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error.strerror}; choose a place you may write to") from error


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a native folder, checked against each other.

    Raises:
        FileError: saying which file is missing, damaged, of a newer version, or does not fit the other.
    """
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise FileError(f"{folder} has {CONFIG_FILE} but no {WEIGHTS_FILE}; copy the folder again, with both files")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise FileError(f"{path} is damaged or cut short ({error}); copy or download it again") from error
    check_tensors(path, config, tensors)
    return config, tensors


def check_tensors(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Compare the tensors in the file at `path`, or their shapes alone, with what the config says.

    Raises:
        FileError: one is missing, or of another shape.
    """
    d_in, d_sae = config["d_in"], config["d_sae"]
    d_out = config.get("d_out", d_in)
    expected = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if config["saekit"]["rule"].get("name") == "Threshold":
        expected["threshold"] = (d_sae,)
    optional = {"ranks": (d_sae,), "W_skip": (d_out, d_in)}
    expected |= {name: shape for name, shape in optional.items() if name in tensors}
    for name, shape in expected.items():
        if name not in tensors:
            raise FileError(f"{path} has no tensor {name}; expected {', '.join(expected)}; is it another format?")
        if tuple(tensors[name].shape) != shape:
            raise FileError(
                f"{name} in {path} is {tuple(tensors[name].shape)}, but {CONFIG_FILE} says {shape}; "
                "the two files belong to different SAEs"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of `cfg.json`, with every key that belongs in it.

    Raises:
        FileError: a file that is missing, damaged, of a newer version, or not saekit's.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise FileError(
            f"no SAE in {folder}: expected {CONFIG_FILE} and {WEIGHTS_FILE}; give a folder that saekit wrote"
        )
    try:
        config = json.loads(path.read_text())
        version = config["saekit"]["format_version"]
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise FileError(f"{path} is not readable JSON ({error}); copy or download it again") from error
    except (KeyError, TypeError) as error:
        raise FileError(
            f"{path} was not written by saekit (it has no saekit.format_version); convert the SAE first"
        ) from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise FileError(
            f"{path} has format version {version}, this saekit reads up to {FORMAT_VERSION}; "
            "upgrade with `pip install -U saekit`"
        )
    missing = [key for key in ("d_in", "d_sae", "apply_b_dec_to_input", "metadata") if key not in config]
    missing += [f"saekit.{key}" for key in ("rule", "normalisation") if key not in config["saekit"]]
    if missing:
        raise FileError(f"{path} lacks {', '.join(missing)}; copy or download it again")
    return config


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into; it takes the place of `folder` when the block ends well.

    Raises:
        FileError: for any failure to write, leaving what was there before.
    """
    folder = folder.resolve()  # a link stays a link
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error.strerror}; choose a place you may write to") from error
    try:
        yield beside
        beside.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            old = beside.with_name(beside.name + "-old")
            os.replace(folder, old)
            try:
                os.replace(beside, folder)
            except OSError:
                os.replace(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(beside, folder)
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot write {folder}: {error}; check space and rights; nothing was changed") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
