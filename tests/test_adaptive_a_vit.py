"""A-ViT: what its paper's algorithm implies, and three ways to compute the same answer."""

from dataclasses import replace

import pytest
import torch
from adaptive_models import HALTING, a_vit_of, images_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from saekit.adaptive.a_vit import AViT, AViTConfig
from saekit.adaptive.a_vit_gathered import run_packed, run_padded
from saekit.adaptive.a_vit_losses import ponder_loss, prior_loss, target_depths, target_depths_of_code
from saekit.adaptive.a_vit_report import early_exit
from saekit.adaptive.deciding import a_vit_target
from saekit.adaptive.interventions import Force, Replay, Shift, Where, deciding, shuffled, trace_with
from saekit.errors import SaekitError, ShapeError
from saekit.targets import Site


def test_the_cases_below_have_tokens_that_stop_at_every_depth():
    depths = a_vit_of()(images_of()).depth
    assert set(depths.flatten().tolist()) == {1.0, 2.0, 3.0, 4.0}
    assert len(set(depths[:, 0].tolist())) > 1  # class tokens too


def test_a_model_that_never_halts_is_the_plain_vision_transformer():
    model, images = a_vit_of(), images_of()
    x = model.tokens_of(images)
    for layer in model.layers:
        block = layer.block
        x = x + block.attention(block.norm1(x))
        x = x + block.feed(block.norm2(x))
    plain = model.head(model.norm(x[:, 0]))
    never = AViT(replace(HALTING, shift=-1e4))
    never.load_state_dict(model.state_dict())
    for run in (never(images), model(images, halts=False)):
        torch.testing.assert_close(run.logits, plain, rtol=0, atol=1e-6)
        assert torch.equal(run.weights, torch.eye(4)[3].expand(6, 4))
        assert (run.depth == 4).all() and (run.ponder == 5).all()


def test_with_a_huge_shift_every_token_stops_behind_the_first_block():
    model, images = a_vit_of(replace(HALTING, shift=1e4)), images_of()
    run = model(images)
    assert (run.depth == 1).all() and (run.ponder == 2).all()
    first = model.layers[0].block(model.tokens_of(images))
    torch.testing.assert_close(run.logits, model.classify(first[:, 0]), rtol=0, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), shift=st.floats(-4, 2), eps=st.floats(0.001, 0.5))
def test_weights_add_up_to_one_and_ponder_is_depth_plus_remainder(seed, shift, eps):
    run = a_vit_of(replace(HALTING, shift=shift, eps=eps), seed)(images_of(3, seed))
    torch.testing.assert_close(run.weights.sum(1), torch.ones(3))
    assert (run.live[:, 1:] <= run.live[:, :-1]).all()
    before = run.live & ~run.reached
    torch.testing.assert_close(run.remainder, 1 - (run.scores * before).sum(1))
    torch.testing.assert_close(run.ponder, run.live.sum(1) + run.remainder)
    # the first layer whose scores add up far enough, else the last
    enough = run.scores.cumsum(1) >= 1 - eps
    enough[:, -1] = True
    assert torch.equal(run.depth.long(), enough.long().argmax(1) + 1)


def test_raising_a_score_before_the_halt_lowers_the_ponder_by_as_much():
    model, images = a_vit_of().double(), images_of().double()
    score = model.layers[0].halt.score
    moved = []
    handle = score.register_forward_hook(lambda m, args, out: moved.append(out.retain_grad() or out))
    run = model(images)
    handle.remove()
    run.ponder.sum().backward()
    # a later score depends on this one's token only through the residual, which the gate does not write
    assert torch.equal(moved[0].grad, torch.where(run.reached[:, 0], 0.0, -1.0).double())


@pytest.mark.parametrize("run", [run_padded, run_packed])
@pytest.mark.parametrize("shift", [-3.0, -1.0, 0.5, 1e4])
def test_removing_halted_tokens_gives_the_answer_of_masking_them(run, shift):
    model, images = a_vit_of(replace(HALTING, shift=shift)), images_of(9)
    torch.testing.assert_close(run(model, images), model(images).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("run", [run_padded, run_packed])
def test_given_depths_are_kept_whatever_the_gate_says(run):
    model, images = a_vit_of(), images_of(9)
    target = a_vit_target(model)
    moved = trace_with(target, images, [Replay(shuffled(target.trace(images)))])
    torch.testing.assert_close(run(model, images, moved.depth), moved.more["logits"], rtol=0, atol=1e-5)
    assert not torch.allclose(run(model, images), moved.more["logits"], atol=1e-3)


@pytest.mark.parametrize("run", [run_padded, run_packed])
def test_removed_tokens_are_not_computed(run):
    model, images = a_vit_of(), images_of()
    seen = []
    for layer in model.layers:
        layer.block.feed.register_forward_hook(lambda m, args, out: seen.append(out[..., 0].numel()))
    run(model, images)
    live = model(images).live
    assert seen[0] == live[:, 0].sum()
    assert seen[3] < live[:, 0].sum() / 2 if run is run_packed else seen[3] < live[:, 0].sum()


def test_an_image_is_dropped_as_a_whole_when_its_class_token_has_stopped():
    model, images = a_vit_of(), images_of()
    live, seen = model(images).live, []
    for layer in model.layers:
        layer.block.feed.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    run_packed(model, images)
    assert seen == (live & live[:, :, :1]).sum((0, 2)).tolist()
    assert seen[-1] < live[:, -1].sum()


def test_what_a_halted_token_holds_has_no_influence():
    model, images = a_vit_of(), images_of()
    clean = model(images)
    halted = ~clean.live[:, 2]
    assert halted[:, 1:].any()
    # what the third block is given at tokens that stopped before it
    handle = model.layers[1].content.register_forward_hook(lambda m, args, out: out + halted[..., None] * 9.0)
    disturbed = model(images)
    handle.remove()
    stopped_later = clean.live[:, 2, 0]  # the class token's own state is averaged at the layer where it stops
    assert stopped_later.any()
    torch.testing.assert_close(disturbed.logits[stopped_later], clean.logits[stopped_later], rtol=0, atol=1e-6)


def test_permuting_patches_with_their_positions_permutes_depths():
    model, images = a_vit_of(), images_of()
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(16)])
    patches = nn.functional.unfold(images, 2, stride=2)[:, :, order[1:] - 1]
    clean = model(images)
    with torch.no_grad():
        model.position.copy_(model.position[:, order])
    permuted = model(nn.functional.fold(patches, (8, 8), 2, stride=2))
    assert torch.equal(permuted.depth, clean.depth[:, order])
    torch.testing.assert_close(permuted.logits, clean.logits)


def test_with_scores_held_a_smaller_eps_never_makes_a_token_stop_earlier():
    scores = a_vit_of()(images_of()).scores
    shallow, deep = a_vit_of(replace(HALTING, eps=0.3)), a_vit_of(replace(HALTING, eps=0.05))
    for model in (shallow, deep):
        for number, layer in enumerate(model.layers):
            layer.halt.score.register_forward_hook(lambda m, args, out, number=number: scores[:, number])
    assert (deep(images_of()).depth >= shallow(images_of()).depth).all()
    assert (deep(images_of()).depth > shallow(images_of()).depth).any()


def test_replaying_its_own_depths_changes_nothing():
    target, images = a_vit_target(a_vit_of()), images_of()
    clean = target.trace(images)
    again = trace_with(target, images, [Replay(clean)])
    assert not again.changed(clean).any()
    assert torch.equal(again.more["logits"], clean.more["logits"])


def test_replayed_depths_hold_while_the_content_changes():
    target, images = a_vit_target(a_vit_of()), images_of()
    clean = target.trace(images)
    content = {Site.parse("layers.0.content:in"): lambda x: x + 5.0}
    with target.target.editing(content):
        assert target.trace(images).changed(clean).any()
        with deciding(target, [Replay(clean)]):
            frozen = target.trace(images)
    assert not frozen.changed(clean).any()
    assert not torch.equal(frozen.more["logits"], clean.more["logits"])


def test_an_edit_of_what_the_gate_reads_leaves_the_content_alone():
    target, images = a_vit_target(a_vit_of()), images_of()
    clean = target.trace(images)
    with target.target.editing({target.steps[0].reads: lambda x: x + 50.0}):
        halted = target.trace(images)
    assert (halted.depth == 1).all() and not (clean.depth == 1).all()
    with target.target.editing({target.steps[0].reads: lambda x: x + 50.0}), deciding(target, [Replay(clean)]):
        held = target.trace(images)
    first = a_vit_of().classify(target.target.read(images, [target.steps[0].content])[target.steps[0].content][:, 0])
    torch.testing.assert_close(held.more["class_logits"][:, 0], first.detach(), rtol=0, atol=1e-6)


def test_forced_halts_and_continuations_hold_and_weights_still_add_up():
    target, images = a_vit_target(a_vit_of()), images_of()
    patches = tuple(range(1, 17))
    early = trace_with(target, images, [Force("halt", Where(steps=(1,), places=patches))])
    assert (early.depth[:, 1:] <= 2).all()
    late = trace_with(target, images, [Force("go on")])
    assert (late.depth == 4).all()
    for trace in (early, late):
        torch.testing.assert_close(trace.more["weights"].sum(1), torch.ones(6))
        assert (trace.more["weights"] >= 0).all()
    assert (trace_with(target, images, [Shift(4.0)]).macs < target.trace(images).macs).all()


def test_shuffled_maps_spend_as_much_elsewhere():
    target, images = a_vit_target(a_vit_of()), images_of()
    clean = target.trace(images)
    moved = trace_with(target, images, [Replay(shuffled(clean))])
    assert moved.macs.sort().values.tolist() == pytest.approx(clean.macs.sort().values.tolist())
    assert not any(torch.equal(a, b) for a, b in zip(moved.depth, clean.depth, strict=True))


def test_hiding_a_token_is_not_halting_it():
    target, images = a_vit_target(a_vit_of()), images_of()
    clean = target.trace(images)

    def hide(live):
        hidden = live.clone()
        hidden[:, 3:9] = False
        return hidden

    with target.target.editing({Site.parse("layers.0.visible:out"): hide}):
        blind = target.trace(images)
    assert torch.equal(blind.live[:, 0], clean.live[:, 0])
    assert not torch.equal(blind.more["logits"], clean.more["logits"])


@pytest.mark.parametrize(
    "intervention, message",
    [
        (Force("halt", Where(steps=(3,))), "step 3 of a-vit has no free decision; they are 0 to 2"),
        (Force("stop"), "no option 'stop'; it has go on, halt"),
        (Force("halt", Where(places=(17,))), r"no place \[17\] among 17"),
        (Force("halt", Where(examples=(0, 6))), r"no example \[6\] among 6"),
        (Shift(0.0), "changes nothing"),
    ],
)
def test_interventions_that_cannot_be_carried_out_are_refused(intervention, message):
    with pytest.raises(SaekitError, match=message):
        trace_with(a_vit_target(a_vit_of()), images_of(), [intervention])


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"images are \(1, 9, 9\).*\(1, 8, 8\)"):
        a_vit_of()(torch.zeros(2, 1, 9, 9))
    with pytest.raises(SaekitError, match="8 pixels are no whole number of patches of 3"):
        AViTConfig(image=8, patch=3)
    target = a_vit_target(a_vit_of())
    with pytest.raises(ShapeError, match="decisions of 6 examples"):
        trace_with(target, images_of(4), [Replay(target.trace(images_of(6)))])


def test_macs_are_what_the_linear_maps_and_patterns_multiply():
    model = a_vit_of()
    n, d = 17, 16
    per_layer = 4 * n * d * d + 2 * n * n * d + 2 * n * d * 4 * d
    trace = trace_with(a_vit_target(model), images_of(1), [Force("go on")])
    assert trace.full_macs == 4 * per_layer + 16 * 4 * d + d * 10
    assert trace.mac_ratio.tolist() == [1.0]


@pytest.mark.parametrize("mac_ratio, layer", [(0.01, 0), (0.26, 1), (0.999, 3), (1.0, 3)])
def test_an_early_exit_is_the_first_layer_that_costs_as_much_without_any_choice(mac_ratio, layer):
    model, images = a_vit_of(), images_of(30)
    class_logits = model.classify(model(images, halts=False).states)
    labels = class_logits[:, layer].argmax(1)
    found = early_exit(model, class_logits, labels, mac_ratio=mac_ratio)
    ends = 16 * 4 * 16 + 16 * 10
    per_layer = (4 + 8) * 17 * 16**2 + 2 * 17**2 * 16
    assert found["early_exit_mac_ratio"] == pytest.approx(((layer + 1) * per_layer + ends) / (4 * per_layer + ends))
    assert found["early_exit_accuracy"] == 1


def test_the_poisson_prior_is_least_where_scores_are_the_prior_and_the_code_prior_is_blind_to_size():
    wanted = target_depths(6, 2.0)
    scores = wanted[None, :, None].expand(3, 6, 5).clone().requires_grad_()
    loss = prior_loss(scores, prior="poisson", target=2.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert scores.grad.abs().max() < 1e-6
    for factor in (0.3, 2.0):
        assert prior_loss(scores.detach() * factor, prior="poisson", target=2.0) > 0.01
    code = [float(prior_loss(scores.detach() * f + 0.01 * f, prior="code", target=2.0)) for f in (0.1, 1.0)]
    assert code[0] == pytest.approx(code[1], rel=1e-4)


def test_the_paper_prior_is_the_divergence_of_scores_from_the_prior():
    wanted = target_depths(5, 3.0)
    assert float(wanted.sum()) == pytest.approx(1)
    assert wanted.argmax() == 2
    mean = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1])
    expected = (mean * (mean / wanted).log()).sum()
    assert float(prior_loss(mean[None, :, None].expand(2, 5, 3), prior="paper", target=3.0)) == pytest.approx(
        float(expected), rel=1e-5
    )


def test_the_target_of_the_released_code_is_no_distribution():
    known = [0, 0, 0, 0, 0.0004, 0.0145, 0.1761, 0.789, 1.301, 0.789, 0.176, 0.0145]
    torch.testing.assert_close(target_depths_of_code(12, 8), torch.tensor(known), rtol=0, atol=1e-3)


def test_the_prior_refuses_a_depth_outside_the_model():
    with pytest.raises(SaekitError, match=r"a target depth of 7\.0 is outside a model of 6 layers"):
        target_depths(6, 7.0)


def test_the_ponder_loss_counts_the_class_token():
    run = a_vit_of()(images_of())
    assert float(ponder_loss(run.ponder).detach()) == pytest.approx(float(run.ponder.detach().sum()) / (6 * 17))


def test_the_code_prior_is_the_reversed_divergence_with_its_peak_at_the_index_of_the_target():
    mean = torch.tensor([0.02, 0.1, 0.4, 0.2, 0.05])
    wanted = target_depths_of_code(5, 2)
    assert wanted.argmax() == 2
    share = (mean / mean.sum()).clamp(0.01, 0.99)
    expected = float((wanted * (wanted / share).log()).sum() / 5)
    loss = prior_loss(mean[None, :, None].expand(2, 5, 3), prior="code", target=2.0)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
