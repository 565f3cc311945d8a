"""How the bundled model gets from one layer to the next when it closes a bracket or a `def` line.

    python -m benchmarks.pystd.circuits --sae sae-layers.1

A circuit of features of two Sites, the bundled SAE's and that of `--sae` (trained first if the folder is not there),
is traced on one half of the prompt pairs of `benchmarks.pystd.behaviours` and checked on the other half: nodes as on
the clean prompt, all else as on the corrupted one. Every share is the mean over seeds, which draw other prompts, with
the least and the most in brackets.

    faithful, complete   as in saekit.patching.circuit_check
    random               circuits of as many features of each Site that differ between clean and corrupted as often
    lower, upper         the nodes of one Site alone, the other Site left to itself
    with errors          the errors of both Sites, which no feature explains, are nodes too
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import saekit
from benchmarks.pystd.behaviours import Pair, find_bracket, find_colon, find_pairs, prompts_of, words_of
from benchmarks.trained import trained
from saekit.activations.corpus import load_corpus
from saekit.patching.attribution import difference
from saekit.patching.circuit_check import check_circuit
from saekit.patching.circuits import ERROR, METRIC, Circuit, CircuitNode, trace_circuit
from saekit.patching.effects import EVERYWHERE, read_prompts
from saekit.patching.statistics import matched_features

SIZES = (10, 20, 50, 100)
HABITS = {"bracket": find_bracket, "colon": find_colon}
Placed = dict[saekit.Site, saekit.SAE]


@dataclass(frozen=True, slots=True)
class Judge:
    """Prompts that no circuit was traced on."""

    target: saekit.Target
    saes: Placed
    pairs: Sequence[Pair]

    def differing(self) -> dict[saekit.Site, Tensor]:
        """At how many tokens each feature is another on the corrupted prompts."""
        clean, corrupted, _ = prompts_of(self.pairs)
        found: dict[saekit.Site, Tensor] = {}
        for site, sae in self.saes.items():
            own, other = (read_prompts(self.target, sae, site, ids).codes for ids in (clean, corrupted))
            change = difference(own, other)
            found[site] = change.where(change.values != 0).feature_counts().double()
        return found

    def shares(self, circuit: Circuit, sites: Sequence[saekit.Site] = ()) -> tuple[float, float]:
        """How faithful and how complete; with the nodes of some of the Sites alone, if any are named."""
        clean, corrupted, metric = prompts_of(self.pairs)
        saes = {site: sae for site, sae in self.saes.items() if site in (sites or self.saes)}
        found = check_circuit(self.target, saes, clean, metric, circuit, other_ids=corrupted)
        return found.faithful, found.complete


def strongest(circuit: Circuit, size: int) -> Circuit:
    """The features with the largest effects; no errors, and no edges, which a check does not need."""
    nodes = sorted((n for n in circuit.nodes if n.feature != ERROR), key=lambda n: -abs(n.effect))[:size]
    return replace(circuit, nodes=tuple(nodes), edges=())


def with_errors(circuit: Circuit) -> Circuit:
    errors = tuple(CircuitNode(site, EVERYWHERE, ERROR, 0.0, 0.0) for site in range(len(circuit.sites)))
    return replace(circuit, nodes=(*circuit.nodes, *errors))


def like_at_random(circuit: Circuit, often: dict[saekit.Site, Tensor], seed: int) -> Circuit:
    """Other features for those of the circuit, as many of each Site."""
    nodes: list[CircuitNode] = []
    for number, site in enumerate(circuit.sites):
        own = [node.feature for node in circuit.nodes if node.site == number]
        drawn = matched_features(often[site], torch.tensor(own, dtype=torch.int64), seed=seed)
        nodes += [CircuitNode(number, EVERYWHERE, feature, 0.0, 0.0) for feature in drawn.tolist()]
    return replace(circuit, nodes=tuple(nodes))


def measure(circuit: Circuit, judge: Judge, draws: int) -> dict[tuple[int, str], list[float]]:
    """Every share of every size: one number each, and one per draw for the random circuits."""
    often = judge.differing()
    found: dict[tuple[int, str], list[float]] = {
        (0, "with errors"): [judge.shares(with_errors(strongest(circuit, 0)))[0]]
    }
    for size in SIZES:
        own = strongest(circuit, size)
        faithful, complete = judge.shares(own)
        found |= {
            (size, "faithful"): [faithful],
            (size, "complete"): [complete],
            (size, "random"): [judge.shares(like_at_random(own, often, seed))[0] for seed in range(draws)],
            (size, "lower"): [judge.shares(own, circuit.sites[:1])[0]],
            (size, "upper"): [judge.shares(own, circuit.sites[1:])[0]],
            (size, "with errors"): [judge.shares(with_errors(own))[0]],
        }
    return found


def shown(values: list[float]) -> str:
    return f"{sum(values) / len(values):.0%} ({min(values):.0%} to {max(values):.0%})"


def write_table(name: str, runs: list[dict[tuple[int, str], list[float]]], say: Callable[[str], None]) -> None:
    columns = ("faithful", "random", "complete", "lower", "upper", "with errors")
    say(f"\n{name}\n\n| nodes | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for size in (0, *SIZES):
        cells = []
        for column in columns:
            values = [value for run in runs for value in run.get((size, column), [])]
            cells.append(shown(values) if values else "")
        say(f"| {size} | {' | '.join(cells)} |")


def write_edges(circuit: Circuit, count: int, say: Callable[[str], None]) -> None:
    """The strongest edges between features of the two Sites."""
    between = [e for e in circuit.edges if e.target != METRIC]
    total = sum(abs(edge.weight) for edge in between)
    through = [e for e in between if ERROR in (circuit.nodes[e.source].feature, circuit.nodes[e.target].feature)]
    say(
        f"\n{len(between)} edges; {sum(abs(e.weight) for e in through) / total:.0%} of their weight from or to an error"
    )
    for edge in sorted(between, key=lambda e: -abs(e.weight))[:count]:
        ends = (circuit.nodes[edge.source], circuit.nodes[edge.target])
        names = [f"{circuit.sites[n.site]} {'error' if n.feature == ERROR else f'#{n.feature}'}" for n in ends]
        say(f"    {names[0]} -> {names[1]}: {edge.weight:+.3f} of {circuit.effect:+.2f}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sae", type=Path, default=Path("sae-layers.1"), help="folder of the earlier Site's SAE")
    arguments.add_argument("--site", default="layers.1", help="where to train it, if it is not there")
    arguments.add_argument("--prompts", type=int, default=48, help="pairs per habit, half of them to judge by")
    arguments.add_argument("--draws", type=int, default=3, help="random circuits per size and seed")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = arguments.parse_args()
    target, upper = saekit.Target.load("pystd"), saekit.SAE.from_pretrained("pystd", "layers.2")
    lower = trained(given.sae, "--site", given.site, "--features", "2048", "--tokens", "1024000")
    saes = {saekit.Site.parse(sae.cfg.hook_name): sae for sae in (lower, upper)}
    words = words_of(target)
    rows = load_corpus("stdlib", target.tokenizer, context=upper.cfg.context_size or 256).held_out.ids
    for name, find in HABITS.items():
        runs = []
        for seed in given.seeds:
            pairs = find_pairs(rows, find, words, target.tokenizer.bos_token_id, given.prompts, seed)
            half = len(pairs) // 2
            clean, corrupted, metric = prompts_of(pairs[:half])
            circuit = trace_circuit(
                target, saes, clean, metric, other_ids=corrupted, n_nodes=SIZES[-1] + 2, everywhere=True
            )
            runs.append(measure(circuit, Judge(target, saes, pairs[half:]), given.draws))
            if seed == given.seeds[-1]:
                write_table(name, runs, lambda line: print(line, flush=True))
                write_edges(circuit, 6, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
