"""What several threads do side by side must be what one would do."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from saekit.kernels import backend, entries, memory, select, threads
from saekit.kernels.screen import bf16_screening
from saekit.kernels.threads import ranges, side_by_side
from saekit.losses import AuxZipf
from saekit.sae import SAE
from saekit.selection import AbsTopK, FeatureChoice, GroupMax, MutualChoice, Threshold, TopK
from saekit.targets import Site
from saekit.training.config import TrainConfig
from saekit.training.step import TrainState, train_step

RULES = [
    TopK(3), AbsTopK(3), GroupMax(4), MutualChoice(3), FeatureChoice(3), FeatureChoice(3, exponent=0.8, floor=1),
    Threshold(40.0),
]  # fmt: skip


@contextmanager
def torch_threads(n: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _a_thread_for_little_work(monkeypatch):
    monkeypatch.setattr(threads, "_WORTH_A_THREAD", 1)


@pytest.mark.parametrize("n_rows", [0, 1, 2, 5, 64])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_ranges_are_all_rows_once(n_rows, n_threads):
    with torch_threads(n_threads):
        parts = ranges(torch.zeros(n_rows, 4))
    assert [row for part in parts for row in range(n_rows)[part]] == list(range(n_rows))
    assert len(parts) == max(1, min(n_threads, n_rows))


def test_little_work_and_other_devices_stay_with_the_caller(monkeypatch):
    monkeypatch.setattr(threads, "_WORTH_A_THREAD", 100)
    with torch_threads(2):
        assert len(ranges(torch.zeros(199, 1))) == 1 and len(ranges(torch.zeros(200, 1))) == 2
        assert len(ranges(torch.zeros(200, 1, device="meta"))) == 1


@pytest.mark.parametrize("inference", [False, True])
def test_each_part_has_a_thread_of_torch_and_the_modes_of_the_caller(inference):
    parts = [slice(0, 1), slice(1, 2), slice(2, 3)]
    with torch_threads(3), torch.inference_mode(inference):
        found = side_by_side(
            lambda part: (part, torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            parts,
        )
        assert torch.get_num_threads() == 3
    assert found == [(part, 1, False, inference) for part in parts]


def test_many_threads_share_few_ranges_which_are_not_divided_again():
    rows = torch.zeros(64, 4)
    with torch_threads(9):
        parts = ranges(rows)
        assert len(parts) == 4
        assert side_by_side(lambda part: (torch.get_num_threads(), len(ranges(rows))), parts) == [(2, 1)] * 4


def test_what_goes_wrong_in_a_part_reaches_the_caller():
    def fail(part: slice) -> None:
        raise ValueError(f"in {part.start}")

    with torch_threads(2), pytest.raises(ValueError, match="in 0"):
        side_by_side(fail, [slice(0, 1), slice(1, 2)])


def whole_numbers(n_tokens: int, n_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whose products float32 holds exactly, however they are divided."""
    generator = torch.Generator().manual_seed(0)
    shapes = (n_tokens, 8), (n_features, 8), (n_features,)
    x, w, b = (torch.randint(-9, 10, shape, generator=generator).float() for shape in shapes)
    return x, w, b


@pytest.mark.parametrize("screens", [False, True])
@pytest.mark.parametrize("block", [500, 1 << 20])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_codes_do_not_depend_on_the_number_of_threads(rule, block, screens, monkeypatch):
    monkeypatch.setattr(select, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(backend, "has_fast_bf16", lambda: True)
    x, w, b = whole_numbers(150, 120)
    want = rule(x @ w.T + b)
    with torch_threads(3), bf16_screening(screens):
        got = rule.encode(x, w, b)
    assert torch.equal(got.row_starts, want.row_starts)
    assert torch.equal(got.features, want.features)
    assert torch.equal(got.values, want.values)


@pytest.mark.parametrize("bf16", [False, True])
def test_steps_with_three_threads_are_those_of_one(bf16, monkeypatch):
    monkeypatch.setattr(memory, "LARGE_BYTES", 1)
    monkeypatch.setattr(entries, "_BLOCK_ROWS", 7)
    vectors = torch.randn(120, 12, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(
        site=Site("toy"), rule=TopK(4), n_features=100, tokens=1200, batch_tokens=120,
        auxiliary=AuxZipf(k_aux=6, dead_after=1, bf16=bf16),
    )  # fmt: skip

    def trained(n_threads: int) -> SAE:
        with torch_threads(n_threads):
            state = TrainState.start(config, vectors)
            for _ in range(5):
                state.density.tokens_since_fired[::10] = 1 << 40
                report = train_step(state, vectors)
        assert report.auxiliary > 0
        return state.sae

    for ours, theirs in zip(trained(3).parameters(), trained(1).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 if bf16 else 1e-5)
