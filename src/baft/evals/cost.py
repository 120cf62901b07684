"""What making an edit takes beside time: memory above what was in use before, and bytes to keep it.

On a processor the peak is that of resident memory. Linux keeps it (VmHWM; /proc/self/clear_refs resets it);
where it cannot be reset, a thread samples the resident memory instead and the result says so. On an
accelerator it is the most that torch had allocated there.
"""

import contextlib
import ctypes
import gc
import os
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from baft.methods.base import Editor, is_earlier

PROC = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class Peak:
    """Memory while something ran, in bytes.

    Args:
        own: What was in use before.
        above: How far it rose above that.
        whole_process: The most since the start of the process.
        how: How it was measured.
    """

    own: int
    above: int
    whole_process: int
    how: str


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Frees what nobody holds, and returns it to the system, so that it cannot hide what comes next."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def peak_above(work: Callable[[], object], device: torch.device | None = None) -> Peak:
    """How far memory rises above its present height while something runs.

    Args:
        work: What runs.
        device: Where; left out, on a processor.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        own = torch.cuda.memory_allocated(device)
        work()
        peak = torch.cuda.max_memory_allocated(device)
        return Peak(own, peak - own, peak, "most allocated by torch on the accelerator")
    give_back()
    before = peak_of_process()
    try:
        (PROC / "clear_refs").write_text("5")
        own = resident()
        work()
        peak, how = _high_water(), "VmHWM, reset before"
    except OSError:
        own = resident()
        with _Sampler() as sampler:
            work()
        peak, how = sampler.peak, "resident memory, sampled every millisecond"
    # Resetting the peak resets what the system reports of the whole process, too.
    return Peak(own, max(0, peak - own), max(before, peak), how)


def peak_of_process() -> int:
    """The most resident memory since the start of the process, or since its peak was reset, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _high_water() -> int:
    for line in (PROC / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system keeps no peak of resident memory")


class _Sampler:
    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "_Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, resident())
            time.sleep(1e-3)


def stored_bytes(editor: Editor) -> int:
    """Bytes that an artifact holds of the edits in force, without what undo goes back to.

    How far that goes is for each method to say; some keep whole tables for it, others need none.
    """
    return sum(tensor.nbytes for name, tensor in editor.tensors().items() if not is_earlier(name))
