"""How the bundled language model is measured: every token counts once, with enough before it."""

from math import log
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.pystd.baselines import nats_with_context
from saekit.activations.tokens import TokenRows
from saekit.training.pretrain import held_out_nats

BOS, ONLY, N_IDS = 0, 5, 8
CONTEXT = 9


class KnowsLate(nn.Module):
    """Certain of id 5 once it has seen `needs` tokens of text, and clueless before."""

    def __init__(self, needs: int) -> None:
        super().__init__()
        self.needs = needs

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, N_IDS)
        logits[:, self.needs :, ONLY] = 100.0
        return SimpleNamespace(logits=logits)


class Frequencies(nn.Module):
    """Fixed log-probabilities, whatever came before."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.arange(N_IDS).float().log_softmax(0).expand(*input_ids.shape, N_IDS))


def rows_of(body: Tensor) -> TokenRows:
    return TokenRows.from_ids(torch.cat([torch.full((len(body), 1), BOS), body], dim=1), bos=BOS)


@pytest.mark.parametrize("n_rows", [1, 2, 5])
@pytest.mark.parametrize("needs", [1, 4])
def test_every_token_but_the_first_ones_has_half_a_context_before_it(n_rows: int, needs: int) -> None:
    rows = rows_of(torch.full((n_rows, CONTEXT - 1), ONLY))
    expected = needs * log(N_IDS) / (n_rows * (CONTEXT - 1))
    assert nats_with_context(KnowsLate(needs), rows, batch_rows=2) == pytest.approx(expected)


def test_a_window_gives_no_more_than_half_a_context_for_certain() -> None:
    rows = rows_of(torch.full((4, CONTEXT - 1), ONLY))
    assert nats_with_context(KnowsLate(5), rows) > 5 * log(N_IDS) / (4 * (CONTEXT - 1))


def test_without_use_of_context_it_is_the_mean_over_the_same_tokens() -> None:
    body = torch.randint(1, N_IDS, (7, CONTEXT - 1), generator=torch.Generator().manual_seed(0))
    rows = rows_of(body)
    assert nats_with_context(Frequencies(), rows, batch_rows=3) == pytest.approx(held_out_nats(Frequencies(), rows))
