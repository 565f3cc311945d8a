"""One sparse pass against a dense reference that reads everything at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.activations.tokens import TokenRows
from saekit.analysis.concept_scores import count_concepts
from saekit.analysis.feature_pass import AddressedCodes, FeatureStatistics, measure_features
from saekit.analysis.featured import interesting_features, logit_effects, windows
from saekit.codes import SparseCodes
from saekit.errors import DataError, ShapeError
from saekit.selection import AbsTopK

N_ROWS, CONTEXT, N_FEATURES = 9, 8, 6


def dense_activations(seed: int) -> torch.Tensor:
    """`(tokens, features)` with many ties, some zeros kept as entries, one dead feature and one rare one."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randint(-6, 9, (N_ROWS * CONTEXT, N_FEATURES), generator=generator).clamp(min=0) / 4
    dense[:, 3] = 0
    dense[:, 4] *= torch.arange(len(dense)) == 17
    dense[:, 5] *= torch.rand(len(dense), generator=generator) * 100
    return dense


def with_zero_entries(dense: torch.Tensor) -> SparseCodes:
    """Every pair is an entry, active or not: zeros must not count."""
    tokens, features = torch.ones_like(dense).nonzero(as_tuple=True)
    return SparseCodes.from_pairs(tokens, features, dense.flatten(), n_tokens=len(dense), n_features=dense.shape[1])


def in_batches(dense: torch.Tensor, cuts: list[int], order: torch.Tensor, labels: torch.Tensor | None = None):
    for part in order.tensor_split(sorted(cuts)):
        batch = AddressedCodes(with_zero_entries(dense[part]), part // CONTEXT, part % CONTEXT)
        yield batch if labels is None else batch._replace(labels=labels[part])


def strongest(dense: torch.Tensor, feature: int, *, n: int, distinct_rows: bool) -> list[tuple[float, int, int]]:
    found = sorted(
        (-float(value), token // CONTEXT, token % CONTEXT) for token, value in enumerate(dense[:, feature]) if value > 0
    )
    if distinct_rows:
        found = [x for i, x in enumerate(found) if x[1] not in {y[1] for y in found[:i]}]
    return [(-value, document, position) for value, document, position in found[:n]]


def rows_of(table, feature: int) -> list[tuple[float, int, int]]:
    cells = zip(table.value[feature], table.document[feature], table.position[feature], strict=True)
    return [(float(v), int(d), int(p)) for v, d, p in cells if d >= 0]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    cuts=st.lists(st.integers(0, N_ROWS * CONTEXT), max_size=6),
    distinct_rows=st.booleans(),
    n=st.integers(1, 12),
)
def test_any_split_and_order_gives_what_a_dense_reference_gives(seed, cuts, distinct_rows, n):
    dense = dense_activations(seed)
    order = torch.randperm(len(dense), generator=torch.Generator().manual_seed(seed))
    found = measure_features(in_batches(dense, cuts, order), n_examples=n, distinct_rows=distinct_rows, n_bins=8)
    statistics = found.statistics
    assert statistics.n_tokens == len(dense)
    assert torch.equal(statistics.active, (dense > 0).sum(0))
    assert torch.equal(statistics.max, dense.amax(0).double())
    torch.testing.assert_close(statistics.sum, dense.double().sum(0))
    torch.testing.assert_close(statistics.sum_of_squares, dense.double().square().sum(0))
    assert torch.equal(statistics.l0_counts, torch.bincount((dense > 0).sum(1)))
    for feature in range(N_FEATURES):
        assert rows_of(found.examples.top, feature) == strongest(dense, feature, n=n, distinct_rows=distinct_rows)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), cuts=st.lists(st.integers(0, N_ROWS * CONTEXT), max_size=6))
def test_the_histogram_holds_every_activation_in_its_bin_however_late_the_largest_comes(seed, cuts):
    dense = dense_activations(seed)
    rising = dense.amax(1).argsort()
    statistics = measure_features(in_batches(dense, cuts, rising), n_bins=8).statistics
    assert torch.equal(statistics.histogram.sum(1), statistics.active)
    for feature in range(N_FEATURES):
        values = dense[:, feature].double()
        width = statistics.bin_width[feature]
        if not (values > 0).any():
            assert width == 0
            continue
        expected = torch.bincount((values[values > 0] / width).long(), minlength=8)
        assert torch.equal(statistics.histogram[feature], expected)
        assert expected[4:].sum() > 0  # the bins fit the largest activation


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), cuts=st.lists(st.integers(0, N_ROWS * CONTEXT), max_size=6))
def test_negative_activations_are_as_strong_as_they_are_far_from_zero(seed, cuts):
    signs = torch.randint(0, 2, (N_ROWS * CONTEXT, N_FEATURES), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    dense, forwards = dense_activations(seed), torch.arange(N_ROWS * CONTEXT)
    sizes = measure_features(in_batches(dense, cuts, forwards), n_bins=8, seed=seed)
    signed = measure_features(in_batches(dense * signs, cuts, forwards), n_bins=8, seed=seed)
    for name in ("active", "sum_of_squares", "max", "histogram", "bin_width", "l0_counts"):
        assert torch.equal(getattr(signed.statistics, name), getattr(sizes.statistics, name)), name
    torch.testing.assert_close(signed.statistics.sum, (dense * signs).double().sum(0))
    for found, expected in ((signed.examples.top, sizes.examples.top), (signed.examples.sample, sizes.examples.sample)):
        assert torch.equal(found.position, expected.position) and torch.equal(found.document, expected.document)
        assert torch.equal(found.value.abs(), expected.value)


def test_a_rule_by_size_can_be_measured():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    codes, tokens = AbsTopK(2)(x), torch.arange(40)
    found = measure_features([(codes, tokens, tokens)]).statistics
    assert (codes.values < 0).any()
    assert torch.equal(found.max, codes.to_dense().abs().amax(0).double())
    assert torch.equal(found.histogram.sum(1), found.active)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), cuts=st.lists(st.integers(0, N_ROWS * CONTEXT), max_size=6))
def test_the_sample_does_not_depend_on_the_batches_and_only_holds_real_activations(seed, cuts):
    dense = dense_activations(seed)
    forwards = torch.arange(len(dense))
    once = measure_features(in_batches(dense, [], forwards), n_samples=5, seed=seed).examples.sample
    again = measure_features(in_batches(dense, cuts, forwards.flip(0)), n_samples=5, seed=seed).examples.sample
    for feature in range(N_FEATURES):
        sample = rows_of(once, feature)
        assert sample == rows_of(again, feature)
        assert len(sample) == len(set(sample)) == min(5, int((dense[:, feature] > 0).sum()))
        assert all(dense[d * CONTEXT + p, feature] == v for v, d, p in sample)
        assert sample == sorted(sample, key=lambda x: (-x[0], x[1], x[2]))


def test_the_sample_is_uniform_over_active_tokens_and_changes_with_the_seed():
    n_tokens, n_features, n_samples = 400, 500, 20
    dense = torch.ones(n_tokens, n_features)
    address = torch.arange(n_tokens)
    batch = (SparseCodes.from_dense(dense), address // 20, address % 20)
    first = measure_features([batch], n_samples=n_samples, seed=0).examples.sample
    drawn = torch.bincount((first.document * 20 + first.position).flatten(), minlength=n_tokens)
    # binomial(500, 1/20): mean 25, deviation 4.9; 400 draws stay within five of them
    assert drawn.sum() == n_features * n_samples
    assert drawn.min() > 0
    assert drawn.max() < 50
    assert abs(float(drawn.double().var()) - 500 * 0.05 * 0.95) < 8
    second = measure_features([batch], n_samples=n_samples, seed=1).examples.sample
    assert not torch.equal(first.document, second.document)


def test_mean_and_deviation_are_over_active_tokens():
    dense = dense_activations(1)
    statistics = measure_features(in_batches(dense, [20], torch.arange(len(dense)))).statistics
    values = dense[:, 0][dense[:, 0] > 0].double()
    torch.testing.assert_close(statistics.mean[0], values.mean())
    torch.testing.assert_close(statistics.deviation[0], values.std(correction=0))
    assert statistics.mean[3] == statistics.deviation[3] == 0
    torch.testing.assert_close(statistics.density, (dense > 0).double().mean(0))


def test_concepts_are_counted_along_the_way():
    dense = dense_activations(2)
    labels = torch.rand(len(dense), 3, generator=torch.Generator().manual_seed(3)) < 0.4
    found = measure_features(in_batches(dense, [5, 40], torch.arange(len(dense)), labels)).concepts
    expected = count_concepts(with_zero_entries(dense), labels)
    assert torch.equal(found.both, expected.both)
    assert torch.equal(found.labelled, expected.labelled)
    assert measure_features(in_batches(dense, [], torch.arange(len(dense)))).concepts is None


def test_what_does_not_fit_together_is_refused():
    codes = SparseCodes.from_dense(torch.ones(4, 3))
    address = torch.arange(4)
    with pytest.raises(ShapeError, match="3 documents and 4 positions"):
        measure_features([(codes, address[:3], address)])
    with pytest.raises(ShapeError, match="one SAE at a time"):
        measure_features([(codes, address, address), (SparseCodes.from_dense(torch.ones(4, 2)), address, address)])
    labels = torch.ones(4, 1, dtype=torch.bool)
    with pytest.raises(DataError, match="all batches or with none"):
        measure_features([(codes, address, address, labels), (codes, address, address)])
    with pytest.raises(DataError, match="no codes to measure"):
        measure_features([])


def statistics_with(active: list[int], energy: list[float], n_tokens: int = 1000) -> FeatureStatistics:
    counts, squares = torch.tensor(active), torch.tensor(energy, dtype=torch.float64) * torch.tensor(active)
    zero = torch.zeros(len(active), dtype=torch.float64)
    return FeatureStatistics(
        n_tokens=n_tokens,
        active=counts,
        sum=zero,
        sum_of_squares=squares,
        max=zero,
        histogram=torch.zeros(len(active), 4, dtype=torch.int64),
        bin_width=zero,
        l0_counts=torch.zeros(2, dtype=torch.int64),
    )


def test_interesting_features_take_one_of_each_concept_before_a_second_of_any():
    statistics = statistics_with([50] * 6, [1.0] * 6)
    concept = torch.tensor([0, 0, 0, 1, 2, 3])
    score = torch.tensor([0.9, 0.8, 0.7, 0.3, 0.2, 0.0])
    chosen = interesting_features(statistics, count=8, concept=concept, score=score)
    assert chosen[:4].tolist() == [0, 3, 4, 1]
    assert sorted(chosen.tolist()) == [0, 1, 2, 3, 4, 5]


def test_interesting_features_spread_over_densities_by_energy_and_leave_out_dead_and_dense_ones():
    #                                dead  rare  few ................ many  dense
    statistics = statistics_with([0, 9, 10, 12, 20, 30, 100, 150, 201], [9, 9, 1, 2, 5, 3, 4, 4, 9])
    chosen = interesting_features(statistics, count=3)
    assert chosen.tolist() == [7, 4, 3]  # of (7, 6), (5, 4) and (3, 2)
    assert interesting_features(statistics, count=7).tolist() == [7, 6, 5, 4, 3, 2]
    assert interesting_features(statistics, count=8).tolist() == [8, 7, 6, 5, 4, 3, 2, 1]  # all that fired
    none = interesting_features(statistics_with([0, 0], [0.0, 0.0]), count=5)
    assert none.tolist() == []


def test_windows_show_the_feature_on_every_token_and_stop_at_the_ends_of_the_row():
    dense = dense_activations(4)
    rows = TokenRows.from_ids(torch.arange(N_ROWS * CONTEXT).view(N_ROWS, CONTEXT) + 100)
    asked = []

    def encode_rows(chosen):
        asked.append(chosen.tolist())
        for row in chosen.tolist():
            part = torch.arange(CONTEXT) + row * CONTEXT
            yield with_zero_entries(dense[part]), part // CONTEXT, part % CONTEXT

    feature = torch.tensor([0, 1, 2, 0])
    document, position = torch.tensor([2, 5, 5, -1]), torch.tensor([1, 4, 7, -1])
    found = windows(feature, document, position, rows=rows, encode_rows=encode_rows, before=3, after=2)
    assert asked == [[2, 5]]
    assert found[3] is None
    for window, f, d, p in zip(found[:3], feature.tolist(), document.tolist(), position.tolist(), strict=False):
        first, last = max(p - 3, 0), min(p + 2, CONTEXT - 1)
        tokens = range(d * CONTEXT + first, d * CONTEXT + last + 1)
        assert (window.document, window.position, window.start) == (d, p, first)
        assert window.tokens == tuple(token + 100 for token in tokens)
        assert window.values == tuple(dense[list(tokens), f].tolist())


def test_windows_refuse_examples_of_other_rows():
    rows = TokenRows.from_ids(torch.zeros(2, 4, dtype=torch.int64))
    one = torch.tensor([0])
    with pytest.raises(ShapeError, match="row 7"):
        windows(one, torch.tensor([7]), one, rows=rows, encode_rows=lambda _: [])


def test_logit_effects_are_the_largest_and_smallest_of_the_product():
    generator = torch.Generator().manual_seed(0)
    w_dec, unembed = torch.randn(3, 5, generator=generator), torch.randn(11, 5, generator=generator)
    found = logit_effects(w_dec, unembed, k=4)
    ranked = (w_dec @ unembed.T).sort(dim=1, descending=True)
    assert torch.equal(found.promoted, ranked.indices[:, :4])
    assert torch.equal(found.suppressed, ranked.indices[:, -4:].flip(1))
    torch.testing.assert_close(found.promoted_by, ranked.values[:, :4])
    torch.testing.assert_close(found.suppressed_by, ranked.values[:, -4:].flip(1))
    with pytest.raises(ShapeError, match=r"expected \(n_features, d_model\) and \(vocab, d_model\)"):
        logit_effects(w_dec, unembed[:, :4])
    with pytest.raises(ShapeError, match="the 12 strongest tokens"):
        logit_effects(w_dec, unembed, k=12)
