"""Notebooks as they are committed: executed, and with nothing of the machine that executed them."""

import json
from base64 import b64decode
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_run_from_top_to_bottom_and_shows_no_warning_or_path(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [output for output in outputs if output.get("name") == "stderr" or output["output_type"] == "error"] == []
    said = "".join("".join(output.get("text", "")) for output in outputs)
    assert "site-packages" not in said and "/home/" not in said and ".venv" not in said


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_figure_has_a_picture_for_viewers_that_draw_none(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    shown = [output["data"] for cell in cells for output in cell.get("outputs", ()) if "data" in output]
    figures = [data for data in shown if "application/vnd.plotly.v1+json" in data]
    assert all(b64decode(data["image/png"]).startswith(b"\x89PNG") for data in figures)
    assert figures or "plotly" not in path.read_text(encoding="utf-8")
