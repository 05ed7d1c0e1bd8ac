"""
Steps: each is done once, kept in the output folder, and reused while nothing it depends on has changed.

A step depends on its settings and on code. Beside every result `NAME` stands `NAME.made.json`: the settings, a digest
of each of our source files that the step's code or its world imports, and a digest of the result's own bytes. A step
whose settings, code or bytes differ is made again; what is made from a result has that result's digest in its settings
(`with_result`). Comments and docstrings do not count as code.

Several processes may work in one folder (a study's second process, sweeps under torchrun, jobs in two terminals):
each step has a lock, so whoever wants a step that another process is making waits for it, then reuses it. Two whole
studies in one folder would overwrite each other's tables: the second is refused (`alone`). A process that ends, in
whatever way, gives its locks back.

What it leaves out: locks where the system has none (Windows). The version of torch is part of the first step's
`settings`: results of another version are made again.
"""
import ast
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
import time
import warnings
import zlib
from dataclasses import replace

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from engine.files import read_json, write_text
from engine.memory import keep_memory

ROOT = pathlib.Path(__file__).resolve().parent.parent
MARK = ".made.json"
LAYERS = ".layers.json"  # behind the name of a compressed model: its report, a part of the result
LOCK = ".lock"  # an empty file in the output folder; a lock is a lock of one byte of it


class Run:
    """What the steps of one study share: settings, world, output folder, progress; and each step is done once.

    config  study.settings.StudyConfig
    world   where facts and text come from: world.small.World or real.world.RealWorld
    """

    def __init__(self, config, world, log=None):
        self.config, self.world, self.log, self.out = config, world, log or Log(), config.out
        os.makedirs(self.out, exist_ok=True)
        keep_memory()

    def draw(self, repeat):
        """The same run with all that is random but the world drawn for the nth time."""
        return Run(replace(self.config, repeat=repeat), self.world, self.log)

    def only(self, compressions, repairs):
        """The same run with these compressions and these repairs of them, in this order."""
        config = self.config
        return Run(replace(config, compressions={tag: config.compressions[tag] for tag in compressions},
                           repairs={tag: config.repairs[tag] for tag in repairs}), self.world, self.log)

    def path(self, name):
        """Where the result called `name` is kept."""
        return os.path.join(self.out, name)

    def alone(self):
        """Keep other studies out of the output folder until this process ends; ValueError where one is at work."""
        if not take(self.out, 0, wait=False):
            raise ValueError(f"{self.out}: another study is at work in this folder; "
                             "wait for it, or name another one with --out")

    @contextlib.contextmanager
    def holding(self, name):
        """While open no other process holds the same name in this output folder."""
        byte = 1 + zlib.crc32(name.encode())
        if not take(self.out, byte, wait=False):
            self.log.say(f"{name}: waiting for another process, which is making it")
            take(self.out, byte, wait=True)
        try:
            yield
        finally:
            give_back(self.out, byte)

    def once(self, name, settings, code, make, write, read):
        """`make()`, written by `write(result, path)`; or `read(path)` where it was made before with the same settings
        and code. `code` names the modules whose source, imports included, the result depends on, beside the world's.
        """
        path, began, world = self.path(name), time.time(), type(self.world).__module__
        modules = [*code, world] if file_of(world) else code
        mark = {"settings": json.loads(json.dumps(settings)), "code": sources(*modules)}
        with self.holding(name):
            kept = read_mark(path) or {}
            reused = all(kept.get(key) == part for key, part in {**mark, "bytes": digest_of(path)}.items())
            if reused:
                result = read(path)
                for text in kept.get("warned", ()):  # a training that ended early did so in this result, too
                    self.log.say(f"{file_name(name)}: {text}")
            else:
                self.log.begin(file_name(name))
                with heard() as warned:
                    result = make()
                write(result, path)
                took = round(time.time() - began, 2)
                write_text(path + MARK, json.dumps({**mark, "bytes": digest_of(path), "seconds": took,
                                                    **({"warned": warned} if warned else {})}))
        self.log.done(file_name(name), time.time() - began, reused)
        return result

    def once_json(self, name, settings, code, make):
        """A step whose result is kept as JSON."""
        return self.once(name + ".json", settings, code, make,
                         lambda result, path: write_text(path, json.dumps(result)),
                         lambda path: read_json(path, object))

    def expect(self, plan):
        """Announce the study's steps, {step: {file: typical seconds}} of study/progress.py. A file that stands in the
        folder and whose code has not changed will be reused; one that is made again took so long before.
        """
        kept = {file_name(name): mark for name, mark in self.marks().items()}
        plan = {step: dict(files) for step, files in plan.items()}
        for files in plan.values():
            for file in [file for file in files if file in kept]:
                files[file] = 0.0 if unchanged(kept[file]) else kept[file].get("seconds", files[file])
        self.log.expect(plan, lambda file: any(
            os.path.exists(mark) and os.path.getmtime(mark) > self.log.began
            for mark in (self.path(file + ending + MARK) for ending in ("", ".json", ".safetensors"))))

    def marks(self):
        """{name of a result: what stands beside it} of every finished step in the folder."""
        names = [p.name.removesuffix(MARK) for p in sorted(pathlib.Path(self.out).glob("*" + MARK))]
        found = {name: read_mark(self.path(name)) for name in names if os.path.exists(self.path(name))}
        return {name: mark for name, mark in found.items() if mark}

    def describe_reuse(self):
        """Say how many steps of an earlier run stand in the folder, and which changed files make others run again."""
        marks = list(self.marks().values())
        changed = [{f for f, digest in mark["code"].items() if source_digest(f) != digest} for mark in marks]
        if marks:
            files = sorted(set().union(*changed))
            self.log.say(f"{self.out}: {len(marks)} finished steps; {sum(not c for c in changed)} are reused where "
                         "their settings are the same" + (f"; the others are made again, because of changes in "
                                                          f"{', '.join(files)}" if files else ""))


@contextlib.contextmanager
def heard():
    """While open every UserWarning is shown and noted -> the list of their texts."""
    texts = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)  # the same text may be about another result
        shown = warnings.showwarning

        def show(message, category, *where, **more):
            if category is UserWarning:
                texts.append(str(message))
            shown(message, category, *where, **more)
        warnings.showwarning = show
        yield texts


def read_mark(path):
    """What stands beside a finished step; None where it is missing or damaged."""
    try:
        with open(path + MARK, encoding="utf-8") as f:
            mark = json.load(f)
        good = (all(file.endswith(".py") for file in mark["code"]) and mark.get("seconds", 0) >= 0
                and isinstance(mark.get("warned", []), list))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    return mark if good else None


def unchanged(mark):
    """Whether the code of a finished step is still what it was."""
    return all(source_digest(file) == digest for file, digest in mark["code"].items())


def file_name(name):
    """The name of a step's result without its ending."""
    return name.removesuffix(".json").removesuffix(".safetensors")


def digest_of(path):
    """sha256 of a file's bytes, its report's included, or of the files in a folder, what lies deeper aside; None where
    there is nothing."""
    if not os.path.exists(path):
        return None
    if os.path.isdir(path):
        files = sorted(file for file in pathlib.Path(path).iterdir() if file.is_file())
    else:
        files = [file for file in (path, f"{path}{LAYERS}") if os.path.exists(file)]
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()[:16]


def with_result(settings, path):
    """The settings of whatever is made from the result at `path`: its own, and which result it is."""
    return {**settings, "from": {**settings.get("from", {}), os.path.basename(path): digest_of(path)}}


def digest(what):
    """A short fingerprint of a value."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


# ---- locks: between processes, not within one

@functools.cache
def lock_file(folder):
    """The folder's lock file, open until this process ends: closing it would give back every lock in it."""
    return open(os.path.join(folder, LOCK), "ab")


def take(folder, byte, wait):
    """Lock one byte; False where another process holds it and we do not `wait`. True, too, where there are no locks."""
    file = lock_file(os.path.realpath(folder))
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # some network disks have none
            raise
    return True


def give_back(folder, byte):
    """Unlock one byte."""
    if fcntl:
        with contextlib.suppress(OSError):
            fcntl.lockf(lock_file(os.path.realpath(folder)), fcntl.LOCK_UN, 1, byte)


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
    """Our files that a file imports, at its top or in a function other than `main`, which is a script's."""
    found, tree = [], ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for node in (inner for top in tree.body if getattr(top, "name", "") != "main" for inner in ast.walk(top)):
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
    return digest(ast.dump(tree))


def slug(tag):
    """A tag as a file name: "GPTQ 3 bits" -> "gptq-3-bits"."""
    return "-".join("".join(c if c.isalnum() else " " for c in tag.lower()).split())


# ---- progress

class Log:
    """Progress on stderr: which step of how many, the time left and the time that all of them take."""

    def __init__(self):
        self.began = self.shown = time.time()
        self.times = []       # [{step, seconds, reused}] of every file that is finished
        self.plan = {}        # {step: {file: seconds that making it is expected to take}}
        self.elsewhere = None  # whether another process has made a file meanwhile, file -> bool
        self.hands = 1        # processes that make what is announced
        self.at = ""          # the step that was shown last
        self.under_way = []   # [[file, when it began, the share that is done]], the innermost last
        self.took = self.thought = 0.0  # seconds that the files made so far took, and were expected to take
        self.width = 0        # of what stands in the terminal's last line and is to be written over

    def expect(self, plan, elsewhere=None):
        """Announce all steps: {step: {file: seconds}}; what is under "" belongs to no file, and is between and after.

        elsewhere  file -> whether another process has made it meanwhile
        """
        self.plan, self.elsewhere = plan, elsewhere or (lambda file: False)

    def left(self):
        """Seconds left of what was announced, at the pace of what has been made; at least 1 while anything is left."""
        now = time.time()
        under_way = {file: (now - began, share) for file, began, share in self.under_way}
        seconds = {file: s for files in self.plan.values() for file, s in files.items()}
        done, took, thought = {t["step"] for t in self.times}, self.took, self.thought
        for file, (elapsed, share) in under_way.items():
            if share * seconds.get(file, 0.0) > 0:
                took, thought = took + elapsed, thought + share * seconds[file]
        pace, left = (10 + took) / (10 + thought), 0.0  # 10: the first second decides nothing
        for file, s in seconds.items():
            if file in under_way:
                elapsed, share = under_way[file]
                left += elapsed * (1 - share) / share if share > 0.1 else max(pace * s - elapsed, 0.1 * elapsed)
            elif file == "":
                inside = sum(t["seconds"] for t in self.times) + sum(elapsed for elapsed, _ in under_way.values())
                left += max(pace * s - (now - self.began - inside), 0.0)
            elif s and file not in done and not self.elsewhere(file):
                left += pace * s / self.hands
        return max(left, 1.0)

    def where(self):
        """"step 7 of 49, 31 s left of about 5 min"; "" where nothing was announced."""
        if not self.plan:
            return ""
        files = [file for file, _, _ in self.under_way]
        self.at = next((step for step, of in self.plan.items() if set(files) & set(of)), self.at)
        left, steps = self.left(), [step for step in self.plan if step]
        number = f"step {steps.index(self.at) + 1} of {len(steps)}, " if self.at in steps else ""
        return f"{number}{duration(left)} left of about {duration(time.time() - self.began + left)}"

    def say(self, text):
        """One line."""
        self.write(text, "\n")

    def show(self, text):
        """One line that says how far all is: in a terminal the next one is written over it."""
        self.shown = time.time()
        self.write(text, "" if sys.stderr.isatty() else "\n")

    def write(self, text, end):
        """A line over what stands in the terminal's last one."""
        if sys.stderr.isatty() and not end:  # a longer line would take two rows, of which one is written over
            text = text[:shutil.get_terminal_size().columns - 1]
        over = "\r" + text.ljust(self.width) if sys.stderr.isatty() else text
        print(over, end=end, file=sys.stderr, flush=True)
        self.width = 0 if end else len(text)

    def begin(self, name):
        """A file is about to be made; a line for the first of a step, in a terminal for each."""
        before = self.at
        self.under_way.append([name, time.time(), 0.0])
        where = self.where()
        if where and (self.at != before or sys.stderr.isatty()):
            self.show(f"{where}: {self.at}")

    def done(self, name, seconds, reused):
        """Note that a file is finished; a line where nothing was announced and it took long."""
        self.times.append({"step": name, "seconds": seconds, "reused": reused})
        if reused:
            return
        self.under_way.pop()
        thought = next((files[name] for files in self.plan.values() if name in files), 0.0)
        if thought:
            self.took, self.thought = self.took + seconds, self.thought + thought
        if not self.plan and seconds > 1:
            self.say(f"{name}: {seconds:.0f} s")

    def progress(self, label, steps, what="loss"):
        """A callback (step, loss or `what` else) that shows how far `label` is and how long all will take."""
        began = time.time()

        def show(step, loss):
            """A line, if the last was long ago."""
            now, share = time.time(), (step + 1) / steps
            if self.under_way:
                self.under_way[-1][2] = share
            if now - self.shown < (0.5 if sys.stderr.isatty() else 15):
                return
            where = self.where() or f"{duration((now - began) / share * (1 - share))} left"
            self.show(f"{where}: {self.at or label}, {step + 1} of {steps}, {what} {loss:.4g}")
        return show


def duration(seconds):
    """Seconds in words: 45 s, 3 min, 2 h 5 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{math.ceil(seconds)} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
