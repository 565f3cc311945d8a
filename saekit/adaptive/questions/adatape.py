"""AdaTape: what features of tape tokens are tied to, and what is on the tape alone.

Asked of a model that reads sequences of symbols and tells the parity of the ones. Features are chosen on the
sequences that SAEs learn from, and measured on others. What features *do* is asked in `adatape_causes` and
`adatape_flow` (to answers) and in `adatape_queries` (to reading), banks in `adatape_bank`. Slots behind the end of
a tape hold numbers too, and are left out throughout.
"""

import warnings

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.adaptive.adatape import AdaTape
from saekit.adaptive.adatape_inputs import Symbols
from saekit.adaptive.deciding import adatape_target
from saekit.adaptive.questions.adatape_bank import bank_use, order_of
from saekit.adaptive.questions.adatape_causes import boundary
from saekit.adaptive.questions.adatape_flow import flow, large_tapes
from saekit.adaptive.questions.adatape_queries import attributed, causes_of_halts, causes_of_picks, steered
from saekit.adaptive.questions.adatape_reading import OWN, TAPE, Reading, Screen, permuted, read_tapes, train_sae
from saekit.adaptive.questions.answers import Answers, answered
from saekit.adaptive.questions.paired import Paired
from saekit.adaptive.telling import FEWEST_ACTIVE, mutual_information, probe_auc
from saekit.errors import SaekitError
from saekit.losses import fvu
from saekit.patching import OffDistributionWarning
from saekit.patching.coordinates import columns_of
from saekit.sae import SAE
from saekit.selection import TopK
from saekit.targets import Site
from saekit.training.config import TrainConfig
from saekit.training.crosscoder import train_crosscoder

# of a feature's squared decoder norm, on one side, for it to live there: twice as long as on the other
MOSTLY = 0.8
USUAL = Screen()


def ask(
    model: AdaTape,
    train_inputs: Float[Tensor, "n length"],
    test_inputs: Float[Tensor, "m length"],
    *,
    tokens: int = 200_000,
    screen: Screen = USUAL,
    seed: int = 0,
) -> Answers:
    """The questions of the AdaTape specification; of a learnt bank, ask `bank_use`.

    Edits here mean to take vectors off what the model is used to, so that it does not warn about that.

    Args:
        tokens: that each SAE learns from.
        screen: how many features are tried and compared.

    Raises:
        SaekitError: a model of pictures, or one whose bank is learnt.
    """
    if not isinstance(model.seen, Symbols) or model.learnt_bank is not None:
        raise SaekitError(
            "these questions are about sequences in a bank made of them; of another bank "
            "saekit.adaptive.questions.adatape_bank.bank_use tells the use"
        )
    target = adatape_target(model)
    train, test = (read_tapes(target, model, inputs) for inputs in (train_inputs, test_inputs))
    tape = train_sae(TAPE, train.tape[train.live], tokens=tokens, seed=seed)
    last = train_sae(TAPE, train.last[train.live], tokens=tokens, seed=seed)
    # a sequence's own token is a sum of one embedding per symbol
    own = train_sae(OWN, train.base, k=min(model.config.length, 16), tokens=tokens, seed=seed)
    query = train_sae(Site.parse("reader.query:out"), train.queries[train.live], tokens=tokens, seed=seed)
    how = {"tokens": tokens, "seed": seed}
    labels = train.labels, test.labels
    questions = {
        "what features of tape tokens are tied to": lambda: tied_to(tape, train, test, seed=seed),
        "what features of tape tokens are tied to, at the last block": lambda: tied_to(
            last, train, test, at_last=True, seed=seed
        ),
        "whether a feature counts the ones at their boundary": lambda: boundary(target, tape, train, test, screen),
        "which features make the score of an entry": lambda: attributed(model, query, train, test, **how),
        "which features of a query pick": lambda: causes_of_picks(target, query, train, test, screen),
        "which features of a query end the tape": lambda: causes_of_halts(target, query, train, test, screen),
        "how the bank is used": lambda: (
            bank_use(model, (train_inputs, test_inputs), labels, **how) | order_of(test, seed=seed)
        ),
        "how the tape reaches the answer": lambda: flow(target, model, tape, own, train, test, screen),
        "which features only long tapes have": lambda: large_tapes(target, model, tape, last, train, test, seed=seed),
        "what is on the tape and not in the sequence's token": lambda: apart(train, test, **how),
        "whether the first query can be steered": lambda: steered(target, query, train, test, screen),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OffDistributionWarning)
        return answered(questions)


def tied_to(sae: SAE, train: Reading, test: Reading, *, at_last: bool = False, seed: int = 0) -> dict[str, float]:
    """Information, in bits, that whether a feature is active has about properties of its token.

    Each beside the same with the property permuted among tokens (floor), which is what so few tokens give by luck.
    `given` is information beyond another property, and its floor permutes among tokens that share the latter.
    *_best is of the feature that has most on the training half.
    """
    pairs = [(half.last if at_last else half.tape)[half.live] for half in (train, test)]
    codes = [sae.encode(vectors) for vectors in pairs]
    counts = torch.stack([one.feature_counts() for one in codes])
    features = (counts >= FEWEST_ACTIVE).all(0).nonzero()[:, 0]
    active, active_train = (columns_of(one, features) > 0 for one in (codes[1], codes[0]))
    of, of_train = _properties(test), _properties(train)
    generator = torch.Generator().manual_seed(seed)
    found = {"features": float(len(features)), "fvu": float(fvu(pairs[1], sae(pairs[1])))}
    found["bits_of_a_feature"] = float(torch.tensor([mutual_information(a, a) for a in active.T.long()]).mean())
    beyond_luck = []
    for name, values in of.items():
        bits, luck = informations(active, values), informations(active, permuted(values, generator))
        chosen = int(informations(active_train, of_train[name]).argmax())
        found |= {name: float(bits.mean()), f"{name}_floor": float(luck.mean())}
        found |= {f"{name}_best": float(bits[chosen]), f"{name}_best_floor": float(luck[chosen])}
        beyond_luck.append(bits - luck)
    most = torch.stack(beyond_luck).argmax(0)
    found |= {f"share_most_about_{name}": float((most == i).float().mean()) for i, name in enumerate(of)}
    for name, known in (("slot", "mixture"), ("mixture", "slot"), ("entry", "place"), ("label", "slot")):
        given = of["slot"] * (int(of["mixture"].max()) + 1) + of["mixture"] if known == "place" else of[known]
        key = f"{name}_given_{'slot_and_mixture' if known == 'place' else known}"
        found[key] = float(informations(active, of[name], given).mean())
        found[f"{key}_floor"] = float(informations(active, permuted(of[name], generator, given), given).mean())
    return found


def _properties(reading: Reading) -> dict[str, Int[Tensor, " n_tokens"]]:
    """Of every slot of a tape: its number, its heaviest entry, which symbols it mixes, and the sequence's parity."""
    entries, weights = reading.trace.more["entries"], reading.trace.more["weights"]
    zeros = (reading.symbols == 0).sum(2)
    found = {
        "slot": reading.slots,
        "entry": entries.gather(2, weights.argmax(2, keepdim=True))[..., 0],
        "mixture": reading.ones * (entries.shape[2] + 1) + zeros,
        "label": reading.labels[:, None].expand(reading.live.shape),
    }
    return {name: values[reading.live] for name, values in found.items()}


def informations(
    active: Bool[Tensor, "n features"], of: Int[Tensor, " n"], given: Int[Tensor, " n"] | None = None
) -> Float[Tensor, " features"]:
    """Mutual information of each column with a property, beyond what another property has."""
    if given is None:
        return torch.tensor([mutual_information(column, of) for column in active.T.long()])
    both = given * (int(of.max()) + 1) + of
    return informations(active, both) - informations(active, given)


def apart(train: Reading, test: Reading, *, tokens: int, seed: int) -> dict[str, float]:
    """What tape and own token have in common: features of a crosscoder, and what linear probes find on either side.

    A tape has as many tokens as it wants and the sequence has one, so that the fresh slots stand for it, end to end;
    probes are asked of the mean over the tape too. Two controls bound the shares of the crosscoder: own tokens with
    the tapes of others (nothing in common), and with turned copies of themselves (everything in common).
    """
    first = int(min(train.fresh.sum(1).min(), test.fresh.sum(1).min()))
    halves, generator = (train, test), torch.Generator().manual_seed(seed)
    sides = {
        "own": (train.base, test.base),
        "slots": tuple(half.tape[:, :first].flatten(1) for half in halves),
        "mean_slot": tuple(half.tape.mul(half.live[..., None]).sum(1) / half.length[:, None] for half in halves),
    }
    turned = torch.linalg.qr(torch.randn(train.base.shape[1], train.base.shape[1], generator=generator))[0]
    other = permuted(torch.arange(len(train.base)), generator)
    arms = {"": sides["slots"][0], "_of_others": sides["slots"][0][other], "_of_itself": train.base @ turned}
    found: dict[str, float] = {}
    for name, side in arms.items():
        vectors = {OWN: train.base, TAPE: side}
        config = TrainConfig(site=TAPE, rule=TopK(8), n_features=96, tokens=tokens, seed=seed, encoder_start="unit")
        coder = train_crosscoder(config, Paired(vectors), [OWN, TAPE], model_name="adatape")
        shares = coder.decoder_norms()[coder.encode(vectors).feature_counts() >= FEWEST_ACTIVE].square()
        found |= {
            f"mostly_own{name}": float((shares[:, 0] > MOSTLY).float().mean()),
            f"mostly_tape{name}": float((shares[:, 1] > MOSTLY).float().mean()),
            f"mean_tape_share{name}": float(shares[:, 1].mean()),
        }
    many = (train.inputs == 1).sum(1).float().median()
    asked = {
        "parity": tuple(half.labels == 1 for half in halves),
        "many_ones": tuple((half.inputs == 1).sum(1) > many for half in (train, test)),
        "first_symbol": tuple(half.inputs[:, 0] == 1 for half in (train, test)),
    }
    for what, (truth, truth_test) in asked.items():
        for side, (seen, seen_test) in sides.items():
            found[f"{what}_from_{side}"] = probe_auc(seen, truth, seen_test, truth_test)
    return found
