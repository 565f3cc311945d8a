"""Interventions: each operation against its definition, where it acts, and that none does nothing unnoticed."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import BOS, FIRST, IDS, SECOND, TOKENS, WIDTH, Loop, hooks, sae_of, tiny_llama
from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.errors import SaekitError, ShapeError, UnknownNameError
from saekit.patching import (
    Add,
    AllBut,
    Clamp,
    Intervention,
    Mean,
    OffDistributionWarning,
    ReplaceFrom,
    Resample,
    Scale,
    SpliceCache,
    When,
    Zero,
    intervening,
    run_with_cache_with_saes,
    run_with_interventions,
    spliced,
)
from saekit.patching.intervening import _Run
from saekit.patching.tokens import TokenMask
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import Threshold, TopK
from saekit.targets import Side, Site, Target

TEXT = IDS != BOS
DIRECTION = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
UNIT = DIRECTION / DIRECTION.norm()
POOL = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(4))

pytestmark = [
    pytest.mark.filterwarnings("ignore::saekit.patching.OffDistributionWarning"),
    pytest.mark.usefixtures("no_gradients"),
]


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.wrap(tiny_llama())


@pytest.fixture(scope="module")
def sae() -> SAE:
    return sae_of(Threshold(0.3))


@pytest.fixture(scope="module")
def clean(target, sae) -> Tensor:
    """Codes of the clean run, dense, `(2, 5, 48)`."""
    with torch.no_grad():
        return run_with_cache_with_saes(target, IDS, {FIRST: sae}, mask=TOKENS)[1]["layers.0.hook_sae_acts_post"]


@pytest.fixture(scope="module")
def busy(clean) -> tuple[int, ...]:
    """The three features that are active at most tokens, but not at all of them."""
    counts = (clean > 0).sum((0, 1))
    counts[counts == int(TEXT.sum())] = 0
    return tuple(counts.topk(3).indices.tolist())


def after(target, interventions, saes=(), ids=IDS, site=FIRST) -> Tensor:
    """What the model goes on with after a Site."""
    with intervening(target, interventions, saes, mask=TOKENS):
        return target.read(ids, [site])[site]


def change_of(target, interventions, saes=(), ids=IDS, site=FIRST) -> Tensor:
    return after(target, interventions, saes, ids, site) - target.read(ids, [site])[site]


def replaced(codes: Tensor, features: tuple[int, ...], new: Tensor) -> Tensor:
    out = codes.clone()
    out[..., list(features)] = new
    return out


# --- operations on features


def operations(clean: Tensor, features: tuple[int, ...], sae: SAE) -> dict:
    """Each operation and what it must make of the codes of some features."""
    old = clean[..., list(features)]
    pool = sae.encode(POOL).to_dense()[:, list(features)]
    other = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(5))
    others = sae.encode(other.flatten(0, 1)).to_dense().view(2, 6, -1)[:, :5, list(features)]
    return {
        "zero": (Zero(), torch.zeros_like(old)),
        "scale": (Scale(-1.5), old * -1.5),
        "clamp to a range": (Clamp(0.35, 0.4), old.clamp(0.35, 0.4)),
        "clamp from above": (Clamp(high=0.35), old.clamp(max=0.35)),
        "set": (Clamp(-2.0, -2.0), torch.full_like(old, -2.0)),
        "mean": (Mean(POOL), pool.mean(0).expand_as(old)),
        "add": (Add(0.7), old + 0.7),
        "replace": (ReplaceFrom(other), others),
    }


@pytest.mark.parametrize("name", operations(torch.zeros(1, 1, 48), (0,), sae_of()))
def test_an_operation_on_features_changes_their_codes_as_it_says_and_writes_the_change(target, sae, clean, busy, name):
    operation, new = operations(clean, busy, sae)[name]
    change = change_of(target, [Intervention(site=FIRST, operation=operation, features=busy)], {FIRST: sae})
    want = (new - clean[..., list(busy)]) @ sae.decoder[list(busy)]
    torch.testing.assert_close(change[TEXT], want[TEXT], rtol=1e-4, atol=1e-5)
    untouched = (new == clean[..., list(busy)]).all(-1) | ~TEXT
    assert not change[untouched].any()
    assert change[TEXT].any()


@pytest.mark.parametrize("operation", [Mean, Resample])
@pytest.mark.parametrize("along", [None, torch.ones(WIDTH)], ids=["whole", "direction"])
def test_a_pool_goes_where_the_edited_vectors_are(target, operation, along):
    """Activations are harvested to the CPU, wherever the model is; `meta` stands for another device."""
    edit = Intervention(site=FIRST, operation=operation(POOL), direction=along)
    run = _Run(target, (edit,), {}, TokenMask.of(target, MaskPolicy()))
    there = torch.zeros(3, WIDTH, device="meta")
    found = run.reader(0, there, None, None)(POOL)
    assert found.device.type == "meta" and len(found) == len(POOL)


def test_resampling_takes_all_features_of_a_token_from_one_vector_of_the_pool(target, sae, clean, busy):
    pool = sae.encode(POOL).to_dense()[:, list(busy)]
    resample = [Intervention(site=FIRST, operation=Resample(POOL, seed=1), features=busy)]
    change = change_of(target, resample, {FIRST: sae})[TEXT]
    possible = (pool[:, None] - clean[TEXT][:, list(busy)]) @ sae.decoder[list(busy)]  # (pool, tokens, d_model)
    distance = (possible - change).norm(dim=-1)
    assert (distance.amin(0) < 1e-4).all()
    drawn = distance.argmin(0)
    assert len(drawn.unique()) > 1
    assert torch.equal(change, change_of(target, resample, {FIRST: sae})[TEXT])
    other_seed = [Intervention(site=FIRST, operation=Resample(POOL, seed=2), features=busy)]
    assert not torch.equal(change, change_of(target, other_seed, {FIRST: sae})[TEXT])


def test_each_pass_resamples_anew(target, sae, busy):
    resample = Intervention(site=FIRST, operation=Resample(POOL), features=busy)
    with intervening(target, [resample], {FIRST: sae}, mask=TOKENS):
        first, second = (target.read(IDS, [FIRST])[FIRST] for _ in range(2))
    assert not torch.equal(first, second)


def test_all_but_some_features_are_zeroed_without_making_a_dense_matrix(target, sae, clean, busy):
    change = change_of(target, [Intervention(site=FIRST, operation=Zero(), features=AllBut(busy))], {FIRST: sae})
    others = [feature for feature in range(48) if feature not in busy]
    torch.testing.assert_close(change[TEXT], -(clean[..., others] @ sae.decoder[others])[TEXT], rtol=1e-4, atol=1e-5)


# --- operations on directions and whole vectors


@pytest.mark.parametrize(
    "operation, component",
    [
        (Zero(), lambda old, norm: 0 * old),
        (Scale(3.0), lambda old, norm: 3 * old),
        (Clamp(0.1, 0.2), lambda old, norm: old.clamp(0.1, 0.2)),
        (Mean(POOL), lambda old, norm: (POOL @ UNIT).mean().expand_as(old)),
        (Add(2.0), lambda old, norm: old + 2),
        (Add(-0.5, relative=True), lambda old, norm: old - 0.5 * norm),
    ],
    ids=["zero", "scale", "clamp", "mean", "add", "relative"],
)
def test_an_operation_on_a_direction_changes_the_component_along_it_and_nothing_else(target, operation, component):
    x = target.read(IDS, [FIRST])[FIRST]
    got = after(target, [Intervention(site=FIRST, operation=operation, direction=DIRECTION)])
    old = x @ UNIT
    want = x + (component(old, x.norm(dim=-1)) - old)[..., None] * UNIT
    torch.testing.assert_close(got[TEXT], want[TEXT], rtol=1e-4, atol=1e-5)
    assert torch.equal(got[~TEXT], x[~TEXT])


def test_steering_can_keep_the_norm(target):
    x = target.read(IDS, [FIRST])[FIRST]
    add = Add(5.0, keep_norm=True)
    got = after(target, [Intervention(site=FIRST, operation=add, direction=DIRECTION)])
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
    turned = torch.nn.functional.normalize(x + 5 * UNIT, dim=-1)
    torch.testing.assert_close(torch.nn.functional.normalize(got, dim=-1)[TEXT], turned[TEXT], rtol=1e-4, atol=1e-5)


def test_whole_vectors_are_zeroed_scaled_averaged_and_replaced(target):
    x, other = target.read(IDS, [FIRST])[FIRST], torch.randn(1, 5, WIDTH)
    for operation, want in (
        (Zero(), torch.zeros_like(x)),
        (Scale(0.5), x / 2),
        (Mean(POOL), POOL.mean(0).expand_as(x)),
        (ReplaceFrom(other), other.expand_as(x)),
    ):
        got = after(target, [Intervention(site=FIRST, operation=operation)])
        torch.testing.assert_close(got[TEXT], want[TEXT])
        assert torch.equal(got[~TEXT], x[~TEXT])


def test_replacing_from_another_run_at_a_site_makes_everything_after_it_that_run(target):
    other = IDS.flip(1).roll(1, 1)  # BOS stays in front
    there = target.read(other, [FIRST])[FIRST]
    got = run_with_interventions(target, IDS, [Intervention(site=FIRST, operation=ReplaceFrom(there))], mask=TOKENS)
    torch.testing.assert_close(got, target.run(other))


# --- where


@settings(max_examples=25, deadline=None)
@given(
    positions=st.none() | st.sets(st.integers(1, 4), min_size=1),
    rows=st.none() | st.sets(st.integers(0, 1), min_size=1),
    tokens=st.none() | st.sets(st.sampled_from([9, 8, 7, 6, 5, 4, 3, 2]), min_size=1),
)
def test_an_edit_acts_exactly_where_it_says(positions, rows, tokens):
    wanted = TEXT.clone()
    for row in range(2):
        for position in range(5):
            here = rows is None or row in rows
            here &= positions is None or position in positions
            here &= tokens is None or int(IDS[row, position]) in tokens
            wanted[row, position] &= here
    edit = Intervention(
        site=FIRST, operation=Add(1.0), direction=DIRECTION, may_idle=True,
        positions=positions and tuple(positions), rows=rows and tuple(rows), tokens=tokens and tuple(tokens),
    )  # fmt: skip
    target = Target.wrap(tiny_llama())
    with torch.no_grad():
        assert torch.equal((change_of(target, [edit]) != 0).any(-1), wanted)


def test_negative_positions_count_from_the_end(target):
    edits = [Intervention(site=FIRST, operation=Add(1.0), direction=DIRECTION, positions=(-1, -3))]
    changed = (change_of(target, edits) != 0).any(-1)
    assert changed.tolist() == [[False, False, True, False, True]] * 2


@pytest.mark.parametrize(
    "where, at",
    [
        ({"positions": (-1,)}, [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ({"positions": (3, 6)}, [(0, 3), (2, 6)]),
        ({"steps": (0,)}, [(0, 1), (0, 2), (0, 3), (0, 4)]),
        ({"steps": (1, 3)}, [(1, 5), (3, 7)]),
        ({"steps": (0, 2), "positions": (-1,)}, [(0, 4), (2, 6)]),
    ],
    ids=str,
)
def test_under_generate_positions_go_on_and_steps_are_new_tokens(target, where, at):
    edit = Intervention(site=FIRST, operation=Add(3.0), direction=DIRECTION, **where)
    met = []
    with (
        intervening(target, [edit], mask=TOKENS) as passes,
        target.editing({SECOND: lambda x: x, FIRST: lambda x: met.append((passes.number, x.clone())) or x}),
    ):
        edited = target.model.generate(IDS, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(IDS))
    plain = {}
    with target.editing({FIRST: lambda x: plain.setdefault(len(plain), x.clone())}):
        for length in (5, 6, 7, 8):
            target.run(edited[:, :length])
    # the first pass has no history, so it shows exactly what was edited; of later ones only whether
    found = [(0, i) for i in (met[0][1] != plain[0]).any(-1)[0].nonzero()[:, 0].tolist()]
    assert found == [place for place in at if place[0] == 0]
    later = {number for number, x in met if number and (x[0, -1] - plain[number][0, -1]).norm() > 2.9}
    assert later == {number for number, _ in at if number}


@pytest.mark.parametrize("call, changed", [(1, [1]), (None, [0, 1, 2])])
def test_an_edit_acts_on_its_call_of_a_looped_module(call, changed):
    loop, x = Loop(), torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    sae, site = sae_of(), Site("core", call=call)
    target = Target.wrap(loop)
    want = x
    for i in range(3):
        want = loop.core(want)
        if i in changed:
            want = want + 2.0 * sae.decoder[5]
        want = want.tanh()
    by_feature = [Intervention(site=site, operation=Add(2.0), features=(5,))]
    by_direction = [Intervention(site=site, operation=Add(2.0), direction=sae.W_dec[5])]
    torch.testing.assert_close(run_with_interventions(target, x, by_feature, {Site("core"): sae}), loop.head(want))
    torch.testing.assert_close(run_with_interventions(target, x, by_direction), loop.head(want))


def test_several_edits_of_several_layers_add_up(target, sae, clean, busy):
    second = sae_of(Threshold(0.3), seed=1)
    edits = [
        Intervention(site=FIRST, operation=Zero(), features=busy[:1]),
        Intervention(site=FIRST, operation=Add(1.0), features=(busy[1], 40)),
        Intervention(site=FIRST, operation=Add(0.5), features=(40,)),
        Intervention(site=FIRST, operation=Add(2.0), direction=DIRECTION),
        Intervention(site=SECOND, operation=Add(3.0), features=(7,)),
    ]
    saes = {FIRST: sae, SECOND: second}
    first = change_of(target, edits[:4], saes)
    want = -clean[..., busy[0], None] * sae.decoder[busy[0]] + sae.decoder[busy[1]] + 1.5 * sae.decoder[40] + 2 * UNIT
    torch.testing.assert_close(first[TEXT], want[TEXT], rtol=1e-4, atol=1e-5)
    with intervening(target, edits[:4], saes, mask=TOKENS):
        x = target.read(IDS, [SECOND])[SECOND]
    both = after(target, edits, saes, site=SECOND)
    torch.testing.assert_close((both - x)[TEXT], (3.0 * second.decoder[7]).expand(8, -1), rtol=1e-4, atol=1e-5)


# --- conditions


@pytest.mark.parametrize("on", ["feature", "direction"])
def test_a_condition_on_another_feature_holds_token_by_token(target, sae, clean, busy, on):
    what = {"features": (40,)} if on == "feature" else {"direction": DIRECTION}
    for above in (0.0, float(clean[..., busy[0]].max()) * 0.9):
        edit = Intervention(site=FIRST, operation=Add(1.0), when=When(busy[0], above=above), **what)
        changed = (change_of(target, [edit], {FIRST: sae}) != 0).any(-1)
        assert torch.equal(changed, clean[..., busy[0]] > above)
        assert changed.any() and not changed[TEXT].all()


def test_a_condition_may_read_an_earlier_site_but_not_a_later_one(target, sae, clean, busy):
    second = sae_of(Threshold(0.3), seed=1)
    when = When(busy[0], site=FIRST)
    edit = Intervention(site=SECOND, operation=Add(1.0), features=(7,), when=when)
    changed = (change_of(target, [edit], {FIRST: sae, SECOND: second}, site=SECOND) != 0).any(-1)
    assert torch.equal(changed, clean[..., busy[0]] > 0)
    edit = Intervention(site=FIRST, operation=Add(1.0), features=(7,), when=When(3, site=SECOND))
    with pytest.raises(SaekitError, match=r"which this pass has not reached yet; a condition must come before"):
        run_with_interventions(target, IDS, [edit], {FIRST: sae, SECOND: second}, mask=TOKENS)


def test_the_cache_and_an_edit_can_be_had_together(target, sae, clean):
    seen = {}
    edit = Intervention(site=FIRST, operation=Clamp(4.0, 4.0), features=(7,))
    with (
        intervening(target, [edit], {FIRST: sae}, mask=TOKENS),
        spliced(target, {SECOND: sae}, mask=TOKENS, on_seen=lambda s: seen.update({s.site: s})),
    ):
        target.run(IDS)
    downstream = SpliceCache(target, seen, use_error_term=True)["layers.1.hook_sae_acts_post"]
    plain = run_with_cache_with_saes(target, IDS, {SECOND: sae}, mask=TOKENS)[1]["layers.1.hook_sae_acts_post"]
    assert (downstream != plain).any()


def test_gradients_flow_through_an_edit(target, sae, busy):
    with torch.enable_grad():
        x = target.read(IDS, [FIRST])[FIRST].requires_grad_()
        edits = [Intervention(site=FIRST, operation=Scale(0.5), features=busy)]
        with target.editing({FIRST: lambda _: x}), intervening(target, edits, {FIRST: sae}, mask=TOKENS):
            got = torch.autograd.grad(target.run(IDS).square().sum(), x)[0]
            target.run(IDS)
        codes = sae.encode(x[TEXT])
        halved = codes.values * torch.where(torch.isin(codes.features, torch.tensor(busy)), 0.5, 1.0)
        y = x.clone()
        error = (x[TEXT] - sae.decode(codes)).detach()
        y[TEXT] = sae.decode(codes.with_values(halved)) + error
        want = torch.autograd.grad(target.run(IDS, edits={FIRST: lambda _: y}).square().sum(), x)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


# --- never a silent no-op


def feature(**changes) -> Intervention:
    return Intervention(**{"site": FIRST, "operation": Add(1.0), "features": (7,)} | changes)


DEAD = 47


@pytest.mark.parametrize(
    "edit, error, message",
    [
        (feature(site=Site("layers.7")), UnknownNameError, r"no submodule named 'layers\.7'"),
        (feature(site=SECOND), SaekitError, r"edited or read at layers\.1:out, but there are SAEs at layers\.0:out"),
        (feature(features=(3, 48)), SaekitError, r"feature 48 is out of range; this SAE has 48, from 0 to 47"),
        (feature(features=(-1,)), SaekitError, r"feature -1 is out of range"),
        (feature(when=When(99)), SaekitError, r"feature 99 is out of range"),
        (feature(positions=(2, 9)), SaekitError, r"position 9 is out of range; the text had 5 tokens"),
        (feature(positions=(-9,)), SaekitError, r"position -9 is out of range"),
        (feature(positions=(0,)), SaekitError, r"position 0 of row 0 is masked .* name other positions"),
        (feature(tokens=(BOS, 9)), SaekitError, r"position 0 of row 0 is masked"),
        (feature(tokens=(33,)), SaekitError, r"changed nothing: the model read none of the tokens \(33,\)"),
        (feature(rows=(2,)), SaekitError, r"row 2 is outside a batch of 2"),
        (feature(steps=(1,)), SaekitError, r"there were 1 forward passes, so no step 1"),
        (feature(site=Site("layers.0", call=2)), SaekitError, r"calls model\.layers\.0 once; choose @0"),
        (feature(features=None, direction=torch.ones(8)), ShapeError, r"the direction has 8 numbers, the Site 16"),
        (feature(operation=ReplaceFrom(torch.zeros(1, 3, WIDTH))), ShapeError, r"holds 1 rows of 3 tokens, .* 4; read"),
        (feature(operation=Zero(), features=(DEAD,)), SaekitError, r"changed nothing: its features were not active"),
        (feature(when=When(DEAD)), SaekitError, r"changed nothing: feature 47 was never active there"),
        (feature(operation=Scale(1.0), features=None), SaekitError, r"changed nothing: its numbers were as"),
    ],
    ids=lambda value: str(value) if isinstance(value, Intervention) else "",
)
def test_what_cannot_act_is_refused(target, sae, edit, error, message):
    with torch.no_grad():
        sae.b_enc[DEAD] = -1e6
    with pytest.raises(error, match=message):
        run_with_interventions(target, IDS, [edit], {FIRST: sae}, mask=TOKENS)
    assert hooks(target.model) == 0


def test_an_edit_that_may_idle_changes_no_bit(target, sae):
    idle = feature(operation=Zero(), features=(DEAD,), may_idle=True)
    with torch.no_grad():
        sae.b_enc[DEAD] = -1e6
    assert torch.equal(run_with_interventions(target, IDS, [idle], {FIRST: sae}, mask=TOKENS), target.run(IDS))


def test_an_sae_of_another_width_is_refused(target):
    with pytest.raises(ShapeError, match=r"layers\.0:out has 16 numbers per token, but this SAE encodes rows of 8"):
        run_with_interventions(target, IDS, [feature()], {FIRST: SAE(8, 20, TopK(2))}, mask=TOKENS)


@pytest.mark.parametrize("edit", [feature(), feature(features=None, direction=DIRECTION)], ids=str)
def test_a_context_in_which_nothing_ran_is_refused(target, sae, edit):
    with (
        pytest.raises(SaekitError, match=r"was not run.* inside the `with` block"),
        intervening(target, [edit], {FIRST: sae}, mask=TOKENS),
    ):
        pass


@pytest.mark.parametrize(
    "one, two",
    [
        (feature(operation=Clamp(1.0, 1.0)), feature(operation=Clamp(2.0, 2.0))),
        (feature(), feature(operation=Clamp(2.0, 2.0), features=(6, 7))),
        (feature(operation=Scale(2.0), features=None), feature(features=None, direction=DIRECTION)),
        (feature(operation=Zero(), features=None, direction=DIRECTION), feature(features=None, direction=DIRECTION)),
        (feature(), feature(operation=Scale(2.0), features=None)),
        (feature(), feature(operation=Add(1.0, keep_norm=True), features=None, direction=DIRECTION)),
    ],
    ids=["set-set", "add-set", "whole-add", "direction-add", "feature-whole", "feature-norm"],
)
def test_edits_that_contradict_each_other_are_refused_unless_they_are_apart(target, sae, one, two):
    with pytest.raises(SaekitError, match=r"both edit the same .*, and only additions add up; keep one of them"):
        run_with_interventions(target, IDS, [one, two], {FIRST: sae}, mask=TOKENS)
    apart = [
        Intervention(**{name: getattr(edit, name) for name in ("site", "operation", "features", "direction")}, rows=row)
        for edit, row in ((one, (0,)), (two, (1,)))
    ]
    run_with_interventions(target, IDS, apart, {FIRST: sae}, mask=TOKENS)


def test_orthogonal_directions_may_both_be_removed(target):
    other = torch.randn(WIDTH, generator=torch.Generator().manual_seed(9))
    other -= (other @ UNIT) * UNIT
    edits = [Intervention(site=FIRST, operation=Zero(), direction=along) for along in (DIRECTION, other)]
    got = after(target, edits)[TEXT]
    torch.testing.assert_close(torch.stack([got @ UNIT, got @ other]), torch.zeros(2, 8), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: feature(features=()), r"features=\(\) at layers\.0:out; name at least one"),
        (lambda: feature(positions=(1, 1)), r"positions=\(1, 1\)"),
        (lambda: feature(direction=DIRECTION), r"names features and a direction; make it two"),
        (lambda: feature(features=None), r"Add at .* needs to know along what"),
        (lambda: feature(features=None, direction=torch.zeros(4)), r"has norm 0\.0; give another"),
        (lambda: feature(features=AllBut((1,))), r"every feature of layers\.0:out active on every token"),
        (lambda: feature(operation=Add(1.0, keep_norm=True)), r"keep_norm is for directions"),
        (lambda: Add(0.0), r"changes nothing; give another amount"),
        (lambda: Clamp(), r"low=None, high=None"),
        (lambda: Clamp(2.0, 1.0), r"low <= high"),
    ],
)
def test_what_makes_no_sense_cannot_be_written(build, message):
    with pytest.raises(SaekitError, match=message):
        build()


@pytest.mark.filterwarnings("error::saekit.patching.OffDistributionWarning")
def test_a_warning_says_when_an_edit_leaves_the_range_of_norms(target, sae):
    norms = target.read(IDS, [FIRST])[FIRST][TEXT].norm(dim=-1)
    far, near = 4 * float(norms.max()), 0.1 * float(norms.min())
    for edit in (feature(operation=Add(far)), feature(operation=Add(far), features=None, direction=DIRECTION)):
        with pytest.warns(OffDistributionWarning, match=r"an edit at .*layers\.0:out leaves a vector with norm"):
            run_with_interventions(target, IDS, [edit], {FIRST: sae}, mask=TOKENS)
    with pytest.warns(OffDistributionWarning, match=r"norm 0, where"):
        run_with_interventions(target, IDS, [feature(operation=Zero(), features=None)], mask=TOKENS)
    with (
        warnings.catch_warnings(record=True) as caught,
        intervening(target, [feature(operation=Add(far))], {FIRST: sae}),
    ):
        warnings.simplefilter("always")
        target.run(IDS)
        target.run(IDS)
    assert len(caught) == 1
    run_with_interventions(target, IDS, [feature(operation=Add(near))], {FIRST: sae}, mask=TOKENS)


@torch.no_grad()
def test_an_edit_of_a_transcoder_is_of_what_it_writes(target):
    read, written = Site("layers.1.mlp", Side.INPUT), Site("layers.1.mlp")
    cfg = SAEConfig(
        d_in=WIDTH, d_sae=48, d_out=WIDTH, apply_b_dec_to_input=False, hook_name=str(read), hook_name_out=str(written)
    )
    sae = SAE(WIDTH, 48, TopK(4), cfg=cfg)
    x = target.read(IDS, [read])[read]
    feature = int(sae.encode(x[0]).features[-1])
    strength = sae.encode(x.flatten(0, 1)).to_dense().view(*IDS.shape, -1)[..., feature].clone()
    strength[:, 0] = 0
    want = target.run(IDS, edits={written: lambda y: y - strength[..., None] * sae.decoder[feature]})
    ablation = Intervention(site=read, operation=Zero(), features=(feature,))
    got = run_with_interventions(target, IDS, [ablation], [sae], mask=TOKENS)
    torch.testing.assert_close(got, want)
    assert (want - target.run(IDS)).abs().max() > 1e-4
    over = Intervention(site=written, operation=Zero())
    with pytest.raises(SaekitError, match=r"both edit the same vector, and only additions add up"):
        run_with_interventions(target, IDS, [ablation, over], [sae], mask=TOKENS)
