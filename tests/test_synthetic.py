"""Synthetic truth: what is drawn agrees with the densities, joint densities and means in closed form."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saekit.activations.batch import ActivationSource
from saekit.activations.firing import UNGATED, FiringLaw, zipf_densities
from saekit.activations.synthetic import BLOCK_TOKENS, SyntheticConfig, SyntheticSource, SyntheticTruth, synthetic_truth
from saekit.errors import DataError, SaekitError

N = 60_000
PLAIN = SyntheticConfig(d_model=12, n_features=40, l0=4.0, offset=2.0)
CLUSTERED = replace(PLAIN, cluster_size=4, correlation=0.7)
HIERARCHY = replace(PLAIN, children=0.4)
BOTH = replace(PLAIN, cluster_size=3, children=0.3)
CONFIGS = {"plain": PLAIN, "clustered": CLUSTERED, "hierarchy": HIERARCHY, "both": BOTH}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fired(truth: SyntheticTruth, n_tokens: int = N) -> Tensor:
    """`(n_tokens, n_features)` 1 where a feature fires; small enough here to be dense."""
    return (truth.draw_codes(n_tokens, generator()).to_dense() > 0).double()


def in_deviations(counted: Tensor, expected: Tensor, n: int) -> Tensor:
    """How far shares counted over `n` tokens are from their expectation, in standard deviations."""
    return (counted - expected) / (expected * (1 - expected) / n).sqrt().clamp(min=1e-12)


# the law


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_densities_and_joint_densities_are_the_ones_promised(config):
    truth = synthetic_truth(config)
    on = fired(truth)
    i, j = torch.triu_indices(config.n_features, config.n_features)
    joint = truth.firing.joint(i, j)
    torch.testing.assert_close(joint[i == j], truth.density)
    # the largest of 820 normal deviations passes 5 once in two thousand draws; this draw is always the same
    assert float(in_deviations((on.T @ on / N)[i, j], joint, N).abs().max()) < 5


def test_topics_make_their_members_fire_together_as_much_as_asked():
    law = synthetic_truth(CLUSTERED).firing
    neighbours, strangers = torch.tensor([4, 5]), torch.tensor([4, 9])
    lift = law.joint(neighbours[:1], neighbours[1:]) / law.density[neighbours].prod()
    assert float(lift) == pytest.approx(float(law.density[4] ** -0.7))
    assert float(law.joint(strangers[:1], strangers[1:])) == pytest.approx(float(law.density[strangers].prod()))


@pytest.mark.parametrize("config, n_children", [(HIERARCHY, 16), (BOTH, 12)], ids=["alone", "with topics"])
def test_a_child_never_fires_without_its_parent_and_the_parent_does_without_it(config, n_children):
    truth = synthetic_truth(config)
    parent = truth.firing.parent
    assert int(parent.max()) < config.n_features  # a topic is nobody's parent
    children = (parent != UNGATED).nonzero()[:, 0]
    assert len(children) == n_children
    assert (truth.density[parent[children]] >= truth.density[children]).all()
    on = fired(truth).bool()
    assert not (on[:, children] & ~on[:, parent[children]]).any()
    assert (on[:, parent[children]] & ~on[:, children]).any(0).all()


def test_siblings_are_independent_given_their_parent():
    law = FiringLaw(torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64), torch.tensor([UNGATED, 0, 0]), 3)
    assert float(law.joint(torch.tensor([1]), torch.tensor([2]))) == pytest.approx(0.5 * 0.4 * 0.2)


@pytest.mark.parametrize("probability, gate", [([0.2, 0.3], [UNGATED, 0]), ([1.0], [UNGATED]), ([-0.1], [UNGATED])])
def test_a_law_that_cannot_be_is_refused(probability, gate):
    with pytest.raises(SaekitError, match=r"has probability .*; give at least 0, under 1, and no more than the gate's"):
        FiringLaw(torch.tensor(probability, dtype=torch.float64), torch.tensor(gate), len(gate))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 200),
    share=st.floats(0.01, 0.99),
    exponent=st.floats(0, 3),
    offset=st.floats(0, 50),
    most=st.floats(0.05, 0.95),
)
def test_zipf_densities_sum_to_what_is_asked_and_keep_the_curve_below_the_cap(n, share, exponent, offset, most):
    density = zipf_densities(n, total=share * n * most, exponent=exponent, offset=offset, most=most)
    assert float(density.sum()) == pytest.approx(share * n * most)
    assert float(density.max()) <= most * (1 + 1e-12)
    curve = (torch.arange(1, n + 1, dtype=torch.float64) + offset) ** -exponent
    scale = (density / curve)[density < most * (1 - 1e-9)]
    torch.testing.assert_close(scale, scale[:1].expand_as(scale) if len(scale) else scale)


def test_more_active_features_than_densities_allow_is_refused():
    with pytest.raises(SaekitError, match=r"10 features of density 0\.5 at most cannot be 6 active per token"):
        synthetic_truth(SyntheticConfig(n_features=10, l0=6.0))


# what vectors look like


@pytest.mark.parametrize("magnitudes", ["log-normal", "half-normal"])
def test_magnitudes_have_the_moments_promised(magnitudes):
    config = replace(PLAIN, magnitudes=magnitudes, spread=0.6)
    values = synthetic_truth(config).draw_codes(N, generator()).values.double()
    spread = (1 - config.mean_magnitude**2) ** 0.5
    assert float(values.min()) > 0
    assert float(values.mean()) == pytest.approx(config.mean_magnitude, abs=5 * spread / len(values) ** 0.5)
    assert float(values.square().mean()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_mean_vector_is_the_one_promised(config):
    truth = synthetic_truth(replace(config, mean_size=1.0))
    vectors, _ = truth.draw(N, generator())
    expected = truth.mean + ((truth.density * config.mean_magnitude) @ truth.directions.double()).float()
    off = (vectors.double().mean(0) - expected) / (vectors.double().std(0) / N**0.5)
    assert float(off.abs().max()) < 5


def test_vectors_are_mean_features_and_noise_of_the_size_asked():
    truth = synthetic_truth(replace(PLAIN, noise=0.1))
    vectors, codes = truth.draw(20_000, generator())
    assert torch.allclose(truth.directions.norm(dim=1), torch.ones(40))
    left = vectors - codes.to_dense() @ truth.directions - truth.mean
    assert float(left.std()) == pytest.approx(0.1, rel=0.02)
    quiet, codes = synthetic_truth(replace(PLAIN, noise=0.0)).draw(500, generator())
    torch.testing.assert_close(quiet, truth.vectors(codes))


def test_outlier_dimensions_have_the_mean_asked_for_and_the_others_do_not():
    config = SyntheticConfig(d_model=64, n_features=300, outlier_dims=3, outlier_size=25.0)
    vectors, _ = synthetic_truth(config).draw(20_000, generator())
    ratio = (vectors.mean(0).abs() / vectors.std(0)).sort(descending=True).values
    # the deviation is that of an average dimension, so single ones are a little off
    assert ratio[:3].tolist() == pytest.approx([25, 25, 25], rel=0.3)
    assert float(ratio[3]) < 1.5


# the source


def test_a_source_streams_the_same_tokens_for_a_seed_whatever_the_batch():
    source = SyntheticSource(truth=synthetic_truth(BOTH))
    assert isinstance(source, ActivationSource)

    def first(batch_tokens: int, seed: int) -> Tensor:
        stream = source.stream(batch_tokens, seed=seed)
        batches = [next(stream)[source.site] for _ in range(-(-6000 // batch_tokens))]
        assert {len(batch) for batch in batches} == {batch_tokens}
        return torch.cat([batch.vectors for batch in batches])[:6000]

    assert torch.equal(first(700, 5), first(6000, 5))
    # seeds that differ in their high bits alone are different seeds too
    assert not torch.equal(first(700, 5), first(700, 5 + 2**32))
    other_truth = SyntheticSource(truth=synthetic_truth(replace(BOTH, seed=1)))
    assert not torch.equal(next(other_truth.stream(10, seed=5))[source.site].vectors, first(10, 5)[:10])


def test_blocks_do_not_repeat():
    source = SyntheticSource(truth=synthetic_truth(PLAIN))
    vectors = next(source.stream(3 * BLOCK_TOKENS, seed=0))[source.site].vectors.split(BLOCK_TOKENS)
    assert not torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[1], vectors[2])


def test_the_codes_of_any_batch_can_be_asked_for_afterwards():
    source = SyntheticSource(truth=synthetic_truth(replace(BOTH, noise=0.0)))
    stream = source.stream(1500, seed=2)
    batch = [next(stream)[source.site] for _ in range(6)][-1]
    batch = batch.select(torch.randperm(1500, generator=generator()))
    codes = source.codes(batch.document, seed=2)
    torch.testing.assert_close(source.truth.vectors(codes), batch.vectors)
    assert source.codes(batch.document[:0], seed=2).n_tokens == 0
    with pytest.raises(DataError, match="there is no token -1"):
        source.codes(torch.tensor([3, -1]), seed=2)


def test_the_same_config_gives_the_same_truth_and_another_seed_another():
    first, again, other = (synthetic_truth(replace(BOTH, mean_size=1.0, seed=seed)) for seed in (0, 0, 1))
    for name in ("directions", "mean"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert torch.equal(first.firing.gate, again.firing.gate)
    assert not torch.equal(first.firing.gate, other.firing.gate)


def test_an_untrained_sae_of_the_same_seed_knows_nothing_of_the_truth():
    truth = synthetic_truth(replace(PLAIN, seed=0))
    untrained = torch.randn(40, 12, generator=generator(0))
    assert float(torch.nn.functional.cosine_similarity(untrained, truth.directions).abs().mean()) < 0.5


def test_without_noise_spread_and_superposition_a_vector_is_its_features():
    config = SyntheticConfig(d_model=8, n_features=3, l0=1.0, spread=0.0, noise=0.0)
    truth = synthetic_truth(config)
    vectors, codes = truth.draw(50, generator())
    assert config.mean_magnitude == 1
    assert math.isclose(float(codes.values.max()), 1)
    torch.testing.assert_close(vectors, (codes.to_dense() > 0).float() @ truth.directions)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"children": 1.5}, r"children=1\.5 is a share"),
        ({"most_dense": 1.0}, r"most_dense=1\.0 is a share"),
        ({"outlier_dims": 65}, "65 outlier dimensions of 64"),
        ({"cluster_size": 3, "correlation": 0.0}, "correlation=0 makes topics mean nothing"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(SaekitError, match=message):
        SyntheticConfig(**changes)
