"""Measuring the effects of an SAE's features as a run: stopped, gone on with, kept beside the SAE, and reported."""

import argparse
import inspect
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import BOS, FIRST, sae_of, tiny_llama

import saekit
from saekit.activations.mask import MaskPolicy
from saekit.activations.tokens import TokenRows
from saekit.errors import DataError, FileError, SaekitError
from saekit.patching.corpus_effects import EffectSettings
from saekit.patching.effects_file import keep_effects, kept_effects
from saekit.patching.effects_run import EffectsRun, forget_unfinished, measure_effects
from saekit.selection import Threshold
from saekit.targets import Target
from saekit.training.stop import RunStopped
from saekit_cli.main import main


@pytest.fixture
def run(tmp_path) -> EffectsRun:
    ids = torch.randint(2, 40, (10, 6), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = BOS
    return EffectsRun(
        target=Target.wrap(tiny_llama()),
        sae=sae_of(Threshold(0.3)),
        site=FIRST,
        rows=TokenRows.from_ids(ids, bos=BOS),
        mask=MaskPolicy(),
        settings=EffectSettings(batch_rows=3, resamples=10),
        facts={"model": "tiny", "text": "random"},
        check_features=6,
        check_rows=7,
        unfinished=tmp_path / "unfinished.safetensors",
    )


def numbers(kept) -> dict[str, torch.Tensor]:
    effects = {name: getattr(kept.effects, name) for name in ("effect", "low", "high", "random", "active")}
    return effects | {name: getattr(kept.check, name) for name in ("feature", "attributed", "exact")}


@pytest.mark.parametrize("stage, after", [("attributing", 3), ("attributing", 10), ("checking", 3), ("checking", 7)])
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers_bit_for_bit(run, stage, after):
    want = numbers(measure_effects(run))

    def stop(now: str, done: int, total: int) -> None:
        assert total == (10 if now == "attributing" else 7)
        if (now, done) == (stage, after):
            os.kill(os.getpid(), signal.SIGTERM)

    rows = after if stage == "attributing" else 10
    with pytest.raises(
        RunStopped, match=rf"stopped after {rows} of 10 rows, saved in .*; the same command with --resu"
    ):
        measure_effects(run, on_progress=stop)
    with pytest.raises(FileError, match=r"holds an unfinished run; pass --resume"):
        measure_effects(run)
    went_on = replace(run, resume=True)
    stages = []
    got = numbers(measure_effects(went_on, on_progress=lambda now, done, total: stages.append((now, done))))
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert (stage, after) not in stages and ("attributing", 3) not in stages
    forget_unfinished(went_on)
    with pytest.raises(FileError, match=r"nothing to resume"):
        measure_effects(went_on)


def test_a_run_goes_on_only_as_it_was_begun(run):
    def stop(*_) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunStopped):
        measure_effects(run, on_progress=stop)
    for wrong, message in (
        ({"settings": replace(run.settings, seed=5)}, r"was begun with seed 0, not 5; give the same"),
        ({"rows": run.rows.select(slice(9))}, r"was begun with rows 10, not 9"),
        (
            {"rows": TokenRows.from_ids(run.rows.ids.flip(0), bos=BOS, pad=None)},
            r"was begun with text_checksum \d+, not \d",
        ),
        ({"sae": sae_of(Threshold(0.3), seed=1)}, r"is about another SAE"),
        ({"sae": run.sae.with_rule(Threshold(0.4))}, r"is about another SAE"),
    ):
        with pytest.raises(FileError, match=message):
            measure_effects(replace(run, resume=True, **wrong))
    run.unfinished.write_bytes(b"half")
    with pytest.raises(FileError, match=r"cannot be read .*; delete it to start anew"):
        measure_effects(replace(run, resume=True))


def test_what_is_kept_is_what_was_measured(run, tmp_path):
    kept = measure_effects(run)
    assert kept_effects(tmp_path, run.sae) is None
    path = keep_effects(tmp_path, run.sae, kept)
    again = kept_effects(tmp_path, run.sae)
    assert again is not None and all(torch.equal(numbers(kept)[name], numbers(again)[name]) for name in numbers(kept))
    assert (again.effects.rows, again.check.rank_correlation, again.check.slope) == (
        10, kept.check.rank_correlation, kept.check.slope,
    )  # fmt: skip
    assert again.facts["model"] == "tiny" and again.facts["draws"] == 4
    with pytest.raises(FileError, match=r"is about another SAE than .* holds; delete it and run `saekit effects"):
        kept_effects(tmp_path, sae_of(Threshold(0.3), seed=1))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(FileError, match=r"cannot be read"):
        kept_effects(tmp_path, run.sae)


def test_a_check_of_nothing_is_refused(run):
    with pytest.raises(SaekitError, match=r"1 features on 7 rows are no check; give at least 2 and 1"):
        replace(run, check_features=1)
    with pytest.raises(DataError, match=r"no feature is active"):
        measure_effects(replace(run, sae=sae_of(Threshold(1e9))))


# --- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The bundled SAE in a folder of its own, and a text."""
    folder = tmp_path_factory.mktemp("effects")
    shutil.copytree(Path(saekit.__file__).parent / "assets" / "pystd_sae" / "layers.2", folder / "sae")
    (folder / "text.py").write_text(inspect.getsource(argparse)[:30_000])
    return folder


def test_the_command_keeps_and_prints_what_it_measured(place, capsys):
    arguments = ["effects", str(place / "sae"), "pystd", str(place / "text.py"), "--rows", "4"]
    small = ["--check-features", "4", "--check-rows", "2", "--batch-rows", "2"]
    assert main([*arguments, *small, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    sae = saekit.load(place / "sae")
    kept = kept_effects(place / "sae", sae)
    assert kept is not None
    assert facts["active_features"] == int((kept.effects.active > 0).sum()) > 100
    assert facts["check_rank_correlation"] == kept.check.rank_correlation
    assert facts["checked"] == 4 and facts["rows"] == kept.effects.rows == 4
    assert facts["strongest"][0]["low"] == pytest.approx(float(kept.effects.low.max()))
    assert facts["median_effect"] > facts["median_control"]
    assert not (place / "sae" / "effects.unfinished.safetensors").exists()
    assert main([*arguments, *small]) == 0
    out = capsys.readouterr().out
    assert f"#{facts['strongest'][0]['feature']} " in out
    assert f"rank correlation {facts['check_rank_correlation']:.2f} with the exact effect" in out


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--draws", "-1"], "draws=-1; give 0 or more"),
        (["--check-features", "1"], "1 features on 16 rows are no check; give at least 2 and 1"),
        (["--resume"], "nothing to resume"),
        (["--rows", "0"], "--rows 0 leaves nothing to read; give 1 or more"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(place, capsys, wrong, message):
    assert main(["effects", str(place / "sae"), "pystd", str(place / "text.py"), *wrong]) == 1
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and re.search(message, err)


def test_an_sae_that_has_no_folder_here_is_given_one_first(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["effects", "pystd/layers.2", "pystd", str(place / "text.py")]) == 1
    said = capsys.readouterr().err
    assert "pystd/layers.2 is not a folder" in said and "`saekit convert pystd/layers.2 my-sae` makes one" in said
    assert not (place / "pystd").exists()
