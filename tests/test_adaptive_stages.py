"""Training in stages: seeded, resumable to the bit, and saved as a folder that says what it is."""

import json
import os
import signal
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from adaptive_models import a_vit_of, duo_of
from torch import nn

from saekit.adaptive import duo_recipe
from saekit.adaptive.a_vit_recipe import CONTROL, HALTING, PLAIN, AViTRecipe
from saekit.adaptive.duo_recipe import LANGUAGE, ROUTER, DuoRecipe
from saekit.adaptive.saved import Saved, filled, load_adaptive, save_adaptive
from saekit.adaptive.stages import STATE_FILE, Stage, draw, train_stages
from saekit.errors import DataError, FileError, UnknownNameError
from saekit.training.stop import RunStopped


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Fit a line, then only its slope, from another start."""

    seed: int = 0
    steps: int = 12
    learning_rate: float = 0.05

    @property
    def stages(self):
        first = Stage(name="first", steps=self.steps, learning_rate=self.learning_rate)
        return first, replace(first, name="slope", start="first", only=("weight",)), replace(first, name="anew")

    def build(self):
        torch.manual_seed(self.seed)
        return nn.Linear(3, 1)

    def loss(self, model, stage, step):
        x = torch.randn(8, 3, generator=draw(self.seed, stage, step))
        return (model(x) - x.sum(1, keepdim=True) - 1).square().mean(), {"x": float(x[0, 0])}


class PowerCut(Exception):
    pass


def cut_at(done: int):
    def on_report(report):
        if report["done"] == done:
            raise PowerCut

    return on_report


def test_stages_begin_where_they_say_and_train_what_they_say(tmp_path):
    reports = []
    weights = train_stages(Line(), tmp_path, on_report=reports.append)
    assert list(weights) == ["first", "slope", "anew"]
    assert [report["done"] for report in reports] == list(range(1, 37))
    assert torch.equal(weights["slope"]["bias"], weights["first"]["bias"])
    assert not torch.equal(weights["slope"]["weight"], weights["first"]["weight"])
    by_stage = {name: [r["loss"] for r in reports if r["stage"] == name] for name in weights}
    assert by_stage["first"][-1] < by_stage["first"][0]
    assert by_stage["slope"][0] < by_stage["anew"][0]
    # each stage and step draws its own numbers
    assert len({report["x"] for report in reports}) == 36


@pytest.mark.parametrize("cut", [3, 12, 13, 20, 31])
def test_a_resumed_run_ends_where_one_that_was_never_stopped_does(tmp_path, cut):
    whole = train_stages(Line(), tmp_path / "whole")
    with pytest.raises(PowerCut):
        train_stages(Line(), tmp_path / "cut", save_every=1, on_report=cut_at(cut))
    if cut > 1:
        assert (tmp_path / "cut" / STATE_FILE).exists()
    later = []
    resumed = train_stages(Line(), tmp_path / "cut", resume=True, on_report=later.append)
    assert later[0]["done"] == cut  # the step that was cut off is done again
    assert all(torch.equal(resumed[s][n], whole[s][n]) for s in whole for n in whole[s])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("done", [1, 5, 13, 36])
def test_a_run_that_is_told_to_stop_saves_itself_and_says_how_to_go_on(tmp_path, number, done):
    before = signal.getsignal(number)
    whole = train_stages(Line(), tmp_path / "whole")

    def tell(report):
        if report["done"] == done:
            os.kill(os.getpid(), number)

    stage, step = Line().stages[(done - 1) // 12].name, (done - 1) % 12 + 1
    with pytest.raises(RunStopped, match=f"after step {step} of the stage {stage}, saved in .*--resume") as stopped:
        train_stages(Line(), tmp_path / "cut", save_every=1000, on_report=tell)
    assert stopped.value.signal == number
    reports = []
    resumed = train_stages(Line(), tmp_path / "cut", resume=True, on_report=reports.append)
    assert [report["done"] for report in reports] == list(range(done + 1, 37))  # nothing was lost
    for name, weights in whole.items():
        for key, weight in weights.items():
            assert torch.equal(resumed[name][key], weight)
    assert signal.getsignal(number) == before


def test_a_run_of_other_settings_is_not_resumed(tmp_path):
    with pytest.raises(PowerCut):
        train_stages(Line(), tmp_path, save_every=1, on_report=cut_at(5))
    with pytest.raises(FileError, match="belongs to a run with other settings"):
        train_stages(Line(seed=1), tmp_path, resume=True)
    with pytest.raises(FileError, match="pass --resume to go on"):
        train_stages(Line(), tmp_path)
    (tmp_path / STATE_FILE).write_bytes(b"nonsense")
    with pytest.raises(FileError, match="delete it and start anew"):
        train_stages(Line(), tmp_path, resume=True)
    with pytest.raises(FileError, match="nothing to resume"):
        train_stages(Line(), tmp_path / "elsewhere", resume=True)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    with pytest.raises(DataError, match=r"the loss is (inf|nan) at step \d+ of first; lower the learning rate"):
        train_stages(Line(learning_rate=1e30), tmp_path)


def test_the_learning_rate_rises_and_falls():
    stage = Stage(name="s", steps=100, learning_rate=1.0)
    factors = [stage.lr_factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.2) and max(factors) > 0.98 and factors[-1] < 0.02
    assert all(a >= b for a, b in pairwise(factors[5:]))


def test_halting_and_its_control_see_the_same_images():
    pytest.importorskip("sklearn")
    recipe = AViTRecipe(width=16, layers=2, plain_epochs=1, halting_epochs=1)
    plain, control, halting = recipe.stages
    assert [stage.name for stage in recipe.stages] == [PLAIN, CONTROL, HALTING]
    assert control.start == halting.start == PLAIN
    assert torch.equal(recipe.batch_at(control, 7)[0], recipe.batch_at(halting, 7)[0])
    assert not torch.equal(recipe.batch_at(plain, 7)[0], recipe.batch_at(halting, 7)[0])


def test_only_the_halting_stage_halts_and_pays_for_depth():
    pytest.importorskip("sklearn")
    recipe = AViTRecipe(width=16, layers=2, plain_epochs=1, halting_epochs=1)
    model = recipe.build()
    _, control, halting = recipe.stages
    plain_loss, plain_report = recipe.loss(model, control, 0)
    full_loss, report = recipe.loss(model, halting, 0)
    assert "depth" in report and "depth" not in plain_report
    assert plain_loss.detach() < full_loss.detach()
    free = replace(recipe, ponder_weight=0.0, prior_weight=0.0)
    assert float(free.loss(model, halting, 0)[0].detach()) == pytest.approx(float(plain_loss.detach()), abs=1e-5)


def test_a_few_steps_of_digits_are_learnt(tmp_path):
    pytest.importorskip("sklearn")
    recipe = AViTRecipe(width=16, layers=2, canvas=10, plain_epochs=4, halting_epochs=1)
    reports = []
    weights = train_stages(recipe, tmp_path, on_report=reports.append)
    plain = [report["loss"] for report in reports if report["stage"] == PLAIN]
    assert sum(plain[-10:]) / 10 < sum(plain[:10]) / 10 - 0.15
    assert set(weights) == {PLAIN, CONTROL, HALTING}


@pytest.fixture
def _little_text(monkeypatch):
    ids = torch.randint(0, 4096, (20, 12), generator=torch.Generator().manual_seed(0))
    corpus = SimpleNamespace(train=SimpleNamespace(ids=ids))
    monkeypatch.setattr(duo_recipe, "load_once", lambda context: corpus)


@pytest.mark.usefixtures("_little_text")
def test_duo_learns_under_coin_flips_and_then_only_its_router(tmp_path):
    recipe = DuoRecipe(width=16, layers=2, context=12, batch=8, language_steps=15, router_batch=4, router_steps=6)
    reports = []
    weights = train_stages(recipe, tmp_path, on_report=reports.append)
    losses = [report["loss"] for report in reports if report["stage"] == LANGUAGE]
    assert losses[0] == pytest.approx(8.3, abs=0.2)  # ln 4096
    assert losses[-1] < losses[0] - 0.1
    changed = {n for n in weights[ROUTER] if not torch.equal(weights[ROUTER][n], weights[LANGUAGE][n])}
    assert changed == {f"layers.{layer}.router.linear.{part}" for layer in (0, 1) for part in ("weight", "bias")}


@pytest.mark.usefixtures("_little_text")
def test_a_coin_that_always_says_big_is_the_big_model():
    recipe = DuoRecipe(width=16, layers=2, context=12, batch=8, big_chance=1.0)
    model = recipe.build()
    for layer in model.layers:
        for weight in layer.feed.small.parameters():
            weight.data.fill_(torch.nan)
    assert recipe.loss(model, recipe.stages[0], 0)[0].isfinite()
    assert not replace(recipe, big_chance=0.5).loss(model, recipe.stages[0], 0)[0].isfinite()


@pytest.mark.parametrize("kind, model", [("a-vit", a_vit_of()), ("duo-llm", duo_of())])
def test_a_saved_model_comes_back_in_half_precision(tmp_path, kind, model):
    saved = Saved(kind=kind, model=model, control=model if kind == "a-vit" else None, recipe={"seed": 3})
    save_adaptive(saved, tmp_path / "m")
    again = load_adaptive(tmp_path / "m")
    assert (again.kind, again.recipe, again.control is not None) == (kind, {"seed": 3}, kind == "a-vit")
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, filled(type(model)(model.config), model.state_dict()).state_dict()[name])
    described = json.loads((tmp_path / "m" / "config.json").read_text())
    assert described["command"] == f"saekit adaptive train {kind} --seed 3"
    assert not again.model.training


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    save_adaptive(Saved(kind="a-vit", model=a_vit_of()), tmp_path / "m")
    with pytest.raises(FileError, match="holds a model of kind 'a-vit', not duo-llm"):
        load_adaptive(tmp_path / "m", kind="duo-llm")
    with pytest.raises(UnknownNameError, match="no adaptive model or folder named 'a-vti'; closest of 4: a-vit"):
        load_adaptive("a-vti")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for spoilt in ({"kind": "x"}, {"config": {"image": 8, "wings": 2}}, {"config": {**config["config"], "width": 32}}):
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **spoilt}))
        with pytest.raises(FileError):
            load_adaptive(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(FileError, match="train or copy it again"):
        load_adaptive(tmp_path / "m")
