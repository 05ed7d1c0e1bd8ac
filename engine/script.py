"""
The edge of every script: bad input is one line and status 2, Ctrl-C one line and status 130, a reader that has left
(`| head`) no line and status 141.

A script imports this file before torch, whose import takes a second: from then on Ctrl-C is one line.
"""
import os
import signal
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def leave(*_):
    """End the process with one line: what Ctrl-C does while a script's modules are imported."""
    os.write(2, b"\ninterrupted before anything was begun\n")
    os._exit(130)


def is_script(path):
    """Whether sys.argv[0] = `path` is a script of this project; -m stands there until Python has found the module."""
    folder = os.path.dirname(os.path.realpath(path))
    return path == "-m" or os.path.isfile(path) and ROOT in (folder, os.path.dirname(folder))


sys.stdout = sys.stdout or open(os.devnull, "w")  # None: closed by whoever started us (>&-)
sys.stderr = sys.stderr or open(os.devnull, "w")
if is_script(sys.argv[0]) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)


def guard(run, name=None):
    """Run a script's main function: bad input is one line and status 2, Ctrl-C is one line and status 130.

    Where the reader of its output has left, it ends without a word and with 141, the status of other programs then.
    """
    name = name or os.path.basename(sys.argv[0])
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no sign for a letter shows a "?"
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            run()
        except BrokenPipeError:
            raise
        except (ValueError, OSError, OverflowError, MemoryError) as error:
            what = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else error
            print(f"{name}: {(str(what) or 'out of memory').splitlines()[0]}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(f"\n{name}: interrupted; what a study had finished is kept and will be reused", file=sys.stderr)
            sys.exit(130)
        finally:
            sys.stdout.flush()  # also behind --help: what nobody takes is noticed here, not while Python ends
    except OSError as error:
        lost_output(error, name)


def lost_output(error, name):
    """End where the output could not be written: its reader has left, or its disk is full, which is said once."""
    nobody = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nobody, sys.stdout.fileno())  # Python flushes it once more when it ends
    if isinstance(error, BrokenPipeError):
        os.dup2(nobody, sys.stderr.fileno())  # which may be the same pipe
        sys.exit(141)
    if getattr(error.__context__, "code", 0) != 2:
        print(f"{name}: standard output: {error.strerror}", file=sys.stderr)
    sys.exit(2)
