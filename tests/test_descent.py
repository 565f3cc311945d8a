"""The end of a training step must be the four plain operations that it stands for."""

import tracemalloc
from copy import deepcopy

import pytest
import torch
from test_kernels import LargestTensor
from torch import Tensor, nn

from benchmarks.speed.ours import DefinitionSAE
from saekit import losses
from saekit.kernels import backend, entries, memory, select
from saekit.losses import AuxZipf
from saekit.revival import Members, Unexplained
from saekit.sae import SAE
from saekit.selection import FeatureChoice, MutualChoice, TopK
from saekit.targets import Site
from saekit.training import descent
from saekit.training.config import TrainConfig
from saekit.training.step import TrainState, train_step

D_MODEL, N_FEATURES, N_TOKENS = 12, 40, 80


def adam(parameters) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=9.0, betas=(0.9, 0.999), eps=6.25e-10, fused=True)


@pytest.mark.parametrize("clip", [0.5, 1e6])
@pytest.mark.parametrize("block", [1, 50, 1 << 20])
def test_it_is_projection_clipping_adam_and_unit_norms_in_turn(block, clip, monkeypatch):
    monkeypatch.setattr(descent, "_BLOCK_ELEMENTS", block)
    plain = SAE(D_MODEL, N_FEATURES, TopK(3))
    mine = deepcopy(plain)
    optimizers = adam(plain.parameters()), adam(mine.parameters())
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        for ours, theirs in zip(mine.parameters(), plain.parameters(), strict=True):
            theirs.grad = torch.randn(theirs.shape, generator=generator)
            ours.grad = theirs.grad.clone()
        with torch.no_grad():
            plain.decoder.grad -= (plain.decoder.grad * plain.decoder).sum(1, keepdim=True) * plain.decoder
        nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizers[0].param_groups[0]["lr"] = 0.01 * (step + 1)
        optimizers[0].step()
        with torch.no_grad():
            plain.decoder.copy_(nn.functional.normalize(plain.decoder, dim=1))
        descent.descend(optimizers[1], lr=0.01 * (step + 1), clip=clip, unit_rows=mine.decoder)
        assert all(parameter.grad is None for parameter in mine.parameters())
    for ours, theirs in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        kept, wanted = optimizers[1].state[ours], optimizers[0].state[theirs]
        assert kept.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(kept[name], wanted[name], rtol=1e-5, atol=1e-7)


def test_what_has_no_gradient_stays():
    sae = SAE(D_MODEL, N_FEATURES, TopK(3))
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.b_enc.grad = torch.ones(N_FEATURES)
    descent.descend(adam(sae.parameters()), lr=0.1, clip=1.0, unit_rows=sae.decoder)
    changed = {name for name, tensor in sae.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"b_enc"}


def test_a_large_gradient_comes_back_in_the_same_memory_and_none_of_what_was_there(monkeypatch):
    monkeypatch.setattr(memory, "LARGE_BYTES", 1)
    monkeypatch.setattr(entries, "_BLOCK_ROWS", 7)
    weight = nn.Parameter(torch.randn(N_FEATURES, D_MODEL, generator=torch.Generator().manual_seed(0)))
    values, features = torch.ones(5), torch.tensor([0, 7, 39, 7, 8])

    def gradient() -> Tensor:
        weight.grad = None
        out = entries.decode_rows(values, features, torch.tensor([0, 3, 5]), weight)
        out.backward(torch.arange(2 * D_MODEL).reshape(2, D_MODEL).float())
        assert weight.grad is not None
        return weight.grad

    want = gradient().clone()
    address = gradient().data_ptr()
    gradient().fill_(torch.nan)
    assert torch.equal(gradient(), want)
    assert gradient().data_ptr() == address
    held = gradient()  # by somebody who still reads it
    other = gradient()
    assert other.data_ptr() != held.data_ptr()
    assert torch.equal(held, want) and torch.equal(other, want)


@pytest.mark.parametrize("screens", [False, True])
@pytest.mark.parametrize("auxiliary", [None, AuxZipf(k_aux=20), AuxZipf(k_aux=2)], ids=["none", "dense", "entries"])
@pytest.mark.parametrize("rule", [TopK(4), MutualChoice(4), FeatureChoice(4)], ids=repr)
def test_no_tensor_of_a_whole_step_holds_all_pairs(rule, auxiliary, screens, monkeypatch):
    n_tokens, n_features = 500, 2000
    monkeypatch.setattr(select, "BLOCK_ELEMENTS", 20_000)
    monkeypatch.setattr(backend, "has_fast_bf16", lambda: True)
    vectors = torch.randn(n_tokens, 16, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(
        site=Site("toy"), rule=rule, n_features=n_features, tokens=10 * n_tokens, batch_tokens=n_tokens,
        auxiliary=auxiliary, bf16_screening=screens,
    )  # fmt: skip
    state = TrainState.start(config, vectors)
    train_step(state, vectors)
    state.step = 5
    state.density.tokens_since_fired[:100] = 1 << 40
    tracemalloc.start()  # numpy's arrays are no tensors, but they are traced
    try:
        with LargestTensor() as largest:
            report = train_step(state, vectors)
        traced = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (report.auxiliary > 0) == (auxiliary is not None)
    assert largest.elements <= n_tokens * n_features / 10
    assert traced <= n_tokens * n_features  # a byte per pair, where float32 takes four


def explained_plainly(members: Members, what: Unexplained, k: int, *, bf16: bool = False) -> Tensor:
    """`explain_by_token` as it is defined, dense and under autograd."""
    pre_acts = what.prepared @ members.encoder.T + members.b_enc
    strongest = pre_acts.detach().argsort(dim=1, descending=True, stable=True)[:, : min(k, pre_acts.shape[1])]
    kept = torch.zeros_like(pre_acts).scatter_(1, strongest, 1.0)
    free = what.codes.to_dense().detach()[:, members.features] == 0
    attempt = (pre_acts.relu() * kept * free) @ members.decoder
    return (what.residual - attempt).square().sum() / (what.residual - what.residual.mean(0)).square().sum()


@pytest.mark.parametrize(
    "rule", [TopK(4), MutualChoice(4), FeatureChoice(4), FeatureChoice(4, exponent=0.7, floor=1)], ids=repr
)
def test_200_steps_have_the_loss_curve_of_the_definition(rule, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(64, 16, generator=generator)
    data = (torch.rand(8, 128, 64, generator=generator) < 0.05).float() @ truth
    config = TrainConfig(
        site=Site("toy"), rule=rule, n_features=64, tokens=128 * 400, batch_tokens=128, warmup=0.1,
        auxiliary=AuxZipf(dead_after=1000),
    )  # fmt: skip

    def curve(kind: type[SAE]) -> tuple[Tensor, Tensor]:
        state = TrainState.start(config, data.flatten(0, 1))
        state.sae.__class__ = kind
        reports = []
        for step in range(200):
            # whatever the rule, so that there are some to revive
            state.density.tokens_since_fired[::9] = 1 << 40
            reports.append(train_step(state, data[step % 8]))
        return torch.stack([r.loss.detach() for r in reports]), torch.stack([r.auxiliary.detach() for r in reports])

    ours, revived = curve(SAE)
    monkeypatch.setattr(losses, "explain_by_token", explained_plainly)
    definition, _ = curve(DefinitionSAE)
    assert (revived > 0).sum() > 150
    assert definition[-1] < 0.7 * definition[0]
    assert ((ours - definition).abs() / definition).max() < 1e-3
