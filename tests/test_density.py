"""Running densities against an explicit average, and the Zipf fit against curves that are known."""

import pytest
import torch

from saekit.codes import SparseCodes
from saekit.density import RunningDensity, ZipfFit, dead, expected_density, underused, zipf_fit


def batches() -> list[torch.Tensor]:
    """Activations of 4 features: always, sometimes, once, never; batches of several sizes."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, n_tokens in enumerate([5, 8, 1, 30, 12]):
        dense = torch.rand(n_tokens, 4, generator=generator) + 0.1
        dense[:, 1] *= torch.rand(n_tokens, generator=generator) < 0.3
        dense[:, 2] *= i == 1
        dense[:, 3] = 0
        found.append(dense)
    return found


def with_closed_entries(dense: torch.Tensor) -> SparseCodes:
    """Every pair is an entry; those that ReLU closed must not count as firing."""
    tokens, features = torch.ones_like(dense).nonzero(as_tuple=True)
    return SparseCodes.from_pairs(tokens, features, dense.flatten(), n_tokens=len(dense), n_features=dense.shape[1])


@pytest.mark.parametrize("horizon", [3.0, 40.0, 1e6])
def test_density_is_the_average_of_what_was_seen_older_tokens_counting_half_per_horizon(horizon):
    density = RunningDensity.new(4, horizon=horizon)
    weights, shares = [], []
    for dense in batches():
        density.observe(with_closed_entries(dense))
        keep = 2.0 ** (-len(dense) / horizon)
        weights = [w * keep for w in weights] + [1 - keep]
        shares.append((dense > 0).double().mean(0))
        # divided by the sum of the weights: unbiased from the first batch on
        want = sum(w * share for w, share in zip(weights, shares, strict=True)) / sum(weights)
        torch.testing.assert_close(density.density, want)
        assert float(density.density[0]) == pytest.approx(1.0, abs=1e-9)


def test_nothing_seen_is_density_zero():
    assert not RunningDensity.new(3).density.any()


def test_a_batch_without_tokens_says_nothing():
    density = RunningDensity.new(5)
    density.observe(SparseCodes.from_dense(torch.tensor([[0.0, 1, 0, 1, 1]])))
    before = density.density.clone()
    density.observe(SparseCodes.from_dense(torch.zeros(0, 5)))
    assert torch.equal(density.density, before)


def test_tokens_since_fired_counts_tokens_and_starts_again_at_a_firing():
    density = RunningDensity.new(4)
    for dense in batches():
        density.observe(with_closed_entries(dense))
    assert density.tokens_since_fired.tolist() == [0, 0, 1 + 30 + 12, 56]
    assert dead(density.tokens_since_fired, after=43).tolist() == [False, False, False, True]
    assert dead(density.tokens_since_fired, after=42).tolist() == [False, False, True, True]


def test_ranks_are_places_by_density_equals_in_the_order_of_their_index():
    density = RunningDensity.new(5)
    dense = torch.tensor([[0.0, 1, 0, 1, 1], [0.0, 1, 0, 0, 1], [0.0, 0, 0, 0, 1]])
    density.observe(SparseCodes.from_dense(dense))
    assert density.ranks().tolist() == [3, 1, 4, 2, 0]


@pytest.mark.parametrize("exponent", [0.5, 0.8, 1.3])
@pytest.mark.parametrize("offset", [0.0, 3.0, 40.0])
def test_a_planted_curve_is_found_again_although_the_tail_falls_under_it(exponent, offset):
    n_features = 4096
    true = ZipfFit(exponent=exponent, offset=offset, scale=0.2)
    density = true.expected(n_features)
    density[3000:] *= torch.linspace(1, 0, n_features - 3000).double()  # dead and dying ones
    shuffle = torch.randperm(n_features, generator=torch.Generator().manual_seed(0))
    fit = zipf_fit(density[shuffle])
    assert fit.exponent == pytest.approx(exponent, rel=0.03)
    assert fit.offset == pytest.approx(offset, rel=0.15, abs=0.2)
    # what it is for: the line over all ranks, beyond those it was fitted on
    torch.testing.assert_close(fit.expected(n_features), true.expected(n_features), rtol=0.1, atol=0)


def test_expected_density_of_each_feature_is_the_line_at_its_rank():
    fit = ZipfFit(exponent=1.0, offset=0.0, scale=0.6)
    got = expected_density(torch.tensor([0.1, 0.5, 0.0, 0.3]).double(), fit)
    torch.testing.assert_close(got, torch.tensor([0.2, 0.6, 0.15, 0.3]).double())


def test_no_density_is_expected_to_exceed_one():
    assert ZipfFit(exponent=1.0, offset=0.0, scale=5.0).expected(10).tolist() == pytest.approx(
        [1, 1, 1, 1, 1, 5 / 6, 5 / 7, 5 / 8, 5 / 9, 0.5]
    )


def test_features_under_the_line_are_under_used():
    true = ZipfFit(exponent=0.9, offset=2.0, scale=0.3)
    density = true.expected(1000)
    density[900:950] *= 0.7
    density[950:] *= 0.1
    expected = expected_density(density, zipf_fit(density))
    assert underused(density, expected).nonzero()[:, 0].tolist() == list(range(950, 1000))
    assert underused(density, expected, below=0.9)[900:].all()
    assert not underused(density, expected, below=0.0).any()


@pytest.mark.parametrize(
    "density",
    [torch.zeros(50), torch.ones(50), torch.cat([torch.ones(2), torch.zeros(48)]), torch.ones(1), torch.ones(2) / 2],
    ids=["none fire", "all alike", "two fire", "one", "two"],
)
def test_too_little_to_fit_gives_a_flat_finite_line(density):
    fit = zipf_fit(density.double())
    assert fit.exponent == pytest.approx(0.0, abs=1e-9)
    torch.testing.assert_close(fit.expected(len(density)), density.double().mean().expand(len(density)))


@pytest.mark.parametrize("fall", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("n_features", [40, 3000])
def test_densities_that_fall_faster_than_any_zipf_line_still_give_a_finite_falling_one(fall, n_features):
    density = (-fall * torch.arange(n_features).double()).exp()
    density[density < 1e-12] = 0
    expected = zipf_fit(density).expected(n_features)
    assert expected.isfinite().all() and (expected > 0).any()
    assert (expected.diff() <= 0).all()
    # on the middle ranks, where it is fitted, it is the right order of magnitude
    middle = min(int((density > 0).sum()), n_features) // 3
    assert 0.1 < float(expected[middle] / density[middle]) < 10
