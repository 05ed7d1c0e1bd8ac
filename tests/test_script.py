"""engine/script.py, engine/files.py: bad input in one line; files whole or not there, also on a full disk; JSON."""
import contextlib
import errno
import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest
import torch

import evaluate
import model
from checkpoints import save
from checkpoints.adapters import save_adapter
from checkpoints.vocabulary import save_ranks
from engine.safetensors import write_safetensors
from engine.files import read_json, whole_file, write_text
from engine.script import guard, leave
from model import GPT, GPTConfig
from world import facts, items

MODEL = GPT(GPTConfig(vocab_size=300, context=16, n_layer=1, n_head=2, n_embd=8))
WRITERS = {  # everything in this project that writes a file, but for pages and results, which use write_text
    "text": lambda folder: write_text(folder / "out", "x" * 5000),
    "tensors": lambda folder: write_safetensors(folder / "out", {"a": torch.zeros(2000)}),
    "model": lambda folder: save(MODEL, folder / "out"),
    "adapter": lambda folder: save_adapter(folder, MODEL, "prompt", torch.zeros(12, 8)),
    "ranks": lambda folder: save_ranks({bytes([a, b]): 256 * a + b for a in range(4) for b in range(256)},
                                       folder / "out"),
}


@contextlib.contextmanager
def room(size):
    """Files of this process can grow to `size` bytes: the nearest thing to a full disk that needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_leaves_nothing_and_keeps_what_was_there(name, tmp_path):
    write = WRITERS[name]
    for old in (False, True):
        if old:
            write(tmp_path)
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        longest = max(map(len, before.values()), default=200)
        for size in range(100, longest, max(1, longest // 20)):  # also where only the first of two files has room
            with room(size), pytest.raises(OSError) as error:
                write(tmp_path)
            assert os.path.dirname(error.value.filename) == str(tmp_path) and ".tmp" not in str(error.value)
            assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    write(tmp_path)  # the next try goes on


@pytest.mark.parametrize("name", WRITERS)
def test_a_small_disk_that_is_full(name, tmp_path):
    """The same on a file system of 64 KiB, where this process may make one."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True)
    if made.returncode:
        pytest.skip("no right to mount")
    try:
        (tmp_path / "ballast").write_bytes(bytes(60 * 1024))
        with pytest.raises(OSError) as error:
            WRITERS[name](tmp_path)
        assert error.value.errno == errno.ENOSPC and error.value.filename.startswith(str(tmp_path) + "/")
        assert os.listdir(tmp_path) == ["ballast"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(RuntimeError), whole_file(path) as f:
        f.write("half")
        f.flush()
        assert not path.exists()
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with whole_file(path, "wb") as f:
        f.write(b"\xff")
    assert path.read_bytes() == b"\xff" and os.listdir(tmp_path) == ["out"]
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()


def test_errors_name_the_file_that_was_asked_for(tmp_path):
    for path, kind in ((tmp_path / "nowhere" / "out", FileNotFoundError), (tmp_path, OSError)):
        with pytest.raises(kind) as error:
            write_text(path, "x")
        assert error.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as error, whole_file(tmp_path / "out") as f:  # an error of another file
        f.write(open(tmp_path / "other").read())
    assert error.value.filename == str(tmp_path / "other")


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "x"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        write_text(tmp_path / "pipe", "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "pipe"]


def test_json_that_is_not_names_its_file(tmp_path):
    path = tmp_path / "a.json"
    for raw, said in ((b"", "not JSON"), (b'{"a": ', "not JSON"), (b"\xff\xfe", "not JSON"),
                      (b"[" * 100000, "not JSON"), (b"[1]", "not a JSON object"), (b"null", "not a JSON object")):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=f"a.json: {said}"):
            read_json(path)
    assert read_json(path.with_name(path.name), type(None)) is None
    path.write_text("[1]")
    assert read_json(path, list) == [1]


@pytest.mark.parametrize("error, line", [
    (ValueError("bits must be 2"), "x.py: bits must be 2\n"),
    (OSError(errno.ENOSPC, "No space left on device", "out/a"), "x.py: out/a: No space left on device\n"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "b"), "x.py: b: No such file or directory\n"),
    (OverflowError("too large"), "x.py: too large\n"), (MemoryError(), "x.py: out of memory\n"),
    (ValueError("one\nand frames of C++"), "x.py: one\n")])
def test_bad_input_is_one_line_and_status_2(error, line, capsys):
    def run():
        raise error
    with pytest.raises(SystemExit) as stop:
        guard(run, "x.py")
    assert stop.value.code == 2 and capsys.readouterr() == ("", line)


@pytest.mark.parametrize("module, arguments, said", [
    (model, ["--steps", "0"], "--steps must be at least 1, got 0"),
    (evaluate, ["--seeds", "0"], "--seeds must be from 1 to 1000"),
    (evaluate, ["--seeds", "1001"], "--seeds must be from 1 to 1000"),
    (facts, ["--show", "-1"], "--show must be at least 0, got -1"),
    (items, ["--show", "-3"], "--show must be at least 0, got -3")])
def test_a_number_out_of_range_is_refused_before_anything_is_made(module, arguments, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(ValueError, match=said):
        module.main()


@pytest.mark.parametrize("closed, taken", [(">&-", ""), ("2>&-", "Dᵀ\n"), ("", "D?\n")])
def test_streams_that_are_closed_or_cannot_hold_a_letter(closed, taken):
    code = ("from engine.script import guard; import sys\n"
            "guard(lambda: (print('D\u1d40'), print('e', file=sys.stderr)), 'x')")
    coding = "utf-8" if closed else "ascii"
    done = subprocess.run(["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code], cwd=HERE, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": coding})
    assert (done.returncode, done.stdout.decode()) == (0, taken), done.stderr


# ---- output that nobody takes

HERE = pathlib.Path(__file__).resolve().parent.parent
PRINTER = """
import argparse, sys
sys.path.insert(0, {root!r})
from engine.script import guard
def main():
    if sys.argv[1] == "help":
        argparse.ArgumentParser().parse_args(["--help"])
    print("x" * (100_000 if "much" in sys.argv[1] else 10))
    if "error" in sys.argv[1]:
        raise ValueError("bits must be 2")
    if "progress" in sys.argv[1]:
        print("step 1", file=sys.stderr)
guard(main, "x.py")
"""


def printed(into, what, both=False):
    """(status, stderr) of a script that prints into an open file, or its error into it as well."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", PRINTER.format(root=str(HERE)), what], stdout=into, text=True,
                          stderr=into if both else subprocess.PIPE, env=environment)
    return done.returncode, done.stderr or ""


@pytest.fixture
def left():
    """A pipe whose reader has left."""
    reads, writes = os.pipe()
    os.close(reads)
    yield writes
    os.close(writes)


@pytest.mark.parametrize("what, said", [("little", ""), ("much", ""), ("help", ""), ("progress", "step 1\n"),
                                        ("error", "x.py: bits must be 2\n"), ("much, then error", "")])
def test_a_reader_that_has_left_ends_a_script_without_a_word(left, what, said):
    """As `python recover.py | head -1` ends it: 141 is the status of programs that the signal SIGPIPE ends."""
    assert printed(left, what) == (141, said)
    assert printed(left, what, both=True) == (141, "")


@pytest.mark.parametrize("what, said", [("little", "x.py: standard output: No space left on device\n"),
                                        ("much", "x.py: [Errno 28] No space left on device\n"),
                                        ("error", "x.py: bits must be 2\n")])
def test_a_full_disk_behind_the_output_is_one_line(what, said):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        assert printed(full, what) == (2, said)


def test_every_script_is_guarded():
    """All of it, the list of jobs and the reading of options included: the last line of each calls `guard`."""
    ours = [p.relative_to(HERE) for p in sorted(HERE.rglob("*.py"))]
    ours = [p for p in ours if not {"tests", "facts"} & {*p.parts} and p.parts[0] != "out" and p.parts[0][0] != "."]
    text = {str(p): (HERE / p).read_text(encoding="utf-8").rstrip() for p in ours}
    last = {name: lines.splitlines()[-1].strip() for name, lines in text.items() if "__main__" in lines}
    assert len(last) >= 14 and [name for name, line in last.items() if not line.startswith("guard(main")] == []


# ---- Ctrl-C

SCRIPTS = [["model.py"], ["compress.py"], ["kernels.py"], ["recover.py"], ["idp.py"], ["evaluate.py"], ["-m", "study"],
           ["-m", "real", "x"], ["-m", "checkpoints", "x"], ["-m", "world.facts"], ["-m", "world.items"]]


@pytest.mark.parametrize("script", SCRIPTS, ids=" ".join)
def test_ctrl_c_while_torch_is_imported_is_one_line(script, tmp_path):
    """Torch is a file that says when it is imported, and then takes its time: in short sleeps, since a signal just
    before a sleep is seen behind it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\n"
                                      "for _ in range(600):\n    time.sleep(0.1)\n")
    run = subprocess.Popen([sys.executable, *script], cwd=HERE, env={**os.environ, "PYTHONPATH": str(tmp_path)},
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    assert run.stdout.readline() == "importing\n"
    run.send_signal(signal.SIGINT)
    out, said = run.communicate(timeout=30)
    assert (out, said, run.returncode) == ("", "\ninterrupted before anything was begun\n", 130)


def test_only_a_script_of_ours_changes_what_ctrl_c_does(tmp_path):
    """Whoever imports a file of ours elsewhere, or in Python's own prompt, keeps KeyboardInterrupt."""
    ask = "import signal; from engine.script import leave; print(signal.getsignal(signal.SIGINT) is leave)"
    (tmp_path / "theirs.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r}); {ask}")
    for given, text in ((["-c", ask], None), ([str(tmp_path / "theirs.py")], None), (["-"], ask)):
        done = subprocess.run([sys.executable, *given], cwd=HERE, input=text, check=True,
                              capture_output=True, text=True)
        assert done.stdout == "False\n", given


def test_ctrl_c_while_a_script_runs_is_one_line(monkeypatch, capsys):
    before = signal.signal(signal.SIGINT, leave)
    try:
        with pytest.raises(SystemExit) as stop:
            guard(lambda: os.kill(os.getpid(), signal.SIGINT), "x.py")
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130 and capsys.readouterr().err.startswith("\nx.py: interrupted; what a study")


@pytest.mark.parametrize("name", ["make_countries", "make_cities"])
def test_scripts_that_write_facts_have_a_help_that_writes_nothing(name):
    facts = HERE / "real" / "facts"
    before = {p.name: p.stat().st_mtime_ns for p in facts.iterdir() if p.is_file()}
    done = subprocess.run([sys.executable, facts / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {name}.py")
    assert {p.name: p.stat().st_mtime_ns for p in facts.iterdir() if p.is_file()} == before
