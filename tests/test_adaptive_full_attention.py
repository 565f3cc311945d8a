"""RIN's baseline: patches that all see each other, at a cost that grows with their square."""

from dataclasses import replace

import pytest
import torch

from saekit.adaptive.diffusion import Sampler, Sampling, denoising_loss
from saekit.adaptive.full_attention import FullAttention, FullAttentionConfig
from saekit.adaptive.rin import RIN
from saekit.adaptive.rin_cost import counted_macs, denoisers, measure_cost
from saekit.adaptive.rin_recipe import RINRecipe
from saekit.errors import ShapeError

CONFIG = FullAttentionConfig(width=16, heads=2)


def test_it_denoises_as_rin_does_without_anything_to_carry():
    model = FullAttention(CONFIG).eval()
    images, label = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.eye(10)[:3]
    loss = denoising_loss(model, images, label, rate=0.0, generator=torch.Generator().manual_seed(0))
    loss.backward()
    assert model.readout.weight.grad.abs().max() > 0
    with torch.no_grad():
        made = [Sampler(model, Sampling(steps=3, carries=carries))(images) for carries in (True, False)]
    assert torch.equal(*made)
    with pytest.raises(ShapeError, match="this model works on"):
        model(torch.zeros(1, 1, 6, 6), torch.ones(1), label[:1], model.no_latents(1))


def test_every_patch_reaches_every_other():
    model = FullAttention(replace(CONFIG, layers=1)).eval()
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def predicted(x):
        return model(x, torch.ones(1) / 2, torch.eye(10)[:1], model.no_latents(1))[0]

    jacobian = torch.autograd.functional.jacobian(predicted, x)[0, 0, :, :, 0, 0]
    assert (jacobian.abs() > 0).float().mean() > 0.99


def test_the_class_and_the_time_are_seen():
    model, x = FullAttention(CONFIG).eval(), torch.zeros(1, 1, 8, 8)
    noise = lambda gamma, digit: model(x, torch.tensor([gamma]), torch.eye(10)[digit : digit + 1], x[:, 0])[0]  # noqa: E731
    assert not torch.equal(noise(0.5, 3), noise(0.5, 4))
    assert not torch.equal(noise(0.5, 3), noise(0.6, 3))


def test_multiplications_are_what_pytorch_counts_and_grow_linearly_and_with_the_square():
    counted = {
        patches: {name: counted_macs(m) for name, m in denoisers(patches).items()} for patches in (64, 256, 1024)
    }
    # time and class tokens, which the formulas leave out: once per picture
    time_and_class = 16 * 64 + 64 * 64 + 10 * 64
    for patches, by_name in counted.items():
        for name, model in denoisers(patches).items():
            assert by_name[name] == model.config.macs + time_and_class
    slope = [(counted[b]["rin"] - counted[a]["rin"]) / (b - a) for a, b in ((64, 256), (256, 1024))]
    assert slope[0] == slope[1]
    assert len({denoisers(patches)["rin"].config.constant_macs for patches in (64, 256)}) == 1
    steeper = [(counted[b]["full"] - counted[a]["full"]) / (b - a) for a, b in ((64, 256), (256, 1024))]
    assert steeper[1] > 2 * steeper[0]
    assert counted[1024]["full"] / counted[1024]["rin"] == pytest.approx(49, abs=0.5)


def test_the_cost_of_each_size_is_reported():
    found = measure_cost(sizes=(16,), batch=1, repeats=1)
    assert set(found) == {
        "rin_macs_at_16",
        "full_macs_at_16",
        "rin_ms_at_16",
        "full_ms_at_16",
        "constant_share_at_16",
        "times_the_macs_at_16",
        "times_the_ms_at_16",
    }
    assert found["rin_ms_at_16"] > 0 and 0 < found["constant_share_at_16"] < 1


def test_the_recipe_builds_the_control_on_request():
    recipe = RINRecipe(full_layers=1, batch=4)
    assert isinstance(recipe.build(), FullAttention) and isinstance(RINRecipe().build(), RIN)
    pytest.importorskip("sklearn")
    plain = replace(recipe, rate=0.0)
    model = recipe.build()
    # a rate changes nothing where there is nothing to carry
    assert torch.equal(recipe.loss(model, recipe.stages[0], 0)[0], plain.loss(model, plain.stages[0], 0)[0])
