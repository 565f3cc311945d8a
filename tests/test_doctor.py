"""`saekit doctor` must see what is wrong, and say nothing is wrong only when nothing is."""

import json

import pytest
import torch
from safetensors.torch import save_file

import saekit.index
import saekit.pretrained
from saekit.kernels.backend import choose_backend
from saekit_cli import doctor
from saekit_cli.main import main


@pytest.fixture
def model(tmp_path):
    """A whole Hugging Face folder of 12 parameters."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(6)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def bundled(model, monkeypatch):
    """Makes that folder the bundled model, with nothing beside it."""
    monkeypatch.setattr(saekit.pretrained, "bundled_model_path", lambda: model)
    monkeypatch.setattr(doctor, "BUNDLED", {})
    return model


def test_json_is_one_object_with_all_the_facts(bundled, capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == []
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["saekit"] == "0.1.0"
    cpu = facts["devices"][0]
    assert (cpu["device"], cpu["threads"]) == ("cpu", torch.get_num_threads())
    backend = choose_backend("cpu")
    assert cpu["kernels"] == {"name": backend.name, "reason": backend.reason}
    assert facts["bundled_model"] == {"path": str(bundled), "parameters": 12, "problem": None}
    assert facts["cache"]["free_gb"] > 0


def test_the_text_says_the_same(bundled, capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    backend = choose_backend("cpu")
    for expected in (torch.__version__, f"{backend.name}: {backend.reason}", str(bundled), "0.00 M parameters"):
        assert expected in out
    assert "problem" not in out


def test_a_missing_file_is_named_and_the_exit_code_is_1(bundled, capsys):
    (bundled / "tokenizer.json").unlink()
    assert main(["doctor"]) == 1
    assert f"problem: what comes with saekit lacks tokenizer.json in {bundled}" in capsys.readouterr().out


@pytest.mark.parametrize("name", doctor.MODEL_FILES)
def test_a_file_cut_short_is_damage(model, name):
    path = model / name
    path.write_bytes(path.read_bytes()[:-1])
    found = doctor.check_files(model, doctor.MODEL_FILES)
    assert "is damaged" in found["problem"]
    assert found["parameters"] is None


def test_what_lies_beside_the_model_is_checked_too(bundled, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "BUNDLED", {"model": ("config.json", "model.safetensors"), "gone": ("cfg.json",)})
    assert main(["doctor", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert [other["parameters"] for other in facts["bundled_others"]] == [12, None]
    assert facts["problems"] == [
        f"what comes with saekit lacks cfg.json in {bundled.parent / 'gone'}; install it again"
    ]


def test_every_file_of_weights_that_comes_along_is_on_the_list():
    assets = saekit.pretrained.bundled_model_path().parent
    listed = {f"{folder}/{name}" for folder, names in doctor.BUNDLED.items() for name in names}
    weights = {path.relative_to(assets).as_posix() for path in assets.rglob("*.safetensors")}
    assert weights <= listed | {"pystd/model.safetensors"}
    assert all((assets / name).is_file() for name in listed)


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "there" / "yet"))
    assert doctor.check_cache()["problem"] is None
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere, so the rights cannot be real
    assert "set HF_HOME" in doctor.check_cache()["problem"]


def test_a_missing_index_is_a_problem(bundled, monkeypatch, tmp_path):
    monkeypatch.setattr(saekit.index, "index_path", lambda: tmp_path / "nothing.yaml")
    assert any("no index" in problem for problem in doctor.diagnose()["problems"])
