"""Every error a user can meet, as one tree.

    RemoraError
    ├── ConfigError      exit 2   a setting is wrong, or settings contradict each other
    ├── DataError        exit 3   a table is wrong
    ├── ModelError       exit 4   a base model or an adapter is wrong
    ├── ResourceError    exit 5   out of disk space or memory
    ├── DivergedError    exit 6   training went to NaN or infinity
    ├── PeerLostError    exit 7   another process of the run was lost
    └── Stopped          exit 75  stopped on request, state saved

A message is one line: ``<found>; <what to do>``.
"""

from __future__ import annotations


class RemoraError(Exception):
    """The base of every error that the user can fix; the CLI exits with `exit_code`."""

    exit_code = 1
    is_shared = False
    """Whether every process of a run raises this error, so that only one reports it."""


class ConfigError(RemoraError, ValueError):
    """A setting is wrong, or settings contradict each other."""

    exit_code = 2


class DataError(RemoraError, ValueError):
    """A table cannot be read or cannot be trained on."""

    exit_code = 3


class ModelError(RemoraError, ValueError):
    """A base model or an adapter is missing, broken or not of the expected kind."""

    exit_code = 4


class ResourceError(RemoraError, RuntimeError):
    """Disk space or memory ran out."""

    exit_code = 5


class DivergedError(RemoraError, ArithmeticError):
    """The loss or a gradient is no longer a finite number."""

    exit_code = 6


class PeerLostError(RemoraError, RuntimeError):
    """Another process of a distributed run died or stopped answering."""

    exit_code = 7


class Stopped(RemoraError):  # noqa: N818  (a request, not a fault)
    """The run was asked to stop and has saved its state."""

    exit_code = 75
