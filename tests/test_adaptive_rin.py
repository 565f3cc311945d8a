"""RIN: pictures and latents meet only where they should, and samplers do what their formulas say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.adaptive import Flip, Force, Replay, Shift, Where, harvest, trace_with
from saekit.adaptive.a_vit_recipe import load_once
from saekit.adaptive.diffusion import Sampler, Sampling, cosine, denoising_loss, linear, noised, sigmoid
from saekit.adaptive.rin import RIN, RINConfig, wave
from saekit.adaptive.rin_recipe import RINRecipe
from saekit.adaptive.rin_report import frechet
from saekit.adaptive.rin_target import rin_target
from saekit.adaptive.stages import train_stages
from saekit.errors import SaekitError, ShapeError
from saekit.patching import Intervention, ReplaceFrom, Zero, run_with_interventions
from saekit.targets import Site, Target

CONFIG = RINConfig(image=8, patch=2, width=16, slots=5, latent=32, blocks=2, compute=1, heads=2)


def model_of(config: RINConfig = CONFIG, *, carries: bool = True) -> RIN:
    """Untrained; `carries` opens the norm that is closed at first."""
    model = RIN(config).eval()
    if carries:
        with torch.no_grad():
            model.carry_out.weight.fill_(1.0)
    return model


def inputs_of(n: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, gamma = torch.randn(n, 1, 8, 8, generator=generator), torch.rand(n, generator=generator)
    return images, gamma, torch.eye(10)[:n], torch.randn(n, 5, 32, generator=generator)


def test_at_first_no_latents_are_carried_and_later_they_are():
    images, gamma, label, z = inputs_of()
    closed = model_of(carries=False)
    assert torch.equal(closed(images, gamma, label, z)[0], closed(images, gamma, label, z * 5)[0])
    opened = model_of()
    assert not torch.equal(opened(images, gamma, label, z)[0], opened(images, gamma, label, z * 5)[0])


def test_patches_meet_only_through_latents():
    images, gamma, label, z = inputs_of(1)
    model = model_of()
    with torch.no_grad():
        for block in model.blocks:
            block.write.out.weight.zero_()

    def predicted(x):
        return model(x, gamma, label, z)[0]

    jacobian = torch.autograd.functional.jacobian(predicted, images)[0, 0, :, :, 0, 0]
    patch = torch.arange(8) // 2
    same = (patch[:, None, None, None] == patch[None, None, :, None]) & (
        patch[None, :, None, None] == patch[None, None, None, :]
    )
    assert (jacobian[~same] == 0).all()
    assert jacobian[same].abs().max() > 0


def test_permuting_patches_with_their_positions_permutes_the_prediction():
    images, gamma, label, z = inputs_of()
    model, order = model_of(), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    clean, latents = model(images, gamma, label, z)
    unfold = lambda x: torch.nn.functional.unfold(x, 2, stride=2)  # noqa: E731
    moved = torch.nn.functional.fold(unfold(images)[:, :, order], (8, 8), 2, stride=2)
    with torch.no_grad():
        model.position.copy_(model.position[:, order])
    permuted, same_latents = model(moved, gamma, label, z)
    torch.testing.assert_close(unfold(permuted), unfold(clean)[:, :, order], rtol=0, atol=1e-5)
    torch.testing.assert_close(same_latents, latents, rtol=0, atol=1e-5)


def test_the_first_pass_of_self_conditioning_gets_no_gradient():
    model, (images, _, label, _) = model_of(), inputs_of()
    calls = []
    model.z_final.register_forward_hook(lambda m, args, out: calls.append(out.requires_grad))
    denoising_loss(model, images, label, rate=1.0, generator=torch.Generator().manual_seed(0)).backward()
    assert calls == [False, True]
    assert model.carry_feed.up.weight.grad.abs().max() > 0


def test_examples_without_latents_are_given_zeros():
    model, (images, _, label, _) = model_of(), inputs_of(8)
    seen = []
    model.z_prev.register_forward_hook(lambda m, args, out: seen.append(out))
    for rate in (0.0, 1.0, 0.5):
        denoising_loss(model, images, label, rate=rate, generator=torch.Generator().manual_seed(3))
    without, first, full, first_again, mixed = seen
    assert not without.any() and not first.any() and not first_again.any()
    assert full.any(dim=(1, 2)).all()
    given_some = mixed.any(dim=(1, 2))
    assert 0 < int(given_some.sum()) < 8
    assert torch.equal(mixed[given_some], full[given_some])


def test_the_loss_is_the_error_of_the_noise():
    model, (images, _, label, _) = model_of(), inputs_of()
    generator = torch.Generator().manual_seed(7)
    gamma, noise = linear(torch.rand(3, generator=generator)), torch.randn(images.shape, generator=generator)
    predicted = model(noised(images, noise, gamma), gamma, label, model.no_latents(3))[0]
    loss = denoising_loss(model, images, label, rate=0.0, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(loss, (predicted - noise).square().mean())


@pytest.mark.parametrize("schedule", [linear, cosine, sigmoid])
def test_schedules_fall_from_all_signal_to_none(schedule):
    gamma = schedule(torch.linspace(0, 1, 101))
    assert gamma[0] > 0.999 and gamma[-1] < 1e-3
    assert (gamma.diff() < 0).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_noise_and_signal_keep_the_variance(seed):
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, 1, 60, 60, generator=generator), torch.randn(2, 1, 60, 60, generator=generator)
    mixed = noised(x, noise, torch.rand(2, generator=generator))
    assert mixed.std().item() == pytest.approx(1, abs=0.05)


class Oracle(RIN):
    """Knows the picture, and says what the noise is."""

    def __init__(self, picture: torch.Tensor):
        super().__init__(CONFIG)
        self.picture = picture

    def forward(self, images, gamma, label, z_prev):
        g = gamma[:, None, None, None]
        return (images - g.sqrt() * self.picture) / (1 - g).sqrt().clamp(min=1e-9), z_prev


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(steps=7),
        Sampling(steps=2),
        Sampling(steps=7, sampler="ddpm", variance="none"),
        Sampling(steps=7, sampler="ddpm", variance="small"),
    ],
)
@pytest.mark.parametrize("schedule", [cosine, linear])
def test_a_perfect_denoiser_finds_the_picture_under_every_sampler_and_schedule(sampling, schedule):
    picture = torch.rand(1, 1, 8, 8) * 1.8 - 0.9
    found = Sampler(Oracle(picture), sampling, schedule=schedule)(torch.randn(2, 1, 8, 8))
    torch.testing.assert_close(found, picture.expand(2, -1, -1, -1), rtol=0, atol=1e-3)


@torch.no_grad()
def test_ddim_is_deterministic_and_ddpm_is_seeded():
    model, noise = model_of(), torch.randn(2, 1, 8, 8)
    run = lambda **how: Sampler(model, Sampling(steps=4, **how))(noise)  # noqa: E731
    assert torch.equal(run(), run(seed=1))
    assert torch.equal(run(sampler="ddpm"), run(sampler="ddpm"))
    assert not torch.equal(run(sampler="ddpm"), run(sampler="ddpm", seed=1))
    assert not torch.equal(run(), run(carries=False))


# latents of zeros are what a reset is
@pytest.mark.filterwarnings("ignore::saekit.patching.OffDistributionWarning")
@torch.no_grad()
def test_sampling_steps_are_calls_of_sites_and_latents_can_be_reset_and_patched():
    model, noise, steps = model_of(), torch.randn(2, 1, 8, 8), 4
    target = Target.wrap(Sampler(model, Sampling(steps=steps)), example=noise)
    site = Site.parse("model.z_prev:out@*")
    latents = target.read(noise, [site])[site]
    assert latents.shape == (steps, 2, 5, 32)
    assert not latents[0].any() and latents[1:].any()
    reset = [Intervention(site=Site.parse(f"model.z_prev:out@{step}"), operation=Zero()) for step in range(1, steps)]
    torch.testing.assert_close(
        run_with_interventions(target, noise, reset), Sampler(model, Sampling(steps=steps, carries=False))(noise)
    )
    one = Site.parse("model.z_prev:out@2")
    same = Intervention(site=one, operation=ReplaceFrom(latents[2]), may_idle=True)
    assert torch.equal(run_with_interventions(target, noise, [same]), target.run(noise))
    swapped = Intervention(site=one, operation=ReplaceFrom(latents[2].flip(0)), positions=(0, 1))
    assert not torch.equal(run_with_interventions(target, noise, [swapped]), target.run(noise))


def test_multiplications_are_a_constant_and_so_much_per_patch():
    main = RINConfig(patch=1, width=32, slots=10, latent=64, blocks=2, compute=2)
    # of the specification: n, constant and total in millions
    for image, total in ((4, 3.47), (8, 4.38), (16, 8.03), (32, 22.6)):
        sized = replace(main, image=image)
        assert sized.constant_macs / 1e6 == pytest.approx(3.16, abs=0.005)
        assert sized.macs / 1e6 == pytest.approx(total, abs=0.03)


def test_counted_multiplications_are_those_of_the_linear_maps_and_patterns():
    model, (images, gamma, label, z) = model_of(), inputs_of(1)
    counted = [0]
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda m, args, out: counted.__setitem__(0, counted[0] + out.numel() * m.in_features)
            )
        if type(module).__name__ == "Attention":
            inner = module.q.out_features // module.heads
            module.pattern.register_forward_hook(
                lambda m, args, out, inner=inner: counted.__setitem__(0, counted[0] + 2 * out.numel() * inner)
            )
    model(images, gamma, label, z)
    time_and_class = 8 * 32 + 32 * 32 + 10 * 32  # once per picture, left out of the formula
    assert counted[0] - time_and_class == model.config.macs


def test_the_wave_is_standardised_and_tells_times_apart():
    waves = wave(torch.tensor([0.1, 0.5, 0.9]), 16)
    torch.testing.assert_close(waves.mean(1), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(waves.std(1, correction=0), torch.ones(3))
    assert (waves[0] - waves[1]).abs().max() > 0.5


def test_what_does_not_fit_is_refused():
    model, (_, gamma, label, z) = model_of(), inputs_of()
    with pytest.raises(ShapeError, match=r"images are \(1, 6, 6\), but this model works on \(1, 8, 8\)"):
        model(torch.zeros(3, 1, 6, 6), gamma, label, z)
    with pytest.raises(SaekitError, match="8 pixels are no whole number of patches of 3"):
        RINConfig(patch=3)
    with pytest.raises(SaekitError, match="give at least 3 slots"):
        RINConfig(slots=2)
    with pytest.raises(SaekitError, match="steps=0 makes no picture"):
        Sampling(steps=0)
    with pytest.raises(SaekitError, match="labels up to 10 for 2 pictures of 10 classes"):
        Sampler(model, Sampling(steps=1))(torch.zeros(2, 1, 8, 8), torch.tensor([3, 10]))
    target = Target.wrap(Sampler(model, Sampling(steps=4)))
    with pytest.raises(SaekitError, match="choose @0 to @3"):
        target.read(torch.zeros(1, 1, 8, 8), [Site.parse("model.z_prev:out@4")])


def test_a_target_says_which_patches_each_step_read_more_than_their_share():
    target = rin_target(model_of(), Sampling(steps=4))
    labels = torch.tensor([3, 7, 7])
    trace = target.trace(labels)
    assert trace.decision.shape == (3, 4, 16)
    torch.testing.assert_close(trace.score.sum(2), torch.ones(3, 4))
    assert torch.equal(trace.decision == 1, trace.score > 1 / 16)
    assert trace.mac_ratio.tolist() == [1.0] * 3
    with torch.no_grad():
        torch.testing.assert_close(target.target.run(labels), trace.more["pictures"])
    assert "steps that a patch was worked on" in trace.picture(1, image=trace.more["pictures"][1, 0])
    with pytest.raises(SaekitError, match="step 4 of rin has no free decision; they are 0 to 3"):
        target.step(4)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_what_ddpm_adds_to_a_picture_goes_by_its_number(variance):
    target = rin_target(model_of(), Sampling(steps=3, sampler="ddpm", variance=variance))
    made = target.target.run(torch.tensor([3, 13, 4]))
    torch.testing.assert_close(target.target.run(torch.tensor([4]))[0], made[2], rtol=0, atol=1e-5)
    assert not torch.equal(made[0], made[1])


def test_a_number_is_a_class_and_a_noise_whatever_else_is_in_the_batch():
    target = rin_target(model_of(), Sampling(steps=3))
    made = target.target.run(torch.tensor([3, 13, 4, 23]))
    torch.testing.assert_close(target.target.run(torch.tensor([23]))[0], made[3], rtol=0, atol=1e-5)
    assert not torch.equal(made[0], made[1])  # the same class from other noise
    sampler = Sampler(target.target.model.model, Sampling(steps=3))
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sampler(noise, torch.tensor([3]))[0], made[1], rtol=0, atol=1e-5)
    other_seed = rin_target(model_of(), Sampling(steps=3, seed=1))
    assert not torch.equal(other_seed.target.run(torch.tensor([3]))[0], made[0])


# slots ask with normed vectors, and what is turned is another
@pytest.mark.filterwarnings("ignore::saekit.patching.OffDistributionWarning")
def test_what_slots_ask_with_decides_where_they_read_and_nothing_else():
    target, numbers = rin_target(model_of(), Sampling(steps=3)), torch.arange(5)
    clean, step = target.trace(numbers), target.step(1)
    assert harvest(target, numbers, 1).vectors.shape == (5 * 5, 32)
    values = Site.parse("model.blocks.0.read.v:out@1")
    with target.target.editing({step.reads: lambda z: -z}):
        edited, same = target.trace(numbers), target.target.read(numbers, [values])[values]
    assert torch.equal(edited.decision[:, 0], clean.decision[:, 0])
    assert edited.changed(clean).any() and not torch.equal(edited.score[:, 1], clean.score[:, 1])
    assert torch.equal(same, target.target.read(numbers, [values])[values])
    for edit in (Force("read more"), Flip(Where(steps=(1,))), Shift(1.0), Replay(clean)):
        with pytest.raises(SaekitError, match=r"of rin weighs, and takes no decision that could be overruled"):
            trace_with(target, numbers, [edit])


def test_the_recipe_learns_to_tell_noise_from_digits(tmp_path):
    pytest.importorskip("sklearn")
    recipe = RINRecipe(batch=16, steps=60)
    losses = []
    train_stages(recipe, tmp_path, on_report=lambda report: losses.append(report["loss"]))
    assert sum(losses[-10:]) < sum(losses[:10]) * 0.8
    digits = load_once(0)
    assert digits.train.min() == 0 and digits.train.max() == 1


def test_the_distance_of_two_sets_is_none_to_itself_and_that_of_their_gaussians():
    a = np.random.default_rng(0).normal(size=(4000, 3))
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, a + 2) == pytest.approx(12, abs=1e-6)
    assert frechet(a, 3 * a) == pytest.approx(3 * 4 + np.square(2 * a.mean(0)).sum(), rel=0.05)
