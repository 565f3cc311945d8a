"""Continuations with and without interventions, from Python and by `saekit steer`."""

import json
import warnings

import pytest
import torch
from small_models import Loop, hooks

from saekit.errors import SaekitError
from saekit.patching import Add, Clamp, Intervention, OffDistributionWarning, Scale, Zero
from saekit.patching.generation import Sampling, Steered, encode_prompt, generate, steer
from saekit.sae import SAE
from saekit.targets import Site, Target
from saekit_cli.main import main

PROMPT = "def area(self, width):"


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.load("pystd")


@pytest.fixture(scope="module")
def sae() -> SAE:
    return SAE.from_pretrained("pystd", "layers.2")


@pytest.fixture(scope="module")
def site(sae) -> Site:
    return Site.parse(sae.cfg.hook_name)


@pytest.fixture(scope="module")
def strongest(target, sae, site) -> tuple[int, float]:
    """The feature that is most active at the end of the prompt, and how strongly."""
    codes = sae.encode(target.read(encode_prompt(target, PROMPT)[None], [site])[site][0, -1:])
    best = int(codes.values.argmax())
    return int(codes.features[best]), float(codes.values[best].detach())


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["steer", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_plain_text_is_what_the_model_writes_by_itself(target, sae, site, strongest):
    prompt = encode_prompt(target, PROMPT)
    assert prompt[0] == target.tokenizer.bos_token_id
    edits = [Intervention(site=site, operation=Clamp(3 * strongest[1], 3 * strongest[1]), features=strongest[:1])]
    found = steer(target, prompt, edits, {site: sae}, sampling=Sampling(new_tokens=8))
    ids = prompt
    for _ in range(8):
        ids = torch.cat([ids, target.run(ids[None])[0, -1:].argmax(-1)])
    assert torch.equal(found.plain, ids[len(prompt) :])
    first = found.first_difference
    assert first is not None and torch.equal(found.plain[:first], found.edited[:first])
    assert found.plain[first] != found.edited[first]
    assert hooks(target.model) == 0


@pytest.mark.parametrize(
    "plain, edited, first", [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([4], [5, 6], 0)]
)
def test_the_first_difference_may_be_that_one_text_ends(plain, edited, first):
    assert Steered(torch.tensor([0]), torch.tensor(plain), torch.tensor(edited)).first_difference == first


def test_the_likeliest_token_is_taken_whatever_the_model_asks_for(target):
    prompt = encode_prompt(target, "x = x + x + x + x +")
    plain = generate(target, prompt, Sampling(new_tokens=8))
    asked = target.model.generation_config
    wishes = {
        "repetition_penalty": 3.0, "num_beams": 2, "suppress_tokens": plain.tolist()[:1], "num_return_sequences": 2,
        "encoder_repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "penalty_alpha": 0.6,
    }  # fmt: skip
    for name, wish in wishes.items():
        before = getattr(asked, name)
        setattr(asked, name, wish)
        try:
            assert torch.equal(generate(target, prompt, Sampling(new_tokens=8)), plain)
        finally:
            setattr(asked, name, before)
        assert target.model.generation_config is asked


def test_draws_depend_on_the_seed_alone(target):
    prompt = encode_prompt(target, PROMPT)
    state = torch.get_rng_state()
    one, again, other = (
        generate(target, prompt, Sampling(new_tokens=12, temperature=1.5, seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_edit_of_the_prompt_alone_ends_with_it(target, sae, site, strongest):
    """Step 0 reads the prompt; what follows is affected through the cache only."""
    prompt = encode_prompt(target, PROMPT)
    edit = {"site": site, "operation": Add(2 * strongest[1]), "features": strongest[:1]}
    early = steer(target, prompt, [Intervention(**edit, steps=(0,))], {site: sae}, sampling=Sampling(new_tokens=1))
    always = steer(target, prompt, [Intervention(**edit)], {site: sae}, sampling=Sampling(new_tokens=1))
    assert torch.equal(early.edited, always.edited)
    with pytest.raises(SaekitError, match=r"there were 1 forward passes, so no step 1"):
        steer(target, prompt, [Intervention(**edit, steps=(1,))], {site: sae}, sampling=Sampling(new_tokens=1))


# --- the command


def test_steer_prints_both_texts_as_json_and_as_text(capsys, target, site, strongest):
    feature, strength = strongest
    arguments = [PROMPT, "--features", str(feature), "--how", "set", "--amount", str(3 * strength), "--tokens", "8"]
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    facts = json.loads(out)
    plain = generate(target, encode_prompt(target, PROMPT), Sampling(new_tokens=8))
    assert facts["plain"] == target.tokenizer.decode(plain) != facts["edited"]
    assert (facts["site"], facts["features"], facts["amount"]) == (str(site), [feature], 3 * strength)
    assert facts["first_difference"] < 8
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert repr(facts["plain"]) in out and repr(facts["edited"]) in out


@pytest.mark.parametrize("how, where", [("add", "all"), ("set", "prompt"), ("scale", "new"), ("zero", "all")])
def test_every_way_and_place_is_the_intervention_that_it_says(capsys, target, sae, site, strongest, how, where):
    feature, strength = strongest
    amount = {"add": 4 * strength, "set": -4 * strength, "scale": -5.0, "zero": None}[how]
    operation = {"add": Add, "set": lambda a: Clamp(a, a), "scale": Scale, "zero": lambda a: Zero()}[how](amount)
    places = {"all": {}, "prompt": {"steps": (0,)}, "new": {"positions": (-1,)}}[where]
    edit = Intervention(site=site, operation=operation, features=(feature,), **places)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OffDistributionWarning)
        want = steer(target, encode_prompt(target, PROMPT), [edit], {site: sae}, sampling=Sampling(new_tokens=4))
    numbers = [] if amount is None else ["--amount", str(amount)]
    arguments = ["--features", str(feature), "--how", how, *numbers, "--where", where, "--tokens", "4", "--json"]
    code, out, _ = run(capsys, PROMPT, *arguments)
    assert code == 0
    assert json.loads(out)["edited"] == target.tokenizer.decode(want.edited)


def test_a_saved_sae_is_steered_with_as_the_bundled_one_is(capsys, tmp_path, sae, strongest):
    sae.save(tmp_path / "sae")
    arguments = [PROMPT, "--features", str(strongest[0]), "--how", "zero", "--tokens", "4", "--json"]
    bundled, saved = (run(capsys, *arguments, *more) for more in ([], ["--sae", str(tmp_path / "sae")]))
    assert json.loads(bundled[1]) == json.loads(saved[1])


def test_far_edits_are_warned_of_on_stderr(capsys, strongest):
    arguments = [PROMPT, "--features", str(strongest[0]), "--amount", "1e6", "--tokens", "2", "--json"]
    code, out, err = run(capsys, *arguments)
    assert code == 0
    assert err.count("Warning: an edit at") == 1
    assert len(json.loads(out)["warnings"]) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--features", "999999", "--how", "zero"], "feature 999999 is out of range; this SAE has"),
        (["--features", "1"], "--how add needs a number; pass --amount"),
        (["--features", "1", "--how", "zero", "--amount", "2"], "--how zero takes no number"),
        (["--features", "1", "--amount", "0"], "Add(0) changes nothing"),
        (["--features", "1", "--amount", "5", "--tokens", "100000"], "shorten the prompt or ask for fewer"),
        (["--features", "1", "--amount", "nan"], "--amount nan is no strength; pass a finite number"),
        (["--features", "69", "69", "--amount", "5"], "--features names 69 more than once; name each feature once"),
        (["--features", "1", "--amount", "5", "--tokens", "0"], "give at least 1 token"),
        (["--features", "1", "--amount", "5", "--site", "layers.77"], "no submodule named 'layers.77'"),
        (["--features", "1", "--amount", "5", "--sae", "nowhere"], "no file or folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_one_line(capsys, arguments, message):
    code, out, err = run(capsys, PROMPT, *arguments)
    assert (code, out) == (1, "")
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("Error: ")


def test_a_feature_that_is_never_active_cannot_be_zeroed_in_silence(capsys, target, sae, site, tmp_path):
    silent = SAE.from_pretrained("pystd", "layers.2")
    with torch.no_grad():
        silent.b_enc[7] = -1e6
    silent.save(tmp_path / "sae")
    code, _, err = run(
        capsys, PROMPT, "--sae", str(tmp_path / "sae"), "--features", "7", "--how", "zero", "--tokens", "2"
    )
    assert code == 1
    assert "--how zero changed nothing: feature 7 was not active" in err and "may_idle" not in err


def test_what_cannot_generate_is_refused(target):
    with pytest.raises(SaekitError, match=r"Loop has no generate\(\); give a language model"):
        generate(Target.wrap(Loop()), torch.tensor([1]), Sampling())
    with pytest.raises(SaekitError, match=r"Loop has no tokenizer"):
        encode_prompt(Target.wrap(Loop()), "x")
    with pytest.raises(SaekitError, match=r"the prompt '' has no tokens"):
        encode_prompt(target, "")
