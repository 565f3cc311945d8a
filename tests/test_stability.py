"""Stability of dictionaries whose likeness is known, and of trained ones."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saekit.activations.synthetic import SYNTHETIC, SyntheticConfig, SyntheticSource, synthetic_truth
from saekit.analysis.stability import measure_stability, train_over_seeds
from saekit.errors import DataError, SaekitError, ShapeError
from saekit.sae import SAE, SAEConfig
from saekit.selection import TopK
from saekit.training.config import TrainConfig

D_MODEL = 16


def sae_of(decoder: Tensor, encoder: Tensor | None = None, *, site: str = "layers.1", **metadata: object) -> SAE:
    n_features, d_model = decoder.shape
    cfg = SAEConfig(d_in=d_model, d_sae=n_features, hook_name=site, metadata=metadata)
    sae = SAE(d_model, n_features, TopK(2), cfg=cfg)
    with torch.no_grad():
        sae.decoder.copy_(decoder)
        sae.encoder.copy_(decoder if encoder is None else encoder)
    return sae


def orthogonal(n: int = D_MODEL) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0))).Q


def turned(directions: Tensor, cosine: float) -> Tensor:
    """The first half of orthogonal directions, each turned towards its own one of the other half."""
    n = len(directions) // 2
    return cosine * directions[:n] + math.sqrt(1 - cosine**2) * directions[n:]


def test_a_permuted_dictionary_is_the_same_and_the_pairs_say_which_is_which():
    directions = orthogonal()
    order = torch.randperm(D_MODEL, generator=torch.Generator().manual_seed(1))
    found = measure_stability([sae_of(directions), sae_of(directions[order])])
    (pair,) = found.pairs
    assert torch.equal(order[pair.partner], torch.arange(D_MODEL))
    summary = found.summary()
    assert (summary["n_saes"], summary["n_pairs"]) == (2, 1)
    for name in ("mean_max_cosine", "matched_cosine", "encoder_cosine"):
        assert summary[name] == pytest.approx(1), name
    for name in ("shared_70", "shared_90", "encoder_70", "encoder_90", "both_70", "both_90", "everywhere_90"):
        assert summary[name] == 1, name


@pytest.mark.parametrize("cosine, at_70, at_90", [(0.65, 0, 0), (0.75, 1, 0), (0.95, 1, 1)])
def test_shares_count_partners_from_their_cosine_on(cosine, at_70, at_90):
    directions = orthogonal()
    (pair,) = measure_stability([sae_of(directions[:8]), sae_of(turned(directions, cosine))]).pairs
    assert pair.matched_cosine == pytest.approx(cosine, abs=1e-6)
    assert (pair.shared_70, pair.shared_90) == (at_70, at_90)


def test_what_features_read_is_compared_apart_from_what_they_write():
    directions = orthogonal()
    other = torch.cat([directions[:4], turned(directions, 0.8)[4:8]])
    found = measure_stability([sae_of(directions[:8]), sae_of(directions[:8], other)]).summary()
    assert found["shared_90"] == found["encoder_70"] == found["both_70"] == 1
    assert found["encoder_90"] == found["both_90"] == 0.5
    assert found["encoder_cosine"] == pytest.approx(0.9)
    # and the other way round: written differently, read alike
    found = measure_stability([sae_of(directions[:8]), sae_of(other, directions[:8])]).summary()
    assert (found["shared_90"], found["encoder_90"], found["both_90"]) == (0.5, 1, 0.5)


def test_a_feature_is_everywhere_only_if_every_other_sae_has_it():
    directions = orthogonal()
    half, other_half = (directions[:8].clone() for _ in range(2))
    half[:4], other_half[2:6] = directions[8:12], directions[12:16]
    found = measure_stability([sae_of(directions[:8]), sae_of(half), sae_of(other_half)])
    assert [(pair.first, pair.second) for pair in found.pairs] == [(0, 1), (0, 2), (1, 2)]
    assert [pair.shared_90 for pair in found.pairs] == [0.5, 0.5, 0.25]
    assert found.everywhere_90 == 0.25
    summary = found.summary()
    assert summary["shared_90"] == pytest.approx(1.25 / 3)
    assert (summary["shared_90_min"], summary["shared_90_max"]) == (0.25, 0.5)


def test_dictionaries_of_different_widths_are_compared_over_the_smaller():
    directions = orthogonal()
    (pair,) = measure_stability([sae_of(directions), sae_of(directions[:6])]).pairs
    assert pair.n_pairs == 6
    assert pair.shared_90 == 1
    assert (pair.partner[6:] == -1).all()
    assert (pair.cosine[6:] == 0).all()


def test_features_that_never_fire_are_left_out_and_the_others_are_told_by_density():
    directions = orthogonal()
    density = torch.tensor([0.0, 0.0, 0.02, 0.03, 0.2, 0.3, 0.4, 0.5])
    mixed = directions[:8].clone()
    mixed[2] = directions[8]  # another of the rare ones
    found = measure_stability([sae_of(directions[:8]), sae_of(mixed)], densities=[density, density])
    assert found.live == (6, 6)
    assert found.pairs[0].n_pairs == 6
    assert (found.pairs[0].partner[:2] == -1).all()
    assert found.pairs[0].shared_90 == found.everywhere_90 == pytest.approx(5 / 6)
    rare, common = found.bands
    assert (rare.exponent, rare.n_features, rare.shared_70) == (-2, 2, 0.5)
    assert (common.exponent, common.n_features, common.shared_90, common.matched_cosine) == (-1, 4, 1, pytest.approx(1))


@pytest.mark.parametrize("loudness", [1.0, 10.0])
def test_no_site_of_a_crosscoder_counts_for_more_because_its_numbers_are_larger(loudness):
    """Half of each feature lives at either Site; where they differ at one of these, half of the cosine is left."""
    half, other = orthogonal(8) / math.sqrt(2), orthogonal(16)[:8, :8]
    other = other / other.norm(dim=1, keepdim=True) / math.sqrt(2)
    scales = {"a:out": [8, 1.0], "b:out": [8, 1 / loudness]}  # what training multiplies the Sites by

    def joined(at_a: Tensor, at_b: Tensor) -> SAE:
        decoder = torch.cat([at_a, at_b * loudness], dim=1)
        encoder = torch.cat([at_a, at_b / loudness], dim=1)
        return sae_of(decoder, encoder, site="crosscoder", crosscoder=scales)

    first = joined(half, half)
    found = [measure_stability([first, joined(*parts)]).pairs[0] for parts in ((other, half), (half, other))]
    assert found[0].matched_cosine == pytest.approx(found[1].matched_cosine, abs=1e-5)
    assert found[0].encoder_cosine == pytest.approx(found[1].encoder_cosine, abs=1e-5)


def test_what_cannot_be_compared_is_refused():
    sae, density = sae_of(orthogonal()), torch.ones(D_MODEL)
    with pytest.raises(SaekitError, match="got 1, give at least 2"):
        measure_stability([sae])
    with pytest.raises(SaekitError, match=r"read 'layers\.1', 'layers\.2'; compare SAEs of one Site"):
        measure_stability([sae, sae_of(orthogonal(), site="layers.2")])
    joined = [sae_of(orthogonal(), site="crosscoder", crosscoder=dict.fromkeys(sites, 8)) for sites in ("ab", "cd")]
    with pytest.raises(SaekitError, match=r"read 'a \+ b', 'c \+ d'; compare SAEs of one Site"):
        measure_stability(joined)
    with pytest.raises(ShapeError, match=r"densities of \[16\] features for SAEs of \[16, 16\]"):
        measure_stability([sae, sae], densities=[density])
    with pytest.raises(DataError, match="no feature of SAE 1 fires"):
        measure_stability([sae, sae], densities=[density, density * 0])
    with pytest.raises(ShapeError, match="directions of 16 and of 8 numbers"):
        measure_stability([sae, sae_of(orthogonal(8))])


def test_seeds_find_the_same_features_where_there_is_a_truth_to_find():
    source = SyntheticSource(
        truth=synthetic_truth(SyntheticConfig(d_model=D_MODEL, n_features=16, l0=2.0, offset=10.0, noise=0.01))
    )
    config = TrainConfig(
        site=SYNTHETIC, rule=TopK(2), n_features=16, tokens=400 * 256, batch_tokens=256, learning_rate=5e-3
    )
    seen = []
    saes = train_over_seeds(config, source, [0, 7], on_sae=lambda seed, sae: seen.append((seed, sae)))
    assert seen == [(0, saes[0]), (7, saes[1])]
    assert not torch.equal(saes[0].decoder, saes[1].decoder)
    assert saes[1].cfg.metadata["training"]["seed"] == 7
    trained = measure_stability(saes).summary()
    untrained = train_over_seeds(replace(config, tokens=256), source, [0, 7])
    assert trained["shared_90"] > 0.4 > 0.1 > measure_stability(untrained).summary()["shared_90"]
    with pytest.raises(SaekitError, match=r"seeds \[1, 2, 1\] repeat"):
        train_over_seeds(config, source, [1, 2, 1])
