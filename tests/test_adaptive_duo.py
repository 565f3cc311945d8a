"""Duo-LLM: routes that do what they say, an oracle that can be replayed, a router that keeps to its budget."""

from math import comb

import pytest
import torch
from adaptive_models import ROUTING, duo_of, ids_of
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.adaptive.deciding import duo_target
from saekit.adaptive.duo_llm import BIG, SKIP, SMALL, DuoConfig, DuoFeedForward, next_token_nats
from saekit.adaptive.duo_oracle import all_routes, best_fixed, best_of, greedy, layer_usage, ref, scan, with_budget
from saekit.adaptive.duo_router import budget_loss, calibrate, n_big
from saekit.adaptive.interventions import Flip, Force, Replay, Shift, Where, deciding, trace_with
from saekit.errors import SaekitError, ShapeError
from saekit.targets import Site

ROUTES = all_routes(3)


def route_of(*options: int) -> torch.Tensor:
    return torch.tensor(options)


def test_all_big_is_the_model_without_its_small_feed_forwards():
    model, ids = duo_of(), ids_of()
    expected = model(ids, route_of(BIG, BIG, BIG)).logits
    for layer in model.layers:
        for weight in layer.feed.small.parameters():
            weight.data.fill_(torch.nan)
    assert torch.equal(model(ids, route_of(BIG, BIG, BIG)).logits, expected)
    assert not torch.isfinite(model(ids, route_of(BIG, SMALL, BIG)).logits).any()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_computing_only_the_chosen_tokens_gives_what_computing_all_and_masking_does(seed):
    generator = torch.Generator().manual_seed(seed)
    feed = DuoFeedForward(ROUTING)
    z = torch.randn(2, 5, 16, generator=generator)
    choice = torch.randint(0, 3, (2, 5), generator=generator)
    masked = feed.small(z) * (choice == SMALL)[..., None] + feed.big(z) * (choice == BIG)[..., None]
    torch.testing.assert_close(feed(z, choice), masked, rtol=0, atol=1e-5)


def test_skipping_leaves_out_the_feed_forward_and_not_attention():
    model, ids = duo_of(), ids_of()
    skipped = model(ids, route_of(SKIP, SKIP, SKIP)).logits
    assert not torch.equal(skipped, model.logits(model.embed(ids)))
    for layer in model.layers:
        layer.feed.register_forward_hook(lambda module, args, out: out * 0)
    assert torch.equal(model(ids, route_of(BIG, BIG, BIG)).logits, skipped)


def test_what_comes_later_changes_no_earlier_route_or_logit():
    model, ids = duo_of(), ids_of()
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 7) % 50
    one, other = model(ids), model(changed)
    assert torch.equal(one.route[:, :6], other.route[:, :6])
    torch.testing.assert_close(one.logits[:, :6], other.logits[:, :6], rtol=0, atol=1e-6)
    assert not torch.equal(one.logits[:, 6:], other.logits[:, 6:])


def test_routes_by_budget_are_all_there_once():
    assert [len(with_budget(ROUTES, budget)) for budget in range(4)] == [comb(3, budget) for budget in range(4)]
    assert len(ROUTES.unique(dim=0)) == 2**3
    assert len(all_routes(3, options=(SMALL, BIG, SKIP))) == 3**3
    with pytest.raises(SaekitError, match="no route spends 4 big layers; give 0 to 3"):
        with_budget(ROUTES, 4)


def test_scan_is_one_forward_pass_per_route_and_its_oracle_beats_every_fixed_route():
    model, ids = duo_of(), ids_of(batch=40)  # more than go into one pass
    nats = scan(model, ids, ROUTES)
    with torch.no_grad():
        by_hand = next_token_nats(model(ids, ROUTES[5]).logits, ids)
    torch.testing.assert_close(nats[5], by_hand, rtol=0, atol=1e-5)
    for budget in range(4):
        here = (ROUTES == BIG).sum(1) == budget
        oracle = best_of(nats[here], ROUTES[here])
        assert float(oracle.nats.mean()) <= best_fixed(nats[here])
        assert ((oracle.route == BIG).sum(2) == budget).all()


@pytest.mark.parametrize("routes", [ROUTES, with_budget(ROUTES, 1), all_routes(3, options=(BIG, SKIP))], ids=len)
def test_replaying_the_greedy_routes_gives_the_reported_losses(routes):
    model, ids = duo_of(), ids_of()
    oracle = greedy(model, ids, routes)
    # the last token predicts nothing and got no route; nothing comes after it that could see it
    route = torch.cat([oracle.route, oracle.route[:, -1:]], 1)
    with torch.no_grad():
        replayed = next_token_nats(model(ids, route).logits, ids)
    torch.testing.assert_close(oracle.nats, replayed, rtol=0, atol=1e-4)
    assert oracle.variant == "greedy"


def test_greedy_takes_the_best_route_at_the_first_token():
    model, ids = duo_of(), ids_of()
    first = scan(model, ids, ROUTES)[:, :, 0]
    assert torch.equal(greedy(model, ids, ROUTES).route[:, 0], ROUTES[first.argmin(0)])


def test_ref_varies_one_token_and_leaves_those_before_on_the_reference():
    model, ids = duo_of(), ids_of()
    nats = ref(model, ids, ROUTES)
    big = torch.full((3, 10, 3), BIG)
    for place in (0, 4):
        route = big.clone()
        route[:, place] = ROUTES[2]
        with torch.no_grad():
            expected = next_token_nats(model(ids, route).logits, ids)[:, place]
        torch.testing.assert_close(nats[2, :, place], expected, rtol=0, atol=1e-5)


def test_a_soft_router_that_is_sharp_enough_is_a_hard_one():
    model, ids = duo_of(), ids_of()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, tau=1e7).logits, model(ids).logits, rtol=0, atol=1e-4)
        assert not torch.allclose(model(ids, tau=1.0).logits, model(ids).logits, atol=1e-2)


def test_the_budget_loss_is_over_all_layers_of_each_sequence_at_once():
    budget = torch.tensor([0.5, 0.5])
    uneven = torch.zeros(2, 4, 2, 2)
    uneven[:, :, 0, BIG] = uneven[:, :, 1, SMALL] = 1.0  # one layer always big, the other never
    assert float(budget_loss(uneven, budget)) == 0
    one_too_much = uneven.clone()
    one_too_much[1] = torch.tensor([0.0, 1.0])
    assert float(budget_loss(one_too_much, budget)) == pytest.approx(0.5**2 / 2)
    three = torch.tensor([0.2, 0.5, 0.3]).expand(2, 4, 2, 3)
    assert float(budget_loss(three, torch.tensor([0.2, 0.5, 0.3]))) == pytest.approx(0, abs=1e-12)
    assert float(budget_loss(three, torch.tensor([0.3, 0.5, 0.2]))) == pytest.approx(0.02)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), budget=st.floats(0, 3))
def test_calibration_brings_the_mean_number_of_big_layers_to_the_budget(seed, budget):
    router = torch.randn(4, 30, 3, 2, generator=torch.Generator().manual_seed(seed))
    assert n_big(router, calibrate(router, budget)) == pytest.approx(budget, abs=1 / 60)


def test_calibration_refuses_what_it_cannot_reach():
    with pytest.raises(SaekitError, match=r"a budget of 4\.0 on 3 layers with 2 options; give 0 to 3"):
        calibrate(torch.zeros(1, 2, 3, 2), 4.0)


def test_the_threshold_decides_and_the_readout_is_the_margin():
    model, ids = duo_of(), ids_of()
    target = duo_target(model)
    clean = target.trace(ids)
    assert torch.equal(clean.decision == BIG, clean.margin > 0)
    assert 0 < float(clean.share("big").mean()) < 1
    model.threshold.fill_(float(clean.margin.max()) + 1)
    target = duo_target(model)
    assert (target.trace(ids).decision == SMALL).all()
    for number, step in enumerate(target.steps):
        direction, constant = step.readout
        z = target.target.read(ids, [step.reads])[step.reads]
        torch.testing.assert_close(z @ direction + constant, target.trace(ids).margin[:, number])


def test_interventions_on_routes():
    target, ids = duo_target(duo_of()), ids_of()
    clean = target.trace(ids)
    flipped = trace_with(target, ids, [Flip(Where(steps=(2,), places=(4,)))])
    assert flipped.changed(clean)[:, 4].all() and flipped.changed(clean).sum() == 3
    assert (trace_with(target, ids, [Force("skip")]).macs == 0).all()
    assert (trace_with(target, ids, [Shift(1e4)]).decision == BIG).all()
    assert (trace_with(target, ids, [Shift(1e4, Where(steps=(1,)))]).share("big")[1]) == 1
    assert trace_with(target, ids, [Force("big")]).mac_ratio.tolist() == [1.0] * 3


def test_frozen_routes_hold_while_the_residual_stream_is_patched():
    target, ids = duo_target(duo_of()), ids_of()
    clean = target.trace(ids)
    # what the first attention gives is added to the stream before anything is decided
    patch = {Site.parse("layers.0.attention:out"): lambda x: x + torch.linspace(-9, 9, 16)}
    with target.target.editing(patch):
        free = target.trace(ids)
        with deciding(target, [Replay(clean)]):
            frozen = target.trace(ids)
    assert free.changed(clean).any()
    assert not frozen.changed(clean).any()
    assert not torch.equal(frozen.more["nats"], clean.more["nats"])


def test_what_the_router_reads_can_change_without_the_content():
    target, ids = duo_target(duo_of()), ids_of()
    clean = target.trace(ids)
    with target.target.editing({target.steps[0].reads: lambda z: -z}):
        turned = target.trace(ids)
        with deciding(target, [Replay(clean)]):
            held = target.trace(ids)
    assert (turned.decision != clean.decision).any()
    assert torch.equal(held.more["nats"], clean.more["nats"])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: m(ids_of(), route_of(BIG, BIG)), ShapeError, r"a route of shape \(2,\) does not fit \(3, 10, 3\)"),
        (lambda m: m(ids_of(), route_of(BIG, 3, BIG)), SaekitError, "a route holds 3; options are 0 small, 1 big"),
        (lambda m: m(ids_of(tokens=13)), ShapeError, "13 tokens in a row, but this model reads 1 to 12"),
        (lambda m: m(torch.zeros(1, 0, dtype=torch.int64)), ShapeError, "0 tokens in a row"),
        (lambda m: m(ids_of() + 10), SaekitError, "token id 59 is outside a vocabulary of 50"),
        (lambda m: DuoConfig(small=9, big=8), SaekitError, "small below big"),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(duo_of())


def test_macs_are_those_of_the_feed_forwards_that_ran():
    target, ids = duo_target(duo_of()), ids_of()
    trace = target.trace(ids)
    big, small = 3 * 16 * 32, 3 * 16 * 4
    n_bigs = (trace.decision == BIG).sum((1, 2))
    assert torch.equal(trace.macs, (n_bigs * big + (30 - n_bigs) * small).float())
    assert trace.full_macs == 30 * big
    assert "of the feed-forwards&#x27; multiplications" in trace.picture(0)
    torch.testing.assert_close(layer_usage(trace.decision.transpose(1, 2)), trace.share("big"))
