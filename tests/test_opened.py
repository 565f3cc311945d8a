"""What a command opens beside an SAE: its text only while it is the same, its metrics only where they are of this."""

import json
from pathlib import Path

import pytest
import torch

from saekit.activations.corpus import load_corpus
from saekit.activations.harvest import checksum
from saekit.errors import SaekitError
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import TopK
from saekit.targets import Target
from saekit_cli.main import main
from saekit_cli.opened import open_sae

CONTEXT = 64


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An SAE of pystd that records a text, how it was divided, and metrics."""
    monkeypatch.chdir(tmp_path)
    lines = [f"def f{n}(x):\n    return {n} * x + {n * n}\n" for n in range(80)]
    Path("notes.txt").write_text("".join(lines))
    corpus = load_corpus("notes.txt", Target.load("pystd").tokenizer, context=CONTEXT, held_out_rows=4)
    metadata = {
        "text": "notes.txt", "train_rows": len(corpus.train), "text_checksum": checksum(corpus.train.ids),
        "row_bos": True, "held_out_rows": 4, "evaluation": {"fvu": 0.125},
    }  # fmt: skip
    cfg = SAEConfig(
        d_in=256, d_sae=24, hook_name="layers.2", model_name="pystd", context_size=CONTEXT, metadata=metadata
    )
    sae = SAE(256, 24, TopK(4), cfg=cfg)
    sae.initialise(torch.Generator().manual_seed(0))
    sae.save("sae")
    return Path("sae")


def opened(folder: Path, **more):
    return open_sae(folder, **{"model": None, "text": None, "site": None, "rows": None, "device": "cpu", **more})


def test_rows_are_held_out_as_in_training_only_while_the_text_is_the_same(folder):
    own = opened(folder)
    assert own.is_as_trained and len(own.corpus.held_out) == 4
    text = Path("notes.txt").read_text()
    Path("other.txt").write_text(text)
    assert opened(folder, text="other.txt").is_as_trained  # the same by content
    Path("notes.txt").write_text(text[: len(text) // 2])
    with pytest.raises(SaekitError, match=r"notes\.txt is not what it was when the SAE was trained on it"):
        opened(folder)
    other = opened(folder, text="./notes.txt")  # as any other text
    assert not other.is_own_text and len(other.corpus.held_out) == len(other.corpus.train)


@pytest.mark.parametrize("more", [{"site": "layers.1"}, {"text": "other.txt"}], ids=str)
def test_what_was_measured_in_training_is_not_shown_of_anything_else(folder, more, capsys):
    Path("other.txt").write_text("x = 1\n" * 400)
    flags = [part for name, value in more.items() for part in (f"--{name}", value)]
    assert not opened(folder, **more).is_as_trained
    effects = ["effects", str(folder), "--rows", "3", "--check-rows", "3", "--check-features", "4", "--draws", "1"]
    assert main(effects) == 0
    shown = {}
    for name, extra in (("own", []), ("other", flags)):
        capsys.readouterr()
        assert main(["export", str(folder), "--out", f"{name}.html", "--features", "9", "--json", *extra]) == 0
        said = capsys.readouterr()
        shown[name] = json.loads(said.out)["effects_shown"]
        assert (f"the effects kept in {folder} are left out; `saekit effects`" in said.err) == (name == "other")
    assert shown["own"] > 0 and shown["other"] == 0
    assert "0.125" in Path("own.html").read_text() and "0.125" not in Path("other.html").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["export", "--features", "-3"], "--features -3 leaves nothing to read; give 1 or more"),
        (["export", "--tokens", "0"], "--tokens 0 leaves nothing to read"),
        (["check", "--tokens", "-9"], "--tokens -9 leaves nothing to read"),
        (["convert", "out", "--calibrate", "-5"], "--calibrate -5 is less than one row of 64 tokens"),
        (["export", "--to", "neuronpedia", "--out", "a-file"], "cannot write a-file"),
        (["export", "--to", "delphi", "--out", "a-file"], "cannot write a-file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_asks_for_nothing_or_has_no_place_is_refused_before_any_work(folder, arguments, message, capsys):
    Path("a-file").write_text("")
    command, *rest = arguments
    assert main([command, str(folder), *rest]) == 1
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and "reading" not in said.err
    assert Path("a-file").read_text() == "" and not Path("out").exists()


def test_a_model_that_reads_less_than_the_rows_of_training_is_refused(folder, monkeypatch):
    short = Target.load("pystd")
    monkeypatch.setattr(type(short), "context", property(lambda self: CONTEXT - 1))
    with pytest.raises(
        SaekitError, match=r"was trained on rows of 64 tokens, and pystd reads at most 63; pass a --model"
    ):
        opened(folder)
