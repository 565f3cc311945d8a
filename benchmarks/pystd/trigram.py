"""A trigram with interpolated, modified Kneser-Ney smoothing (Chen and Goodman, 1999), in numpy.

What a language model has to beat before it is worth looking into.
"""

from dataclasses import dataclass

import numpy as np

LONGEST = 3


@dataclass(frozen=True, slots=True)
class Order:
    """What is known after contexts of one length.

    Attributes:
        keys: every n-gram seen, as one number, ascending.
        shares: `(count - discount) / total of its context` of each.
        contexts: every context seen, ascending.
        left_over: the probability that discounting leaves each of them for the next shorter context.
    """

    keys: np.ndarray
    shares: np.ndarray
    contexts: np.ndarray
    left_over: np.ndarray


@dataclass(frozen=True, slots=True)
class Trigram:
    """Orders from the longest context to none; what is still left is spread evenly over the vocabulary."""

    vocabulary: int
    orders: tuple[Order, ...]


def fit(ids: np.ndarray, vocabulary: int) -> Trigram:
    """A trigram of `(rows, context)` token ids whose rows open with BOS."""
    keys, counts = np.unique(_grams(ids, vocabulary), return_counts=True)
    orders = []
    for length in range(LONGEST, 0, -1):
        orders.append(_order(keys, counts, vocabulary))
        # a shorter n-gram counts as often as there are different tokens before it
        keys, counts = np.unique(keys % vocabulary ** (length - 1), return_counts=True)
    return Trigram(vocabulary, tuple(orders))


def nats(model: Trigram, ids: np.ndarray) -> np.ndarray:
    """`-log p` of every token but the first of each row, flat."""
    grams = _grams(ids, model.vocabulary)
    probability = np.full(len(grams), 1 / model.vocabulary)
    for length, order in zip(range(1, LONGEST + 1), reversed(model.orders), strict=True):
        these = grams % model.vocabulary**length
        left_over = _look_up(order.contexts, order.left_over, these // model.vocabulary, missing=1.0)
        probability = _look_up(order.keys, order.shares, these, missing=0.0) + left_over * probability
    return -np.log(probability)


def _grams(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    """Every token but the first of each row, with the two before it; BOS stands before BOS."""
    ids = ids.astype(np.int64)
    padded = np.concatenate([ids[:, :1], ids], axis=1)
    return ((padded[:, :-2] * vocabulary + padded[:, 1:-1]) * vocabulary + padded[:, 2:]).flatten()


def _order(keys: np.ndarray, counts: np.ndarray, vocabulary: int) -> Order:
    seen = np.bincount(np.minimum(counts, 5), minlength=6)
    discounts = np.array([0.0, 0.5, 0.5, 0.5])  # of a text too short to tell
    if seen[1:5].all():
        ratio = seen[1] / (seen[1] + 2 * seen[2])
        discounts[1:] = [n - (n + 1) * ratio * seen[n + 1] / seen[n] for n in (1, 2, 3)]
    taken = discounts[np.minimum(counts, 3)]
    contexts, context = np.unique(keys // vocabulary, return_inverse=True)
    totals = np.bincount(context, weights=counts)
    return Order(
        keys=keys,
        shares=(counts - taken) / totals[context],
        contexts=contexts,
        left_over=np.bincount(context, weights=taken) / totals,
    )


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, *, missing: float) -> np.ndarray:
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], missing)
