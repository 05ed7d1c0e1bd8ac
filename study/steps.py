"""
Steps: each is done once, kept in the output folder, and reused while nothing it depends on has changed.

A step depends on its settings and on code. Beside every result `NAME` stands `NAME.made.json`: the settings, a digest of
each of our source files that the step's code imports, and a digest of the result's own bytes. A step whose settings, code
or bytes differ is made again. Comments and docstrings do not count as code.

What it leaves out: results of an earlier version of torch are reused only because `settings` of the first step name it.
"""
import ast
import functools
import hashlib
import json
import os
import pathlib
import sys
import time
from dataclasses import replace

from engine.safetensors import read_safetensors, write_safetensors
from engine.script import read_json, write_text

ROOT = pathlib.Path(__file__).resolve().parent.parent
MARK = ".made.json"


class Run:
    """What the steps of one study share: settings, world, output folder, progress; and each step is done once.

    config  study.settings.StudyConfig
    world   where facts and text come from: world.small.World or real.world.RealWorld
    """

    def __init__(self, config, world, log=None):
        self.config, self.world, self.log, self.out = config, world, log or Log(), config.out
        os.makedirs(self.out, exist_ok=True)

    def draw(self, repeat):
        """The same run with compression data, repair text and the start of every repair drawn for the nth time."""
        return Run(replace(self.config, repeat=repeat), self.world, self.log)

    def path(self, name):
        """Where the result called `name` is kept."""
        return os.path.join(self.out, name)

    def once(self, name, settings, code, make, write, read):
        """`make()`, written by `write(result, path)`; or `read(path)` where it was made before with the same settings and
        code. `code` names the modules whose source, imports included, the result depends on.
        """
        path, began = self.path(name), time.time()
        mark = {"settings": json.loads(json.dumps(settings)), "code": sources(*code)}
        reused = read_mark(path) == {**mark, "bytes": digest_of(path)}
        if reused:
            result = read(path)
        else:
            if os.path.exists(path + MARK):
                os.remove(path + MARK)
            result = make()
            write(result, path)
            write_text(path + MARK, json.dumps({**mark, "bytes": digest_of(path)}))
        self.log.done(name, time.time() - began, reused)
        return result

    def once_json(self, name, settings, code, make):
        """A step whose result is kept as JSON."""
        return self.once(name + ".json", settings, code, make, lambda result, path: write_text(path, json.dumps(result)),
                         lambda path: read_json(path, object))

    def once_tensors(self, name, settings, code, make):
        """A step whose result is {name: tensor}."""
        return self.once(name + ".safetensors", settings, code, make,
                         lambda tensors, path: write_safetensors(path, tensors), lambda path: read_safetensors(path)[0])

    def describe_reuse(self):
        """Say how many steps of an earlier run stand in the folder, and which changed files make others run again."""
        marks = [read_mark(str(p)[:-len(MARK)]) for p in sorted(pathlib.Path(self.out).glob("*" + MARK))]
        marks = [mark for mark in marks if mark]
        changed = [{f for f, digest in mark["code"].items() if source_digest(f) != digest} for mark in marks]
        if marks:
            files = sorted(set().union(*changed))
            self.log.say(f"{self.out}: {len(marks)} finished steps; {sum(not c for c in changed)} are reused where their "
                         "settings are the same" + (f"; the others are made again, because of changes in "
                                                    f"{', '.join(files)}" if files else ""))


def read_mark(path):
    """What stands beside a finished step; None where it is missing or damaged."""
    try:
        with open(path + MARK, encoding="utf-8") as f:
            mark = json.load(f)
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) and isinstance(mark.get("code"), dict) else None


def digest_of(path):
    """sha256 of a file's bytes, or of all files of a folder; None where there is nothing."""
    if not os.path.exists(path):
        return None
    files = [pathlib.Path(path)] if os.path.isfile(path) else sorted(pathlib.Path(path).iterdir())
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()[:16]


def digest(what):
    """A short fingerprint of a value, or of a file's bytes."""
    return hashlib.sha256(what if isinstance(what, bytes) else repr(what).encode()).hexdigest()[:16]


# ---- code: which of our files a module reads, and what they say

def sources(*modules):
    """{file: digest} of these modules of ours ("recover", "world.score") and of all of ours that they import."""
    todo, found = [file_of(name) for name in modules], {}
    while todo:
        file = todo.pop()
        if file not in found:
            found[file] = source_digest(file)
            todo += imports_of(file)
    return dict(sorted(found.items()))


def file_of(module):
    """The file of one of our modules, relative to the project; None for a module of others."""
    path = module.replace(".", "/")
    return next((p for p in (path + ".py", path + "/__init__.py") if (ROOT / p).exists()), None)


@functools.cache
def imports_of(file):
    """Our files that a file imports at its top."""
    found = []
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found += [file_of(alias.name) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            found += [file_of(node.module)] + [file_of(f"{node.module}.{alias.name}") for alias in node.names]
    return [f for f in found if f]


@functools.cache
def source_digest(file):
    """A fingerprint of a file's code without comments and docstrings; None where the file is gone."""
    if not (ROOT / file).exists():
        return None
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return digest(ast.dump(tree).encode())


def slug(tag):
    """A tag as a file name: "GPTQ 3 bits" -> "gptq-3-bits"."""
    return "-".join("".join(c if c.isalnum() else " " for c in tag.lower()).split())


# ---- progress

class Log:
    """Progress to stderr: which step of how many, and how long all the others will take."""

    def __init__(self):
        self.times, self.began, self.shown, self.expected = [], time.time(), 0.0, {}

    def expect(self, seconds):
        """Announce all steps: {name: seconds it takes on an ordinary laptop}."""
        self.expected = dict(seconds)

    def left(self, name=None, share=0.0):
        """Seconds left of what was announced, at the pace of what has been done; `name` is done to `share`."""
        done = {t["step"]: t["seconds"] for t in self.times}
        fresh = [t["step"] for t in self.times if not t["reused"]]
        took = sum(done[step] for step in fresh)
        thought = sum(self.expected.get(step, 0.0) for step in fresh)
        pace = took / thought if thought > 5 else 1.0
        return pace * sum(seconds * (1 - share if step == name else 1) for step, seconds in self.expected.items()
                          if step not in done)

    def say(self, text):
        """One line."""
        print(text, file=sys.stderr, flush=True)

    def done(self, name, seconds, reused):
        """Note that a step is over, and say so where it was made."""
        step = name.removesuffix(".json").removesuffix(".safetensors")
        self.times.append({"step": step, "seconds": seconds, "reused": reused})
        if not reused and (seconds > 1 or self.expected.get(step, 0) > 1):
            number = f"step {len(self.times)} of {max(len(self.expected), len(self.times))}" if self.expected else "done"
            self.say(f"{number}: {step}, {seconds:.0f} s; {duration(self.left())} left")

    def progress(self, label, steps, what="loss"):
        """A callback (step, loss or `what` else) that shows how far `label` is and how long all will take."""
        began = time.time()

        def show(step, loss):
            """A line, if the last was long ago."""
            now = time.time()
            screen = sys.stderr.isatty()
            if step + 1 < steps and now - self.shown < (0.5 if screen else 15):
                return
            self.shown = now
            left = self.left(label, (step + 1) / steps) if label in self.expected else \
                (now - began) / (step + 1) * (steps - step - 1)
            line = f"  {label}: {step + 1} of {steps}, {what} {loss:.4g}; {duration(left)} left"
            print("\r" + line.ljust(78) if screen else line, end="" if screen else "\n", file=sys.stderr, flush=True)
        return show


def duration(seconds):
    """Seconds in words: 45 s, 3 min."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
