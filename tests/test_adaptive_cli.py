"""`saekit adaptive`: train, report and trace, on the bundled models and on what users type."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from adaptive_models import duo_of, ids_of

from saekit.adaptive import duo_target, kinds
from saekit.adaptive.a_vit_recipe import AViTRecipe
from saekit.adaptive.adatape_recipe import AdaTapeRecipe
from saekit.adaptive.inputs import encode_text, read_image, read_symbols
from saekit.adaptive.picture import write_pictures
from saekit.adaptive.saved import ASSETS, KINDS, load_adaptive, save_adaptive
from saekit.adaptive.telling import auc
from saekit.errors import FileError, SaekitError
from saekit_cli.main import main

BUNDLED = [kind for kind in KINDS if (ASSETS / kind).is_dir()]


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in ("adaptive", *arguments)])
    return code, *capsys.readouterr()


def test_models_are_bundled_and_small():
    assert {"a-vit"} <= set(BUNDLED)
    for kind in BUNDLED:
        assert sum(file.stat().st_size for file in (ASSETS / kind).iterdir()) < 3_000_000
        described = json.loads((ASSETS / kind / "config.json").read_text())
        assert described["command"] == f"saekit adaptive train {kind} --seed {described['recipe']['seed']}"
        # the recipe of today is the one that it was made by
        recipe = kinds.KINDS[kind].recipe(described["recipe"]["seed"])
        assert {name: getattr(recipe, name) for name in described["recipe"]} == described["recipe"]
        assert recipe.build().config == load_adaptive(kind).model.config


def test_the_bundled_a_vit_reports_what_was_measured_when_it_was_saved(capsys):
    pytest.importorskip("sklearn")
    code, out, _ = run(capsys, "report", "a-vit", "--json")
    facts, saved = json.loads(out), load_adaptive("a-vit").facts
    assert code == 0
    for name in ("accuracy", "control_accuracy", "mac_ratio", "shuffled_accuracy"):
        assert facts[name] == pytest.approx(saved[name], abs=0.005)  # one image in 360 is 0.003
    assert facts["mac_ratio"] <= 0.65
    assert facts["control_accuracy"] - facts["accuracy"] <= 0.01
    assert facts["shuffled_accuracy"] < facts["accuracy"]
    assert facts["depth_auc"] > 0.6


def test_a_picture_of_ones_own_is_traced(capsys, tmp_path):
    image = np.zeros((24, 24), dtype=np.uint8)
    image[4:20, 10:14] = 200
    np.save(tmp_path / "one.npy", image)
    code, out, _ = run(capsys, "trace", "a-vit", tmp_path / "one.npy", "--out", tmp_path / "page.html", "--json")
    assert code == 0
    facts, page = json.loads(out), (tmp_path / "page.html").read_text()
    assert 0 < facts["mac_ratio"] <= 1
    assert facts["halt_by_step"][-1] in (0, 1)
    assert page.startswith("<!doctype html>") and "<script" not in page and "http" not in page
    assert page.count("row 7, column 7") == 1


def test_text_that_looks_like_html_is_shown_as_text(tmp_path):
    class Tokenizer:
        bos_token_id = pad_token_id = None

        def decode(self, ids):
            return "<script>\n" if ids[0] % 2 else " &"

    trace = duo_target(duo_of(), Tokenizer()).trace(ids_of())
    page = write_pictures(tmp_path / "p.html", "<b>", [trace.picture(0)]).read_text()
    assert "<script>" not in page and "<b>" not in page
    assert "&lt;script&gt;⏎" in page and "·&amp;" in page
    assert trace._repr_html_().count("<figure") == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("trace", "a-vit"), "takes an INPUT"),
        (("report", "a-vit", "3"), "takes no INPUT"),
        (("report", "a-vti"), "no adaptive model or folder named 'a-vti'"),
        (("train", "vit"), "no kind of adaptive model named 'vit'"),
        (("trace", "a-vit", "nowhere.png"), "no image at nowhere.png; give a file, or the number of a test digit"),
        (("report", "duo-llm", "--rows", "0"), "reads nothing"),
        (("report", "a-vit", "--rows", "7"), "--rows is for duo-llm, which reads text; leave it out of a-vit"),
        (("trace", "duo-llm", "x", "--rows", "7"), "--rows is for saekit adaptive train and report; leave it out of"),
        (("report", "adatape", "--out", "x"), "--out is for saekit adaptive train and trace; leave it out of report"),
        (("report", "duo-llm", "--speed"), "--speed is for a-vit and rin, whose cost is what they are about"),
        (("trace", "a-vit", "17", "--explain", "0"), "--explain is for saekit adaptive report; leave it out of trace"),
        (("trace", "a-vit", "17", "--speed"), "--speed is for saekit adaptive report; leave it out of trace"),
        (("report", "a-vit", "--resume"), "--resume is for saekit adaptive train; leave it out of report"),
        (("report", "a-vit", "--seed", "3"), "--seed is for saekit adaptive train; leave it out of report"),
        (("trace", "duo-llm", "  "), "the text is empty; give at least a word"),
        (("trace", "adatape", "101"), "sequences have 3 symbols, but this model reads 16; give as many"),
        (("trace", "rin", "12"), "'12' is no digit to make; give 0 to 9"),
        (("trace", "a-vit", "999"), "there is no test digit 999; give 0 to 359"),
        (("report", "rin", "--explain", "25"), "step 25 of rin has no free decision; they are 0 to 24"),
        (("report", ASSETS.parent / "pystd_sae"), "as an adaptive model"),
        (("report", "a-vit", "--explain", "5"), "step 5 of a-vit has no free decision; they are 0 to 4"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "pixels, message",
    [
        (np.zeros((4, 6)), "is 4 x 6 pixels; crop or pad it to a square"),
        (np.zeros((8, 8)), "is of one colour"),
        (np.full((8, 8), np.nan), "finite numbers"),
        (np.zeros((8, 8, 3)), r"has shape \(8, 8, 3\)"),
    ],
)
def test_pictures_that_cannot_be_used_are_refused(tmp_path, pixels, message):
    np.save(tmp_path / "x.npy", pixels)
    with pytest.raises(SaekitError, match=message):
        read_image(str(tmp_path / "x.npy"), 16)


def test_files_that_are_no_pictures_are_refused(tmp_path):
    (tmp_path / "x.npy").write_text("no")
    with pytest.raises(SaekitError, match=r"cannot read .* as an image"):
        read_image(str(tmp_path / "x.npy"), 16)


def test_symbols_are_read_in_both_spellings():
    assert torch.equal(read_symbols("10-1"), torch.tensor([[1.0, 0.0, -1.0, 1.0]]))
    assert torch.equal(read_symbols("1, 0, -1"), torch.tensor([[1.0, 0.0, -1.0]]))
    assert torch.equal(read_symbols("1 0 -1"), read_symbols("10-"))
    with pytest.raises(SaekitError, match="is no sequence of symbols"):
        read_symbols("12")


@pytest.mark.parametrize("text", ["深" * 150, "x" * 100_000, "a\0b"], ids=["CJK", "long", "zero byte"])
def test_a_text_that_no_file_could_be_called_is_a_text(capsys, tmp_path, text):
    code, out, _ = run(capsys, "trace", "duo-llm", text, "--out", tmp_path / "t.html", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["tokens_left_out"] == len(encode_text(text)) - len(facts["tokens"])
    assert facts["counted"] == "the feed-forwards' multiplications"


def test_a_trace_is_written_where_one_is(capsys, tmp_path, monkeypatch):
    shutil.copytree(ASSETS / "adatape", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "trace", "./mine", "10-110-0011-0101")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine-trace.html"]
    code, _, err = run(capsys, "trace", "./mine", "10-110-0011-0101", "--out", ".")
    assert code == 1 and err.count("\n") == 1 and "choose a file" in err


def test_saving_deletes_nothing_else_and_everyone_may_read_it(tmp_path):
    saved = load_adaptive("adatape")
    (tmp_path / "notes.txt").write_text("mine")
    for write in (lambda: save_adaptive(saved, tmp_path), lambda: kinds.train_kind("adatape", tmp_path)):
        with pytest.raises(FileError, match=r"holds more than an adaptive model \(notes\.txt\), which saving would"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    save_adaptive(saved, tmp_path / "tape")
    save_adaptive(saved, tmp_path / "tape")  # in the place of one
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "tape").iterdir()} == {"0o644"}


def test_a_date_is_a_seed():
    recipe = AdaTapeRecipe(seed=20_261_128, length=8, longest=4, batch=8, steps=3)
    first, second = (recipe.loss(recipe.build(), recipe.stages[0], step)[0] for step in (0, 1))
    assert torch.isfinite(first) and not torch.equal(first, second)


def test_a_model_is_trained_reported_and_resumed(capsys, tmp_path, monkeypatch):
    tiny = kinds.KINDS["adatape"]
    recipe = AdaTapeRecipe(length=8, longest=4, batch=8, steps=3)
    monkeypatch.setitem(kinds.KINDS, "adatape", tiny.__class__(**{
        **{name: getattr(tiny, name) for name in tiny.__slots__}, "recipe": lambda seed: recipe,
    }))  # fmt: skip
    code, out, err = run(capsys, "train", "adatape", "--out", tmp_path / "tape", "--json")
    assert code == 0 and "training adatape: 3 of 3 step" in err
    facts = json.loads(out)
    assert [path.name for path in tmp_path.iterdir()] == ["tape"]  # nothing of the run is left behind
    code, out, _ = run(capsys, "report", tmp_path / "tape", "--json")
    assert json.loads(out)["accuracy"] == facts["accuracy"]
    code, out, _ = run(capsys, "trace", tmp_path / "tape", "10-1011-", "--out", tmp_path / "t.html")
    assert code == 0 and "mac_ratio" in out
    code, _, err = run(capsys, "train", "adatape", "--out", tmp_path / "tape", "--resume")
    assert code == 1 and "nothing to resume" in err


def test_a_report_answers_questions_where_it_is_asked(capsys, monkeypatch):
    answered = replace(kinds.KINDS["adatape"], ask=lambda saved: {"who stops": {"area": 0.75, "place alone": 0.5}})
    monkeypatch.setitem(kinds.KINDS, "adatape", answered)
    code, out, _ = run(capsys, "report", "adatape", "--questions", "--json")
    assert code == 0 and json.loads(out)["questions"] == {"who stops": {"area": 0.75, "place alone": 0.5}}
    code, out, _ = run(capsys, "report", "adatape", "--questions")
    assert code == 0 and out.endswith("who stops\n  area         0.750\n  place alone  0.500\n")
    code, _, err = run(capsys, "trace", "adatape", "10-110-0011-0101", "--questions")
    assert code == 1 and "--questions is for saekit adaptive report" in err


def test_a_trained_a_vit_is_finished_with_its_control(tmp_path):
    pytest.importorskip("sklearn")
    recipe = AViTRecipe(width=16, layers=2, canvas=10, plain_epochs=1, halting_epochs=1)
    built = recipe.build().state_dict()
    moved = {name: weight + 0.5 for name, weight in built.items()}
    saved = kinds.KINDS["a-vit"].finish(recipe, {"plain": built, "halting": built, "control": moved})
    assert torch.equal(saved.model.state_dict()["head.bias"], built["head.bias"])
    assert torch.equal(saved.control.state_dict()["head.bias"], moved["head.bias"])


def test_auc_is_the_chance_of_the_right_order():
    assert auc(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([False, False, True, True])) == 1.0
    assert auc(torch.tensor([1.0, 1.0]), torch.tensor([False, True])) == 0.5
    assert auc(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, True])) == 1.0
    assert auc(torch.tensor([1.0, 4.0, 2.0, 3.0]), torch.tensor([True, True, False, False])) == 0.5
