"""`saekit upload`, to a Hub on this machine: what arrives, what is said of it, and what is refused."""

import json

import pytest
import yaml
from hub_server import TOKEN, Repository
from huggingface_hub import constants

import saekit
from saekit.hub import HubPlace
from saekit.publishing import card
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import Threshold, TopK
from saekit_cli.main import main

# of the Hub's client, about its own call
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

FILES = {"cfg.json", "sae_weights.safetensors", "README.md"}


@pytest.fixture
def folder(tmp_path):
    cfg = SAEConfig(
        d_in=4, d_sae=8, hook_name="model.layers.2", model_name="them/model", metadata={
            "text": "stdlib",
            "training": {"learning_rate": 0.003, "anneal": None, "objective": "A | B"},
            "evaluation": {"tokens": 1234, "fvu": 0.125, "l0": 2.0},
        },
    )  # fmt: skip
    SAE(4, 8, TopK(2), cfg=cfg).save(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def test_it_arrives_private_with_a_card_and_loads_again(hub, folder, token, capsys):
    assert main(["upload", str(folder), "me/saes", "--licence", "MIT"]) == 0
    assert "to me/saes: http" in capsys.readouterr().out
    there = hub.repositories["me/saes"]
    assert there.private and set(there.files) - {".gitattributes"} == FILES
    assert there.files["sae_weights.safetensors"] == (folder / "sae_weights.safetensors").read_bytes()
    again = saekit.load("me/saes")
    assert (again.encoder == saekit.load(folder).encoder).all() and again.cfg == saekit.load(folder).cfg


def test_several_saes_share_a_repository_by_path(hub, folder, token):
    for name in ("layers.1", "layers.2"):
        assert main(["upload", str(folder), "me/saes", "--path", name, "--public"]) == 0
    there = hub.repositories["me/saes"]
    assert not there.private
    assert {f"{name}/{file}" for name in ("layers.1", "layers.2") for file in FILES} <= set(there.files)
    assert "saekit.load('me/saes:layers.2')" in there.files["layers.2/README.md"].decode()
    assert saekit.load("me/saes:layers.1").n_features == 8


def test_a_dry_run_shows_all_and_asks_nobody(hub, folder, capsys):
    assert main(["upload", str(folder), "me/saes", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in FILES) and "library_name: saekit" in out
    assert main(["upload", str(folder), "me/saes", "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["sent"], facts["url"], facts["private"]) == (False, None, True)
    assert facts["files"]["sae_weights.safetensors"] == (folder / "sae_weights.safetensors").stat().st_size
    assert hub.requests == [] and hub.repositories == {}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["saes"], "saes is no repository; give OWNER/NAME"),
        (["me/saes@v1"], "names a revision; uploads go to the main branch"),
        (["me/saes", "--path", "../x"], "would lie outside its folder"),
        (["me/open"], "me/open exists and is public; pass --public"),
    ],
)
def test_what_is_refused_changes_nothing(hub, folder, token, arguments, said, capsys):
    hub.repositories["me/open"] = Repository({"README.md": b"# mine"})
    assert main(["upload", str(folder), *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and said in printed.err
    assert hub.repositories["me/open"].files == {"README.md": b"# mine"}


def test_without_a_token_the_line_says_how_to_get_one(hub, folder, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    assert main(["upload", str(folder), "me/saes"]) == 1
    assert "uploading needs a token that may write: log in with `hf auth login`" in capsys.readouterr().err
    assert hub.repositories == {}


def test_a_hub_that_stumbles_while_sending_is_asked_again(hub, folder, token):
    hub.broken["/commit/"] = [500]
    assert main(["upload", str(folder), "me/saes"]) == 0
    assert set(hub.repositories["me/saes"].files) >= FILES


@pytest.mark.parametrize(
    "part, status, said",
    [
        ("/commit/", 403, "cannot write to me/saes: 403 Forbidden: "),
        ("/preupload/", 400, "cannot write to me/saes: out of order; mend that, and send it again"),
        ("/validate-yaml", 400, "cannot write to me/saes: Invalid metadata in README.md.; mend that, and"),
        ("/repos/create", 401, "HF_TOKEN to a token that may write it"),
    ],
)
def test_what_the_hub_refuses_is_told_as_sending(hub, folder, token, part, status, said, capsys):
    hub.broken[part] = [status]
    assert main(["upload", str(folder), "me/saes"]) == 1
    line = capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]
    assert said in line and "fetch" not in line and "Request ID" not in line


@pytest.mark.parametrize("model", ["./my-model", "/models/mine", "models/mine", "pystd", "~/mine"])
def test_a_card_names_no_model_that_the_hub_does_not_have(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    sae = SAE(4, 8, TopK(2), cfg=SAEConfig(d_in=4, d_sae=8, model_name=model))
    assert "base_model" not in card(sae, HubPlace("me/saes"))


def test_the_card_says_what_is_recorded_and_no_more(folder):
    text = card(saekit.load(folder), HubPlace("me/saes"), licence="MIT")
    front = yaml.safe_load(text.split("---")[1])
    assert front == {
        "library_name": "saekit", "tags": ["sparse-autoencoder", "interpretability"], "license": "mit",
        "base_model": "them/model",
    }  # fmt: skip
    for said in (
        "# Sparse autoencoder on them/model, model.layers.2", "| model | them/model |", "4 → 8 features → 4",
        "| rule | `TopK(k=2)` |", "saekit.load('me/saes')", "over 1,234 activations", "| `fvu` | 0.125 (",
        "| `learning_rate` | `0.003` |", r"`A \| B`",
    ):  # fmt: skip
        assert said in text
    assert "anneal" not in text and "ce_recovered" not in text
    bare = card(SAE(4, 8, Threshold(0.5)), HubPlace("me/saes"))
    assert "license" not in bare and "base_model" not in bare and "## How it was trained" not in bare
    assert "Not recorded; `saekit eval` measures them." in bare and "JumpReLU" in bare
