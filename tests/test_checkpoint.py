"""The folder: what is in it to the last key, what is refused, and that it is there whole or not at all."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from saekit import checkpoint
from saekit.errors import FileError
from saekit.normalisation import ConstantNorm, EqualNorms, LayerNorm, Normalisation, Plain
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import FeatureChoice, GroupMax, MutualChoice, SelectionRule, Threshold, TopK


def small_sae(rule: SelectionRule | None = None, *, normalisation: Normalisation = Plain(), n_features: int = 4) -> SAE:
    cfg = SAEConfig(
        d_in=3,
        d_sae=n_features,
        hook_name="layers.1",
        model_name="pystd",
        context_size=128,
        normalisation=normalisation,
        metadata={"tokens": 7},
    )
    return SAE(3, n_features, rule or TopK(2), cfg=cfg)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_sae().save(tmp_path / "sae")
    return tmp_path / "sae"


def edit_config(folder: Path, edit) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    edit(config)
    (folder / "cfg.json").write_text(json.dumps(config))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_cfg_json_is_this_and_nothing_else(folder):
    assert json.loads((folder / "cfg.json").read_text()) == {
        "sae_lens_version": "6.0.0",
        "architecture": "topk",
        "k": 2,
        "d_in": 3,
        "d_sae": 4,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "layers.1", "model_name": "pystd", "context_size": 128, "tokens": 7},
        "saekit": {
            "format_version": 1,
            "rule": {"name": "TopK", "k": 2, "relu": True},
            "normalisation": {"name": "Plain"},
        },
    }


@pytest.mark.parametrize(
    ("rule", "architecture", "own"),
    [
        (MutualChoice(2), "saekit", {"name": "MutualChoice", "k": 2, "relu": True}),
        (
            FeatureChoice(2, exponent=1.0, offset=0.5, cap=0.5),
            "saekit",
            {"name": "FeatureChoice", "k": 2, "exponent": 1.0, "offset": 0.5, "floor": None, "cap": 0.5, "relu": True},
        ),
        (TopK(2, relu=False), "saekit", {"name": "TopK", "k": 2, "relu": False}),
        (GroupMax(2), "saekit", {"name": "GroupMax", "k": 2}),
        (Threshold(0.5), "jumprelu", {"name": "Threshold", "relu": True}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_other_rules_are_named_so_that_no_tool_takes_them_for_topk(rule, architecture, own, tmp_path):
    small_sae(rule, normalisation=EqualNorms()).save(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert config["architecture"] == architecture
    assert "k" not in config
    assert config["saekit"] == {"format_version": 1, "rule": own, "normalisation": {"name": "EqualNorms"}}
    assert config["normalize_activations"] == "equal_norms"  # which no other tool knows, and so refuses


def test_tensors_have_these_names_shapes_and_orientations(folder):
    sae = small_sae()
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    with safe_open(folder / "sae_weights.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "W_enc": (3, 4),
        "b_enc": (4,),
        "W_dec": (4, 3),
        "b_dec": (3,),
    }
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["W_enc"], sae.encoder.T)
    assert torch.equal(tensors["W_dec"], sae.decoder)


@pytest.mark.parametrize(
    ("normalisation", "name"), [(LayerNorm(), "layer_norm"), (ConstantNorm(), "constant_norm_rescale")], ids=repr
)
def test_normalisations_have_the_names_that_others_know(normalisation, name, tmp_path):
    small_sae(normalisation=normalisation).save(tmp_path / "sae")
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["normalize_activations"] == name
    assert SAE.load(tmp_path / "sae").cfg.normalisation == normalisation


@pytest.mark.parametrize(("skip", "architecture"), [(False, "jumprelu_transcoder"), (True, "jumprelu_skip_transcoder")])
def test_a_transcoder_says_what_it_reads_and_writes(skip, architecture, tmp_path):
    cfg = SAEConfig(d_in=3, d_sae=4, d_out=5, hook_name="a", hook_name_out="b", apply_b_dec_to_input=False)
    SAE(3, 4, Threshold(0.5), skip=skip, cfg=cfg).save(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert (config["architecture"], config["d_out"]) == (architecture, 5)
    assert (config["metadata"]["hook_name"], config["metadata"]["hook_name_out"]) == ("a", "b")
    assert config["apply_b_dec_to_input"] is False
    tensors = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert tensors["W_dec"].shape == (4, 5) and tensors["b_dec"].shape == (5,)
    assert ("W_skip" in tensors) == skip and (not skip or tensors["W_skip"].shape == (5, 3))
    assert SAE.load(tmp_path / "sae").cfg == cfg


def test_thresholds_and_ranks_travel_as_tensors(tmp_path):
    small_sae(Threshold(0.5)).save(tmp_path / "cut")
    assert load_file(tmp_path / "cut" / "sae_weights.safetensors")["threshold"].tolist() == [0.5] * 4
    ranks = torch.tensor([2, 0, 3, 1])
    small_sae(FeatureChoice(2, exponent=1.0, ranks=ranks)).save(tmp_path / "ranked")
    assert torch.equal(SAE.load(tmp_path / "ranked").rule.ranks, ranks)


def refusal(folder: Path) -> str:
    with pytest.raises(FileError) as caught:
        SAE.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_without_an_sae(tmp_path):
    assert re.search(r"no SAE in .*expected cfg\.json and sae_weights.*give a folder", refusal(tmp_path / "nowhere"))
    assert "no SAE in" in refusal(tmp_path)


def test_a_folder_without_weights(folder):
    (folder / "sae_weights.safetensors").unlink()
    assert re.search(r"has cfg\.json but no sae_weights\.safetensors; copy the folder again", refusal(folder))


@pytest.mark.parametrize("keep", [0, 5, 60, -1], ids=["empty", "in the length", "in the header", "last byte"])
def test_weights_that_are_cut_short(folder, keep):
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert re.search(r"sae_weights\.safetensors is damaged or cut short .*copy or download it again", refusal(folder))


def test_weights_that_are_no_file(folder):
    (folder / "sae_weights.safetensors").unlink()
    (folder / "sae_weights.safetensors").mkdir()
    assert "is damaged or cut short" in refusal(folder)


@pytest.mark.parametrize("text", [b"", b'{"d_in": 3', b"\xff\xfe\x00"], ids=["empty", "cut short", "binary"])
def test_a_config_that_is_not_json(folder, text):
    (folder / "cfg.json").write_bytes(text)
    assert re.search(r"cfg\.json is not readable JSON .*copy or download it again", refusal(folder))


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"saekit": {}}', '{"saekit": 1}'])
def test_a_config_that_another_tool_wrote(folder, text):
    (folder / "cfg.json").write_text(text)
    assert re.search(r"was not written by saekit .*convert the SAE first", refusal(folder))


def test_a_config_of_a_newer_version_even_if_it_lacks_what_this_one_needs(folder):
    (folder / "cfg.json").write_text('{"saekit": {"format_version": 2}}')
    assert re.search(r"format version 2, this saekit reads up to 1; upgrade with", refusal(folder))


@pytest.mark.parametrize("key", ["d_in", "d_sae", "apply_b_dec_to_input", "metadata"])
def test_a_config_that_lacks_a_key(folder, key):
    edit_config(folder, lambda config: config.pop(key))
    assert re.search(rf"cfg\.json lacks {key}; copy", refusal(folder))


@pytest.mark.parametrize("key", ["rule", "normalisation"])
def test_a_config_that_lacks_a_key_of_ours(folder, key):
    edit_config(folder, lambda config: config["saekit"].pop(key))
    assert re.search(rf"cfg\.json lacks saekit\.{key}; copy", refusal(folder))


@pytest.mark.parametrize(
    "rule", [{"name": "TopP", "k": 2}, {"name": "TopK"}, {"k": 2}, {"name": "TopK", "k": 2, "temperature": 1.0}]
)
def test_a_rule_that_is_unknown_or_lacks_an_argument(folder, rule):
    edit_config(folder, lambda config: config["saekit"].update(rule=rule))
    assert re.search(r"rule is \{.*none of TopK, .*MutualChoice.*upgrade saekit, or copy", refusal(folder))


def test_a_normalisation_of_a_newer_version(folder):
    edit_config(folder, lambda config: config["saekit"].update(normalisation={"name": "BatchNorm"}))
    assert re.search(r"normalisation is 'BatchNorm', which is none of Plain, .*; upgrade saekit", refusal(folder))


def test_the_weights_of_another_sae(folder, tmp_path):
    small_sae(n_features=6).save(tmp_path / "other")
    os.replace(tmp_path / "other" / "sae_weights.safetensors", folder / "sae_weights.safetensors")
    assert re.search(r"W_enc in .* is \(3, 6\), but cfg\.json says \(3, 4\).*different SAEs", refusal(folder))


def test_weights_that_lack_a_tensor(folder):
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    save_file({name: tensors[name] for name in ("W_enc", "b_enc", "W_dec")}, path)
    assert re.search(r"has no tensor b_dec; expected W_enc, b_enc, W_dec, b_dec", refusal(folder))


def test_a_threshold_sae_without_its_thresholds(tmp_path):
    small_sae(Threshold(0.5)).save(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors.pop("threshold")
    save_file(tensors, path)
    assert "has no tensor threshold" in refusal(tmp_path)


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(folder):
    small_sae(MutualChoice(1)).save(folder)
    assert SAE.load(folder).rule == MutualChoice(1)
    assert list(folder.parent.iterdir()) == [folder]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_parents_are_made(tmp_path):
    small_sae().save(tmp_path / "a" / "b" / "sae")
    assert SAE.load(tmp_path / "a" / "b" / "sae").rule == TopK(2)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_save_that_fails_leaves_the_old_folder_and_nothing_beside_it(folder, error, monkeypatch):
    before = contents(folder)

    def fail_half_way(tensors, path):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail_half_way)
    for place in (folder, folder.parent / "new"):
        with pytest.raises((FileError, KeyboardInterrupt)) as caught:
            small_sae(MutualChoice(1)).save(place)
        if isinstance(error, OSError):
            assert re.search("cannot write .*No space left.*nothing was changed", str(caught.value))
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_rename_that_fails_puts_the_old_folder_back(folder, monkeypatch):
    before, rename = contents(folder), os.replace

    def fail_at_the_new_one(source, target):
        if Path(target).name == "sae" and not str(source).endswith("-old"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", fail_at_the_new_one)
    with pytest.raises(FileError, match=r"cannot write .*nothing was changed"):
        small_sae(MutualChoice(1)).save(folder)
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_metadata_that_is_no_json_leaves_the_old_folder(folder):
    before, sae = contents(folder), small_sae()
    sae.cfg = SAEConfig(d_in=3, d_sae=4, metadata={"weights": torch.zeros(1)})
    with pytest.raises(TypeError, match="not JSON serializable"):
        sae.save(folder)
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("attempt", [small_sae().save, checkpoint.check_writable], ids=["save", "check_writable"])
def test_a_folder_with_other_files_is_never_deleted(folder, attempt):
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(FileError, match=r"holds more than an SAE \(notes\.txt\), which saving would delete; give"):
        attempt(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("attempt", [small_sae().save, checkpoint.check_writable], ids=["save", "check_writable"])
def test_a_place_that_cannot_be_written_is_said_before_anything_happens(tmp_path, attempt):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "sae"):
        with pytest.raises(FileError, match=r"cannot write .*; choose a place you may write to"):
            attempt(place)
    assert contents(tmp_path) == {"file": b"mine"}


def test_check_writable_changes_nothing(folder):
    before = contents(folder)
    checkpoint.check_writable(folder)
    checkpoint.check_writable(folder.parent / "new")
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_link_to_a_folder_stays_a_link(folder):
    link = folder.parent / "link"
    link.symlink_to(folder)
    small_sae(MutualChoice(1)).save(link)
    assert link.is_symlink()
    assert SAE.load(folder).rule == MutualChoice(1)
