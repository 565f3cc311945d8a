"""`saekit circuit` and `saekit patch`: what the library measures, in files and in words."""

import csv
import io
import json
import os
import signal

import pytest
import torch

from saekit.patching.circuit_check import check_circuit
from saekit.patching.circuits import METRIC, trace_circuit
from saekit.patching.generation import encode_prompt
from saekit.patching.metric import LogitDifference
from saekit.patching.patch_table import patch_features
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import TopK
from saekit.targets import Site, Target
from saekit_cli.main import main
from saekit_cli.output import Stages

PROMPT, OTHER = "    x = items(value", "    x = items[value"
ASKED = [PROMPT, "--other", OTHER, "--answer", ")", "--wrong", "]"]
EARLY, LATE = Site("layers.1"), Site("layers.2")


def small_sae(**cfg) -> SAE:
    torch.manual_seed(0)
    sae = SAE(256, 64, TopK(8), cfg=SAEConfig(d_in=256, d_sae=64, model_name="pystd", hook_name="layers.1", **cfg))
    sae.initialise(torch.Generator().manual_seed(0))
    return sae


@pytest.fixture
def early(tmp_path):
    small_sae().save(tmp_path / "early")
    return str(tmp_path / "early")


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.load("pystd")


def asked(target):
    ids, other = (encode_prompt(target, text)[None] for text in (PROMPT, OTHER))
    right, wrong = (target.tokenizer.encode(text, add_special_tokens=False) for text in (")", "]"))
    return ids, other, LogitDifference(*map(torch.tensor, (right, wrong, [ids.shape[1] - 1])))


def test_a_circuit_is_traced_checked_drawn_and_exported(target, early, tmp_path, capsys):
    arguments = [*ASKED, "--sae", early, "pystd/layers.2", "--nodes", "30", "--least-edge", "0.01"]
    assert main(["circuit", *arguments, "--out", str(tmp_path / "found"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    ids, other, metric = asked(target)
    saes = {EARLY: SAE.load(early), LATE: SAE.from_pretrained("pystd", "layers.2")}
    want = trace_circuit(target, saes, ids, metric, other_ids=other, n_nodes=30)
    shares = check_circuit(target, saes, ids, metric, want, other_ids=other)
    assert (facts["faithful"], facts["complete"], facts["effect"]) == pytest.approx(
        (shares.faithful, shares.complete, shares.effect)
    )
    assert facts["sites"] == ["layers.1:out", "layers.2:out"] and facts["nodes"] == 30
    kept = [edge for edge in want.edges if abs(edge.weight) >= 0.01 * abs(want.effect)]
    assert 0 < facts["edges"] == len(kept) < len(want.edges)
    largest = max((edge for edge in kept if edge.target != METRIC), key=lambda edge: abs(edge.weight))
    assert facts["strongest_edges"][0]["contribution"] == pytest.approx(-largest.weight)
    assert facts["strongest_edges"][0]["to"]["position"] == want.nodes[largest.target].position
    graph = json.loads((tmp_path / "found.json").read_text())
    assert len(graph["links"]) == facts["edges"] and graph["metadata"]["scan"] == "pystd"
    page = (tmp_path / "found.html").read_text()
    assert "Plotly.newPlot" in page and "cdn" not in page.partition("Plotly.newPlot")[2]


def test_the_bundled_sae_and_the_absence_of_features_are_what_is_there_without_more(tmp_path, capsys):
    assert main(["circuit", PROMPT, *ASKED[3:], "--nodes", "10", "--out", str(tmp_path / "found")]) == 0
    out = capsys.readouterr().out
    assert "by way of layers.2:out" in out and "all other features at 0" in out and "10 nodes" in out


def test_patching_writes_the_whole_table(target, early, tmp_path, capsys):
    out = tmp_path / "table.csv"
    arguments = [*ASKED, "--sae", early, "pystd/layers.2", "--out", str(out), "--json"]
    assert main(["patch", *arguments]) == 0
    facts = json.loads(capsys.readouterr().out)
    ids, other, metric = asked(target)
    saes = {EARLY: SAE.load(early), LATE: SAE.from_pretrained("pystd", "layers.2")}
    tables = patch_features(target, saes, ids, other, metric)
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert facts["places"] == {str(site): len(table.at) for site, table in tables.items()}
    for site, table in tables.items():
        own = [row for row in rows if Site.parse(row["site"]) == site]
        assert [int(row["feature"]) for row in own] == table.at.feature.tolist()
        assert [float(row["effect"]) for row in own] == pytest.approx(table.effect.tolist())
        assert [float(row["share"]) for row in own] == pytest.approx((table.effect / table.total).tolist())
        text = [target.tokenizer.decode([int(ids[0, int(row["position"])])]) for row in own]
        assert [row["token"] for row in own] == text and len(own) > 10
    largest = max((effect for table in tables.values() for effect in table.effect.tolist()), key=abs)
    assert facts["strongest"][0]["effect"] == pytest.approx(largest)


def test_a_stopped_table_goes_on_to_the_same_file(tmp_path, capsys, monkeypatch):
    want, out = tmp_path / "want.csv", tmp_path / "table.csv"
    arguments = ["patch", *ASKED, "--batch-rows", "32", "--out"]
    assert main([*arguments, str(want)]) == 0
    go_on = Stages.to

    def stop(self, stage, done, total):
        go_on(self, stage, done, total)
        if done == 64:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Stages, "to", stop)
        assert main([*arguments, str(out)]) == 128 + signal.SIGTERM
    assert "the same command with --resume goes on from there" in capsys.readouterr().err
    assert not out.exists()
    assert main([*arguments, str(out)]) == 1
    assert "pass --resume" in capsys.readouterr().err
    assert main([*arguments, str(out), "--resume"]) == 0
    assert out.read_bytes() == want.read_bytes()
    assert main([*arguments, str(out), "--resume"]) == 1


@pytest.mark.parametrize("command", ["circuit", "patch"])
@pytest.mark.parametrize(
    "changed, message",
    [
        ({"--answer": "):x"}, r"--answer '):x' is 2 tokens of pystd"),
        ({"--wrong": ""}, r"--wrong '' is 0 tokens of pystd, []; give one"),
        ({"--wrong": ")"}, "--answer and --wrong are both ')'"),
        ({"--other": PROMPT}, "--other is the prompt itself"),
        ({"--other": "x"}, "they are compared place by place, so give two of one length"),
        ({"--sae": "nowhere"}, "no file or folder"),
        ({"--site": "layers.77"}, "no submodule named 'layers.77'"),
        ({"--site": "lm_head"}, "numbers"),
        ({"--model": "nowhere/at/all"}, "nowhere/at/all"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line(command, changed, message, tmp_path, capsys):
    given = {**dict(zip(ASKED[1::2], ASKED[2::2], strict=True)), **changed}
    flags = [part for pair in given.items() for part in pair]
    assert main([command, PROMPT, *flags, "--out", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.strip().splitlines()) == 1 and err.startswith("Error: ")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["circuit", "--nodes", "0"], "1 SAEs and 0 nodes make no circuit"),
        (["circuit", "--least-edge", "2"], "--least-edge 2.0 is no share; give 0 to 1"),
        (["patch", "--batch-rows", "0"], "--batch-rows 0 tries nothing; give 1 or more"),
        (["patch", "--resume"], "nothing to resume"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_numbers_that_say_nothing_are_refused(flags, message, tmp_path, capsys):
    assert main([flags[0], *ASKED, *flags[1:], "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


def test_saes_that_do_not_go_together_are_refused(early, tmp_path, capsys):
    other_mask, elsewhere, unplaced = (str(tmp_path / name) for name in ("mask", "elsewhere", "unplaced"))
    small_sae(metadata={"mask": {"drop_bos": False}}).save(other_mask)
    sae = small_sae()
    sae.cfg = SAEConfig(d_in=256, d_sae=64, model_name="gpt2", hook_name="layers.1")
    sae.save(elsewhere)
    sae.cfg = SAEConfig(d_in=256, d_sae=64)
    sae.save(unplaced)
    for saes, message in (
        ([early, early], f"{early} is a second SAE for layers.1:out; give one for each Site, or say where with --site"),
        (["pystd/layers.2", other_mask], f"{other_mask} was trained with mask"),
        (["pystd/layers.2", elsewhere], "give SAEs that were trained alike, or pass --model"),
        ([unplaced], f"{unplaced} does not record its model; pass --model"),
        ([early, "pystd/layers.2", "--site", "layers.1"], "--site names 1 Sites for 2 SAEs"),
    ):
        assert main(["circuit", *ASKED, "--sae", *saes, "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
