"""Evaluation against brute force on toy models, and against published numbers."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from saekit.activations.mask import MaskPolicy
from saekit.activations.text import Document, read_documents
from saekit.activations.tokens import TokenRows, tokenize_documents
from saekit.analysis.evaluate import evaluate
from saekit.analysis.language_losses import ce_recovered
from saekit.analysis.sums import Unexplained
from saekit.errors import DataError, SaekitError, ShapeError
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import FeatureChoice, MutualChoice, Threshold, TopK
from saekit.targets import Site, Target

BOS, PAD, VOCABULARY, CONTEXT, WIDTH = 0, 1, 12, 8, 6
SITE = Site.parse("mix")


class Bigrams(nn.Module):
    """Next-token logits from a running mean of embeddings; just enough to be ablated."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.unembed = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.unembed(self.mix(x.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]))


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    ids = torch.randint(2, VOCABULARY, (20, CONTEXT), generator=torch.Generator().manual_seed(0))
    ids = ids.cummax(1).values  # something to learn
    ids[:, 0] = BOS
    ids[3, 4] = BOS
    ids[-1, 5:] = PAD
    return TokenRows.from_ids(ids, bos=BOS, pad=PAD)


@pytest.fixture(scope="module")
def target(rows) -> Target:
    torch.manual_seed(0)
    model = Bigrams()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        cross_entropy(model(rows.ids)[:, :-1].flatten(0, 1), rows.ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Target.wrap(model)


@pytest.fixture(scope="module")
def activations(rows, target) -> Tensor:
    return target.read(rows.ids, [SITE])[SITE]


@pytest.fixture(scope="module")
def kept(rows) -> Tensor:
    return (rows.ids != BOS) & (rows.ids != PAD)


def sae_of(n_features: int = 16, rule=None, *, spoil: float = 0.0) -> SAE:
    """A tied random dictionary; `spoil` shuts some features for good and makes others rare."""
    sae = SAE(WIDTH, n_features, rule or Threshold(0.3))
    with torch.no_grad():
        sae.b_enc -= spoil * torch.linspace(0, 4, n_features)
    return sae


def lossless(rule=None) -> SAE:
    """Every coordinate as a difference of two features."""
    sae = SAE(WIDTH, 2 * WIDTH, rule or TopK(WIDTH))
    with torch.no_grad():
        sae.decoder.copy_(torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]))
        sae.encoder.copy_(sae.decoder)
    return sae


def nats(logits: Tensor, ids: Tensor) -> float:
    wanted = ids[:, 1:] != PAD
    return float(cross_entropy(logits[:, :-1][wanted], ids[:, 1:][wanted]))


# reconstruction and sparsity


@pytest.mark.parametrize("batch_rows", [1, 3, 64])
def test_every_metric_is_what_brute_force_gives(rows, target, activations, kept, batch_rows):
    sae = sae_of(spoil=1.0)
    found = evaluate(sae, target, rows, SITE, batch_rows=batch_rows)
    x = activations[kept].double()
    codes = (x @ sae.W_enc.double() + sae.b_enc.detach().double()).relu()
    codes = codes * (codes > 0.3)
    error = (x - codes @ sae.W_dec.double()).square().sum()
    assert found.tokens == len(x) == int(kept.sum())
    assert found.fvu == pytest.approx(float(error / (x - x.mean(0)).square().sum()), rel=1e-5)
    assert found.explained_variance == 1 - found.fvu
    l0 = (codes > 0).sum(1)
    assert found.l0 == pytest.approx(float(l0.double().mean()))
    ordered = l0.sort().values
    assert found.l0_p5 == int(ordered[math.ceil(0.05 * len(l0)) - 1])
    assert found.l0_p95 == int(ordered[math.ceil(0.95 * len(l0)) - 1])
    assert found.l0_p5 < found.l0 < found.l0_p95
    assert found.l0_counts.tolist() == torch.bincount(l0).tolist()
    density = (codes > 0).double().mean(0)
    torch.testing.assert_close(found.density, density)
    assert found.dead_fraction == int((density == 0).sum()) / 16 > 0


def test_underused_features_fire_under_half_as_often_as_their_rank_expects(rows, target):
    sae = sae_of(64)
    with torch.no_grad():
        sae.b_enc[40:] -= 3.0
    found = evaluate(sae, target, rows, SITE, loss_rows=0)
    ranked = found.density.sort(descending=True).values.tolist()
    line = [min(1.0, found.zipf.scale * (r + found.zipf.offset) ** -found.zipf.exponent) for r in range(1, 65)]
    behind = [0 < here < 0.5 * expected for here, expected in zip(ranked, line, strict=True)]
    assert found.underused_fraction == sum(behind) / 64 > 0
    assert found.metrics()["zipf_exponent"] == found.zipf.exponent


def test_the_cross_entropies_are_those_of_the_edited_model(rows, target, activations, kept):
    sae, model, ids = sae_of(), target.model, rows.ids
    found = evaluate(sae, target, rows, SITE, batch_rows=3)
    with torch.no_grad():
        clean = model(ids)
        spliced = activations.clone()
        spliced[kept] = sae(activations[kept])
        mean = activations[kept].mean(0)
        wanted = {
            "ce_clean": nats(clean, ids),
            "ce_sae": nats(model.unembed(spliced), ids),
            "ce_zero": nats(model.unembed(torch.zeros_like(activations)), ids),
            "ce_mean": nats(model.unembed(mean.expand_as(activations)), ids),
        }
        p, q = clean[:, :-1].log_softmax(-1), model.unembed(spliced)[:, :-1].log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)[ids[:, 1:] != PAD].mean()
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5), name
    assert found.kl == pytest.approx(float(kl), rel=1e-4)
    assert found.ce_zero == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    clean, sae_loss = found.ce_clean, found.ce_sae
    assert clean < sae_loss
    assert found.ce_recovered == pytest.approx((found.ce_zero - sae_loss) / (found.ce_zero - clean))
    assert found.ce_recovered_mean == pytest.approx((found.ce_mean - sae_loss) / (found.ce_mean - clean))
    assert found.predicted == int((ids[:, 1:] != PAD).sum())


@pytest.mark.parametrize(("rule", "most"), [(Threshold(0.3), 2), (MutualChoice(3), 5)], ids=str)
def test_large_logits_are_read_few_rows_at_a_time_unless_the_rule_minds(rows, target, monkeypatch, rule, most):
    sizes = []

    def forward(model: nn.Module, ids: Tensor) -> Tensor:
        sizes.append(len(ids))
        return model(ids)

    monkeypatch.setattr(target.model, "config", SimpleNamespace(vocab_size=VOCABULARY), raising=False)
    whole = evaluate(sae_of(rule=rule), target, rows, SITE, batch_rows=5)
    monkeypatch.setattr("saekit.analysis.language_losses.LOGITS", 2 * CONTEXT * VOCABULARY)
    model = Target.wrap(target.model, forward=forward)
    found = evaluate(sae_of(rule=rule), model, rows, SITE, batch_rows=5)
    assert max(sizes[-4:]) == most
    for name, value in whole.metrics().items():
        assert found.metrics()[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("rule", [TopK(WIDTH), Threshold(0.0)], ids=str)
def test_a_lossless_sae_costs_the_model_nothing(rows, target, rule):
    found = evaluate(lossless(rule), target, rows, SITE)
    assert found.fvu == pytest.approx(0, abs=1e-10)
    assert found.ce_sae == pytest.approx(found.ce_clean, abs=1e-6)
    assert found.ce_recovered == pytest.approx(1, abs=1e-5)
    assert found.ce_recovered_mean == pytest.approx(1, abs=1e-5)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.l0 == WIDTH


def test_a_model_that_rules_tokens_out_has_a_divergence(rows, target, monkeypatch):
    before = evaluate(sae_of(), target, rows, SITE)
    run = target.run

    def ruled_out(ids, **more):
        logits = run(ids, **more)
        padded = torch.full((*logits.shape[:-1], 3), -torch.inf)
        return torch.cat([logits, padded], dim=-1)

    monkeypatch.setattr(type(target), "run", lambda self, ids, **more: ruled_out(ids, **more))
    after = evaluate(sae_of(), target, rows, SITE)
    assert after.kl == pytest.approx(before.kl, rel=1e-5) and after.ce_sae == pytest.approx(before.ce_sae, rel=1e-6)


def test_an_sae_that_gives_the_mean_recovers_nothing_of_mean_ablation(rows, target, activations):
    sae = SAE(WIDTH, 16, Threshold(1e9))
    no_mask = MaskPolicy(drop_bos=False, drop_padding=False)
    with torch.no_grad():
        sae.b_dec.copy_(activations.flatten(0, 1).mean(0))
    found = evaluate(sae, target, rows, SITE, mask=no_mask)
    assert found.fvu == pytest.approx(1, abs=1e-6)
    assert found.ce_recovered_mean == pytest.approx(0, abs=1e-5)
    assert (found.l0, found.dead_fraction) == (0, 1)


@pytest.mark.parametrize("rule", [TopK(2), MutualChoice(2), FeatureChoice(2)], ids=str)
def test_a_batch_of_masked_tokens_alone_is_passed_over(rows, target, rule):
    ids = rows.ids.clone()
    ids[6] = BOS
    found = evaluate(sae_of(rule=rule, n_features=8), target, replace(rows, ids=ids), SITE, batch_rows=1)
    assert found.tokens == int(((ids != BOS) & (ids != PAD)).sum())


def test_without_loss_rows_there_are_no_cross_entropies(rows, target):
    found = evaluate(sae_of(), target, rows, SITE, loss_rows=0)
    assert found.predicted == 0
    assert found.ce_clean is found.ce_recovered is found.kl is None
    assert "ce_clean" not in found.metrics() and "fvu" in found.metrics()
    assert all(isinstance(value, int | float) for value in found.metrics().values())


@pytest.mark.parametrize("loss_rows", [0, 2, None])
def test_progress_counts_every_row_of_every_round(rows, target, loss_rows):
    done = []
    evaluate(sae_of(), target, rows, SITE, loss_rows=loss_rows, batch_rows=3, on_progress=done.append)
    assert sum(done) == len(rows) + (len(rows) if loss_rows is None else loss_rows)


def test_evaluation_changes_neither_sae_nor_model(rows, target):
    sae = sae_of()
    before = {k: v.clone() for k, v in [*sae.state_dict().items(), *target.model.state_dict().items()]}
    first, again = (evaluate(sae, target, rows, SITE).metrics() for _ in range(2))
    assert first == again
    assert all(torch.equal(before[k], v) for k, v in [*sae.state_dict().items(), *target.model.state_dict().items()])
    assert all(p.grad is None for p in sae.parameters())


def test_rows_of_one_token_predict_nothing(rows, target):
    short = TokenRows.from_ids(rows.ids[:, 1:2], bos=BOS, pad=PAD)
    found = evaluate(sae_of(), target, short, SITE)
    assert (found.predicted, found.ce_clean) == (0, None)


# refusals


def test_no_rows_are_refused(rows, target):
    with pytest.raises(DataError, match=r"there are no rows to evaluate on; give at least one"):
        evaluate(sae_of(), target, rows.select(slice(0)), SITE)


def test_a_text_without_a_token_that_counts_is_refused(rows, target):
    with pytest.raises(DataError, match=r"every token of the text is masked; .*; give more text or another mask"):
        evaluate(sae_of(), target, rows, SITE, mask=MaskPolicy(max_norm=0.0))


def test_activations_without_variance_are_refused():
    for n in (1, 3):
        same = Unexplained(2)
        same.observe(torch.full((n, 2), 0.1), torch.zeros(n, 2))
        with pytest.raises(DataError, match=rf"all {n} activations are equal, .*; give more text, or check the Site"):
            _ = same.fvu


def test_a_site_that_the_model_does_not_need_has_no_recovered_loss(rows, target):
    model = Bigrams()
    with torch.no_grad():
        model.unembed.weight.zero_()
    found = evaluate(sae_of(), Target.wrap(model), rows, SITE)
    assert found.ce_recovered is found.ce_recovered_mean is None
    assert found.metrics().keys() >= {"ce_clean", "kl"} and "ce_recovered" not in found.metrics()


@pytest.mark.parametrize("ablated", [2.0, 1.9])
def test_nothing_is_recovered_of_an_ablation_that_does_no_harm(ablated):
    assert ce_recovered(clean=2.0, spliced=2.1, ablated=ablated) is None


# other people's numbers


@pytest.fixture
def saebench(shared_data) -> dict:
    return json.loads((shared_data / "published_numbers" / "saebench_core_expected_results.json").read_text())


def test_recovered_loss_is_saebenchs_score(saebench):
    published = saebench["eval_result_metrics"]["model_performance_preservation"]
    clean, spliced, ablated = (published[f"ce_loss_{which}"] for which in ("without_sae", "with_sae", "with_ablation"))
    ours = ce_recovered(clean=clean, spliced=spliced, ablated=ablated)
    assert ours == pytest.approx(published["ce_loss_score"], abs=1e-7)


def test_densities_add_up_to_saebenchs_l0(saebench):
    densities = [latent["feature_density"] for latent in saebench["eval_result_details"]]
    # printed with five digits, so each is off by up to half of 1e-5
    assert sum(densities) == pytest.approx(saebench["eval_result_metrics"]["sparsity"]["l0"], abs=len(densities) * 5e-6)


# a real model; SOURCE.md beside it says what was found there


@pytest.fixture(scope="module")
def stories():
    return {}


@pytest.fixture
def stories_target(shared_data, stories) -> Target:
    if "target" not in stories:
        stories["target"] = Target.load(str(shared_data / "stories260K" / "hf"))
    return stories["target"]


@pytest.fixture
def stories_rows(shared_data, stories, stories_target) -> TokenRows:
    """Stories 1000 to 1399 in one stream, the first 160 rows of 256 tokens: 40,800 predictions."""
    if "rows" not in stories:
        documents = read_documents(str(shared_data / "text" / "tinystories_2mb.txt"), limit=1400)[1000:]
        stripped = [Document(document.name, document.text.strip()) for document in documents]
        rows = tokenize_documents(stripped, stories_target.tokenizer, context=256, row_bos=False)
        stories["rows"] = rows.select(slice(160))
    return stories["rows"]


@pytest.mark.slow
def test_a_real_model_loses_what_is_known_of_it(stories_target, stories_rows):
    block = Site.parse("layers.2")
    found = evaluate(SAE(64, 128, TopK(8)), stories_target, stories_rows, block)
    assert found.predicted == 40_800
    assert found.ce_clean == pytest.approx(1.468, abs=5e-4)
    assert found.ce_zero == pytest.approx(math.log(512), abs=1e-5)
    # published as 5.352, the mean taken over rows that are not named; over these it is 5.285, without BOS 5.290
    assert found.ce_mean == pytest.approx(5.352, rel=0.02)
    assert found.ce_mean == pytest.approx(5.2897, abs=2e-4)


# transcoders


def transcoder(read: str, written: str, *, skip: bool = True) -> SAE:
    cfg = SAEConfig(d_in=WIDTH, d_sae=9, d_out=WIDTH, hook_name=read, hook_name_out=written, apply_b_dec_to_input=False)
    sae = SAE(WIDTH, 9, TopK(3), skip=skip, cfg=cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return sae


def test_a_transcoder_is_measured_where_it_writes(target, rows):
    sae, read, written = transcoder("mix:in", "mix"), Site.parse("mix:in"), Site.parse("mix")
    found = evaluate(sae, target, rows, read)
    x, y = (target.read(rows.ids, [site])[site] for site in (read, written))
    keep = (rows.ids != BOS) & (rows.ids != PAD)
    with torch.no_grad():
        y_hat = sae(x)
    error = (y - y_hat)[keep].double().square().sum()
    assert found.fvu == pytest.approx(float(error / (y[keep] - y[keep].mean(0)).double().square().sum()), rel=1e-4)
    replaced = torch.where(keep[..., None], y_hat, y)
    following = rows.ids[:, 1:].flatten()
    wanted = following != PAD

    def loss(vectors: Tensor) -> float:
        logits = target.model.unembed(vectors)[:, :-1].flatten(0, 1)
        return float(cross_entropy(logits[wanted], following[wanted]).detach())

    assert found.ce_clean == pytest.approx(loss(y), rel=1e-5)
    assert found.ce_sae == pytest.approx(loss(replaced), rel=1e-5)
    assert found.ce_zero == pytest.approx(loss(torch.zeros_like(y)), rel=1e-5)
    assert found.ce_mean == pytest.approx(loss(y[keep].mean(0).expand_as(y)), rel=1e-4)


def test_a_transcoder_that_writes_what_the_module_does_recovers_everything(target, rows):
    sae = transcoder("mix:in", "mix")
    with torch.no_grad():
        sae.decoder.zero_()
        sae.skip.copy_(target.model.mix.weight)
        sae.b_dec.copy_(target.model.mix.bias)
    found = evaluate(sae, target, rows, Site.parse("mix:in"))
    assert found.fvu == pytest.approx(0, abs=1e-9)
    assert found.ce_recovered == pytest.approx(1, abs=1e-5) and found.kl == pytest.approx(0, abs=1e-6)


def test_a_mask_that_keeps_other_tokens_where_a_transcoder_writes_is_refused(target, rows):
    norms = target.read(rows.ids, [Site.parse("mix")])[Site.parse("mix")].norm(dim=-1)
    mask = MaskPolicy(max_norm=float(norms.median()))
    with pytest.raises(ShapeError, match=r"\d+ tokens at one Site and \d+, or others, at another; leave"):
        evaluate(transcoder("mix:in", "mix"), target, rows, Site.parse("mix:in"), mask=mask)


def test_a_transcoder_whose_sites_are_the_wrong_way_round_is_refused(target, rows):
    with pytest.raises(SaekitError, match=r"reads mix:out later than it writes embed:out; swap"):
        evaluate(transcoder("mix", "embed"), target, rows, Site.parse("mix"))


def test_a_transcoder_that_does_not_say_where_it_writes_is_refused(target, rows):
    cfg = SAEConfig(d_in=WIDTH, d_sae=9, d_out=4, apply_b_dec_to_input=False)
    with pytest.raises(SaekitError, match=r"the transcoder at mix:out does not record where it writes; give its cfg"):
        evaluate(SAE(WIDTH, 9, TopK(3), cfg=cfg), target, rows, Site.parse("mix"))
