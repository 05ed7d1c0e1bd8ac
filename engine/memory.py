"""
The memory that a process keeps when it has freed it: on a CPU 5 to 10 % of the time of a repair's step.

The large tensors of a step are freed at its end. The C library of Linux then gives their pages back to the system, and
in the next step each page of 4 KB is mapped again when it is first written to. Other systems are left alone.
"""
import ctypes


def keep_memory():
    """Let this process keep what it frees until it ends."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: how many bytes may stay free at the end of the heap
    mallopt(-3, 32 << 20)     # M_MMAP_THRESHOLD: larger pieces are mapped each for itself; 32 MB is the most
