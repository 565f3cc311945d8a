"""Makes every test stricter than a user's session.

Offline, one thread, warnings are errors and shapes are checked (both in pyproject), and memory that torch
hands out unwritten is full of NaN, so that an output nobody wrote cannot pass by luck.
"""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from hypothesis import settings

# the same examples every time: a red run must mean that the change is wrong
settings.register_profile("saekit", derandomize=True)
settings.load_profile("saekit")

# toy sizes: two threads spend more time waiting for each other than computing
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


def poisoned(allocate):
    """`allocate`, with NaN in what it returns."""

    def allocate_and_fill(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() and tensor.device.type != "meta":
            with torch.no_grad():
                tensor.fill_(torch.nan)
        return tensor

    return allocate_and_fill


torch.empty = poisoned(torch.empty)
torch.empty_like = poisoned(torch.empty_like)
torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture
def repository() -> Path:
    """The top folder of the project."""
    return REPOSITORY


@pytest.fixture
def shared_data() -> Path:
    """Real models and texts beside the project, where there are any."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA.parent.name}/{SHARED_DATA.name} beside the project")
    return SHARED_DATA


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine in the place of the real one, with an empty cache."""
    import huggingface_hub
    from hub_server import running
    from huggingface_hub import constants

    import saekit.hub

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(saekit.hub, "WAITS_S", (0.0, 0.0))
    # the library would wait for seconds between its own tries, which are not what is tested
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    huggingface_hub.close_session()
    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # the other way for large files, which needs a server of its own
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server
        huggingface_hub.close_session()
