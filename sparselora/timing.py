"""Moved: sparselora.bench.timing."""

from sparselora.bench.timing import *  # noqa: F403
