"""
A second process beside a study: it makes the study's models from the last one to the first.

These models are so small that two threads do not halve the time of a training step. Two processes of one thread each
share no work that has to be waited for. So a second process goes through the list from its end, and the study meets it
in the middle. Every step has a lock and is made once (study/steps.py), so nothing else has to be agreed on. Where there
is one dense model, both need it first: the study trains it on all threads, while the other one waits.

What it leaves out: more than two processes; systems without locks between processes (Windows), where the study works
alone.
"""
import contextlib
import os
import signal
import subprocess
import sys

import torch

from study import steps


class Unheard(steps.Log):
    """The log of the second process: says nothing, and ends where the study that began it, `parent`, is gone."""

    def __init__(self, parent):
        super().__init__()
        self.parent = parent

    def write(self, text, end):
        """No line."""

    def begin(self, name):
        """A step is about to be made."""
        if os.getppid() != self.parent:
            sys.exit(0)
        super().begin(name)


@contextlib.contextmanager
def second_process(run, arguments):
    """While open, `evaluate.py` with these arguments and --backwards OUR_ID runs beside us, on half of the threads.

    Gives a function: from its call on we have only the other half, too. With several draws that is so from the start,
    as each process has a dense model of its own to train. With one thread (OMP_NUM_THREADS=1) there is no second
    process.
    """
    threads = torch.get_num_threads()
    if threads < 2 or not steps.fcntl:
        yield lambda: None
        return

    def share_threads():
        """Leave the other half to the second process."""
        torch.set_num_threads(threads // 2)
    if run.config.seeds > 1:
        share_threads()
    script = os.path.join(steps.ROOT, "evaluate.py")
    process = subprocess.Popen([sys.executable, script, *arguments, "--backwards", str(os.getpid())],
                               stdout=subprocess.DEVNULL, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": str(threads // 2)})
    run.log.hands = 2
    try:
        yield share_threads
    finally:
        process.terminate()
        process.wait()
        run.log.hands = 1
        torch.set_num_threads(threads)


def quietly(run, parent):
    """What the second process of `parent` does at its start: no lines, and a request to end leaves no half file."""
    run.log = Unheard(parent)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
