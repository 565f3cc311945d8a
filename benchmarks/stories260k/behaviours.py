"""Which features of an SAE on stories260K carry names and pronouns, and how few of them are enough.

    python -m benchmarks.stories260k.behaviours STORIES260K tinystories.txt --sae sae-stories

The SAE is trained first if the folder is not there, as that of the README's table but with more rows held out. Prompts
of 32 tokens are cut from these, one of a row at most; in the corrupted ones the child is another:

    name      ... Lily ...            ->  Lily    with every `Lily` exchanged for `Tim`, or `Tim`, `Timmy` for `Lily`
    pronoun   ... girl ... Lily ...   ->  she     with everything exchanged that says which: name, noun and pronouns

The metric, and how sets are chosen and judged, are those of `benchmarks.pystd.behaviours`.
"""

import argparse
from pathlib import Path

import saekit
from benchmarks.pystd.behaviours import Pair, Vocabulary, find_pairs, read_pairs, report
from benchmarks.trained import trained
from saekit.activations.corpus import load_corpus

HELD_OUT_ROWS = 800
OTHER_NAME = {"▁Lily": "▁Tim", "▁Tim": "▁Lily", "▁Timmy": "▁Lily"}
OTHER_PRONOUN = {"▁she": "▁he", "▁he": "▁she", "▁She": "▁He", "▁He": "▁She", "▁her": "▁his", "▁his": "▁her"}
OTHER_NOUN: dict[tuple[str, ...], tuple[str, ...]] = {
    ("▁g", "ir", "l"): ("▁b", "o", "y"),
    ("▁b", "o", "y"): ("▁g", "ir", "l"),
}


def find_name(window: list[int], following: int, words: Vocabulary) -> Pair | None:
    name = words.texts[following]
    names = {words.texts[token] for token in window} & set(OTHER_NAME)
    if name not in OTHER_NAME or names != {name}:
        return None
    other = words.ids[OTHER_NAME[name]]
    return Pair(window, [other if token == following else token for token in window], following, other)


def find_pronoun(window: list[int], following: int, words: Vocabulary) -> Pair | None:
    right, pieces = words.texts[following], [words.texts[token] for token in window]
    names = set(pieces) & set(OTHER_NAME)
    if right not in OTHER_PRONOUN or len(names) != 1 or "▁him" in "".join(pieces):
        return None
    swapped = [(OTHER_NAME | OTHER_PRONOUN).get(piece, piece) for piece in pieces]
    for i in range(len(pieces) - 2):
        swapped[i : i + 3] = OTHER_NOUN.get(tuple(pieces[i : i + 3]), swapped[i : i + 3])
    corrupted = [words.ids[piece] for piece in swapped]
    return Pair(window, corrupted, following, words.ids[OTHER_PRONOUN[right]])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", help="folder of the model")
    arguments.add_argument("text", help="stories to train and judge on")
    arguments.add_argument("--sae", type=Path, default=Path("sae-stories"))
    arguments.add_argument("--prompts", type=int, default=48, help="pairs per habit, half of them to judge by")
    arguments.add_argument("--size", type=int, default=50, help="largest set")
    arguments.add_argument("--draws", type=int, default=10, help="random sets per size")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each draws other prompts")
    given = arguments.parse_args()
    sae = trained(
        given.sae, given.model, given.text, "--site", "layers.2", "--features", "1024", "--k", "16",
        "--tokens", "1640000", "--batch-tokens", "2048", "--row-bos", "no", "--learning-rate", "0.006",
        "--held-out-rows", str(HELD_OUT_ROWS),
    )  # fmt: skip
    target = saekit.Target.load(given.model)
    pieces = target.tokenizer.convert_ids_to_tokens(range(len(target.tokenizer)))
    words = Vocabulary(pieces, {piece: i for i, piece in enumerate(pieces)})
    context = sae.cfg.context_size or 256
    corpus = load_corpus(given.text, target.tokenizer, context=context, row_bos=False, held_out_rows=HELD_OUT_ROWS)
    rows = corpus.held_out.ids
    for seed in given.seeds:
        for name, find in {"name": find_name, "pronoun": find_pronoun}.items():
            pairs = find_pairs(rows, find, words, target.tokenizer.bos_token_id, given.prompts, seed)
            half = len(pairs) // 2
            print(f"seed {seed}, {name}: {len(pairs)} pairs")
            chosen_on, judged_on = (read_pairs(target, sae, part) for part in (pairs[:half], pairs[half:]))
            report(name, chosen_on, judged_on, sae, given.size, given.draws, halving=False)


if __name__ == "__main__":
    main()
