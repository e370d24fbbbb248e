"""The public names: declared once, loaded when used, each part at the cost of that part alone."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import overdrive
from overdrive import OverdriveError, errors


def declared() -> dict[str, str]:
    """The names a type checker sees, and the module of each."""
    tree = ast.parse(Path(overdrive.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    found: dict[str, str] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            # Without "as" a strict type checker does not take it for an export.
            assert alias.asname == alias.name
            found[alias.name] = f"overdrive.{node.module}"
    return found


def test_what_a_type_checker_sees_is_what_there_is() -> None:
    assert sorted(declared()) == list(overdrive.__all__)
    assert {name: f"overdrive.{module}" for name, module in overdrive._HOMES.items()} == declared()


@pytest.mark.parametrize("name", overdrive.__all__)
def test_each_name_resolves_to_what_its_module_has(name: str) -> None:
    value = getattr(overdrive, name)
    assert value is getattr(sys.modules[declared()[name]], name)
    assert name in dir(overdrive)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(overdrive, "Overdriv")
    with pytest.raises(ImportError, match="Overdriv"):
        exec("from overdrive import Overdriv")


WEIGHTS = {"fastapi", "starlette", "sqlalchemy", "redis", "msgspec", "pydantic", "pydantic_settings"}


@pytest.mark.parametrize(
    ("statement", "loaded"),
    [
        ("import overdrive", set()),
        ("from overdrive import bind", set()),
        ("from overdrive import OverdriveError", set()),
        ("from overdrive import LogHandler", {"msgspec"}),
        ("from overdrive import Page, PageParams, CursorPage, CursorParams", {"pydantic"}),
        ("from overdrive import Settings", {"pydantic", "pydantic_settings"}),
        ("from overdrive import Cache", {"msgspec"}),
        ("from overdrive import CacheMiddleware", set()),
        ("from overdrive import create_engine", {"sqlalchemy"}),
        (
            "from overdrive import Overdrive",
            {"fastapi", "starlette", "sqlalchemy", "msgspec", "pydantic", "pydantic_settings"},
        ),
    ],
)
def test_a_part_costs_the_import_of_that_part_alone(statement: str, loaded: set[str]) -> None:
    code = f"import sys; {statement}; print(*(set({sorted(WEIGHTS)!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert set(done.stdout.split()) == loaded


def exceptions() -> list[type[OverdriveError]]:
    return [each for _, each in inspect.getmembers(errors, inspect.isclass) if each.__module__ == errors.__name__]


def test_every_exception_is_in_the_tree_has_a_status_and_a_code_of_its_own() -> None:
    assert len(exceptions()) >= 7
    for each in exceptions():
        assert issubclass(each, OverdriveError)
        assert each.status in (400, 500, 503)
        assert each.__doc__
        assert each.__name__ in overdrive.__all__
    assert len({each.code for each in exceptions()}) == len(exceptions())


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    parents: list[str] = []
    drawn: dict[str, tuple[str | None, int]] = {}
    for indent, name, status in re.findall(r"^( *)\* `(\w+)` \((\d+)\)", errors.__doc__, re.MULTILINE):
        depth = len(indent) // 4
        drawn[name] = (parents[depth - 1] if depth else None, int(status))
        parents[depth:] = [name]
    real = {
        each.__name__: (None if each is OverdriveError else each.__mro__[1].__name__, each.status)
        for each in exceptions()
    }
    assert drawn == real
