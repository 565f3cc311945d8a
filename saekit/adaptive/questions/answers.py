"""What the question lists are answered with: numbers that have names, question by question."""

from collections.abc import Mapping

Answers = Mapping[str, Mapping[str, float]]
"""By question, in words; of each, what was measured."""
