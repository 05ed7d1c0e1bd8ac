"""
Files: written whole or not at all; JSON that is read names its file where it is wrong.
"""
import contextlib
import errno
import json
import os


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
