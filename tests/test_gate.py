"""Benchmarks run their tests first, and measure nothing while one is red."""

import sys

import pytest

from benchmarks import gate
from benchmarks.adaptive import study as adaptive
from benchmarks.pystd import baselines
from benchmarks.speed import run as speed


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    for name, is_right in (("good", True), ("good_too", True), ("bad", False)):
        (tmp_path / "tests" / f"test_{name}.py").write_text(f"def test_it():\n    assert {is_right}\n")
    monkeypatch.setattr(gate, "REPOSITORY", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("names", "green"), [(["good*"], True), (["good", "bad"], False), (["good", "nowhere"], False), (["no*"], False)]
)
def test_green_means_that_all_of_them_are_there_and_pass(repository, capsys, names, green):
    assert gate.tests_pass(names) is green
    said = capsys.readouterr().err
    assert ("make them pass first" in said) is not green
    if "bad" in names:
        assert "test_bad.py::test_it" in said


def test_no_benchmark_goes_on_when_they_are_red(tmp_path, monkeypatch):
    asked = []

    def red(names):
        asked.append(names)
        return False

    for module in (adaptive, baselines, speed):
        monkeypatch.setattr(module, "tests_pass", red)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="1"):
        adaptive.main(["--out", str(out)])
    monkeypatch.setattr(sys, "argv", ["baselines"])
    with pytest.raises(SystemExit, match="1"):
        baselines.main()
    monkeypatch.setattr(sys, "argv", ["run", "--quick", "--out", str(out)])
    assert speed.main() == 1
    assert not out.exists() and len(asked) == 3
    # each names files that there are
    for name in (name for names in asked for name in names):
        assert list((gate.REPOSITORY / "tests").glob(f"test_{name}.py")), name
