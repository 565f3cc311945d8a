"""Crosscoders from the command line: trained, gone on with, measured, described, refused where one Site is needed."""

import json
import re

import pytest
import torch
from hub_server import TOKEN
from word_model import place as place
from word_model import train_arguments

import saekit
from saekit.crosscoder import Crosscoder
from saekit.sae import SAE
from saekit.selection import Threshold
from saekit_cli import crosscoder as command
from saekit_cli.main import main

SITES = ["layers.0:out", "layers.1:out"]
JOINT = ["--site", "layers.0", "layers.1", "--crosscoder"]


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint") / "cross"
    assert main(train_arguments(place, folder, *JOINT, "--rule", "mutual")) == 0
    return folder


def facts_of(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_train_and_eval_agree_and_the_folder_is_a_crosscoder(place, tmp_path, capsys):
    folder = tmp_path / "cross"
    assert main(train_arguments(place, folder, *JOINT, "--rule", "mutual", "--json")) == 0
    facts = facts_of(capsys)
    assert facts["sites"] == SITES and list(facts["by_site"]) == SITES
    assert facts["rule"] == "MutualChoice(k=4)" and facts["training_tokens_per_s"] > 0
    crosscoder = Crosscoder.load(folder)
    assert list(map(str, crosscoder.sites)) == SITES and set(crosscoder.widths.values()) == {16}
    assert isinstance(crosscoder.sae.rule, Threshold)  # calibrated, so that it serves one prompt
    recorded = crosscoder.sae.cfg.metadata
    assert recorded["evaluation"]["by_site"]["layers.0:out"]["fvu"] == facts["by_site"]["layers.0:out"]["fvu"]
    assert main(["eval", str(folder), "--json"]) == 0
    again = facts_of(capsys)
    assert {name: facts[name] for name in again} == again
    for numbers in again["by_site"].values():
        assert 0 < numbers["fvu"] < 1 and numbers["ce_recovered"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["cross"]  # nothing of the unfinished run stays


def test_what_people_are_shown(trained, capsys):
    assert main(["eval", str(trained), "--rows", "3"]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if not line.startswith(" ")] == SITES
    assert said.count("ce_recovered ") == said.count("own_fraction ") == 2 and said.count("dead_fraction") == 1
    assert "over 93 activations, 93 predictions" in said
    assert main(["info", str(trained)]) == 0
    assert "sites   layers.0:out, layers.1:out" in capsys.readouterr().out
    assert main(["info", str(trained), "--json"]) == 0
    assert facts_of(capsys)["crosscoder_of"] == SITES


def test_its_page_has_the_examples_of_all_sites_codes_and_where_features_live(trained, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["export", str(trained), "--tokens", "2000", "--features", "5", "--out", str(out), "--json"]) == 0
    facts = facts_of(capsys)
    html = out.read_text()
    page = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    assert facts["features_shown"] == len(page["features"]) == 5 and page["sites"] == SITES
    shares = Crosscoder.load(trained).shares()
    for feature in page["features"]:
        assert feature["shares"] == pytest.approx(shares[feature["feature"]].tolist(), rel=1e-3)
        assert feature["groups"][0]["examples"] and feature["promoted"]
    evaluation = Crosscoder.load(trained).sae.cfg.metadata["evaluation"]
    fvu = re.search(r'<tr data-metric="fvu">.*?<td>(.*?)</td>', html)[1]
    assert float(fvu) == pytest.approx(evaluation["by_site"]["layers.0:out"]["fvu"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--site", "layers.0"], "reads the Sites of its training; leave --site out"),
        (["--to", "delphi"], "is a crosscoder, and delphi takes SAEs of one Site; leave --to out"),
        (["--to", "neuronpedia"], "is a crosscoder, and neuronpedia takes SAEs of one Site; leave --to out"),
    ],
)
def test_what_its_page_cannot_be_is_refused_in_one_line(trained, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(trained), *arguments]) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_training_goes_on_from_a_crosscoder(place, trained, tmp_path, capsys):
    # neither Sites nor width have to be said again
    flags = ["--crosscoder", "--start", str(trained), "--learning-rate", "1e-12", "--rule", "mutual", "--json"]
    arguments = train_arguments(place, tmp_path / "more", "--site", *SITES, *flags)
    at = arguments.index("--features")
    assert main(arguments[:at] + arguments[at + 2 :]) == 0
    more = facts_of(capsys)["by_site"]["layers.1:out"]["fvu"]
    assert main(["eval", str(trained), "--json"]) == 0
    assert more == pytest.approx(facts_of(capsys)["by_site"]["layers.1:out"]["fvu"], rel=0.02)
    assert Crosscoder.load(tmp_path / "more").sae.cfg.metadata["started_from"] == [str(trained)]


def test_a_stopped_run_goes_on_to_the_same_weights(place, tmp_path, capsys, monkeypatch):
    arguments = [*JOINT, "--save-every", "4"]
    assert main(train_arguments(place, tmp_path / "whole", *arguments)) == 0
    with_progress = command.with_progress

    def stopped(first, trained):
        def stop(step, reports):
            if step == 10:
                raise KeyboardInterrupt

        return with_progress(first, lambda on_step: trained(stop))

    monkeypatch.setattr(command, "with_progress", stopped)
    assert main(train_arguments(place, tmp_path / "stopped", *arguments)) == 130
    monkeypatch.undo()
    assert not (tmp_path / "stopped").exists()
    assert main(train_arguments(place, tmp_path / "stopped", *arguments, "--resume")) == 0
    whole, resumed = (SAE.load(tmp_path / name) for name in ("whole", "stopped"))
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, dict(resumed.named_parameters())[name]), name


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(place, tmp_path, capsys):
    assert main(train_arguments(place, tmp_path / "cross", *JOINT, "--dry-run", "--json")) == 0
    facts = facts_of(capsys)
    # 64 features of 2 x 16 numbers, read and written, with a bias and a threshold each: in megabytes
    assert facts["weights_mb"] == round(64 * (32 + 32 + 2) * 4 / 1e6, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--site", "layers.0"], "--crosscoder joins two or more Sites, and --site names only layers.0; name them all"),
        (["--site", "layers.0", "layers.0"], "one Site is named twice"),
        (["--site", "layers.0", "layers.7"], "no submodule named 'layers.7'; closest"),
        ([*JOINT, "--skip"], "--skip is about transcoders, which write another Site"),
        ([*JOINT, "--site-out", "layers.1", "layers.1"], "--site-out is about transcoders, which write another Site"),
        ([*JOINT, "--equal-norms"], "a crosscoder scales each Site as a whole; leave --equal-norms"),
        ([*JOINT, "--start", "a", "b"], "2 folders to start from, and a crosscoder is one"),
        ([*JOINT, "--start", "nowhere"], "no file or folder nowhere"),
    ],
)
def test_what_makes_no_crosscoder_is_refused_in_one_line(place, tmp_path, capsys, change, message):
    arguments = train_arguments(place, tmp_path / "cross", *change)
    assert main([*arguments, *([] if "--crosscoder" in change else ["--crosscoder"])]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("Error: ") and message in said
    assert list(tmp_path.iterdir()) == []


def test_a_start_whose_sites_are_others_is_refused_in_one_line(place, trained, tmp_path, capsys):
    turned = ["--site", "layers.1", "layers.0", "--crosscoder", "--start", str(trained)]
    assert main(train_arguments(place, tmp_path / "cross", *turned)) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("Error: cannot start from Crosscoder(layers.0:out, layers.1:out, n_features=64)")
    assert "give the whole Crosscoder of layers.1:out, layers.0:out, in that order" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["effects", "{}"],
        ["check", "{}"],
        ["patch", "the small", "--other", "the few", "--answer", "a", "--wrong", "the", "--sae", "{}"],
        ["train", "--start", "{}", "--tokens", "4096"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_for_one_site_say_that_it_has_several(trained, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(trained) for argument in arguments]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{trained} is a crosscoder of layers.0:out, layers.1:out, and this needs an SAE of one Site" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # of the Hub's client, about its own call
def test_from_the_hub_it_is_the_same(trained, hub, tmp_path, monkeypatch, capsys):
    """Sent by `saekit upload`, whose card says what it is; evaluated, shown and gone on with by its name there."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["upload", str(trained), "me/cross"]) == 0
    card = hub.repositories["me/cross"].files["README.md"].decode()
    assert "# Crosscoder on " in card and "| Sites | `layers.0:out`, `layers.1:out` |" in card
    assert "Crosscoder.of(saekit.load('me/cross'))" in card and "| `fvu` at `layers.1:out` | 0." in card
    assert Crosscoder.of(saekit.load("me/cross")).widths == Crosscoder.load(trained).widths
    capsys.readouterr()
    numbers = []
    for name in (str(trained), "me/cross"):
        assert main(["eval", name, "--json", "--rows", "3"]) == 0
        numbers.append(facts_of(capsys)["by_site"])
    assert numbers[0] == numbers[1]
    out = tmp_path / "page.html"
    assert main(["export", "me/cross", "--tokens", "2000", "--features", "5", "--out", str(out), "--json"]) == 0
    assert facts_of(capsys)["features_shown"] == 5


def test_two_of_them_are_compared_with_and_without_a_text(place, trained, tmp_path, capsys):
    assert main(train_arguments(place, tmp_path / "other", *JOINT, "--rule", "mutual", "--seed", "1")) == 0
    capsys.readouterr()
    for rows in ("0", "4"):
        assert main(["stability", str(trained), str(tmp_path / "other"), "--rows", rows, "--json"]) == 0
        facts = facts_of(capsys)
        assert 0 < facts["matched_cosine"] <= 1 and bool(facts["bands"]) == (rows == "4")


def test_it_is_not_moved_to_another_site_or_format(trained, tmp_path, capsys):
    assert main(["eval", str(trained), "--site", "layers.0"]) == 1
    assert "reads the Sites of its training; leave --site out" in capsys.readouterr().err
    for name in ("saelens", "sparsify"):
        assert main(["convert", str(trained), str(tmp_path / "out"), "--to", name]) == 1
        assert f"cannot be written for {name}, whose SAEs have one Site" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["convert", str(trained), str(tmp_path / "out"), "--to", "saekit"]) == 0
    assert Crosscoder.load(tmp_path / "out").widths == Crosscoder.load(trained).widths
