"""A folder with a trained model of this room.

config.json           kind, sizes, recipe, what was measured at the end, and the command that made it
model.safetensors     weights, float16 on disk
control.safetensors   weights of the control that was trained beside it, where there is one
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from saekit.adaptive.a_vit import AViT, AViTConfig
from saekit.adaptive.adatape import AdaTape, AdaTapeConfig
from saekit.adaptive.duo_llm import DuoConfig, DuoLLM
from saekit.adaptive.rin import RIN, RINConfig
from saekit.checkpoint import check_writable, write_tensors, written_whole
from saekit.errors import FileError, UnknownNameError

Model = TypeVar("Model", bound=nn.Module)

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "adaptive"
CONFIG, MODEL, CONTROL = "config.json", "model.safetensors", "control.safetensors"
KINDS: dict[str, tuple[type[Any], type[nn.Module]]] = {
    "a-vit": (AViTConfig, AViT),
    "duo-llm": (DuoConfig, DuoLLM),
    "adatape": (AdaTapeConfig, AdaTape),
    "rin": (RINConfig, RIN),
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Saved:
    """A model and what is known of it.

    Attributes:
        kind: one of `KINDS`.
        control: the same architecture trained as long without the decisions; None without one.
        recipe: the settings of its training.
        facts: what was measured when it was saved.
    """

    kind: str
    model: nn.Module = field(repr=False)
    control: nn.Module | None = field(default=None, repr=False)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def check_folder(folder: Path) -> None:
    """Find out before minutes of work that `save_adaptive` cannot write here.

    Raises:
        FileError: no right to, or other files there, which saving would delete.
    """
    check_writable(folder, files=(CONFIG, MODEL, CONTROL), holds="an adaptive model")


def save_adaptive(saved: Saved, folder: Path) -> None:
    """Write the folder whole or not at all.

    Raises:
        FileError: as `check_folder`.
    """
    check_folder(folder)
    model: Any = saved.model
    described = {
        "kind": saved.kind,
        "config": asdict(model.config),
        "recipe": dict(saved.recipe),
        "facts": dict(saved.facts),
        "command": f"saekit adaptive train {saved.kind} --seed {saved.recipe.get('seed', 0)}",
    }
    with written_whole(folder) as beside:
        (beside / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        for name, part in ((MODEL, saved.model), (CONTROL, saved.control)):
            if part is not None:
                write_tensors(beside / name, {key: _half(tensor) for key, tensor in part.state_dict().items()})


def load_adaptive(name: str | Path, *, kind: str | None = None) -> Saved:
    """A bundled model by its kind, or a folder that `save_adaptive` wrote.

    Args:
        kind: refuse anything else.

    Raises:
        UnknownNameError: neither a bundled model nor a folder.
        FileError: a folder that is incomplete, damaged, or holds a model of another kind.
    """
    folder = ASSETS / str(name) if str(name) in KINDS else Path(name).expanduser()
    if not folder.is_dir():
        raise UnknownNameError("adaptive model or folder", str(name), KINDS)
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found = described["kind"]
        if found not in KINDS or kind not in (None, found):
            raise FileError(f"{folder} holds a model of kind {found!r}, not {kind or ' or '.join(KINDS)}; give another")
        config_class, model_class = KINDS[found]
        models = [
            _fill(model_class(config_class(**described["config"])), load_file(folder / part))
            for part in (MODEL, CONTROL)
            if part == MODEL or (folder / part).exists()
        ]
    except FileError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FileError(f"cannot read {folder} as an adaptive model ({error}); train or copy it again") from error
    return Saved(
        kind=found,
        model=models[0],
        control=models[1] if len(models) > 1 else None,
        recipe=described.get("recipe", {}),
        facts=described.get("facts", {}),
    )


def filled(model: Model, weights: Mapping[str, Tensor]) -> Model:
    """A model with the weights of a stage, in eval mode and as they will be read back from disk."""
    return _fill(model, {name: _half(tensor) for name, tensor in weights.items()})


def _fill(model: Model, weights: Mapping[str, Tensor]) -> Model:
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()


def _half(tensor: Tensor) -> Tensor:
    # a single number decides routes: it keeps its precision
    return tensor.detach().contiguous() if tensor.ndim == 0 else tensor.detach().half().contiguous()
