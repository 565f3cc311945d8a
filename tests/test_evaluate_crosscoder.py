"""A crosscoder's metrics against those of SAEs that compute the same, and against brute force."""

import pytest
import torch
from test_evaluate import WIDTH
from test_evaluate import rows as rows
from test_evaluate import target as target
from torch.nn.functional import cross_entropy

from saekit.activations.mask import MaskPolicy
from saekit.analysis.evaluate import evaluate
from saekit.analysis.evaluate_crosscoder import evaluate_crosscoder
from saekit.crosscoder import Crosscoder
from saekit.errors import DataError, SaekitError, ShapeError
from saekit.sae import SAE
from saekit.selection import MutualChoice, TopK
from saekit.targets import Site

EMBED, MIX = Site.parse("embed"), Site.parse("mix")


def random_crosscoder(rule, n_features: int = 10) -> Crosscoder:
    sae, generator = SAE(2 * WIDTH, n_features, rule), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 2)
    return Crosscoder(sae, {EMBED: WIDTH, MIX: WIDTH}, {EMBED: 0.5, MIX: 2.0})


@pytest.mark.parametrize("rule", [TopK(3), MutualChoice(3)], ids=["topk", "mutual"])
def test_where_only_one_site_is_heard_and_written_it_measures_as_that_sae_does(rule, rows, target):
    crosscoder = random_crosscoder(rule)
    alone = SAE(WIDTH, crosscoder.sae.n_features, rule)
    with torch.no_grad():
        crosscoder.sae.encoder[:, :WIDTH] = 0  # deaf to the embedding
        for name in ("encoder", "decoder"):
            getattr(alone, name).copy_(getattr(crosscoder.sae, name)[:, WIDTH:])
        alone.b_enc.copy_(crosscoder.sae.b_enc)
        alone.b_dec.copy_(crosscoder.sae.b_dec[WIDTH:])
    expected = evaluate(alone, target, rows, MIX, batch_rows=4, loss_rows=12).metrics()
    found = evaluate_crosscoder(crosscoder, target, rows, batch_rows=4, loss_rows=12).metrics()
    here = found.pop("by_site")["mix:out"]
    del here["own_fraction"]
    assert {**found, **here} == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_each_site_is_reconstructed_alone_from_untouched_activations_of_all(rows, target):
    crosscoder = random_crosscoder(TopK(3))
    found = evaluate_crosscoder(crosscoder, target, rows)
    clean = target.read(rows.ids, [EMBED, MIX])
    counts = (rows.ids != rows.bos) & (rows.ids != rows.pad)
    vectors = {site: clean[site][counts] for site in (EMBED, MIX)}
    made = crosscoder.decode(crosscoder.encode(vectors))
    following, wanted = rows.ids[:, 1:], rows.ids[:, 1:] != rows.pad
    for site in (EMBED, MIX):
        numbers = found.by_site[site]
        x = vectors[site].double()
        unexplained = (x - made[site]).square().sum() / (x - x.mean(0)).square().sum()
        assert numbers.fvu == pytest.approx(float(unexplained))
        replaced = clean[site].clone()
        replaced[counts] = made[site]
        logits = target.run(rows.ids, edits={site: lambda _, to=replaced: to})[:, :-1]
        assert numbers.ce_sae == pytest.approx(float(cross_entropy(logits[wanted], following[wanted])), rel=1e-5)
    assert found.tokens == int(counts.sum()) and found.by_site[MIX].predicted == int(wanted.sum())


def test_a_feature_is_a_sites_own_where_nine_tenths_of_its_squared_norm_are_in_units_of_the_site(rows, target):
    crosscoder = random_crosscoder(TopK(3), n_features=4)
    with torch.no_grad():
        crosscoder.sae.b_enc[3] = -1e6  # never fires, so where it writes is nobody's concern
        crosscoder.sae.decoder.zero_()
        for feature, (early, late) in enumerate([(2.0, 0.0), (0.0, 0.5), (1.0, 1.0), (2.0, 0.0)]):
            crosscoder.sae.decoder[feature, 0], crosscoder.sae.decoder[feature, WIDTH] = early, late
        crosscoder.sae.decoder[2, WIDTH] = 0.75  # norms 0.5 and 1.5: nine tenths, and not more
    found = evaluate_crosscoder(crosscoder, target, rows, loss_rows=0)
    assert found.dead_fraction == pytest.approx(0.25)
    assert [found.by_site[site].own_fraction for site in (EMBED, MIX)] == pytest.approx([1 / 3, 1 / 3])
    assert found.by_site[MIX].ce_sae is None and found.by_site[MIX].predicted == 0
    assert "ce_sae" not in found.metrics()["by_site"]["mix:out"]


def test_progress_counts_every_row_and_those_of_losses_once_per_site(rows, target):
    done = []
    evaluate_crosscoder(random_crosscoder(TopK(3)), target, rows, loss_rows=7, batch_rows=4, on_progress=done.append)
    assert sum(done) == len(rows) + 2 * 7


def test_what_cannot_be_measured_is_refused(rows, target):
    crosscoder = random_crosscoder(TopK(3))
    with pytest.raises(DataError, match="there are no rows to evaluate on"):
        evaluate_crosscoder(crosscoder, target, rows.select(slice(0)))
    with pytest.raises(DataError, match="every token of the text is masked"):
        evaluate_crosscoder(crosscoder, target, rows, mask=MaskPolicy(max_norm=1e-9))
    norm = float(target.read(rows.ids, [MIX])[MIX].norm(dim=-1).median())
    with pytest.raises(ShapeError, match=r"\d+ tokens at one Site and \d+, or others, at another; leave max_norm out"):
        evaluate_crosscoder(crosscoder, target, rows, mask=MaskPolicy(max_norm=norm))
    every = Crosscoder(crosscoder.sae, {Site.parse("embed@*"): WIDTH, MIX: WIDTH})
    with pytest.raises(SaekitError, match=r"embed:out@\* stands for every call.*name a call of it"):
        evaluate_crosscoder(every, target, rows)
