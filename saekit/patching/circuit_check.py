"""Does a circuit bring its metric about? Run the model with it, and without it.

In a pass `with` some nodes, these go on as they are computed, and all else at the spliced Sites is as on the other
prompt (or features at 0, errors as they are, if there is none). A feature that is active on neither prompt, and wakes
only because others are missing, is no node. Shares are of the way from nothing to everything:

    faithful  = (with the circuit - with nothing) / (untouched - with nothing)
    complete  = 1 - (with all but the circuit - with nothing) / (untouched - with nothing)

1 is the ideal of both (Marks et al., arXiv 2403.19647, whose completeness is 1 minus ours). Of several prompts it is
the mean of the metric that counts. A circuit of features everywhere can be checked on other prompts than those it was
traced on, and should be.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.errors import SaekitError
from saekit.patching.circuits import ERROR, Circuit, CircuitNode, keys_of, node_key, read_others
from saekit.patching.effects import EVERYWHERE, Prompts, read_prompts
from saekit.patching.metric import Metric
from saekit.patching.splice import Encoded, SAEs, check_apart, in_order, meet, place_saes, write
from saekit.patching.tokens import TokenMask, grid_of
from saekit.sae import SAE
from saekit.targets import Site, Target
from saekit.targets.passes import Passes
from saekit.targets.target import Edit


@dataclass(frozen=True, slots=True)
class _Nodes:
    """Nodes of one Site.

    Attributes:
        features: keys of (token that counts, feature), `(n,)`.
        errors: `(tokens that count,)` where the error is one.
    """

    features: Int[Tensor, " n"]
    errors: Bool[Tensor, " tokens"]

    def but(self, other: "_Nodes") -> "_Nodes":
        """These without the other ones."""
        return _Nodes(self.features[~torch.isin(self.features, other.features)], self.errors & ~other.errors)


@dataclass(frozen=True, slots=True)
class CircuitShares:
    """How much of the metric a circuit accounts for; `effect` is untouched less nothing, in the metric's units."""

    faithful: float
    complete: float
    effect: float


@torch.no_grad()
def check_circuit(
    target: Target,
    saes: SAEs,
    ids: Int[Tensor, "prompts context"],
    metric: Metric,
    circuit: Circuit,
    *,
    other_ids: Int[Tensor, "_ _"] | None = None,
    mask: MaskPolicy | TokenMask = MaskPolicy(),
) -> CircuitShares:
    """Four edited passes; arguments as those that the circuit was traced with.

    Raises:
        SaekitError: changing every node leaves the metric as it is; two SAEs for one tensor.
    """
    placed, tokens = place_saes(saes), TokenMask.of(target, mask)
    check_apart(target, placed)
    others = read_others(target, placed, ids, other_ids, tokens)
    every: dict[Site, _Nodes] = {}
    chosen: dict[Site, _Nodes] = {}
    for site, sae in placed.items():
        nodes = [node for node in circuit.nodes if circuit.sites[node.site] == site]
        own = read_prompts(target, sae, site, ids, mask=tokens)
        every[site], chosen[site] = _every_and_chosen(own, None if others is None else others[site], nodes)

    def value(nodes: Mapping[Site, _Nodes]) -> float:
        passes = Passes()
        with target.editing(_edits(target, placed, others, tokens, passes, nodes), passes=passes):
            return float(metric(target.run(ids), torch.arange(len(ids))).double().mean())

    none, whole = value({site: nodes.but(nodes) for site, nodes in every.items()}), value(every)
    if abs(whole - none) <= 1e-6 * max(abs(whole), abs(none)):
        raise SaekitError(
            f"the metric is {none:.4g} with every node of the circuit's Sites and with none; choose other Sites or "
            "prompts"
        )
    alone, without = value(chosen), value({site: nodes.but(chosen[site]) for site, nodes in every.items()})
    return CircuitShares((alone - none) / (whole - none), 1 - (without - none) / (whole - none), whole - none)


def _every_and_chosen(own: Prompts, other: Prompts | None, nodes: list[CircuitNode]) -> tuple[_Nodes, _Nodes]:
    """Every error, and every feature that is active on one of the two sides; and those of them that are named."""
    places = own.grid.keep.flatten().nonzero()[:, 0]
    sides = [own] if other is None else [own, other]
    keys = torch.cat([keys_of(side.codes.select(places).active()) for side in sides]).unique()
    column = own.grid.kept()[1].to(keys.device)
    features = keys % own.codes.n_features
    at = node_key(column[keys // own.codes.n_features], features, own.codes)
    position, feature = (
        torch.tensor([getattr(node, what) for node in nodes], dtype=torch.int64, device=keys.device)
        for what in ("position", "feature")
    )
    is_error = feature == ERROR
    named = node_key(position, feature, own.codes)[~is_error]
    with_error = position[is_error]
    of_token = torch.isin(column, with_error) | (with_error == EVERYWHERE).any()
    chosen = _Nodes(keys[torch.isin(at, named) | torch.isin(features, named)], of_token)
    return _Nodes(keys, torch.ones_like(of_token)), chosen


def _edits(
    target: Target,
    placed: Mapping[Site, SAE],
    others: Mapping[Site, Prompts] | None,
    tokens: TokenMask,
    passes: Passes,
    nodes: Mapping[Site, _Nodes],
) -> dict[Site, Edit]:
    met: dict[Site, Encoded] = {}

    def read_at(site: Site, sae: SAE) -> Edit:
        def read(x: Tensor) -> Tensor:
            here = meet(sae, x, grid_of(x, site, passes, tokens), site=site, edit=None)
            met[site] = Encoded(site, sae, here.grid, here.rows, here.codes.active())
            return x

        return read

    def write_at(site: Site, sae: SAE) -> Edit:
        def go_on(y: Tensor) -> Tensor:
            here = met[site]
            keep = here.grid.keep.reshape(y.shape[:-1])
            output = y.clone()
            output[keep] = _mixed(
                here, y[keep].to(here.rows), None if others is None else others[site], nodes[site]
            ).to(y)
            return output

        return go_on

    return in_order(target, placed, read_at, write_at)


def _mixed(here: Encoded, y: Tensor, other: Prompts | None, nodes: _Nodes) -> Tensor:
    """Chosen nodes as they are, the rest as on the other prompts."""
    kept = here.codes.where(torch.isin(keys_of(here.codes), nodes.features))
    error = y - write(here.codes, here.sae, here.rows)
    if other is None:
        return write(kept, here.sae, here.rows) + error
    places = here.grid.keep.flatten().nonzero()[:, 0]
    there = other.codes.select(places).active()
    error_there = other.vectors.flatten(0, 1)[places].to(y) - write(there, here.sae, here.rows)
    there = there.where(~torch.isin(keys_of(there), nodes.features))
    written = write(kept, here.sae, here.rows) + write(there, here.sae, here.rows)
    return written + torch.where(nodes.errors[:, None], error, error_there)
