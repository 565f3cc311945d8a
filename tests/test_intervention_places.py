"""Where edits act when batches are padded, modules loop and several edits meet."""

import pytest
import torch
from small_models import BOS, FIRST, IDS, PAD, TOKENS, WIDTH, Loop, hooks, sae_of, tiny_llama

from saekit.errors import SaekitError, ShapeError
from saekit.patching import (
    Add,
    Intervention,
    Mean,
    ReplaceFrom,
    Resample,
    Scale,
    intervening,
    run_with_interventions,
    spliced,
)
from saekit.targets import Site, Target

pytestmark = pytest.mark.filterwarnings("ignore::saekit.patching.OffDistributionWarning")
DIRECTION = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
# the second text, of three tokens, begins in the third column
IN_FRONT = torch.tensor([[BOS, 9, 8, 7, 6], [PAD, PAD, BOS, 5, 4]])
ATTENDED = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.wrap(tiny_llama())


def edited(target: Target, ids, positions, **given) -> list[tuple[int, int]]:
    """Rows and columns that an edit at some positions changed."""
    met = []
    tap = {FIRST: lambda x: met.append(x.clone()) or x}
    edit = Intervention(site=FIRST, operation=Add(3.0), direction=DIRECTION, positions=positions)
    with torch.no_grad():
        with target.editing(tap):
            target.model(input_ids=ids, **given)
        with intervening(target, [edit], mask=TOKENS), target.editing(tap):
            target.model(input_ids=ids, **given)
    return [tuple(place) for place in (met[0] != met[1]).any(-1).nonzero().tolist()]


@pytest.mark.parametrize("given", [{"attention_mask": ATTENDED}, {}], ids=["by the attention mask", "by the id"])
def test_positions_from_the_start_are_refused_where_rows_begin_with_padding(target, given):
    with pytest.raises(SaekitError, match=r"rows begin with padding, so position 3 .* count from the end \(-1\)"):
        edited(target, IN_FRONT, (3,), **given)
    assert hooks(target.model) == 0
    assert edited(target, IN_FRONT, (-2,), **given) == [(0, 3), (1, 3)]


def test_padding_behind_moves_no_position(target):
    ids, attended = IN_FRONT.clone(), ATTENDED.flip(1)
    ids[1] = torch.tensor([BOS, 5, 4, PAD, PAD])
    assert edited(target, ids, (1,), attention_mask=attended) == [(0, 1), (1, 1)]


@pytest.mark.parametrize("order", [1, -1])
def test_relative_additions_take_their_share_of_what_came_and_add_up(target, order):
    sae, x = sae_of(), target.read(IDS, [FIRST])[FIRST]
    parts = [
        Intervention(site=FIRST, operation=Add(2.0, relative=True), direction=DIRECTION),
        Intervention(site=FIRST, operation=Add(-1.5, relative=True), direction=DIRECTION.flip(0)),
        Intervention(site=FIRST, operation=Add(3.0, relative=True), features=(7,)),
    ][::order]
    with torch.no_grad(), intervening(target, parts, {FIRST: sae}, mask=TOKENS):
        added = target.read(IDS, [FIRST])[FIRST] - x
    unit, other = DIRECTION / DIRECTION.norm(), DIRECTION.flip(0) / DIRECTION.norm()
    want = x.norm(dim=-1, keepdim=True) * (2.0 * unit - 1.5 * other + 3.0 * sae.W_dec[7]) * (IDS != BOS)[..., None]
    torch.testing.assert_close(added, want, rtol=1e-4, atol=1e-5)


def test_a_relative_addition_takes_its_share_of_its_own_call_whatever_an_sae_met_at_another():
    target, site = Target.wrap(Loop()), Site.parse("core@1")
    x = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(1)) * 20
    edits = [
        Intervention(site=Site.parse("core@0"), operation=Scale(1 + 1e-7), features=(1, 2), may_idle=True),
        Intervention(site=site, operation=Add(0.5, relative=True), direction=DIRECTION),
    ]
    came = target.read(x, [site])[site]
    with torch.no_grad(), intervening(target, edits, {Site.parse("core@0"): sae_of()}):
        added = target.read(x, [site])[site] - came
    torch.testing.assert_close(added.norm(dim=-1), 0.5 * came.norm(dim=-1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("put", ["core@*", "core", "core@2"])
@pytest.mark.parametrize("at", ["core@1", "core@*"])
def test_an_edit_leaves_saes_at_the_calls_where_they_were_put(put, at):
    target, sae = Target.wrap(Loop()), sae_of()
    x = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    put, at = Site.parse(put), Site.parse(at)
    nothing = Intervention(site=at, operation=Scale(1 + 1e-7), features=tuple(range(48)), may_idle=True)
    calls = [at] if at.call is None or put.call is None else [put, at]
    calls = [Site.parse("core@*")] if None in {put.call, at.call} else calls
    with torch.no_grad():
        with spliced(target, dict.fromkeys(calls, sae), use_error_term=False):
            want = target.run(x)
        got = run_with_interventions(target, x, [nothing], {put: sae}, use_error_term=False)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_two_saes_of_two_calls_keep_them_under_an_edit_of_all_calls():
    target, one, two = Target.wrap(Loop()), sae_of(), sae_of(seed=1)
    x = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    saes = {Site("core", call=0): one, Site("core", call=2): two}
    edit = Intervention(site=Site("core", call=None), operation=Add(2.0), features=(5,))
    want = x
    for sae in (one, None, two):
        want = target.model.core(want)
        want = (want if sae is None else want + 2.0 * sae.decoder[5]).tanh()
    with torch.no_grad():
        torch.testing.assert_close(run_with_interventions(target, x, [edit], saes), target.model.head(want))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Mean(torch.zeros(0, 4)), r"Mean got \(0, 4\); give activations of the Site, \(n, d_model\)"),
        (lambda: Mean(torch.zeros(2, 5, 4)), r"Mean got \(2, 5, 4\); give activations of the Site, \(n, d_model\)"),
        (lambda: Resample(torch.zeros(4)), r"Resample got \(4,\)"),
        (lambda: ReplaceFrom(torch.zeros(3, 2, 5, 4)), r"ReplaceFrom got \(3, 2, 5, 4\); give activations of one call"),
    ],
)
def test_pools_of_another_form_are_refused(build, message):
    with pytest.raises(ShapeError, match=message):
        build()


@pytest.mark.parametrize(
    "operation", [Mean(torch.ones(3, 8)), Resample(torch.ones(3, 8)), ReplaceFrom(torch.ones(1, 5, 8))]
)
@pytest.mark.parametrize("where", [{}, {"features": (3,)}, {"direction": DIRECTION}], ids=str)
def test_pools_of_another_width_are_refused(target, operation, where):
    edit = Intervention(site=FIRST, operation=operation, **where)
    with pytest.raises(ShapeError, match=rf"it was given vectors of 8 numbers, the Site has {WIDTH}; read them at"):
        run_with_interventions(target, IDS, [edit], {FIRST: sae_of()}, mask=TOKENS)
