"""Recovery on dictionaries whose recovery is known: perfect, permuted, halved, split, absorbing."""

import math
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saekit.activations.firing import UNGATED
from saekit.activations.synthetic import SyntheticConfig, SyntheticSource, SyntheticTruth, synthetic_truth
from saekit.analysis.matching import cosine_of_pairs, match_directions, nearest
from saekit.analysis.recovery import Agreement, count_agreement, measure_recovery, recovery
from saekit.codes import SparseCodes
from saekit.errors import DataError, ShapeError
from saekit.sae import SAE
from saekit.selection import Threshold, TopK
from saekit.training.config import TrainConfig
from saekit.training.loop import train

CONFIG = SyntheticConfig(d_model=16, n_features=24, l0=3.0, offset=2.0, children=0.3)
N = 4000


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def truth() -> SyntheticTruth:
    return synthetic_truth(CONFIG)


@pytest.fixture(scope="module")
def codes(truth) -> SparseCodes:
    return truth.draw_codes(N, torch.Generator().manual_seed(1))


def renamed(codes: SparseCodes, names: Tensor, n_features: int) -> SparseCodes:
    """The same activity under other numbers."""
    return SparseCodes.from_pairs(
        codes.token_of_entry(), names[codes.features], codes.values, n_tokens=codes.n_tokens, n_features=n_features
    )


def from_activity(active: Tensor) -> SparseCodes:
    return SparseCodes.from_dense(active.float())


# directions


@settings(max_examples=30, deadline=None)
@given(n_left=st.integers(1, 5), n_right=st.integers(1, 5), seed=st.integers(0, 1000))
def test_no_other_one_to_one_matching_has_a_larger_sum(n_left, n_right, seed):
    left, right = random(n_left, 3, seed=seed), random(n_right, 3, seed=seed + 1)
    found = match_directions(left, right)
    size = min(n_left, n_right)
    assert len(found.left) == len(set(found.left.tolist())) == len(set(found.right.tolist())) == size
    cosines = torch.nn.functional.normalize(left, dim=1) @ torch.nn.functional.normalize(right, dim=1).T
    torch.testing.assert_close(found.cosine, cosines[found.left, found.right])
    if n_left > n_right:
        cosines = cosines.T
    best = max(
        sum(float(cosines[i, j]) for i, j in enumerate(chosen))
        for chosen in permutations(range(max(n_left, n_right)), size)
    )
    assert float(found.cosine.sum()) == pytest.approx(best, abs=1e-5)


def test_a_permuted_and_rescaled_dictionary_is_matched_back():
    directions, order = random(30, 8), torch.randperm(30, generator=torch.Generator().manual_seed(2))
    found = match_directions(directions, directions[order] * torch.linspace(0.1, 9, 30)[:, None])
    assert torch.equal(order[found.right], found.left)
    torch.testing.assert_close(found.cosine, torch.ones(30))
    value, index = nearest(directions, directions[order])
    assert torch.equal(order[index], torch.arange(30))
    torch.testing.assert_close(value, torch.ones(30))


def test_nearest_in_blocks_is_nearest_at_once(monkeypatch):
    left, right = random(50, 6), random(40, 6, seed=1)
    at_once = nearest(left, right)
    monkeypatch.setattr("saekit.analysis.matching._BLOCK_NUMBERS", 120)
    in_blocks = nearest(left, right)
    assert torch.equal(at_once[1], in_blocks[1])
    torch.testing.assert_close(at_once[0], in_blocks[0])


def test_the_opposite_direction_is_another_feature():
    directions = torch.eye(4)
    assert match_directions(directions[:1], -directions[:1]).cosine.tolist() == [-1]
    assert nearest(directions[:1], torch.stack([-directions[0], directions[1]]))[1].tolist() == [1]
    assert cosine_of_pairs(directions, -directions).tolist() == [-1] * 4
    assert cosine_of_pairs(directions[:1], torch.zeros(1, 4)).tolist() == [0]


def test_dictionaries_of_other_widths_are_refused():
    for compare in (match_directions, nearest, cosine_of_pairs):
        with pytest.raises(ShapeError, match="directions of 3 and of 4 numbers"):
            compare(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ShapeError, match="no directions to be near to"):
        nearest(torch.ones(2, 3), torch.ones(0, 3))


# activations


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), rate=st.floats(0.0, 0.9))
def test_counts_are_those_of_the_dense_matrices_and_add_up(seed, rate):
    generator = torch.Generator().manual_seed(seed)
    true = torch.rand(40, 5, generator=generator) < rate
    learned = torch.rand(40, 7, generator=generator) < rate
    counts = count_agreement(from_activity(true), from_activity(learned))
    dense = torch.from_numpy(counts.both.toarray())
    assert torch.equal(dense, true.long().T @ learned.long())
    assert torch.equal(counts.true, true.sum(0))
    assert torch.equal(counts.learned, learned.sum(0))
    halves = [
        count_agreement(from_activity(true[part]), from_activity(learned[part])) for part in (slice(25), slice(25, 40))
    ]
    total = halves[0] + halves[1]
    assert (total.both != counts.both).nnz == 0
    assert (total.n_tokens, total.true.tolist(), total.learned.tolist()) == (
        40,
        counts.true.tolist(),
        counts.learned.tolist(),
    )
    i, j = torch.tensor([0, 4, 2]), torch.tensor([6, 0, 3])
    assert torch.equal(counts.together(i, j), dense[i, j].double())


def test_an_entry_that_relu_closed_is_not_active():
    closed = SparseCodes(torch.tensor([0.0, 2.0]), torch.tensor([0, 1]), torch.tensor([0, 2]), n_features=2)
    counts = count_agreement(from_activity(torch.ones(1, 1)), closed)
    assert counts.both.toarray().tolist() == [[0, 1]]
    assert counts.learned.tolist() == [0, 1]


def test_counts_that_do_not_belong_together_are_refused():
    with pytest.raises(ShapeError, match="true codes of 3 tokens and learned ones of 2"):
        count_agreement(from_activity(torch.ones(3, 1)), from_activity(torch.ones(2, 1)))
    one, other = (count_agreement(from_activity(torch.ones(3, n)), from_activity(torch.ones(3, 2))) for n in (1, 2))
    with pytest.raises(ShapeError, match=r"counts of \(1, 2\) and \(2, 2\) features do not add"):
        one + other
    assert isinstance(one, Agreement)


# recovery


def test_the_truth_recovers_itself_whatever_the_order_and_the_dead_rows(truth, codes):
    names = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:24]
    decoder = random(40, 16)  # the other rows are of features that never fire
    decoder[names] = truth.directions
    found = recovery(truth, decoder, [(codes, renamed(codes, names, 40))])
    assert found.live == 24
    assert torch.equal(found.matching.right, names)
    for name in ("mean_max_cosine", "learned_max_cosine", "matched_cosine", "recovered", "precision", "recall", "f1"):
        assert getattr(found, name) == pytest.approx(1), name
    assert (found.split, found.absorbed) == (0, 0)
    assert [band.recovered for band in found.bands] == [1] * len(found.bands)


def test_a_dictionary_that_stops_at_a_rank_is_seen_to_stop_there(truth, codes):
    kept = torch.arange(24) < 10
    subset = codes.with_values(codes.values * kept[codes.features])
    found = recovery(truth, truth.directions, [(codes, subset)])
    assert found.live == 10
    assert found.recovered == pytest.approx(10 / 24)
    assert found.recall == found.precision == found.f1 == pytest.approx(10 / 24)
    assert found.learned_max_cosine == pytest.approx(1)
    cosines = truth.directions @ truth.directions[:10].T
    assert found.mean_max_cosine == pytest.approx(float(cosines.amax(1).mean()))
    first, last = found.bands[0].first, found.bands[-1].last
    assert (first, last) == (1, 24)
    assert all(a.last + 1 == b.first for a, b in pairwise(found.bands))
    for band in found.bands:
        inside = range(band.first, band.last + 1)
        assert band.recovered == band.f1 == pytest.approx(sum(rank <= 10 for rank in inside) / len(inside))
        assert band.density == pytest.approx(float(truth.density[band.first - 1 : band.last].mean()))
    assert found.summary()[f"recovered_{first}_to_{found.bands[0].last}"] == 1


def test_precision_and_recall_tell_what_fires_too_much_from_what_fires_too_little(truth, codes):
    sparse = codes.with_values(codes.values * (torch.arange(len(codes.values)) % 2))
    tight = recovery(truth, truth.directions, [(codes, sparse)])
    assert tight.precision == 1
    assert tight.recall == pytest.approx(0.5, abs=0.05)
    loose = recovery(truth, truth.directions, [(sparse, codes)])
    assert loose.recall == 1
    assert loose.precision == pytest.approx(0.5, abs=0.05)


def test_a_feature_in_two_halves_counts_as_split(truth, codes):
    half = (torch.arange(len(codes.values)) % 2).bool() & (codes.features == 5)
    learned = renamed(codes, torch.arange(24), 25)
    learned = SparseCodes.from_pairs(
        learned.token_of_entry(),
        torch.where(half, 24, learned.features),
        learned.values,
        n_tokens=N,
        n_features=25,
    )
    found = recovery(truth, torch.cat([truth.directions, truth.directions[5:6]]), [(codes, learned)])
    assert found.split == pytest.approx(1 / 24)


def test_a_parent_that_is_silent_where_its_child_speaks_counts_as_absorbed(truth, codes):
    parent = truth.firing.parent
    children = (parent != UNGATED).nonzero()[:, 0].tolist()
    # an only child: else the parent would be silent on part of the siblings' tokens too
    child = next(i for i in children if sum(int(parent[j] == parent[i]) for j in children) == 1)
    with_child = codes.to_dense()[:, child] > 0
    lost = with_child[codes.token_of_entry()] & (codes.features == parent[child])
    found = recovery(truth, truth.directions, [(codes, codes.with_values(codes.values.masked_fill(lost, 0)))])
    assert found.absorbed == pytest.approx(1 / len(children))
    # as silent everywhere as where the child speaks is a bad partner, but nothing is absorbed
    lost = (codes.features == parent[child]) & (torch.arange(len(codes.values)) % 2).bool()
    found = recovery(truth, truth.directions, [(codes, codes.with_values(codes.values.masked_fill(lost, 0)))])
    assert found.absorbed == pytest.approx(0, abs=0.02)
    plain = synthetic_truth(replace(CONFIG, children=0.0))
    own = plain.draw_codes(N, torch.Generator().manual_seed(1))
    assert math.isnan(recovery(plain, plain.directions, [(own, own)]).absorbed)


def test_a_dictionary_that_never_fires_is_refused(truth, codes):
    silent = codes.with_values(torch.zeros_like(codes.values))
    for pairs in ([], [(codes, silent)]):
        with pytest.raises(DataError, match="no learned feature fires"):
            recovery(truth, truth.directions, pairs)


def test_a_trained_sae_finds_what_an_untrained_one_does_not():
    config = SyntheticConfig(d_model=16, n_features=20, l0=2.0, offset=5.0, noise=0.01)
    source = SyntheticSource(truth=synthetic_truth(config))
    settings_ = TrainConfig(
        site=source.site, rule=TopK(2), n_features=32, tokens=400 * 256, batch_tokens=256, learning_rate=5e-3
    )
    trained = measure_recovery(train([settings_], source)[0], source, n_tokens=8192)
    untrained = measure_recovery(SAE(16, 32, TopK(2)), source, n_tokens=8192)
    assert trained.n_tokens == 8192
    assert trained.recovered > 0.8 > 0.2 > untrained.recovered
    assert trained.f1 > untrained.f1 + 0.2


def test_the_perfect_sae_is_measured_as_perfect():
    """Orthogonal directions, so that an encoder can read them without error."""
    config = SyntheticConfig(d_model=16, n_features=16, l0=2.0, spread=0.0, noise=0.0)
    truth = replace(synthetic_truth(config), directions=torch.eye(16))
    sae = SAE(16, 16, Threshold(0.5))
    with torch.no_grad():
        sae.encoder.copy_(torch.eye(16))
        sae.decoder.copy_(torch.eye(16))
    found = measure_recovery(sae, SyntheticSource(truth=truth), n_tokens=5000, seed=9)
    assert found.n_tokens == 5000
    assert (found.matched_cosine, found.precision, found.recall, found.f1) == (1, 1, 1, 1)
