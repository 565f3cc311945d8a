"""Files that cannot be read as an SAE: each gets one line that says what was found and what to do, and runs nothing."""

import contextlib
import io
import json
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import saekit
from saekit.errors import FileError
from saekit.formats.tensor_files import read_tensors
from saekit.loading import describe

GOLDEN = Path(__file__).parent / "golden" / "formats"
TOPK = GOLDEN / "saelens" / "topk"
AUTO_ENCODER = GOLDEN / "dictionary_learning" / "AutoEncoder"


def refusal(path: Path, *, headers_too: bool = True) -> str:
    with pytest.raises(FileError) as caught:
        saekit.load(path)
    message = str(caught.value)
    assert "\n" not in message
    if headers_too:
        with pytest.raises(FileError) as from_headers:
            describe(path)
        assert str(from_headers.value) == message
    return message


def copied(source: Path, folder: Path, **changes: object) -> Path:
    """A golden folder with other settings in its config; None takes a setting out."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    name = "cfg.json" if (folder / "cfg.json").exists() else "config.json"
    settings = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return folder


def test_nothing_there(tmp_path):
    assert re.search(
        r"no file or folder .*nowhere; .*an SAE of the index .*, or OWNER/NAME\[@REVISION\]",
        refusal(tmp_path / "nowhere"),
    )


def test_a_folder_of_several_saes_says_which_there_are(tmp_path):
    copied(TOPK, tmp_path / "blocks.8")
    assert re.search(
        r"no SAE in .* itself; it has 1 below \(blocks\.8\): give one of them: .*/blocks\.8$", refusal(tmp_path)
    )


def test_several_files_of_weights_that_could_be_meant(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save({"x": torch.zeros(2)}, tmp_path / name)
    assert re.search(r"holds 2 files of weights \(a\.pt, b\.pt, \.\.\.\); give one of them", refusal(tmp_path))


def test_a_file_that_is_no_weights(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert re.search(
        r"notes\.txt is no file of weights; expected \.safetensors, \.npz", refusal(tmp_path / "notes.txt")
    )


def test_tensors_of_no_known_format_are_named(tmp_path):
    save_file({"lm_head.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    assert re.search(r"in no format saekit knows \(.*saelens.*its tensors are lm_head\.weight", refusal(tmp_path))


class Payload:
    """What unpickles by running something."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("inside", ["zip", "bare pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(inside, tmp_path):
    held = {"encoder.weight": torch.zeros(4, 3), "extra": Payload(tmp_path / "it ran")}
    path = tmp_path / "ae.pt"
    if inside == "zip":
        torch.save(held, path)
    else:
        path.write_bytes(pickle.dumps(held["extra"]))
    assert re.search(
        r"ae\.pt holds more than tensors, and reading the rest could run code .*as safetensors", refusal(path)
    )
    assert not (tmp_path / "it ran").exists()


def test_an_array_of_objects_is_refused_and_not_run(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([Payload(tmp_path / "it ran")], dtype=object))
    assert "W_enc.npy in" in refusal(tmp_path)
    assert not (tmp_path / "it ran").exists()


def test_a_module_instead_of_its_weights(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "ae.pt")
    assert re.search(r"holds a list; expected tensors by name \(a state_dict\)", refusal(tmp_path))


@pytest.mark.parametrize("source", [TOPK / "sae_weights.safetensors", AUTO_ENCODER / "ae.pt"], ids=lambda p: p.name)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_weights_that_are_cut_short(source, share, tmp_path):
    whole = source.read_bytes()
    (tmp_path / source.name).write_bytes(whole[: int(share * len(whole))])
    message = refusal(tmp_path / source.name)
    assert re.search(r"damaged or cut short .*copy or download it again|could run code", message)


@settings(max_examples=150, deadline=None)
@given(
    place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), kind=st.sampled_from(["safetensors", "npz", "pt"])
)
def test_a_flipped_bit_is_refused_or_harmless(place, bit, kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flipped")
    path = folder / f"params.{kind}"
    tensors = {"W_enc": torch.ones(3, 4), "b_enc": torch.ones(4), "k": torch.tensor(2)}
    if kind == "npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        (save_file if kind == "safetensors" else torch.save)(tensors, path)
    damaged = bytearray(path.read_bytes())
    damaged[int(place * len(damaged))] ^= 1 << bit
    path.write_bytes(damaged)
    for contents in (True, False):
        # any other error fails the test, and so does memory that the file does not account for
        with contextlib.suppress(FileError):
            found, _ = read_tensors(path, contents=contents)
            assert sum(tensor.numel() for tensor in found.values()) <= 17


def test_a_header_that_claims_more_than_the_file_holds(tmp_path):
    header = {"W_enc": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert "is damaged or cut short" in refusal(tmp_path / "x.safetensors")


def test_an_array_that_claims_more_than_it_holds(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 10**9)})
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", buffer.getvalue() + bytes(4))
    assert re.search(
        r"W_enc\.npy in .* says it is \(1000000000, 1000000000\) of float32, which is not", refusal(tmp_path)
    )


def test_a_view_that_claims_more_than_its_storage(tmp_path):
    torch.save({"pre_bias": torch.zeros(1).expand(10**9, 10**9), "latent_bias": torch.zeros(2)}, tmp_path / "ae.pt")
    assert re.search(r"pre_bias in .* says it is \(1000000000, 1000000000\), which is more than", refusal(tmp_path))


def test_an_archive_made_to_fill_memory_is_not_opened(tmp_path):
    with zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", bytes(10**7))
    assert re.search(r"would unpack to 10 MB, more than 64 times its size; .*was not opened", refusal(tmp_path))


def test_names_inside_an_archive_are_no_places_on_disk(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3, np.float32))
    (tmp_path / "sae").mkdir()
    with zipfile.ZipFile(tmp_path / "sae" / "params.npz", "w") as archive:
        archive.writestr("../outside.npy", buffer.getvalue())
    assert "its tensors are ../outside" in refusal(tmp_path / "sae")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["params.npz"]


def test_a_yaml_that_unfolds_into_billions_is_read_as_the_few_lines_it_is(tmp_path):
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(30)]
    (tmp_path / "config.yaml").write_text("\n".join([*lines, "model_name: *a30"]))
    weights = {"W_enc": torch.zeros(4, 3), "W_dec": torch.zeros(4, 3), "b_enc": torch.zeros(4), "b_dec": torch.zeros(3)}
    save_file(weights, tmp_path / "layer_0.safetensors")
    message = refusal(tmp_path)
    assert re.search(r"model_name is a list, expected text", message) and len(message) < 500


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 10000], ids=["empty", "cut", "list", "binary", "deep"])
def test_a_config_that_is_no_config(text, tmp_path):
    (copied(TOPK, tmp_path / "sae") / "cfg.json").write_text(text)
    assert re.search(r"cfg\.json (is not readable JSON|holds a list; expected names)", refusal(tmp_path / "sae"))


@pytest.mark.parametrize("text", [None, "{}"], ids=["missing", "empty"])
def test_weights_alone_do_not_say_their_rule(text, tmp_path):
    config = copied(TOPK, tmp_path / "sae") / "cfg.json"
    config.unlink()
    if text is not None:
        config.write_text(text)
    assert re.search(r"has no cfg\.json beside it, which says its rule; copy the folder", refusal(tmp_path / "sae"))


def test_a_config_of_gigabytes_is_not_read(tmp_path):
    with (copied(TOPK, tmp_path / "sae") / "cfg.json").open("wb") as file:
        file.truncate(2**31)
    assert "too long for a config" in refusal(tmp_path / "sae")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"architecture": "temporal"}, r"architecture is 'temporal', which saekit has no equal of; it reads standard"),
        ({"architecture": "batchtopk"}, r"which is one of training; save it with SAELens' save_inference_model"),
        ({"architecture": "saekit"}, r"a folder of saekit's own; load it with a saekit that is not older"),
        ({"normalize_activations": "minmax"}, r"'minmax'; saekit reads none, .*covariance_whitening"),
        ({"normalize_activations": "covariance_whitening"}, r"activation_whitening\.safetensors has no tensor mean"),
        ({"normalize_activations": "expected_average_only_in"}, r"do not say by how much; pass input_scale"),
        ({"k": "many"}, r"k is 'many', expected a whole number; correct it"),
        ({"k": True}, r"k is True, expected a whole number"),
        ({"k": 0}, r"was taken for saelens, but TopK\(k=0\)"),
        ({"k": None}, r"cfg\.json has no key k, only"),
        ({"apply_b_dec_to_input": "no"}, r"apply_b_dec_to_input is 'no', expected true or false"),
        ({"metadata": 3}, r"metadata is 3, expected a mapping"),
        ({"metadata": {"hook_name": 3}}, r"hook_name is 3, expected text"),
        ({"architecture": "gated"}, r"has no tensor b_gate, only"),
        ({"architecture": "jumprelu"}, r"has no tensor threshold, only"),
    ],
)  # fmt: skip
def test_a_saelens_config_that_does_not_fit(changes, said, tmp_path):
    scale_is_missing = "input_scale" in said
    assert re.search(said, refusal(copied(TOPK, tmp_path / "sae", **changes), headers_too=not scale_is_missing))


def test_a_legacy_activation_that_is_neither_relu_nor_topk(tmp_path):
    folder = copied(GOLDEN / "saelens" / "legacy_standard", tmp_path / "sae", activation_fn_str="tanh-relu")
    assert re.search(r"activation_fn is 'tanh-relu', .*relu and topk are read", refusal(folder))


def test_a_transcoder_under_a_normalisation_that_has_no_way_back(tmp_path):
    folder = copied(GOLDEN / "saelens" / "transcoder", tmp_path / "sae", normalize_activations="layer_norm")
    assert re.search(r"a transcoder with normalize_activations 'layer_norm' has no defined output", refusal(folder))


@pytest.mark.parametrize("changes, said", [({"activation": "relu"}, "'relu'"), ({"signed": True}, "'topk', signed")])
def test_a_sparsify_activation_of_another_age(changes, said, tmp_path):
    folder = copied(GOLDEN / "sparsify" / "topk" / "layers.5", tmp_path / "sae", **changes)
    assert re.search(rf"activation is {said}; saekit reads topk, groupmax, not signed", refusal(folder))


def test_a_dictionary_of_an_unknown_class_and_one_that_cannot_be_told(tmp_path):
    source = GOLDEN / "dictionary_learning" / "AutoEncoderTopK"
    folder = copied(source, tmp_path / "sae", trainer={"dict_class": "IdentityDict"})
    assert re.search(r"dict_class is 'IdentityDict'; expected one of AutoEncoder, .* in config\.json", refusal(folder))
    (folder / "config.json").unlink()
    assert re.search(r"in no format saekit knows .*config that belongs beside it may be missing", refusal(folder))


@pytest.mark.parametrize(
    "kind", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"]
)
def test_a_dictionary_without_its_config_is_told_from_its_tensors(kind, tmp_path):
    source = GOLDEN / "dictionary_learning" / kind
    (tmp_path / "ae.pt").write_bytes((source / "ae.pt").read_bytes())
    expected = load_file(source / "expected.safetensors")
    torch.testing.assert_close(saekit.load(tmp_path / "ae.pt")(expected["x"]), expected["output"], atol=1e-5, rtol=1e-5)


def test_tensors_of_two_saes(tmp_path):
    folder = copied(TOPK, tmp_path / "sae")
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"b_enc": torch.zeros(7)}, folder / "sae_weights.safetensors")
    assert re.search(r"taken for saelens, but b_enc is \(7,\), but 12 features .* need \(12,\)", refusal(folder))


def test_our_own_folder_is_checked_as_strictly(tmp_path):
    saekit.load(TOPK).save(tmp_path / "sae")
    path = tmp_path / "sae" / "sae_weights.safetensors"
    save_file(load_file(path) | {"b_enc": torch.zeros(7)}, path)
    assert re.search(r"b_enc in .* is \(7,\), but cfg\.json says \(12,\)", refusal(tmp_path / "sae"))
