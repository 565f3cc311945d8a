"""The commands that do the work, in process, on a tiny model in a temporary folder."""

import json
import os
import re
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from word_model import WORDS, train_arguments
from word_model import place as place

from saekit.activations import buffer
from saekit.errors import DataError, FileError, SaekitError
from saekit.losses import AuxZipf
from saekit.sae import SAE
from saekit.selection import FeatureChoice, Threshold
from saekit.targets import Target
from saekit_cli import evaluate
from saekit_cli.main import main
from saekit_cli.output import Progress
from saekit_cli.recipe import auxiliary_of, rule_and_objective, train_configs
from saekit_cli.train import Train

METRICS = {
    "fvu", "explained_variance", "l0", "l0_p5", "l0_p95", "dead_fraction", "underused_fraction", "ce_clean", "ce_sae",
    "ce_zero", "ce_mean", "ce_recovered", "ce_recovered_mean", "kl",
}  # fmt: skip


def facts_of(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("rule", ["topk", "mutual", "feature"])
def test_train_then_eval_then_export_agree_about_the_same_sae(place, tmp_path, capsys, rule):
    out = tmp_path / "sae"
    assert main(train_arguments(place, out, "--rule", rule, "--json")) == 0
    trained = facts_of(capsys)
    assert trained.keys() >= METRICS
    assert main(["eval", str(out), "--json"]) == 0
    evaluated = facts_of(capsys)
    assert {name: evaluated[name] for name in METRICS} == {name: trained[name] for name in METRICS}
    page = tmp_path / "page.html"
    assert main(["export", str(out), "--out", str(page), "--features", "5", "--tokens", "2000", "--json"]) == 0
    exported = facts_of(capsys)
    assert exported["features_shown"] == 5
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")


def test_eval_reads_no_more_rows_than_asked_and_none_that_training_saw(place, tmp_path, capsys):
    assert main(train_arguments(place, tmp_path / "sae")) == 0
    capsys.readouterr()
    for asked, read in (("5", 5), ("100", 20)):
        assert main(["eval", str(tmp_path / "sae"), "--rows", asked, "--json"]) == 0
        assert facts_of(capsys)["predicted"] == read * 31


def test_the_training_text_is_divided_as_in_training_under_any_name(place, tmp_path, capsys, monkeypatch):
    assert main(train_arguments(place, tmp_path / "sae")) == 0
    (tmp_path / "copy.txt").write_text((place / "text.txt").read_text())
    (tmp_path / "other.txt").write_text("a few other words " * 400)
    monkeypatch.chdir(place)
    capsys.readouterr()
    predicted = []
    for text in (str(place / "text.txt"), "./text.txt", str(tmp_path / "copy.txt"), str(tmp_path / "other.txt")):
        assert main(["eval", str(tmp_path / "sae"), "--text", text, "--json"]) == 0
        predicted.append(facts_of(capsys)["predicted"])
    assert predicted[:3] == [20 * 31] * 3
    assert predicted[3] > 20 * 31  # all of another text


def test_as_many_documents_are_read_again_as_training_read(place, tmp_path, capsys):
    words = (place / "text.txt").read_text().split()
    documents = [" ".join(words[start : start + 100]) for start in range(0, len(words), 100)]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    arguments = train_arguments(place, tmp_path / "sae", "--max-documents", "30", "--json")
    arguments[2] = str(text)
    assert main(arguments) == 0
    trained = facts_of(capsys)
    assert main(["eval", str(tmp_path / "sae"), "--json"]) == 0
    assert facts_of(capsys)["ce_clean"] == trained["ce_clean"]


@pytest.mark.parametrize("rows", ["0", "-5"])
def test_no_rows_to_read_are_refused_before_a_model_is_loaded(capsys, rows):
    assert main(["eval", "nowhere", "--rows", rows]) == 1
    assert f"--rows {rows} leaves nothing to read; give 1 or more, or leave it out" in capsys.readouterr().err


def test_stability_compares_what_fires_and_without_rows_everything(place, tmp_path, capsys):
    for name, seed in (("a", "3"), ("b", "4")):
        assert main(train_arguments(place, tmp_path / name, "--seed", seed)) == 0
    capsys.readouterr()
    folders = [str(tmp_path / name) for name in "aab"]
    assert main(["stability", *folders, "--rows", "0", "--json"]) == 0
    facts = facts_of(capsys)
    assert facts["saes"] == folders
    assert facts["compared_features"] == [64, 64, 64]
    assert facts["bands"] == []
    same, *others = facts["pairs"]
    assert (same["first"], same["second"], same["shared_90"]) == (folders[0], folders[1], 1)
    assert all(pair["shared_90"] < 1 for pair in others)
    assert facts["shared_90"] == pytest.approx(sum(pair["shared_90"] for pair in facts["pairs"]) / 3)
    assert main(["stability", *folders, "--json"]) == 0
    facts = facts_of(capsys)
    # few features of so short a training fire on all rows; none that does not is compared
    fired = [band["n_features"] for band in facts["bands"]]
    assert sum(fired) == 2 * facts["compared_features"][0] + facts["compared_features"][1]
    assert main(["eval", folders[0], "--json"]) == 0
    dead = round(64 * facts_of(capsys)["dead_fraction"])
    assert facts["compared_features"][0] == 64 - dead
    assert main(["stability", *folders]) == 0
    assert "shared_70" in capsys.readouterr().out


def test_stability_refuses_what_has_nothing_to_compare(place, tmp_path, capsys):
    assert main(train_arguments(place, tmp_path / "a")) == 0
    assert main(train_arguments(place, tmp_path / "b", "--site", "layers.0")) == 0
    capsys.readouterr()
    assert main(["stability", str(tmp_path / "a")]) == 1
    assert "got 1, give at least 2 folders" in capsys.readouterr().err
    assert main(["stability", str(tmp_path / "a"), str(tmp_path / "a"), "--rows", "-1"]) == 1
    assert "rows=-1: give the number of rows to read, or 0" in capsys.readouterr().err
    assert main(["stability", str(tmp_path / "a"), str(tmp_path / "a"), "--rows", "0", "--text", "stdlib"]) == 1
    assert "--model and --text say what to read, and --rows 0 reads nothing" in capsys.readouterr().err
    assert main(["stability", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert re.search(
        r"b reads layers\.0:out of .*, .*a layers\.1:out of .*; compare SAEs of one Site", capsys.readouterr().err
    )


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(place, tmp_path, capsys):
    weights = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert main(train_arguments(place, tmp_path / name, "--seed", seed)) == 0
        weights.append(load_file(tmp_path / name / "sae_weights.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["W_enc"], weights[2]["W_enc"])


def test_several_sites_give_a_folder_each_from_one_run(place, tmp_path, capsys):
    arguments = train_arguments(place, tmp_path / "saes", "--json")
    at = arguments.index("--site")
    arguments = [*arguments[: at + 1], "layers.0", "blocks.1.hook_resid_post", *arguments[at + 2 :]]
    assert main(arguments) == 0
    facts = facts_of(capsys)
    assert len(facts["saes"]) == 2
    assert all((Path(fact["sae"]) / "cfg.json").exists() for fact in facts["saes"])


@pytest.mark.parametrize("shape", [(-1, 32), (-1,)], ids=["rows", "flat"])
def test_a_file_of_token_ids_does_for_a_text(place, tmp_path, capsys, shape):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    ids = tokenizer((place / "text.txt").read_text(), add_special_tokens=False).input_ids
    np.save(tmp_path / "ids.npy", np.array(ids[: len(ids) // 32 * 32], dtype=np.uint16).reshape(shape))
    arguments = train_arguments(place, tmp_path / "sae", "--json")
    arguments[2] = str(tmp_path / "ids.npy")
    assert main(arguments) == 0
    trained = facts_of(capsys)
    assert main(["eval", str(tmp_path / "sae"), "--json"]) == 0
    assert facts_of(capsys)["fvu"] == trained["fvu"]
    assert main(["eval", str(tmp_path / "sae"), "--text", str(place / "text.txt"), "--json"]) == 0
    assert main(["eval", str(tmp_path / "sae"), "--text", str(tmp_path / "ids.npy"), "--rows", "3", "--json"]) == 0
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert main(["export", str(tmp_path / "sae"), "--out", str(page), "--features", "5", "--tokens", "2000"]) == 0
    data = json.loads(page.read_text().split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert any(word in json.dumps(data) for word in WORDS)  # ids come back as what they read
    recorded = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]
    assert recorded["prepend_bos"] is (shape == (-1,))  # what somebody else cut opens with whatever it opens with
    if shape != (-1,):
        assert main([*arguments, "--context", "16"]) == 1
        assert "ids.npy has rows of 32; leave --context out, or give the ids as one" in capsys.readouterr().err


def test_a_rectangle_that_opens_with_bos_is_not_read_without(place, tmp_path, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    ids = np.random.default_rng(0).integers(5, 200, (80, 32))
    ids[:, 0] = tokenizer.bos_token_id
    np.save(tmp_path / "ids.npy", ids)
    arguments = train_arguments(place, tmp_path / "sae")
    arguments[2] = str(tmp_path / "ids.npy")
    assert main([*arguments, "--row-bos", "no"]) == 1
    assert "ids.npy open with BOS; leave it out, or give the ids as one flat array" in capsys.readouterr().err
    ids[:40] = tokenizer.bos_token_id  # which is masked: nothing to time for many rows
    np.save(tmp_path / "ids.npy", ids)
    assert main([*arguments, "--dry-run", "--json"]) == 0
    assert facts_of(capsys)["harvest_minutes"] >= 0


def test_no_more_is_read_of_another_text_than_is_asked_for(place, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    assert main(train_arguments(place, tmp_path / "sae")) == 0
    config = tmp_path / "sae" / "cfg.json"
    settings = json.loads(config.read_text())
    trained_on = settings["metadata"]["train_rows"] + settings["metadata"]["held_out_rows"]
    seen = []

    def endless():
        while True:
            seen.append(1)
            yield {"text": " ".join(WORDS)}

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: endless())
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "sae"), "--text", "owner/endless", "--rows", "3", "--json"]) == 0
    # the text of training is not told from another by less than itself
    assert 80 < facts_of(capsys)["tokens"] <= 3 * 31 and 0 < len(seen) <= trained_on * 32 / len(WORDS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_how_to_go_on_and_ends_like_one_that_was_not(place, tmp_path, capsys, monkeypatch, number):
    whole, out = tmp_path / "whole", tmp_path / "sae"
    unfinished = tmp_path / "sae.unfinished.safetensors"
    assert main(train_arguments(place, whole, "--rule", "mutual")) == 0
    show = Progress.to

    def kill_at_step_five(self: Progress, done: int, note: str = "") -> None:
        show(self, done, note)
        if self.label == "training" and done == 5 * 256:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "to", kill_at_step_five)
        assert main(train_arguments(place, out, "--rule", "mutual")) == 128 + number
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        f"stopped after step 5 of 16, saved in {unfinished}; the same command with --resume goes on from there"
    )
    assert not out.exists()

    assert main(train_arguments(place, out, "--rule", "mutual")) == 1
    assert f"{unfinished} holds an unfinished run; pass --resume to go on" in capsys.readouterr().err
    assert main(train_arguments(place, out, "--rule", "mutual", "--features", "65", "--resume")) == 1
    assert "n_features at layers.1:out = 64, and this one has 65; resume with" in capsys.readouterr().err

    assert main(train_arguments(place, out, "--rule", "mutual", "--resume")) == 0
    first, second = (load_file(folder / "sae_weights.safetensors") for folder in (whole, out))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "cfg.json").read_text() == (out / "cfg.json").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "sae"}


def test_a_run_is_kept_until_its_sae_is_written(place, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise FileError("cannot write the SAE")

    with monkeypatch.context() as patch:
        patch.setattr(SAE, "save", fail)
        assert main(train_arguments(place, tmp_path / "sae")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sae.unfinished.safetensors"]
    assert main(train_arguments(place, tmp_path / "sae", "--resume")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


def test_an_sae_is_there_even_if_it_cannot_be_evaluated(place, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise DataError("every token of the text is masked")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_with_progress", fail)
        assert main(train_arguments(place, tmp_path / "sae")) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == (
        f"Error: the SAE is saved in {tmp_path / 'sae'}, but cannot be evaluated: every token of the text is masked"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]
    assert main(["eval", str(tmp_path / "sae"), "--json"]) == 0
    assert facts_of(capsys)["fvu"] > 0


def test_an_ablation_that_does_no_harm_is_said_to_do_none():
    metrics = {"tokens": 10, "predicted": 9, "ce_clean": 2.0, "ce_zero": 1.9}
    assert evaluate.metric_lines(metrics).count("ablation does no harm here") == 2
    assert "ce_recovered" not in evaluate.metric_lines({"tokens": 10, "predicted": 0})


def test_a_dry_run_estimates_and_writes_nothing(place, tmp_path, capsys):
    assert main(train_arguments(place, tmp_path / "sae", "--dry-run", "--json")) == 0
    facts = facts_of(capsys)
    assert facts["weights_mb"] == pytest.approx(2 * 64 * 17 * 4 / 1e6, abs=0.1)
    assert not (tmp_path / "sae").exists()


def test_a_dry_run_times_whole_batches_with_the_auxiliary_loss_at_work(place, tmp_path, capsys, monkeypatch):
    from saekit.training import step

    taken = []

    def spy(state, vectors, targets=None, **pooled):
        report = train_step(state, vectors, targets, **pooled)
        taken.append((len(vectors), report.revived is not None))
        return report

    train_step = step.train_step
    monkeypatch.setattr(step, "train_step", spy)
    large = ["--batch-tokens", "8192", "--tokens", "819200"]
    assert main(train_arguments(place, tmp_path / "sae", *large, "--dry-run", "--json")) == 0
    assert facts_of(capsys)["training_minutes"] >= 0
    assert taken == [(8192, False), *[(8192, True)] * 3]


def test_a_dry_run_counts_the_file_of_the_unfinished_run(place, tmp_path, capsys, monkeypatch):
    wide = ["--features", "2048", "--rule", "mutual"]
    assert main(train_arguments(place, tmp_path / "sae", *wide, "--dry-run", "--json")) == 0
    said = facts_of(capsys)["disk_mb"]
    with monkeypatch.context() as patch:
        patch.setattr(SAE, "save", lambda sae, folder: None)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        assert main(train_arguments(place, tmp_path / "sae", *wide)) == 0
    run_mb = (tmp_path / "sae.unfinished.safetensors").stat().st_size / 1e6
    assert said == pytest.approx((2 * 2048 * 17 + 16) * 4 / 1e6 + 2 * run_mb, rel=0.05)


def test_flags_win_over_the_config_file(place, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("k: 3\nseed: 5\nrow_bos: no\n")
    arguments = train_arguments(place, tmp_path / "sae", "--config", str(tmp_path / "run.yaml"))
    assert main(arguments) == 0
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert (config["k"], config["metadata"]["training"]["seed"]) == (4, 5)
    assert config["metadata"]["prepend_bos"] is False  # YAML reads an unquoted no as false


@pytest.mark.parametrize("rule", ["relu", "gated", "jumprelu"])
def test_a_rule_without_a_budget_becomes_thresholds(place, tmp_path, capsys, rule):
    assert main(train_arguments(place, tmp_path / "sae", "--rule", rule, "--json")) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rule"].startswith({"relu": "ReLUL1", "gated": "Gated", "jumprelu": "JumpReLU"}[rule])
    assert isinstance(SAE.load(tmp_path / "sae").rule, Threshold)


@pytest.mark.parametrize("rule", ["topk", "mutual", "feature"])
def test_every_rule_with_a_budget_can_be_without_relu(rule):
    kept, _ = rule_and_objective(Train(rule=rule, no_relu=True))
    usual, _ = rule_and_objective(Train(rule=rule))
    assert (kept.relu, usual.relu) == (False, True)


def test_the_other_ways_to_train_reach_the_config(place, tmp_path, capsys):
    ways = ["--rule", "mutual", "--matryoshka", "--then-feature", "0.5", "--no-relu"]
    assert main(train_arguments(place, tmp_path / "sae", *ways, "--json")) == 0
    assert "Matryoshka" in json.loads(capsys.readouterr().out)["rule"]
    sae = SAE.load(tmp_path / "sae")
    assert sae.cfg.metadata["training"]["then"].startswith("ThenFeatureChoice(at=0.5")
    assert isinstance(sae.rule, Threshold) and not sae.rule.relu


def test_prefetching_trains_the_same_sae_and_training_says_what_its_time_went_into(place, tmp_path, capsys):
    with mock.patch.object(buffer, "one_ahead", wraps=buffer.one_ahead) as ahead:
        assert main(train_arguments(place, tmp_path / "plain", "--json")) == 0
        plain = facts_of(capsys)
        assert not ahead.called
        assert main(train_arguments(place, tmp_path / "ahead", "--prefetch")) == 0
        assert ahead.called
    assert plain["training_seconds"].keys() >= {"harvest", "buffer", "step", "logging", "calibration"}
    assert re.search(r"trained on [\d,]+ tokens/s: .*step \d+\.\d s", capsys.readouterr().out)
    for ours, theirs in zip(*(SAE.load(tmp_path / name).parameters() for name in ("ahead", "plain")), strict=True):
        assert torch.equal(ours, theirs)


def test_thresholds_are_fine_tuned_from_an_sae_that_is_there(place, tmp_path, capsys):
    assert main(train_arguments(place, tmp_path / "first", "--json")) == 0
    first = facts_of(capsys)
    common = [
        "train", str(place / "model"), str(place / "text.txt"), "--k", "4", "--rule", "jumprelu", "--learning-rate",
        "1e-3", "--tokens", "4096", "--batch-tokens", "256", "--held-out-rows", "20", "--json",
    ]  # fmt: skip
    assert main([*common, "--start", str(tmp_path / "first"), "--out", str(tmp_path / "tuned")]) == 0
    tuned = facts_of(capsys)
    assert main([*common, "--site", "layers.1", "--features", "64", "--out", str(tmp_path / "new")]) == 0
    new = facts_of(capsys)
    # Site and width are those of the SAE that it started from, and so is what it has learnt
    assert tuned["site"] == first["site"]
    assert tuned["fvu"] < 0.8 * new["fvu"]
    sae = SAE.load(tmp_path / "tuned")
    assert sae.n_features == 64
    assert isinstance(sae.rule, Threshold)
    assert sae.cfg.metadata["started_from"] == [str(tmp_path / "first")]


def test_starts_and_sites_must_be_equally_many(place, tmp_path, capsys):
    assert main(train_arguments(place, tmp_path / "first")) == 0
    capsys.readouterr()
    start = ["--start", str(tmp_path / "first"), str(tmp_path / "first")]
    assert main(train_arguments(place, tmp_path / "second", *start)) == 1
    assert "2 SAEs to start from for 1 Sites" in capsys.readouterr().err


def test_a_transcoder_is_trained_and_evaluated_where_it_writes(place, tmp_path, capsys):
    sites = ["--site", "layers.0.mlp:in", "--site-out", "layers.0.mlp:out", "--skip", "--json"]
    assert main(train_arguments(place, tmp_path / "sae", *sites)) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0 < facts["fvu"] < 1
    sae = SAE.load(tmp_path / "sae")
    assert sae.cfg.hook_name_out == "layers.0.mlp:out" and sae.W_skip is not None
    assert main(["eval", str(tmp_path / "sae"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fvu"] == pytest.approx(facts["fvu"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--site-out", "layers.0", "layers.1"], "2 Sites to reconstruct for 1 to read; give one"),
        (["--rule", "gated", "--matryoshka"], "goes with a rule that has a budget, not with gated; try mutual"),
        (["--rule", "relu", "--no-relu"], "--no-relu goes with a rule that has a budget, not with relu; try mutual"),
        (["--rule", "jumprelu", "--then-feature", "0.5"], "goes on from a rule that has a budget, not jumprelu"),
        (["--rule", "feature", "--offset", "3.0"], "equal budgets have none; pass --exponent too"),
        (["--exponent", "1.0"], "shapes the budgets of --rule feature, not of topk; leave it away"),
        (["--site", "layers.0", "layers.0"], "one Site is named twice"),
        (["--skip"], "skip connection from a Site to itself would explain everything"),
        (["--site", "layers.9"], "no submodule named 'layers.9'; closest"),
        (["--site", "layers.1:up"], "layers.1:up"),
        (["--k", "64"], "k=64 on 64 features would keep everything; choose k below the number of features"),
        (["--k", "0"], "give at least 1"),
        (["--tokens", "10"], "raise tokens, or lower batch_tokens"),
        (["--features", "0"], "features=0: give at least 1, or leave it out"),
        (["--context", "0"], "context=0: give at least 1 token for each row, or leave it out"),
        (["--context", "10000"], "reads at most 32 tokens; choose a context up to that"),
        (["--held-out-rows", "100000"], "fewer held-out rows"),
        (["--held-out-rows", "0"], "held_out_rows=0: the SAE is evaluated on text that it was not trained on; hold"),
        (["--rule", "feature", "--exponent", "20"], "choose a smaller exponent, a larger offset, or floor=1"),
        (["--save-every", "0"], "save_every=0: give at least 1 step, or leave it out"),
        (["--resume"], "sae.unfinished.safetensors; start without --resume"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_one_line_that_says_what_to_do(place, tmp_path, capsys, change, message):
    assert main(train_arguments(place, tmp_path / "sae", *change)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("Error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{place}/nowhere", "{place}/text.txt"], "no model folder at"),
        (["train", "{place}/model", "{place}/nothing.txt"], "no text at"),
        (["train", "{place}/model", "nothing.npy"], "no token ids at nothing.npy; give a .npy file that exists"),
        (["train", "{place}/model", "owner/no-such-data"], "cannot read data set 'owner/no-such-data'"),
        (["eval", "{place}/nowhere"], "no file or folder"),
        (["eval", "~nobody-of-that-name/sae"], "no file or folder ~nobody-of-that-name/sae"),
        (["eval", "a" * 300], "no file or folder aaa"),
        (["eval", "{place}/model"], "in no format saekit knows"),
        (["export", "{place}/nowhere"], "no file or folder"),
        (
            ["convert", "{place}/model", "{place}/new", "--text", "stdlib"],
            "--model and --text say what --calibrate reads",
        ),
        (["pretrain", "{place}/new", "--resume"], "nothing to resume"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:1]),
)
def test_what_is_not_there_is_one_line_that_says_what_to_give(place, capsys, arguments, message):
    before = sorted(place.rglob("*"))
    assert main([argument.format(place=place) for argument in arguments]) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert sorted(place.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_found_out_before_training(place, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(train_arguments(place, tmp_path / "file" / "sae")) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert "cannot write" in said[-1]
    assert not any(line.startswith("training") for line in said)


def test_a_page_that_cannot_be_written_is_found_out_before_reading(place, tmp_path, capsys):
    assert main(train_arguments(place, tmp_path / "sae")) == 0
    (tmp_path / "file").write_text("in the way")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "sae"), "--out", str(tmp_path / "file" / "page.html")]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert "cannot write" in said[-1]
    assert not any(line.startswith("reading") for line in said)


def test_a_truncated_sae_is_refused(place, tmp_path, capsys):
    assert main(train_arguments(place, tmp_path / "sae")) == 0
    weights = tmp_path / "sae" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "sae")]) == 1
    assert "is damaged or cut short" in capsys.readouterr().err


def test_an_sae_of_another_width_is_refused_by_name_and_size(place, tmp_path, capsys):
    import saekit

    sae = saekit.SAE(24, 48, saekit.TopK(2))
    sae.save(tmp_path / "sae")
    code = main(
        [
            "eval",
            str(tmp_path / "sae"),
            "--model",
            str(place / "model"),
            "--text",
            str(place / "text.txt"),
            "--site",
            "layers.1",
        ]
    )
    assert code == 1
    assert "encodes rows of 24 numbers, got" in capsys.readouterr().err


@pytest.mark.parametrize("auxiliary", ["zipf", "k"])
@pytest.mark.parametrize("rounds", [False, True])
def test_the_auxiliary_loss_is_made_as_the_command_line_asks(auxiliary, rounds):
    made = auxiliary_of(Train(auxiliary=auxiliary, bf16_auxiliary=rounds, auxiliary_sample=0.25))
    assert (made.bf16, made.sample) == (rounds, 0.25)


def test_features_may_choose_the_tokens_that_they_are_asked_about():
    assert auxiliary_of(Train()).claim == "token"
    assert auxiliary_of(Train(auxiliary_claim="feature")).claim == "feature"


def test_rounding_a_loss_that_there_is_not_is_refused():
    assert auxiliary_of(Train(auxiliary="none")) is None
    with pytest.raises(SaekitError, match=r"--bf16-auxiliary is .* --auxiliary none leaves out; leave one"):
        auxiliary_of(Train(auxiliary="none", bf16_auxiliary=True))
    with pytest.raises(SaekitError, match=r"--auxiliary-claim is .* --auxiliary none leaves out; leave one"):
        auxiliary_of(Train(auxiliary="none", auxiliary_claim="feature"))
    with pytest.raises(SaekitError, match=r"--auxiliary-claim feature is about --auxiliary zipf; leave one"):
        auxiliary_of(Train(auxiliary="k", auxiliary_claim="feature"))
    with pytest.raises(SaekitError, match=r"--auxiliary-sample is .* --auxiliary none leaves out; leave one"):
        auxiliary_of(Train(auxiliary="none", auxiliary_sample=0.5))
    with pytest.raises(
        SaekitError, match=r"--auxiliary-claim feature has nothing for --bf16-auxiliary to round; leave"
    ):
        auxiliary_of(Train(auxiliary_claim="feature", bf16_auxiliary=True))
    with pytest.raises(SaekitError, match=r"has no dense product to round; leave bf16 or the claim away"):
        AuxZipf(claim="feature", bf16=True)


@pytest.mark.parametrize("screens", [False, True])
def test_screening_is_on_where_the_command_line_asks_for_it(screens):
    command = Train(site=("layers.2",), bf16_screening=screens)
    (config,) = train_configs(command, Target.load("pystd"))
    assert config.bf16_screening == screens


def test_the_curve_of_feature_choice_is_the_one_asked_for():
    command = Train(site=("layers.2",), rule="feature", exponent=0.9, offset=3.0, features=512, k=8)
    (config,) = train_configs(command, Target.load("pystd"))
    assert config.rule == FeatureChoice(8, exponent=0.9, offset=3.0)
