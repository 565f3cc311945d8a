"""Why no small set of features carries the name that follows `self.`

    python -m benchmarks.pystd.attributes [--seeds 0 1 2]

The prompts are those of `self` in `benchmarks.pystd.behaviours`: an attribute is named, and later asked for; in the
corrupted prompt it is another attribute that was named. Three measurements, on all pairs of a seed:

    where    the effect of giving the whole output of a layer what it is on the clean prompt, at one position: the
             token of the name, those after it up to `self.`, the last token; as a share of the whole difference
    whole    what all features of the bundled SAE's Site bring back together, and what its errors do
    shared   how far a set that is chosen on other prompts goes, and one that is chosen for a single prompt; and how
             many features two such sets of one prompt each have in common
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

import saekit
from benchmarks.pystd.behaviours import Pair, find_pairs, find_self, prompts_of, read_pairs, words_of
from saekit.activations.corpus import load_corpus
from saekit.patching.effects import metric_of, site_effects
from saekit.patching.feature_sets import halved_set

LAYERS = ("layers.0", "layers.1", "layers.2", "layers.3")
SIZES = (10, 20, 50)


def where(target: saekit.Target, pairs: Sequence[Pair]) -> dict[str, list[float]]:
    """Of each layer, the share at the name, between, and at the last token."""
    clean, corrupted, metric = prompts_of(pairs)
    total = float((metric_of(target, clean, metric) - metric_of(target, corrupted, metric)).sum())
    effects = site_effects(target, [saekit.Site.parse(layer) for layer in LAYERS], corrupted, clean, metric)
    name = (clean != corrupted).int().argmax(1)  # the one token that is another
    position = torch.arange(clean.shape[1])[None]
    last = clean.shape[1] - 1
    parts: list[Tensor] = [position == name[:, None], (position > name[:, None]) & (position < last), position == last]
    return {
        layer: [float((of_layer * part).sum()) / total for part in parts]
        for layer, of_layer in zip(LAYERS, effects, strict=True)
    }


def whole(target: saekit.Target, sae: saekit.SAE, pairs: Sequence[Pair]) -> tuple[float, float, int]:
    """What all features bring about, what the errors do, and how many features differ."""
    habit = read_pairs(target, sae, pairs)
    features = habit.change.features.unique()
    sufficient, necessary = habit.shares(features)
    return sufficient, 1 - necessary, len(features)


def own_sets(target: saekit.Target, sae: saekit.SAE, pairs: Sequence[Pair], size: int) -> tuple[float, float]:
    """How sufficient a set is that is chosen for its one prompt, in the mean; and how much two sets share."""
    effect, gained, sets = 0.0, 0.0, []
    for pair in pairs:
        habit = read_pairs(target, sae, [pair])
        found = halved_set(habit, size=min(size, len(habit.change.features.unique())))
        effect += found.effect
        gained += found.effect * float(found.sufficient[-1])
        sets.append(set(found.features.tolist()))
    common = [len(a & b) / size for i, a in enumerate(sets) for b in sets[:i]]
    return gained / effect, sum(common) / len(common)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--prompts", type=int, default=48, help="pairs, half of them to judge shared sets by")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each draws other prompts")
    given = arguments.parse_args()
    target, sae = saekit.Target.load("pystd"), saekit.SAE.from_pretrained("pystd", "layers.2")
    rows = load_corpus("stdlib", target.tokenizer, context=sae.cfg.context_size or 256).held_out.ids
    for seed in given.seeds:
        pairs = find_pairs(rows, find_self, words_of(target), target.tokenizer.bos_token_id, given.prompts, seed)
        names = {pair.right for pair in pairs}
        print(f"seed {seed}: {len(pairs)} pairs, {len(names)} names")
        half = len(pairs) // 2
        for layer, (name, between, last) in where(target, pairs[half:]).items():
            print(f"  {layer}: at the name {name:.0%}, between {between:.0%}, at the last token {last:.0%}", flush=True)
        features, errors, n_features = whole(target, sae, pairs[half:])
        print(f"  all {n_features} features that differ: {features:.0%}; the errors alone: {errors:.0%}", flush=True)
        found = halved_set(read_pairs(target, sae, pairs[:half]), size=SIZES[-1])
        judged_on = read_pairs(target, sae, pairs[half:])
        for size in SIZES:
            shared = judged_on.shares(found.features[:size])[0]
            own, common = own_sets(target, sae, pairs[half:], size)
            print(
                f"  {size:3d} features: chosen on other prompts {shared:.0%}, for each prompt {own:.0%} "
                f"(two of these have {common:.0%} in common)",
                flush=True,
            )


if __name__ == "__main__":
    main()
