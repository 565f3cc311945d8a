"""AdaTape: tapes that keep to their rule, whoever else is in the batch, and a transformer that sees them as a set."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.adaptive import Force, Shift, Where, harvest, trace_with
from saekit.adaptive.adatape import AdaTape, AdaTapeConfig
from saekit.adaptive.adatape_recipe import AdaTapeRecipe, parity, sequences
from saekit.adaptive.deciding import adatape_target
from saekit.adaptive.stages import draw
from saekit.adaptive.tape_reader import ReadingRule, TapeReader
from saekit.errors import SaekitError, ShapeError

CONFIG = AdaTapeConfig(length=12, width=16, layers=2, heads=2, longest=6, tau=2.0)


def model_of(config: AdaTapeConfig = CONFIG, seed: int = 0) -> AdaTape:
    """Untrained, with a bank whose entries differ enough for some choices to be clear and some not."""
    model = AdaTape(config, seed=seed).eval()
    with torch.no_grad():
        model.reader.norm.weight.mul_(3)
        if model.learnt_bank is not None:
            model.learnt_bank.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def symbols_of(n: int = 8, length: int = 12, seed: int = 0) -> torch.Tensor:
    return sequences(n, length, torch.Generator().manual_seed(seed))


def reader_of(rule: ReadingRule, width: int = 8) -> TapeReader:
    return TapeReader(width, 4, rule)


@settings(max_examples=30, deadline=None)
@given(
    longest=st.integers(1, 8),
    share=st.floats(0, 1),
    spread=st.floats(0.0, 8.0),
    seed=st.integers(0, 2**16),
)
def test_a_tape_is_never_shorter_or_longer_than_its_rule_allows(longest, share, spread, seed):
    tau = 1 + share * (longest - 1)
    rule, generator = ReadingRule(longest=longest, tau=tau), torch.Generator().manual_seed(seed)
    bank = torch.randn(5, longest * rule.at_once, 8, generator=generator) * spread
    tape = reader_of(rule)(torch.randn(5, 8, generator=generator), bank)
    assert (tape.length >= math.ceil(tau)).all() and (tape.length <= longest).all()
    assert (tape.impurity >= -1e-5).all()
    assert (tape.impurity <= tape.length * (1 - 1 / rule.at_once) + 1e-5).all()
    assert (tape.running[:, 1:] <= tape.running[:, :-1]).all()
    assert torch.equal(tape.halted.sum(1), torch.ones(5, dtype=torch.int64))
    assert torch.equal(tape.total[:, -1], tape.total[tape.halted])  # nothing is added behind the end


def test_equal_entries_make_the_longest_tape_and_a_clear_choice_the_shortest():
    rule, generator = ReadingRule(longest=8, tau=2.0), torch.Generator().manual_seed(0)
    reader = reader_of(rule)
    flat = reader(torch.randn(2, 8, generator=generator), torch.ones(2, 32, 8))
    assert (flat.length == 8).all()
    torch.testing.assert_close(flat.weights, torch.full_like(flat.weights, 0.25))
    with torch.no_grad():
        reader.norm.weight.mul_(100)
    clear = reader(torch.randn(2, 8, generator=generator), torch.randn(2, 32, 8, generator=generator))
    assert (clear.length == 2).all()


def test_reading_one_entry_at_a_time_leaves_nothing_to_decide():
    tape = reader_of(ReadingRule(longest=4, tau=4.0))(torch.randn(6, 8), torch.randn(6, 9, 8))
    assert (tape.length == 4).all()
    assert (tape.weights == 1).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_no_entry_is_read_twice_while_there_are_others(seed):
    rule = ReadingRule(longest=6, tau=2.0)
    generator = torch.Generator().manual_seed(seed)
    tape = reader_of(rule)(torch.randn(4, 8, generator=generator), torch.randn(4, 18, 8, generator=generator))
    for entries, length in zip(tape.entries, tape.length.tolist(), strict=True):
        read = entries[:length].flatten().tolist()
        assert len(set(read)) == len(read)


def test_the_tokens_are_the_weighted_entries_and_steer_the_next_query():
    rule = ReadingRule(longest=6, tau=2.0)
    reader, bank, start = reader_of(rule), torch.randn(3, 18, 8), torch.randn(3, 8)
    seen = []
    reader.query.register_forward_hook(lambda m, args, out: seen.append(out[:, 0].detach()))
    tape = reader(start, bank)
    values = reader.norm(bank)
    picked = values[torch.arange(3)[:, None], tape.entries[:, 1]]
    torch.testing.assert_close(tape.tokens[:, 1], (tape.weights[:, 1, :, None] * picked).sum(1))
    torch.testing.assert_close(seen[0], reader.norm(start)[:, :4].detach())
    torch.testing.assert_close(seen[1], (seen[0] + tape.tokens[:, 0, :4].detach()) / 2)
    # each weight is a softmax of this example's own scores
    scores = (picked[..., :4] @ seen[1][..., None])[..., 0] / 2
    torch.testing.assert_close(tape.weights[:, 1], scores.softmax(1))
    assert (tape.weights[..., :-1] >= tape.weights[..., 1:]).all()
    reader.rule = replace(rule, moves_query=False)
    seen.clear()
    reader(start, bank)
    assert all(torch.equal(query, seen[0]) for query in seen)


@pytest.mark.parametrize("bank", ["input", "learnt"])
def test_an_examples_tape_and_answer_do_not_depend_on_its_batch_mates(bank):
    model, symbols = model_of(replace(CONFIG, bank=bank)), symbols_of()
    together = model(symbols)
    assert len(set(together.tape.length.tolist())) > 1
    for number in range(len(symbols)):
        alone = model(symbols[number : number + 1])
        assert torch.equal(alone.tape.running[0], together.tape.running[number])
        torch.testing.assert_close(alone.logits[0], together.logits[number], rtol=0, atol=1e-5)


def test_slots_beyond_the_tape_get_no_attention_at_all():
    model, symbols = model_of(), symbols_of()
    patterns = []
    for block in model.layers:
        block.attention.pattern.register_forward_hook(lambda m, args, out: patterns.append(out))
    tape = model(symbols).tape
    beyond = ~tape.running
    assert beyond.any()
    for pattern in patterns:
        to_tape = pattern[..., 2:].movedim(-1, 1)  # (batch, slot, heads, tokens)
        assert (to_tape[beyond] == 0).all()
        assert (to_tape[tape.running] > 0).any()


def test_without_a_tape_it_is_the_base_model():
    model, symbols = model_of(), symbols_of()
    model.valid.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    own = model.seen.own(symbols)
    x = torch.cat([model.class_token.expand(8, -1, -1), model.embed(own)], 1)
    for block in model.layers:
        x = block(x)
    torch.testing.assert_close(model(symbols).logits, model.head(model.norm(x[:, 0])), rtol=0, atol=1e-6)


def test_the_tape_is_a_set():
    model, symbols = model_of(), symbols_of()
    plain = model(symbols)
    order = torch.stack([torch.cat([torch.arange(n).flip(0), torch.arange(n, 6)]) for n in plain.tape.length.tolist()])

    def turned(module, args, out):
        return out.gather(1, order[..., None].expand_as(out))

    model.tape_map.register_forward_hook(turned)
    torch.testing.assert_close(model(symbols).logits, plain.logits, rtol=0, atol=1e-5)


def test_gradients_reach_bank_norm_and_base_through_the_weights():
    model, symbols = model_of(), symbols_of()
    run = model(symbols)
    (torch.nn.functional.cross_entropy(run.logits, parity(symbols)) + 0.01 * run.tape.impurity.mean()).backward()
    for weight in (model.to_bank.weight, model.reader.norm.weight, model.embed.weight):
        assert weight.grad.abs().max() > 0
    assert not run.tape.running.requires_grad


def test_the_first_of_two_ways_in_comes_before_the_second():
    late = model_of(replace(CONFIG, insert=1))
    seen = []
    late.layers[0].register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    late(symbols_of())
    assert seen == [2]  # the first block saw no tape yet


def test_the_tape_can_be_forced_to_a_length():
    target, symbols = adatape_target(model_of()), symbols_of()
    clean = target.trace(symbols)
    assert len(clean.depth.unique()) > 1
    for length in (1, 3, 6):
        ends = [Force("go on")] if length == 6 else [Force("go on"), Force("halt", Where(steps=(length - 1,)))]
        assert (trace_with(target, symbols, ends).depth == length).all()
    assert (trace_with(target, symbols, [Force("go on")]).mac_ratio == 1).all()
    assert (clean.mac_ratio < 1).any()
    with pytest.raises(SaekitError, match="step 5 of adatape has no free decision; they are 0 to 4"):
        trace_with(target, symbols, [Force("halt", Where(steps=(5,)))])


@pytest.mark.parametrize("amount", [-0.2, 0.2])
def test_a_shift_of_the_sum_is_another_threshold(amount):
    """Of the same number of entries at once; a shift at one step leaves the sums of the others."""
    of_tau = {tau: adatape_target(model_of(replace(CONFIG, tau=tau))) for tau in (1.75, 1.75 - amount)}
    target, other = of_tau.values()
    symbols = symbols_of(200)
    clean, shifted = target.trace(symbols), trace_with(target, symbols, [Shift(amount)])
    assert torch.equal(shifted.depth, other.trace(symbols).depth)
    assert not torch.equal(shifted.depth, clean.depth)
    alone = trace_with(target, symbols, [Shift(amount, Where(steps=(0,)))])
    both = (torch.minimum(alone.depth, clean.depth) > 1)[:, 0]
    assert bool(both.any())
    torch.testing.assert_close(alone.score[both, 0], clean.score[both, 0] + amount)
    torch.testing.assert_close(alone.score[both, 1], clean.score[both, 1])


def test_what_queries_are_can_be_harvested_by_step():
    target, symbols = adatape_target(model_of()), symbols_of()
    batch = harvest(target, symbols, 3)
    assert batch.vectors.shape == (8, 4)
    assert torch.equal(batch.halted, ~target.trace(symbols).live[:, 3, 0])


def test_a_hidden_input_is_known_by_the_tape_alone():
    model, symbols = model_of(replace(CONFIG, reads_input=False)), symbols_of()
    model.valid.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    assert (model(symbols).logits == model(symbols).logits[:1]).all()


def test_parity_counts_the_ones():
    assert parity(torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, -1.0], [0.0, 0.0, 0.0]])).tolist() == [0, 1, 0]
    drawn = sequences(2000, 16, torch.Generator().manual_seed(0))
    assert drawn.unique().tolist() == [-1, 0, 1]
    assert abs(float(parity(drawn).float().mean()) - 0.5) < 0.05


def test_the_recipe_minimises_task_and_impurity():
    recipe = AdaTapeRecipe(length=12, longest=6, batch=16)
    (stage,) = recipe.stages
    loss, report = recipe.loss(recipe.build(), stage, 0)
    free, _ = replace(recipe, impurity_weight=0.0).loss(recipe.build(), stage, 0)
    impurity = recipe.build()(sequences_of(recipe, stage)).tape.impurity.mean()
    assert float((loss - free).detach()) == pytest.approx(0.01 * float(impurity.detach()), abs=1e-5)
    assert 2 <= report["tape"] <= 6


def sequences_of(recipe, stage):
    return sequences(recipe.batch, recipe.length, draw(recipe.seed, stage, 0))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ReadingRule(longest=4, tau=5.0), SaekitError, "on tapes of at most 4; give 1 to 4"),
        (lambda: replace(CONFIG, insert=2), SaekitError, "insert=2 is outside 2 blocks"),
        (lambda: model_of()(symbols_of(length=11)), ShapeError, "have 11 symbols, but this model reads 12"),
        (lambda: model_of()(symbols_of() * 2), SaekitError, "give 1, 0 and -1"),
        (
            lambda: reader_of(ReadingRule(longest=6, tau=1.0))(torch.zeros(1, 8), torch.zeros(1, 5, 8)),
            ShapeError,
            "a bank of 5 entries is less than the 6 that one step reads",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
