"""
One line of the project changed: what the tests of mistakes run the golden files on.
"""
import contextlib
import importlib.abc
import importlib.util
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def mistakes(name):
    """[{"file", "old", "new", "mistake"}] of a list beside this file."""
    return json.loads((ROOT / "tests" / "golden" / name).read_text(encoding="utf-8"))


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """While on sys.meta_path, one file of the project is read with one line changed."""

    def __init__(self, file, old, new):
        self.file, self.old, self.new = file, old, new

    def find_spec(self, name, path=None, target=None):
        if name == self.file.removesuffix(".py").replace("/", "."):
            return importlib.util.spec_from_loader(name, self, origin=str(ROOT / self.file))

    def get_filename(self, name):
        return str(ROOT / self.file)

    def get_data(self, path):
        text = (ROOT / self.file).read_text(encoding="utf-8")
        assert text.count(self.old) == 1, f"{self.file}: {self.old!r} is there {text.count(self.old)} times"
        return text.replace(self.old, self.new).encode()


def check_edits(mutants, least):
    """Every edit has its one line in the code, and none is twice in a list; two lists may have the same mistake."""
    for mutant in mutants:
        assert Mutated(mutant["file"], mutant["old"], mutant["new"]).get_data("")
    assert len(mutants) >= least and len({(m.get("list"), m["old"], m["new"]) for m in mutants}) == len(mutants)


@contextlib.contextmanager
def edited(mutant, modules):
    """While open, `modules` are imported anew with this edit; afterwards they are what they were."""
    kept = forgotten(modules)
    finder = Mutated(mutant["file"], mutant["old"], mutant["new"])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        forgotten(modules)
        for name, module in kept.items():
            sys.modules[name] = module
            package, _, short = name.rpartition(".")
            if package:
                setattr(sys.modules[package], short, module)


def forgotten(modules):
    """{name: module} of those that were imported; they are no longer, not even as an attribute of their package."""
    kept = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    for name in modules:
        package, _, short = name.rpartition(".")
        if package in sys.modules:
            vars(sys.modules[package]).pop(short, None)
    return kept
