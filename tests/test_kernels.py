"""The fast kernels against their readable twins: forwards, backwards, awkward shapes, poisoned memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saekit.errors import ShapeError
from saekit.kernels import backend, entries, largest, reference, select
from saekit.kernels.backend import choose_backend
from saekit.kernels.select import Selection
from saekit.normalisation import EqualNorms, Plain
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import FeatureChoice, MutualChoice, Threshold, TopK

N_FEATURES = 20
ROWS = pytest.mark.parametrize(
    "row_lengths", [[3, 3, 3], [0, 7, 1], [0, 0, 4, 0], [0], [0, 0], [], [20]], ids=lambda r: "rows " + str(r)
)
WIDTHS = pytest.mark.parametrize("d_model", [1, 3, 48, 65])
TYPES = pytest.mark.parametrize(
    # three significant digits of bfloat16 after sums of up to 20 terms; rounding alone in the others
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)],
    ids=str,
)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """What torch allocates inside an operation is full of NaN too, not only what Python asks for."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def ragged(row_lengths: list[int], d_model: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights, inputs and the places of entries; a quarter of the entries is to be closed by ReLU."""
    generator = torch.Generator().manual_seed(sum(row_lengths) + d_model)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = [torch.randperm(N_FEATURES, generator=generator)[:n].sort().values for n in row_lengths]
    return {
        "x": draw(len(row_lengths), d_model),
        "w": draw(N_FEATURES, d_model),
        "b": draw(N_FEATURES) + 0.5,
        "features": torch.cat([torch.zeros(0, dtype=torch.int64), *rows]),
        "row_starts": torch.tensor([0, *row_lengths]).cumsum(0),
    }


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    scale = max(1.0, float(want.detach().abs().max()) if want.numel() else 1.0)
    torch.testing.assert_close(got, want.to(got.dtype), rtol=tolerance, atol=tolerance * scale)


@TYPES
@WIDTHS
@ROWS
def test_decode_rows_matches_its_reference_forwards_and_backwards(row_lengths, d_model, dtype, tolerance):
    case = ragged(row_lengths, d_model, dtype)
    places = case["features"], case["row_starts"]
    values = torch.rand(len(places[0]), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    mine, plain = (leaf(values), leaf(case["w"])), (leaf(values.double()), leaf(case["w"].double()))
    got = entries.decode_rows(mine[0], *places, mine[1])
    want = reference.decode_rows(plain[0], *places, plain[1])
    assert got.dtype == dtype
    assert_close(got, want, tolerance)
    grad = case["x"] + 1
    got.backward(grad)
    want.backward(grad.double())
    assert_close(mine[0].grad, plain[0].grad, tolerance)
    assert_close(mine[1].grad, plain[1].grad, tolerance)


@TYPES
@WIDTHS
@ROWS
def test_encode_entries_matches_its_reference_forwards_and_backwards(row_lengths, d_model, dtype, tolerance):
    case = ragged(row_lengths, d_model, dtype)
    features, row_starts = case["features"], case["row_starts"]
    plain = [leaf(case[name].double()) for name in "xwb"]
    want = reference.encode_entries(*plain, features, row_starts)
    tokens = reference.row_of_entry(row_starts, len(features))
    scores = (case["x"].double() @ case["w"].double().T + case["b"].double())[tokens, features].to(dtype)
    mine = [leaf(case[name]) for name in "xwb"]
    got = entries.encode_entries(*mine, Selection(scores, features, row_starts))
    assert_close(got, want, tolerance)
    grad = torch.linspace(1, 2, len(features), dtype=torch.float64)
    got.backward(grad.to(dtype))
    want.backward(grad.to(dtype).double())
    for ours, theirs in zip(mine, plain, strict=True):
        assert_close(ours.grad, theirs.grad, tolerance)


def test_the_cases_above_close_some_entries():
    case = ragged([20], 3, torch.float64)
    values = reference.encode_entries(case["x"], case["w"], case["b"], case["features"], case["row_starts"])
    assert 0 < int((values == 0).sum()) < 20


def test_gradients_that_nobody_asks_for_are_not_computed():
    case = ragged([3, 2], 4, torch.float32)
    weights = leaf(case["w"])
    values = torch.ones(5, requires_grad=True)
    entries.decode_rows(values, case["features"], case["row_starts"], weights.detach()).sum().backward()
    assert values.grad is not None and weights.grad is None


def test_a_strided_decoder_is_refused_rather_than_misread():
    case = ragged([2], 4, torch.float32)
    with pytest.raises(ShapeError, match=r"strides \(1, 20\).*store it as \(n_features, d_model\).*contiguous\(\)"):
        entries.decode_rows(torch.ones(2), case["features"], case["row_starts"], case["w"].T.contiguous().T)


def test_strided_inputs_and_gradients_are_read_right():
    case = ragged([3, 0, 2], 4, torch.float64)
    places = case["features"], case["row_starts"]
    scores = torch.ones(5, dtype=torch.float64)

    def gradients(layout) -> list[Tensor]:
        x, w = (layout(case[name].clone()).requires_grad_() for name in "xw")
        values = entries.encode_entries(x, w, case["b"], Selection(scores, *places))
        out = entries.decode_rows(values, *places, case["w"])
        out.backward(layout(case["x"]))
        return [x.grad, w.grad]

    for strided, plain in zip(
        gradients(lambda t: t.T.contiguous().T), gradients(lambda t: t.contiguous()), strict=True
    ):
        torch.testing.assert_close(strided, plain)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 4),
    columns=st.integers(1, 300),
    most=st.integers(0, 12),
    levels=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 999),
)
def test_the_largest_of_rows_are_those_of_a_stable_sort(rows, columns, most, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (rows, columns), generator=generator).float()
    counts = torch.randint(0, most + 1, (rows,), generator=generator)
    if seed % 5 == 0 and rows:  # what a diverged run brings, and what a mask leaves
        scores[0, seed % columns] = torch.nan if seed % 2 else -torch.inf
    kept = torch.zeros_like(scores)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    kept.scatter_(1, order, (torch.arange(columns) < counts[:, None]).float())
    got = largest.largest_of_rows(scores, counts)
    assert torch.equal(torch.stack(got, 1), kept.nonzero())


@pytest.mark.parametrize("bound", [1, 300, 1 << 16, (1 << 16) + 1, 1 << 20, 1 << 33])
def test_the_order_by_radix_is_that_of_a_stable_sort(bound):
    keys = torch.randint(0, bound, (5000,), generator=torch.Generator().manual_seed(0))
    keys[:2] = torch.tensor([bound - 1, 0])
    assert torch.equal(largest.stable_order(keys, bound), keys.argsort(stable=True))


class LargestTensor(TorchDispatchMode):
    """Watches every operation, in backward passes too, for the most elements that any result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # sparse ones have no storage of their own; what they are made of passes by here too
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.layout == torch.strided]
        self.elements = max([self.elements, *(t.untyped_storage().nbytes() // t.itemsize for t in tensors)])
        return out


@pytest.mark.parametrize("equal_norms", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "rule",
    [TopK(2), MutualChoice(2), FeatureChoice(2), FeatureChoice(2, exponent=1.0, offset=20.0, floor=1), Threshold(2.2)],
    ids=repr,
)
def test_no_step_of_training_holds_the_dense_pre_activations(rule, ties, equal_norms, monkeypatch):
    n_tokens, n_features, d_model, block = 600, 400, 16, 5000
    monkeypatch.setattr(select, "BLOCK_ELEMENTS", block)
    sae = SAE(
        d_model,
        n_features,
        rule,
        cfg=SAEConfig(d_in=d_model, d_sae=n_features, normalisation=EqualNorms() if equal_norms else Plain()),
    )
    x = torch.randn(n_tokens, d_model, generator=torch.Generator().manual_seed(0))
    if ties:
        with torch.no_grad():
            sae.encoder.zero_()
            sae.b_enc.fill_(0.0 if isinstance(rule, Threshold) else 1.0)
    x.requires_grad_()
    with LargestTensor() as largest:
        loss = (x - sae(x)).square().sum()
        loss.backward()
    assert x.grad is not None and sae.encoder.grad is not None and sae.decoder.grad is not None
    dense = n_tokens * n_features
    # the largest thing there may be: all inputs, all weights, or a few blocks' worth of candidates
    assert largest.elements <= max(x.numel(), sae.encoder.numel(), 4 * block) < dense / 10


def test_the_watcher_above_does_see_a_dense_matrix():
    rule, x = TopK(2), torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        rule(x)
    assert largest.elements >= 2400


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", "mps"])
@pytest.mark.parametrize("triton", [True, False])
def test_the_backend_says_what_runs_on_a_device_and_why(device, triton, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if triton else None)
    chosen = choose_backend(device)
    runs_triton = triton and device.startswith("cuda")
    assert chosen.name == ("triton" if runs_triton else "sparse torch")
    assert backend.uses_triton(device) == runs_triton
    if device.startswith("cuda") and not triton:
        assert "pip install triton" in chosen.reason
    assert ("screen" in chosen.reason) == (device == "cpu") and ("for mps" in chosen.reason) == (device == "mps")
