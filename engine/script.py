"""
The edge of every script: bad input is one line and status 2, Ctrl-C one line and status 130, a reader that has left
(`| head`) no line and status 141, files are whole or absent.

A script imports this file before torch, whose import takes a second: from then on Ctrl-C is one line.
"""
import contextlib
import errno
import json
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


if is_script(sys.argv[0]) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)


def guard(run, name=None):
    """Run a script's main function: bad input is one line and status 2, Ctrl-C is one line and status 130.

    Where the reader of its output has left, it ends without a word and with 141, the status of other programs then.
    """
    name = name or os.path.basename(sys.argv[0])
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            run()
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            what = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else error
            print(f"{name}: {what}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(f"\n{name}: interrupted; every finished step is kept and will be reused", file=sys.stderr)
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


@contextlib.contextmanager
def whole_file(path, mode="w"):
    """An open file that becomes `path` when the block ends, and nothing when it fails: a file is whole or not there.

    It is written under a temporary name beside `path` and renamed. mode: "w" for UTF-8 text, "wb" for bytes.
    Raises OSError with `path` as its filename, also where the system names no file (a full disk).
    """
    target = os.path.realpath(path)  # a link stays a link
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        if os.path.exists(target) and not os.path.isfile(target):  # renamed over a device, the device would be gone
            raise OSError(errno.EINVAL, "exists and is not a regular file", os.fspath(path))
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
        os.replace(temporary, target)
    except OSError as error:
        if error.filename in (None, temporary):
            raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from None
        raise
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_text(path, text):
    """Write a text file whole or not at all."""
    with whole_file(path) as f:
        f.write(text)


def read_json(path, kind=dict):
    """The value in a JSON file, of type `kind`. Raises ValueError, naming the file, for anything else."""
    if os.path.getsize(path) > 200_000_000:
        raise ValueError(f"{path}: {os.path.getsize(path)} bytes is no configuration")
    with open(path, encoding="utf-8") as f:
        try:
            value = json.load(f)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON ({type(error).__name__})") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: not a JSON {'object' if kind is dict else kind.__name__}")
    return value
