"""From token rows to shuffled batches of addressed vectors: batch, mask, harvest, buffer."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from saekit.activations.batch import ActivationBatch, ActivationSource
from saekit.activations.buffer import Shuffled
from saekit.activations.harvest import Harvest, TensorSource, take
from saekit.activations.mask import MaskPolicy
from saekit.activations.tokens import TokenRows
from saekit.errors import DataError, SaekitError, ShapeError
from saekit.patching import TokenMask, run_with_cache_with_saes
from saekit.sae import SAE
from saekit.selection import TopK
from saekit.targets import Site, Target

BOS, PAD, CONTEXT, WIDTH = 0, 1, 6, 4
EMBED, FIRST, SECOND, LAST = (Site.parse(name) for name in ("embed", "layers.0", "layers.1", "layers.2"))


class Stack(nn.Module):
    """Three blocks over embeddings plus positions; counts its calls."""

    def __init__(self, *, loops: int = 1):
        super().__init__()
        self.embed = nn.Embedding(12, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.loops = loops
        self.forwards = self.blocks_run = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.forwards += 1
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        for layer in self.layers:
            self.blocks_run += 1
            for _ in range(self.loops):
                x = x + layer(x).tanh()
        return x


def stack(loops: int = 1) -> Stack:
    torch.manual_seed(0)
    return Stack(loops=loops)


def some_rows(n: int = 7) -> TokenRows:
    """Every row opens with BOS, some hold another one, and the last is half padding."""
    ids = torch.randint(2, 12, (n, CONTEXT), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = BOS
    ids[2, 3] = BOS
    ids[-1, 3:] = PAD
    return TokenRows.from_ids(ids, bos=BOS, pad=PAD)


def harvest_of(model: Stack, *sites: Site, **options) -> Harvest:
    return Harvest(**{"target": Target.wrap(model), "rows": some_rows(), "sites": sites, "batch_rows": 3, **options})


def in_order(harvest: Harvest, site: Site) -> ActivationBatch:
    return ActivationBatch.concatenate([batches[site] for batches in harvest.in_order()])


def numbered(start: int, n: int, *, width: int = 2) -> ActivationBatch:
    """Vectors that say which they are."""
    numbers = torch.arange(start, start + n)
    return ActivationBatch(
        vectors=numbers[:, None].float().expand(n, width).clone(),
        document=numbers,
        position=numbers + 1,
        token=numbers + 2,
        step=numbers + 3,
        halted=numbers % 2 == 0,
    )


# batches


def test_select_and_concatenate_keep_every_address_with_its_vector():
    batch = ActivationBatch.concatenate([numbered(0, 3), numbered(3, 2)]).select(torch.tensor([4, 0, 2]))
    wanted = numbered(0, 5)
    for field in fields(ActivationBatch):
        assert torch.equal(getattr(batch, field.name), getattr(wanted, field.name)[[4, 0, 2]])
    assert (len(batch), batch.d_model) == (3, 2)


def test_vectors_from_nowhere_are_documents_of_their_own():
    batch = ActivationBatch.from_vectors(torch.ones(3, 2))
    assert batch.document.tolist() == [0, 1, 2]
    assert batch.position.tolist() == batch.step.tolist() == [0, 0, 0]
    assert not batch.halted.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_vector_that_is_not_finite_is_named(value):
    batch = numbered(10, 5)
    batch.vectors[3, 1] = value
    with pytest.raises(
        DataError, match=r"at layers\.0:out are not finite: 1 of 5 vectors, first in row 13 at position 14;"
    ):
        batch.check_finite(FIRST)
    assert numbered(0, 2).check_finite(FIRST).document.tolist() == [0, 1]


class Flattened(nn.Module):
    """Hands all tokens on in one dimension, as experts do, and apart by heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.experts, self.heads = nn.Embedding(12, WIDTH), nn.Identity(), nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        self.experts(x.flatten(0, 1))
        self.experts(2 * x.flatten(0, 1))
        return self.heads(x.unflatten(-1, (2, -1)))


def test_tokens_that_come_in_one_dimension_are_put_back_in_their_rows():
    harvest = harvest_of(Flattened(), EMBED, Site.parse("experts@1"), Site.parse("experts@*"))
    embedded = in_order(harvest, EMBED)
    flat = in_order(harvest, Site.parse("experts@1"))
    assert torch.equal(flat.vectors, 2 * embedded.vectors)
    assert torch.equal(flat.document, embedded.document) and torch.equal(flat.position, embedded.position)
    every = in_order(harvest, Site.parse("experts@*"))
    assert torch.equal(every.vectors[every.step == 1].sort(0).values, flat.vectors.sort(0).values)


def test_a_site_without_one_vector_per_token_is_refused():
    with pytest.raises(ShapeError, match=r"heads:out gives vectors \(3, 6, 2\) for token ids \(3, 6\); choose a Site"):
        in_order(harvest_of(Flattened(), Site.parse("heads")), Site.parse("heads"))


# the mask


def test_rows_padded_before_their_end_are_refused():
    ids = some_rows().ids
    ids[2, :3] = PAD
    with pytest.raises(DataError, match=r"row 2 has padding \(id 1\) at position 2 and a token behind it, which"):
        harvest_of(stack(), FIRST, rows=TokenRows.from_ids(ids, bos=BOS, pad=PAD))
    harvest_of(stack(), FIRST, rows=TokenRows.from_ids(ids, bos=BOS))
    harvest_of(stack(), FIRST, rows=TokenRows.from_ids(ids, bos=PAD, pad=PAD))  # BOS stands anywhere


def test_bos_and_padding_are_left_out_unless_asked_for():
    rows = some_rows()
    ids = rows.ids
    assert torch.equal(MaskPolicy().keep_tokens(rows, ids), (ids != BOS) & (ids != PAD))
    assert torch.equal(MaskPolicy(drop_bos=False).keep_tokens(rows, ids), ids != PAD)
    assert torch.equal(MaskPolicy(drop_padding=False).keep_tokens(rows, ids), ids != BOS)
    assert MaskPolicy().keep_tokens(TokenRows.from_ids(ids), ids).all()


def test_vectors_beyond_the_largest_norm_are_left_out_of_every_call():
    rows = TokenRows.from_ids(torch.tensor([[2, 3]]))
    vectors = torch.tensor([[[[3.0, 4.0], [0.0, 1.0]]], [[[3.0, 4.1], [6.0, 0.0]]]])  # (calls, 1, 2, 2)
    assert MaskPolicy(max_norm=5.0).keep(rows, rows.ids, vectors).tolist() == [[[True, True]], [[False, False]]]
    assert MaskPolicy().keep(rows, rows.ids, vectors).all()


def test_a_policy_survives_a_config_file():
    policy = MaskPolicy(drop_bos=False, max_norm=3.5)
    assert MaskPolicy(**policy.as_dict()) == policy


@pytest.mark.parametrize("mask", [MaskPolicy(), MaskPolicy(drop_bos=False), MaskPolicy(max_norm=2.5)], ids=str)
def test_harvest_and_splice_decide_alike(mask):
    """A token is trained on exactly where the evaluation replaces it."""
    model, rows = stack(), some_rows()
    harvested = in_order(harvest_of(model, FIRST, mask=mask), FIRST)
    kept = set(zip(harvested.document.tolist(), harvested.position.tolist(), strict=True))
    sae = SAE(WIDTH, 8, TopK(1))
    torch.nn.init.constant_(sae.b_dec, 7.0)
    tokens = TokenMask(policy=mask, bos=rows.bos, pad=rows.pad)
    cache = run_with_cache_with_saes(Target.wrap(model), rows.ids, {FIRST: sae}, use_error_term=False, mask=tokens)[1]
    before, after = (cache[f"{FIRST}.hook_sae_{which}"] for which in ("input", "output"))
    changed = (before != after).any(-1)
    assert kept == {tuple(place) for place in changed.nonzero().tolist()}
    assert 0 < len(kept) < rows.ids.numel()


# harvest


def test_every_vector_is_what_the_model_computes_at_its_address():
    model, rows = stack(), some_rows()
    batch = in_order(harvest_of(model, SECOND), SECOND)
    with torch.no_grad():
        x = model.embed(rows.ids) + model.position.weight
        for layer in model.layers[:2]:
            x, out = x + layer(x).tanh(), layer(x)
    torch.testing.assert_close(batch.vectors, out[batch.document, batch.position])
    assert torch.equal(batch.token, rows.ids[batch.document, batch.position])
    places = torch.stack([batch.document, batch.position], 1)
    assert torch.equal(places, ((rows.ids != BOS) & (rows.ids != PAD)).nonzero())
    assert not batch.step.any() and not batch.halted.any()


def test_chosen_rows_keep_their_own_numbers():
    harvest = harvest_of(stack(), FIRST)
    everything = in_order(harvest, FIRST)
    (chosen,) = harvest.in_order(torch.tensor([5, 1]))
    assert chosen[FIRST].document.unique_consecutive().tolist() == [5, 1]
    wanted = torch.cat([everything.vectors[everything.document == row] for row in (5, 1)])
    torch.testing.assert_close(chosen[FIRST].vectors, wanted)


def test_several_sites_come_from_one_pass_that_ends_after_the_deepest():
    model = stack()
    harvest = harvest_of(model, SECOND, EMBED)
    batches = list(harvest.in_order())
    assert model.forwards == 3  # 7 rows, 3 at a time
    assert model.blocks_run == 2 * 3  # the last block never runs
    for site in (SECOND, EMBED):
        alone = in_order(harvest_of(stack(), site), site)
        torch.testing.assert_close(torch.cat([batch[site].vectors for batch in batches]), alone.vectors)
    assert torch.equal(batches[0][SECOND].position, batches[0][EMBED].position)


def test_a_site_for_every_call_gives_a_row_per_call_with_its_number():
    every, third = Site.parse("layers.1@*"), Site.parse("layers.1@2")
    harvest = harvest_of(stack(loops=3), every, third)
    batch, only_third = in_order(harvest, every), in_order(harvest, third)
    assert batch.step.unique().tolist() == [0, 1, 2]
    of_third = batch.select((batch.step == 2).nonzero()[:, 0])
    assert len(batch) == 3 * len(only_third)
    for name in ("vectors", "document", "position", "token"):
        assert torch.equal(getattr(of_third, name), getattr(only_third, name))
    assert not torch.allclose(of_third.vectors, batch.vectors[batch.step == 0])
    assert not only_third.step.any()


def test_widths_are_those_of_the_vectors():
    harvest = harvest_of(stack(), FIRST, EMBED)
    assert harvest.widths == {FIRST: WIDTH, EMBED: WIDTH}
    assert isinstance(harvest, ActivationSource)


@pytest.mark.parametrize("mask", [MaskPolicy(), MaskPolicy(max_norm=100.0)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_activation_that_is_not_finite_is_refused_at_its_row_and_position(mask, value):
    """Also under a largest norm, which it is not to be dropped by silently."""
    model, rows = stack(), some_rows()
    rows.ids[rows.ids == 11] = 10
    rows.ids[3, 4] = 11
    with torch.no_grad():
        model.embed.weight[11, 2] = value
    with pytest.raises(
        DataError, match=r"at embed:out are not finite: 1 of \d+ vectors, first in row 3 at position 4;"
    ):
        in_order(harvest_of(model, EMBED, rows=rows, mask=mask), EMBED)


def test_a_pass_of_the_stream_reads_every_row_once_in_an_order_of_its_own():
    harvest = harvest_of(stack(), FIRST, buffer_tokens=64)
    n = len(in_order(harvest, FIRST))
    stream = harvest.stream(1, seed=0)
    drawn = [next(stream)[FIRST] for _ in range(3 * n)]
    again = harvest.stream(1, seed=0)
    assert all(torch.equal(batch.vectors, next(again)[FIRST].vectors) for batch in drawn)
    counts = torch.zeros(7, CONTEXT, dtype=torch.int64)
    for batch in drawn:
        counts[batch.document, batch.position] += 1
    wanted = (some_rows().ids != BOS) & (some_rows().ids != PAD)
    assert not counts[~wanted].any()
    assert set(counts[wanted].tolist()) <= {2, 3, 4}  # the last buffer may span two passes
    assert counts.sum() == 3 * n


def test_two_passes_differ_in_the_order_of_their_rows():
    harvest = harvest_of(stack(), FIRST, batch_rows=1, buffer_tokens=CONTEXT)
    n = len(in_order(harvest, FIRST))
    stream = harvest.stream(1, seed=0)
    drawn = torch.cat([next(stream)[FIRST].document for _ in range(2 * n)])
    first, second = (part.unique_consecutive().tolist() for part in drawn.split(n))
    assert set(first) == set(second) == set(range(7))
    assert first != second


# the buffer


def reads_of(sizes: list[int], asked: list[tuple[int, int]] | None = None):
    """Epochs of reads of these sizes, their rows numbered on from epoch to epoch."""
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()

    def reads(epoch: int, first: int):
        for number in range(first, len(sizes)):
            if asked is not None:
                asked.append((epoch, number))
            start = epoch * starts[-1] + starts[number]
            yield {FIRST: numbered(start, sizes[number]), LAST: numbered(start, sizes[number], width=3)}

    return reads


some_reads = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any)


@settings(max_examples=60, deadline=None)
@given(sizes=some_reads, batch_tokens=st.integers(1, 12), extra=st.integers(0, 40), seed=st.integers(-3, 2**16))
def test_what_goes_in_comes_out_once_in_whole_batches(sizes, batch_tokens, extra, seed):
    stream = Shuffled(reads_of(sizes), batch_tokens=batch_tokens, buffer_tokens=batch_tokens + extra, seed=seed)
    per_buffer = (batch_tokens + extra) // batch_tokens
    batches = [next(stream) for _ in range(per_buffer * 4)]
    assert {len(batch[FIRST]) for batch in batches} == {batch_tokens}
    for number in range(4):  # buffer by buffer, in whatever order within
        parts = batches[per_buffer * number : per_buffer * (number + 1)]
        seen = torch.cat([batch[FIRST].document for batch in parts]).sort().values
        assert torch.equal(seen, torch.arange(len(seen)) + len(seen) * number)
    for batch in batches:
        one = batch[FIRST]
        assert torch.equal(one.vectors[:, 0], one.document.float())
        assert torch.equal(one.position, one.document + 1)
        assert torch.equal(one.token, one.document + 2)
        assert torch.equal(one.step, one.document + 3)
        assert torch.equal(one.halted, one.document % 2 == 0)


@settings(max_examples=60, deadline=None)
@given(sizes=some_reads, batch_tokens=st.integers(1, 12), extra=st.integers(0, 40), taken=st.integers(0, 30))
def test_a_stream_goes_on_from_any_place_without_reading_what_was_used_up(sizes, batch_tokens, extra, taken):
    options = {"batch_tokens": batch_tokens, "buffer_tokens": batch_tokens + extra, "seed": 5}
    whole = Shuffled(reads_of(sizes), **options)
    for _ in range(taken):
        next(whole)
    asked: list[tuple[int, int]] = []
    later = Shuffled(reads_of(sizes, asked), **options, start=whole.place)
    assert later.place == whole.place
    for _ in range(8):
        theirs, ours = next(whole), next(later)
        assert torch.equal(theirs[FIRST].document, ours[FIRST].document)
        assert later.place == whole.place
    per_buffer = (batch_tokens + extra) // batch_tokens
    used_up = taken // per_buffer * per_buffer * batch_tokens  # by the buffers before this one
    epoch, number = min(asked)
    assert epoch * sum(sizes) + sum(sizes[: number + 1]) >= used_up


def draw(seed: int, **options) -> list[dict[Site, ActivationBatch]]:
    stream = Shuffled(reads_of([10] * 100), **{"batch_tokens": 50, "buffer_tokens": 400, "seed": seed, **options})
    return [next(stream) for _ in range(20)]


def test_a_batch_is_mixed_from_the_whole_buffer():
    for batch in draw(0):
        order = batch[FIRST].document
        # 50 rows of a buffer of 400: neighbours of the input all but never stay together
        assert (order.diff().abs() == 1).sum() < 5
        assert len((order // 10).unique()) > 20


def test_the_order_is_decided_by_the_seed():
    first, same, other = ([batch[FIRST].document.tolist() for batch in draw(seed)] for seed in (0, 0, 1))
    assert first == same != other


def test_sites_stay_aligned():
    for batch in draw(3):
        assert batch[LAST].d_model == 3
        for name in ("document", "position", "token", "step", "halted"):
            assert torch.equal(getattr(batch[FIRST], name), getattr(batch[LAST], name))
        assert torch.equal(batch[FIRST].vectors[:, 0], batch[LAST].vectors[:, 2])


def test_a_buffer_smaller_than_a_batch_is_refused():
    with pytest.raises(SaekitError, match="a buffer of 49 tokens cannot give batches of 50; raise buffer_tokens"):
        draw(0, buffer_tokens=49)


def test_sites_with_different_numbers_of_rows_are_refused():
    every, one = Site.parse("layers.0@*"), Site.parse("layers.0@1")
    harvest = harvest_of(stack(loops=2), every, one)
    with pytest.raises(SaekitError, match=r"different numbers of rows \(layers\.0:out@\*: \d+, layers\.0:out@1: \d+\)"):
        next(harvest.stream(4, seed=0))


def test_a_mask_that_leaves_nothing_is_refused_instead_of_waiting_for_ever():
    with pytest.raises(DataError, match="the mask leaves out every token of all 7 rows; give another text or"):
        next(harvest_of(stack(), FIRST, mask=MaskPolicy(max_norm=0.0)).stream(4, seed=0))


# vectors that are there already


def test_a_tensor_source_gives_every_vector_once_per_pass():
    source = TensorSource(site=FIRST, vectors=torch.arange(64.0).view(32, 2), buffer_tokens=32)
    assert source.widths == {FIRST: 2}
    assert isinstance(source, ActivationSource)
    stream = source.stream(8, seed=0)
    drawn = [next(stream)[FIRST] for _ in range(12)]
    counts = torch.bincount(torch.cat([batch.document for batch in drawn]), minlength=32)
    assert counts.tolist() == [3] * 32
    for batch in drawn:
        assert torch.equal(batch.vectors, source.vectors[batch.document])


def test_a_tensor_source_refuses_vectors_that_are_not_finite():
    vectors = torch.ones(4, 2)
    vectors[2, 0] = torch.nan
    with pytest.raises(DataError, match="first in row 2 at position 0"):
        next(TensorSource(site=FIRST, vectors=vectors, buffer_tokens=4).stream(2, seed=0))


def test_a_tensor_source_without_vectors_is_refused():
    with pytest.raises(DataError, match=r"there are no vectors at layers\.0:out; give at least one batch"):
        next(TensorSource(site=FIRST, vectors=torch.zeros(0, 2), buffer_tokens=4).stream(2, seed=0))


def test_take_cuts_to_the_number_asked_for():
    stream = iter([{FIRST: numbered(0, 3)}, {FIRST: numbered(3, 3)}, {FIRST: numbered(6, 3)}])
    assert take(stream, 5, FIRST).document.tolist() == [0, 1, 2, 3, 4]
    assert next(stream)[FIRST].document.tolist() == [6, 7, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_vectors_of_any_type_are_a_source_of_float32(dtype):
    vectors = torch.arange(64.0).view(32, 2)
    source = TensorSource(site=FIRST, vectors=vectors.to(dtype), buffer_tokens=32)
    batch = next(source.stream(8, seed=0))[FIRST]
    assert batch.vectors.dtype is torch.float32
    other = TensorSource(site=FIRST, vectors=(vectors + 1).to(dtype), buffer_tokens=32)
    assert source.facts()["vectors_checksum"] != other.facts()["vectors_checksum"]
