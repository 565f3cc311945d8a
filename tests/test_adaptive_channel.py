"""The channel that A-ViT's gate borrows: swapping changes nothing, and the one that is chosen is the reference's."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from saekit.adaptive.a_vit import AViT, AViTConfig
from saekit.adaptive.a_vit_channel import least_needed_channel, swap_channels
from saekit.adaptive.a_vit_recipe import CONTROL, HALTING, PLAIN, AViTRecipe

SMALL = AViTConfig(image=6, patch=2, width=8, layers=3, heads=2)


@pytest.fixture
def model() -> AViT:
    made = AViT(SMALL, seed=3).double()
    with torch.no_grad():  # so that no channel is like another
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return made


@pytest.fixture
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 1, 6, 6, generator=generator).double(), torch.tensor([0, 3, 1, 7])


def streams(model: AViT, images: torch.Tensor) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for layer in model.stack:
        layer.content.register_forward_hook(lambda module, args, out: found.append(out.detach()))
    model(images, halts=False)
    return found


def test_a_model_with_two_channels_swapped_computes_the_same_with_them_swapped(model, pictures):
    images, _ = pictures
    other = AViT(SMALL, seed=3).double()
    other.load_state_dict(model.state_dict())
    swap_channels(other, 0, 5)
    torch.testing.assert_close(other(images, halts=False).logits, model(images, halts=False).logits)
    order = [5, 1, 2, 3, 4, 0, 6, 7]
    for swapped, before in zip(streams(other, images), streams(model, images), strict=True):
        torch.testing.assert_close(swapped, before[..., order])
    swap_channels(other, 0, 5)
    assert all(torch.equal(other.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_the_chosen_channel_is_that_of_a_reference_by_finite_differences(model, pictures):
    images, labels = pictures

    def loss_with(layer: int, patch: int, scale: float) -> torch.Tensor:
        def scaled(module: nn.Module, args: object, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[:, patch + 1] *= scale
            return x

        hook = model.stack[layer].content.register_forward_hook(scaled)
        with torch.no_grad():
            logits = model(images, halts=False).logits
        hook.remove()
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    patches, step, stopping = SMALL.tokens - 1, 1e-5, torch.tensor([0.1, 0.6, 0.3])
    agreement = torch.zeros(SMALL.width)
    for layer, state in enumerate(streams(model, images)[:-1]):
        slope = [loss_with(layer, at, 1 + step) - loss_with(layer, at, 1 - step) for at in range(patches)]
        needed = torch.stack(slope, 1).abs().flatten()
        for channel in range(SMALL.width):
            correlation: float = spearmanr(state[:, 1:, channel].flatten(), needed)[0]  # pyright: ignore
            agreement[channel] += stopping[layer] * correlation
    chosen = least_needed_channel(model, images, labels, stopping)
    assert chosen == int(agreement.argmin())
    assert chosen != least_needed_channel(model, images, labels, -stopping) == int(agreement.argmax())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_gate_reads_what_the_recipe_says_and_only_where_tokens_halt():
    recipe = AViTRecipe(width=8, layers=2, canvas=10, plain_epochs=1, halting_epochs=1)
    prepared = {stage.name: stage.prepare is not None for stage in recipe.stages}
    assert prepared == {PLAIN: False, CONTROL: False, HALTING: True}
    as_published = AViTRecipe(width=8, layers=2, canvas=10, plain_epochs=1, halting_epochs=1, channel="first")
    assert not any(stage.prepare for stage in as_published.stages)

    before, model = recipe.build(), recipe.build()
    recipe.borrow(model)
    moved = [c for c in range(8) if not torch.equal(model.embed.weight[c], before.embed.weight[c])]
    assert len(moved) == 2 and moved[0] == 0
    assert torch.equal(model.embed.weight[0], before.embed.weight[moved[1]])
