"""Features for Neuronpedia, codes for delphi, thresholds for SAELens: their layouts, and the numbers of ours."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.numpy import load_file

from saekit.activations.harvest import Harvest
from saekit.activations.mask import MaskPolicy
from saekit.activations.text import read_documents
from saekit.activations.tokens import tokenize_documents
from saekit.analysis.delphi_cache import write_delphi_cache
from saekit.analysis.evaluate import evaluate
from saekit.dashboards.neuronpedia import batch, write_batch
from saekit.dashboards.page_of_sae import page_of_sae
from saekit.errors import DataError, FileError, SaekitError
from saekit.loading import build, load, weights_of
from saekit.patching import Add, Intervention
from saekit.patching.generation import steer
from saekit.sae import SAE
from saekit.selection import MutualChoice, Threshold, TopK
from saekit.targets import Site, Target
from saekit_cli.main import main


@pytest.fixture(scope="module")
def sae() -> SAE:
    return SAE.from_pretrained("pystd", "layers.2")


@pytest.fixture(scope="module")
def harvest(sae) -> Harvest:
    target = Target.load("pystd")
    rows = tokenize_documents(read_documents("stdlib", limit=3), target.tokenizer, context=64).select(slice(24))
    return Harvest(target=target, rows=rows, sites=(Site.parse(sae.cfg.hook_name),), mask=MaskPolicy(), batch_rows=8)


def test_neuronpedia_gets_its_keys_and_our_numbers(sae, harvest, tmp_path):
    page, measured = page_of_sae(sae, harvest, metrics={}, n_features=4)
    contents = batch(page, layer=2, sae_set="mine", n_prompts=24, context=64, dataset="stdlib")
    written = json.loads(write_batch(tmp_path / "new" / "folder", contents).read_text(encoding="utf-8"))
    assert (written["model_id"], written["layer"], written["sae_set"]) == ("pystd", 2, "mine")
    assert [feature["feature_index"] for feature in written["features"]] == [f.feature for f in page.features]
    for feature in written["features"]:
        index = feature["feature_index"]
        assert feature["frac_nonzero"] == float(measured.statistics.density[index])
        assert sum(feature["freq_hist_data_bar_heights"]) == int(measured.statistics.active[index])
        assert len(feature["pos_str"]) == len(feature["pos_values"]) == len(feature["neg_str"]) == 10
        assert feature["neuron_alignment_indices"] == feature["correlated_features_pearson"] == []
        top = [example for example in feature["activations"] if example["bin_contains"] == -1]
        assert top and top[0]["bin_max"] == pytest.approx(float(measured.statistics.max[index]), abs=1e-4)
        for example in feature["activations"]:
            peak = example["values"][example["qualifying_token_index"]]
            assert len(example["tokens"]) == len(example["values"]) and 0 < peak <= example["bin_max"]
            assert all(isinstance(token, str) for token in example["tokens"])
        intervals = {example["bin_contains"] for example in feature["activations"]} - {-1}
        assert intervals <= {0.25}


def test_neuronpedia_gets_a_text_whose_name_is_no_utf8(tmp_path):
    path = write_batch(tmp_path, {"dataset": os.fsdecode(b"caf\xe9.txt"), "features": []})
    assert json.loads(path.read_text(encoding="utf-8"))["dataset"].startswith("caf")
    assert [file.name for file in tmp_path.iterdir()] == ["batch-0.json"]


def test_delphi_finds_every_code_where_it_looks(sae, harvest, tmp_path):
    n = write_delphi_cache(tmp_path, sae, harvest, text="stdlib", n_splits=3)
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "0_681.safetensors", "1365_2047.safetensors", "682_1364.safetensors", "config.json"
    ]  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_name"], config["cache_ctx_len"], config["n_splits"]) == ("pystd", 64, 3)
    dense = torch.zeros(24, 64, sae.n_features)
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        first = int(path.stem.partition("_")[0])
        assert held["locations"].dtype == "uint16" and held["activations"].dtype == "float16"
        assert (held["tokens"] == harvest.rows.ids.numpy()).all()
        row, position, feature = torch.from_numpy(held["locations"].astype("int64")).T
        dense[row, position, feature + first] = torch.from_numpy(held["activations"]).float()
    (site,) = harvest.sites
    with torch.no_grad():
        vectors = harvest.target.read(harvest.rows.ids, [site])[site]
        expected = sae.encode(vectors.flatten(0, 1)).to_dense().view_as(dense)
    expected[harvest.rows.ids == harvest.rows.bos] = 0
    assert n == int((expected != 0).sum())
    torch.testing.assert_close(dense, expected, rtol=2e-3, atol=2e-3)


def test_delphi_is_refused_what_it_cannot_hold(sae, harvest, tmp_path):
    with pytest.raises(DataError, match="delphi keeps none above 65504"):
        write_delphi_cache(tmp_path, sae.rescaled(1e5), harvest_of_scaled(sae, harvest, 1e5), text="x")
    (site,) = harvest.sites
    mine = tmp_path / site.module
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match="is no cache of delphi's; give another folder"):
        write_delphi_cache(tmp_path, sae, harvest, text="x")
    assert (mine / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("config", ["{}", "[]", "{", '{"activation_dim": 256}', None])
def test_delphi_never_replaces_an_sae_by_its_codes(config, sae, harvest, tmp_path):
    (site,) = harvest.sites
    place = tmp_path / site.module
    place.mkdir()
    (place / "ae.pt").write_bytes(b"weights")
    if config is None:  # a cache, but somebody has put an SAE there, too
        write_delphi_cache(tmp_path / "cache", sae, harvest, text="x")
        config = (tmp_path / "cache" / site.module / "config.json").read_text()
    (place / "config.json").write_text(config)
    with pytest.raises(FileError, match="is no cache of delphi's; give another folder"):
        write_delphi_cache(tmp_path, sae, harvest, text="x")
    assert {path.name for path in place.iterdir()} == {"ae.pt", "config.json"}


def test_delphi_replaces_a_cache_of_its_own_whole(sae, harvest, tmp_path):
    write_delphi_cache(tmp_path, sae, harvest, text="x", n_splits=5)
    write_delphi_cache(tmp_path, sae, harvest, text="x", n_splits=2)
    (place,) = tmp_path.iterdir()
    assert {path.name for path in place.iterdir()} == {"0_1023.safetensors", "1024_2047.safetensors", "config.json"}


def harvest_of_scaled(sae, harvest, scale) -> Harvest:
    """The same text on a model whose Site is that much larger."""
    embed = torch.nn.Embedding(harvest.target.vocabulary, sae.d_model)
    with torch.no_grad():
        embed.weight.mul_(scale)
    return Harvest(target=Target.wrap(torch.nn.Sequential(embed)), rows=harvest.rows, sites=(Site.parse("0"),))


def test_a_batch_rule_serves_no_prompt_and_no_page(sae, tmp_path, capsys):
    folder, text = str(tmp_path / "sae"), tmp_path / "text.py"
    text.write_text("x = 1\n" * 4000)
    metadata = {"text": str(text), "held_out_rows": 8}
    build(replace(weights_of(sae), rule=MutualChoice(32), context_size=64, metadata=metadata)).save(folder)
    for command in (["export", folder], ["effects", folder], ["steer", "x = 1", "--features", "3", "--sae", folder]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert "MutualChoice decides over a batch and cannot serve a prompt; give the SAE thresholds: `saekit" in said
    target, site = Target.load("pystd"), Site.parse(sae.cfg.hook_name)
    edit = Intervention(site=site, operation=Add(1.0), features=(3,))
    with pytest.raises(SaekitError, match="MutualChoice decides over a batch and cannot serve a prompt"):
        steer(target, torch.tensor([0, 5]), [edit], {site: load(folder)})


def test_calibration_reads_the_sae_under_the_input_scale_that_is_given(sae, tmp_path, capsys):
    config = tmp_path / "sae" / "cfg.json"
    build(replace(weights_of(sae), rule=TopK(32), context_size=64)).save(config.parent)
    settings = json.loads(config.read_text()) | {"normalize_activations": "expected_average_only_in"}
    del settings["saekit"]  # as SAELens writes it
    config.write_text(json.dumps(settings))
    text = tmp_path / "text.py"
    text.write_text("x = 1\n" * 400)
    arguments = ["convert", str(config.parent), str(tmp_path / "out"), "--calibrate", "128", "--text", str(text)]
    for more, said in (([], "pass input_scale"), (["--input-scale", "0.5"], "TopK decides token by token already")):
        assert main([*arguments, *more]) == 1
        assert said in capsys.readouterr().err


def test_convert_calibrates_a_batch_rule_on_text(sae, tmp_path, capsys):
    text = tmp_path / "text.py"
    text.write_text("\n".join(document.text for document in read_documents("stdlib", limit=3))[:200_000])
    weights = replace(weights_of(sae), rule=MutualChoice(32), context_size=64, metadata={"held_out_rows": 8})
    build(weights).save(tmp_path / "sae")
    arguments = ["convert", str(tmp_path / "sae"), str(tmp_path / "out"), "--to", "saelens"]
    assert main(arguments) == 1
    assert "give the SAE the thresholds" in capsys.readouterr().err
    assert main([*arguments, "--calibrate", "4096", "--text", str(text)]) == 0
    served = load(tmp_path / "out")
    assert isinstance(served.rule, Threshold)
    target = Target.load("pystd")
    rows = tokenize_documents(read_documents(str(text)), target.tokenizer, context=64).select(slice(64))
    site = Site.parse(sae.cfg.hook_name)
    found = evaluate(served, target, rows, site, loss_rows=0)
    # a budget of 32 a token over the pool is 32 a token under the thresholds
    assert found.l0 == pytest.approx(32, rel=0.02)
    assert main([*arguments[:2], str(tmp_path / "no"), "--calibrate", "4096", "--text", "nowhere.txt"]) == 1
