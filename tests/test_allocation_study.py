"""The harness of the allocation study: every run can be configured, rows are whole, and a red suite stops it."""

import csv
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.allocation import batch_mode, datasets, grids, measure, plots, results, runs, side_study, study, tables
from benchmarks.allocation import surprisal as surprisal_of
from benchmarks.allocation.by_peer import train_by_peer
from benchmarks.allocation.recorded import Recording
from saekit.activations.synthetic import SyntheticConfig, SyntheticSource, synthetic_truth
from saekit.errors import DataError, FileError, SaekitError
from saekit.losses import fvu
from saekit.sae import SAE
from saekit.selection import FeatureChoice, MutualChoice, Threshold, TopK
from saekit.training import loop

RUN = runs.Run(dataset="synthetic_outliers", rule="feature_zipf+aux_zipf", expansion=2, k=4, seed=0, tokens=4096)


NOWHERE = Path("no-such-environment") / "python"


def options_for(shared: Path) -> Namespace:
    return Namespace(shared=shared, peer_python=NOWHERE)


@pytest.fixture
def _small(monkeypatch):
    truth = SyntheticConfig(d_model=16, n_features=40, l0=3.0, children=0.3)
    outliers = replace(truth, outlier_dims=1)
    monkeypatch.setattr(datasets, "TRUTHS", {"synthetic": (truth, "median"), "synthetic_outliers": (outliers, "zero")})
    monkeypatch.setattr(datasets, "HELD_OUT_ROWS", 9)
    monkeypatch.setattr(loop, "SAMPLE_TOKENS", 2048)
    monkeypatch.setattr(loop, "CALIBRATION_TOKENS", 8192)


# the list


@pytest.mark.parametrize("d_model", [64, 256])
def test_every_run_of_the_list_can_be_configured_and_differs_from_the_others_in_what_it_says(d_model):
    for run in [*grids.everything(), *grids.quick()]:
        setting = runs.Setting(run=run, site=datasets.Site("x"), d_model=d_model, pre_bias="zero")
        config = runs.RULES[run.rule](setting)
        assert (getattr(config.rule, "k", None) or config.objective.k) == run.k
        assert (config.n_features, config.tokens, config.seed) == (run.expansion * d_model, run.tokens, run.seed)
        assert config.pre_bias == "zero"
        assert (config.auxiliary is None) == (run.rule in ("topk", "mutual"))
    assert max(Counter(grids.everything()).values()) == 1


def test_rules_of_one_table_share_width_batch_and_learning_rate():
    run = replace(RUN, dataset="pystd", expansion=64, k=8, tokens=500_000)
    setting = runs.Setting(run=run, site=datasets.Site("x"), d_model=256, pre_bias="median")
    configs = [make(setting) for make in runs.RULES.values()]
    assert len({(c.n_features, c.batch_tokens, c.peak_lr, c.tokens, c.seed) for c in configs}) == 1
    assert configs[0].batch_tokens * run.k >= 2 * configs[0].n_features
    doubled = replace(setting, run=replace(run, lr_scale=2.0))
    assert runs.RULES["topk"](doubled).peak_lr == 2 * configs[0].peak_lr


def test_seeds_are_outermost():
    seeds = [run.seed for run in grids.full()]
    assert seeds == sorted(seeds)


def test_the_list_asks_for_every_row_that_is_committed():
    """So that whoever has no results gets all of these by one command."""
    rows = results.read(Path(results.__file__).parent / "results.csv")
    listed = {tuple(map(str, asdict(run).values())) for run in grids.everything()}
    assert rows
    assert {
        (r["dataset"], r["rule"], r["expansion"], r["k"], r["seed"], r["tokens"], str(float(r["lr_scale"])))
        for r in rows
    } <= listed


def test_a_grid_of_ones_own_is_the_table_but_for_what_is_said(monkeypatch):
    def asked(*arguments: str) -> list[runs.Run]:
        monkeypatch.setattr(sys, "argv", ["study", *arguments])
        return list(study.listed(study.parse()))

    assert asked() == grids.everything()
    assert asked("--seeds", "7") == list(grids.full(seeds=[7]))
    assert {run.lr_scale for run in asked("--rules", "topk", "--lr-scales", "2")} == {2.0}


def test_a_curve_is_fitted_where_mutual_choice_was_measured_and_refused_elsewhere():
    run = replace(RUN, rule="feature_fitted+aux_zipf", dataset="stories260K", expansion=16, k=32)
    setting = runs.Setting(run=run, site=datasets.Site("x"), d_model=64, pre_bias="zero")
    assert runs.fitted(setting).exponent == 0.8
    with pytest.raises(SaekitError, match="no curve is fitted to stories260K at 2x, k = 4"):
        runs.fitted(replace(setting, run=replace(run, expansion=2, k=4)))


# a run


@pytest.mark.usefixtures("_small")
def test_a_run_fills_the_columns_that_apply_to_it(tmp_path):
    row = measure.measure(RUN, shared=tmp_path, peer_python=NOWHERE, recordings=tmp_path)
    assert set(row) <= set(results.COLUMNS)
    for name in ("batch_mode_fvu", "inference_l0_p95", "truth_f1", "truth_recovered_band_4", "train_cpu_s_per_mtok"):
        assert isinstance(row[name], float), name
    assert row["batch_tokens"] == 2048
    # 2,304 held-out tokens are one batch as large as in training and a rest that would be another rule
    assert row["batch_mode_tokens"] == row["inference_tokens"] == 2048
    assert row["truth_n_tokens"] > 0
    assert "batch_mode_ce_clean" not in row
    assert row["batch_mode_l0"] <= RUN.k
    assert row["batch_mode_l0_true_l0_corr"] == pytest.approx(row["batch_mode_l0_true_l0_corr"])
    results.append(tmp_path / "r.csv", row)
    assert results.done(tmp_path / "r.csv") == {results.key_of(RUN, str(row["fingerprint"]))}


@pytest.mark.usefixtures("_small")
def test_a_rule_whose_budgets_need_several_batches_is_evaluated_on_as_many_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SMALLEST_BATCH", 256)
    row = measure.measure(replace(RUN, expansion=16), shared=tmp_path, peer_python=NOWHERE, recordings=tmp_path)
    assert row["batch_tokens"] == 256
    assert row["batch_mode_tokens"] == 8 * 256  # the ninth row alone is half of a pool


@pytest.mark.parametrize(("batch_rows", "predicted"), [(1, 64), (16, 64), (48, 48), (64, 64), (80, 80)])
def test_next_tokens_are_predicted_on_whole_batches_alone(batch_rows, predicted):
    assert measure.rows_to_predict(batch_rows) == predicted


@pytest.mark.usefixtures("_small")
def test_the_batch_rule_grants_every_feature_what_training_granted_it_last(monkeypatch):
    last = {}

    def spy(configs, source, *, on_step):
        def both(step, reports):
            last["granted"] = torch.bincount(reports[0].codes.features, minlength=configs[0].n_features)
            on_step(step, reports)

        return loop.train(configs, source, on_step=both)

    monkeypatch.setattr(measure, "train", spy)
    # far off centre some features never fire, so that ranks move
    dataset = datasets.open_dataset("synthetic_outliers", shared=Path())
    run = replace(RUN, tokens=2048 * 5)
    sae, rule = measure.train_one(replace(measure.config_of(run, dataset), ranks_every=2), dataset.source)
    assert isinstance(rule, FeatureChoice)
    assert isinstance(sae.rule, Threshold)
    assert torch.equal(rule.feature_budgets(2048, 32, torch.device("cpu")), last["granted"])
    # and not in the order of the features, as without ranks
    assert not torch.equal(last["granted"], rule.budgets(2048, 32))


@pytest.mark.usefixtures("_small")
def test_a_rule_that_decides_token_by_token_has_one_mode(tmp_path):
    row = measure.measure(replace(RUN, rule="topk"), shared=tmp_path, peer_python=NOWHERE, recordings=tmp_path)
    modes = [{k.partition("_l0")[2]: v for k, v in row.items() if k.startswith(mode)} for mode in ("batch_mode", "inf")]
    assert modes[0] == modes[1]
    assert row["inference_l0_error_corr"] is None or row["inference_l0"] < RUN.k


def test_rank_correlation_sees_order_alone_and_nothing_where_there_is_none():
    x = torch.tensor([1.0, 2, 3, torch.nan, 4])
    assert measure.rank_correlation(x, x.exp()) == pytest.approx(1)
    assert measure.rank_correlation(x, -(x**3)) == pytest.approx(-1)
    assert measure.rank_correlation(x, torch.ones(5)) is None
    assert measure.rank_correlation(x, torch.full((5,), torch.nan)) is None


def test_a_correlation_within_kinds_is_not_the_one_over_all_tokens():
    generator = torch.Generator().manual_seed(0)
    surprisal = torch.rand(2000, generator=generator).double()
    kind = torch.arange(2000) % 2
    # within a kind more features where it is more surprising, but the surprising kind gets few
    tokens = surprisal_of.Read(
        l0=surprisal - 10 * kind, surprisal=surprisal + kind, norm=surprisal, token=kind, begins_word=kind == 1
    )
    assert surprisal_of.within(torch.zeros(2000), tokens) < -0.4
    assert surprisal_of.within(kind, tokens) == pytest.approx(1)
    alone = torch.where(torch.arange(2000) < 10, 2, kind)  # too few to count
    assert surprisal_of.within(alone, tokens) == pytest.approx(1)
    told = surprisal_of.describe(tokens)
    assert told["... within one entry of the vocabulary"] == pytest.approx(1)
    assert told["pieces that begin a word: mean L0"] < told["pieces inside: mean L0"]
    assert told["pieces inside: share of tokens"] == 0.5


def test_fvu_is_of_all_tokens_while_the_rule_sees_a_batch_at_a_time():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=generator) * torch.rand(60, 1, generator=generator).sort(dim=0).values
    sae = SAE(8, 24, TopK(2))
    parts = x.split(20)
    with torch.no_grad():
        assert batch_mode.fvu_of(sae, parts) == pytest.approx(float(fvu(x, sae(x))))
        together = sae.with_rule(MutualChoice(2))
        one_by_one = torch.cat([together(part) for part in parts])
        assert batch_mode.fvu_of(together, parts) == pytest.approx(float(fvu(x, one_by_one)))
        assert batch_mode.fvu_of(together, parts) != pytest.approx(batch_mode.fvu_of(together, [x]))


def test_a_small_study_writes_its_page_or_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study", "--datasets", "pystd", "--seeds", "3", "--out", str(tmp_path / "p.md")])

    def page(columns: side_study.Columns, options: Namespace) -> str:
        return f"{columns} {side_study.command('surprisal', options)}"

    measured = {"pystd": [{"fvu": 0.5}]}
    assert side_study.run("What for.", "unused.md", lambda options: measured, page) == 0
    written = (tmp_path / "p.md").read_text()
    assert written == f"{measured} python -m benchmarks.allocation.surprisal --datasets pystd"
    assert capsys.readouterr().out.strip() == written

    def fail(options: Namespace) -> side_study.Columns:
        raise DataError(f"nothing for seeds {options.seeds}")

    assert side_study.run("What for.", "unused.md", fail, page) == 1
    assert capsys.readouterr().err == "Error: nothing for seeds [3]\n"


@pytest.mark.usefixtures("_small")
def test_batch_mode_is_measured_in_every_way_that_its_page_names(monkeypatch):
    dataset = datasets.open_dataset("synthetic", shared=Path())
    monkeypatch.setattr(batch_mode, "open_dataset", lambda name, shared: dataset)
    options = Namespace(shared=Path(), tokens=4096, k=2, seeds=[0, 1], datasets=["stories260K"])
    columns = {"one": [batch_mode.numbers_of("stories260K", batch_mode.RULES[0], seed, options) for seed in (0, 1)]}
    told = batch_mode.page(columns, options)
    assert told.count("\n| ") == 8 and "batch_mode --datasets stories260K`" in told and "seeds 0, 1." in told
    assert all(0 < number < 2 for seed in columns["one"] for number in seed.values())


def test_timing_a_source_leaves_its_batches_alone():
    source = SyntheticSource(truth=synthetic_truth(SyntheticConfig(d_model=8, n_features=9, l0=1.0)))
    timed = measure.TimedSource(source)
    assert timed.widths == source.widths
    got, wanted = (next(s.stream(100, seed=1))[source.site].vectors for s in (timed, source))
    assert torch.equal(got, wanted)
    assert timed.seconds > 0


def test_a_recording_is_the_stream_and_is_made_once(tmp_path):
    source = SyntheticSource(truth=synthetic_truth(SyntheticConfig(d_model=8, n_features=9, l0=1.0)))
    path = tmp_path / "deep" / "r.f32"

    def recording() -> Recording:
        return Recording.of(source, source.site, tokens=250, batch_tokens=100, seed=1, path=path)

    first = recording()
    made = path.stat().st_mtime_ns
    again = recording()
    assert (path.stat().st_mtime_ns, first.tokens, again.widths) == (made, 300, source.widths)
    assert again.cpu_s_per_mtok == first.cpu_s_per_mtok > 0
    wanted = source.stream(100, seed=1)
    stream = again.stream(100, seed=1)
    for _ in range(3):
        assert torch.equal(next(stream)[source.site].vectors, next(wanted)[source.site].vectors)
    with pytest.raises(SaekitError, match="holds 300 tokens and more are asked for"):
        next(stream)
    with pytest.raises(SaekitError, match="holds batches of 100 tokens, seed 1; asked for 100, seed 2"):
        next(again.stream(100, seed=2))
    assert sorted(p.name for p in path.parent.iterdir()) == ["r.f32", "r.json"]


def test_activations_of_other_data_sets_are_dropped(tmp_path):
    for name in ("synthetic-a.f32", "synthetic-a.json", "synthetic_outliers-b.f32"):
        (tmp_path / name).touch()
    study.keep_only(tmp_path, "synthetic-")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["synthetic-a.f32", "synthetic-a.json"]


@pytest.mark.usefixtures("_small")
def test_a_table_of_activations_is_read_at_its_site():
    dataset = datasets.open_dataset("synthetic", shared=Path())
    vectors = dataset.target.read(dataset.rows.ids[:2], [dataset.site])[dataset.site]
    truth = dataset.truth
    wanted = next(truth.stream(512, seed=datasets.HELD_OUT_SEED))[truth.site].vectors
    assert torch.equal(vectors.flatten(0, 1), wanted)


def test_a_data_set_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SaekitError, match=r"there is no stories260K in .*; pass --shared"):
        datasets.open_dataset("stories260K", shared=tmp_path)
    with pytest.raises(SaekitError, match="no data set named 'pile'"):
        datasets.open_dataset("pile", shared=tmp_path)


# the table


def test_rows_are_added_whole_and_known_again(tmp_path):
    path = tmp_path / "deep" / "r.csv"
    assert results.done(path) == set()
    for seed in (0, 1):
        run = replace(RUN, seed=seed, lr_scale=0.5)
        row = {**{f: getattr(run, f) for f in runs.Run.__dataclass_fields__}, "fingerprint": "ab", "truth_f1": 0.25}
        results.append(path, row | {"truth_absorbed": float("nan")})
        assert results.key_of(run, "ab") in results.done(path)
        assert results.key_of(run, "other") not in results.done(path)
    assert results.key_of(replace(RUN, seed=0), "ab") not in results.done(path)
    rows = results.read(path)
    assert [row["seed"] for row in rows] == ["0", "1"]
    assert (rows[0]["truth_f1"], rows[0]["truth_absorbed"], rows[0]["batch_mode_fvu"]) == ("0.25", "", "")
    assert [p.name for p in path.parent.iterdir()] == ["r.csv"]


def test_two_studies_that_end_at_once_lose_no_row_and_write_none_twice(tmp_path):
    path = tmp_path / "r.csv"

    def add(number: int) -> None:
        for seed in range(number * 20, number * 20 + 21):  # the last is the next one's first, too
            results.append(path, asdict(replace(RUN, seed=seed)) | {"fingerprint": "1"})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert sorted(int(row["seed"]) for row in results.read(path)) == list(range(81))


def test_tables_leave_out_rows_of_an_older_model():
    def row(dataset: str, fingerprint: str, finished: str) -> dict[str, str]:
        return {"dataset": dataset, "fingerprint": fingerprint, "finished": finished}

    old, new, other = row("pystd", "1", "2026-01-01"), row("pystd", "2", "2026-02-01"), row("synthetic", "1", "2025")
    assert results.current([old, new, other]) == [new, other]


@pytest.mark.usefixtures("_small")
def test_budgets_that_need_more_tokens_than_are_held_out_are_refused_before_training(monkeypatch):
    dataset = datasets.open_dataset("synthetic_outliers", shared=Path())
    monkeypatch.setattr(runs, "SMALLEST_BATCH", 2048)
    measure.config_of(RUN, dataset)
    monkeypatch.setattr(runs, "SMALLEST_BATCH", 4096)
    with pytest.raises(SaekitError, match="budgets are shared over 4,096 tokens, and 2,304 are held out"):
        measure.config_of(RUN, dataset)


def test_no_number_is_lost_to_a_table_without_its_column(tmp_path):
    path = tmp_path / "r.csv"
    with pytest.raises(FileError, match="has no column for speed"):
        results.append(path, {"speed": 3})
    with path.open("w", newline="") as file:
        csv.writer(file).writerow(["dataset", "speed"])
    with pytest.raises(FileError, match="has other columns than this study writes"):
        results.read(path)


@pytest.mark.usefixtures("_small")
def test_a_peer_that_cannot_train_says_why(tmp_path):
    dataset = datasets.open_dataset("synthetic", shared=tmp_path)
    run = replace(RUN, dataset="synthetic", rule=runs.BY_PEER[0])
    # this interpreter has no dictionary_learning
    with pytest.raises(SaekitError, match="No module named 'dictionary_learning'"):
        train_by_peer(run, measure.config_of(run, dataset), dataset.source, python=Path(sys.executable))


@pytest.mark.interop
@pytest.mark.usefixtures("_small")
def test_a_peer_trains_on_the_same_vectors_and_is_measured_alike(tmp_path):
    run = replace(RUN, dataset="synthetic", rule=runs.BY_PEER[0], tokens=100_000)
    row = measure.measure(run, shared=tmp_path, peer_python=study.PEER_PYTHON, recordings=tmp_path)
    assert row["inference_l0"] == pytest.approx(run.k, rel=0.15)
    assert row["batch_mode_l0"] == pytest.approx(run.k, rel=1e-6)
    assert 0 < row["inference_fvu"] < 0.5
    assert row["train_cpu_s_per_mtok"] > 0
    assert row["peak_mb"] is None or row["peak_mb"] > row["start_mb"]


@pytest.mark.interop
@pytest.mark.usefixtures("_small")
def test_a_peer_trains_at_the_rate_that_its_row_names(tmp_path):
    dataset = datasets.open_dataset("synthetic", shared=tmp_path)
    run = replace(RUN, dataset="synthetic", rule=runs.BY_PEER[0], tokens=50_000)
    still = replace(measure.config_of(run, dataset), learning_rate=1e-12)
    moving = measure.config_of(run, dataset)
    first, second = (
        train_by_peer(run, config, dataset.source, python=study.PEER_PYTHON).sae for config in (still, moving)
    )
    # trained at no rate to speak of, the encoder is the decoder's copy that the peer starts from
    assert torch.allclose(first.encoder, first.decoder, atol=1e-4)
    assert not torch.allclose(second.encoder, second.decoder, atol=1e-2)


# the study


@pytest.mark.usefixtures("_small")
def test_what_is_done_is_not_done_again_and_what_cannot_be_is_named(tmp_path, capsys):
    dataset = datasets.open_dataset("synthetic", shared=tmp_path)
    first, second = replace(RUN, dataset="synthetic"), replace(RUN, dataset="synthetic", seed=1)
    absent, impossible = replace(RUN, dataset="stories260K"), replace(RUN, dataset="synthetic", tokens=100)
    done = {results.key_of(first, dataset.fingerprint)}
    by_peer = replace(first, rule=runs.BY_PEER[0])
    wanted = [first, absent, second, impossible, by_peer]
    assert list(study.to_do(wanted, done, options_for(tmp_path))) == [second]
    said = capsys.readouterr().err
    assert f"without {by_peer.rule}: there is no {NOWHERE}" in said
    assert "without stories260K: there is no stories260K" in said
    assert "tokens=100 is less than one batch" in said


@pytest.mark.usefixtures("_small")
def test_the_study_refuses_to_run_on_red_tests(tmp_path, monkeypatch, capsys):
    out = tmp_path / "r.csv"
    arguments = ["study", "--out", str(out), "--datasets", "synthetic", "--rules", "topk", "--seeds", "0", "--ks", "8"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--expansions", "16"])
    ran, new = [], {"dataset": "x", "fingerprint": "new", "finished": "2026-02-01"}
    monkeypatch.setattr(study, "in_own_process", lambda run, shared, peer, recordings: ran.append(run) or new)
    monkeypatch.setattr(study, "TESTS", ("that_is_not_there",))
    assert study.main() == 1
    assert (ran, out.exists()) == ([], False)
    assert "the tests are red" in capsys.readouterr().err
    monkeypatch.setattr(study, "tests_pass", lambda names: True)
    monkeypatch.setattr(study.plots, "write_all", lambda rows, folder: [])
    shown = []
    monkeypatch.setattr(study.tables, "write", lambda rows, path: shown.extend(rows))
    older = {"dataset": "x", "fingerprint": "of an older model", "finished": "2026-01-01"}
    results.append(out, older)
    assert study.main() == 0
    assert len(ran) == 1
    assert len(results.read(out)) == 2
    assert [row["fingerprint"] for row in shown] == ["new"]


@pytest.mark.parametrize(
    "error, said", [(DataError("the loss is nan"), "the loss is nan"), (BrokenProcessPool(), "killed")]
)
def test_a_run_that_fails_leaves_no_row_and_does_not_stop_the_others(tmp_path, monkeypatch, capsys, error, said):
    def fail(run, shared, peer, recordings):
        raise error

    monkeypatch.setattr(study, "in_own_process", fail)
    assert not study.finish(RUN, 1, 2, tmp_path / "r.csv", options_for(tmp_path), tmp_path)
    assert results.read(tmp_path / "r.csv") == []
    assert said in capsys.readouterr().err


STUDY_ON_GREEN_TESTS = """
import sys
from benchmarks.allocation import study
study.tests_pass = lambda names: True
if __name__ == "__main__":
    sys.exit(study.main())
"""


def test_a_study_that_is_told_to_stop_ends_its_run_and_leaves_no_activations(tmp_path):
    script, temporary = tmp_path / "study.py", tmp_path / "temporary"
    script.write_text(STUDY_ON_GREEN_TESTS)
    temporary.mkdir()
    one = ["--datasets", "synthetic", "--rules", "topk", "--seeds", "0", "--ks", "8", "--expansions", "16"]
    started = subprocess.Popen(
        [sys.executable, script, *one, "--tokens", "10000000", "--out", tmp_path / "r.csv"],
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(study.REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )
    with started:
        while not list(temporary.glob("activations-*/*")):  # the run's own process has begun to record
            assert started.poll() is None
            time.sleep(0.1)
        started.terminate()
        _, said = started.communicate(timeout=60)
    assert started.returncode == 128 + signal.SIGTERM
    assert "stopped; what was finished is in" in said
    assert list(temporary.glob("activations-*")) == []


def test_plots_show_every_run_of_the_columns_that_are_there(tmp_path):
    empty = dict.fromkeys(results.COLUMNS, "")
    row = {"dataset": "pystd", "expansion": "16", "k": "8", "seed": "0", "lr_scale": "1", "tokens": "9"}
    rows = [empty | row | {"rule": rule, "inference_fvu": str(fvu)} for rule, fvu in (("topk", 0.1), ("mutual", 0.2))]
    written = plots.write_all(rows, tmp_path / "plots")
    assert [path.name for path in written] == ["fvu.html"]
    figure = plots.figure_of(rows, "inference_fvu", "fvu", logarithmic=True)
    assert list(figure.data[0].x) == [0.1, 0.2]
    assert list(figure.data[0].y) == ["topk", "mutual"]
    assert "cdn" not in written[0].read_text()[:2000]
    longer = plots.figure_of([*rows, rows[0] | {"tokens": "1000"}], "inference_fvu", "fvu", logarithmic=True)
    assert [title.text for title in longer.layout.annotations] == [
        "pystd, 16x, k=8, 9 tokens",
        "pystd, 16x, k=8, 1,000 tokens",
    ]
    assert list(longer.data[1].x) == [0.1]


def test_tables_give_means_over_seeds_with_their_spread_and_leave_out_what_nobody_has(tmp_path):
    empty = dict.fromkeys(results.COLUMNS, "") | {"dataset": "pystd", "expansion": "16", "k": "8", "tokens": "1000"}
    empty |= {"n_features": "4096", "lr_scale": "1"}
    runs_of = (("topk", "1", "0.1"), ("topk", "1", "0.3"), ("mutual", "1", "0.15"), ("mutual", "2", "0.5"))
    rows = [
        empty | {"rule": rule, "lr_scale": lr_scale, "inference_fvu": fvu, "inference_dead_fraction": "0.0125"}
        for rule, lr_scale, fvu in runs_of
    ]
    tables.write(rows, tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text()
    assert "## pystd, 4,096 features (16x), k = 8, 1,000 tokens" in text
    begin = text.splitlines().index("| rule | pystd 16x k=8 |")
    assert text.splitlines()[begin + 2 : begin + 4] == ["| topk | 1.00 |", "| mutual | 0.75* |"]
    assert text.splitlines()[-5:] == [
        "| rule | seeds | FVU | dead % |",
        "|---|---|---|---|",
        "| topk | 2 | 0.2000 (0.1000 to 0.3000) | 1.25 |",
        "| mutual | 1 | 0.1500 | 1.25 |",
        "| mutual x2 | 1 | 0.5000 | 1.25 |",
    ]
    tables.write([*rows, rows[0] | {"tokens": "5000"}], tmp_path / "r.md")
    assert "| rule | pystd 16x k=8 1,000 tokens | pystd 16x k=8 5,000 tokens |" in (tmp_path / "r.md").read_text()


def test_learning_rates_are_compared_on_the_seeds_that_all_of_a_rule_have(tmp_path):
    empty = dict.fromkeys(results.COLUMNS, "") | {"dataset": "pystd", "expansion": "16", "k": "8", "tokens": "1000"}
    empty |= {"n_features": "4096"}
    runs_of = [
        ("topk", "0.5", "0", "0.3", "0.01"),
        ("topk", "1", "0", "0.2", "0.02"),
        ("topk", "1", "1", "0.9", "0.9"),
        ("mutual", "1", "0", "0.4", "0"),
        ("mutual", "2", "0", "0.1", "0.5"),
        ("gated", "1", "0", "0.1", "0"),
    ]
    names = ("rule", "lr_scale", "seed", "inference_fvu", "inference_dead_fraction")
    rows = [empty | dict(zip(names, run, strict=True)) for run in runs_of]
    tables.write(rows, tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text().splitlines()
    begin = text.index("## Learning rates: pystd, 4,096 features (16x), k = 8, 1,000 tokens")
    assert text[begin + 4 : begin + 8] == [
        "| rule | seeds | x0.5 | x1 | x2 |",
        "|---|---|---|---|---|",
        "| topk | 1 | 0.3000, 1.0% | **0.2000**, 2.0% |  |",
        "| mutual | 1 |  | 0.4000, 0.0% | **0.1000**, 50.0% |",
    ]
    assert text[begin + 8] == ""  # a rule of one rate has nothing to compare
    tables.write([row for row in rows if row["lr_scale"] == "1"], tmp_path / "r.md")
    assert "Learning rates" not in (tmp_path / "r.md").read_text()
