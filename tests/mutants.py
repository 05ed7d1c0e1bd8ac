"""
Whether the tests would notice a mistake: each entry of mutants.json is one edit of the project's code, and the tests
that it names must fail on a copy of the project with that edit. An edit that they pass, they do not test.

    python tests/mutants.py                     # all of them, about 20 s each
    python tests/mutants.py idp recover         # those of the files whose names hold one of these words
    python tests/mutants.py 3 17                # those of these numbers

An entry: file, old text (it stands there once), new text, the mistake in words, the tests, and which list it is from.
Lists of thirty were written, and committed, before any of theirs was run; of those in "own", "second", "third",
"sixth", "seventh", "ninth" and "tenth" no test had been read before, of "eighth" a few. At first 24, 24, 25, 26, 27,
22, 24, 26, 22 and 30 died of "own", "second", ... "tenth" (of one survivor of "sixth" and of "ninth" another file's
tests were aware). Each of the others has led to a test that it fails. Those of "later" came with the code they edit.
The compressors have a list of their own, golden/mutants_compress.json (test_golden_compress.py).
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
MUTANTS = json.loads((ROOT / "tests" / "mutants.json").read_text(encoding="utf-8"))


def copied(folder):
    """A copy of the project in `folder`, without what it has computed."""
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                             check=True).stdout.splitlines()
    for name in filter(os.path.exists, (os.path.join(ROOT, n) for n in tracked)):
        target = pathlib.Path(folder, os.path.relpath(name, ROOT))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, target)


def notice(mutant, folder):
    """The name of the first test that fails on the copy in `folder` with one edit; None where all pass."""
    path = pathlib.Path(folder, mutant["file"])
    right = path.read_text(encoding="utf-8")
    if right.count(mutant["old"]) != 1:
        raise ValueError(f"{mutant['file']}: {mutant['old']!r} stands there {right.count(mutant['old'])} times")
    path.write_text(right.replace(mutant["old"], mutant["new"]), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant["test"].split()]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    finally:
        path.write_text(right, encoding="utf-8")
    failed = [line.split(" - ")[0] for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return None if ran.returncode == 0 else (failed or ["it does not run"])[0]


def main(words):
    """A line for each mutant that `words` choose; the exit status is 1 where one lives."""
    lived = 0
    with tempfile.TemporaryDirectory() as folder:
        copied(folder)
        for number, mutant in enumerate(MUTANTS, 1):
            if words and str(number) not in words and not any(w in mutant["file"] for w in words if not w.isdigit()):
                continue
            began, killer = time.time(), notice(mutant, folder)
            lived += killer is None
            print(f"{number:2d} {'LIVES' if killer is None else 'dies ':5s} {time.time() - began:4.0f} s  "
                  f"{mutant['file']}: {mutant['mistake']}: {killer or 'all of ' + mutant['test'] + ' pass'}",
                  flush=True)
    print(f"{lived} live")
    sys.exit(1 if lived else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
