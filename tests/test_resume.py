"""Runs that stop and go on: to the bit, from any step, whatever stopped them."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saekit.activations.batch import ActivationBatch
from saekit.activations.harvest import Harvest, TensorSource
from saekit.activations.mask import MaskPolicy
from saekit.activations.stream import Place, ResumableSource, generator_for
from saekit.activations.tokens import TokenRows
from saekit.density import RunningDensity
from saekit.errors import DataError, FileError, SaekitError
from saekit.losses import AuxK, AuxZipf
from saekit.sae import SAE
from saekit.selection import FeatureChoice, MutualChoice, Threshold, TopK
from saekit.targets import Site, Target
from saekit.training import keep, loop, saved_run
from saekit.training.config import TrainConfig
from saekit.training.loop import train
from saekit.training.objectives import Gated, JumpReLU, Matryoshka
from saekit.training.resample import Resample
from saekit.training.saved_run import RunFile
from saekit.training.schedule import AnnealK, ThenFeatureChoice
from saekit.training.step import TrainState, train_step
from saekit.training.stop import RunStopped, StopRequested, StopSignals

FIRST, SECOND = Site.parse("layers.0"), Site.parse("layers.1")
WIDTH, BATCH, STEPS = 8, 64, 14
RULES = [TopK(3), MutualChoice(3), FeatureChoice(3), FeatureChoice(3, exponent=1.0)]
ZIPF, DEAD_ONLY = AuxZipf(dead_after=2 * BATCH), AuxK(dead_after=2 * BATCH)
OPEN = Threshold(0.0)
VARIANTS: dict[str, dict] = {
    "pooled budgets": {"rule": FeatureChoice(1, exponent=1.0), "batch_tokens": 32, "tokens": STEPS * 32},
    "two phases": {"rule": MutualChoice(3), "then": ThenFeatureChoice(at=0.4, pool=3)},
    "annealed": {"rule": FeatureChoice(3, exponent=0.5), "anneal": AnnealK(8, over=0.7)},
    "gated": {"rule": OPEN, "objective": Gated(3)},
    "JumpReLU": {"rule": OPEN, "objective": JumpReLU(3)},
    "resampled": {"resample": Resample(at=(0.4, 0.8))},
    "transcoder": {"rule": MutualChoice(3), "site_out": SECOND, "skip": True},
}


class Stack(nn.Module):
    """Embeddings and two blocks; counts the rows it reads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.rows_read = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.rows_read += len(ids) if ids.shape[1] > 2 else 0  # not what is read to find the width
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x.cumsum(1)).tanh()
        return x


def harvest(*sites: Site, **changes) -> Harvest:
    ids = torch.randint(1, 40, (37, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 0
    defaults = {"target": Target.wrap(Stack()), "rows": TokenRows.from_ids(ids, bos=0), "sites": sites or (FIRST,)}
    # 4 batches to a buffer, and more than two passes over the rows in a run
    return Harvest(**{**defaults, "batch_rows": 5, "buffer_tokens": 4 * BATCH + 20, **changes})


def config(**changes) -> TrainConfig:
    defaults = {"site": FIRST, "rule": TopK(3), "n_features": 24, "tokens": STEPS * BATCH, "batch_tokens": BATCH}
    return TrainConfig(**{**defaults, "learning_rate": 1e-2, "auxiliary": ZIPF, "ranks_every": 3, **changes})


@pytest.fixture(autouse=True)
def _small_samples(monkeypatch):
    # the sample is longer than a buffer, so that runs also stop within it
    monkeypatch.setattr(loop, "SAMPLE_TOKENS", 6 * BATCH)
    monkeypatch.setattr(loop, "CALIBRATION_TOKENS", 10 * BATCH)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "sae.unfinished.safetensors"


def weights(sae: SAE) -> dict[str, Tensor]:
    found = {name: parameter.detach() for name, parameter in sae.named_parameters()}
    return found | ({"theta": torch.as_tensor(sae.rule.theta)} if isinstance(sae.rule, Threshold) else {})


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class PowerCut(Exception):
    """Leaves nobody the time to save."""


def cut_at(step: int):
    def on_step(done: int, reports) -> None:
        if done == step:
            raise PowerCut

    return on_step


def kill_at(step: int, number: int = signal.SIGTERM):
    def on_step(done: int, reports) -> None:
        if done == step:
            os.kill(os.getpid(), number)

    return on_step


def stop_at(step: int, path: Path, configs: list[TrainConfig], source: ResumableSource | None = None, **options):
    with pytest.raises(RunStopped) as stopped:
        train(configs, source or harvest(), run_file=RunFile(path=path, **options), on_step=kill_at(step))
    return stopped.value


def metadata_of(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["run"])


# to the bit


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_run_stopped_after_any_step_ends_as_if_it_had_not_been(rule, path):
    configs = [config(rule=rule)]
    (whole,) = train(configs, harvest())
    # at the start, at the end of a buffer, at the end of the sample, in the middle of a buffer, at the end
    for step in (1, 4, 6, 11, STEPS):
        stop_at(step, path, configs)
        seen: list[int] = []
        (resumed,) = train(
            configs,
            harvest(),
            run_file=RunFile(path=path, resume=True),
            on_step=lambda done, reports, seen=seen: seen.append(done),
        )
        assert_same(weights(resumed), weights(whole))
        assert seen == list(range(step + 1, STEPS + 1))
        assert resumed.cfg == whole.cfg
        path.unlink()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_so_does_every_kind_of_run(changes, path):
    configs = [config(**changes)]
    (whole,) = train(configs, harvest(FIRST, SECOND))
    for step in (1, 7, 12):  # among them the middle of a pool, and the second phase
        stop_at(step, path, configs, harvest(FIRST, SECOND))
        (resumed,) = train(configs, harvest(FIRST, SECOND), run_file=RunFile(path=path, resume=True))
        assert_same(weights(resumed), weights(whole))
        assert resumed.cfg == whole.cfg
        path.unlink()


@pytest.mark.parametrize("auxiliary", [ZIPF, DEAD_ONLY, None], ids=str)
def test_several_saes_on_several_sites_go_on_together(auxiliary, path):
    changes = {"auxiliary": auxiliary, "equal_norms": auxiliary == DEAD_ONLY}
    rules = dict(zip((FIRST, SECOND), (MutualChoice(2), FeatureChoice(3, exponent=1.0)), strict=True))
    configs = [config(site=site, rule=rule, **changes) for site, rule in rules.items()]
    configs.append(config(n_features=30, learning_rate=3e-3, **changes))
    whole = train(configs, harvest(FIRST, SECOND))
    for step in (2, 7, 13):  # a run that stops again and again
        stop_at(step, path, configs, harvest(FIRST, SECOND), resume=path.exists())
    resumed = train(configs, harvest(FIRST, SECOND), run_file=RunFile(path=path, resume=True))
    for left, right in zip(resumed, whole, strict=True):
        assert_same(weights(left), weights(right))


@pytest.mark.parametrize("cut, every, saved", [(5, 2, 4), (6, 3, 3), (13, 4, 12), (14, 5, 10)])
def test_a_run_that_had_no_time_to_save_goes_on_from_the_last_saved_step(path, cut, every, saved):
    configs, source = (
        [config(rule=MutualChoice(3))],
        TensorSource(
            site=FIRST,
            vectors=torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(3)),
            buffer_tokens=4 * BATCH,
        ),
    )
    (whole,) = train(configs, source)
    with pytest.raises(PowerCut):
        train(configs, source, run_file=RunFile(path=path, every=every), on_step=cut_at(cut))
    assert metadata_of(path)["step"] == saved
    (resumed,) = train(configs, source, run_file=RunFile(path=path, resume=True))
    assert_same(weights(resumed), weights(whole))
    assert not list(path.parent.glob("*.part"))


def test_a_finished_run_is_kept_until_its_saes_are_in_a_safe_place(path):
    configs = [config(rule=MutualChoice(3))]
    (whole,) = train(configs, harvest(), run_file=RunFile(path=path))
    assert metadata_of(path)["step"] == STEPS
    steps: list[int] = []
    (again,) = train(
        configs,
        harvest(),
        run_file=RunFile(path=path, resume=True),
        on_step=lambda step, reports: steps.append(step),
    )
    assert_same(weights(again), weights(whole))
    assert steps == []


def test_keeping_a_run_does_not_change_it(path):
    (plain,) = train([config()], harvest())
    (kept,) = train([config()], harvest(), run_file=RunFile(path=path, every=1))
    assert_same(weights(plain), weights(kept))


def test_going_on_reads_no_more_than_one_buffer_again(path):
    sources = [harvest() for _ in range(3)]
    configs = [config()]
    train(configs, sources[0])
    stop_at(13, path, configs, sources[1])
    train(configs, sources[2], run_file=RunFile(path=path, resume=True))
    whole, before, after = (source.target.model.rows_read for source in sources)
    one_buffer = 4 * BATCH // 11 + 2 * 5  # 11 tokens of each row count, 5 rows to a read
    assert before + after <= whole + one_buffer
    assert after < whole / 2


def test_all_that_a_state_holds_is_saved(path):
    """Whoever gives TrainState or RunningDensity a new field has to say here how it comes back."""
    assert {field.name for field in fields(TrainState)} == {
        "config", "sae", "extra", "optimizer", "density", "demand", "rule", "in_force", "ranks", "pooled",
        "input_scale", "output_scale", "input_centre", "step",
    }  # fmt: skip
    assert {field.name for field in fields(RunningDensity)} == {"average", "tokens_since_fired", "weight", "horizon"}
    settings = config(rule=FeatureChoice(3, exponent=1.0))
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0))
    state = TrainState.start(settings, x)
    for _ in range(4):
        train_step(state, x)
    saved_run.save_run(path, [state], Place(epoch=2, read=3), {"rows": 37})
    (back,), place = saved_run.load_run(path, [settings], [state.sae.cfg], {"rows": 37})
    assert place == Place(epoch=2, read=3)
    assert (back.input_scale, back.step, back.config) == (state.input_scale, 4, settings)
    assert (back.density.weight, back.density.horizon) == (state.density.weight, state.density.horizon)
    assert torch.equal(back.density.average, state.density.average)
    assert torch.equal(back.density.tokens_since_fired, state.density.tokens_since_fired)
    assert torch.equal(back.sae.rule.ranks, state.sae.rule.ranks)
    assert_same(weights(back.sae), weights(state.sae))
    moments, theirs = (s.optimizer.state_dict()["state"] for s in (back, state))
    assert moments.keys() == theirs.keys()
    for number in moments:
        assert_same(moments[number], theirs[number])


# when to save


def test_without_a_number_of_steps_a_run_is_saved_every_five_minutes(path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    saved_at: list[int] = []
    write = keep.save_run
    monkeypatch.setattr(keep, "save_run", lambda *a: (saved_at.append(a[1][0].step), write(*a)))

    def a_minute(step: int, reports) -> None:
        now[0] += 61.0

    train([config()], harvest(), run_file=RunFile(path=path), on_step=a_minute)
    assert saved_at == [5, 10, STEPS]


def test_a_state_that_is_no_longer_finite_is_not_saved(path):
    with pytest.raises(SaekitError, match="is nan after step 4"):
        train([config(learning_rate=1e38)], harvest(), run_file=RunFile(path=path, every=4))
    assert not path.exists()


# signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_run_and_says_how_to_go_on(path, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RunStopped, match="stopped") as stopped:
        train([config()], harvest(), run_file=RunFile(path=path), on_step=kill_at(3, number))
    assert str(stopped.value) == (
        f"stopped after step 3 of 14, saved in {path}; the same command with --resume goes on from there"
    )
    assert stopped.value.signal == number
    assert metadata_of(path)["step"] == 3
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_run_that_came_to_nothing_is_not_saved_over_what_was_good(path):
    def stop(step: int, reports) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    configs = [config(learning_rate=1e38)]
    with pytest.raises(
        DataError, match=r"stopped after step 6, and not saved: the weights at .* are no numbers any more"
    ):
        train(configs, harvest(), run_file=RunFile(path=path), on_step=stop)
    assert not path.exists()


def test_a_save_now_and_then_spares_what_was_good_too(path):
    """The loss of a step is from before its update, which is what ruins the weights."""
    configs = [config(learning_rate=3e38)]
    with pytest.raises(DataError, match=r"stopped after step \d+, and not saved: the weights at .* are no numbers"):
        train(configs, harvest(), run_file=RunFile(path=path, every=1))
    assert not path.exists() or all(
        bool(tensor.isfinite().all()) for name, tensor in load_file(path).items() if "weights." in name
    )


def test_of_a_run_that_was_stopped_every_step_was_told(path, monkeypatch):
    seen = []

    def stop(state: TrainState, x: Tensor, targets: None = None, **pooled):
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(state, x, targets, **pooled)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stop)
        with pytest.raises(RunStopped):
            train([config()], harvest(), run_file=RunFile(path=path), on_step=lambda step, reports: seen.append(step))
    train(
        [config()], harvest(), run_file=RunFile(path=path, resume=True), on_step=lambda step, reports: seen.append(step)
    )
    assert seen == list(range(1, config().steps + 1))


def test_a_signal_in_the_middle_of_a_step_waits_for_its_end(path, monkeypatch):
    configs = [config(), config(n_features=30)]
    whole = train(configs, harvest())
    calls = []

    def stop_between_the_two(state: TrainState, x: Tensor, targets: None = None, **pooled):
        calls.append(state)
        if len(calls) == 5:  # the first SAE in step 3
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)  # an impatient second one changes nothing
        return train_step(state, x, targets, **pooled)

    monkeypatch.setattr(loop, "train_step", stop_between_the_two)
    with pytest.raises(RunStopped, match="after step 3 of") as stopped:
        train(configs, harvest(), run_file=RunFile(path=path))
    assert stopped.value.signal == signal.SIGINT
    resumed = train(configs, harvest(), run_file=RunFile(path=path, resume=True))
    for left, right in zip(resumed, whole, strict=True):
        assert_same(weights(left), weights(right))


def test_a_signal_while_the_model_reads_is_heard_at_once(path, monkeypatch):
    configs = [config()]
    (whole,) = train(configs, harvest())
    source = harvest()
    read = Harvest._read

    def kill_in_the_third_buffer(self, chosen: Tensor):
        if self is source and self.target.model.rows_read > 60:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, chosen)

    monkeypatch.setattr(Harvest, "_read", kill_in_the_third_buffer)
    with pytest.raises(RunStopped, match="after step 8 of"):
        train(configs, source, run_file=RunFile(path=path))
    (resumed,) = train(configs, harvest(), run_file=RunFile(path=path, resume=True))
    assert_same(weights(resumed), weights(whole))


def test_without_a_file_signals_are_not_touched():
    handlers = []
    train([config()], harvest(), on_step=lambda step, reports: handlers.append(signal.getsignal(signal.SIGTERM)))
    assert set(handlers) == {signal.getsignal(signal.SIGTERM)}


def test_another_thread_than_the_first_can_train_too(path):
    found: list[SAE] = []
    thread = threading.Thread(target=lambda: found.extend(train([config()], harvest(), run_file=RunFile(path=path))))
    thread.start()
    thread.join()
    assert len(found) == 1


def test_what_is_held_back_comes_once_and_behind_the_block():
    seen = []
    with StopSignals() as signals:
        with pytest.raises(StopRequested), signals.held_back():
            seen.append(os.kill(os.getpid(), signal.SIGTERM) or "end of block")
        with signals.held_back():
            seen.append("another")
    assert seen == ["end of block", "another"]


# refusals

CHANGES: list[dict] = [
    {"rule": TopK(2)},
    {"n_features": 25},
    {"tokens": STEPS * BATCH + 1},
    {"seed": 1},
    {"learning_rate": 2e-2},
    {"warmup": 0.2},
    {"decay": 0.2},
    {"clip": 2.0},
    {"pre_bias": "mean"},
    {"equal_norms": True},
    {"encoder_start": "unit"},
    {"bf16_screening": True},
    {"auxiliary": DEAD_ONLY},
    {"auxiliary": AuxZipf(dead_after=3)},
    {"objective": Matryoshka((0.5, 1.0))},
    {"anneal": AnnealK(9)},
    {"then": ThenFeatureChoice()},
    {"resample": Resample()},
    {"ranks_every": 4},
    {"density_horizon": 700},
    {"batch_tokens": BATCH // 2},
]


def test_every_setting_is_among_the_changes():
    about_sites = {"site", "site_out", "skip"}
    assert {name for change in CHANGES for name in change} | about_sites == {
        field.name for field in fields(TrainConfig)
    }


def refused(path: Path, configs: list[TrainConfig], source: ResumableSource) -> str:
    with pytest.raises(FileError) as error:
        train(configs, source, run_file=RunFile(path=path, resume=True))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_of_other_settings_is_refused_by_the_name_of_the_one_that_differs(path):
    stop_at(2, path, [config()])
    for change in CHANGES:
        ((name, value),) = change.items()
        before = getattr(config(), name)
        assert f"a run with {name} at layers.0:out = {before}, and this one has {value}; resume with the" in refused(
            path, [config(**change)], harvest()
        )
    assert "number of SAEs = 1, and this one has 2" in refused(path, [config(), config()], harvest())


def test_saes_at_one_site_are_told_apart(path):
    stop_at(2, path, [config(rule=TopK(4)), config(rule=TopK(8))])
    assert "a run with rule at layers.0:out = TopK(k=4), and this one has TopK(k=2)" in refused(
        path, [config(rule=TopK(2)), config(rule=TopK(8))], harvest()
    )


def other_text() -> TokenRows:
    rows = harvest().rows
    return replace(rows, ids=rows.ids.flip(0))


def other_model() -> Target:
    model = Stack()
    with torch.no_grad():
        model.layers[1].bias[0] += 1
    return Target.wrap(model)


@pytest.mark.parametrize(
    "name, change",
    [
        ("sites", lambda: {"sites": (FIRST, SECOND)}),
        ("model", lambda: {"target": Target.wrap(Stack(), name="other")}),
        ("model_checksum", lambda: {"target": other_model()}),
        ("rows", lambda: {"rows": harvest().rows.select(slice(30))}),
        ("context", lambda: {"rows": TokenRows.from_ids(harvest().rows.ids[:, :11], bos=0)}),
        ("text_checksum", lambda: {"rows": other_text()}),
        ("batch_rows", lambda: {"batch_rows": 4}),
        ("buffer_tokens", lambda: {"buffer_tokens": 300}),
        ("drop_bos", lambda: {"mask": MaskPolicy(drop_bos=False)}),
        ("max_norm", lambda: {"mask": MaskPolicy(max_norm=50.0)}),
    ],
)
def test_a_run_on_other_activations_is_refused(path, name: str, change: Callable[[], dict]):
    stop_at(2, path, [config()])
    assert f"by a run with {name} = " in refused(path, [config()], harvest(**change()))


@pytest.mark.parametrize("other", [True, False])
def test_a_run_that_began_with_another_sae_is_refused(path, other):
    first, second = (train([config(seed=seed)], harvest()) for seed in (0, 1))
    with pytest.raises(RunStopped):
        train([config()], harvest(), start=first, run_file=RunFile(path=path), on_step=kill_at(2))
    with pytest.raises(FileError, match=r"by a run with start \(1\) = "):
        train([config()], harvest(), start=second if other else None, run_file=RunFile(path=path, resume=True))
    train([config()], harvest(), start=first, run_file=RunFile(path=path, resume=True))


def test_resuming_needs_a_run_and_a_run_needs_resuming(path):
    assert refused(path, [config()], harvest()) == f"nothing to resume: there is no {path}; start without --resume"
    stop_at(2, path, [config()])
    before = path.read_bytes()
    with pytest.raises(FileError, match=r"unfinished\.safetensors holds an unfinished run; pass --resume to go on, "):
        train([config()], harvest(), run_file=RunFile(path=path))
    assert path.read_bytes() == before


def test_a_run_goes_on_where_it_is_asked_to_not_where_it_was(path):
    stop_at(2, path, [config()])
    run = metadata_of(path)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    run["saes"][0]["device"] = "cuda:7"  # as files of version 1 once said
    save_file(tensors, path, metadata={"run": json.dumps(run)})
    (sae,) = train([config()], harvest(), device="cpu", run_file=RunFile(path=path, resume=True))
    assert sae.b_dec.device.type == "cpu"


def test_a_file_that_is_damaged_or_newer_or_something_else_is_refused(path):
    stop_at(2, path, [config()])
    whole, run = path.read_bytes(), metadata_of(path)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.write_bytes(whole[: len(whole) // 2])
    assert "is not a saved run, or is damaged" in refused(path, [config()], harvest())
    save_file(tensors, path)
    assert "is not a saved run, or is damaged" in refused(path, [config()], harvest())
    save_file(tensors, path, metadata={"run": json.dumps(run | {"format_version": 99})})
    assert "has format version 99, this saekit reads up to 1; upgrade" in refused(path, [config()], harvest())


def test_a_file_that_cannot_be_written_leaves_the_one_before(path):
    stop_at(2, path, [config()])
    before = path.read_bytes()
    path.with_suffix(".part").mkdir()  # in the way
    with pytest.raises(FileError, match=r"cannot write .*; check space and rights"):
        train([config()], harvest(), run_file=RunFile(path=path, resume=True, every=1))
    assert path.read_bytes() == before


def test_a_source_that_cannot_go_back_is_refused_before_training(path):
    class Endless:
        @property
        def widths(self) -> dict[Site, int]:
            return {FIRST: WIDTH}

        def stream(self, batch_tokens: int, *, seed: int):
            generator = generator_for(seed)
            while True:
                yield {FIRST: ActivationBatch.from_vectors(torch.randn(batch_tokens, WIDTH, generator=generator))}

    assert len(train([config()], Endless())) == 1
    steps: list[int] = []
    with pytest.raises(SaekitError, match="Endless cannot say what and where it reads, so its run cannot be resumed; "):
        train([config()], Endless(), run_file=RunFile(path=path), on_step=lambda step, reports: steps.append(step))
    assert steps == []
