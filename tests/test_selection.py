"""The rules: laws that any selection of theirs obeys, the budgets, and product-and-selection in one."""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saekit.budgets import smallest_batch, zipf_budgets
from saekit.codes import SparseCodes
from saekit.errors import SaekitError, ShapeError
from saekit.kernels import select
from saekit.selection import AbsTopK, FeatureChoice, GroupMax, MutualChoice, SelectionRule, Threshold, TopK

BATCH_RULES = {
    "TopK": TopK,
    "MutualChoice": MutualChoice,
    "FeatureChoice uniform": FeatureChoice,
    "FeatureChoice Zipf": lambda k: FeatureChoice(k, exponent=1.0, offset=0.5, floor=1),
    "AbsTopK": AbsTopK,
    "without ReLU": lambda k: MutualChoice(k, relu=False),
}
RULES = BATCH_RULES | {"Threshold": lambda k: Threshold(float(k) / 2)}
every_batch_rule = pytest.mark.parametrize("rule", BATCH_RULES.values(), ids=BATCH_RULES.keys())
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
CLOSING = {name: rule for name, rule in RULES.items() if name not in ("AbsTopK", "without ReLU")}
every_closing_rule = pytest.mark.parametrize("rule", CLOSING.values(), ids=CLOSING.keys())
SEEDS = st.integers(0, 2**16)


def distinct(n_tokens: int, n_features: int, seed: int) -> Tensor:
    """Pre-activations of both signs, no two of them equal, nor of one size."""
    order = torch.randperm(n_tokens * n_features, generator=torch.Generator().manual_seed(seed))
    return (order - len(order) // 3).view(n_tokens, n_features) / 8 + 1 / 32


def tied(n_tokens: int, n_features: int, seed: int) -> Tensor:
    """Whole pre-activations of both signs, most of them equal to many others."""
    return torch.randint(-3, 4, (n_tokens, n_features), generator=torch.Generator().manual_seed(seed)).float()


def entries(codes: SparseCodes) -> set[tuple[int, int]]:
    return set(zip(codes.token_of_entry().tolist(), codes.features.tolist(), strict=True))


def best_first(x: Tensor, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The documented order: larger value, then lower flat index."""
    return sorted(pairs, key=lambda pair: (-float(x[pair]), pair[0] * x.shape[1] + pair[1]))


def closes_negatives(rule: SelectionRule) -> bool:
    return not isinstance(rule, AbsTopK) and getattr(rule, "relu", True)


def kept_by_hand(rule: SelectionRule, x: Tensor) -> set[tuple[int, int]]:
    """What each rule is defined to keep, one pair at a time."""
    tokens, features = range(x.shape[0]), range(x.shape[1])
    match rule:
        case TopK(k=k):
            return {pair for n in tokens for pair in best_first(x, [(n, f) for f in features])[:k]}
        case AbsTopK(k=k):
            return {pair for n in tokens for pair in best_first(x.abs(), [(n, f) for f in features])[:k]}
        case MutualChoice(k=k):
            return set(best_first(x, list(itertools.product(tokens, features)))[: k * len(x)])
        case FeatureChoice():
            budgets = rule.budgets(*x.shape).tolist()
            return {pair for f in features for pair in best_first(x, [(n, f) for n in tokens])[: budgets[f]]}
        case Threshold(theta=theta):
            return {pair for pair in itertools.product(tokens, features) if x[pair] > theta}
    raise AssertionError(rule)


@every_rule
@pytest.mark.parametrize("values", [distinct, tied])
@settings(max_examples=15, deadline=None)
@given(k=st.integers(1, 4), n_tokens=st.integers(5, 11), n_features=st.integers(5, 9), seed=SEEDS)
def test_a_rule_keeps_what_it_is_defined_to_keep(rule, values, k, n_tokens, n_features, seed):
    n_tokens = max(n_tokens, -(-n_features // k))
    x = values(n_tokens, n_features, seed)
    codes = rule(k)(x)
    assert entries(codes) == kept_by_hand(rule(k), x)
    raw = x[codes.token_of_entry(), codes.features]
    assert torch.equal(codes.values, raw.relu() if closes_negatives(rule(k)) else raw)
    codes.validate()


@every_batch_rule
@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 4), groups=st.integers(1, 4), ties=st.booleans(), seed=SEEDS)
def test_every_rule_spends_exactly_its_budget(rule, k, groups, ties, seed):
    x = (tied if ties else distinct)(12 * groups, 12, seed)
    codes = rule(k)(x)
    assert len(codes.values) == k * len(x)
    assert not closes_negatives(rule(k)) or (codes.values >= 0).all()


@pytest.mark.parametrize(
    ("rule", "rivals"),
    [(TopK(2), 1), (MutualChoice(2), (0, 1)), (FeatureChoice(2), 0), (FeatureChoice(2, exponent=1.0, floor=1), 0)],
    ids=repr,
)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_no_dropped_pair_beats_a_kept_one_it_competed_with(rule, rivals, seed):
    x = tied(24, 12, seed)
    codes = rule(x)
    kept = torch.zeros_like(x, dtype=torch.bool)
    kept[codes.token_of_entry(), codes.features] = True
    weakest_kept = x.masked_fill(~kept, torch.inf).amin(rivals)
    strongest_dropped = x.masked_fill(kept, -torch.inf).amax(rivals)
    assert (weakest_kept >= strongest_dropped).all()


def test_among_equals_the_lower_flat_index_is_kept():
    x = torch.ones(4, 5)
    assert entries(TopK(2)(x)) == {(n, f) for n in range(4) for f in (0, 1)}
    assert entries(MutualChoice(2)(x)) == {(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2)}
    assert FeatureChoice(2).budgets(4, 5).tolist() == [2, 2, 2, 1, 1]
    assert entries(FeatureChoice(2)(x)) == {(n, f) for f, m in enumerate([2, 2, 2, 1, 1]) for n in range(m)}


@every_batch_rule
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_shuffling_tokens_shuffles_the_codes(rule, seed):
    x = distinct(12, 9, seed)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(rule(2)(x[order]).to_dense(), rule(2)(x).to_dense()[order])


@pytest.mark.parametrize("zipf", [False, True])
@every_batch_rule
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_shuffling_features_shuffles_the_codes(rule, zipf, seed):
    x = distinct(12, 9, seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    before, after = rule(2), rule(2)
    if isinstance(before, FeatureChoice):  # budgets belong to features, so they move with them
        exponent = 1.0 if zipf else 0.0
        before = FeatureChoice(2, exponent=exponent, floor=1, ranks=torch.arange(9))
        after = FeatureChoice(2, exponent=exponent, floor=1, ranks=order)
    assert torch.equal(after(x[:, order]).to_dense(), before(x).to_dense()[:, order])


@settings(max_examples=20, deadline=None)
@given(k=st.integers(1, 8), seed=SEEDS)
def test_mutual_choice_on_one_token_is_top_k(k, seed):
    x = tied(1, 9, seed)
    assert entries(MutualChoice(k)(x)) == entries(TopK(k)(x))


@every_closing_rule
@settings(max_examples=15, deadline=None)
@given(ties=st.booleans(), seed=SEEDS)
def test_relu_before_selection_gives_the_same_codes(rule, ties, seed):
    x = (tied if ties else distinct)(9, 7, seed)
    assert torch.equal(rule(3)(x).to_dense(), rule(3)(x.relu()).to_dense())


@every_closing_rule
def test_all_negative_pre_activations_give_no_active_entry(rule):
    codes = rule(2)(distinct(9, 7, 0) - 100)
    assert not codes.to_dense().any()
    assert len(codes.values) == (0 if isinstance(rule(2), Threshold) else 18)


@every_rule
def test_a_rule_that_looks_across_tokens_says_so(rule):
    x = distinct(8, 6, 0)
    alone, together = rule(2), rule(2)
    if isinstance(alone, FeatureChoice):  # a batch of one token cannot grant every feature one
        alone = TopK(2)
    one_by_one = torch.cat([alone(row[None]).to_dense() for row in x])
    assert torch.equal(together(x).to_dense(), one_by_one) is not together.looks_across_tokens
    assert isinstance(together, SelectionRule)


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(-2, 3), seed=SEEDS)
def test_one_cut_for_all_is_the_same_cut_for_each_and_must_be_exceeded(cut, seed):
    x = tied(5, 7, seed)
    codes = Threshold(float(cut))(x)
    assert entries(codes) == entries(Threshold(torch.full((7,), float(cut)))(x))
    assert torch.equal(codes.to_dense(), torch.where(x > max(cut, 0), x, 0.0))
    assert (codes.values > 0).all()  # under a negative cut too


def test_each_feature_has_its_own_cut():
    x = torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    codes = Threshold(torch.tensor([0.5, 1.0, 5.0]))(x)
    assert entries(codes) == {(0, 0), (1, 0), (1, 1)}


def test_cuts_for_another_dictionary_are_refused():
    with pytest.raises(ShapeError, match="holds 3 cuts, but the dictionary has 4 features"):
        Threshold(torch.zeros(3))(torch.zeros(2, 4))


@settings(max_examples=120, deadline=None)
@given(
    k=st.integers(1, 40),
    n_features=st.integers(1, 400),
    extra_tokens=st.integers(0, 300),
    exponent=st.one_of(st.just(0.0), st.floats(0.0, 3.0), st.floats(0.0, 2000.0)),
    offset=st.one_of(st.just(0.0), st.floats(0.0, 1e4)),
)
def test_budgets_sum_exactly_fall_with_rank_and_stay_within_the_batch(k, n_features, extra_tokens, exponent, offset):
    k = min(k, n_features)
    n_tokens = -(-n_features // k) + extra_tokens
    budgets = zipf_budgets(k, n_tokens=n_tokens, n_features=n_features, exponent=exponent, offset=offset, floor=1)
    assert budgets.shape == (n_features,) and budgets.dtype == torch.int64
    assert int(budgets.sum()) == k * n_tokens
    assert (budgets.diff() <= 0).all()
    assert int(budgets[-1]) >= 1 and int(budgets[0]) <= n_tokens


@pytest.mark.parametrize(
    ("n_tokens", "n_features", "exponent", "offset", "first", "median", "last", "at_floor"),
    [  # computed once by an independent script for k = 32
        (4096, 12288, 1.0, 0.0, [4096, 4096, 4096], 2, 1, 0.20),
        (8192, 32768, 1.0, 0.0, [8192, 8192, 8192], 2, 1, 0.46),
        (8192, 32768, 1.0, 2.7, [7667, 6036, 4977], 2, 1, 0.41),
        (8192, 32768, 0.8, 0.0, [7371, 4234, 3061], 3, 2, 0.00),
        (131072, 32768, 1.0, 0.0, [131072, 131072, 131072], 25, 13, 0.00),
    ],
)
def test_known_budgets(n_tokens, n_features, exponent, offset, first, median, last, at_floor):
    budgets = FeatureChoice(32, exponent=exponent, offset=offset, floor=1).budgets(n_tokens, n_features)
    assert budgets[:3].tolist() == first
    assert int(budgets.median()) == median
    assert int(budgets[-1]) == last
    assert float((budgets == 1).double().mean()) == pytest.approx(at_floor, abs=0.005)
    assert int(budgets.sum()) == 32 * n_tokens


def test_exponent_zero_shares_equally_and_gives_the_rest_to_the_first_ranks():
    assert FeatureChoice(3).budgets(10, 7).tolist() == [5, 5, 4, 4, 4, 4, 4]


@pytest.mark.parametrize(("k", "n_features", "smallest"), [(2, 12, 6), (5, 12, 3), (7, 12, 2), (3, 100, 34)])
def test_the_batch_size_feature_choice_suggests_does_work_and_one_token_fewer_does_not(k, n_features, smallest):
    with pytest.raises(SaekitError, match=rf"use at least {smallest} tokens"):
        FeatureChoice(k)(torch.zeros(smallest - 1, n_features))
    FeatureChoice(k, exponent=1.0, floor=1)(torch.zeros(smallest, n_features))
    FeatureChoice(k)(torch.zeros(smallest, n_features))


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 12),
    n_features=st.integers(13, 300),
    exponent=st.floats(0.05, 1.5),
    offset=st.floats(0.0, 30.0),
    cap=st.sampled_from([1.0, 0.5, 0.25]),
)
def test_the_smallest_batch_keeps_the_curve_and_one_token_fewer_does_not(k, n_features, exponent, offset, cap):
    k = min(k, int(cap * n_features) - 1)
    curve = {"n_features": n_features, "exponent": exponent, "offset": offset, "cap": cap}
    smallest = smallest_batch(k, **curve)
    budgets = zipf_budgets(k, n_tokens=smallest, **curve)
    assert int(budgets.sum()) == k * smallest and int(budgets[-1]) >= 1 and int(budgets[0]) < cap * smallest + 1
    # what the curve says where no cap interferes, to the rounding of single tokens
    weights = (torch.arange(1, n_features + 1, dtype=torch.float64) + offset) ** -exponent
    below_cap = budgets < int(cap * smallest)
    want = weights[below_cap] * (budgets[below_cap].sum() / weights[below_cap].sum())
    assert ((budgets[below_cap] - want).abs() < 2).all()
    if smallest > 1:
        with pytest.raises(SaekitError, match=rf"use at least {smallest:,} tokens .*or floor=1"):
            zipf_budgets(k, n_tokens=smallest - 1, **curve)


def test_without_a_cap_that_acts_the_smallest_batch_is_the_law():
    ranks = torch.arange(1, 4097, dtype=torch.float64)
    harmonic = float((1 / ranks).sum())
    assert smallest_batch(2, n_features=4096, exponent=1.0, offset=0.0) == -(-4096 * harmonic // 2)
    assert smallest_batch(2, n_features=4096, exponent=0.0, offset=0.0) == 2048
    # the first ranks hand on what they may not take, so that a little less than the law will do
    assert 10_000 < smallest_batch(32, n_features=32768, exponent=1.0, offset=0.0) < 11_238
    assert smallest_batch(2, n_features=100, exponent=1.0, offset=0.0, floor=3) == 150


def test_a_curve_that_no_batch_can_serve_is_refused():
    with pytest.raises(SaekitError, match=r"exponent=9 the rarest of 4,096 .*smaller exponent"):
        FeatureChoice(2, exponent=9.0).smallest_batch(4096)
    with pytest.raises(SaekitError, match=r"12 features on at most 0\.2 of all tokens .*k=5 .*a larger cap"):
        FeatureChoice(5, cap=0.2).budgets(10, 12)


@pytest.mark.parametrize(("floor", "cap"), [(-1, 1.0), (1, 0.0), (None, 1.5)])
def test_limits_that_make_no_sense_are_refused(floor, cap):
    with pytest.raises(SaekitError, match=rf"floor={floor}, cap={cap}; give a floor of at least 0"):
        FeatureChoice(2, floor=floor, cap=cap)


def test_a_cap_and_a_floor_hold_the_budgets_between_them():
    budgets = FeatureChoice(4, exponent=3.0, floor=3, cap=0.25).budgets(200, 40)
    assert int(budgets.sum()) == 800
    assert budgets.max() == 50 and (budgets == 50).sum() > 1
    assert budgets.min() == 3 and (budgets == 3).sum() > 1


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, k=st.integers(1, 4), size=st.integers(2, 5), ties=st.booleans())
def test_group_max_keeps_the_strongest_of_each_group(seed, k, size, ties):
    x = (tied if ties else distinct)(9, k * size, seed)
    want = {best_first(x, [(n, f) for f in range(g * size, (g + 1) * size)])[0] for n in range(9) for g in range(k)}
    codes = GroupMax(k)(x)
    assert entries(codes) == want
    assert torch.equal(codes.values, x[codes.token_of_entry(), codes.features].relu())
    eye = torch.eye(k * size)
    with mock.patch.object(select, "BLOCK_ELEMENTS", 16):
        assert_same(GroupMax(k).encode(x, eye, torch.zeros(k * size)), codes)


def test_a_token_of_nan_has_the_first_of_each_group_and_spoils_no_other_token():
    x = torch.tensor([[torch.nan, 1.0, 3.0, 2.0], [1.0, 2.0, 4.0, 3.0]])
    assert select.top_of_groups(x, torch.eye(4), torch.zeros(4), 2).features.tolist() == [0, 2, 1, 2]


def test_groups_of_different_sizes_are_refused():
    with pytest.raises(SaekitError, match=r"GroupMax\(k=3\) cannot divide 8 features .*choose a k that divides"):
        GroupMax(3)(torch.zeros(2, 8))


def test_without_relu_negative_entries_stay_and_no_feature_is_silent_under_feature_choice():
    x = -distinct(12, 6, 0).abs() - 1
    assert not FeatureChoice(2)(x).values.any()
    codes = FeatureChoice(2, relu=False)(x)
    assert (codes.values < 0).all()
    assert (codes.feature_counts() == 4).all() and (codes.l0().sum() == 24)


def test_a_rule_prints_as_one_would_write_it():
    assert repr(TopK(3)) == "TopK(k=3)"
    assert repr(MutualChoice(3, relu=False)) == "MutualChoice(k=3, relu=False)"
    assert repr(FeatureChoice(3, exponent=0.5, ranks=torch.arange(4))) == "FeatureChoice(k=3, exponent=0.5)"


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_each_feature_gets_the_budget_of_its_rank(seed):
    x = tied(20, 12, seed)
    ranks = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    rule = FeatureChoice(3, exponent=1.0, floor=1, ranks=ranks)
    counts = torch.bincount(rule(x).features, minlength=12)
    assert torch.equal(counts, rule.budgets(20, 12)[ranks])
    assert counts.unique().numel() > 2  # a flat curve would prove nothing


def test_ranks_for_another_dictionary_are_refused():
    with pytest.raises(ShapeError, match="ranks for 3 features, but the dictionary has 4"):
        FeatureChoice(2, ranks=torch.arange(3))(torch.zeros(4, 4))


@pytest.mark.parametrize("exponent", [-1.0, torch.nan, torch.inf])
def test_a_curve_that_does_not_fall_is_refused(exponent):
    with pytest.raises(SaekitError, match=r"exponent=.*finite numbers of at least 0"):
        FeatureChoice(2, exponent=exponent)
    with pytest.raises(SaekitError, match=r"offset=.*finite numbers of at least 0"):
        FeatureChoice(2, offset=exponent)


@every_batch_rule
def test_a_k_that_selects_nothing_or_everything_is_refused(rule):
    with pytest.raises(SaekitError, match=r"k=0.*at least 1"):
        rule(0)
    for too_many in (6, 7):
        with pytest.raises(SaekitError, match=rf"k={too_many}\) on 6 features .*choose k below"):
            rule(too_many)(torch.zeros(9, 6))
        with pytest.raises(SaekitError, match=rf"k={too_many}\) on 6 features .*choose k below"):
            rule(too_many).encode(torch.zeros(9, 2), torch.zeros(6, 2), torch.zeros(6))


def whole_numbers(n_tokens: int, n_features: int, d_model: int, seed: int, dtype=torch.float32) -> tuple[Tensor, ...]:
    """Input, weights and bias for which every product is exact, so that ties are ties whatever the order of sums."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)

    return draw(n_tokens, d_model), draw(n_features, d_model), draw(n_features)


def assert_same(got: SparseCodes, want: SparseCodes) -> None:
    assert torch.equal(got.row_starts, want.row_starts)
    assert torch.equal(got.features, want.features)
    assert torch.equal(got.values, want.values)
    assert got.n_features == want.n_features


@every_rule
@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 5),
    n_tokens=st.integers(1, 23),
    n_features=st.integers(6, 19),
    d_model=st.integers(1, 5),
    shift=st.sampled_from([0, 0, -3, -100]),
    block=st.sampled_from([1, 7, 40, 100, 1 << 24]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=SEEDS,
)
def test_encode_keeps_what_the_rule_keeps_on_dense_pre_activations(
    rule, k, n_tokens, n_features, d_model, shift, block, dtype, seed
):
    if isinstance(rule(k), FeatureChoice):
        n_tokens = max(n_tokens, -(-n_features // k))
    x, w_enc, b_enc = whole_numbers(n_tokens, n_features, d_model, seed, dtype)
    b_enc = b_enc + shift
    with mock.patch.object(select, "BLOCK_ELEMENTS", block):
        got = rule(k).encode(x, w_enc, b_enc)
    assert_same(got, rule(k)(x @ w_enc.T + b_enc))


@every_rule
@pytest.mark.parametrize("block", [50, 1 << 24])
def test_encode_of_all_equal_pre_activations(rule, block):
    x, w_enc, b_enc = torch.ones(13, 3), torch.zeros(17, 3), torch.ones(17)
    with mock.patch.object(select, "BLOCK_ELEMENTS", block):
        got = rule(2).encode(x, w_enc, b_enc)
    assert_same(got, rule(2)(torch.ones(13, 17)))


@pytest.mark.parametrize("loudest", ["first", "last"])
@pytest.mark.parametrize("block", [64, 300, 1 << 24])
def test_mutual_choice_is_exact_when_the_first_tokens_are_unlike_the_rest(loudest, block):
    x, w_enc, b_enc = whole_numbers(300, 16, 4, 0)
    x = x * torch.arange(300)[:, None] ** 2
    x = x.flip(0) if loudest == "first" else x
    with mock.patch.object(select, "BLOCK_ELEMENTS", block):
        got = MutualChoice(3).encode(x, w_enc, b_enc)
    assert_same(got, MutualChoice(3)(x @ w_enc.T + b_enc))


@every_rule
def test_encode_takes_any_strides(rule):
    x, w_enc, b_enc = whole_numbers(9, 8, 5, 1)
    strided = rule(2).encode(x.T.contiguous().T, w_enc.T.contiguous().T, b_enc.repeat_interleave(2)[::2])
    assert_same(strided, rule(2).encode(x, w_enc, b_enc))


@pytest.mark.parametrize("rule", [TopK(2), MutualChoice(2), Threshold(0.0)], ids=repr)
def test_an_empty_batch_has_empty_codes(rule):
    codes = rule.encode(torch.zeros(0, 3), torch.ones(4, 3), torch.ones(4))
    assert codes.n_tokens == 0 and len(codes.values) == 0


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Threshold(0.0), "Threshold(0)"),
        (Threshold(1.25, relu=False), "Threshold(1.25, relu=False)"),
        (Threshold(torch.linspace(1, 2, 16384)), "Threshold(16,384 cuts, 1 to 2)"),
    ],
)
def test_a_threshold_is_named_in_one_line_however_many_cuts_it_has(rule, said):
    assert repr(rule) == said
