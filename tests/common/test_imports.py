"""`--import`: modules of the user's own."""

import sys

import pytest

from common.errors import UserError
from common.imports import import_modules


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current directory; whatever is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_in_the_current_directory_is_found(folder):
    (folder / "isthmus_models_here.py").write_text("registered = True\n")
    import_modules(["isthmus_models_here"])
    assert sys.modules["isthmus_models_here"].registered


def test_modules_are_imported_in_order_and_once(folder):
    (folder / "isthmus_log.py").write_text("names = []\n")
    for name in ("isthmus_b", "isthmus_a"):
        (folder / f"{name}.py").write_text(f"import isthmus_log; isthmus_log.names.append({name!r})\n")
    import_modules(["isthmus_b", "isthmus_a", "isthmus_b"])
    assert sys.modules["isthmus_log"].names == ["isthmus_b", "isthmus_a"]


def test_no_modules_change_nothing(folder):
    before = list(sys.path)
    import_modules([])
    assert sys.path == before


def test_a_module_that_does_not_exist_is_named(folder):
    with pytest.raises(UserError, match=r"--import isthmus_nowhere: .*isthmus_nowhere.*can import from here"):
        import_modules(["isthmus_nowhere"])


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import isthmus_missing\n", "isthmus_missing"),
        ("def broken(:\n", "syntax"),
        ("undefined_name\n", "undefined_name"),
        ("raise ValueError('two\\nlines')\n", "two lines"),
    ],
    ids=["import", "syntax", "name", "value"],
)
def test_a_module_that_fails_to_import_is_named_with_its_reason_in_one_line(folder, code, reason):
    (folder / "isthmus_broken.py").write_text(code)
    with pytest.raises(UserError, match=reason) as caught:
        import_modules(["isthmus_broken"])
    assert str(caught.value).startswith("--import isthmus_broken: ")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None  # for --debug


@pytest.mark.parametrize("name", ["", ".relative", "isthmus_here.py"])
def test_what_is_no_module_s_name_is_refused(folder, name):
    (folder / "isthmus_here.py").write_text("")
    with pytest.raises(UserError, match=r"^--import "):
        import_modules([name])


def test_a_refusal_of_the_module_s_own_stays_as_it_is(folder):
    (folder / "isthmus_taken.py").write_text(
        "from common.models import register_model\nregister_model('resnet18', dict)\n"
    )
    with pytest.raises(UserError, match="'resnet18' is taken"):
        import_modules(["isthmus_taken"])
