"""`saekit circuit`: which features bring an answer about, and by way of which others."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .output import columns, write_facts

if TYPE_CHECKING:
    from saekit.patching.circuits import Circuit as Traced
    from saekit.patching.circuits import CircuitNode

SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Circuit:
    """Trace which features of which Sites bring a prediction about, and how they lead to each other.

    What is explained is the logit of --answer less that of --wrong after the prompt. With --other, a second
    prompt of as many tokens, it is what differs between the two: a feature counts by what the other prompt would
    make of it. Without it, a feature counts by what its absence would do. Edges and effects are estimates from
    gradients; the report says how much of the answer the circuit brings about in the model itself (faithful), and
    how much is lost without it (complete). Written are OUT.html, a picture, and OUT.json, for the graph viewers of
    Neuronpedia and circuit-tracer.

    Example:
      saekit circuit "    x = items(value" --other "    x = items[value" --answer ")" --wrong "]"
      saekit train --site layers.1 --features 2048 --out sae-1
      saekit circuit "    x = items(value" --other "    x = items[value" --answer ")" --wrong "]" \\
          --sae sae-1 pystd/layers.2 --nodes 40 --out bracket
    """

    prompt: Annotated[str, tyro.conf.Positional]
    """Text whose next token is explained."""
    answer: str
    """The token that ought to follow."""
    wrong: str
    """The token that it is compared with."""
    other: str | None = None
    """A prompt of as many tokens after which the wrong one ought to follow."""
    sae: tuple[str, ...] = ()
    """SAEs at one or more Sites, in any order: folders, files, names from `saekit list`, or places on the Hub. The
    bundled one if not given."""
    site: tuple[str, ...] = ()
    """One for each --sae, if they are to read elsewhere than where they were trained."""
    model: str | None = None
    """Another model than the one they were trained on."""
    nodes: int = 60
    """Keep the features and errors with the largest effects, so many of all Sites together."""
    least_edge: float = 0.005
    """Draw and list no edge below this share of the whole effect."""
    out: Path = Path("circuit")
    """Where to write, without the ending."""
    device: str = "cpu"
    json: bool = False
    """Print the facts as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        import json

        from saekit.dashboards.circuit_view import circuit_figure, viewer_graph
        from saekit.dashboards.static_page import check_writable, write_text
        from saekit.errors import SaekitError
        from saekit.patching.circuit_check import check_circuit
        from saekit.patching.circuits import trace_circuit
        from saekit.patching.effects import metric_of

        from .contrast import open_contrast

        if not 0 <= self.least_edge <= 1:
            raise SaekitError(f"--least-edge {self.least_edge} is no share; give 0 to 1, such as 0.005")
        picture, graph = (self.out.with_name(f"{self.out.name}.{ending}") for ending in ("html", "json"))
        check_writable(picture)
        asked = open_contrast(
            self.prompt, self.other, self.answer, self.wrong,
            saes=self.sae, model=self.model, sites=self.site, device=self.device,
        )  # fmt: skip
        target, ids, metric = asked.target, asked.ids, asked.metric
        other = {"other_ids": asked.other_ids, "mask": asked.mask}
        circuit = trace_circuit(target, asked.saes, ids, metric, n_nodes=self.nodes, **other)
        shares = check_circuit(target, asked.saes, ids, metric, circuit, **other)
        circuit, tokens = circuit.pruned(self.least_edge), asked.tokens(ids[0])
        facts = {
            "model": target.name,
            "prompt": self.prompt,
            "other": self.other,
            "answer": self.answer,
            "wrong": self.wrong,
            "logit_difference": float(metric_of(target, ids, metric)),
            "effect": shares.effect,
            "faithful": shares.faithful,
            "complete": shares.complete,
            **facts_of(circuit, tokens),
            "picture": str(picture),
            "graph": str(graph),
        }
        title = f"{self.answer!r} rather than {self.wrong!r}: {shares.faithful:.0%} with the circuit alone"
        write_text(picture, circuit_figure(circuit, tokens).update_layout(title=title).to_html(include_plotlyjs=True))
        view = viewer_graph(
            circuit, ids[0], lambda token: asked.tokens(ids.new_tensor([token]))[0],
            slug=self.out.name, model=target.name, answer=asked.answer, chance=asked.chance(),
        )  # fmt: skip
        write_text(graph, json.dumps(view, ensure_ascii=False, allow_nan=False))
        write_facts(facts, as_json=self.json, text=lambda: as_text(facts))
        return 0


def facts_of(circuit: "Traced", tokens: list[str]) -> dict[str, Any]:
    """Sizes, and the strongest nodes and edges."""
    from saekit.patching.circuits import METRIC

    between = sorted((e for e in circuit.edges if e.target != METRIC), key=lambda edge: -abs(edge.weight))
    nodes = sorted(circuit.nodes, key=lambda node: -abs(node.effect))
    return {
        "sites": [str(site) for site in circuit.sites],
        "nodes": len(circuit.nodes),
        "edges": len(circuit.edges),
        "strongest_nodes": [{**_node(node, circuit, tokens), "contribution": -node.effect} for node in nodes[:SHOWN]],
        "strongest_edges": [
            {
                "from": _node(circuit.nodes[edge.source], circuit, tokens),
                "to": _node(circuit.nodes[edge.target], circuit, tokens),
                "contribution": -edge.weight,
            }
            for edge in between[:SHOWN]
        ],
    }


def _node(node: "CircuitNode", circuit: "Traced", tokens: list[str]) -> dict[str, Any]:
    from saekit.patching.circuits import ERROR

    return {
        "site": str(circuit.sites[node.site]),
        "feature": None if node.feature == ERROR else node.feature,
        "position": node.position,
        "token": tokens[node.position],
    }


def as_text(facts: dict[str, Any]) -> str:
    """The report for people."""
    changed = "everything but the circuit as after the other prompt" if facts["other"] else "all other features at 0"
    lines = [
        ("asked", f"logit of {facts['answer']!r} less that of {facts['wrong']!r}: {facts['logit_difference']:+.2f}"),
        ("effect", f"{facts['effect']:+.2f} of it comes by way of {', '.join(facts['sites'])}"),
        ("circuit", f"{facts['nodes']} nodes, {facts['edges']} edges"),
        ("faithful", f"{facts['faithful']:.0%} of the effect with {changed}"),
        ("complete", f"{facts['complete']:.0%} of the effect is lost if only the circuit changes so"),
    ]
    nodes = [(_named(node), f"{node['contribution']:+.3g}") for node in facts["strongest_nodes"]]
    edges = [
        (f"{_named(e['from'])} -> {_named(e['to'])}", f"{e['contribution']:+.3g}") for e in facts["strongest_edges"]
    ]
    parts = [columns(lines), "  largest contributions, estimated, in logits", columns(nodes)]
    parts += ["  what of them goes by way of another, estimated", columns(edges)] if edges else []
    return "\n\n".join([*parts, columns([("picture", facts["picture"]), ("graph", facts["graph"])])])


def _named(node: dict[str, Any]) -> str:
    what = "error" if node["feature"] is None else f"#{node['feature']}"
    return f"{node['site']} {what} at {node['token']!r} ({node['position']})"
