"""What the question lists are answered with: numbers that have names, question by question."""

import warnings
from collections.abc import Callable, Mapping

from saekit.errors import SaekitError

Answers = Mapping[str, Mapping[str, float]]
"""By question, in words; of each, what was measured."""


class LeftOutWarning(UserWarning):
    """A question that cannot be asked of this model on these inputs."""


def answered(questions: Mapping[str, Callable[[], Mapping[str, float]]]) -> Answers:
    """Ask one after the other.

    Warns:
        LeftOutWarning: one cannot be answered (nothing halts in a layer, all tapes are equally long); the others are.
    """
    answers = {}
    for question, ask in questions.items():
        try:
            answers[question] = ask()
        except SaekitError as error:
            warnings.warn(f"left out: {question}; {error}", LeftOutWarning, stacklevel=2)
    return answers
