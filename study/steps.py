"""
Steps: each is done once, kept in the output folder beside the settings it was made with, and reused while those match.
"""
import hashlib
import json
import os
import sys
import time

from engine.script import write_text


class Log:
    """Progress to stderr, and what each step took."""

    def __init__(self):
        self.times, self.began, self.shown = [], time.time(), 0.0

    def say(self, text):
        print(text, file=sys.stderr, flush=True)

    def progress(self, label, steps, what="loss"):
        """A callback (step, loss or `what` else) that shows how far `label` is and how long it will take."""
        began = time.time()

        def show(step, loss):
            """A line, if the last was long ago or this step is the last."""
            nonlocal began
            now, last = time.time(), step + 1 == steps
            began = now if step == 0 else began  # a pool goes from 1 to `steps` once a prompt
            if not last and now - self.shown < (0.5 if sys.stderr.isatty() else 15):
                return
            self.shown = now
            left = (now - began) / max(1, step) * (steps - step - 1)
            line = f"  {label}: step {step + 1} of {steps}, {what} {loss:.4g}, {left:.0f} s left"
            screen = sys.stderr.isatty()
            print("\r" + line.ljust(78) if screen else line, end="\n" if last or not screen else "", file=sys.stderr,
                  flush=True)
        return show


def step(log, path, settings, make, write, read):
    """`make()` and `write(result, path)`, unless `path` was made with the same settings: then `read(path)`.

    The settings stand beside the result in `path`.json, written after it: what was interrupted is made again.
    """
    mark, began = path + ".settings.json", time.time()
    settings = json.loads(json.dumps(settings))
    if os.path.exists(path) and os.path.exists(mark):
        with open(mark) as f:
            if json.load(f) == settings:
                result = read(path)
                log.times.append({"step": os.path.basename(path), "seconds": time.time() - began, "reused": True})
                return result
    if os.path.exists(mark):
        os.remove(mark)
    result = make()
    write(result, path)
    write_text(mark, json.dumps(settings))
    log.times.append({"step": os.path.basename(path), "seconds": time.time() - began, "reused": False})
    log.say(f"{os.path.basename(path)}: {time.time() - began:.1f} s")
    return result


def read_json(path):
    with open(path) as f:
        return json.load(f)


def json_step(log, path, settings, make):
    """A `step` whose result is kept as JSON."""
    return step(log, path, settings, make, lambda result, path: write_text(path, json.dumps(result)), read_json)


def slug(tag):
    """A tag as a file name: "GPTQ 3 bits" -> "gptq-3-bits"."""
    return "-".join("".join(c if c.isalnum() else " " for c in tag.lower()).split())


def digest(what):
    """A short fingerprint of facts or of a file's bytes: what a finished step is compared by."""
    return hashlib.sha256(what if isinstance(what, bytes) else repr(what).encode()).hexdigest()[:16]
