"""Attributions on a network whose mechanism is known: addition modulo 113 by a few Fourier frequencies.

Nanda et al., arXiv 2301.05217. The embedding of a number is a sum of waves, `sum_k C[k] wave[k, number]`; a planted SAE
has a feature for each half of each wave, so its codes are the Fourier components.
"""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from saekit.activations.mask import MaskPolicy
from saekit.patching.attribution import attribute
from saekit.patching.effects import exact_effects
from saekit.patching.metric import LogitDifference
from saekit.patching.statistics import rank_correlation
from saekit.sae import SAE
from saekit.selection import Threshold
from saekit.targets import Site, Target

P = 113
KEY_FREQUENCIES = {23, 6, 37, 41, 39}
MASK, SITE = MaskPolicy(drop_bos=False, drop_padding=False), Site("embed")


class ModularAddition(nn.Module):
    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.w = {name.rpartition(".")[2]: tensor for name, tensor in weights.items()}
        self.embed = nn.Embedding.from_pretrained(self.w["W_E"].T.contiguous())

    def forward(self, ids: Tensor) -> Tensor:
        w = self.w
        x = self.embed(ids) + w["W_pos"]
        q, k, v = (torch.einsum("hdm,bpm->bhpd", w[name], x) for name in ("W_Q", "W_K", "W_V"))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)  # (batch, 3, heads * d_head)
        x = x + mixed @ w["W_O"].T
        hidden = (x @ w["W_in"].T + w["b_in"]).relu()
        return (x + hidden @ w["W_out"].T + w["b_out"]) @ w["W_U"]


@pytest.fixture(scope="module")
def target(request) -> Target:
    shared_data = request.getfixturevalue("shared_data_folder")
    return Target.wrap(ModularAddition(load_file(shared_data / "toy_transformers" / "modadd_p113_grokked.safetensors")))


@pytest.fixture(scope="module")
def shared_data_folder(request):
    from conftest import SHARED_DATA

    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA.parent.name}/{SHARED_DATA.name} beside the project")
    return SHARED_DATA


def waves() -> tuple[Tensor, Tensor]:
    """An orthonormal basis of functions of a number, `(P, P)`, and the frequency of each."""
    turn = 2 * math.pi * torch.arange(P, dtype=torch.float64) / P
    rows, frequency = [torch.full((P,), 1 / math.sqrt(P), dtype=torch.float64)], [0]
    for k in range(1, (P + 1) // 2):
        rows += [(k * turn).cos() * math.sqrt(2 / P), (k * turn).sin() * math.sqrt(2 / P)]
        frequency += [k, k]
    return torch.stack(rows), torch.tensor(frequency)


@pytest.fixture(scope="module")
def planted(target) -> tuple[SAE, Tensor]:
    """The SAE, and the frequency of each of its features."""
    basis, frequency = waves()
    directions = basis @ target.model.embed.weight[:P].double()  # (P, d_model): what each wave writes
    read = torch.linalg.pinv(directions).T  # (P, d_model): amplitude of each wave in a vector
    size = directions.norm(dim=1, keepdim=True)
    sae = SAE(128, 2 * P, Threshold(1e-4))
    with torch.no_grad():
        sae.decoder.copy_(torch.cat([directions / size, -directions / size]))
        sae.encoder.copy_(torch.cat([read * size, -read * size]))
    return sae, torch.cat([frequency, frequency])


def sums(n: int) -> tuple[Tensor, LogitDifference]:
    """Prompts `a b =`, and the logit of the right answer minus that of another."""
    a, b, off = (
        torch.randint(low, P, (n,), generator=torch.Generator().manual_seed(s)) for s, low in ((0, 0), (1, 0), (2, 1))
    )
    right = (a + b) % P
    return torch.stack([a, b, torch.full((n,), P)], 1), LogitDifference(right, (right + off) % P, torch.full((n,), 2))


def of_frequency(at, effect: Tensor, frequency: Tensor) -> Tensor:
    """Size of the effects of each frequency, on numbers alone."""
    number = at.position < 2
    size = torch.zeros((P + 1) // 2, dtype=torch.float64)
    return size.index_add_(0, frequency[at.feature[number]], effect[number].abs())


def test_the_model_adds_and_the_waves_are_its_embedding(target, planted):
    ids, metric = sums(200)
    assert torch.equal(target.run(ids)[:, 2, :P].argmax(-1), metric.right)
    x = target.model.embed.weight[:P]
    torch.testing.assert_close(planted[0](x), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [0, 8])
def test_attribution_finds_the_known_frequencies(target, planted, steps):
    sae, frequency = planted
    ids, metric = sums(200)
    found = attribute(target, sae, SITE, ids, metric, steps=steps, mask=MASK)
    size = of_frequency(found.at, found.effect, frequency)
    assert set(size.topk(5).indices.tolist()) == KEY_FREQUENCIES
    # their doubles have some too: ReLU makes harmonics
    doubles = {min(2 * k, P - 2 * k) for k in KEY_FREQUENCIES}
    others = [k for k in range(1, 57) if k not in KEY_FREQUENCIES | doubles]
    assert size[list(KEY_FREQUENCIES)].min() > 5 * size[others].max()


def test_exact_ablation_finds_them_too_and_ranks_as_attribution_does(target, planted):
    sae, frequency = planted
    ids, metric = sums(12)
    found = attribute(target, sae, SITE, ids, metric, mask=MASK)
    exact = exact_effects(target, sae, SITE, ids, metric, found.at, mask=MASK, batch_rows=512)
    assert set(of_frequency(found.at, exact, frequency).topk(5).indices.tolist()) == KEY_FREQUENCIES
    assert rank_correlation(found.effect, exact) > 0.9
