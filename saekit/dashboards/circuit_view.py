"""A circuit to look at: a plotly figure, and the JSON that viewers of attribution graphs read.

The JSON is the schema of Neuronpedia and circuit-tracer (version 1): `metadata`, `qParams`, `nodes`, `links`. Those
viewers know layers with transcoders where a circuit has Sites, so a Site's place in the pass stands for the layer, a
feature goes as "cross layer transcoder" and an error as "mlp reconstruction error", whatever the Site; its name is
in `metadata.transcoder_list`. Tokens of the prompt are there to be shown; no link leaves them. `node_threshold` gives
circuit-tracer's page its slider, which hides nodes whose `influence`, a running share of all effects, is above it.

Both show contributions: the effect of a node's change with the sign turned, what the metric has by the node being as it
is. A link is the part of its source's contribution to the metric that goes by way of its target, where circuit-tracer's
own graphs have the source's contribution to the target.
"""

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from saekit.errors import SaekitError
from saekit.patching.circuits import ERROR, METRIC, Circuit, CircuitNode
from saekit.patching.effects import EVERYWHERE

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_WIDEST = 6.0
# nodes with their number beside them; of all it is shown under the pointer
_NAMED = 12
_UP, _DOWN, _GREY = "#1f77b4", "#d62728", "#888888"


def viewer_graph(
    circuit: Circuit,
    ids: Int[Tensor, " context"],
    text: Callable[[int], str],
    *,
    slug: str,
    model: str,
    answer: int,
    chance: float,
) -> dict[str, Any]:
    """The circuit as JSON values.

    Args:
        ids: of the prompt.
        text: what a token reads.
        slug: a short name for the graph.
        answer: the token that stands for the metric, at the end of the prompt.
        chance: the model's probability of it.

    Raises:
        SaekitError: a circuit of features everywhere; a viewer puts each node at a token.
    """
    if any(node.position == EVERYWHERE for node in circuit.nodes):
        raise SaekitError(
            "a viewer puts each node at a token; trace the circuit of one prompt, without everywhere=True"
        )
    tokens = [text(token) for token in ids.tolist()]
    last, top = len(tokens) - 1, str(len(circuit.sites) + 1)
    label = f'Output "{text(answer)}" (p={chance:.3f})'
    logit = _node(f"{top}_{answer}_{last}", f"L_{answer}-{last}", answer, top, last, "logit")
    logit |= {"token_prob": chance, "is_target_logit": True, "clerp": label}
    embedded = [
        _node(f"E_{token}_{place}", f"E_{token}-{place}", place, "E", place, "embedding")
        for place, token in enumerate(ids.tolist())
    ]
    influence = _cumulative(circuit)
    nodes = [_graph_node(node, circuit, influence[i]) for i, node in enumerate(circuit.nodes)]
    names = [_name(node) for node in circuit.nodes]
    return {
        "metadata": {
            "slug": slug,
            "scan": model,
            "transcoder_list": [str(site) for site in circuit.sites],
            "prompt_tokens": tokens,
            "prompt": "".join(tokens),
            "node_threshold": 1.0,
            "schema_version": 1,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [*embedded, *nodes, logit],
        "links": [
            {
                "source": names[edge.source],
                "target": logit["node_id"] if edge.target == METRIC else names[edge.target],
                "weight": -edge.weight,
            }
            for edge in circuit.edges
        ],
    }


def circuit_figure(circuit: Circuit, tokens: Sequence[str]) -> "Figure":
    """Positions from left to right, Sites from below, the metric on top; what is blue raises it, what is red lowers it.

    Args:
        tokens: what each position of the prompt reads; of a circuit of features everywhere, any names for the places
            that its nodes are spread over.
    """
    import plotly.graph_objects as go

    place = _places(circuit, len(tokens))
    top = (len(tokens) - 1.0, len(circuit.sites))
    most = max((abs(edge.weight) for edge in circuit.edges), default=1.0)
    figure = go.Figure()
    for edge in circuit.edges:
        (x, y), (to_x, to_y) = place[edge.source], top if edge.target == METRIC else place[edge.target]
        width = _WIDEST * abs(edge.weight) / most
        line = {"color": _DOWN if edge.weight > 0 else _UP, "width": max(width, 0.2)}
        figure.add_scatter(x=[x, to_x], y=[y, to_y], mode="lines", line=line, opacity=0.5, hoverinfo="skip")
    named = sorted(range(len(circuit.nodes)), key=lambda i: -abs(circuit.nodes[i].effect))[:_NAMED]
    for is_error, symbol in ((False, "circle"), (True, "diamond")):
        chosen = [i for i, node in enumerate(circuit.nodes) if (node.feature == ERROR) == is_error]
        figure.add_scatter(
            x=[place[i][0] for i in chosen],
            y=[place[i][1] for i in chosen],
            mode="markers+text",
            marker={
                "symbol": symbol,
                "size": 11,
                "color": [_GREY if is_error else _DOWN if circuit.nodes[i].effect > 0 else _UP for i in chosen],
            },
            text=[f"#{circuit.nodes[i].feature}" if i in named and not is_error else "" for i in chosen],
            textposition="bottom center",
            hovertext=[_hover(circuit.nodes[i], circuit) for i in chosen],
            hoverinfo="text",
        )
    figure.add_scatter(x=[top[0]], y=[top[1]], mode="markers+text", text=["metric"], textposition="top center")
    ticks = [escape(token) for token in tokens]
    figure.update_xaxes(tickvals=list(range(len(tokens))), ticktext=ticks, showgrid=False)
    names = [*(str(site) for site in circuit.sites), ""]
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, zeroline=False)
    return figure.update_layout(showlegend=False, template="plotly_white")


def _node(node_id: str, js: str, feature: int, layer: str, position: int, kind: str) -> dict[str, Any]:
    return {
        "node_id": node_id,
        "feature": feature,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js,
        "clerp": "",
        "influence": None,
        "activation": None,
    }


def _graph_node(node: CircuitNode, circuit: Circuit, influence: float) -> dict[str, Any]:
    is_error = node.feature == ERROR
    # viewers tell features of all layers apart by one number: Cantor's of layer and feature
    both = node.site + node.feature
    number = ERROR if is_error else both * (both + 1) // 2 + node.feature
    kind = "mlp reconstruction error" if is_error else "cross layer transcoder"
    js = f"{node.site}_{node.feature}-{node.position}"
    return {
        **_node(_name(node), js, number, str(node.site), node.position, kind),
        "clerp": f"{circuit.sites[node.site]} {'error' if is_error else f'#{node.feature}'}",
        "influence": influence,
        "activation": None if is_error else node.strength,
    }


def _name(node: CircuitNode) -> str:
    return f"{node.site}_{node.feature}_{node.position}"


def _cumulative(circuit: Circuit) -> dict[int, float]:
    """Of each node, the share of all shown effects, in absolute value, that it and the larger ones have."""
    order = sorted(range(len(circuit.nodes)), key=lambda i: -abs(circuit.nodes[i].effect))
    total = sum(abs(node.effect) for node in circuit.nodes)
    shares: dict[int, float] = {}
    so_far = 0.0
    for i in order:
        so_far += abs(circuit.nodes[i].effect)
        shares[i] = min(so_far / total, 1.0)  # or the last node would fall to rounding under a threshold of 1
    return shares


def _places(circuit: Circuit, n_tokens: int) -> list[tuple[float, int]]:
    """Where each node stands: those of one token side by side, those of no token over the whole width."""
    together: dict[tuple[int, int], list[int]] = {}
    for i, node in enumerate(circuit.nodes):
        together.setdefault((node.site, node.position), []).append(i)
    places: dict[int, tuple[float, int]] = {}
    for (site, position), several in together.items():
        middle, width = ((n_tokens - 1) / 2, n_tokens - 1) if position == EVERYWHERE else (position, 0.8)
        for rank, i in enumerate(several):
            places[i] = (middle + width * ((rank + 0.5) / len(several) - 0.5), site)
    return [places[i] for i in range(len(circuit.nodes))]


def _hover(node: CircuitNode, circuit: Circuit) -> str:
    what = "error" if node.feature == ERROR else f"#{node.feature}, strength {node.strength:.3g}"
    return f"{escape(str(circuit.sites[node.site]))} {what}<br>contributes {-node.effect:+.3g}"
