"""SAEs in the forward pass: nothing changes where nothing should, and what changes is what the formula says."""

from contextlib import nullcontext

import pytest
import torch
from small_models import (
    BOS,
    FIRST,
    IDS,
    MODELS,
    PAD,
    SECOND,
    TOKENS,
    WIDTH,
    Loop,
    bridge,
    hooks,
    sae_of,
    tiny_gpt2,
    tiny_llama,
)
from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.codes import SparseCodes
from saekit.errors import SaekitError, ShapeError, UnknownNameError
from saekit.normalisation import ConstantNorm, EqualNorms, LayerNorm, Plain
from saekit.patching import SpliceCache, TokenMask, run_with_cache_with_saes, run_with_saes, spliced
from saekit.patching.splice import Encoded, write
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import Threshold, TopK
from saekit.targets import Side, Site, Target


@pytest.fixture(params=MODELS)
def target(request) -> Target:
    return Target.wrap(MODELS[request.param]())


def add_to(feature: int, amount: float, *, column: int | None = None):
    """An edit of one feature, at one column or everywhere."""

    def edit(encoded: Encoded) -> SparseCodes:
        codes = encoded.codes
        _, columns = encoded.grid.kept()
        tokens = torch.arange(len(columns)) if column is None else (columns == column).nonzero()[:, 0]
        features, values = torch.full_like(tokens, feature), torch.full((len(tokens),), amount)
        return SparseCodes.from_pairs(tokens, features, values, n_tokens=codes.n_tokens, n_features=codes.n_features)

    return edit


# --- nothing changes


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("rule", [TopK(4), Threshold(0.1), Threshold(1e9)], ids=str)
def test_with_the_error_term_and_no_edit_not_a_bit_changes(target, rule, grad):
    saes = {FIRST: sae_of(rule), SECOND: sae_of(rule, seed=1), Site("layers.2", Side.INPUT): sae_of(rule, seed=2)}
    del saes[SECOND]  # the output of one block is the input of the next: two tensors to a hook, one to the model
    with torch.set_grad_enabled(grad):
        assert torch.equal(run_with_saes(target, IDS, saes, mask=TOKENS), target.run(IDS))


@torch.no_grad()
def test_without_it_the_model_goes_on_with_the_reconstruction(target):
    sae = sae_of()
    x = target.read(IDS, [FIRST])[FIRST]
    want = x.clone()
    want[:, 1:] = sae(x[:, 1:])
    got = run_with_saes(target, IDS, {FIRST: sae}, use_error_term=False, mask=TOKENS)
    assert torch.equal(got, target.run(IDS, edits={FIRST: lambda _: want}))
    assert (got - target.run(IDS)).abs().max() > 1e-3


@torch.no_grad()
def test_an_edit_adds_what_its_entries_write_and_nothing_elsewhere(target):
    sae = sae_of()
    seen = []
    with spliced(target, {FIRST: sae}, mask=TOKENS, edits={FIRST: add_to(7, 2.0, column=3)}, on_seen=seen.append):
        got = target.run(IDS)
    x, output = seen[0].x, seen[0].output
    assert torch.equal(x, target.read(IDS, [FIRST])[FIRST])
    others = [0, 1, 2, 4]
    assert torch.equal(output[:, others], x[:, others])
    torch.testing.assert_close(output[:, 3], x[:, 3] + 2.0 * sae.decoder[7])
    assert torch.equal(got[:, :3], target.run(IDS)[:, :3])
    assert (got[:, 3:] - target.run(IDS)[:, 3:]).abs().amax(-1).gt(1e-4).all()


@torch.no_grad()
def test_the_error_is_that_of_this_pass_at_this_site():
    """A second SAE sees what the edit at the first made of the activations, and leaves that alone."""
    target = Target.wrap(tiny_llama())
    edits = {FIRST: add_to(7, 2.0)}
    with spliced(target, {FIRST: sae_of()}, mask=TOKENS, edits=edits):
        want = target.run(IDS)
    with spliced(target, {FIRST: sae_of(), SECOND: sae_of(seed=1)}, mask=TOKENS, edits=edits):
        assert torch.equal(target.run(IDS), want)


# --- which tokens


@torch.no_grad()
def test_padding_is_what_the_attention_mask_says_and_bos_is_told_by_its_id():
    model = tiny_llama()
    ids = torch.tensor(
        [[PAD, PAD, BOS, 9, PAD], [BOS, 5, 4, 3, 2]]
    )  # the last of row 0 is text that looks like padding
    attention = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    target, seen = Target.wrap(model), []
    with spliced(target, {FIRST: sae_of()}, use_error_term=False, mask=TOKENS, on_seen=seen.append):
        model(input_ids=ids, attention_mask=attention)
        model(ids)
    by_mask, by_id = (one.grid.keep.tolist() for one in seen)
    assert by_mask == [[False, False, False, True, True], [False, True, True, True, True]]
    assert by_id == [[False, False, False, True, False], [False, True, True, True, True]]
    for one in seen:
        assert torch.equal((one.output != one.x).any(-1), one.grid.keep)


@torch.no_grad()
def test_a_batch_with_padding_is_its_rows_one_by_one():
    model = tiny_llama()
    sae, short = sae_of(), torch.tensor([[BOS, 9, 8]])
    padded = torch.tensor([[PAD, PAD, BOS, 9, 8], [BOS, 5, 4, 3, 2]])
    attention = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with spliced(Target.wrap(model), {FIRST: sae}, mask=TOKENS, edits={FIRST: add_to(7, 2.0)}):
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        together = model(input_ids=padded, attention_mask=attention, position_ids=positions).logits
        torch.testing.assert_close(together[:1, 2:], model(short).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[1:], model(padded[1:]).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_max_norm_leaves_out_by_size_as_it_does_in_the_harvest():
    target = Target.wrap(tiny_llama())
    norms = target.read(IDS, [FIRST])[FIRST].norm(dim=-1)
    cut = float(norms.median())
    mask = TokenMask(policy=MaskPolicy(max_norm=cut), bos=BOS)
    cache = run_with_cache_with_saes(target, IDS, {FIRST: sae_of()}, use_error_term=False, mask=mask)[1]
    changed = (cache["layers.0.hook_sae_output"] != cache["layers.0.hook_sae_input"]).any(-1)
    assert torch.equal(changed, (norms <= cut) & (IDS != BOS))


@torch.no_grad()
def test_the_tokenizers_own_bos_passes_by():
    target = Target.load("pystd")
    sae = SAE.from_pretrained("pystd", "layers.2")
    ids = torch.tensor([[target.tokenizer.bos_token_id, *target.tokenizer("x = 1\n").input_ids]])
    _, cache = run_with_cache_with_saes(target, ids, [sae])
    active = (cache[f"{sae.cfg.hook_name}.hook_sae_acts_post"] > 0).any(-1)
    assert active.tolist() == [(ids[0] != ids[0, 0]).tolist()]


# --- who runs the model


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_generation_with_a_cache_is_generation_without_one(make):
    model = make()
    target, seen = Target.wrap(model), []
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    plain = model.generate(IDS, **options)
    with spliced(target, {FIRST: sae_of()}, mask=TOKENS):
        assert torch.equal(model.generate(IDS, **options), plain)
    edits = {FIRST: add_to(7, 30.0)}
    with spliced(target, {FIRST: sae_of()}, mask=TOKENS, edits=edits, on_seen=seen.append):
        cached = model.generate(IDS, **options)
    assert [one.grid.keep.shape[1] for one in seen] == [5, 1, 1, 1, 1, 1]
    assert [one.grid.past for one in seen] == [0, 5, 6, 7, 8, 9]
    assert [one.grid.number for one in seen] == [0, 1, 2, 3, 4, 5]
    with spliced(target, {FIRST: sae_of()}, mask=TOKENS, edits=edits):
        assert torch.equal(model.generate(IDS, **options, use_cache=False), cached)
    assert not torch.equal(cached, plain)
    assert hooks(model) == 0


@torch.no_grad()
def test_a_bridge_generates_and_caches_with_saes_spliced_in():
    model = bridge()
    target, site = Target.wrap(model), Site.parse("blocks.1.hook_resid_post")
    options = {"max_new_tokens": 3, "do_sample": False, "verbose": False, "stop_at_eos": False}
    model.generate(IDS, **options)  # leaves hooks of its own
    before = hooks(model)
    edits = {site: add_to(7, 30.0)}
    with spliced(target, {site: sae_of()}, mask=TOKENS, edits=edits) as passes:
        ids = model.generate(IDS, **options)
        assert passes.number == 2
        edited = target.run(ids)
        assert torch.equal(model.run_with_cache(ids)[0], edited)
    assert torch.equal(ids[:, 5:], edited.argmax(-1)[:, 4:7])
    assert not torch.equal(edited, target.run(ids))
    assert hooks(model) == before


@torch.no_grad()
@pytest.mark.parametrize("call, changed", [(0, [0]), (1, [1]), (2, [2]), (None, [0, 1, 2])])
def test_calls_of_one_module_are_told_apart_in_every_pass(call, changed):
    loop, x = Loop(), torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    sae, site = sae_of(), Site("core", call=call)
    want = x
    for i in range(3):
        want = loop.core(want)
        want = (sae(want) if i in changed else want).tanh()
    with spliced(Target.wrap(loop), {site: sae}, use_error_term=False):
        for _ in range(2):
            torch.testing.assert_close(loop(x), loop.head(want))
    cache = run_with_cache_with_saes(Target.wrap(loop), x, {site: sae})[1]
    names = ["core" + (f"@{i}" if i else "") for i in changed]
    assert {key.partition(".")[0] for key in cache} == set(names)
    torch.testing.assert_close(cache[f"{names[0]}.hook_sae_output"], cache[f"{names[0]}.hook_sae_input"])


# --- gradients


def test_the_error_term_is_a_constant_to_autograd():
    """The gradient at the embedding is that of decode(encode(x)) + constant, not that of x."""
    target, sae, site = Target.wrap(tiny_llama()), sae_of(), Site("hook_embed")

    def gradient(edit) -> Tensor:
        target.model.zero_grad()
        target.run(IDS, edits={site: edit}).square().sum().backward()
        return target.model.get_input_embeddings().weight.grad.clone()

    def by_formula(x: Tensor) -> Tensor:
        kept = (IDS != BOS)[..., None]
        recons = sae(x)
        return torch.where(kept, recons + (x - recons).detach(), x)

    want = gradient(by_formula)
    target.model.zero_grad()
    run_with_saes(target, IDS, {site: sae}, mask=TOKENS).square().sum().backward()
    got = target.model.get_input_embeddings().weight.grad
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (want - gradient(lambda x: x)).abs().max() > 1e-2
    assert sae.decoder.grad is not None and sae.encoder.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("normalisation", [ConstantNorm(), LayerNorm()], ids=repr)
def test_an_edit_writes_in_the_scale_that_the_token_is_normalised_by(target, normalisation):
    sae = sae_of(TopK(4), normalisation=normalisation)
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)[:, None]
    codes = sae.encode(x)
    more = codes.with_values(codes.values * 0.5)
    grown = codes.with_values(codes.values * 1.5)
    torch.testing.assert_close(sae.decode(codes, x) + write(more, sae, x), sae.decode(grown, x))


# --- transcoders

READ, WRITTEN = Site("layers.1.mlp", Side.INPUT), Site("layers.1.mlp")


def transcoder(rule=None, *, skip: bool = False, **cfg) -> SAE:
    names = {"hook_name": str(READ), "hook_name_out": str(WRITTEN)} | cfg
    settings = SAEConfig(d_in=WIDTH, d_sae=48, d_out=WIDTH, apply_b_dec_to_input=False, **names)
    made = SAE(WIDTH, 48, rule or TopK(4), skip=skip, cfg=settings)
    for parameter in (made.b_dec, *([made.skip] if made.skip is not None else [])):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return made


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_a_transcoder_with_its_error_term_and_no_edit_changes_not_a_bit(target, skip, grad):
    with torch.set_grad_enabled(grad):
        got = run_with_saes(target, IDS, [transcoder(skip=skip)], mask=TOKENS)
        assert torch.equal(got, target.run(IDS))


@torch.no_grad()
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_a_transcoder_stands_in_for_the_module_and_its_edits_are_written_behind_it(target, skip):
    sae = transcoder(skip=skip)
    seen = target.read(IDS, [READ, WRITTEN])
    want = seen[WRITTEN].clone()
    want[:, 1:] = sae(seen[READ][:, 1:])
    got, cache = run_with_cache_with_saes(target, IDS, [sae], use_error_term=False, mask=TOKENS)
    assert torch.equal(got, target.run(IDS, edits={WRITTEN: lambda _: want}))
    assert torch.equal(cache["layers.1.mlp:in.hook_sae_input"], seen[READ])
    torch.testing.assert_close(cache["layers.1.mlp:in.hook_sae_output"], want)
    with spliced(target, [sae], mask=TOKENS, edits={READ: add_to(7, 2.0, column=3)}):
        edited = target.run(IDS)
    moved = seen[WRITTEN].clone()
    moved[:, 3] += 2.0 * sae.decoder[7]
    torch.testing.assert_close(edited, target.run(IDS, edits={WRITTEN: lambda _: moved}))
    _, cache = run_with_cache_with_saes(target, IDS, [sae], mask=TOKENS)
    error = cache["layers.1.mlp:in.hook_sae_error"]
    torch.testing.assert_close(error[:, 1:], seen[WRITTEN][:, 1:] - sae(seen[READ][:, 1:]))
    assert not error[:, 0].any()


def test_the_gradient_goes_through_the_transcoder_and_not_through_the_module(target):
    sae = transcoder(Threshold(0.05))
    kept = target.read(IDS, [READ, WRITTEN])
    error = (kept[WRITTEN] - sae(kept[READ])).detach()
    error[:, 0] = 0.0
    start = {}

    def watch(x: Tensor) -> Tensor:
        start["x"] = x.detach().requires_grad_()
        return start["x"]

    def by_hand(y: Tensor) -> Tensor:
        row = sae(start["x"].flatten(0, 1)).view_as(y) + error
        return torch.cat([y[:, :1], row[:, 1:]], 1)

    def gradient(context) -> Tensor:
        with context:
            value = target.run(IDS)[:, -1].logsumexp(-1).sum()
        return torch.autograd.grad(value, start["x"])[0]

    want = gradient(target.editing({READ: watch, WRITTEN: by_hand}))
    with target.editing({READ: watch}):
        got = gradient(spliced(target, [sae], mask=TOKENS))
        untouched = gradient(nullcontext())
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    assert (want - untouched).abs().max() > 1e-3


@torch.no_grad()
def test_a_transcoder_and_an_sae_meet_at_one_tensor(target):
    """What the transcoder writes is what the SAE there reads; another SAE where it reads comes first."""
    writer, reader = transcoder(), sae_of(seed=3)
    edits = {READ: add_to(7, 2.0)}
    seen = []
    with spliced(target, {READ: writer, WRITTEN: reader}, mask=TOKENS, edits=edits, on_seen=seen.append):
        target.run(IDS)
    first, second = seen
    assert (first.site, second.site) == (READ, WRITTEN)
    assert torch.equal(first.output, second.x) and not torch.equal(first.y, second.x)


def test_a_transcoder_that_cannot_be_placed_is_refused(target):
    with pytest.raises(SaekitError, match=r"reads layers\.1\.mlp:out later than it writes layers\.1\.mlp:in; swap"):
        run_with_saes(target, IDS, [transcoder(hook_name=str(WRITTEN), hook_name_out=str(READ))], mask=TOKENS)
    with pytest.raises(SaekitError, match=r"transcoder at layers\.1:out does not record where it writes"):
        run_with_saes(target, IDS, {Site("layers.1"): wide_transcoder()}, mask=TOKENS)
    with pytest.raises(ShapeError, match=r"layers\.2:out has vectors .*16\), but what was read .* as .*20\)"):
        run_with_saes(target, IDS, {Site("layers.1"): wide_transcoder(hook_name_out="layers.2")}, mask=TOKENS)
    both = {READ: transcoder(), Site("layers.0.mlp", Side.INPUT): transcoder()}
    with pytest.raises(SaekitError, match=r"are the same tensor of .*; splice in one SAE that writes there"):
        run_with_saes(target, IDS, both, mask=TOKENS)


def wide_transcoder(**cfg) -> SAE:
    return SAE(WIDTH, 48, TopK(4), cfg=SAEConfig(d_in=WIDTH, d_sae=48, d_out=20, apply_b_dec_to_input=False, **cfg))


# --- the cache


@torch.no_grad()
@pytest.mark.parametrize("equal_norms", [False, True])
@pytest.mark.parametrize("use_error_term", [False, True])
def test_the_cache_holds_what_the_formulas_say(target, equal_norms, use_error_term):
    normalisation = EqualNorms() if equal_norms else Plain()
    sae = sae_of(Threshold(0.2), normalisation=normalisation, hook_name="blocks.1.hook_resid_pre")
    logits, cache = run_with_cache_with_saes(target, IDS, [sae], use_error_term=use_error_term, mask=TOKENS)
    assert torch.equal(logits, run_with_saes(target, IDS, [sae], use_error_term=use_error_term, mask=TOKENS))
    names = ["input", "acts_pre", "acts_post", "recons", "output"] + ["error"] * use_error_term
    assert set(cache) == {f"blocks.1.hook_resid_pre.hook_sae_{name}" for name in names}
    assert len(cache) == len(names)
    entry = {name: cache[f"blocks.1.hook_resid_pre.hook_sae_{name}"] for name in names}
    x, text = target.read(IDS, [Site("layers.1", Side.INPUT)])[Site("layers.1", Side.INPUT)], IDS != BOS
    assert torch.equal(entry["input"], x)
    assert entry["acts_post"].shape == entry["acts_pre"].shape == (2, 5, 48)
    torch.testing.assert_close(entry["acts_post"][text], sae.encode(x[text]).to_dense())
    scale = (x[text] - sae.b_dec).norm(dim=1, keepdim=True) / WIDTH**0.5 if equal_norms else torch.ones(8, 1)
    torch.testing.assert_close(entry["acts_pre"][text], ((x[text] - sae.b_dec) / scale @ sae.W_enc) * scale)
    active = entry["acts_post"] > 0
    torch.testing.assert_close(entry["acts_post"][active], entry["acts_pre"][active])
    torch.testing.assert_close(entry["recons"][text], sae(x[text]))
    assert not entry["acts_post"][~text].any()
    assert torch.equal(entry["recons"][~text], x[~text])
    if use_error_term:
        torch.testing.assert_close(entry["recons"] + entry["error"], entry["output"])
        assert not entry["error"][~text].any()
    else:
        assert torch.equal(entry["recons"], entry["output"])


@torch.no_grad()
def test_the_cache_understands_every_spelling_of_a_site():
    target = Target.wrap(tiny_llama())
    cache = run_with_cache_with_saes(target, IDS, {FIRST: sae_of()}, mask=TOKENS)[1]
    spellings = ["layers.0", "layers.0:out", "model.layers.0", "blocks.0.hook_resid_post"]
    assert all(torch.equal(cache[f"{s}.hook_sae_input"], cache["layers.0.hook_sae_input"]) for s in spellings)
    for wrong in ("layers.0", "layers.0.hook_sae_acts", "layers.1.hook_sae_input", "nowhere.hook_sae_input"):
        with pytest.raises(UnknownNameError, match=r"no cache entry named .*closest of 6: layers\.0\.hook_sae"):
            cache[wrong]


@torch.no_grad()
def test_the_cache_shows_what_an_edit_left():
    target, sae, seen = Target.wrap(tiny_llama()), sae_of(), {}
    edits = {FIRST: add_to(7, 2.0, column=3)}
    with spliced(target, {FIRST: sae}, mask=TOKENS, edits=edits, on_seen=lambda s: seen.update({s.site: s})):
        target.run(IDS)
    cache = SpliceCache(target, seen, use_error_term=True)
    clean = run_with_cache_with_saes(target, IDS, {FIRST: sae}, mask=TOKENS)[1]
    change = cache["layers.0.hook_sae_acts_post"] - clean["layers.0.hook_sae_acts_post"]
    assert change.nonzero().tolist() == [[0, 3, 7], [1, 3, 7]]
    torch.testing.assert_close(cache["layers.0.hook_sae_error"], clean["layers.0.hook_sae_error"])
    recons, error, output = (cache[f"layers.0.hook_sae_{name}"] for name in ("recons", "error", "output"))
    torch.testing.assert_close(recons + error, output)
    torch.testing.assert_close(
        write(seen[FIRST].added, sae, torch.zeros(seen[FIRST].added.n_tokens, WIDTH))[2], 2.0 * sae.decoder[7]
    )


# --- refusals


def test_hooks_are_gone_after_an_error_which_keeps_its_own_message():
    target = Target.wrap(tiny_llama())
    with pytest.raises(ZeroDivisionError), spliced(target, {FIRST: sae_of()}, mask=TOKENS):
        1 / 0  # noqa: B018
    assert hooks(target.model) == 0
    with pytest.raises(ShapeError), spliced(target, {FIRST: SAE(8, 20, TopK(2))}, mask=TOKENS):
        target.run(IDS)
    assert hooks(target.model) == 0


@pytest.mark.parametrize(
    "saes, error, message",
    [
        ({Site("layers.9"): sae_of()}, UnknownNameError, r"no submodule named 'layers\.9'; closest"),
        ({FIRST: SAE(8, 20, TopK(2))}, ShapeError, r"layers\.0:out has 16 numbers per token, .* rows of 8 numbers"),
        ([sae_of()], SaekitError, r"does not record its Site; pass saes="),
        ([sae_of(hook_name="layers.0")] * 2, SaekitError, r"two SAEs were trained at layers\.0:out"),
        ({FIRST: sae_of(), Site("model.layers.0"): sae_of()}, SaekitError, r"are the same tensor"),
        ({FIRST: sae_of(), Site("layers.0", call=None): sae_of()}, SaekitError, r"are the same tensor"),
        ({Site("layers.0", call=1): sae_of()}, SaekitError, r"calls model\.layers\.0 once; choose @0"),
    ],
    ids=["site", "width", "nowhere", "twice", "spelling", "call", "number"],
)
def test_what_cannot_be_spliced_is_refused(saes, error, message):
    target = Target.wrap(tiny_llama())
    with pytest.raises(error, match=message):
        run_with_saes(target, IDS, saes, mask=TOKENS)
    assert hooks(target.model) == 0


def test_an_edit_where_no_sae_is_spliced_in_is_refused():
    with (
        pytest.raises(UnknownNameError, match=r"no spliced SAE named 'layers\.1:out'; closest of 1: layers\.0:out"),
        spliced(Target.wrap(tiny_llama()), {FIRST: sae_of()}, edits={SECOND: add_to(7, 2.0)}),
    ):
        pass


def test_a_context_in_which_nothing_ran_is_refused():
    with (
        pytest.raises(SaekitError, match=r"was not run while edits were in place; run it inside"),
        spliced(Target.wrap(tiny_llama()), {FIRST: sae_of()}),
    ):
        pass


def test_a_model_that_is_given_no_token_ids_cannot_be_masked_by_them():
    target = Target.wrap(tiny_llama())
    embeddings = torch.zeros(1, 2, WIDTH)
    with (
        pytest.raises(SaekitError, match=r"the model was given none; call it on token ids, or pass mask="),
        spliced(target, {FIRST: sae_of()}, mask=TOKENS),
    ):
        target.model(inputs_embeds=embeddings)
    with spliced(target, {FIRST: sae_of()}, mask=MaskPolicy(drop_bos=False, drop_padding=False)):
        target.model(inputs_embeds=embeddings)


def test_a_submodule_that_is_reached_past_the_model_is_refused():
    target = Target.wrap(tiny_llama())
    with (
        pytest.raises(SaekitError, match=r"was called before LlamaForCausalLM itself was.*run the whole model"),
        spliced(target, {FIRST: sae_of()}, mask=TOKENS),
    ):
        target.model.model(IDS)
