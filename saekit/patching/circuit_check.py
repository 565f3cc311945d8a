"""Does a circuit bring its metric about? Run the model with it, and without it.

In a pass `with` some nodes, these go on as they are computed, and all else at the spliced Sites is as on the other
prompt (or features at 0, errors as they are, if there is none). A feature that is active on neither prompt, and wakes
only because others are missing, is no node. Shares are of the way from nothing to everything:

    faithful  = (with the circuit - with nothing) / (untouched - with nothing)
    complete  = 1 - (with all but the circuit - with nothing) / (untouched - with nothing)

1 is the ideal of both (Marks et al., arXiv 2403.19647, whose completeness is 1 minus ours).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.errors import SaekitError
from saekit.patching.circuits import ERROR, Circuit, keys_of, read_others
from saekit.patching.effects import Prompts, read_prompts
from saekit.patching.metric import Metric
from saekit.patching.splice import Encoded, SAEs, in_order, meet, place_saes, write
from saekit.patching.tokens import TokenMask, grid_of
from saekit.sae import SAE
from saekit.targets import Site, Target
from saekit.targets.passes import Passes
from saekit.targets.target import Edit

Nodes = set[tuple[int, int]]
"""Of one Site, as (position, feature or `ERROR`)."""


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
        SaekitError: changing every node leaves the metric as it is.
    """
    placed, tokens = place_saes(saes), TokenMask.of(target, mask)
    others = read_others(target, placed, ids, other_ids, tokens)
    every = _every_node(target, placed, others, ids, tokens)
    chosen: dict[Site, Nodes] = {site: set() for site in placed}
    for node in circuit.nodes:
        chosen[circuit.sites[node.site]].add((node.position, node.feature))

    def value(nodes: Mapping[Site, Nodes]) -> float:
        passes = Passes()
        with target.editing(_edits(target, placed, others, tokens, passes, nodes), passes=passes):
            return float(metric(target.run(ids), torch.zeros(1, dtype=torch.int64))[0])

    none, whole = value({site: set() for site in placed}), value(every)
    if abs(whole - none) <= 1e-6 * max(abs(whole), abs(none)):
        raise SaekitError(
            f"the metric is {none:.4g} with every node of the circuit's Sites and with none; choose other Sites or "
            "prompts"
        )
    alone, without = value(chosen), value({site: nodes - chosen[site] for site, nodes in every.items()})
    return CircuitShares((alone - none) / (whole - none), 1 - (without - none) / (whole - none), whole - none)


def _every_node(
    target: Target, placed: Mapping[Site, SAE], others: Mapping[Site, Prompts] | None, ids: Tensor, tokens: TokenMask
) -> dict[Site, Nodes]:
    """Every error, and every feature that is active on one of the two prompts."""
    every: dict[Site, Nodes] = {}
    for site, sae in placed.items():
        own = read_prompts(target, sae, site, ids, mask=tokens)
        active = [own.active()] if others is None else [own.active(), others[site].active()]
        every[site] = {(int(position), ERROR) for position in own.grid.kept()[1]}
        for found in active:
            every[site] |= set(zip(found.position.tolist(), found.feature.tolist(), strict=True))
    return every


def _edits(
    target: Target,
    placed: Mapping[Site, SAE],
    others: Mapping[Site, Prompts] | None,
    tokens: TokenMask,
    passes: Passes,
    nodes: Mapping[Site, Nodes],
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


def _mixed(here: Encoded, y: Tensor, other: Prompts | None, nodes: Nodes) -> Tensor:
    """Chosen nodes as they are, the rest as on the other prompt."""
    _, column = here.grid.kept()
    token_at = {int(position): token for token, position in enumerate(column)}
    n_features = here.sae.n_features
    features = [token_at[p] * n_features + f for p, f in nodes if f != ERROR]
    errors = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    errors[[token_at[p] for p, f in nodes if f == ERROR]] = True
    keys = torch.tensor(sorted(features), dtype=torch.int64, device=y.device)
    kept = here.codes.where(torch.isin(keys_of(here.codes), keys))
    error = y - write(here.codes, here.sae, here.rows)
    if other is None:
        return write(kept, here.sae, here.rows) + error
    places = here.grid.keep.flatten().nonzero()[:, 0]
    there = other.codes.select(places).active()
    error_there = other.vectors.flatten(0, 1)[places].to(y) - write(there, here.sae, here.rows)
    there = there.where(~torch.isin(keys_of(there), keys))
    written = write(kept, here.sae, here.rows) + write(there, here.sae, here.rows)
    return written + torch.where(errors[:, None], error, error_there)
