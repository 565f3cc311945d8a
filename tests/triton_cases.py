"""Run by test_triton.py, in a process with Triton's interpreter."""

import pytest
import torch
from test_kernels import LargestTensor, assert_close, leaf, ragged
from torch import Tensor

from saekit.kernels import backend, entries, reference, select, triton_encode, triton_reconstruct, triton_rows
from saekit.kernels.select import Selection
from saekit.kernels.triton_encode import Columns
from saekit.sae import SAE
from saekit.selection import FeatureChoice, MutualChoice, SelectionRule, TopK
from saekit.targets import Site
from saekit.training import descent
from saekit.training.config import TrainConfig
from saekit.training.step import TrainState, train_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = pytest.mark.parametrize("row_lengths", [[3, 3, 3], [0, 7, 1], [0, 0, 4, 0], [0], [], [20, 20]], ids=str)
WIDTHS = pytest.mark.parametrize("d_model", [1, 48, 130])
TYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)


@pytest.fixture(autouse=True)
def _triton_for_everything(monkeypatch):
    monkeypatch.setattr(backend, "uses_triton", lambda device: True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@TYPES
@WIDTHS
@ROWS
def test_decoding_matches_its_reference_forwards_and_backwards(row_lengths, d_model, dtype, tolerance):
    case = {name: tensor.to(DEVICE) for name, tensor in ragged(row_lengths, d_model, dtype).items()}
    places = case["features"], case["row_starts"]
    values = torch.rand(len(places[0]), device=DEVICE).to(dtype)
    mine, plain = (leaf(values), leaf(case["w"])), (leaf(values.double()), leaf(case["w"].double()))
    got, want = entries.decode_rows(mine[0], *places, mine[1]), reference.decode_rows(plain[0], *places, plain[1])
    assert got.dtype == dtype
    assert_close(got, want, tolerance)
    got.backward(case["x"] + 1)
    want.backward((case["x"] + 1).double())
    assert_close(mine[0].grad, plain[0].grad, tolerance)
    assert_close(mine[1].grad, plain[1].grad, tolerance)


@TYPES
@WIDTHS
@ROWS
def test_encoding_matches_its_reference_backwards(row_lengths, d_model, dtype, tolerance):
    case = {name: tensor.to(DEVICE) for name, tensor in ragged(row_lengths, d_model, dtype).items()}
    features, row_starts = case["features"], case["row_starts"]
    plain = [leaf(case[name].double()) for name in "xwb"]
    want = reference.encode_entries(*plain, features, row_starts)
    tokens = reference.row_of_entry(row_starts, len(features))
    scores = (case["x"].double() @ case["w"].double().T + case["b"].double())[tokens, features].to(dtype)
    mine = [leaf(case[name]) for name in "xwb"]
    got = entries.encode_entries(*mine, Selection(scores, features, row_starts))
    grad = torch.linspace(1, 2, len(features), dtype=torch.float64, device=DEVICE).to(dtype)
    got.backward(grad)
    want.backward(grad.double())
    for ours, theirs in zip(mine, plain, strict=True):
        assert_close(ours.grad, theirs.grad, tolerance)


def test_the_kernels_run_at_all(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the plain path was taken")

    monkeypatch.setattr(entries, "embedding_bag", refuse)
    values, w = torch.ones(3, device=DEVICE), torch.ones(4, 5, device=DEVICE)
    out = entries.decode_rows(values, torch.tensor([0, 1, 3], device=DEVICE), torch.tensor([0, 3], device=DEVICE), w)
    assert out.tolist() == [[3.0] * 5]


def whole_numbers(n_tokens: int, n_features: int, d_model: int, *, spread: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs whose products float32 holds exactly in any order, so that codes can be compared to the bit."""
    generator = torch.Generator().manual_seed(n_tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-spread, spread + 1, shape, generator=generator).float().to(DEVICE)

    return draw(n_tokens, d_model), draw(n_features, d_model), draw(n_features)


RULES = [TopK(2), TopK(7), MutualChoice(3), FeatureChoice(3), FeatureChoice(3, exponent=0.8, floor=1)]


@pytest.mark.parametrize("sizes", [(70, 300, 5), (130, 193, 33), (257, 640, 64)], ids=str)
@pytest.mark.parametrize("spread", [1, 100], ids=["ties", "few ties"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_codes_are_those_of_the_definition(rule: SelectionRule, spread, sizes):
    n_tokens, n_features, d_model = sizes
    n_tokens = max(n_tokens, rule.smallest_batch(n_features)) if isinstance(rule, FeatureChoice) else n_tokens
    x, w, b = whole_numbers(n_tokens, n_features, d_model, spread=spread)
    b[::5] = -1e6  # features whose column is negative throughout
    want, got = rule(x @ w.T + b), rule.encode(x, w, b)
    assert torch.equal(got.row_starts, want.row_starts)
    assert torch.equal(got.features, want.features)
    assert torch.equal(got.values, want.values)


def test_rows_that_hold_no_number_are_sorted_as_a_sort_does():
    x, w, b = whole_numbers(70, 300, 5, spread=100)
    x[3] = torch.nan
    columns = Columns.of(w, b)
    found = triton_encode.largest_of_products(x, columns, torch.full((70,), 2, device=DEVICE))
    want = triton_encode._exactly(x, columns, torch.full((70,), 2, device=DEVICE))
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])


def test_where_the_buffer_is_too_small_it_grows():
    x, w, b = whole_numbers(70, 300, 5, spread=100)
    cuts = torch.zeros(70, device=DEVICE)
    place, scores = triton_encode._append(x, Columns.of(w, b), cuts, room=3)
    dense = (x @ w.T + b).flatten()
    assert torch.equal(place, (dense >= 0).nonzero()[:, 0]) and torch.equal(scores, dense[place])


def test_sums_of_bfloat16_are_float32():
    table = torch.full((1000, 1), 1.0, dtype=torch.bfloat16, device=DEVICE)
    rows, weights = torch.arange(1000, device=DEVICE), torch.ones(1000, dtype=torch.bfloat16, device=DEVICE)
    out = triton_rows.weighted_rows(rows, weights, torch.tensor([0, 1000], device=DEVICE), table)
    assert out.item() == 1000  # bfloat16 would stay at 256


def test_the_dense_product_is_never_written():
    x, w, b = whole_numbers(600, 1200, 16, spread=100)
    for rule in (TopK(2), MutualChoice(2), FeatureChoice(2)):
        with LargestTensor() as largest:
            rule.encode(x, w, b)
        assert largest.elements <= 600 * 1200 / 6
    assert select.BLOCK_ELEMENTS > 600 * 1200  # which the plain path would have used


@TYPES
@WIDTHS
@ROWS
def test_reconstruction_and_its_gradients_are_those_of_the_reference(row_lengths, d_model, dtype, tolerance):
    case = {name: tensor.to(DEVICE) for name, tensor in ragged(row_lengths, d_model, dtype).items()}
    places = case["features"], case["row_starts"]
    values = torch.rand(len(places[0]), device=DEVICE).to(dtype)
    bias = torch.linspace(-1, 1, d_model, dtype=torch.float64, device=DEVICE).to(dtype)
    mine = [leaf(tensor) for tensor in (values, case["w"], bias)]
    plain = [leaf(tensor.double()) for tensor in (values, case["w"], bias)]
    loss, error = triton_reconstruct.reconstruct(mine[0], *places, mine[1], mine[2], case["x"])
    want = reference.decode_rows(plain[0], *places, plain[1]) + plain[2] - case["x"].double()
    assert_close(error, want, tolerance)
    assert not error.requires_grad
    squares = want.square().sum() / max(1, len(want))
    torch.testing.assert_close(loss.double(), squares.detach(), rtol=tolerance, atol=tolerance)
    (3 * loss).backward()
    (3 * squares).backward()
    for ours, theirs in zip(mine, plain, strict=True):
        assert_close(ours.grad, theirs.grad, tolerance)


@pytest.mark.parametrize("width", [1, 48, 130])
def test_the_end_of_a_step_is_that_of_plain_torch(width, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.functional.normalize(torch.randn(9, width, generator=generator), dim=1).to(DEVICE)
    mine, plain = torch.nn.Parameter(weights.clone()), torch.nn.Parameter(weights.clone())
    optimizers = [torch.optim.Adam([p], lr=9.0, betas=(0.9, 0.999), eps=6.25e-10) for p in (mine, plain)]
    for step in range(3):
        grad = torch.randn(9, width, generator=generator).to(DEVICE)
        grad[4] = 0.0  # a feature that nobody chose still moves
        for parameter, optimizer, runs in ((mine, optimizers[0], True), (plain, optimizers[1], False)):
            monkeypatch.setattr(backend, "uses_triton", lambda device, runs=runs: runs)
            parameter.grad = grad.clone()
            descent.descend(optimizer, lr=0.01 * (step + 1), clip=0.5, unit_rows=parameter)
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(optimizers[0].state[mine][name], optimizers[1].state[plain][name])


def test_steps_of_training_are_those_of_the_plain_path(monkeypatch):
    vectors = torch.randn(60, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    config = TrainConfig(site=Site("toy"), rule=TopK(4), n_features=40, tokens=600, batch_tokens=60)

    def trained(runs: bool) -> tuple[torch.Tensor, SAE]:
        monkeypatch.setattr(backend, "uses_triton", lambda device: runs)
        state = TrainState.start(config, vectors)
        losses = []
        for _ in range(4):
            state.density.tokens_since_fired[::4] = 1 << 40  # so that the sign of what is left over shows
            report = train_step(state, vectors)
            losses.append(torch.stack([report.loss, report.fvu, report.auxiliary]).detach())
        assert report.auxiliary > 0
        return torch.stack(losses), state.sae

    (losses, ours), (plain_losses, theirs) = trained(True), trained(False)
    torch.testing.assert_close(losses, plain_losses)
    for mine, plain in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
