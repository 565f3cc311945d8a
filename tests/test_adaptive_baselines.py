"""What adaptive models are held against: baselines that are what their papers say, on the same inputs as the model."""

from dataclasses import replace

import pytest
import torch
from adaptive_models import duo_of, ids_of
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.adaptive.a_vit_recipe import CONTROL, HALTING, AViTRecipe
from saekit.adaptive.a_vit_sweep import AViTSweep, measure_sweep
from saekit.adaptive.adatape import AdaTape, AdaTapeConfig, PlainTransformer
from saekit.adaptive.adatape_baselines import BaselineRecipe, difficulty, measure_baseline
from saekit.adaptive.adatape_inputs import Pictures, Symbols
from saekit.adaptive.deciding import adatape_target
from saekit.adaptive.duo_baselines import ADDED, DuoBaseline
from saekit.adaptive.duo_llm import BIG, next_token_nats
from saekit.adaptive.duo_oracle import all_routes
from saekit.adaptive.duo_recipe import LANGUAGE, DuoRecipe
from saekit.adaptive.duo_report import nats_of_coins, split_oracle
from saekit.adaptive.ponder_net import PonderNet, PonderRun, ponder_prior, ponder_task
from saekit.adaptive.stages import Stage
from saekit.adaptive.tape_reader import ReadingRule, TapeReader
from saekit.adaptive.universal import EPS, UniversalTransformer
from saekit.errors import SaekitError, ShapeError

CONFIG = AdaTapeConfig(length=12, width=16, layers=2, heads=2, longest=6, tau=2.0)
ON_PICTURES = replace(CONFIG, picture=10, coarse=5, fine=2, insert=1, classes=10)


def symbols_of(n: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, 2, (n, 12), generator=torch.Generator().manual_seed(seed)).float()


def pictures_of(n: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 1, 10, 10, generator=torch.Generator().manual_seed(seed))


def multiplications(model: torch.nn.Module, inputs: torch.Tensor) -> int:
    """Of the linear maps and attention patterns of a forward pass, counted with hooks."""
    counted = [0]

    def add(n: int) -> None:
        counted[0] += n

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, args, out: add(out.numel() * m.in_features))
        if type(module).__name__ == "Attention":
            width = module.q.out_features // module.heads
            module.pattern.register_forward_hook(lambda m, args, out, width=width: add(2 * out.numel() * width))
    model(inputs)
    return counted[0]


def hesitant(model: UniversalTransformer | PonderNet, strength: float = 3.0) -> UniversalTransformer | PonderNet:
    """Chances that differ from input to input."""
    with torch.no_grad():
        torch.nn.init.normal_(model.loop.stop.weight, std=strength, generator=torch.Generator().manual_seed(0))
    return model.eval()


# ------------------------------------------------------------------------------------------------ inputs


def test_inputs_are_cut_into_tokens_and_entries():
    seen, picture = Pictures(10, 5, 2), pictures_of(1)
    assert seen.own(picture).shape == (1, seen.n_own, seen.own_size) == (1, 4, 25)
    assert seen.entries(picture).shape == (1, seen.n_entries, seen.entry_size) == (1, 25, 4)
    torch.testing.assert_close(seen.entries(picture)[0, 7], picture[0, 0, 2:4, 4:6].flatten())
    symbols = Symbols(3)
    assert symbols.entries(torch.tensor([[1.0, 0.0, -1.0]])).tolist() == [[[0, 0, 1], [0, 1, 0], [1, 0, 0]]]
    assert symbols.own(torch.zeros(2, 3)).shape == (2, symbols.n_own, symbols.own_size)
    with pytest.raises(SaekitError, match="10 pixels are no whole number of patches of 3 and of 2"):
        Pictures(10, 3, 2)
    with pytest.raises(ShapeError, match=r"images are \(1, 8, 8\)"):
        AdaTape(ON_PICTURES)(torch.zeros(1, 1, 8, 8))


def test_a_tape_is_read_from_pictures_with_positions():
    model, pictures = AdaTape(ON_PICTURES).eval(), pictures_of()
    run = model(pictures)
    assert run.logits.shape == (4, 10) and run.tape.entries.max() < 25
    with torch.no_grad():
        model.entry_position.copy_(torch.linspace(-3, 3, 25 * 16).view(1, 25, 16))
    assert not torch.equal(model(pictures).tape.weights, run.tape.weights)
    target = adatape_target(model)
    assert len(target.steps) == 5 and target.trace(pictures).depth.shape == (4, 1)
    assert AdaTape(CONFIG).entry_position is None  # a bank of symbols has none, as in the released code


@pytest.mark.parametrize("config", [CONFIG, ON_PICTURES], ids=["symbols", "pictures"])
def test_the_plain_transformers_multiplications_are_those_it_does(config):
    inputs = symbols_of(1) if config.picture is None else pictures_of(1)
    model = PlainTransformer(config)
    assert multiplications(model, inputs) == model.macs


def test_entries_that_nobody_chose_are_the_same_for_all_and_still_weighed():
    generator = torch.Generator().manual_seed(0)
    bank, start = torch.randn(5, 24, 8, generator=generator), torch.randn(5, 8, generator=generator)
    rule = ReadingRule(longest=6, tau=2.0, chooses=False)
    tape = TapeReader(8, 4, rule)(start, bank)
    for step in range(rule.shortest):
        read = tape.entries[:, step].sort(1).values
        assert (read == read[:1]).all()
    assert (tape.weights[..., :-1] >= tape.weights[..., 1:]).all()
    assert tape.weights.std(0).max() > 0.01
    chosen = TapeReader(8, 4, replace(rule, chooses=True))(start, bank)
    assert len(chosen.entries[:, 0].sort(1).values.unique(dim=0)) > 1


# ------------------------------------------------------------------------------------------------ universal, ponder


def test_act_spends_exactly_one_and_stops_when_it_is_spent():
    model, symbols = hesitant(UniversalTransformer(CONFIG)), symbols_of(40)
    states, chances = [], []
    model.loop.block.register_forward_hook(lambda m, args, out: states.append(out.detach()))
    model.loop.stop.register_forward_hook(lambda m, args, out: chances.append(out.sigmoid().mean((1, 2)).detach()))
    run = model(symbols)
    assert len(run.steps.unique()) > 1 and run.steps.max() <= 6
    for number, steps in enumerate(run.steps.tolist()):
        p = torch.stack(chances)[:, number]
        assert p[: steps - 1].sum() < 1 - EPS
        assert steps == 6 or p[:steps].sum() >= 1 - EPS
        torch.testing.assert_close(run.remainder[number], 1 - p[: steps - 1].sum())
        # out = state * u + out * (1 - u), unrolled by hand
        u = torch.cat([p[: steps - 1], run.remainder[number : number + 1]])
        out = torch.zeros_like(states[0][number])
        for share, state in zip(u, states, strict=False):
            out = state[number] * share + out * (1 - share)
        torch.testing.assert_close(run.logits[number], model.loop.head(model.loop.norm(out[0])), rtol=0, atol=1e-5)


def test_the_step_cost_reaches_the_chance_through_the_remainder():
    model = UniversalTransformer(CONFIG)
    (run := model(symbols_of())).remainder.mean().backward()
    assert model.loop.stop.bias.grad.abs().max() > 0
    # as untrained every input has the same small chance
    assert (run.steps == run.steps[0]).all()
    torch.testing.assert_close(run.remainder, 1 - (run.steps - 1) * torch.tensor(-1.0).sigmoid())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), strength=st.floats(0, 20))
def test_the_chances_of_pondernets_steps_add_up_to_one(seed, strength):
    run = hesitant(PonderNet(CONFIG), strength)(symbols_of(seed=seed))
    torch.testing.assert_close(run.halting.sum(1), torch.ones(8))
    assert (run.halting >= 0).all()
    assert (run.steps >= 1).all() and (run.steps <= 6).all()


def test_pondernet_answers_with_the_step_by_which_half_is_spent():
    halting = torch.tensor([[0.6, 0.4, 0.0], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    answers = torch.arange(9.0).view(3, 3, 1).expand(3, 3, 2)
    run = PonderRun(answers, halting)
    assert run.steps.tolist() == [1, 2, 3]
    assert run.logits[:, 0].tolist() == [0, 4, 8]


def test_pondernets_loss_is_expected_and_its_prior_geometric():
    run = hesitant(PonderNet(CONFIG))(symbols_of())
    labels = torch.arange(8) % 2
    by_hand = [
        sum(
            run.halting[i, n] * torch.nn.functional.cross_entropy(run.answers[i, n][None], labels[i : i + 1])
            for n in range(6)
        )
        for i in range(8)
    ]
    torch.testing.assert_close(ponder_task(run, labels), torch.stack(by_hand).mean())
    prior = torch.tensor([0.2 * 0.8**n for n in range(6)])
    prior = (prior / prior.sum()).expand(3, -1)
    assert float(ponder_prior(prior, 0.2)) == pytest.approx(0, abs=1e-6)
    assert float(ponder_prior(prior, 0.5)) > 0.1
    certain = torch.eye(6)[:1]
    assert float(ponder_prior(certain, 0.2)) == pytest.approx(-float(prior[0, 0].log()), abs=1e-6)


@pytest.mark.parametrize("model_class", [UniversalTransformer, PonderNet])
def test_a_loops_multiplications_are_those_of_its_steps(model_class):
    model = model_class(replace(CONFIG, longest=1, tau=1.0))
    counted = multiplications(model, symbols_of(1))
    # PonderNet needs no chance at its last step
    spared = 13 * 16 if model_class is PonderNet else 0
    assert int(model.loop.macs(torch.tensor([1]))) == counted + spared


# ------------------------------------------------------------------------------------------------ recipes


def test_all_models_of_a_task_see_the_same_batches():
    pytest.importorskip("sklearn")
    for task, models in (("parity", ("tape", "plain", "universal")), ("digits", ("tape", "coarse", "ponder"))):
        recipes = [BaselineRecipe(task=task, model=model) for model in models]
        batches = [recipe.batch_at(recipe.stages[0], 3) for recipe in recipes]
        for inputs, labels in batches[1:]:
            assert torch.equal(inputs, batches[0][0]) and torch.equal(labels, batches[0][1])


@pytest.mark.parametrize("model", ["tape", "shallow", "universal", "ponder"])
def test_a_baseline_is_measured_on_digits(model):
    pytest.importorskip("sklearn")
    recipe = BaselineRecipe(task="digits", model=model)
    built = recipe.build()
    found = measure_baseline(recipe, built)
    assert 0 <= found["accuracy"] <= 1 and found["macs"] > 0
    assert ("length" in found) == (model != "shallow")
    loss, _ = recipe.loss(built, recipe.stages[0], 0)
    loss.backward()
    assert any(weight.grad.abs().max() > 0 for weight in built.parameters() if weight.grad is not None)


def test_the_plain_transformer_minimises_the_task_alone():
    recipe = BaselineRecipe(model="plain")
    model = recipe.build()
    symbols, labels = recipe.batch_at(recipe.stages[0], 0)
    task = torch.nn.functional.cross_entropy(model(symbols), labels)
    assert torch.equal(recipe.loss(model, recipe.stages[0], 0)[0], task)


def test_the_shallow_transformer_costs_about_what_adatape_does():
    tape, shallow = (BaselineRecipe(task="digits", model=model).build() for model in ("tape", "shallow"))
    assert 0.75 < shallow.macs / float(tape.macs(torch.tensor([8]))) < 1.25


def test_difficulty_is_a_loss_of_every_test_digit():
    pytest.importorskip("sklearn")
    found = difficulty(0)
    assert found.shape == (360,) and (found >= 0).all()
    assert float((found > 0.7).float().mean()) < 0.2  # most are easy


def test_a_sweep_trains_each_setting_from_the_same_start_on_the_same_images():
    pytest.importorskip("sklearn")
    sweep = AViTSweep(of=AViTRecipe(width=16, layers=2, canvas=10), settings=((1.0, 1e-3), (2.0, 1e-3)))
    names = [stage.name for stage in sweep.stages]
    assert names == ["plain", "control", "target 1, ponder 0.001", "target 2, ponder 0.001"]
    assert {stage.start for stage in sweep.stages[1:]} == {"plain"}
    model, own = sweep.build(), replace(sweep.of, target=1.0, ponder_weight=1e-3)
    stage = sweep.stages[2]
    as_halting = next(stage for stage in own.stages if stage.name == HALTING)
    assert torch.equal(sweep.loss(model, stage, 5)[0], own.loss(model, as_halting, 5)[0])
    assert not torch.equal(sweep.loss(model, sweep.stages[3], 5)[0], sweep.loss(model, stage, 5)[0])
    weights = {name: model.state_dict() for name in (CONTROL, *sweep.by_name)}
    found = measure_sweep(sweep, weights)
    assert len(found) == 5 and found["target 1, ponder 0.001.mac_ratio"] <= 1


TINY_DUO = DuoRecipe(width=16, layers=2, context=16, batch=2, language_steps=6)


def test_dense_models_train_one_feed_forward_and_what_is_added_the_other_alone():
    for way, trained, untouched in (("big", "big", "small"), ("small", "small", "big")):
        baseline = DuoBaseline(of=TINY_DUO, way=way)
        model = baseline.build()
        baseline.loss(model, baseline.stages[0], 0)[0].backward()
        feed = model.layers[0].feed
        assert getattr(feed, trained).up.weight.grad.abs().max() > 0
        other = getattr(feed, untouched).up.weight.grad
        assert other is None or not other.any()
    added = DuoBaseline(of=TINY_DUO, way="added")
    before, then = added.stages
    assert (before.steps, then.steps, then.name, then.start) == (4, 2, ADDED, LANGUAGE)
    assert then.only == ("layers.0.feed.small", "layers.1.feed.small")


def test_what_is_added_goes_on_with_the_batches_that_would_have_come():
    joint, added = (DuoBaseline(of=TINY_DUO, way=way) for way in ("joint", "added"))
    model = joint.build()
    (language,) = joint.stages
    assert torch.equal(added.loss(model, added.stages[1], 1)[0], joint.loss(model, language, 5)[0])
    assert language == Stage(**{name: getattr(TINY_DUO.stages[0], name) for name in Stage.__slots__})


# ------------------------------------------------------------------------------------------------ oracle without labels


def test_coins_of_certain_outcome_are_fixed_routes():
    model, ids = duo_of(), ids_of()
    with torch.no_grad():
        big = next_token_nats(model(ids, torch.tensor([BIG] * 3)).logits, ids).mean()
    assert nats_of_coins(model, ids, 1.0) == pytest.approx(float(big), abs=1e-6)
    assert nats_of_coins(model, ids, 0.5) != nats_of_coins(model, ids, 0.5, seed=1)


def test_a_split_oracle_chooses_where_the_same_tokens_came_last():
    ids = torch.tensor([[1, 2, 3, 9, 1, 2, 3, 9]])
    routes = all_routes(1)
    nats = torch.zeros(len(routes), 1, 7)
    # at the second 1 2 3 (place 6) the first route is better, at the first (place 2) the second one was
    nats[:, 0, 2], nats[:, 0, 6] = torch.tensor([5.0, 1.0]), torch.tensor([2.0, 3.0])
    found = split_oracle(nats, ids)
    assert found == {"places": 1, "chosen_elsewhere": 3.0, "best_fixed": 2.0, "oracle": 2.0}
    ids[0, 7] = 8  # what follows is another token than at the first place
    apart = split_oracle(nats, ids)
    assert {name: apart[f"another_label_{name}"] for name in found} == found
    assert split_oracle(nats, torch.arange(8)[None]) == {"places": 0}
    with pytest.raises(SaekitError, match="'shallow' is for pictures alone"):
        BaselineRecipe(model="shallow")
