"""Which features bring about which: edges between the features of several Sites, through the model.

Each SAE's activation is taken apart, `y = (what its features write) + error`, and each part becomes a leaf of the
computation: its value is what it was, and the gradient stops there. So the derivative of a later feature by an
earlier one is of the paths between them that pass no Site in between, the sparse feature circuits of Marks et al.,
arXiv 2403.19647; through a transcoder the path is that of its features, not of the module it stands for.

    gradient(u)  =  d metric / d u  +  sum over later nodes v of  dv / du * gradient(v)
    effect(u)    =  change(u) * gradient(u)                    as attribution patching has it
    edge(u, v)   =  change(u) * dv / du * gradient(v)          the part of u's effect that goes by way of v

so that the edges that leave a node add up to its effect, and effects add up to the first-order effect of changing
everything. Error nodes take part like features where there is another prompt to take errors from; in a circuit of
ablations errors are no nodes, and what goes by way of them counts as direct. What is approximate is what gradients
are: check a circuit with `saekit.patching.circuit_check` before believing it.

A circuit of one prompt has a node per token; one of a behaviour that many prompts share has a node per feature, which
stands for it at all tokens of all of them, and its effects and edges are means over prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.codes import SparseCodes
from saekit.errors import SaekitError, ShapeError
from saekit.patching.effects import (
    EVERYWHERE,
    Prompts,
    check_one_call,
    check_prompts,
    check_same_places,
    read_prompts,
)
from saekit.patching.metric import Metric
from saekit.patching.splice import SAEs, check_apart, in_order, meet, place_saes, write
from saekit.patching.tokens import Grid, TokenMask, grid_of
from saekit.sae import SAE
from saekit.targets import Site, Target
from saekit.targets.passes import Passes
from saekit.targets.target import Edit

ERROR = -1
"""As a feature: what the SAE does not reconstruct of a token."""
METRIC = -1
"""As the target of an edge: what follows without passing another node."""


@dataclass(frozen=True, slots=True)
class CircuitNode:
    """One feature, or the error, at one token of one Site, or at all of them.

    Attributes:
        site: index into the circuit's Sites.
        position: in the prompt, or `EVERYWHERE`.
        feature: or `ERROR`.
        strength: of the feature in the prompt, or its mean over the tokens where it is active; 0 for an error.
        effect: attributed effect on the metric of changing it, in the mean over prompts.
    """

    site: int
    position: int
    feature: int
    strength: float
    effect: float


@dataclass(frozen=True, slots=True)
class CircuitEdge:
    """The part of the source's effect that goes directly to the target: an index of a node, or `METRIC`."""

    source: int
    target: int
    weight: float


@dataclass(frozen=True, slots=True)
class Circuit:
    """The nodes with the largest effects, and the edges between them.

    Attributes:
        sites: in the order of the pass.
        nodes: by Site, position and feature.
        edges: all between these nodes and to the metric that are not 0.
        effect: the sum of the effects of all nodes there are, kept or not.
    """

    sites: tuple[Site, ...]
    nodes: tuple[CircuitNode, ...]
    edges: tuple[CircuitEdge, ...]
    effect: float

    def pruned(self, least: float) -> "Circuit":
        """The same without edges of less than this share of the sum of effects, in absolute value."""
        bound = least * abs(self.effect)
        return Circuit(self.sites, self.nodes, tuple(e for e in self.edges if abs(e.weight) >= bound), self.effect)


@dataclass(slots=True)
class _Cut:
    """One Site of the pass: what came in, and the leaves that went on.

    Attributes:
        before: codes as computed, attached to what they were computed from.
        error_before: the same of what the features do not write, `(n kept, d_out)`.
        strengths, error: what went on, leaves with the same values; the error as it came in where it is no node.
        change, error_change: what they would become on the other prompt, less what they are.
    """

    site: Site
    grid: Grid
    before: SparseCodes
    error_before: Tensor
    strengths: Tensor
    error: Tensor
    change: Tensor
    error_change: Tensor


def trace_circuit(
    target: Target,
    saes: SAEs,
    ids: Int[Tensor, "prompts context"],
    metric: Metric,
    *,
    other_ids: Int[Tensor, "_ _"] | None = None,
    n_nodes: int = 60,
    everywhere: bool = False,
    mask: MaskPolicy | TokenMask = MaskPolicy(),
) -> Circuit:
    """The circuit behind a metric on one prompt, or on several.

    Args:
        other_ids: the prompts that changes lead to; without them a feature's change is its ablation, and errors stay.
        n_nodes: how many to keep, of all Sites together, by the size of their effect.
        everywhere: a node is a feature at all its tokens; needed for several prompts, whose tokens mean nothing
            to each other.

    Raises:
        SaekitError: no SAE, two for one tensor or one for every call (`@*`); fewer than one node; nothing that has an
            effect.
        ShapeError: several prompts without `everywhere`, or other prompts of another number or length.
    """
    placed = place_saes(saes)
    check_prompts(target, ids)
    check_apart(target, placed)
    for site in placed:
        check_one_call(site)
    if not placed or n_nodes < 1:
        raise SaekitError(f"{len(placed)} SAEs and {n_nodes} nodes make no circuit; give at least one of each")
    if len(ids) != 1 and not everywhere:
        raise ShapeError(
            f"{len(ids)} prompts are given, and a circuit with positions is of one; trace them one by one, or pass "
            "everywhere=True"
        )
    tokens = TokenMask.of(target, mask)
    others = read_others(target, placed, ids, other_ids, tokens)
    with torch.enable_grad():
        cuts, value = _cut_pass(target, placed, others, ids, metric, tokens)
        gradients = _total_gradients(cuts, value)
        nodes = [
            node
            for k, (cut, found) in enumerate(zip(cuts, gradients, strict=True))
            for node in _nodes(k, cut, found, everywhere=everywhere)
        ]
        total = sum(node.effect for node, _ in nodes)
        nodes = sorted(nodes, key=lambda one: -abs(one[0].effect))[:n_nodes]
        nodes = sorted(
            (one for one in nodes if one[0].effect), key=lambda one: (one[0].site, one[0].position, one[0].feature)
        )
        if not nodes:
            raise SaekitError(
                f"no feature at {', '.join(map(str, placed))} has an effect on the metric"
                f"{'' if other_ids is None else ' by being as on the other prompts'}; choose other prompts or Sites"
            )
        edges = _edges(cuts, gradients, nodes, value)
    return Circuit(tuple(cut.site for cut in cuts), tuple(node for node, _ in nodes), edges, total)


def read_others(
    target: Target, placed: Mapping[Site, SAE], ids: Tensor, other_ids: Tensor | None, tokens: TokenMask
) -> dict[Site, Prompts] | None:
    """What the SAEs see of the other prompt; None without one."""
    if other_ids is None:
        return None
    check_same_places(ids, other_ids)
    return {site: read_prompts(target, sae, site, other_ids, mask=tokens) for site, sae in placed.items()}


def _cut_pass(
    target: Target,
    placed: Mapping[Site, SAE],
    others: Mapping[Site, Prompts] | None,
    ids: Tensor,
    metric: Metric,
    tokens: TokenMask,
) -> tuple[list[_Cut], Tensor]:
    passes, cuts = Passes(), []
    met: dict[Site, tuple[Grid, Tensor, SparseCodes]] = {}

    def read_at(site: Site, sae: SAE) -> Edit:
        def read(x: Tensor) -> Tensor:
            here = meet(sae, x, grid_of(x, site, passes, tokens), site=site, edit=None)
            met[site] = here.grid, here.rows.detach(), here.codes.active()
            return x

        return read

    def write_at(site: Site, sae: SAE) -> Edit:
        def go_on(y: Tensor) -> Tensor:
            grid, rows, codes = met[site]
            keep = grid.keep.reshape(y.shape[:-1])
            cut = _cut(site, sae, grid, rows, codes, y[keep].to(rows), None if others is None else others[site])
            cuts.append(cut)
            output = y.clone()
            output[keep] = (write(cut.before.with_values(cut.strengths), sae, rows) + cut.error).to(y)
            return output

        return go_on

    with target.editing(in_order(target, placed, read_at, write_at), passes=passes):
        value = metric(target.run(ids), torch.arange(len(ids))).mean()
    return cuts, value


def _cut(site: Site, sae: SAE, grid: Grid, rows: Tensor, codes: SparseCodes, y: Tensor, other: Prompts | None) -> _Cut:
    error_before = y - write(codes, sae, rows)
    if other is None:
        before, change, error_change = codes, -codes.values.detach(), torch.zeros_like(y.detach())
    else:
        places = grid.keep.flatten().nonzero()[:, 0]
        there = other.codes.select(places).active()
        before = _with_entries_of(codes, there)
        change = there_at(there, before) - before.values.detach()
        error_there = other.vectors.flatten(0, 1)[places].to(rows) - write(there, sae, rows)
        error_change = (error_there - error_before).detach()
    error = error_before if other is None else error_before.detach().requires_grad_()
    strengths = before.values.detach().requires_grad_()
    return _Cut(site, grid, before, error_before, strengths, error, change.detach(), error_change)


def _with_entries_of(codes: SparseCodes, other: SparseCodes) -> SparseCodes:
    """The same codes with entries of strength 0 where only the other ones have any."""
    keys, theirs = keys_of(codes), keys_of(other)
    new = theirs[~torch.isin(theirs, keys)]
    every = torch.cat([keys, new])
    values = torch.cat([codes.values, codes.values.new_zeros(len(new))])
    return SparseCodes.from_pairs(
        every // codes.n_features,
        every % codes.n_features,
        values,
        n_tokens=codes.n_tokens,
        n_features=codes.n_features,
    )


def keys_of(codes: SparseCodes) -> Int[Tensor, " nnz"]:
    """(token, feature) of each entry as one number."""
    return codes.token_of_entry() * codes.n_features + codes.features


def there_at(there: SparseCodes, entries: SparseCodes) -> Float[Tensor, " nnz"]:
    """Strength in `there` of each of the entries, which hold all of its own."""
    found = torch.searchsorted(keys_of(entries), keys_of(there))
    return there.values.new_zeros(len(entries.values)).index_put((found,), there.values)


def _total_gradients(cuts: list[_Cut], value: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of the metric by strengths and errors of each Site, over all paths, from the last Site back."""
    gradients: dict[int, tuple[Tensor, Tensor]] = {}
    for k in reversed(range(len(cuts))):
        through = value
        for j, (by_strength, by_error) in gradients.items():
            through = through + (cuts[j].before.values * by_strength).sum() + (cuts[j].error_before * by_error).sum()
        gradients[k] = _gradient(through, cuts[k])
    return [gradients[k] for k in range(len(cuts))]


def _gradient(value: Tensor, cut: _Cut) -> tuple[Tensor, Tensor]:
    leaves = (cut.strengths, cut.error) if cut.error.is_leaf else (cut.strengths,)
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    by_leaf = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
    return by_leaf[0], by_leaf[1] if len(by_leaf) > 1 else torch.zeros_like(cut.error)


# a node with its places among the entries of its Site, or among the tokens for an error
_Placed = tuple[CircuitNode, Tensor]


def _nodes(number: int, cut: _Cut, gradients: tuple[Tensor, Tensor], *, everywhere: bool) -> list[_Placed]:
    by_strength, by_error = gradients
    column = cut.grid.kept()[1].to(cut.before.device)
    position = torch.full_like(column, EVERYWHERE) if everywhere else column
    effect = cut.change.double() * by_strength.double()
    of_error = (cut.error_change.double() * by_error.double()).sum(-1)
    nodes: list[_Placed] = []
    for key, places in _grouped(node_key(position[cut.before.token_of_entry()], cut.before.features, cut.before)):
        at, feature = divmod(key, cut.before.n_features)
        strengths = cut.strengths[places].detach()
        mean = strengths.sum() / (strengths > 0).sum().clamp(min=1)
        nodes.append((CircuitNode(number, at - 1, feature, float(mean), float(effect[places].sum())), places))
    for at, places in _grouped(position):
        nodes.append((CircuitNode(number, at, ERROR, 0.0, float(of_error[places].sum())), places))
    return nodes


def node_key(position: Tensor, features: Tensor, codes: SparseCodes) -> Int[Tensor, " n"]:
    """(position, feature) as one number; the feature itself where the position is `EVERYWHERE`."""
    return (position + 1) * codes.n_features + features


def _grouped(keys: Int[Tensor, " n"]) -> list[tuple[int, Tensor]]:
    """Each key once, with all places that have it."""
    found, group, count = keys.unique(return_inverse=True, return_counts=True)
    return list(zip(found.tolist(), group.argsort(stable=True).split(count.tolist()), strict=True))


def _edges(
    cuts: list[_Cut], gradients: list[tuple[Tensor, Tensor]], nodes: list[_Placed], value: Tensor
) -> tuple[CircuitEdge, ...]:
    """One backward pass per target."""
    edges: list[CircuitEdge] = []
    targets = [(METRIC, len(cuts), value)]
    for i, (node, places) in enumerate(nodes):
        cut, (by_strength, by_error) = cuts[node.site], gradients[node.site]
        if node.feature == ERROR:
            share = (cut.error_before[places] * by_error[places]).sum()
        else:
            share = (cut.before.values[places] * by_strength[places]).sum()
        targets.append((i, node.site, share))
    for i, site, share in targets:
        if not share.requires_grad:
            continue
        by_leaf = [_gradient(share, cut) for cut in cuts[:site]]
        for j, (source, places) in enumerate(nodes):
            if source.site < site:
                weight = _weight(cuts[source.site], by_leaf[source.site], source, places)
                edges += [CircuitEdge(j, i, weight)] if weight else []
    return tuple(sorted(edges, key=lambda edge: (edge.source, edge.target)))


def _weight(cut: _Cut, gradients: tuple[Tensor, Tensor], source: CircuitNode, places: Tensor) -> float:
    by_strength, by_error = gradients
    if source.feature == ERROR:
        return float((cut.error_change[places].double() * by_error[places].double()).sum())
    return float((cut.change[places].double() * by_strength[places].double()).sum())
