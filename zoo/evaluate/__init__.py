"""Scores of one run, and suites: models x tasks x seeds, measured into rows, drawn and written up."""

from zoo.evaluate.repeat import Repeated, repeat
from zoo.evaluate.runner import run_suite
from zoo.evaluate.score import Scores, evaluate_run
from zoo.evaluate.suite import Suite, find_suite

__all__ = ["Repeated", "Scores", "Suite", "evaluate_run", "find_suite", "repeat", "run_suite"]
