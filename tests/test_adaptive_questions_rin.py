"""RIN's questions: planted answers are found, edits that should do nothing do nothing, and all of them are asked."""

import math
from dataclasses import replace

import pytest
import torch

from saekit.adaptive.diffusion import Sampling
from saekit.adaptive.questions import rin as questions
from saekit.adaptive.questions import rin_runs, rin_steering
from saekit.adaptive.questions.paired import Paired
from saekit.adaptive.questions.rin import ask, noise_levels, sides, slots, transfer
from saekit.adaptive.questions.rin_causes import forgetting, inky, race, same_class, within
from saekit.adaptive.questions.rin_runs import (
    Dictionary,
    estimate,
    given,
    learn,
    pictures,
    rank_of,
    read_edited,
    read_runs,
)
from saekit.adaptive.questions.rin_steering import compared, pushing
from saekit.adaptive.rin import RIN, RINConfig
from saekit.adaptive.rin_target import rin_target
from saekit.adaptive.telling import purity
from saekit.codes import SparseCodes
from saekit.crosscoder import Crosscoder
from saekit.errors import ShapeError
from saekit.sae import SAE
from saekit.selection import TopK
from saekit.targets import Site
from saekit.training import crosscoder, loop

STEPS = 3
SHARES = ("purity", "pure by", "dead", "mostly", "only", "class changed", "p among")


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(rin_runs, "CONTROLS", 3)
    monkeypatch.setattr(rin_runs, "CANDIDATES", 3)
    monkeypatch.setattr(rin_steering, "CONTROLS", 3)
    for module in (rin_runs, questions):
        monkeypatch.setattr(module, "N_FEATURES", 48)
    monkeypatch.setattr(loop, "SAMPLE_TOKENS", 2048)
    monkeypatch.setattr(crosscoder, "SAMPLE_TOKENS", 2048)


def model_of(*, carries: bool = True, seed: int = 0, slots: int = 5) -> RIN:
    """Untrained; `carries` opens the norm that is closed at first."""
    model = RIN(RINConfig(width=16, slots=slots, latent=32, heads=2), seed=seed).eval()
    if carries:
        with torch.no_grad():
            model.carry_out.weight.fill_(1.0)
    return model


def by_sum(images: torch.Tensor) -> torch.Tensor:
    """A judge with two classes."""
    return (images.flatten(1)[:, :32].mean(1) > images.flatten(1)[:, 32:].mean(1)).long()


def runs_of(n: int = 20, **how) -> tuple:
    model = model_of(**how)
    target = rin_target(model, Sampling(steps=STEPS))
    return target, model, read_runs(target, model, torch.arange(n))


def units(width: int) -> Dictionary:
    """A feature for each axis, one of which is active at a time."""
    sae = SAE(width, width, TopK(1))
    with torch.no_grad():
        for weight in (sae.encoder, sae.decoder):
            weight.copy_(torch.eye(width))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return Dictionary(sae, torch.zeros(3, width))


def test_every_question_is_answered_with_numbers():
    model = model_of()
    target = rin_target(model, Sampling(steps=4))
    asked = {"tokens": 2048, "judge": by_sum, "other": model_of(seed=1)}
    answers = ask(target, model, torch.arange(50), torch.arange(50, 100), **asked)
    assert list(answers) == [
        "slots or content",
        "one dictionary across noise levels",
        "memory",
        "read against write",
        "already solved",
        "steering",
        "transfer",
    ]
    for question, found in answers.items():
        for name, value in found.items():
            assert math.isfinite(value), (question, name)
            if any(
                word in name for word in ("purity", "pure by", "dead", "mostly", "only", "class changed", "p among")
            ):
                assert 0 <= value <= 1 or "mean step" in name, (question, name, value)
    doses = {dose: answers["memory"][f"early: feature at dose {dose}"] for dose in ("0.5", "1", "2")}
    assert doses["1"] < 1e-5 < doses["0.5"]


def test_the_estimate_is_that_of_the_sampler_if_latents_are_its_own():
    target, model, runs = runs_of()
    for step in range(1, STEPS):
        again = estimate(target, model, runs, step, runs.latents[step - 1])
        torch.testing.assert_close(again, runs.seen[step], atol=1e-5, rtol=0)
        other = estimate(target, model, runs, step, runs.latents[step - 1].roll(1, 0))
        assert (other - runs.seen[step]).abs().max() > 1e-3


def test_a_model_that_carries_nothing_does_not_care_for_its_memory():
    target, model, runs = runs_of(carries=False)
    found = forgetting(target, model, runs, 1)
    assert found.pop("what is still to change") > 1e-3
    assert max(found.values()) < 1e-5
    edited = read_edited(target, model, torch.arange(20), {given(1): torch.zeros_like})
    assert compared(runs, edited, by_sum, 1)["final picture moved"] == 0


def test_a_feature_is_scaled_where_it_is_active_and_nowhere_else():
    dictionary = units(4)
    latents = torch.eye(4)[torch.tensor([[0, 1, 2], [2, 3, 2]])] * 3
    assert torch.equal(dictionary.scaling(2, 1.0)(latents), latents)
    gone = dictionary.scaling(2, 0.0)(latents)
    assert not gone[latents[..., 2] > 0].any()
    assert torch.equal(gone[latents[..., 2] == 0], latents[latents[..., 2] == 0])
    torch.testing.assert_close(dictionary.scaling(2, 2.0)(latents)[1, 0], latents[1, 0] * 2)


def test_a_dictionary_keeps_slots_apart():
    _, _, runs = runs_of()
    centred = learn(runs.latents, "model.z_final", tokens=2048, seed=0)
    torch.testing.assert_close(centred.centre, runs.latents.mean((0, 1)))
    moved = replace(centred, centre=centred.centre + 1)
    assert torch.equal(centred.encode(runs.latents).features, moved.encode(runs.latents + 1).features)


def test_purity_is_the_share_of_the_commonest_key():
    codes = SparseCodes.from_dense(
        torch.tensor([[1.0, 1.0, 0.0]] * 30 + [[0.0, 1.0, 0.0]] * 30 + [[0.0, 0.0, 1.0]] * 5)
    )
    found = purity(codes, torch.tensor([0] * 30 + [1] * 30 + [0] * 5), fewest=20)
    assert found[:2].tolist() == [1.0, 0.5] and found[2].isnan()


def planted(steps: int = 6, n: int = 30) -> torch.Tensor:
    """Feature 0 in the first third, 1 in the last, 2 and 3 between; the third slot always shows feature 4."""
    which = torch.tensor([0, 0, 2, 3, 1, 1])[:steps, None, None].repeat(1, n, 3)
    which[:, :, 2] = 4
    return torch.eye(5)[which]


def test_features_of_a_slot_and_of_noise_are_told_from_others():
    vectors, labels = planted(), torch.arange(30) % 10
    found = slots(units(5), vectors + 1e-3 * torch.randn_like(vectors), vectors, labels, seed=0)
    assert found["90% pure by slot"] == pytest.approx(1 / 5)
    assert found["90% pure by slot, shuffled"] == 0
    assert found["purity by class"] == pytest.approx(0.1)
    early = noise_levels(units(5), vectors, labels, seed=0)
    assert early["only early"] == early["only late"] == pytest.approx(1 / 5)
    assert early["only early, shuffled"] == early["only late, shuffled"] == 0
    assert early["at every step"] == pytest.approx(1 / 5)  # the slot's


def test_ranks_within_a_step_and_slot_know_nothing_of_the_step():
    value = torch.rand(3, 40, 2, generator=torch.Generator().manual_seed(0))
    step = torch.arange(3.0)[:, None, None].expand(3, 40, 2)
    noise = torch.rand(3, 40, 2, generator=torch.Generator().manual_seed(1))
    scores = torch.stack([value.exp() + 100 * step, -value, step, noise], -1)
    found = within(scores, value + 10 * step)
    assert found[:3].tolist() == pytest.approx([1, -1, 0], abs=1e-5)
    assert found[3].abs() < 0.3


def test_who_knows_the_ink_wins_the_race():
    _, model, runs = runs_of(200)
    generator = torch.Generator().manual_seed(0)
    ink, _ = inky(runs, runs)
    knowing = torch.randn(runs.latents.shape, generator=generator)
    knowing[:, :, 0] += 5.0 * (2 * ink[:, None].float() - 1)
    blind = torch.randn(runs.noisy.shape, generator=generator)
    blind = replace(runs, latents=knowing, noisy=blind)
    train, test = pictures(blind, slice(100)), pictures(blind, slice(100, None))
    # what is more than usual is told by the training half, so that a few change sides
    found = race(model, train, test, by_sum)
    assert found["ink after step 0: latents"] > 0.95
    assert abs(found["ink after step 0: noisy picture"] - 0.5) < 0.2
    label = race(model, train, test, lambda images: torch.arange(len(images)) % 10)
    assert label["class: from the label asked for"] == 1


def test_donors_are_of_the_same_class():
    labels = torch.tensor([0, 1, 0, 1, 0, 2])
    donors = same_class(labels)
    assert torch.equal(labels[donors], labels) and sorted(donors.tolist()) == list(range(6))
    assert (donors != torch.arange(6))[:5].all()


def test_a_push_is_of_the_length_asked_for_and_in_the_slot_of_its_feature():
    dictionary = units(4)
    latents = torch.eye(4)[torch.tensor([[0, 1, 2], [0, 3, 2], [2, 1, 0]])] * 3
    codes = dictionary.encode(latents)
    pushed = pushing(dictionary, codes, 2, 2.0)(latents) - latents
    assert not pushed[:, :2].any()
    torch.testing.assert_close(pushed[:, 2], torch.tensor([0.0, 0.0, 6.0, 0.0]).expand(3, 4))
    random = pushing(dictionary, codes, 2, 2.0, torch.ones(4))(latents) - latents
    torch.testing.assert_close(random[:, 2].norm(dim=1), torch.full((3,), 6.0))
    assert not (pushing(dictionary, codes, 2, 0.0)(latents) - latents).any()


def test_what_is_overwritten_is_seen_to_be():
    _, _, runs = runs_of()
    apart = (runs.latents - runs.latents.roll(1, 1)) * torch.tensor([0.8, 0.6, 0.1])[:, None, None, None]
    found = compared(runs, replace(runs, latents=runs.latents - apart), by_sum, 0)
    assert found["steps until half of it is left"] == 2
    assert found["latents apart behind the step"] == pytest.approx(0.8, abs=1e-4)
    assert found["latents apart at the end"] == pytest.approx(0.1, abs=1e-4)
    assert found["class changed"] == found["ink moved"] == 0
    assert compared(runs, replace(runs, seen=-runs.seen), by_sum, 1)["class changed"] == 1


def test_a_crosscoder_says_on_which_side_a_feature_lives():
    before, after = Site.parse("model.z_read"), Site.parse("model.z_final")
    sae = SAE(8, 4, TopK(3))
    with torch.no_grad():
        sae.decoder.zero_()
        sae.decoder[0, 0] = sae.decoder[1, 4] = 1
        sae.decoder[2, [1, 5]] = 0.5**0.5
        sae.decoder[3, 2], sae.decoder[3, 6] = 0.6, -0.8
        sae.encoder.copy_(sae.decoder)
        sae.b_enc.fill_(10.0)
        sae.b_dec.zero_()
    x = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    pairs = Paired({before: x[:, :4].contiguous(), after: x[:, 4:].contiguous()})
    found = sides(Crosscoder(sae, {before: 4, after: 4}), pairs)
    assert found["mostly before computing"] == found["mostly after computing"] == 0.25
    assert found["evenly on both sides"] == 0.5 and found["dead"] == 0
    assert found["cosine of the two sides"] == pytest.approx(0.0, abs=1e-6)  # 0, 0, 1 and -1


def test_a_dictionary_goes_over_to_its_own_model_and_not_to_one_of_another_size():
    _, _, runs = runs_of(60)
    dictionary = learn(runs.latents, "model.z_final", tokens=4096, seed=0)
    same = transfer(dictionary, (runs, runs), (runs, runs), tokens=4096, seed=0)
    assert same["own: fvu"] == pytest.approx(same["other: fvu"], rel=1e-3)
    assert same["own latents that the map explains"] == pytest.approx(1, abs=1e-3)
    _, _, strange = runs_of(60, seed=5)
    other = transfer(dictionary, (runs, runs), (strange, strange), tokens=4096, seed=0)
    assert other["other: fvu"] > 1.1 * other["other, its own dictionary: fvu"]
    _, _, larger = runs_of(60, slots=6)
    with pytest.raises(ShapeError, match=r"\(6, 32\) a step, this one's \(5, 32\); give one of the same slots"):
        transfer(dictionary, (runs, runs), (larger, larger), tokens=4096, seed=0)


def test_a_rank_counts_what_is_at_least_as_strong():
    found = rank_of(0.5, [0.1, -0.7, 0.5, 0.2])
    assert found["p"] == 3 / 5 and found["strongest of matched"] == -0.7
    assert rank_of(1.0, [0.0])["p"] == 0.5
