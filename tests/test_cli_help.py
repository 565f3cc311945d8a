"""What the command line promises: help with an example, a line in the README, one-line errors, a config file."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
import tyro

from saekit.errors import DataError
from saekit_cli import main as cli
from saekit_cli.output import Progress, columns, plain


@dataclass(frozen=True, kw_only=True, slots=True)
class Bake:
    """Bake a cake.

    Example:
        saekit bake apple --grams 500
    """

    fruit: tyro.conf.Positional[str]
    """what is in it"""
    grams: int = 250
    heat: float = 1.5
    mode: Literal["slow", "fast"] = "slow"
    out: Path | None = None
    layers: tuple[int, ...] = (1,)
    device: str = "cpu"
    vegan: bool = False
    config: Path | None = None

    def run(self) -> None:
        if self.fruit == "stone":
            raise DataError("no fruit called stone; use an apple")
        if self.fruit == "crash":
            raise ValueError("a bug")
        if self.fruit == "wait":
            raise KeyboardInterrupt
        sys.stdout.write(f"{self}\n")


@pytest.fixture
def bake(monkeypatch, tmp_path):
    """Runs `saekit bake ...` in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.setitem(cli.COMMANDS, "bake", Bake)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run("bake", *arguments)


def run(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(arguments)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example_and_is_in_the_readme(name, repository):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert "Example:" in out
    assert re.search(rf"saekit {name}\b", out.partition("Example:")[2])
    assert re.search(rf"saekit {name}\b", (repository / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_the_list_of_commands_is_what_one_sees_first(arguments):
    code, out, _ = run(*arguments)
    assert code == 0
    assert all(re.search(rf"• {name}\b", out) for name in cli.COMMANDS)
    assert "Example:" not in out


def test_version():
    assert run("--version") == (0, "saekit 0.1.0\n", "")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["bkae"], "Available subcommands"),
        (["bake", "apple", "--gram", "3"], "--grams"),
        (["bake", "apple", "--grams", "many"], "invalid literal"),
        (["bake"], "FRUIT"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_what_fits(bake, arguments, expected):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert expected in err


def test_a_refusal_is_one_line_on_stderr_and_exit_code_1(bake):
    assert bake("stone") == (1, "", "Error: no fruit called stone; use an apple\n")


def test_a_device_without_float64_is_refused(bake, monkeypatch):
    zeros = torch.zeros

    def on_mps(*size, device, dtype=torch.float32):
        if dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return zeros(*size, device="cpu", dtype=dtype)

    monkeypatch.setattr(torch, "zeros", on_mps)
    code, out, err = bake("crash", "--device", "mps")
    assert (code, out, err.count("\n")) == (1, "", 1) and "doesn't support float64" in err


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_here_is_refused_before_anything_is_done(bake, device):
    code, out, err = bake("crash", "--device", device)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"Error: --device {device} cannot be used (")
    assert err.endswith("); `saekit doctor` lists the devices of this machine\n")


def test_a_bug_keeps_its_traceback(bake):
    with pytest.raises(ValueError, match="a bug"):
        bake("crash")


def test_an_interruption_exits_with_130(bake):
    assert bake("wait") == (130, "", "interrupted\n")


def test_flags_win_over_the_config_file_which_wins_over_defaults(bake, tmp_path):
    (tmp_path / "run.yaml").write_text("grams: 500\nheat: 1e-4\nmode: fast\nout: cake\nlayers: [3, 4]\nvegan: true\n")
    expected = Bake(fruit="apple", grams=7, heat=1e-4, mode="fast", out=Path("cake"), layers=(3, 4), vegan=True)
    for flag in (["--config", "run.yaml"], ["--config=run.yaml"]):
        code, out, err = bake("apple", "--grams", "7", *flag)
        assert (code, err) == (0, "")
        assert out.replace("config=PosixPath('run.yaml')", "config=None") == f"{expected}\n"


def test_a_config_file_can_give_what_is_required(bake, tmp_path):
    (tmp_path / "run.yaml").write_text("fruit: pear\n")
    assert "fruit='pear'" in bake("--config", "run.yaml")[1]
    (tmp_path / "run.yaml").write_text("grams: 1\n")
    code, _, err = bake("--config", "run.yaml")
    assert code == 2
    assert "FRUIT" in err


@pytest.mark.parametrize(
    "text, message",
    [
        ("garms: 3", "no flag in run.yaml named 'garms'; closest of 8: grams"),
        ("grams: many", "run.yaml: grams is 'many', expected int; correct it, or leave it out"),
        ("grams: true", "grams is True, expected int"),
        ("heat: hot", "heat is 'hot', expected float"),
        ("mode: medium", "mode is 'medium', expected typing.Literal['slow', 'fast']"),
        ("layers: [1, x]", "layers is [1, 'x'], expected tuple[int, ...]"),
        ("- grams", "run.yaml holds a list; expected flags and values"),
        ("grams: [", "run.yaml is not YAML"),
        (None, "cannot read run.yaml: No such file or directory; --config expects a YAML file"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_refused_in_one_line(bake, tmp_path, text, message):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    code, out, err = bake("apple", "--config", "run.yaml")
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_json_has_null_where_there_is_no_number(tmp_path):
    import numpy as np

    facts = {
        "nan": float("nan"),
        "inf": [float("inf")],
        "np": np.float32("nan"),
        "n": np.int64(3),
        "b": True,
        "p": tmp_path,
    }
    assert json.loads(json.dumps(plain(facts), allow_nan=False)) == {
        "nan": None, "inf": [None], "np": None, "n": 3, "b": True, "p": str(tmp_path)
    }  # fmt: skip
    assert plain(Bake(fruit="fig"))["layers"] == [1]
    assert plain({"b": True})["b"] is True


def test_columns_line_up():
    assert columns([("a", "1"), ("long", "2")]) == "  a     1\n  long  2"


def test_progress_without_a_terminal_is_a_plain_line(capsys):
    with Progress("training", 2000, unit="tokens") as progress:
        progress.to(1000, "fvu 0.5")
        progress.to(2000)
    assert capsys.readouterr() == ("", "training: 2,000 of 2,000 tokens fvu 0.5\n")


def test_whoever_stops_reading_the_output_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from saekit_cli.main import main; raise SystemExit(main(['list']))"]
    with os.fdopen(write, "w") as nobody:
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")
