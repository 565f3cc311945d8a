"""The index of published SAEs: its form, SAELens' form, its patterns, and the commands that list and verify it."""

import contextlib
import json
from pathlib import Path

import pytest
import yaml
from hub_server import COMMIT, Repository, sha256
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

import saekit.index
from saekit.errors import FileError, UnknownNameError
from saekit.formats.known import FORMATS
from saekit.index import IndexEntry, find, find_name, read_index
from saekit.loading import load_located
from saekit.pretrained import located
from saekit.targets import Site
from saekit_cli.main import main

GOLDEN = Path(__file__).parent / "golden" / "formats"

SAELENS = """
llama_scope_lxr_8x:
  repo_id: fnlp/Llama3_1-8B-Base-LXR-8x
  model: meta-llama/Llama-3.1-8B
  conversion_func: llama_scope
  saes:
  - id: l0r_8x
    path: Llama3_1-8B-Base-L0R-8x
    l0: 50.0
    neuronpedia: llama3.1-8b/0-llamascope-res-32k
    norm_scaling_factor: 58.9
gpt2-small-res-jb:
  repo_id: jbloom/GPT2-Small-SAEs-Reformatted
  model: gpt2-small
  conversion_func: null
  config_overrides:
    model_from_pretrained_kwargs: {center_writing_weights: true}
  links: {publication: https://example.org}
  saes:
  - id: blocks.0.hook_resid_pre
    path: blocks.0.hook_resid_pre
    l0: 10
    variance_explained: 0.999
mntss:
  repo_id: mntss/clt-gemma-2-2b-2.5M
  model: gemma-2-2b
  saes:
  - {id: layer_0, path: 0}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "index.yaml"
    path.write_text(text)
    return path


def test_saelens_own_list_is_read_as_it_is(tmp_path):
    index = read_index(written(tmp_path, SAELENS))
    llama = index["llama_scope_lxr_8x", "l0r_8x"]
    assert (llama.repo_id, llama.path) == ("fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L0R-8x")
    assert (llama.norm_scaling_factor, llama.l0) == (58.9, 50.0)
    gpt2 = index["gpt2-small-res-jb", "blocks.0.hook_resid_pre"]
    assert (gpt2.hook_name, gpt2.l0, gpt2.variance_explained) == ("blocks.0.hook_resid_pre", 10.0, 0.999)
    assert gpt2.links == {"publication": "https://example.org"}
    assert index["mntss", "layer_0"].path == "0"


def test_one_entry_stands_for_as_many_saes_as_its_lists_are_long(tmp_path):
    text = """
version: 2
releases:
  r:
    repo_id: a/b
    model: m
    d_in: 8
    saes:
      - id: "layer_{layer}/{width}"
        path: "l{layer}/average_l0_{l0}"
        each: {layer: 3-5, width: [16k, 16k, 65k], l0: [70, 71.5, 72]}
        l0: "{l0}"
        hook_name: "blocks.{layer}.hook_resid_post"
      - {id: other, path: x, d_in: 4}
"""
    index = read_index(written(tmp_path, text))
    assert list(index) == [("r", "layer_3/16k"), ("r", "layer_4/16k"), ("r", "layer_5/65k"), ("r", "other")]
    middle = index["r", "layer_4/16k"]
    assert (middle.path, middle.l0, middle.hook_name) == ("l4/average_l0_71.5", 71.5, "blocks.4.hook_resid_post")
    assert [entry.d_in for entry in index.values()] == [8, 8, 8, 4]


def release(saes: object, **more: object) -> str:
    shared = {"repo_id": "a/b", "model": "m"} | more
    return yaml.safe_dump({"version": 2, "releases": {"r": {**shared, "saes": saes}}})


@pytest.mark.parametrize(
    "text, said",
    [
        ("- a", "holds a list; expected releases by name"),
        ("version: 3\nreleases: {}", "is of a version that this saekit does not read; upgrade"),
        ("version: [", "cannot read the index"),
        ("version: 2\nreleases: {r: 3}", "release 'r' has no list of saes"),
        (release([{"path": "x"}]), "an SAE of r has no id"),
        (release([{"id": "x", "path": "x"}], model=None), "entry r/x lacks its model"),
        (release([{"id": "x", "path": "x"}], repo_id=None), "entry r/x lacks its repo_id"),
        (release([{"id": "x", "path": "x"}], repo_id="../../etc"), "repo_id is '../../etc', expected OWNER/NAME"),
        (release([{"id": "x", "path": "../../etc/x"}]), "would lie outside its folder"),
        (release([{"id": "x", "path": "x", "l0": "many"}]), "l0 is a str, expected a number; correct the index"),
        (release([{"id": "x", "path": "x", "d_in": 1.5}]), "d_in is a float, expected a whole number"),
        (release([{"id": "x", "path": "x", "sha256": 12}]), "sha256 is a int, expected text"),
        (release([{"id": "x", "path": "x"}] * 2), "r/x is there twice; give one of them another id"),
        (release([{"id": "x{a}", "path": "x", "each": {"a": "0-1", "b": [1]}}]), r"differ in length \(a 2, b 1\)"),
        (release([{"id": "x{a}", "path": "x", "each": {"a": "a-b"}}]), "each a is 'a-b'; expected a list, or a range"),
        (release([{"id": "x{a}", "path": "x", "each": {"a": "0-999999999"}}]), "expected a list, or a range"),
        (release([{"id": "x{a}", "path": "x", "each": [1]}]), "each is a list; expected names"),
    ],
)
def test_an_index_that_is_not_of_the_form_is_refused_in_one_line(text, said, tmp_path):
    with pytest.raises(FileError, match=said) as caught:
        read_index(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_bomb_of_aliases_is_refused_in_a_moment(tmp_path):
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    text = "\n".join(["a0: &a0 [x, x]", *levels, "version: 2", "releases: {r: {model: m, repo_id: a/b, saes: *a11}}"])
    with pytest.raises(FileError, match="an SAE of r has no id"):
        read_index(written(tmp_path, text))


@given(st.binary(max_size=200))
def test_any_bytes_are_an_index_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("index") / "index.yaml"
    path.write_bytes(content)
    with contextlib.suppress(FileError):
        read_index(path)


def test_our_own_index_says_what_it_promises():
    index = read_index()
    assert len({release for release, _ in index}) > 20
    formats = {known.name for known in FORMATS} | {"saekit"}
    for entry in index.values():
        assert (entry.format in formats and entry.d_in and entry.rule is not None) or entry.package
        assert (entry.revision is None) == (entry.verified is None), entry.name
        assert not any("{" in str(value) for value in (entry.sae_id, entry.path, entry.site, entry.l0)), entry.name
        for site in (entry.hook_name, entry.hf_hook_name):
            assert not site or Site.parse(site)
        assert Site.parse(entry.site)
    gemma = find("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
    assert (gemma.path, gemma.l0, gemma.d_sae) == ("layer_20/width_16k/average_l0_71", 71.0, 16384)
    assert find("llama_scope_lxr_8x", "l31r_8x").norm_scaling_factor == pytest.approx(0.859, abs=1e-3)


def test_names_that_are_nearly_right_get_the_closest():
    assert find_name("no-such-release/x") is None
    with pytest.raises(
        UnknownNameError, match=r"no SAE in gpt2-small-res-jb named 'blocks\.8\.hook_resid'; closest .*"
    ):
        find_name("gpt2-small-res-jb/blocks.8.hook_resid")
    with pytest.raises(UnknownNameError, match="no SAE in gpt2-small-res-jb named ''"):
        find_name("gpt2-small-res-jb")


def test_a_scale_that_only_the_index_knows_is_folded(hub):
    folder = GOLDEN / "saelens" / "expected_average"
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "activation_scaler.json"}
    hub.repositories["a/b"] = Repository(files)
    entry = IndexEntry(release="r", sae_id="x", model="m", repo_id="a/b", norm_scaling_factor=1.75)
    assert (load_located(located(entry)).encoder == saekit.load(folder).encoder).all()


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_list_shows_releases_then_saes_and_filters(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert "gpt2-small-res-jb" in out and "13 of gpt2 (not verified)" in out and "1 of pystd\n" in out
    code, out, _ = run(capsys, "list", "res-jb blocks.8")
    facts = "gpt2, transformer.h.8:in, 768 -> 24,576, L0 60, not verified"
    assert out == f"  gpt2-small-res-jb/blocks.8.hook_resid_pre  {facts}\n"
    code, out, _ = run(capsys, "list", "--model", "gemma-2-2b", "--json")
    saes = json.loads(out)["saes"]
    assert {sae["model"] for sae in saes} == {"google/gemma-2-2b"}
    assert {"name", "repo_id", "sha256", "verified", "licence", "hf_hook_name"} <= set(saes[0])
    code, out, err = run(capsys, "list", "gtp2")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "no published SAE named 'gtp2'; closest of" in err


def test_list_reads_another_index(capsys, tmp_path):
    _, out, _ = run(capsys, "list", "llama", "--index", str(written(tmp_path, SAELENS)))
    assert "llama_scope_lxr_8x/l0r_8x" in out


@pytest.fixture
def theirs(hub, tmp_path):
    """An index of one SAE, and the repository that it describes."""
    folder = GOLDEN / "saelens" / "topk"
    files = {f"x/{path.name}": path.read_bytes() for path in folder.iterdir() if path.name != "expected.safetensors"}
    hub.repositories["them/saes"] = Repository(files)
    entry = {
        "id": "x", "path": "x", "d_in": 6, "d_sae": 12, "format": "saelens", "revision": COMMIT,
        "sha256": sha256(files["x/sae_weights.safetensors"]), "hook_name": saekit.load(folder).cfg.hook_name,
    }  # fmt: skip
    return entry, files


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, ""),
        ({"d_in": 7}, "d_in is 6, the index says 7"),
        ({"d_sae": 7}, "d_sae is 12, the index says 7"),
        ({"format": "sparsify"}, "format is saelens, the index says sparsify"),
        ({"sha256": "0" * 64}, "the index says 000000"),
        ({"path": "y"}, "has no y, but x/cfg.json"),
        ({"revision": "v9"}, "has no revision v9"),
        ({"hook_name": "blocks.9.hook_resid_mid"}, "the index says blocks.9.hook_resid_mid"),
    ],
)
def test_verify_finds_what_is_not_as_described(theirs, change, said, tmp_path, capsys, hub):
    entry, _ = theirs
    path = written(tmp_path, release([entry | change], repo_id="them/saes"))
    code, out, _ = run(capsys, "index", "verify", "--index", str(path), "--json")
    facts = json.loads(out)
    assert code == bool(said) == facts["wrong"]
    assert said in " ".join(facts["saes"][0]["problems"])
    # it is found out from headers and lists
    assert not list(Path(constants.HF_HUB_CACHE).rglob("sae_weights.safetensors"))
    if not said:
        assert facts["saes"][0]["found"]["verified"] is not None


def test_add_prints_an_entry_that_verifies_and_loads(theirs, tmp_path, capsys, monkeypatch):
    code, out, _ = run(capsys, "index", "add", "them/saes:x", "--release", "mine", "--id", "layer", "--model", "m")
    assert code == 0
    path = written(tmp_path, f"version: 2\nreleases:\n{out}")
    entry = read_index(path)["mine", "layer"]
    assert (entry.revision, entry.d_in, entry.d_sae, entry.rule) == (COMMIT, 6, 12, "TopK(3)")
    assert entry.sha256 == theirs[0]["sha256"]
    assert run(capsys, "index", "verify", "--index", str(path))[0] == 0
    monkeypatch.setattr(saekit.index, "index_path", lambda: path)
    assert saekit.SAE.from_pretrained("mine", "layer").n_features == 12


def test_add_refuses_in_one_line(hub, capsys):
    assert "is no place on the Hub; give OWNER/NAME" in run(capsys, "index", "add", "x")[2]
    assert "no repository a/b on the Hub" in run(capsys, "index", "add", "a/b")[2]


def test_an_sae_that_comes_with_saekit_is_verified_without_the_hub(capsys):
    code, out, _ = run(capsys, "index", "verify", "pystd")
    assert (code, "as described" in out) == (0, True)
