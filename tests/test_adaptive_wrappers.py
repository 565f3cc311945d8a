"""Models that were not made to decide: early exit, left-out layers, and the page that says how to make one's own."""

import inspect
import textwrap

import pytest
import torch
from small_models import IDS, hooks, tiny_gpt2, tiny_llama
from torch import nn

import saekit.adaptive
from saekit.adaptive import Force, Replay, Where, early_exit_target, skipping, trace_with
from saekit.errors import SaekitError, ShapeError
from saekit.targets import Site, Target

MODELS = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])


@MODELS
def test_a_model_that_is_never_sure_enough_is_itself(make):
    target = Target.wrap(make())
    trace = early_exit_target(target, threshold=1.0).trace(IDS)
    with torch.no_grad():
        assert torch.equal(trace.more["logits"], target.run(IDS))
    assert trace.decision.sum() == 0
    assert trace.mac_ratio.tolist() == [1.0, 1.0]
    assert hooks(target.model) == 0


def test_a_model_of_one_block_is_refused():
    model = tiny_llama()
    model.model.layers = model.model.layers[:1]
    with pytest.raises(SaekitError, match="has one block, and the last may not be left; give a model of more"):
        early_exit_target(Target.wrap(model))


@MODELS
def test_who_leaves_behind_the_first_block_is_read_out_there(make):
    target = Target.wrap(make())
    exiting = early_exit_target(target, threshold=1e-6)
    trace = exiting.trace(IDS)
    model = target.model
    norm = model.base_model.norm if hasattr(model.base_model, "norm") else model.base_model.ln_f
    with torch.no_grad():
        first = target.read(IDS, [Site("layers.0")])[Site("layers.0")]
        expected = model.get_output_embeddings()(norm(first))
    torch.testing.assert_close(trace.more["logits"], expected)
    assert (trace.decision[:, 0] == 1).all() and not trace.live[:, 1].any()
    assert trace.mac_ratio.tolist() == pytest.approx([1 / 3, 1 / 3])


@MODELS
def test_some_leave_and_what_they_hold_stays(make):
    target = Target.wrap(make())
    scores = early_exit_target(target, threshold=1.0).trace(IDS).score
    threshold = float(scores[:, 0].median())
    exiting = early_exit_target(target, threshold=threshold)
    clean = exiting.trace(IDS)
    assert 0 < clean.decision[:, 0].float().mean() < 1
    assert torch.equal(clean.margin[:, 0] >= 0, clean.decision[:, 0] == 1)
    again = trace_with(exiting, IDS, [Replay(clean)])
    assert torch.equal(again.more["logits"], clean.more["logits"])
    late = trace_with(exiting, IDS, [Force("go on")])
    with torch.no_grad():
        assert torch.equal(late.more["logits"], target.run(IDS))
    one = trace_with(exiting, IDS, [Force("go on"), Force("exit", Where(steps=(1,), examples=(0,), places=(2,)))])
    differ = (one.more["logits"] != late.more["logits"]).any(-1)
    assert differ[0, 2] and not differ[0, :2].any() and not differ[1].any()


@MODELS
def test_a_left_out_block_gives_what_it_was_given(make):
    target = Target.wrap(make())
    with torch.no_grad():
        plain = target.run(IDS)
        with skipping(target, [1]):
            without = target.run(IDS)
        with skipping(target, [1], tokens=torch.ones_like(IDS, dtype=torch.bool)):
            assert torch.equal(target.run(IDS), without)
        last = torch.zeros_like(IDS, dtype=torch.bool)
        last[0, -1] = True
        with skipping(target, [1], tokens=last):
            only_last = target.run(IDS)
    block = target.model.base_model.layers if hasattr(target.model.base_model, "layers") else target.model.base_model.h
    del block[1]
    target.model.config.num_hidden_layers = 2
    for number, layer in enumerate(block):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = number
    with torch.no_grad():
        torch.testing.assert_close(target.run(IDS), without)
    assert not torch.equal(plain, without)
    assert torch.equal(only_last[1], plain[1]) and torch.equal(only_last[0, :-1], plain[0, :-1])
    assert not torch.equal(only_last[0, -1], plain[0, -1])


def test_what_cannot_be_wrapped_is_refused():
    target = Target.wrap(tiny_llama())
    with pytest.raises(SaekitError, match=r"threshold=1\.5 is no chance"):
        early_exit_target(target, threshold=1.5)
    with (
        pytest.raises(SaekitError, match=r"cannot leave out blocks \[3\] of 3; name some of 0 to 2"),
        skipping(target, [3]),
    ):
        pass
    with pytest.raises(SaekitError, match="has no list of blocks to exit from"):
        early_exit_target(Target.wrap(nn.Linear(2, 2)))
    few = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"tokens is \(1, 2\) for a batch"), skipping(target, [0], tokens=few):
        target.run(IDS)


def test_the_page_about_ones_own_model_works_as_it_stands():
    page = inspect.getdoc(saekit.adaptive)
    code = textwrap.dedent(page[page.index("    import torch") : page.index("A `readout`")])
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 40
    scope = {}
    torch.manual_seed(0)
    exec(code, scope)
    loop, images, flipped = scope["loop"], scope["images"], scope["flipped"]
    clean = loop.trace(images)
    assert flipped.changed(clean)[:, 1].all() and flipped.changed(clean).sum() == 2
    assert clean.live[:, 1].any() and not clean.live[:, 1].all()
    # one gate, three calls: an edit at one of them reaches no other
    with loop.target.editing({loop.steps[1].reads: lambda x: x + 100.0}):
        edited = loop.trace(images)
    assert torch.equal(edited.decision[:, 0], clean.decision[:, 0])
    assert not torch.equal(edited.score[:, 1], clean.score[:, 1])
