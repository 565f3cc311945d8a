"""No chatter of the Hub's client around an answer of ours."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_hub() -> Iterator[None]:
    """The client says nothing short of an error; the user's own setting comes back afterwards.

    Without a network it reports every one of its retries, and the error that follows says it all.
    """
    from huggingface_hub.utils import logging  # heavy, and only for what may be on the Hub

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
