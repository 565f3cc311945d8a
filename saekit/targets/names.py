"""Which submodule a name means, in any of the spellings people use.

model.layers.6.mlp              the model's own name, exact
layers.6.mlp                    the end of one, if only one submodule's name ends so
blocks.6.hook_resid_post        TransformerLens, on its models and on any model with a list of blocks
layers.6, model.layers.6        the sixth block, whatever this model calls its list
"""

import inspect
import re
from collections.abc import Mapping
from enum import StrEnum

from torch import nn

from saekit.errors import SaekitError, UnknownNameError
from saekit.targets.facts import config_number


class Side(StrEnum):
    """Which end of a submodule: what goes in or what comes out."""

    INPUT = "in"
    OUTPUT = "out"


Place = tuple[str, Side]

_BLOCK_SPELLINGS = re.compile(
    r"(?P<list>blocks|(?:model\.)?layers|(?:transformer\.)?h|gpt_neox\.layers|model\.decoder\.layers)"
    r"\.(?P<index>[0-9]+)(?:\.(?P<rest>.+))?"
)
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
DOWN_PROJECTION = ("down_proj", "c_proj", "dense_4h_to_h", "fc_out", "fc2", "w2")
OUT_PROJECTION = ("o_proj", "c_proj", "out_proj", "dense")
# the norm between attention and MLP; read from the left, since Gemma has two of these and means the first
_SECOND_NORM = (
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "ln_2",
    "norm_2",
    "ffn_norm",
    "final_layer_norm",
)

# TransformerLens' names for the tensors of a block: version 3's, then version 4's
_HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_in": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_out": "resid_post",
    "hook_attn_out": "attn_out",
    "attn.hook_out": "attn_out",
    "mlp.hook_in": "mlp_in",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_out": "mlp_out",
    "mlp.hook_post": "mlp_post",
    # flat over the heads; only version 3's own models give (..., heads, d_head) here
    "attn.hook_z": "attn_z",
}


def find_place(model: nn.Module, name: str, side: Side) -> Place:
    """The exact name of the submodule that `name` means, and the side of it that is meant.

    Raises:
        UnknownNameError: no such submodule, or no such layer; it lists the closest names.
        SaekitError: the end of several names, or a tensor that this kind of model does not compute.
    """
    modules = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    if name in modules:
        return name, side
    ends = {id(module): path for path, module in reversed(modules.items()) if path.endswith(f".{name}")}
    if len(ends) > 1:
        several = ", ".join(sorted(ends.values())[:3])
        raise SaekitError(f"{name!r} is the end of {len(ends)} submodule names ({several}, ...); give more of the name")
    if ends:
        return next(iter(ends.values())), side
    return _find_hook(model, name, modules) or _find_by_block(model, name, side, modules)


def find_blocks(model: nn.Module) -> str | None:
    """The name of the one list that holds the model's blocks; None where there is none, or no way to tell.

    Among the outermost `ModuleList`s, the one whose members attend, and of these the one as long as the
    config says. Two stacks that fit equally well (an encoder and a decoder) are no answer.
    """
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    attending = [path for path in outermost if any(_child(block, _ATTENTION) for block in lists[path])]
    fitting = attending or outermost
    depth = config_number(model, "num_hidden_layers", "n_layers")
    as_deep = [path for path in fitting if len(lists[path]) == depth]
    found = as_deep or fitting
    return found[0] if len(found) == 1 else None


def first_name(model: nn.Module, path: str) -> tuple[str, int]:
    """The first name of what a list holds at several places, and which call belongs to this one.

    A list that holds one module three times runs it three times, and hooks see the calls, not the names. That a
    model runs its list in order, each place once, is our assumption.
    """
    names, call, module = [], 0, model
    for name in path.split("."):
        siblings = list(module) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        module = module.get_submodule(name)
        places = [place for place, sibling in enumerate(siblings) if sibling is module]
        if len(places) > 1:
            call = call * len(places) + places.index(int(name))
            name = str(places[0])
        names.append(name)
    return ".".join(names), call


def _find_hook(model: nn.Module, name: str, modules: Mapping[str, nn.Module]) -> Place | None:
    """A TransformerLens model knows its own aliases; version 4 keeps `hook_resid_post` as nothing but one."""
    point = getattr(model, "hook_dict", {}).get(name)
    return next(((path, Side.OUTPUT) for path, module in modules.items() if module is point), None)


def _find_by_block(model: nn.Module, name: str, side: Side, modules: Mapping[str, nn.Module]) -> Place:
    get_embedding = getattr(model, "get_input_embeddings", None)
    if name == "hook_embed" and get_embedding is not None:
        embedding = get_embedding()
        return next(path for path, module in modules.items() if module is embedding), Side.OUTPUT
    blocks = find_blocks(model)
    spelling = _BLOCK_SPELLINGS.fullmatch(name)
    if spelling and blocks is not None:
        path, rest = f"{blocks}.{int(spelling['index'])}", spelling["rest"]
        if path in modules:
            place = _inside_block(path, modules[path], rest, side, name)
            if place[0] in modules:
                return place
    raise UnknownNameError("submodule", name, _names_like(name, blocks, model, modules))


def _inside_block(path: str, block: nn.Module, rest: str | None, side: Side, name: str) -> Place:
    if rest is None:
        return path, side
    if rest in _HOOKS:
        child, side = _tensor_of_block(block, _HOOKS[rest], name)
        return f"{path}.{child}" if child else path, side
    for synonyms in (_ATTENTION, _MLP):
        if rest in synonyms:
            rest = _child(block, (rest, *synonyms)) or rest
    return f"{path}.{rest}", side


def _tensor_of_block(block: nn.Module, tensor: str, name: str) -> tuple[str | None, Side]:
    """Which child of a block, and which side of it, carries a tensor that TransformerLens has a name for."""
    if tensor in ("resid_pre", "resid_post"):
        return None, Side.INPUT if tensor == "resid_pre" else Side.OUTPUT
    children = dict(block.named_children())
    attention, mlp = _child(block, _ATTENTION), _child(block, _MLP)
    # where a block also norms what it adds to the stream, what it adds is that norm's output
    if tensor == "attn_out":
        normed = "post_attention_layernorm" if "post_feedforward_layernorm" in children else "post_self_attn_layernorm"
        child, side = _child(block, (normed,)) or _apart_from_stream(children, attention), Side.OUTPUT
    elif tensor == "mlp_out":
        normed = _child(block, ("post_feedforward_layernorm", "post_mlp_layernorm"))
        child, side = normed or _apart_from_stream(children, mlp), Side.OUTPUT
    elif tensor == "mlp_in":
        child, side = mlp, Side.INPUT
    elif tensor in ("mlp_post", "attn_z"):
        parent, last = (mlp, DOWN_PROJECTION) if tensor == "mlp_post" else (attention, OUT_PROJECTION)
        last = _child(children[parent], last) if parent else None
        child, side = f"{parent}.{last}" if last else None, Side.INPUT
    else:
        child, side = _start_of_second_half(block, mlp), Side.INPUT
    if child is None:
        raise SaekitError(
            f"{name} has no counterpart in {type(block).__name__}, which has no submodule that takes or gives "
            f"that tensor alone; read the block's :in or :out, or one of its children: {', '.join(children)}"
        )
    return child, side


def _start_of_second_half(block: nn.Module, mlp: str | None) -> str | None:
    """Whose input is the stream between attention and MLP; None where there is none.

    Attention and MLP may run side by side (GPT-NeoX), and norms may come after what they belong to (OPT-350m).
    """
    if getattr(block, "use_parallel_residual", False) or not getattr(block, "do_layer_norm_before", True):
        return None
    # blocks that norm only what they add hand the MLP the stream itself
    if _child(block, ("post_feedforward_layernorm",)) and not _child(block, ("pre_feedforward_layernorm",)):
        return mlp
    return _child(block, _SECOND_NORM)


def _apart_from_stream(children: Mapping[str, nn.Module], name: str | None) -> str | None:
    """The child, unless it adds the residual stream to its output itself, as Bloom's and BERT's do."""
    if name is None:
        return None
    takes_stream = "residual" in inspect.signature(children[name].forward).parameters
    return None if takes_stream or "output.LayerNorm" in dict(children[name].named_modules()) else name


def _child(module: nn.Module, names: tuple[str, ...]) -> str | None:
    children = dict(module.named_children())
    return next((name for name in names if name in children), None)


def _names_like(name: str, blocks: str | None, model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """Every right name, in the spelling that was used."""
    known = {*modules, *getattr(model, "hook_dict", {})}
    if blocks is None:
        return known
    if name.startswith(("blocks.", "hook_")) and blocks != "blocks":
        members = range(len(list(model.get_submodule(blocks).children())))
        return {f"blocks.{index}.{hook}" for index in members for hook in _HOOKS} | {"hook_embed"}
    spelled = re.match(r"(.+?)\.[0-9]+(\.|$)", name)
    if spelled and _BLOCK_SPELLINGS.match(name):
        known |= {spelled[1] + path.removeprefix(blocks) for path in modules if path.startswith(f"{blocks}.")}
    return known
