"""SIGTERM in training: it asks, and the loop stops where the run can be saved."""

import multiprocessing
import signal
from types import FrameType

import torch
from accelerate import Accelerator

from nucsam.processes import handled


class Sigterm:
    """Context in which SIGTERM only asks to stop; `stop_requested` says whether it has.

    All processes stop after the same step, whichever of them got the signal. In another thread than
    the main one it never comes.
    """

    def __enter__(self) -> "Sigterm":
        self._received = False
        self._requests: torch.Tensor | None = None  # of all processes, as of the step before
        self._handled = handled(self._receive, signal.SIGTERM)
        self._handled.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handled.__exit__(None, None, None)

    def _receive(self, _: int, __: FrameType | None) -> None:
        self._received = True

    def stop_requested(self, accelerator: Accelerator) -> bool:
        """Whether to stop; every process must call it once per step and gets the same answer."""
        if accelerator.num_processes == 1:
            return self._received
        # The answer is one step old: reading it does not wait for the step queued just now.
        earlier = self._requests
        received = torch.tensor(float(self._received), device=accelerator.device)
        self._requests = accelerator.reduce(received, "sum")
        return earlier is not None and bool(earlier > 0)


def ignore_sigterm(_: int) -> None:
    """In a loader worker: ignore SIGTERM, so that the trainer keeps its workers until it has saved.

    A launcher sends the signal to the whole process group.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def kill_workers() -> None:
    """At exit: kill loader workers, which ignore the SIGTERM that multiprocessing waits for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
