"""Questions to AdaTape: planted answers are found, what holds by construction holds, and no number is missing."""

import math
from dataclasses import replace

import pytest
import torch

from saekit.adaptive.adatape import AdaTape, AdaTapeConfig
from saekit.adaptive.adatape_recipe import parity, sequences
from saekit.adaptive.deciding import adatape_target
from saekit.adaptive.effects import trace_edited
from saekit.adaptive.questions.adatape import ask, informations
from saekit.adaptive.questions.adatape_bank import bank_use
from saekit.adaptive.questions.adatape_causes import boundary
from saekit.adaptive.questions.adatape_flow import flow, large_tapes
from saekit.adaptive.questions.adatape_queries import Gaps, causes_of_halts, causes_of_picks, divided, gaps_of
from saekit.adaptive.questions.adatape_reading import OWN, TAPE, Reading, Screen, permuted, read_tapes, train_sae
from saekit.adaptive.questions.paired import Paired
from saekit.errors import DataError, SaekitError
from saekit.sae import SAE
from saekit.selection import TopK

FEW = Screen(inputs=60, candidates=2, controls=1, directions=1)
CONFIG = AdaTapeConfig(length=12, width=16, layers=2, heads=2, split=2, longest=6, tau=2.0)


def model_of(config: AdaTapeConfig = CONFIG) -> AdaTape:
    """Untrained, with scores that differ enough for tapes of several lengths."""
    model = AdaTape(config).eval()
    with torch.no_grad():
        model.reader.norm.weight.mul_(2)
        model.head.weight.mul_(4)
        if model.learnt_bank is not None:
            model.learnt_bank.normal_(generator=torch.Generator().manual_seed(0))
    return model


def symbols_of(n: int, seed: int) -> torch.Tensor:
    return sequences(n, 12, torch.Generator().manual_seed(seed))


def halves_of(model: AdaTape, n: int = 200) -> tuple[Reading, Reading]:
    first, second = (read_tapes(adatape_target(model), model, symbols_of(n, seed)) for seed in (1, 2))
    return first, second


def as_it_is(width: int) -> SAE:
    """Feature i is coordinate i; a last one does nothing."""
    sae = SAE(width, width + 1, TopK(width)).requires_grad_(False)
    sae.encoder.copy_(torch.eye(width + 1, width))
    sae.decoder.copy_(torch.eye(width + 1, width))
    return sae


def _with_planted(half: Reading) -> Reading:
    """Coordinate 3 of tape tokens says where a boundary is, coordinate 5 the parity there."""
    tape = torch.rand(half.tape.shape, generator=torch.Generator().manual_seed(0)) + 0.1
    tape[..., 3] = half.boundary.float()
    tape[..., 5] = (half.boundary & (half.labels == 1)[:, None]).float()
    return replace(half, tape=tape)


@pytest.fixture(scope="module")
def answers():
    return ask(model_of(), symbols_of(150, 1), symbols_of(100, 2), tokens=2048, screen=FEW)


def test_every_question_is_answered_with_finite_numbers(answers):
    assert len(answers) == 11
    for question, found in answers.items():
        assert found, question
        for name, value in found.items():
            assert isinstance(value, float) and math.isfinite(value), (question, name, value)
            if any(word in name for word in ("flipped", "changed", "share_most", "auc", "mostly", "_kept", "rate")):
                assert 0 <= value <= 1, (question, name, value)


def test_a_dose_of_one_changes_nothing_and_the_best_rank_is_that_of_the_strongest(answers):
    causes = answers["whether a feature counts the ones at their boundary"]
    picks, halts = answers["which features of a query pick"], answers["which features of a query end the tape"]
    ranked = [
        (causes, "strongest_flipped_at_0", "strongest_flipped_by_others_most", "strongest_flipped_p"),
        (picks, "changed_at_0", "changed_by_others_most", "p"),
        (halts, "flipped_at_0", "flipped_by_others_most", "p"),
    ]
    for found, at_none, most, p in ranked:
        assert found[at_none.replace("_0", "_1")] == 0
        controls = found.get("controls", found.get("strongest_controls"))
        assert controls > 0
        assert (found[p] == 1 / (1 + controls)) == (found[at_none] > found[most])


def test_what_enters_the_blocks_does_not_depend_on_when_the_tape_ends(answers):
    found = answers["which features only long tapes have"]
    assert found["tape_kept_when_forced_short"] == 1
    assert found["tape_on_long"] == found["tape_on_long_forced_short"] > 0
    assert found["tape_on_others"] == found["tape_on_others_forced_long"]


def test_the_own_token_tells_a_place_and_has_everything_in_common_with_a_turned_copy(answers):
    found = answers["what is on the tape and not in the sequence's token"]
    assert found["first_symbol_from_own"] > 0.9 > found["first_symbol_from_mean_slot"]
    assert found["mostly_own_of_itself"] + found["mostly_tape_of_itself"] < 0.05
    assert abs(found["mean_tape_share_of_itself"] - 0.5) < 0.1


def test_a_score_divides_into_pairs_of_features():
    generator = torch.Generator().manual_seed(0)
    query, better, other = (torch.rand(7, 5, generator=generator) for _ in range(3))
    gaps = Gaps(query, better, other, torch.zeros(7, dtype=torch.int64))
    parts = divided(as_it_is(5), as_it_is(5), gaps)
    torch.testing.assert_close(parts.features, gaps.score)
    torch.testing.assert_close(parts.error, torch.zeros(7), rtol=0, atol=1e-6)
    torch.testing.assert_close(parts.pairs[:5, :5], torch.diag((query * (better - other).abs()).mean(0)))
    # a feature that an SAE lacks is error, and a bias is no feature's
    queries = as_it_is(5)
    queries.decoder[2] = 0
    queries.b_dec[0] = -1.0  # encoded as one more, and written as one less
    parts = divided(queries, as_it_is(5), gaps)
    torch.testing.assert_close(parts.error, query[:, 2] * (better - other)[:, 2])
    torch.testing.assert_close(parts.constant, -(better - other)[:, 0])


def test_gaps_are_those_by_which_the_model_picks_and_weighs():
    model = model_of()
    reading, _ = halves_of(model)
    assert (gaps_of(model, reading, kind="pick").score > 0).all()
    weights = reading.trace.more["weights"]
    gaps, step = gaps_of(model, reading, kind="weight"), 1
    ratios = (weights[:, step, 0] / weights[:, step, -1]).log()[reading.live[:, step]] * model.reader.d_key**0.5
    torch.testing.assert_close(gaps.score[gaps.steps == step], ratios[ratios > 1e-4], rtol=1e-3, atol=1e-3)


def test_information_is_of_what_was_asked():
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(3, (3000,), generator=generator)
    coin = torch.randint(2, (3000,), generator=generator)
    active = torch.stack([coin == 1, known == 1], 1)
    alone, beyond = informations(active, coin), informations(active, coin + 2 * known, known)
    assert alone[0] > 0.99 and alone[1] < 0.01
    assert beyond[0] > 0.99 and abs(beyond[1]) < 1e-6
    mixed = coin + 2 * known
    again = permuted(mixed, generator, known)
    assert torch.equal(again // 2, known) and not torch.equal(again, mixed)
    assert informations(active[:, :1], again, known)[0] < 0.01


def test_a_boundary_feature_is_found_where_there_is_one():
    model = model_of()
    train, test = (_with_planted(half) for half in halves_of(model))
    found = boundary(adatape_target(model), as_it_is(16), train, test, FEW)
    assert found["where_feature"] == 3 and found["where_feature_auc"] == 1
    assert found["where_feature_fires"] == 1 > found["where_feature_fires_elsewhere"] == 0
    assert found["odd_feature"] == 5 and found["odd_feature_auc"] == found["odd_token_probe_auc"] == 1
    assert 0.3 < found["odd_slot_auc"] < 0.7
    assert found["counter_stands_for_odd"] == 1


def test_the_cause_of_a_pick_is_the_feature_whose_loss_changes_most_picks():
    model = model_of()
    target, (train, test), sae = adatape_target(model), halves_of(model, 60), as_it_is(8)
    found = causes_of_picks(target, sae, train, test, replace(FEW, candidates=8))
    step, changed = int(found["step"]), []
    for feature in range(8):
        entries = trace_edited(target, train.inputs, sae, [feature], step).more["entries"][:, step]
        was = train.symbols[:, step].sort(1).values
        changed.append(int((train.inputs.long().gather(1, entries).sort(1).values != was).any(1).sum()))
    assert changed[int(found["feature"])] == max(changed) > 0
    assert found["changed_at_0"] > 0 == found["changed_at_1"]


def test_with_one_block_its_attention_is_the_only_way_to_the_answer():
    model = model_of(replace(CONFIG, layers=1))
    train, test = halves_of(model)
    saes = [train_sae(TAPE, half, tokens=2048, seed=0) for half in (train.tape[train.live], train.base)]
    found = flow(adatape_target(model), model, saes[0], saes[1], train, test, FEW)
    for side in ("tape", "tape_all", "own", "own_all"):
        assert found[f"{side}_everywhere_margin"] == pytest.approx(found[f"{side}_block_0_margin"], rel=1e-3)
        assert found[f"{side}_block_0_margin"] > 0
    assert found["own_all_by_reading_margin"] > 0


def test_a_bank_from_which_all_read_alike_says_nothing_of_the_class():
    model = model_of(replace(CONFIG, bank="learnt", entries=30, reads_input=False))
    inputs = symbols_of(200, 1), symbols_of(200, 2)
    found = bank_use(model, inputs, (parity(inputs[0]), parity(inputs[1])), tokens=2048)
    length = int(model(inputs[0]).tape.length[0])
    assert found["dead_rows"] == pytest.approx(1 - 3 * length / 30)
    assert found["same_entries_as_usual"] == 1 and found["label_from_reads"] == found["rows_together"] == 0
    assert found["entries_of_an_input"] == found["entries_ever_read"]
    assert found["class_from_rows"] == found["class_most_common"]


def test_a_class_that_is_a_row_is_read_off_the_rows():
    model = model_of(replace(CONFIG, bank="learnt", entries=30))
    inputs = symbols_of(300, 1), symbols_of(300, 2)
    reads = []
    for half in inputs:
        trace = adatape_target(model).trace(half)
        read = torch.zeros(len(half), 30, dtype=torch.int64)
        for step in range(trace.live.shape[1]):
            live = trace.live[:, step, 0]
            read[live] = read[live].scatter(1, trace.more["entries"][live, step], 1)
        reads.append(read)
    row = int((reads[0].float().mean(0) - 0.5).abs().argmin())
    found = bank_use(model, inputs, (reads[0][:, row], reads[1][:, row]), tokens=2048)
    assert found["class_from_rows"] > 0.97 > found["class_from_rows_floor"]
    assert found["label_from_reads"] > found["label_from_reads_floor"]
    assert found["rows_together"] > found["rows_together_floor"]
    assert 0 < found["one_row_per_feature_floor"] <= found["one_row_per_feature"] <= 1


def test_rows_of_pairs_stay_together():
    numbers = torch.arange(3000.0)[:, None]
    stream = Paired({OWN: numbers, TAPE: numbers.repeat(1, 2)}).stream(500, seed=0)
    batch = next(stream)
    assert torch.equal(batch[OWN].vectors, batch[TAPE].vectors[:, 1:])
    assert not torch.equal(batch[OWN].vectors.sort(0).values, batch[OWN].vectors)


def test_where_there_is_nothing_to_ask_about_it_says_so():
    learnt = model_of(replace(CONFIG, bank="learnt"))
    with pytest.raises(SaekitError, match="bank_use"):
        ask(learnt, symbols_of(4, 1), symbols_of(4, 2))
    fixed = model_of(replace(CONFIG, tau=6.0))  # one entry at a time: weights of 1, and all tapes alike
    train, test = halves_of(fixed)
    target, sae = adatape_target(fixed), as_it_is(16)
    with pytest.raises(DataError, match="none is long"):
        large_tapes(target, fixed, sae, sae, train, test, seed=0)
    with pytest.raises(DataError, match="give other sequences"):
        causes_of_halts(target, as_it_is(8), train, test, FEW)
    with pytest.raises(DataError, match="no boundary"):
        boundary(target, sae, train, test, FEW)
