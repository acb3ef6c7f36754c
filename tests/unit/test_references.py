"""What texts point at exists: links, paths, modules and files that READMEs, docstrings and comments name."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = ("offline", "vllm_babai", "triton_kernels", "tests", "deploy", ".github")
PACKAGES = {"vllm_babai.offline": ROOT / "offline", "vllm_babai.triton_kernels": ROOT / "triton_kernels"}
READMES = [path for top in (".", *TOP) for path in (ROOT.glob("*.md") if top == "." else (ROOT / top).rglob("*.md"))]
SOURCES = [path for top in TOP for path in (ROOT / top).rglob("*.py") if path.is_file()]
FILES = [path for top in TOP for path in (ROOT / top).rglob("*") if path.suffix in {".py", ".json", ".md", ".sh"}]
MADE = {"config.json", "babai_report.json", "quality.json"}  # by runs: in checkpoints, in the folder of a study
MADE |= {"day.json", "serving.json", "quantize.json"}  # in the folder of a day on a GPU
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([\w-]+))?\)|\]\(#([\w-]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, TOP))})/[\w.*/-]*[\w*/]")
MODULE = re.compile(r"(?<![\w./])vllm_babai(?:\.\w+)+")
FILE = re.compile(r"`([\w/]+\.(?:py|json|md|sh))`")


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def prose(path: Path) -> str:
    """Docstrings and comments of a Python file."""
    source = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [token.string for token in tokens if token.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(ast.get_docstring(node) or "")
    return "\n".join(found)


def missing_paths(text: str) -> Iterator[str]:
    """Paths from the root of the repository that are not there; NAME in capitals stands for any."""
    for found in PATH.findall(text):
        pattern = re.sub(r"\b[A-Z]+\b", "*", found).rstrip("/")
        if not any(ROOT.glob(pattern)):
            yield found


def missing_modules(text: str) -> Iterator[str]:
    """Names below vllm_babai that are neither a module nor a name in one."""
    for found in MODULE.findall(text):
        folder, rest = ROOT / "vllm_babai", found.split(".")[1:]
        for package, place in PACKAGES.items():
            if f"{found}.".startswith(f"{package}."):
                folder, rest = place, found.split(".")[2:]
        while rest and (folder / rest[0]).is_dir():
            folder, rest = folder / rest[0], rest[1:]
        module = folder / "__init__.py"
        if rest and (folder / f"{rest[0]}.py").exists():
            module, rest = folder / f"{rest[0]}.py", rest[1:]
        if rest and not re.search(rf"\b{rest[0]}\b", module.read_text()):
            yield found


def missing_files(text: str, folder: Path) -> Iterator[str]:
    """File names in backticks that are neither beside the text nor anywhere in the repository, nor made by a run."""
    for found in FILE.findall(text):
        anywhere = any(f"/{path.as_posix()}".endswith(f"/{found}") for path in FILES)
        if not (anywhere or (folder / found).exists() or found in MADE):
            yield found


@pytest.mark.parametrize("path", READMES, ids=names(READMES))
def test_readmes_point_at_what_exists(path: Path) -> None:
    text = path.read_text()
    assert not list(missing_paths(text))
    assert not list(missing_modules(text))
    assert not list(missing_files(text, path.parent))
    for target, heading, own_heading in LINK.findall(CODE.sub("", text)):
        if "://" in target:
            continue
        place = (path.parent / target) if target else path
        assert place.exists(), f"a link to {target}"
        if heading or own_heading:
            headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
            assert (heading or own_heading) in slugs, f"a link to #{heading or own_heading}"


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_docstrings_and_comments_point_at_what_exists(path: Path) -> None:
    text = prose(path)
    assert not list(missing_paths(text))
    assert not list(missing_modules(text))
    assert not list(missing_files(text, path.parent))
