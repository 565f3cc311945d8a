"""A name that cannot be fetched is one line: the Hub's client keeps its retries to itself, and only then."""

import logging

import datasets
import pytest
import transformers
from huggingface_hub.utils import logging as hub_logging

from saekit.activations.text import read_documents
from saekit.errors import SaekitError
from saekit.targets import Target
from saekit.targets.quiet import quiet_hub

CLIENT = logging.getLogger("huggingface_hub.utils._http")


@pytest.fixture(params=[logging.WARNING, logging.DEBUG])
def level(request):
    """The user's own setting."""
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(request.param)
    yield request.param
    hub_logging.set_verbosity(before)


def test_it_is_quiet_inside_and_as_before_outside(level):
    with quiet_hub():
        assert not CLIENT.isEnabledFor(logging.WARNING)
        assert CLIENT.isEnabledFor(logging.ERROR)
    assert hub_logging.get_verbosity() == level
    with pytest.raises(KeyError), quiet_hub():
        raise KeyError
    assert hub_logging.get_verbosity() == level


def test_models_and_data_sets_are_looked_for_quietly(level, monkeypatch):
    heard = []

    def out_of_reach(*arguments, **options):
        heard.append(CLIENT.isEnabledFor(logging.WARNING))
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", out_of_reach)
    monkeypatch.setattr(datasets, "load_dataset", out_of_reach)
    with pytest.raises(SaekitError, match="cannot load 'owner/model' as a language model: no network; give"):
        Target.load("owner/model")
    with pytest.raises(SaekitError, match="cannot read data set 'owner/texts': no network; check the name"):
        read_documents("owner/texts")
    assert heard == [False, False]
    assert hub_logging.get_verbosity() == level
