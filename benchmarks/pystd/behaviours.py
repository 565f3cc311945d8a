"""Which features of the bundled SAE carry five habits of the bundled model, and how few of them are enough.

    python -m benchmarks.pystd.behaviours

Prompt pairs are cut from held-out modules of the standard library. In the corrupted one a single token is
another, so that another token ought to follow:

    bracket   f(a, b   ->  )    with the open bracket exchanged   ->  ]
    colon     def f(a  ->  ):   with `return` for `def`           ->  )
    quote     x = 'a     ->  '     with the quote that opens exchanged ->  "
    self      self.a = b ... self.  ->  a    with another name for a ->  that name
    indent    def f(a):  ->  a deeper line   with `)` for `):`    ->  a line as deep as before

`self` is the hard one: each prompt remembers another name, so no small set can serve them all.

The metric is the difference of the two logits. Features are patched from the clean into the corrupted run;
sets are chosen on one half of the prompts and judged on the other, which shares no row with it.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import saekit
from saekit.activations.corpus import load_corpus
from saekit.patching.effects import read_prompts
from saekit.patching.feature_sets import Behaviour, greedy_set, halved_set, read_behaviour
from saekit.patching.metric import LogitDifference
from saekit.patching.statistics import matched_features

LENGTH = 32
SIZES = (1, 2, 5, 10, 20, 50)
OTHER_BRACKET = str.maketrans("([)]", "[(])")
OTHER_QUOTE = str.maketrans("'\"", "\"'")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Texts of tokens, and the way back."""

    texts: list[str]
    ids: dict[str, int]


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt, its corrupted counterpart, and what follows in either."""

    clean: list[int]
    corrupted: list[int]
    right: int
    wrong: int


Finder = Callable[[list[int], int, Vocabulary], Pair | None]
"""A pair from a window and the token after it, if it shows the habit."""


def find_bracket(window: list[int], following: int, words: Vocabulary) -> Pair | None:
    close = words.texts[following]
    if close not in (")", "]"):
        return None
    depth = 0
    for i in reversed(range(len(window))):
        text = words.texts[window[i]]
        if text.strip() in (")", "]"):
            depth += 1
        elif text.strip() in ("(", "["):
            if depth == 0:
                is_match = text.strip() == {")": "(", "]": "["}[close]
                return _pair(window, i, text.translate(OTHER_BRACKET), close, words) if is_match else None
            depth -= 1
        elif set(text) & set("()[]{}"):  # several brackets in one token: leave it to clearer cases
            return None
    return None


def find_colon(window: list[int], following: int, words: Vocabulary) -> Pair | None:
    if words.texts[following] != "):":
        return None
    for i in reversed(range(len(window))):
        text = words.texts[window[i]]
        if "\n" in text:
            return None
        if text.strip() == "def":
            return _replaced(window, i, text.replace("def", "return"), following, ")", words)
    return None


def find_indent(window: list[int], following: int, words: Vocabulary) -> Pair | None:
    deeper = words.texts[following]
    if words.texts[window[-1]] != "):" or deeper.strip(" ") != "\n":
        return None
    lines = [words.texts[token] for token in window if "\n" in words.texts[token]]
    same = "\n" + lines[-1].rpartition("\n")[2] if lines else ""
    if len(deeper) != len(same) + 4:
        return None
    return _replaced(window, len(window) - 1, ")", following, same, words)


def find_quote(window: list[int], following: int, words: Vocabulary) -> Pair | None:
    close = words.texts[following]
    if sum(close.count(quote) for quote in "'\"") != 1 or close[0] not in "'\"":
        return None
    for i in reversed(range(len(window))):
        text = words.texts[window[i]]
        found = [letter for letter in text if letter in "'\"\n"]
        if found:
            is_match = found == [close[0]] and text.endswith(close[0])
            wrong = close.translate(OTHER_QUOTE)
            return _replaced(window, i, text.translate(OTHER_QUOTE), following, wrong, words) if is_match else None
    return None


def find_self(window: list[int], following: int, words: Vocabulary) -> Pair | None:
    name = words.texts[following]
    if not name.isidentifier() or [words.texts[token].strip() for token in window[-2:]] != ["self", "."]:
        return None
    places = [i for i in range(2, len(window) - 2) if window[i] == following]
    if len(places) != 1 or [words.texts[token].strip() for token in window[places[0] - 2 : places[0]]] != ["self", "."]:
        return None
    other = "name" if name != "name" else "value"
    if words.ids[other] in window:
        return None
    return _replaced(window, places[0], other, following, other, words)


def _pair(window: list[int], at: int, text: str, close: str, words: Vocabulary) -> Pair | None:
    return _replaced(window, at, text, words.ids[close], close.translate(OTHER_BRACKET), words)


def _replaced(window: list[int], at: int, text: str, right: int, wrong: str, words: Vocabulary) -> Pair | None:
    if text not in words.ids or wrong not in words.ids:
        return None
    return Pair(window, [*window[:at], words.ids[text], *window[at + 1 :]], right, words.ids[wrong])


def find_pairs(rows: Tensor, find: Finder, words: Vocabulary, bos: int, count: int, seed: int) -> list[Pair]:
    """At most one pair per row, so that prompts do not overlap."""
    pairs: list[Pair] = []
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    for row in (rows[i].tolist() for i in order):
        for end in range(LENGTH, len(row)):
            window = row[end - LENGTH + 1 : end]
            pair = None if bos in window else find(window, row[end], words)
            if pair is not None:
                pairs.append(Pair([bos, *pair.clean], [bos, *pair.corrupted], pair.right, pair.wrong))
                break
        if len(pairs) == count:
            break
    return pairs


def prompts_of(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, LogitDifference]:
    """Clean and corrupted prompts, and the metric."""
    clean, corrupted, right, wrong = (
        torch.tensor([getattr(pair, side) for pair in pairs]) for side in ("clean", "corrupted", "right", "wrong")
    )
    return clean, corrupted, LogitDifference(right, wrong, torch.full((len(pairs),), LENGTH - 1))


def read_pairs(target: saekit.Target, sae: saekit.SAE, pairs: Sequence[Pair]) -> Behaviour:
    clean, corrupted, metric = prompts_of(pairs)
    return read_behaviour(target, sae, saekit.Site.parse(sae.cfg.hook_name), corrupted, clean, metric)


def words_of(target: saekit.Target) -> Vocabulary:
    texts = [target.tokenizer.decode([i]) for i in range(len(target.tokenizer))]
    return Vocabulary(texts, {text: i for i, text in enumerate(texts)})


def report(
    name: str, chosen_on: Behaviour, judged_on: Behaviour, sae: saekit.SAE, size: int, draws: int, halving: bool
) -> None:
    find = halved_set if halving else greedy_set
    found = find(chosen_on, size=size)
    sizes = [n for n in SIZES if n <= size]
    shares = {n: judged_on.shares(found.features[:n]) for n in sizes}
    print(f"{name}: logit difference {judged_on.base:.2f} -> {judged_on.goal:.2f}, first {found.features[:5].tolist()}")
    codes = read_prompts(judged_on.target, sae, judged_on.site, judged_on.ids).codes
    density = codes.feature_counts().double()
    for n, (sufficient, necessary) in shares.items():
        control = []
        for seed in range(draws):
            control.append(judged_on.shares(matched_features(density, found.features[:n], seed=seed))[0])
        print(
            f"  {n:3d} features   sufficient {sufficient:6.1%}   necessary {necessary:6.1%}   "
            f"random, as dense: {sum(control) / draws:6.1%} ({min(control):.1%} to {max(control):.1%})",
            flush=True,
        )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--prompts", type=int, default=48, help="pairs per habit, half of them to judge by")
    arguments.add_argument("--size", type=int, default=20, help="largest set")
    arguments.add_argument("--draws", type=int, default=10, help="random sets per size")
    arguments.add_argument("--halving", action="store_true", help="halve the set of all features, not one by one")
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    target, sae = saekit.Target.load("pystd"), saekit.SAE.from_pretrained("pystd", "layers.2")
    words = words_of(target)
    rows = load_corpus("stdlib", target.tokenizer, context=sae.cfg.context_size or 256).held_out.ids
    habits = {
        "bracket": find_bracket, "colon": find_colon, "quote": find_quote, "self": find_self, "indent": find_indent,
    }  # fmt: skip
    for name, find in habits.items():
        pairs = find_pairs(rows, find, words, target.tokenizer.bos_token_id, given.prompts, given.seed)
        half = len(pairs) // 2
        print(f"{name}: {len(pairs)} pairs")
        report(
            name, read_pairs(target, sae, pairs[:half]), read_pairs(target, sae, pairs[half:]), sae, given.size,
            given.draws, given.halving,
        )  # fmt: skip


if __name__ == "__main__":
    main()
