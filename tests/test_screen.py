"""Screening in bfloat16 must keep what float32 keeps, most of all where bfloat16 alone would choose wrongly.

Most inputs here are whole numbers whose sums float32 holds exactly in any order, so that codes are compared to the bit.
"""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saekit.kernels import backend, screen, select
from saekit.kernels.screen import Columns, bf16_screening, is_screening, largest_of_products
from saekit.selection import FeatureChoice, MutualChoice, SelectionRule, TopK
from saekit.targets import Site
from saekit.training.config import TrainConfig
from saekit.training.step import TrainState, train_step

RULES = [TopK(3), MutualChoice(3), FeatureChoice(3), FeatureChoice(3, exponent=0.8, floor=1)]


@pytest.fixture(autouse=True)
def _on_every_cpu(monkeypatch):
    """Without the instructions it is slow, and still right."""
    monkeypatch.setattr(backend, "has_fast_bf16", lambda: True)


def whole_numbers(n_tokens: int, n_features: int, seed: int, *, spread: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-spread, spread + 1, shape, generator=generator).float()

    return draw(n_tokens, 8), draw(n_features, 8), draw(n_features)


def assert_screens_right(rule: SelectionRule, x: Tensor, w: Tensor, b: Tensor) -> None:
    want = rule(x @ w.T + b)
    with bf16_screening():
        got = rule.encode(x, w, b)
    assert torch.equal(got.row_starts, want.row_starts)
    assert torch.equal(got.features, want.features)
    assert torch.equal(got.values, want.values)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_no_tokens_have_no_codes(rule):
    _, w, b = whole_numbers(1, 20, seed=0)
    with bf16_screening():
        codes = rule.encode(torch.zeros(0, 8), w, b)
    assert (codes.n_tokens, len(codes.values)) == (0, 0)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@settings(max_examples=25, deadline=None)
@given(
    n_tokens=st.integers(20, 90),
    n_features=st.integers(20, 300),
    spread=st.sampled_from([2, 1000]),
    seed=st.integers(0, 999),
)
def test_screened_codes_are_those_of_the_definition(rule, n_tokens, n_features, spread, seed):
    n_tokens = max(n_tokens, rule.smallest_batch(n_features)) if isinstance(rule, FeatureChoice) else n_tokens
    with mock.patch.object(select, "BLOCK_ELEMENTS", 4000):
        assert_screens_right(rule, *whole_numbers(n_tokens, n_features, seed, spread=spread))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_where_bfloat16_would_choose_wrongly_screening_does_not(rule):
    # pairs of features that differ by less than bfloat16 can tell
    x, w, b = whole_numbers(200, 200, 0)
    w[1::2] = w[::2] + torch.randint(-1, 2, (100, 8), generator=torch.Generator().manual_seed(1))
    rounded = rule((x.bfloat16() @ w.bfloat16().T + b.bfloat16()).float())
    exact = rule(x @ w.T + b)
    assert not torch.equal(rounded.to_dense() > 0, exact.to_dense() > 0)
    assert_screens_right(rule, x, w, b)


def gaussian(n_tokens: int = 300, n_features: int = 500) -> tuple[Tensor, Columns]:
    generator = torch.Generator().manual_seed(0)
    columns = torch.nn.functional.normalize(torch.randn(n_features, 64, generator=generator), dim=1)
    return torch.randn(n_tokens, 64, generator=generator), Columns.of(columns, torch.zeros(n_features))


def test_ordinary_rows_are_certified_and_extraordinary_ones_alone_are_computed_whole():
    x, columns = gaussian()
    x[7], x[8], x[9] = 0.0, torch.nan, 1e30
    counts = torch.full((300,), 4)
    with mock.patch.object(screen, "_exactly", wraps=screen._exactly) as exactly:
        found = largest_of_products(x, columns, counts)
    (call,) = exactly.call_args_list
    whole = call.args[0]
    assert len(whole) <= 3 and whole.isnan().any() and (whole == 0).all(1).any()
    want = screen._exactly(x, columns, counts)
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])


def test_rows_whose_cut_is_too_close_to_zero_are_computed_whole():
    x, columns = gaussian()
    counts = torch.full((300,), 245)  # of 500, so that the weakest kept are around zero
    with mock.patch.object(screen, "_exactly", wraps=screen._exactly) as exactly:
        found = largest_of_products(x, columns, counts)
    (call,) = exactly.call_args_list
    assert 100 < len(call.args[0]) < 300
    want = screen._exactly(x, columns, counts)
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])


def test_where_all_are_equal_the_first_are_kept_without_screening():
    x, _ = gaussian()
    equal = Columns.of(torch.ones(500, 64), torch.zeros(500))
    owner, column, _ = largest_of_products(x.abs(), equal, torch.full((300,), 4))
    assert column.tolist() == [0, 1, 2, 3] * 300 and torch.equal(owner, torch.arange(300).repeat_interleave(4))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-3, 1.0, 1e4]), d=st.integers(1, 200))
def test_no_score_is_further_from_its_screened_one_than_the_bound(seed, scale, d):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, d, generator=generator) * scale
    columns = Columns.of(torch.randn(30, d, generator=generator), torch.randn(30, generator=generator))
    screened, slack = screen._screen(x, columns)
    screened = screened.view(torch.bfloat16).double()
    exact = x.double() @ columns.exact.double().T + columns.bias.double()
    bound = slack[:, None].double() + screen._ROUNDING * screened.abs()
    assert ((exact - screened).abs() <= bound).all()


def test_screening_is_asked_for_and_then_over():
    x = torch.ones(2, 3)
    assert not is_screening(x)
    with bf16_screening():
        assert is_screening(x) and not is_screening(x.double())
        with bf16_screening(False):
            assert not is_screening(x)
    assert not is_screening(x)


@pytest.mark.parametrize("screens", [False, True])
def test_a_run_screens_if_its_config_says_so(screens):
    vectors = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(
        site=Site("toy"), rule=TopK(3), n_features=64, tokens=1000, batch_tokens=200, bf16_screening=screens
    )
    state = TrainState.start(config, vectors)
    with mock.patch.object(screen, "_screen", wraps=screen._screen) as screened:
        train_step(state, vectors)
    assert screened.called == screens
