"""Damaged files by the thousand: every one is read as it is or refused in one line, and nothing else happens."""

import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import saekit
from saekit.errors import FileError, SaekitError
from saekit.formats.choosing import companions, weights_among
from saekit.formats.tensor_files import read_header, read_tensors
from saekit.hub import HubPlace
from saekit.loading import describe

GOLDEN = Path(__file__).parent / "golden" / "formats"
SAFETENSORS = (GOLDEN / "saelens" / "jumprelu" / "sae_weights.safetensors").read_bytes()
HEADER = 8 + int.from_bytes(SAFETENSORS[:8], "little")
PICKLE = (GOLDEN / "dictionary_learning" / "AutoEncoder" / "ae.pt").read_bytes()
many = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A SAELens folder whose weights are overwritten."""
    folder = tmp_path_factory.mktemp("fuzz") / "sae"
    folder.mkdir()
    (folder / "cfg.json").write_bytes((GOLDEN / "saelens" / "jumprelu" / "cfg.json").read_bytes())
    return folder


def outcome(call) -> str:
    """What it gives, or the one line that says why not; any other error is a failure."""
    said = ""
    try:
        call()
    except SaekitError as error:
        said = str(error)
    assert "\n" not in said and len(said) < 2000
    return said


def opened(path: Path) -> io.BufferedReader:
    return path.open("rb")


def flipped(content: bytes, bits: list[int]) -> bytes:
    changed = bytearray(content)
    for bit in bits:
        changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    return bytes(changed)


@many
@given(st.lists(st.integers(0, 8 * HEADER - 1), min_size=1, max_size=3))
def test_flipped_bits_in_a_header(place, bits):
    path = place / "sae_weights.safetensors"
    path.write_bytes(flipped(SAFETENSORS, bits))
    outcome(lambda: saekit.load(place))
    outcome(lambda: describe(place))
    with opened(path) as file:
        outcome(lambda: read_header(path, file))


@many
@given(st.integers(0, len(SAFETENSORS)), st.binary(max_size=8))
def test_a_file_that_is_cut_short_or_longer(place, length, more):
    path = place / "sae_weights.safetensors"
    changed = SAFETENSORS[:length] + more
    path.write_bytes(changed)
    loads = outcome(lambda: saekit.load(place)) == ""
    if changed == SAFETENSORS:
        assert loads
    # other bytes in the same place are another weight, which nothing but a hash could tell
    elif len(changed) != len(SAFETENSORS):
        assert not loads


numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none(), st.text(max_size=3))


@settings(many, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["W_enc", "b_enc", "../../x", "__metadata__"]),
        st.one_of(
            numbers,
            st.fixed_dictionaries(
                {
                    "dtype": st.one_of(st.sampled_from(["F32", "F16", "U8", "F8_E4M3", "X"]), numbers),
                    "shape": st.one_of(st.lists(numbers, max_size=4), numbers),
                    "data_offsets": st.one_of(st.lists(numbers, max_size=3), numbers),
                }
            ),
        ),
    ),
    st.integers(0, 64),
)
def test_absurd_headers_are_refused_without_memory(place, header, size):
    text = json.dumps(header).encode()
    path = place / "sae_weights.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    tracemalloc.start()
    with opened(path) as file:
        outcome(lambda: read_header(path, file))
    outcome(lambda: read_tensors(path))
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("length", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_a_length_that_no_file_has(place, length):
    path = place / "sae_weights.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with opened(path) as file:
        assert f"a header of {length:,} bytes in a file of 10" in outcome(lambda: read_header(path, file))


shapes = st.lists(st.integers(0, 5), max_size=3)


@many
@given(
    st.dictionaries(st.text(min_size=1, max_size=5).filter(lambda s: s.isprintable()), shapes, min_size=1, max_size=4)
)
def test_a_header_from_afar_says_what_the_file_does(tmp_path_factory, described):
    tensors = {
        name: torch.arange(torch.Size(shape).numel()).reshape(shape).float() for name, shape in described.items()
    }
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(save(tensors))
    near, _ = read_tensors(path, contents=False)
    with opened(path) as file:
        far, _ = read_header(path, file)
    assert set(far) == set(near)
    for name in near:
        assert (far[name].shape, far[name].dtype) == (near[name].shape, near[name].dtype)
        if far[name].numel() == 1:
            assert float(far[name]) == float(near[name])


@many
@given(st.lists(st.integers(0, 8 * len(PICKLE) - 1), min_size=1, max_size=4))
def test_flipped_bits_in_a_pickle(tmp_path_factory, bits):
    path = tmp_path_factory.mktemp("fuzz") / "ae.pt"
    path.write_bytes(flipped(PICKLE, bits))
    outcome(lambda: saekit.load(path))
    assert [other.name for other in path.parent.iterdir()] == ["ae.pt"]


@many
@given(
    st.dictionaries(
        st.sampled_from(["k", "architecture", "d_sae", "metadata", "normalize_activations", "dtype"]), numbers
    )
)
def test_configs_of_any_values(place, changes):
    (place / "sae_weights.safetensors").write_bytes(SAFETENSORS)
    original = json.loads((GOLDEN / "saelens" / "jumprelu" / "cfg.json").read_text())
    (place / "cfg.json").write_text(json.dumps(original | changes))
    try:
        outcome(lambda: saekit.load(place))
    finally:
        (place / "cfg.json").write_text(json.dumps(original))


def test_a_bomb_of_aliases_in_a_config_costs_nothing(tmp_path):
    levels = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 14))]
    (tmp_path / "config.yaml").write_text("\n".join([*levels, "model_name: *a13"]))
    tensors = {"W_enc": torch.zeros(3, 2), "W_dec": torch.zeros(3, 2), "b_enc": torch.zeros(3), "b_dec": torch.zeros(2)}
    (tmp_path / "layer_1.safetensors").write_bytes(save(tensors))
    tracemalloc.start()
    assert "model_name is a list, expected text" in outcome(lambda: saekit.load(tmp_path))
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


def test_members_of_an_archive_that_would_leave_it_are_only_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("../../escaped.npy", b"\x93NUMPY\x01\x00")
    with pytest.raises(FileError):
        saekit.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["params.npz"]


names = st.lists(
    st.sampled_from(["a", "b", "..", "layers.5", "sae.safetensors", "cfg.json", "x.pt", "checkpoints"]),
    min_size=1,
    max_size=4,
)


@many
@given(st.lists(names.map("/".join), max_size=8))
def test_what_is_chosen_is_one_of_the_names(listed):
    found: list[str] = []
    outcome(lambda: found.append(weights_among(listed, place="here", example="here/{}")))
    assert set(found) <= set(listed)
    for weights in found:
        assert set(companions(weights, listed)) <= set(listed)


@many
@given(st.text(alphabet="ab./@:\\-~ \n", max_size=20))
def test_any_text_is_a_place_inside_a_repository_or_none(text):
    try:
        place = HubPlace.parse(text)
    except FileError:
        return
    if place is not None:
        assert ".." not in place.path.split("/") and not place.path.startswith("/")
        assert place.repo.count("/") == 1 and ".." not in place.repo.split("/")
