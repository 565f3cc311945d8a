"""A transcoder beside an SAE that reads the same tensor, and inside a circuit: against sums written out by hand."""

import pytest
import torch
from torch import Tensor, nn

from saekit.activations.mask import MaskPolicy
from saekit.errors import SaekitError
from saekit.patching import (
    Intervention,
    TokenMask,
    Zero,
    run_with_cache_with_saes,
    run_with_interventions,
    run_with_saes,
)
from saekit.patching.circuit_check import check_circuit
from saekit.patching.circuits import ERROR, METRIC, trace_circuit
from saekit.patching.effects import exact_effects, read_prompts
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import Threshold
from saekit.targets import Side, Site, Target

WIDTH, N_SAE, N_TRANSCODER = 6, 9, 7
READ, WRITTEN, BEFORE = Site("mlp", Side.INPUT), Site("mlp"), Site("start")
IDS = torch.tensor([[2, 4, 1]])
TOKENS = TokenMask(policy=MaskPolicy(drop_bos=False, drop_padding=False))


class OneBlock(nn.Module):
    """Tokens that do not see each other: what the MLP reads, plus what it writes, as logits."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.start = nn.Embedding(5, WIDTH, _weight=torch.randn(5, WIDTH, generator=generator))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.end = nn.Linear(WIDTH, 5, bias=False)
        for parameter in (*self.mlp.parameters(), *self.end.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.start(input_ids)
        return self.end(x + self.mlp(x))


def metric(logits: Tensor, prompt: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 0]


def drawn(n_features: int, seed: int, **cfg) -> SAE:
    config = SAEConfig(d_in=WIDTH, d_sae=n_features, apply_b_dec_to_input=False, **cfg)
    sae = SAE(WIDTH, n_features, Threshold(0.0), cfg=config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in (sae.encoder, sae.decoder, sae.b_enc, sae.b_dec):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return sae


@pytest.fixture
def target() -> Target:
    return Target.wrap(OneBlock())


@pytest.fixture
def sae() -> SAE:
    return drawn(N_SAE, 1, hook_name=str(READ))


@pytest.fixture
def transcoder() -> SAE:
    return drawn(N_TRANSCODER, 2, d_out=WIDTH, hook_name=str(READ), hook_name_out=str(WRITTEN))


def by_hand(sae: SAE, transcoder: SAE, model: OneBlock, *, without: int | None = None, without_t: int | None = None):
    """Logits with one feature of either gone, errors as they are."""
    x = model.start(IDS)[0]
    given = x if without is None else x - sae.encode(x).to_dense()[:, without, None] * sae.decoder[without]
    y = model.mlp(given)
    if without_t is not None:  # the transcoder reads what the SAE has written
        y = y - transcoder.encode(given).to_dense()[:, without_t, None] * transcoder.decoder[without_t]
    return model.end(x + y)[None]


@torch.no_grad()
def test_an_sae_and_a_transcoder_of_one_tensor_go_together(target, sae, transcoder):
    untouched = target.run(IDS)
    for saes in ([sae, transcoder], [transcoder, sae], {READ: sae, WRITTEN: transcoder}):
        assert torch.equal(run_with_saes(target, IDS, saes, mask=TOKENS), untouched)
        logits, cache = run_with_cache_with_saes(target, IDS, saes, mask=TOKENS, use_error_term=False)
        read = target.model.start(IDS)[0]
        x = sae(read)  # what the MLP is given; the residual stream goes past it
        torch.testing.assert_close(logits[0], target.model.end(read + transcoder(x)))
        torch.testing.assert_close(
            cache["mlp:in.hook_sae_acts_post"][0], sae.encode(target.model.start(IDS)[0]).to_dense()
        )
        torch.testing.assert_close(cache["mlp.hook_sae_acts_post"][0], transcoder.encode(x).to_dense())
    with pytest.raises(SaekitError, match=r"two SAEs were trained at mlp"):
        run_with_saes(target, IDS, [sae, transcoder, transcoder], mask=TOKENS)


@torch.no_grad()
def test_each_is_edited_under_its_own_site(target, sae, transcoder):
    saes = {READ: sae, WRITTEN: transcoder}
    feature = int(sae.encode(target.model.start(IDS)[0]).to_dense()[-1].argmax())
    other = int(transcoder.encode(target.model.start(IDS)[0]).to_dense()[-1].argmax())
    for site, one, want in (
        (READ, feature, by_hand(sae, transcoder, target.model, without=feature)),
        (WRITTEN, other, by_hand(sae, transcoder, target.model, without_t=other)),
    ):
        edit = Intervention(site=site, operation=Zero(), features=(one,))
        got = run_with_interventions(target, IDS, [edit], saes, mask=TOKENS)
        torch.testing.assert_close(got, want)
        assert (got - target.run(IDS)).abs().max() > 1e-2


@torch.no_grad()
def test_effects_are_the_same_under_either_site_of_a_transcoder(target, transcoder):
    found = []
    for site in (READ, WRITTEN):
        prompts = read_prompts(target, transcoder, site, IDS, mask=TOKENS)
        found.append(exact_effects(target, transcoder, site, IDS, metric, prompts.active(), mask=TOKENS))
    assert torch.equal(*found) and found[0].abs().max() > 1e-2


@pytest.mark.parametrize("at", [READ, WRITTEN], ids=str)
@pytest.mark.parametrize("other_ids", [None, IDS.new_tensor([[2, 4, 3]])], ids=["ablation", "patching"])
def test_edges_of_a_transcoder_are_products_of_its_weights(target, transcoder, at, other_ids):
    """No gradient but the transcoder's own: what the SAE writes, times its encoder, times what that is worth."""
    lower = drawn(N_SAE, 1, hook_name=str(BEFORE))
    saes = {BEFORE: lower, at: transcoder}
    circuit = trace_circuit(target, saes, IDS, metric, other_ids=other_ids, n_nodes=10_000, mask=TOKENS)
    model, last = target.model, IDS.shape[1] - 1
    worth = (model.end.weight[3] - model.end.weight[0]).detach()
    there = torch.zeros(N_SAE)
    x = model.start(IDS)[0].detach()
    a, t = (one.encode(x).to_dense()[last].detach() for one in (lower, transcoder))
    if other_ids is not None:
        there = lower.encode(model.start(other_ids)[0]).to_dense()[last].detach()
    of = {
        (node.site, node.feature): i
        for i, node in enumerate(circuit.nodes)
        if node.position == last and node.feature != ERROR
    }
    edges = {(edge.source, edge.target): edge.weight for edge in circuit.edges}
    upper = [j for j in range(N_TRANSCODER) if t[j] > 0 and (1, j) in of]
    lowers = [u for u in range(N_SAE) if a[u] != there[u]]
    assert len(upper) > 1 and len(lowers) > 1
    written, reads, writes = (part.detach() for part in (lower.decoder, transcoder.encoder, transcoder.decoder))
    slope = torch.autograd.functional.jacobian(model.mlp, x[last]).detach()
    for u in lowers:
        change, through = float(there[u] - a[u]), 0.0
        for j in upper:
            worth_of_j = float(writes[j] @ worth)
            by_way_of_j = change * float(written[u] @ reads[j]) * worth_of_j
            assert edges[of[0, u], of[1, j]] == pytest.approx(by_way_of_j, rel=1e-4, abs=1e-5)
            through += by_way_of_j
        along = change * float(written[u] @ worth)  # the residual stream
        # errors are nodes where there is another prompt; else what goes by way of them counts as direct
        by_error = change * float(worth @ slope @ written[u]) - through
        direct = along + (by_error if other_ids is None else 0.0)
        assert edges[of[0, u], METRIC] == pytest.approx(direct, rel=1e-3, abs=1e-4)
    shares = check_circuit(target, saes, IDS, metric, circuit, other_ids=other_ids, mask=TOKENS)
    assert (shares.faithful, shares.complete) == pytest.approx((1, 1), abs=1e-4)
