"""Run by test_compile.py, in a process without the hook that checks shapes."""

import pytest
import torch
from torch import Tensor, nn

from saekit.sae import SAE
from saekit.selection import SelectionRule, Threshold, TopK


class Spliced(nn.Module):
    """Layers of a model with an SAE between them."""

    def __init__(self, rule: SelectionRule):
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 3)
        self.sae = SAE(8, 40, rule)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.sae(self.before(x).relu())).tanh()


# which torch gives of itself while it looks at what it cannot compile
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("rule", [TopK(4), Threshold(0.1)], ids=repr)
def test_compiled_it_gives_the_same_outputs_and_gradients(rule):
    torch.manual_seed(0)
    model, x = Spliced(rule), torch.randn(6, 5, 8)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    want, got = model(x), torch.compile(model, backend=count)(x)
    assert len(graphs) >= 2  # what is before and after was compiled
    torch.testing.assert_close(got, want)
    expected = torch.autograd.grad(want.sum(), list(model.parameters()))
    gradients = torch.autograd.grad(got.sum(), list(model.parameters()))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
