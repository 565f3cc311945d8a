"""What cannot be measured is refused in one line that says what to do, in every function that measures."""

import re

import pytest
import torch
from small_models import FIRST, IDS, SECOND, TOKENS, sae_of, tiny_llama

from saekit.dashboards.static_page import check_writable
from saekit.errors import FileError, SaekitError
from saekit.patching import Add, Clamp, Scale
from saekit.patching.attribution import attribute
from saekit.patching.circuit_check import check_circuit
from saekit.patching.circuits import trace_circuit
from saekit.patching.effects import Candidates, exact_effects, metric_of, read_prompts, site_effects
from saekit.patching.feature_sets import read_behaviour
from saekit.patching.metric import LogitDifference
from saekit.patching.patch_table import patch_features
from saekit.sae import SAE
from saekit.selection import Threshold, TopK
from saekit.targets import Site, Target
from saekit_cli.main import main

OTHER = IDS.flip(0)
METRIC = LogitDifference(torch.tensor([3, 4]), torch.tensor([5, 6]), torch.tensor([4, 4]))
METRIC_OF_ONE = LogitDifference(torch.tensor([3]), torch.tensor([5]), torch.tensor([4]))
PLACE = Candidates(torch.tensor([0]), torch.tensor([2]), torch.tensor([3]))


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.wrap(tiny_llama())


def measures(target, *, ids=IDS, metric=METRIC, sae=None):
    """Every function that measures something on prompts."""
    sae = sae_of() if sae is None else sae
    other = ids.flip(0)
    return {
        "metric_of": lambda: metric_of(target, ids, metric),
        "exact_effects": lambda: exact_effects(target, sae, FIRST, ids, metric, PLACE, mask=TOKENS),
        "site_effects": lambda: site_effects(target, [FIRST], ids, other, metric),
        "attribute": lambda: attribute(target, sae, FIRST, ids, metric, mask=TOKENS),
        "read_behaviour": lambda: read_behaviour(target, sae, FIRST, ids, other, metric, mask=TOKENS),
        "patch_features": lambda: patch_features(target, {FIRST: sae}, ids, other, metric, mask=TOKENS),
        "trace_circuit": lambda: trace_circuit(target, {FIRST: sae}, ids, metric, everywhere=True, mask=TOKENS),
    }


@pytest.mark.parametrize("name", measures(None))
@pytest.mark.parametrize(
    "ids, message",
    [
        (IDS[:0], r"the prompts are \(0, 5\); give token ids \(prompts, context\), at least one of each"),
        (IDS + 1000, r"token ids from 1000 to 1009, but LlamaForCausalLM knows 40; encode them with its own tokenizer"),
        (IDS.repeat(1, 7), r"the prompts have 35 tokens, more than the 32 that LlamaForCausalLM reads; give shorter"),
    ],
    ids=["none", "unknown ids", "too long"],
)
def test_prompts_that_the_model_cannot_read_are_refused_everywhere(target, name, ids, message):
    with pytest.raises(SaekitError, match=message):
        measures(target, ids=ids)[name]()


@pytest.mark.parametrize("name", measures(None))
@pytest.mark.parametrize(
    "metric, message",
    [
        (LogitDifference(*(side[:1] for side in (METRIC.right, METRIC.wrong, METRIC.position))), "prompts from 0 to 1"),
        (LogitDifference(METRIC.right, METRIC.wrong, METRIC.position + 1), "positions from 5 to 5, but there are 5"),
        (LogitDifference(METRIC.right, METRIC.wrong, METRIC.position - 10), "positions from -6 to -6"),
        (LogitDifference(METRIC.right + 40, METRIC.wrong, METRIC.position), "tokens from 5 to 44, but there are 40"),
    ],
    ids=["too few", "position", "position before", "token"],
)
def test_a_metric_that_the_logits_do_not_have_is_refused_everywhere(target, name, metric, message):
    with pytest.raises(SaekitError, match=message):
        measures(target, metric=metric)[name]()


@pytest.mark.parametrize("name", sorted(set(measures(None)) - {"metric_of", "site_effects"}))
def test_an_sae_of_another_width_is_told_the_site_it_does_not_fit(target, name):
    sae = SAE(8, 12, TopK(2))
    with pytest.raises(
        SaekitError, match=r"layers.0:out(@0)? has 16 numbers per token, but this SAE encodes rows of 8"
    ):
        measures(target, sae=sae)[name]()


def test_circuits_and_tables_of_nothing_are_refused(target):
    one = METRIC_OF_ONE
    for saes, more, message in (
        ({Site("layers.0"): sae_of(), Site("model.layers.0"): sae_of()}, {}, r"are the same tensor of"),
        ({Site("layers.0", call=None): sae_of()}, {}, r"stands for every call of its submodule"),
        ({FIRST: sae_of(Threshold(1e9))}, {}, r"no feature at layers.0:out has an effect on the metric; choose"),
        ({FIRST: sae_of()}, {"other_ids": IDS[:1]}, r"has an effect on the metric by being as on the other prompts"),
    ):
        with pytest.raises(SaekitError, match=message):
            trace_circuit(target, saes, IDS[:1], one, mask=TOKENS, **more)
    circuit = trace_circuit(target, {FIRST: sae_of()}, IDS[:1], one, mask=TOKENS)
    twice = {FIRST: sae_of(), Site("model.layers.0"): sae_of()}
    with pytest.raises(SaekitError, match=r"are the same tensor of"):
        check_circuit(target, twice, IDS[:1], one, circuit, mask=TOKENS)
    with pytest.raises(SaekitError, match=r"no feature at layers.0:out, layers.1:out differs between the prompts"):
        patch_features(target, {FIRST: sae_of(), SECOND: sae_of()}, IDS, IDS, METRIC, mask=TOKENS)


def test_a_run_that_could_not_begin_leaves_nothing_to_resume(target, tmp_path):
    file = tmp_path / "unfinished"
    with pytest.raises(SaekitError, match=r"encodes rows of 8"):
        patch_features(target, {FIRST: SAE(8, 12, TopK(2))}, IDS, OTHER, METRIC, mask=TOKENS, unfinished=file)
    assert not file.exists()


@pytest.mark.parametrize(
    "operation",
    [lambda: Add(torch.nan), lambda: Scale(torch.inf), lambda: Clamp(low=torch.nan), lambda: Clamp(0.0, torch.inf)],
)
def test_no_edit_makes_what_is_no_number(operation):
    with pytest.raises(SaekitError, match=r"makes nothing that a model can go on with; give a finite number"):
        operation()


def test_prompts_are_read_and_measured_if_nothing_is_wrong(target):
    for measure in measures(target).values():
        assert measure() is not None
    assert read_prompts(target, sae_of(), FIRST, IDS, mask=TOKENS).codes.n_tokens == IDS.numel()


# --- the command line


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(
        FileError, match=rf"cannot write {re.escape(str(tmp_path))}: it is a folder; choose a file in it"
    ):
        check_writable(tmp_path)


@pytest.mark.parametrize("device", ["cuda:99", "tpu9"])
def test_a_device_that_is_not_there_is_one_line(device, capsys):
    assert main(["steer", "x", "--features", "1", "--device", device]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(rf"Error: --device {device} cannot be used \(.*\); `saekit doctor` lists .*\n", err)


@pytest.mark.parametrize("flags", [["--sae", "a", "--sae", "b"], ["--site=a", "--site", "b"]], ids=str)
def test_a_flag_that_is_given_twice_loses_nothing_in_silence(flags, capsys):
    assert main(["circuit", "x", "--answer", "a", "--wrong", "b", *flags]) == 1
    assert re.search(r"--(sae|site) is there 2 times and takes several values; give it once", capsys.readouterr().err)
