"""
The edge of every script: bad input is one line and status 2, Ctrl-C one line and status 130, files are whole or absent.
"""
import os
import sys


def guard(run, name=None):
    """Run a script's main function: bad input is one line and status 2, Ctrl-C is one line and status 130."""
    name = name or os.path.basename(sys.argv[0])
    try:
        run()
    except (ValueError, OSError) as error:
        what = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else error
        print(f"{name}: {what}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; every finished step is kept and will be reused", file=sys.stderr)
        sys.exit(130)


def write_text(path, text):
    """Write a text file whole or not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(temporary, path)
