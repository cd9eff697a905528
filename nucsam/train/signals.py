"""SIGTERM and Ctrl-C in training: the loop stops at the next step at which it can save."""

import multiprocessing
import os
import signal
from contextlib import ExitStack
from types import FrameType

import torch
from accelerate import Accelerator

from nucsam.processes import is_first, signals_handled


class StopSignals(ExitStack):
    """Context in which SIGTERM and Ctrl-C only ask to stop; `agreed` says whether they did.

    All processes stop after the same step, whichever of them got the signal. A second Ctrl-C stops
    at once. Outside the main thread no signal arrives.
    """

    def __enter__(self) -> "StopSignals":
        self._received = 0  # number of the signal
        self.enter_context(signals_handled(self._receive, signal.SIGTERM, signal.SIGINT))
        return self

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        if is_first():  # `print` must not be entered twice
            os.write(2, b"stopping after one of the next steps; Ctrl-C stops at once\n")

    @property
    def status(self) -> int:
        """Exit status of a process that stops; the signal may have reached another one."""
        return 128 + (self._received or signal.SIGTERM)

    def agreed(
        self, accelerator: Accelerator, due: bool = False, wait: bool = True
    ) -> tuple[bool, bool]:
        """Whether to stop, and whether to save; all processes call it, and get the same answer.

        Args:
            accelerator: of the training.
            due: whether this process is to save.
            wait: whether processes may wait for their GPUs to ask each other. If not, they
                continue.
        """
        asked = [self._received > 0, due]
        if accelerator.num_processes > 1:
            if not wait and accelerator.device.type != "cpu":
                return False, False
            votes = torch.tensor(asked, dtype=torch.float32, device=accelerator.device)
            asked = (accelerator.reduce(votes, "sum") > 0).tolist()
        stop, save = asked
        return stop, save


def ignore_signals(_: int) -> None:
    """In a loader worker: ignore stop signals; the trainer needs the worker until it has saved.

    A launcher sends SIGTERM, and a terminal Ctrl-C, to the whole process group.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def kill_workers() -> None:
    """At exit: kill loader workers, which ignore the SIGTERM that multiprocessing waits for."""
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
