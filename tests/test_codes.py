"""Compressed rows against the dense matrix they stand for."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.codes import SparseCodes
from saekit.errors import ShapeError

SIZES = {"n_tokens": st.integers(0, 7), "n_features": st.integers(1, 6), "seed": st.integers(0, 2**16)}


def random_pairs(n_tokens: int, n_features: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entries are kept, and small whole strengths, zeros among both: rows and columns may be empty."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(n_tokens, n_features, generator=generator) < 0.5
    return kept, torch.randint(0, 4, (n_tokens, n_features), generator=generator).float() * kept


def codes_of(kept: torch.Tensor, dense: torch.Tensor, *, shuffle: int | None = None) -> SparseCodes:
    tokens, features = kept.nonzero(as_tuple=True)
    if shuffle is not None:
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(shuffle))
        tokens, features = tokens[order], features[order]
    return SparseCodes.from_pairs(
        tokens, features, dense[tokens, features], n_tokens=len(dense), n_features=dense.shape[1]
    )


@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_pairs_in_any_order_give_the_matrix_they_came_from_by_token_then_feature(n_tokens, n_features, seed):
    kept, dense = random_pairs(n_tokens, n_features, seed)
    codes = codes_of(kept, dense, shuffle=seed)
    tokens, features = kept.nonzero(as_tuple=True)
    assert codes.n_tokens == n_tokens
    assert torch.equal(codes.token_of_entry(), tokens)
    assert torch.equal(codes.features, features)
    assert torch.equal(codes.to_dense(), dense)
    assert codes.validate() is codes


@settings(max_examples=30, deadline=None)
@given(**SIZES)
def test_from_dense_keeps_the_non_zero_entries_and_to_dense_undoes_it(n_tokens, n_features, seed):
    dense = random_pairs(n_tokens, n_features, seed)[1]
    codes = SparseCodes.from_dense(dense)
    assert len(codes.values) == int((dense != 0).sum())
    assert torch.equal(codes.to_dense(), dense)


@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_counts_see_active_entries_only(n_tokens, n_features, seed):
    kept, dense = random_pairs(n_tokens, n_features, seed)
    codes = codes_of(kept, dense)
    assert torch.equal(codes.l0(), (dense > 0).sum(1))
    assert torch.equal(codes.feature_counts(), (dense > 0).sum(0))
    active = codes.active()
    assert len(active.values) == int((dense > 0).sum())
    assert torch.equal(active.to_dense(), dense)


@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_columns_hold_what_the_matrix_has_in_each_column(n_tokens, n_features, seed):
    kept, dense = random_pairs(n_tokens, n_features, seed)
    columns = codes_of(kept, dense).by_feature()
    assert columns.n_tokens == n_tokens
    assert int(columns.column_starts[-1]) == int(kept.sum())
    for feature in range(n_features):
        mine = slice(int(columns.column_starts[feature]), int(columns.column_starts[feature + 1]))
        tokens = kept[:, feature].nonzero()[:, 0]
        assert torch.equal(columns.tokens[mine], tokens)
        assert torch.equal(columns.values[mine], dense[tokens, feature])


@settings(max_examples=40, deadline=None)
@given(**SIZES, picks=st.lists(st.integers(0, 6), max_size=9))
def test_select_takes_rows_in_the_order_given_and_as_often(n_tokens, n_features, seed, picks):
    kept, dense = random_pairs(n_tokens, n_features, seed)
    tokens = torch.tensor([p for p in picks if p < n_tokens], dtype=torch.int64)
    chosen = codes_of(kept, dense).select(tokens)
    assert chosen.n_tokens == len(tokens)
    assert torch.equal(chosen.to_dense(), dense[tokens])
    assert len(chosen.values) == int(kept[tokens].sum())


def test_the_gradient_of_the_matrix_reaches_exactly_the_kept_values():
    kept, dense = random_pairs(4, 5, 3)
    codes = codes_of(kept, dense)
    values = codes.values.clone().requires_grad_()
    weights = torch.arange(20.0).view(4, 5)
    (codes.with_values(values).to_dense() * weights).sum().backward()
    assert torch.equal(values.grad, weights[kept])


def test_with_values_and_to_keep_the_entries():
    kept, dense = random_pairs(4, 5, 3)
    codes = codes_of(kept, dense)
    assert torch.equal(codes.with_values(codes.values * 2).to_dense(), dense * 2)
    assert torch.equal(codes.to("cpu").to_dense(), dense)


@pytest.mark.parametrize(
    ("values", "features", "row_starts"),
    [((3,), (2,), (2,)), ((2, 1), (2, 1), (2,)), ((2,), (2,), (2, 1))],
    ids=["lengths", "matrix of values", "matrix of starts"],
)
def test_shapes_that_form_no_codes_are_refused(values, features, row_starts, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run; the annotations refuse it too
    indices = torch.zeros(features, dtype=torch.int64), torch.zeros(row_starts, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"do not form codes; expected \(nnz,\)"):
        SparseCodes(torch.zeros(values), *indices, 4)


@pytest.mark.parametrize(
    ("values", "features", "row_starts", "message"),
    [
        ([1.0, 2.0], [0, 1], [0, 1], r"row_starts ends at 1, but there are 2 values.*from_pairs"),
        ([1.0, 2.0], [0, 1], [1, 2], r"begin at 0 and never fall.*from_pairs"),
        ([1.0, 2.0], [0, 1], [0, 2, 1, 2], r"begin at 0 and never fall.*from_pairs"),
        ([1.0, 2.0], [0, 4], [0, 2], r"from 0 to 4, outside a dictionary of 4.*different SAE"),
        ([1.0, 2.0], [-1, 3], [0, 2], r"from -1 to 3, outside a dictionary of 4"),
    ],
)
def test_validate_names_what_is_wrong(values, features, row_starts, message):
    codes = SparseCodes(torch.tensor(values), torch.tensor(features), torch.tensor(row_starts), 4)
    with pytest.raises(ShapeError, match=message):
        codes.validate()


def test_codes_cannot_be_changed_in_place_and_their_types_are_checked_in_tests():
    codes = SparseCodes.from_dense(torch.eye(2))
    with pytest.raises(AttributeError):
        codes.n_features = 3
    with pytest.raises(jaxtyping.TypeCheckError):  # if this does not raise, the suite runs without its shape checks
        SparseCodes(torch.ones(2), torch.ones(2), torch.tensor([0, 2]), 2)
