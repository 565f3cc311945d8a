"""Effects and edits by SAEs that normalise their inputs: what a feature writes goes by the scale of its token."""

import pytest
import torch
from small_models import BOS, FIRST, IDS, TOKENS, WIDTH, sae_of, tiny_llama

from saekit.activations.tokens import TokenRows
from saekit.normalisation import ConstantNorm, EqualNorms, LayerNorm, Plain
from saekit.patching import Add, Intervention, intervening
from saekit.patching.attribution import attribute
from saekit.patching.corpus_effects import EffectSettings, corpus_effects
from saekit.patching.effects import metric_of, read_prompts
from saekit.patching.feature_sets import greedy_set, read_behaviour
from saekit.patching.metric import LogitDifference, NextTokenLoss
from saekit.sae import SAE
from saekit.targets import Target

OTHER = torch.tensor([[0, 9, 8, 30, 6], [0, 5, 12, 3, 2]])
METRIC = LogitDifference(torch.tensor([3, 4]), torch.tensor([5, 6]), torch.tensor([4, 4]))

pytestmark = [
    pytest.mark.filterwarnings("ignore::saekit.patching.OffDistributionWarning"),
    pytest.mark.parametrize(
        "sae",
        [sae_of(normalisation=kind) for kind in (Plain(), EqualNorms(), ConstantNorm(), LayerNorm())],
        ids=lambda sae: type(sae.cfg.normalisation).__name__,
    ),
]


@pytest.fixture(scope="module")
def target() -> Target:
    """Vectors of about ten times the norm that normalising brings them to."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(40)
    return Target.wrap(model)


def derivatives(target: Target, sae: SAE, metric) -> torch.Tensor:
    """Of a metric by the share of each entry that is taken away, with decoding done by the SAE itself."""
    own = read_prompts(target, sae, FIRST, IDS, mask=TOKENS)
    x, codes = own.vectors.flatten(0, 1), own.codes.active()
    share = torch.zeros(len(codes.values), requires_grad=True)
    less = sae.decode(codes.with_values(codes.values.detach() * (1 - share)), x) - sae.decode(codes, x).detach()
    metric(target.run(IDS, edits={FIRST: lambda y: y + less.view_as(y)}), torch.arange(2)).sum().backward()
    assert share.grad is not None and float(share.grad.abs().max()) > 1e-3
    return share.grad.double()


def test_attribution_is_the_derivative_by_what_the_sae_decodes(target, sae):
    found = attribute(target, sae, FIRST, IDS, METRIC, mask=TOKENS)
    torch.testing.assert_close(found.effect, derivatives(target, sae, METRIC), rtol=1e-3, atol=1e-6)


def test_effects_over_a_corpus_are_such_derivatives(target, sae):
    rows = TokenRows.from_ids(IDS, bos=BOS, pad=None)
    found = corpus_effects(target, sae, FIRST, rows, settings=EffectSettings(draws=0))
    want = torch.zeros(sae.n_features, dtype=torch.float64)
    codes = read_prompts(target, sae, FIRST, IDS, mask=TOKENS).codes.active()
    want.index_add_(0, codes.features, derivatives(target, sae, NextTokenLoss(IDS)))
    torch.testing.assert_close(found.effect, want / found.active.clamp(min=1), rtol=1e-3, atol=1e-6)


def test_integrated_gradients_add_up_to_replacing_the_site(target, sae):
    other = read_prompts(target, sae, FIRST, OTHER, mask=TOKENS)
    found = attribute(target, sae, FIRST, IDS, METRIC, other=other, mask=TOKENS, steps=60)
    whole = target.read(IDS, [FIRST])[FIRST]
    keep = IDS != BOS
    whole[keep] = other.vectors[keep]
    with torch.no_grad():
        effect = METRIC(target.run(IDS, edits={FIRST: lambda _: whole}), torch.arange(2)).double()
    effect -= metric_of(target, IDS, METRIC)
    parts = found.error.sum(1).index_add(0, found.at.prompt, found.effect)
    torch.testing.assert_close(parts, effect, rtol=1e-3, atol=1e-4)


def test_sets_of_features_promise_what_they_bring_about(target, sae):
    """The first of a greedy set has the largest derivative on the way to the other prompts."""
    behaviour = read_behaviour(target, sae, FIRST, IDS, OTHER, METRIC, mask=TOKENS)
    change = behaviour.change
    share = torch.zeros(sae.n_features, requires_grad=True)
    x = behaviour.own.vectors.flatten(0, 1)
    gained = sae.decode(change.with_values(change.values.detach() * share[change.features]), x)
    gained = gained - sae.decode(change.with_values(torch.zeros_like(change.values)), x).detach()
    metric = METRIC(target.run(IDS, edits={FIRST: lambda y: y + gained.view_as(y)}), torch.arange(2))
    metric.mean().backward()
    towards = share.grad * (1 if behaviour.goal > behaviour.base else -1)
    assert int(greedy_set(behaviour, size=1).features) == int(towards.argmax())


def test_a_relative_addition_writes_that_share_of_each_token(target, sae):
    x = target.read(IDS, [FIRST])[FIRST]
    edit = Intervention(site=FIRST, operation=Add(0.25, relative=True), features=(7,))
    with torch.no_grad(), intervening(target, [edit], {FIRST: sae}, mask=TOKENS):
        added = target.read(IDS, [FIRST])[FIRST] - x
    keep = IDS != BOS
    shares = added[keep].norm(dim=-1) / x[keep].norm(dim=-1)
    torch.testing.assert_close(shares, torch.full((8,), 0.25), rtol=1e-4, atol=0)
    along = torch.nn.functional.cosine_similarity(added[keep], sae.W_dec[7].expand(8, WIDTH))
    torch.testing.assert_close(along, torch.ones(8), rtol=0, atol=1e-4)
