"""SAEs on the Hub, from a Hub on this machine: what is fetched, what is refused, and what is said."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hub_server import COMMIT, TOKEN, Repository, running, sha256
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import saekit
import saekit.index
from saekit.errors import FileError, UnknownNameError
from saekit.hub import HubPlace
from saekit.loading import describe
from saekit.normalisation import ConstantNorm
from saekit_cli.main import main

GOLDEN = Path(__file__).parent / "golden" / "formats"


def files_of(folder: Path, below: str = "") -> dict[str, bytes]:
    names = [path for path in folder.rglob("*") if path.is_file() and path.name != "expected.safetensors"]
    return {f"{below}{path.relative_to(folder).as_posix()}": path.read_bytes() for path in names}


@pytest.fixture
def sparsify(hub) -> Repository:
    """Two layers and a training config above them, and a large file that nobody needs."""
    files = files_of(GOLDEN / "sparsify" / "topk") | files_of(GOLDEN / "sparsify" / "topk" / "layers.5", "layers.10/")
    files |= {"optimizer.bin.tmp": b"x" * 1000, "README.md": b"# SAEs"}
    hub.repositories["them/saes"] = Repository(files)
    return hub.repositories["them/saes"]


def refusal(name: str) -> str:
    with pytest.raises(FileError) as caught:
        saekit.load(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_golden(sae: saekit.SAE, folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    torch.testing.assert_close(sae(expected["x"]), expected["output"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "text, place",
    [
        ("a/b", HubPlace("a/b")),
        ("a/b:layers.5", HubPlace("a/b", None, "layers.5")),
        ("a/b@v1:x/y.pt", HubPlace("a/b", "v1", "x/y.pt")),
        ("a/b@refs/pr/1", HubPlace("a/b", "refs/pr/1", "")),
        ("a", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("/a/b", None),
        ("../b", None),
    ],
)
def test_places_have_one_form(text, place):
    assert HubPlace.parse(text) == place
    if place is not None:
        assert str(place) == text


@pytest.mark.parametrize("path", ["../x", "a/../../x", "a\\..\\x", "C:/x", "a//b", "x\0y"])
def test_a_path_that_leaves_the_repository_is_refused(path):
    with pytest.raises(FileError, match="outside its folder"):
        HubPlace.parse(f"a/b:{path}")


def test_only_the_files_of_the_sae_are_fetched(hub, sparsify):
    sae = saekit.load("them/saes:layers.5")
    assert_golden(sae, GOLDEN / "sparsify" / "topk" / "layers.5")
    # the config above the folder is part of what the files say
    assert (sae.cfg.hook_name, sae.cfg.model_name) == ("layers.5", "EleutherAI/pythia-70m")
    (snapshot,) = Path(constants.HF_HUB_CACHE).glob("models--them--saes/snapshots/*")
    fetched = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    assert fetched == {"layers.5/cfg.json", "layers.5/sae.safetensors", "config.json"}
    assert snapshot.name == COMMIT


@pytest.mark.parametrize("name", ["them/saes@main:layers.5", f"them/saes@{COMMIT}:layers.5/sae.safetensors"])
def test_what_is_here_is_not_sent_again(hub, sparsify, name):
    saekit.load(name)
    sent = hub.sent
    hub.requests.clear()
    saekit.load(name)
    assert hub.sent == sent
    # a commit is always the same: nothing needs to be asked
    assert bool(hub.requests) == ("@main" in name)


def test_a_repository_of_one_sae_needs_no_path(hub):
    hub.repositories["me/one"] = Repository(files_of(GOLDEN / "saelens" / "topk"))
    assert_golden(saekit.load("me/one"), GOLDEN / "saelens" / "topk")


def test_info_of_a_large_sae_fetches_its_header_alone(hub, capsys):
    sae = saekit.SAE(256, 4096, saekit.TopK(8))
    sae.save(Path(constants.HF_HUB_CACHE).parent / "large")
    hub.repositories["me/large"] = Repository(files_of(Path(constants.HF_HUB_CACHE).parent / "large"))
    assert main(["info", "me/large"]) == 0
    assert "256 -> 4,096 features -> 256" in capsys.readouterr().out
    assert hub.sent < 200_000 < len(hub.repositories["me/large"].files["sae_weights.safetensors"])


def test_info_reads_single_numbers_and_npz_from_afar(hub):
    golden = GOLDEN / "saelens" / "jumprelu"
    hub.repositories["me/jumprelu"] = Repository(files_of(golden))
    far, near = describe("me/jumprelu"), describe(golden)
    assert (far.format, far.dtype, far.size) == (near.format, near.dtype, near.size)
    assert far.weights.encoder.shape == near.weights.encoder.shape and far.weights.encoder.is_meta
    path = Path(constants.HF_HUB_CACHE).parent / "params.npz"
    tensors = {"W_enc": (64, 512), "b_enc": 512, "W_dec": (512, 64), "b_dec": 64, "threshold": 512}
    np.savez(path, **{name: np.ones(shape, np.float32) for name, shape in tensors.items()})
    name = "layer_20/width_16k/average_l0_71"
    hub.repositories["google/gemma-scope-2b-pt-res"] = Repository({f"{name}/params.npz": path.read_bytes()})
    described = describe(f"google/gemma-scope-2b-pt-res:{name}")
    assert (described.format, described.weights.hook_name) == ("gemma-scope", "blocks.20.hook_resid_post")
    assert (described.weights.d_in, described.weights.n_features) == (64, 512)
    assert described.weights.model_name == "google/gemma-2-2b"
    # and the same once it is here
    sae = saekit.load(f"google/gemma-scope-2b-pt-res:{name}")
    assert (sae.cfg.hook_name, sae.cfg.model_name) == ("blocks.20.hook_resid_post", "google/gemma-2-2b")


def test_a_scalar_in_a_header_has_its_value(hub):
    folder = Path(constants.HF_HUB_CACHE).parent / "scalar"
    folder.mkdir()
    tensors = load_file(GOLDEN / "saelens" / "standard" / "sae_weights.safetensors")
    save_file(tensors | {"threshold": torch.tensor(0.375)}, folder / "sae_weights.safetensors")
    config = (GOLDEN / "saelens" / "jumprelu" / "cfg.json").read_bytes()
    hub.repositories["me/scalar"] = Repository(files_of(folder) | {"cfg.json": config})
    assert float(describe("me/scalar").weights.rule.theta) == 0.375


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "them/saes",
            r"no SAE in them/saes itself; it has 2 below \(layers\.5, layers\.10\): .*: them/saes:layers\.5$",
        ),
        ("them/saes:layers.7", r"them/saes has no layers\.7, but .*; check the path"),
        ("them/saes@v9:layers.5", r"them/saes has no revision v9; give a branch, a tag or a full commit"),
        ("them/nothing", r"no repository them/nothing on the Hub \(nor a local .*HF_TOKEN"),
        ("them/gated", r"them/gated is gated: accept its terms on http.*/them/gated, then log in"),
        ("them/saes/layers.5", r"no file or folder them/saes/layers\.5; give .*OWNER/NAME\[@REVISION\]\[:PATH\]"),
        ("them/empty", r"no SAE in them/empty: expected one of sae_weights\.safetensors"),
    ],
)
def test_what_cannot_be_found_is_said_in_one_line(hub, sparsify, name, said):
    hub.repositories["them/gated"] = Repository(files_of(GOLDEN / "saelens" / "topk"), gated=True)
    hub.repositories["them/empty"] = Repository({"README.md": b""})
    assert re.search(said, refusal(name))


def test_a_private_repository_opens_with_a_token(hub, monkeypatch):
    hub.repositories["me/private"] = Repository(files_of(GOLDEN / "saelens" / "topk"), private=True)
    assert "set HF_TOKEN" in refusal("me/private")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_golden(saekit.load("me/private"), GOLDEN / "saelens" / "topk")


@pytest.mark.parametrize("part", ["/api/models", "/resolve/", "/cdn/"])
def test_a_hub_that_stumbles_is_asked_again(hub, sparsify, part):
    hub.broken[part] = [503, 500]
    assert_golden(saekit.load("them/saes:layers.5"), GOLDEN / "sparsify" / "topk" / "layers.5")
    assert hub.broken[part] == []


def test_a_hub_that_is_down_is_said_to_be(hub, sparsify):
    hub.broken["/api/models"] = [503] * 3
    assert "the Hub answers 503 for them/saes:layers.5, 3 times now; try again later" in refusal("them/saes:layers.5")
    assert hub.broken["/api/models"] == []


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, sparsify, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    size = len(sparsify.files["layers.5/sae.safetensors"])
    hub.cut["layers.5/sae.safetensors"] = 400
    assert_golden(saekit.load("them/saes:layers.5"), GOLDEN / "sparsify" / "topk" / "layers.5")
    small = sum(len(sparsify.files[name]) for name in ("layers.5/cfg.json", "config.json"))
    assert hub.sent == size + small
    assert hub.asked_for("/cdn/") == 2


def test_bytes_that_are_not_what_the_hub_lists_are_not_used(hub, sparsify):
    right = sparsify.files["layers.5/sae.safetensors"]
    hub.altered["layers.5/sae.safetensors"] = right[:-1] + b"?"
    assert "is not what the Hub describes (sha256" in refusal("them/saes:layers.5")
    assert not [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.name == sha256(right)]
    hub.altered.clear()
    assert_golden(saekit.load("them/saes:layers.5"), GOLDEN / "sparsify" / "topk" / "layers.5")


def test_offline_what_is_here_will_do_and_what_is_not_is_said(hub, sparsify, monkeypatch):
    saekit.load("them/saes:layers.5")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.warns(
        UserWarning, match=f"HF_HUB_OFFLINE is set; .*using what is on this machine, commit {COMMIT[:8]}"
    ):
        assert_golden(saekit.load("them/saes:layers.5"), GOLDEN / "sparsify" / "topk" / "layers.5")
    assert_golden(saekit.load(f"them/saes@{COMMIT}:layers.5"), GOLDEN / "sparsify" / "topk" / "layers.5")
    with (
        pytest.warns(UserWarning, match="on this machine"),
        pytest.raises(FileError, match=r"has no layers\.10 on this machine, but"),
    ):
        saekit.load("them/saes:layers.10")
    assert "them/others is not on this machine, and HF_HUB_OFFLINE is set; unset it" in refusal("them/others")


def test_a_hub_out_of_reach(hub, sparsify, monkeypatch):
    saekit.load("them/saes:layers.5")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match="cannot reach the Hub"):
        assert_golden(saekit.load("them/saes:layers.5"), GOLDEN / "sparsify" / "topk" / "layers.5")
    assert "cannot reach the Hub for them/others" in refusal("them/others")


def test_a_list_with_a_name_that_leaves_the_cache_is_refused_whole(hub, sparsify, tmp_path):
    sparsify.files["layers.5/../../../../../../escaped.json"] = b"{}"
    assert "would lie outside its folder; nothing was fetched" in refusal("them/saes:layers.5")
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_a_pickle_from_the_hub_is_refused_and_not_run(hub, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    torch.save({"encoder.weight": torch.zeros(4, 3), "extra": Payload()}, tmp_path / "ae.pt")
    hub.repositories["me/pickle"] = Repository({"ae.pt": (tmp_path / "ae.pt").read_bytes()})
    assert "could run code" in refusal("me/pickle")
    assert not (tmp_path / "it ran").exists()


INDEX = """
version: 2
releases:
  theirs:
    repo_id: them/saes
    revision: {commit}
    model: EleutherAI/pythia-70m
    saes:
      - id: five
        path: layers.5
        sha256: {sha256}
        l0: 3
"""


@pytest.fixture
def index(sparsify, monkeypatch, tmp_path) -> Path:
    path = tmp_path / "index.yaml"
    weights = sparsify.files["layers.5/sae.safetensors"]
    path.write_text(INDEX.format(commit=COMMIT, sha256=sha256(weights)))
    monkeypatch.setattr(saekit.index, "index_path", lambda: path)
    return path


def test_an_entry_of_the_index_is_fetched_and_its_hash_checked(index, sparsify):
    for sae in (saekit.load("theirs/five"), saekit.load("theirs"), saekit.SAE.from_pretrained("theirs", "five")):
        assert_golden(sae, GOLDEN / "sparsify" / "topk" / "layers.5")
        assert sae.cfg.metadata["l0"] == 3
    with pytest.raises(UnknownNameError, match="no SAE in theirs named 'six'; closest of 1: five"):
        saekit.load("theirs/six")


def test_what_an_index_overrides_counts_for_more_than_the_files(hub, monkeypatch, tmp_path):
    source = GOLDEN / "saelens" / "jumprelu_constant_norm"
    files = files_of(source)
    said = json.loads(files["cfg.json"])
    assert said["normalize_activations"] == "constant_norm_rescale"
    files["cfg.json"] = json.dumps(said | {"normalize_activations": "none"}).encode()
    hub.repositories["them/scaled"] = Repository(files)
    # in the form of SAELens' list
    release = {"model": "m", "repo_id": "them/scaled", "saes": [{"id": "blocks.3.hook_resid_post", "path": "."}]}
    release["config_overrides"] = {"normalize_activations": "constant_norm_rescale"}
    path = tmp_path / "index.yaml"
    path.write_text(yaml.safe_dump({"theirs": release}))
    monkeypatch.setattr(saekit.index, "index_path", lambda: path)
    assert_golden(saekit.load("theirs/blocks.3.hook_resid_post"), source)
    assert describe("theirs").weights.normalisation == ConstantNorm()
    with pytest.raises(AssertionError):  # and without it, it is another SAE
        assert_golden(saekit.load("them/scaled"), source)


def test_a_wrong_hash_means_that_nothing_is_used_and_the_copy_is_gone(index, sparsify):
    index.write_text(index.read_text().replace("sha256: ", "sha256: 0"))
    saved = Path(constants.HF_HUB_CACHE)
    assert "is not what the index describes (sha256" in refusal("theirs/five")
    # neither the bytes nor a link to them
    assert not [path for path in saved.rglob("*") if path.name == "sae.safetensors"]
    assert not [path for path in saved.rglob("*") if path.is_file() and path.stat().st_size > 1000]


def test_a_local_folder_wins_over_the_index_and_the_hub(index, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    saekit.SAE(4, 8, saekit.TopK(2)).save(tmp_path / "theirs" / "five")
    assert saekit.load("theirs/five").d_model == 4
    assert hub.requests == []


def test_in_a_process_of_its_own_the_environment_says_where_the_hub_is(tmp_path):
    with running() as server:
        server.repositories["me/one"] = Repository(files_of(GOLDEN / "saelens" / "topk"))
        environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        command = [sys.executable, "-m", "saekit_cli.main", "info", "me/one", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment | kept)
    assert done.returncode == 0, done.stderr
    assert '"format": "saelens"' in done.stdout
