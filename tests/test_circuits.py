"""Circuits between SAEs: edges add up to effects, effects to the gradient, and the check runs the model for good."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_models import FIRST, IDS, SECOND, TOKENS, WIDTH, hooks, sae_of, tiny_llama

from saekit.errors import SaekitError, ShapeError
from saekit.patching.attribution import attribute
from saekit.patching.circuit_check import check_circuit
from saekit.patching.circuits import ERROR, METRIC, Circuit, trace_circuit
from saekit.patching.effects import EVERYWHERE, read_prompts
from saekit.patching.metric import LogitDifference
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import Threshold, TopK
from saekit.targets import Side, Site, Target

THIRD, READ, WRITTEN = Site("layers.2"), Site("layers.1.mlp", Side.INPUT), Site("layers.1.mlp")
OWN, OTHER = IDS[:1], IDS[1:]
METRIC_OF = LogitDifference(torch.tensor([3]), torch.tensor([5]), torch.tensor([IDS.shape[1] - 1]))


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.wrap(tiny_llama())


def transcoder() -> SAE:
    cfg = SAEConfig(
        d_in=WIDTH, d_sae=40, d_out=WIDTH, apply_b_dec_to_input=False, hook_name=str(READ), hook_name_out=str(WRITTEN)
    )
    return SAE(WIDTH, 40, Threshold(0.1), cfg=cfg)


SETS = {
    "two saes": lambda: {FIRST: sae_of(TopK(5)), SECOND: sae_of(Threshold(0.3), seed=1)},
    "three saes": lambda: {SECOND: sae_of(TopK(5), seed=1), FIRST: sae_of(TopK(5)), THIRD: sae_of(TopK(6), seed=2)},
    "a transcoder between": lambda: {FIRST: sae_of(TopK(5)), READ: transcoder(), SECOND: sae_of(TopK(5), seed=1)},
}


@pytest.fixture(params=SETS)
def saes(request) -> dict[Site, SAE]:
    return SETS[request.param]()


@pytest.fixture(params=[None, OTHER], ids=["ablation", "patching"])
def other_ids(request):
    return request.param


def whole(target, saes, other_ids) -> Circuit:
    return trace_circuit(target, saes, OWN, METRIC_OF, other_ids=other_ids, n_nodes=10_000, mask=TOKENS)


def test_the_edges_that_leave_a_node_add_up_to_its_effect(target, saes, other_ids):
    circuit = whole(target, saes, other_ids)
    leaving = torch.zeros(len(circuit.nodes), dtype=torch.float64)
    for edge in circuit.edges:
        leaving[edge.source] += edge.weight
    effects = torch.tensor([node.effect for node in circuit.nodes], dtype=torch.float64)
    torch.testing.assert_close(leaving, effects, rtol=1e-3, atol=1e-6)
    assert effects.abs().max() > 1e-3 and float(effects.sum()) == pytest.approx(circuit.effect)
    assert hooks(target.model) == 0
    between = [edge for edge in circuit.edges if edge.target != METRIC]
    assert between and all(circuit.nodes[e.source].site < circuit.nodes[e.target].site for e in between)


def test_effects_are_those_of_attribution_patching(target, saes, other_ids):
    """For autoencoders exactly: taken apart and put together again, a Site has the gradient it had."""
    circuit = whole(target, saes, other_ids)
    for number, site in enumerate(circuit.sites):
        if saes[site].is_transcoder:
            continue
        other = None if other_ids is None else read_prompts(target, saes[site], site, other_ids, mask=TOKENS)
        found = attribute(target, saes[site], site, OWN, METRIC_OF, other=other, mask=TOKENS)
        want = {
            (p, f): e
            for p, f, e in zip(
                found.at.position.tolist(), found.at.feature.tolist(), found.effect.tolist(), strict=True
            )
            if e
        }
        got = {(n.position, n.feature): n.effect for n in circuit.nodes if n.site == number and n.feature != ERROR}
        assert got == pytest.approx(want, rel=1e-3, abs=1e-6)
        errors = {n.position: n.effect for n in circuit.nodes if n.site == number and n.feature == ERROR}
        assert errors == pytest.approx({p: e for p, e in enumerate(found.error[0].tolist()) if e}, rel=1e-3, abs=1e-6)


def test_an_edge_is_the_derivative_of_a_feature_by_an_earlier_one(target):
    """By differences: nudge one feature of the first Site, and see what becomes of one of the second."""
    saes = SETS["two saes"]()
    circuit = whole(target, saes, None)
    edge = max(
        (e for e in circuit.edges if e.target != METRIC and circuit.nodes[e.target].feature != ERROR),
        key=lambda e: abs(e.weight),
    )
    source, sink = circuit.nodes[edge.source], circuit.nodes[edge.target]
    step = 1e-2

    def strength(sign: float) -> float:
        def nudge(x):
            change = torch.zeros_like(x)
            change[0, source.position] = sign * step * saes[FIRST].decoder[source.feature]
            return x + change

        with target.editing({FIRST: nudge}), torch.no_grad():
            x = target.read(OWN, [SECOND])[SECOND]
        return float(saes[SECOND].encode(x[0]).to_dense()[sink.position, sink.feature].detach())

    slope = (strength(1) - strength(-1)) / (2 * step)
    gradient = sink.effect / -sink.strength
    assert edge.weight == pytest.approx(-source.strength * slope * gradient, rel=2e-2)


def test_everything_is_faithful_and_complete_and_nothing_is_neither(target, saes, other_ids):
    circuit = whole(target, saes, other_ids)
    shares = check_circuit(target, saes, OWN, METRIC_OF, circuit, other_ids=other_ids, mask=TOKENS)
    assert (shares.faithful, shares.complete) == pytest.approx((1, 1), abs=2e-2)
    nothing = replace(circuit, nodes=(), edges=())
    shares = check_circuit(target, saes, OWN, METRIC_OF, nothing, other_ids=other_ids, mask=TOKENS)
    assert (shares.faithful, shares.complete) == pytest.approx((0, 0), abs=1e-6)


@torch.no_grad()
def test_without_any_node_the_metric_is_that_of_the_other_prompt(target):
    """The last Site alone decides the logits of the tokens that count."""
    saes = {THIRD: sae_of(TopK(5))}
    circuit = replace(whole(target, saes, OTHER), nodes=())
    found = check_circuit(target, saes, OWN, METRIC_OF, circuit, other_ids=OTHER, mask=TOKENS)
    own, other = (float(METRIC_OF(target.run(ids), torch.tensor([0]))) for ids in (OWN, OTHER))
    assert found.effect == pytest.approx(own - other, abs=1e-4)


@torch.no_grad()
def test_a_part_of_a_site_is_patched_as_by_hand(target):
    sae = sae_of(TopK(5))
    circuit = trace_circuit(target, {THIRD: sae}, OWN, METRIC_OF, other_ids=OTHER, n_nodes=4, mask=TOKENS)
    own, other = (target.read(ids, [THIRD])[THIRD][0] for ids in (OWN, OTHER))
    codes, theirs = (sae.encode(x).to_dense() for x in (own, other))
    error, their_error = own - codes @ sae.decoder, other - theirs @ sae.decoder

    def value(chosen) -> float:
        mixed, rest = theirs.clone(), their_error.clone()
        for position, feature in chosen:
            if feature == ERROR:
                rest[position] = error[position]
            else:
                mixed[position, feature] = codes[position, feature]
        x = mixed @ sae.decoder + rest
        x[0] = own[0]
        return float(METRIC_OF(target.run(OWN, edits={THIRD: lambda _: x[None]}), torch.tensor([0])))

    every = {(p, f) for p in range(1, 5) for f in range(-1, sae.n_features)}
    chosen = {(node.position, node.feature) for node in circuit.nodes}
    none, whole = value(set()), value(every)
    found = check_circuit(target, {THIRD: sae}, OWN, METRIC_OF, circuit, other_ids=OTHER, mask=TOKENS)
    assert found.faithful == pytest.approx((value(chosen) - none) / (whole - none), abs=1e-4)
    assert found.complete == pytest.approx(1 - (value(every - chosen) - none) / (whole - none), abs=1e-4)
    assert {f == ERROR for _, f in chosen} == {True, False} and abs(found.faithful) > 1e-2


def test_few_nodes_are_the_largest_and_pruning_drops_small_edges(target):
    saes = SETS["three saes"]()
    every, few = (
        whole(target, saes, OTHER),
        trace_circuit(target, saes, OWN, METRIC_OF, other_ids=OTHER, n_nodes=8, mask=TOKENS),
    )
    assert len(few.nodes) == 8 and few.effect == pytest.approx(every.effect)
    assert min(abs(n.effect) for n in few.nodes) >= sorted(abs(n.effect) for n in every.nodes)[-8] - 1e-9
    weights = sorted(abs(e.weight) for e in few.edges)
    pruned = few.pruned(weights[len(weights) // 2] / abs(few.effect))
    assert 0 < len(pruned.edges) < len(few.edges) and pruned.nodes == few.nodes


# --- of features, over prompts


def as_dicts(circuit: Circuit) -> tuple[dict, dict]:
    """Effects by (Site, feature), and edges by both ends, positions added up."""
    nodes = [(node.site, node.feature) for node in circuit.nodes]
    effects, edges = Counter(), Counter()
    for name, node in zip(nodes, circuit.nodes, strict=True):
        effects[name] += node.effect
    for edge in circuit.edges:
        edges[nodes[edge.source], METRIC if edge.target == METRIC else nodes[edge.target]] += edge.weight
    return dict(effects), dict(edges)


@pytest.mark.parametrize("patched", [False, True], ids=["ablation", "patching"])
def test_a_circuit_of_features_is_the_mean_over_prompts_of_those_with_positions(target, patched):
    saes, other_ids = SETS["two saes"](), IDS.flip(0) if patched else None
    metric = LogitDifference(torch.tensor([3, 2]), torch.tensor([5, 7]), torch.tensor([4, 3]))
    together = trace_circuit(
        target, saes, IDS, metric, other_ids=other_ids, n_nodes=10_000, everywhere=True, mask=TOKENS
    )
    assert {node.position for node in together.nodes} == {EVERYWHERE}
    effects, edges = Counter(), Counter()
    for i in range(2):
        alone = LogitDifference(*(side[i : i + 1] for side in (metric.right, metric.wrong, metric.position)))
        other = None if other_ids is None else other_ids[i : i + 1]
        one = trace_circuit(target, saes, IDS[i : i + 1], alone, other_ids=other, n_nodes=10_000, mask=TOKENS)
        for total, found in zip((effects, edges), as_dicts(one), strict=True):
            total.update({key: value / 2 for key, value in found.items()})
    got_effects, got_edges = as_dicts(together)
    assert got_effects == pytest.approx(dict(effects), rel=1e-3, abs=1e-6) and len(effects) > 20
    assert {k: got_edges.get(k, 0) for k in edges} == pytest.approx(dict(edges), rel=1e-3, abs=1e-6)
    assert len(edges) > 100 and max(map(abs, edges.values())) > 1e-3


def test_a_circuit_of_features_is_checked_on_all_prompts_at_once(target):
    saes, other_ids = SETS["two saes"](), IDS.flip(0)
    metric = LogitDifference(torch.tensor([3, 2]), torch.tensor([5, 7]), torch.tensor([4, 3]))
    circuit = trace_circuit(target, saes, IDS, metric, other_ids=other_ids, n_nodes=9, everywhere=True, mask=TOKENS)
    found = check_circuit(target, saes, IDS, metric, circuit, other_ids=other_ids, mask=TOKENS)
    alone = []
    for i in range(2):
        one = LogitDifference(*(side[i : i + 1] for side in (metric.right, metric.wrong, metric.position)))
        own, other = IDS[i : i + 1], other_ids[i : i + 1]
        spread = [
            replace(node, position=at) for node in circuit.nodes for at in range(5)
        ]  # a feature everywhere is the feature at each place
        by_place = replace(circuit, nodes=tuple(spread))
        alone.append(check_circuit(target, saes, own, one, by_place, other_ids=other, mask=TOKENS))
    effect = sum(one.effect for one in alone) / 2
    assert found.effect == pytest.approx(effect, abs=1e-5)
    for share in ("faithful", "complete"):
        want = sum(getattr(one, share) * one.effect for one in alone) / 2
        assert getattr(found, share) * found.effect == pytest.approx(want, abs=1e-4) and abs(want) > 1e-3


def test_what_makes_no_circuit_is_refused(target):
    saes = SETS["two saes"]()
    with pytest.raises(
        ShapeError, match=r"2 prompts are given, and a circuit with positions is of one; trace them one by one, or"
    ):
        trace_circuit(target, saes, IDS, METRIC_OF, mask=TOKENS)
    with pytest.raises(SaekitError, match=r"2 SAEs and 0 nodes make no circuit"):
        trace_circuit(target, saes, OWN, METRIC_OF, n_nodes=0, mask=TOKENS)
    with pytest.raises(SaekitError, match=r"0 SAEs and 60 nodes"):
        trace_circuit(target, {}, OWN, METRIC_OF, mask=TOKENS)
    with pytest.raises(ShapeError, match=r"give prompts of the same sizes"):
        trace_circuit(target, saes, OWN, METRIC_OF, other_ids=OTHER[:, :3], mask=TOKENS)
    with pytest.raises(SaekitError, match=r"with every node of the circuit's Sites and with none; choose other"):
        check_circuit(target, saes, OWN, METRIC_OF, replace(whole(target, saes, None)), other_ids=OWN, mask=TOKENS)
