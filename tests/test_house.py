"""The promises of the house, checked on every file: four packages, no pickles, no downloads, quiet imports."""
import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
DEEPER = {path: path.relative_to(ROOT).parts[0] for path in sorted(ROOT.glob("*/**/*.py"))}
FILES = [*SCRIPTS, *(path for path, folder in DEEPER.items() if folder != "out" and not folder.startswith("."))]
PACKAGES = {"torch", "numpy", "tiktoken", "pytest"}
OURS = {path.stem for path in FILES} | {path.relative_to(ROOT).parts[0] for path in FILES} | {"golden"}
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in FILES}
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def name_of(node):
    """`a.b.c` of an attribute or name, "" for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(tree):
    """(line, module) of every import statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "."


def imported_by_name(tree):
    """(line, module) of every import through a function; "?" where the name is not a plain string."""
    functions = {"import_module", "__import__", "importorskip", "find_spec"}
    direct = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and name_of(node.func).split(".")[-1] in functions:
            direct.add(node.func)
            first = node.args[0] if node.args else None
            yield node.lineno, first.value if isinstance(first, ast.Constant) else "?"
    for node in ast.walk(tree):  # handed on, to `map` say, instead of being called
        if node not in direct and name_of(node).split(".")[-1] in functions:
            yield node.lineno, "?"


def calls(tree):
    return [(node.lineno, name_of(node.func)) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@every_file
def test_four_packages_and_no_more(path):
    """`pip install -r requirements.txt` is all there is to install.

    The makers of the golden files ask the reference packages, in an environment of their own: by name, they alone.
    """
    known = PACKAGES | OURS | set(sys.stdlib_module_names)
    found = list(imported(TREES[path]))
    if path.parent.name != "golden" and path.name != "test_house.py":  # whose probe imports each of our own files
        found += imported_by_name(TREES[path])
    assert [(line, name) for line, name in found if name.split(".")[0] not in known] == []


def test_the_import_check_sees_what_is_hidden():
    tree = ast.parse("import a.b, c\nfrom d import e\nfrom . import f\ndef g():\n  importlib.import_module('h')\n"
                     "  __import__('i')\n  pytest.importorskip(j)\n  map(importlib.import_module, 'k')\n")
    assert [name for _, name in imported(tree)] == ["a.b", "c", "d", "."]
    assert sorted(name for _, name in imported_by_name(tree)) == ["?", "?", "h", "i"]


def test_requirements_pin_those_packages():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("-")]
    assert {line.split("==")[0] for line in lines} == PACKAGES and all("==" in line for line in lines)


@every_file
def test_no_pickle_is_ever_loaded(path):
    """A checkpoint is data. torch.load, pickle and their relatives run what a file tells them to."""
    runs_code = {"pickle", "shelve", "dill", "marshal"}
    if path.parent == ROOT:
        assert [name for _, name in imported(TREES[path]) if name.split(".")[0] in runs_code] == []
    loaders = {"torch.load", "torch.jit.load", "torch.hub.load"}
    assert [(line, name) for line, name in calls(TREES[path]) if name in loaders] == []
    assert not any(node.arg == "allow_pickle" and getattr(node.value, "value", True) for node in ast.walk(TREES[path])
                   if isinstance(node, ast.keyword))
    taken = [alias.name for node in ast.walk(TREES[path]) if isinstance(node, ast.ImportFrom) and node.module == "torch"
             for alias in node.names]
    assert "load" not in taken


@every_file
def test_the_tokenizer_is_never_downloaded(path):
    """K4: tiktoken.get_encoding fetches its ranks over the network."""
    fetches = {"get_encoding", "encoding_for_model"}
    if path.parent == ROOT:
        fetches |= {"urlopen", "urlretrieve", "create_connection", "load_state_dict_from_url"}
    assert [(line, name) for line, name in calls(TREES[path]) if name.split(".")[-1] in fetches] == []


@every_file
def test_house_rules(path):
    """No exec, eval, bare except, star import, type=bool or lambda on a module; every file says what it is."""
    tree = TREES[path]
    assert ast.get_docstring(tree), "no module docstring"
    assert [(line, name) for line, name in calls(tree) if name in {"exec", "eval"}] == []
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"bare except in line {node.lineno}"
        assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == "*"), f"star import in {node.lineno}"
        assert not (isinstance(node, ast.keyword) and node.arg == "type" and name_of(node.value) == "bool"), "type=bool"
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            kept = any(name_of(target).startswith("self.") for target in node.targets)
            assert not kept, f"lambda kept on a module in line {node.lineno}"


CARD = ["model.py", "compress.py", "recover.py", "idp.py", "evaluate.py", "kernels.py"]
FLOORS = ["engine", "model", "kernels recover", "compress idp", "checkpoints", "world", "study", "evaluate", "real",
          "exercises"]  # who stands further down imports from those above only, or from its own folder
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names.split()}


def floor(path):
    """The floor of one of our files, by its folder or its name."""
    return FLOOR[path.relative_to(ROOT).parts[0].removesuffix(".py")]


def ours_imported(path):
    """(line, our file, whether inside `main`) of every import of ours, at the top or inside functions."""
    inside_main = {id(n) for f in TREES[path].body if isinstance(f, ast.FunctionDef) and f.name == "main"
                   for n in ast.walk(f)}
    for node in ast.walk(TREES[path]):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [] if not isinstance(
            node, ast.ImportFrom) or node.level else [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        for name in names:
            for file in (ROOT / (name.replace(".", "/") + ".py"), ROOT / name.replace(".", "/") / "__init__.py"):
                if file.exists():
                    yield node.lineno, file, id(node) in inside_main


PRODUCT = [path for path in FILES if path.relative_to(ROOT).parts[0].removesuffix(".py") in FLOOR]


def test_the_top_holds_the_card():
    """The six files of the card, and folders around them: `ls` shows the course."""
    assert sorted(path.name for path in SCRIPTS) == sorted(CARD)


def test_no_arrow_goes_up():
    """A file imports from lower floors only. The job of compress.py on files may name checkpoints inside its main."""
    up = [(str(path.relative_to(ROOT)), line, str(file.relative_to(ROOT))) for path in PRODUCT
          for line, file, in_main in ours_imported(path)
          if floor(file) > floor(path) and not (in_main and file.parts[-2] == "checkpoints")]
    assert up == []


def test_no_circle_of_imports():
    """Also not through imports inside functions."""
    arrows = {path: {file for _, file, _ in ours_imported(path)} - {path} for path in PRODUCT}
    for start in PRODUCT:
        seen, todo = set(), list(arrows[start])
        while todo:
            file = todo.pop()
            if file not in seen:
                seen.add(file)
                todo += arrows.get(file, ())
        assert start not in seen, f"{start.relative_to(ROOT)} imports itself through others"


@every_file
def test_no_line_is_wider_than_a_reader_has_room_for(path):
    """100 columns in the card files, 120 elsewhere."""
    limit = 100 if path.parent == ROOT else 120
    wide = [n for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > limit]
    assert wide == []


@pytest.mark.parametrize("card, most", [("model", 700), ("kernels", 1000), ("compress", 1800), ("idp", 1400)])
def test_a_card_file_brings_few_lines_with_it(card, most):
    """By the imports at the top of it and of what it imports, so that a reader can follow all of them."""
    brought, todo = set(), [ROOT / f"{card}.py"]
    while todo:
        file = todo.pop()
        if file not in brought:
            brought.add(file)
            top = {node.lineno for node in TREES[file].body}
            todo += [other for line, other, _ in ours_imported(file) if line in top]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in brought) <= most


PROBE = """
import contextlib, importlib, io, json, os, runpy, sys, traceback
what, results = sys.argv[1], {}
for path in sys.argv[2:]:
    out, code, error = io.StringIO(), None, ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            if what == "import":
                sys.argv = [path, "--no-such-option", "nonsense"]
                relative = os.path.relpath(path, os.environ["PYTHONPATH"])
                importlib.import_module(relative.removesuffix(".py").replace("/", "."))
            else:
                sys.argv = [path, "--help"]
                runpy.run_path(path, run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException:
            error = traceback.format_exc()
    results[path] = [out.getvalue(), code, error]
print(json.dumps(results))
"""


def probe(what, paths, tmp_path):
    """{path: [printed, exit status or None, traceback]}: one fresh process for all, so that torch is loaded once."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", PROBE, what, *map(str, paths)], capture_output=True, text=True,
                          cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []  # nothing was written either
    return json.loads(done.stdout)


def test_importing_prints_nothing_and_parses_nothing(tmp_path):
    modules = [path for path in FILES
               if path.name != "__main__.py" and path.parent.name not in ("tests", "golden", "facts")]
    for path, (printed, code, error) in probe("import", modules, tmp_path).items():
        assert (printed, code, error) == ("", None, ""), path


def test_every_script_has_a_help_that_shows_defaults(tmp_path):
    scripts = [path for path in SCRIPTS
               if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in TREES[path].body)]
    for path, (printed, code, error) in probe("help", scripts, tmp_path).items():
        assert error == "" and code == 0 and printed.startswith("usage:"), (path, printed, error)
        options = [line for line in printed.splitlines() if line.lstrip().startswith("--")]
        assert not options or "(default:" in printed, f"{path} hides its defaults"
