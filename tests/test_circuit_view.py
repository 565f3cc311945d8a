"""A circuit in the JSON of graph viewers, and as a figure.

`METADATA`, `NODE` and `KINDS` are what those viewers read: the page that comes with circuit-tracer 0.5.0 and
Neuronpedia's schema of uploaded graphs, whose required fields are a part of these. A graph of `saekit circuit` has been
opened in that page: every node stands at its token and layer, a click shows its links, and the slider hides nodes.
"""

import json
import math

import pytest
import torch
from small_models import FIRST, IDS, SECOND, TOKENS, sae_of, tiny_llama

from saekit.dashboards.circuit_view import circuit_figure, viewer_graph
from saekit.errors import SaekitError
from saekit.patching.circuits import ERROR, METRIC, Circuit, CircuitEdge, CircuitNode, trace_circuit
from saekit.patching.metric import LogitDifference
from saekit.selection import Threshold, TopK
from saekit.targets import Target

ANSWER, CHANCE = 3, 0.25
METADATA = {"slug": str, "scan": str, "prompt": str, "prompt_tokens": list, "transcoder_list": list}
NODE = {
    "node_id": str,
    "feature": int,
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "token_prob": float,
    "is_target_logit": bool,
    "run_idx": int,
    "reverse_ctx_idx": int,
    "jsNodeId": str,
    "clerp": str,
}
PARAMETERS = {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str}
KINDS = {"embedding", "cross layer transcoder", "mlp reconstruction error", "logit"}


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    target, saes = Target.wrap(tiny_llama()), {FIRST: sae_of(TopK(5)), SECOND: sae_of(Threshold(0.3), seed=1)}
    metric = LogitDifference(torch.tensor([ANSWER]), torch.tensor([5]), torch.tensor([IDS.shape[1] - 1]))
    return trace_circuit(target, saes, IDS[:1], metric, other_ids=IDS[1:], n_nodes=12, mask=TOKENS)


@pytest.fixture(scope="module")
def graph(circuit) -> dict:
    found = viewer_graph(circuit, IDS[0], str, slug="a-slug", model="tiny", answer=ANSWER, chance=CHANCE)
    return json.loads(json.dumps(found, allow_nan=False))


def test_every_field_that_viewers_read_is_there_with_its_type(graph):
    assert set(graph) == {"metadata", "qParams", "nodes", "links"}
    for given, wanted in ((graph["metadata"], METADATA), (graph["qParams"], PARAMETERS)):
        assert {name: type(given.get(name)) for name in wanted} == wanted
    assert graph["metadata"]["schema_version"] == 1 and type(graph["metadata"]["node_threshold"]) is float
    assert graph["metadata"]["prompt_tokens"] == ["0", "9", "8", "7", "6"]
    assert graph["metadata"]["transcoder_list"] == [str(FIRST), str(SECOND)]
    for node in graph["nodes"]:
        assert {name: type(node.get(name)) for name in NODE} == NODE
        assert node["feature_type"] in KINDS
        for optional in ("influence", "activation"):
            assert node[optional] is None or type(node[optional]) is float
    for link in graph["links"]:
        assert {name: type(value) for name, value in link.items()} == {"source": str, "target": str, "weight": float}


def test_nodes_stand_at_tokens_and_layers_and_are_told_apart(graph, circuit):
    nodes, n_tokens = graph["nodes"], len(graph["metadata"]["prompt_tokens"])
    kinds = [node["feature_type"] for node in nodes]
    errors = sum(node.feature == ERROR for node in circuit.nodes)
    assert [kinds.count(kind) for kind in sorted(KINDS)] == [12 - errors, 5, 1, errors] and 0 < errors < 12
    assert all(0 <= node["ctx_idx"] < n_tokens for node in nodes)
    # a viewer's own name for a node; two with one name would be one dot
    names = [(node["layer"], node["feature"], node["ctx_idx"]) for node in nodes]
    assert len(set(names)) == len({node["node_id"] for node in nodes}) == len(nodes)
    for node in nodes:
        match node["feature_type"]:
            case "embedding":
                assert node["layer"] == "E" and node["feature"] == node["ctx_idx"]
            case "logit":
                assert int(node["layer"]) == 3 and node["ctx_idx"] == n_tokens - 1 and node["is_target_logit"]
                assert node["feature"] == ANSWER and node["token_prob"] == CHANCE
                # read back from the label
                assert float(node["clerp"].split("(p=")[1].split(")")[0]) == CHANCE
            case "cross layer transcoder":
                site, feature = unpaired(node["feature"])
                assert node["node_id"] == f"{site}_{feature}_{node['ctx_idx']}" and node["layer"] == str(site)
                assert node["clerp"] == f"{circuit.sites[site]} #{feature}"


def unpaired(number: int) -> tuple[int, int]:
    """Layer and feature from Cantor's number of both, as viewers find them."""
    both = (math.isqrt(8 * number + 1) - 1) // 2
    feature = number - both * (both + 1) // 2
    return both - feature, feature


def test_links_are_the_edges_and_join_nodes_that_are_there(graph, circuit):
    by_id = {node["node_id"]: node for node in graph["nodes"]}
    assert len(graph["links"]) == len(circuit.edges) > 10
    for link, edge in zip(graph["links"], circuit.edges, strict=True):
        source, target = by_id[link["source"]], by_id[link["target"]]
        own = circuit.nodes[edge.source]
        assert link["weight"] == -edge.weight  # what it contributes, where the edge is what its change would do
        assert (source["ctx_idx"], source["layer"]) == (own.position, str(own.site))
        assert (target["feature_type"] == "logit") == (edge.target == METRIC)
        assert source["feature_type"] not in ("logit", "embedding") and int(source["layer"]) < int(target["layer"])


def test_influence_runs_from_the_largest_node_to_the_threshold(graph, circuit):
    by_id = {node["node_id"]: node for node in graph["nodes"]}
    order = sorted(circuit.nodes, key=lambda node: -abs(node.effect))
    shares = [by_id[f"{n.site}_{n.feature}_{n.position}"]["influence"] for n in order]
    total = sum(abs(node.effect) for node in order)
    assert shares == sorted(shares) and shares[0] == pytest.approx(abs(order[0].effect) / total)
    assert shares[-1] == pytest.approx(1) and shares[-1] <= graph["metadata"]["node_threshold"]


def test_rounding_hides_no_node_from_the_slider(circuit):
    nodes = tuple(CircuitNode(0, 1, feature, 1.0, 0.1) for feature in range(12))
    uneven = Circuit(circuit.sites, nodes, (), 1.2)
    shown = viewer_graph(uneven, IDS[0], str, slug="s", model="m", answer=ANSWER, chance=CHANCE)
    assert max(node["influence"] for node in shown["nodes"] if node["influence"]) <= 1


def test_features_everywhere_stand_at_no_token_of_a_viewer(circuit):
    everywhere = Circuit(circuit.sites, (CircuitNode(0, -1, 4, 1.0, 0.1),), (CircuitEdge(0, METRIC, 0.1),), 0.1)
    with pytest.raises(SaekitError, match=r"trace the circuit of one prompt, without everywhere=True"):
        viewer_graph(everywhere, IDS[0], str, slug="s", model="m", answer=ANSWER, chance=CHANCE)
    figure = circuit_figure(everywhere, ["a", "b", "c"])
    assert 0 <= figure.data[1].x[0] <= 2


def test_the_figure_has_every_node_and_edge_and_says_what_raises_the_metric(circuit):
    figure = circuit_figure(circuit, ["<b>", "b", "c", "d", "e"])
    *lines, features, errors, metric = figure.data
    assert len(lines) == len(circuit.edges) and len(metric.x) == 1
    assert len(features.x) + len(errors.x) == len(circuit.nodes)
    assert sorted({*features.y, *errors.y}) == [0, 1] and metric.y[0] == 2
    assert figure.layout.xaxis.ticktext[0] == "&lt;b&gt;"
    widths = [line.line.width for line in lines]
    assert widths.index(max(widths)) == max(range(len(lines)), key=lambda i: abs(circuit.edges[i].weight))
    colours = {(line.line.color, edge.weight < 0) for line, edge in zip(lines, circuit.edges, strict=True)}
    assert colours == {("#1f77b4", True), ("#d62728", False)}


def test_the_largest_features_of_a_figure_have_their_number(circuit):
    nodes = (*circuit.nodes, *(CircuitNode(0, 1, feature, 1.0, 1e-9) for feature in (100, 101)))
    features = circuit_figure(Circuit(circuit.sites, nodes, (), 1.0), ["a", "b", "c", "d", "e"]).data[0]
    want = [f"#{node.feature}" for node in circuit.nodes if node.feature != ERROR]
    assert sorted(features.text) == sorted([*want, "", ""])
    assert all(f"#{node.feature}, strength" in "".join(features.hovertext) for node in nodes if node.feature != ERROR)
