"""The site of `make docs`: its pages are those of the repository, with the links they have there.

mkdocs calls the functions (``hooks`` in mkdocs.yml), griffe the class.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import griffe
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FROM_ROOT = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
SHOWN = {".css", ".js", ".md", ".png", ".svg"}

EXAMPLE_LINK = re.compile(r"(\]\([^)\s]*examples/\w+)\.py\)")
DOCTEST = re.compile(r"^```python\n(?=>>>)", re.MULTILINE)
FETCHED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*?\bsrc=[\"']?(?:https?:)?//[^\s>]*"
    r"|<link\b[^>]*?\bhref=[\"']?(?:https?:)?//[^\s>]*"
)
# A warning of a logger below "mkdocs" fails a strict build.
log = logging.getLogger("mkdocs.lateinit")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Give each page its path in the repository, so that links between pages need no change."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in [*map(ROOT.joinpath, FROM_ROOT), *sorted((ROOT / "docs").rglob("*"))]:
        if path.suffix in SHOWN:
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    for path in sorted((ROOT / "examples").glob("*.py")):
        uri = path.relative_to(ROOT).with_suffix(".md").as_posix()
        files.append(File.generated(config, uri, content=example(path)))
    for module in public_modules():
        uri = f"docs/reference/{module.__name__}.md"
        files.append(File.generated(config, uri, content="\n".join(reference(module))))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links from an example's file to its page, and colour doctests as such."""
    del page, config, files
    return DOCTEST.sub("```pycon\n", EXAMPLE_LINK.sub(r"\1.md)", markdown))


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Tell of everything that a browser would fetch from another host."""
    del config
    for found in FETCHED.findall(output):
        log.warning("%s fetches from another host: %s", page.file.src_uri, found)
    return output


def example(path: Path) -> str:
    """The page of an example: what it shows, and its code."""
    code = path.read_text()
    about = ast.get_docstring(ast.parse(code)) or ""
    return f"# {path.name}\n\n{about}\n\n```python\n{code}```\n"


def public_modules() -> list[ModuleType]:
    """`lateinit`, and the modules among its public names."""
    package = importlib.import_module("lateinit")
    found = [getattr(package, name) for name in package.__all__]
    return [package, *(each for each in found if isinstance(each, ModuleType))]


def reference(module: ModuleType) -> Iterator[str]:
    """The page of a public module: its docstring, and all its names."""
    yield "---\nsearch: {boost: 2}\n---\n"
    yield directive(module.__name__, heading_level=1)
    classes = [
        name
        for name, found in vars(module).items()
        if inspect.isclass(found) and found.__module__ == module.__name__
    ]
    for name in getattr(module, "__all__", classes):
        found, path = getattr(module, name), f"{module.__name__}.{name}"
        if isinstance(found, ModuleType):
            continue
        if "__signature__" in vars(found):  # griffe would find no class statement
            yield made(path, found)
        else:
            yield directive(path, heading_level=2)


def directive(path: str, heading_level: int) -> str:
    """What mkdocstrings replaces by the signature and the docstring of a name."""
    return f"::: {path}\n    options: {{heading_level: {heading_level}}}\n"


def made(path: str, cls: type) -> str:
    """The same for a class that a function has made, such as a lazy layer."""
    signature = inspect.signature(cls)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    call = f"{cls.__name__}{signature.replace(parameters=plain)}"
    return f"## {path} {{: #{path} }}\n\n```python\n{call}\n```\n\n{inspect.getdoc(cls)}\n"


class OneExample(griffe.Extension):
    """Read an ``Example:`` of a docstring as ``Examples:``, the only title that griffe knows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
