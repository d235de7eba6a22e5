"""The shape of the pack, read off its source: what may import what, what no file of it may do, how large it gets."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
PURE = ("schedules", "samplers", "training")
FOLDERS = (*PURE, "runtime", "nodes")

# nodes → runtime → {samplers, training} → schedules; "" is the package's own __init__.py
MAY_IMPORT = {
    "": {"nodes"},
    "nodes": {"nodes", "runtime"},
    "runtime": {"runtime", "samplers", "training", "schedules"},
    "samplers": {"samplers", "schedules"},
    "training": {"training", "schedules"},
    "schedules": {"schedules"},
}
SCIENCE = {"torch", "numpy", "PIL", "safetensors", "einops", "scipy"}
HOST = {
    "comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview",
    "node_helpers", "nodes", "server",
}  # fmt: skip
MAY_USE = {
    "": {"comfy_api"},
    "nodes": {"comfy_api"},
    "runtime": SCIENCE | HOST | {"comfyui_version", "kornia", "psutil", "torchsde"},
    "samplers": SCIENCE | {"torchsde"},
    "training": SCIENCE,
    "schedules": SCIENCE,
}
# Found at run time where somebody installed them: only inside functions.
OPTIONAL = {"bitsandbytes", "kornia", "prodigyopt", "pytorch_optimizer", "schedulefree", "sklearn", "tensorboard"}

FORBIDDEN_MODULES = {
    "aiohttp", "asyncore", "code", "ctypes", "dill", "ftplib", "http", "httpx", "marshal", "pickle", "pip", "requests",
    "runpy", "shelve", "smtplib", "socket", "subprocess", "telnetlib", "urllib", "urllib3", "webbrowser", "xmlrpc",
}  # fmt: skip
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__", "print", "input", "breakpoint"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "os.system", "os.popen", "importlib.reload"}
# What the registry's scanner takes for network code or hidden code, in scripts of the page too.
FORBIDDEN_IN_SCRIPTS = (
    ".connect(",
    ".bind(",
    ".send(",
    "eval(",
    "new Function",
    "XMLHttpRequest",
    "http://",
    "https://",
)

FILE_LINES = 400
EXECUTE_LINES = 10

PUBLISHED = {
    "__init__.py", "README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "train.py",
    *FOLDERS, "web", "locales", "example_workflows", "models",
}  # fmt: skip


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py")) if folder else [ROOT / "__init__.py"]


PACK_FILES = [(folder, path) for folder in ("", *FOLDERS) for path in sources(folder)]
pack_files = pytest.mark.parametrize(
    ("folder", "path"), PACK_FILES, ids=[str(p.relative_to(ROOT)) for _, p in PACK_FILES]
)


@dataclass
class Import:
    name: str
    """Dotted name: of the module for an absolute import, from the package's root for a relative one."""
    relative: bool
    at_import_time: bool
    line: int


def imports_of(path: Path) -> Iterator[Import]:
    package = path.parent.relative_to(ROOT).parts

    def visit(node: ast.AST, top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, False, top, child.lineno)
            elif isinstance(child, ast.ImportFrom) and child.level == 0:
                yield Import(child.module or "", False, top, child.lineno)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1]
                assert len(package) >= child.level - 1, f"{path}:{child.lineno} reaches out of the package"
                for alias in child.names:
                    yield Import(".".join([*base, child.module or alias.name]), True, top, child.lineno)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, top and not inside)

    yield from visit(ast.parse(path.read_text()), True)


def test_every_folder_has_source():
    """Guards the tests below against looking at nothing."""
    assert all(sources(folder) for folder in FOLDERS)


@pack_files
def test_imports_point_inward(folder: str, path: Path):
    for found in imports_of(path):
        if found.relative:
            target = found.name.split(".")[0]
            assert target in MAY_IMPORT[folder], f"{path}:{found.line}: {folder or 'the root'} may not import {target}"


@pack_files
def test_foreign_imports_are_the_allowed_ones(folder: str, path: Path):
    for found in imports_of(path):
        module = found.name.split(".")[0]
        if found.relative or module in sys.stdlib_module_names:
            continue
        allowed = MAY_USE[folder] | (set() if found.at_import_time else OPTIONAL)
        assert module in allowed, f"{path}:{found.line}: {folder or 'the root'} may not import {module}"


def test_root_imports_nothing_when_it_is_imported():
    assert [found.name for found in imports_of(ROOT / "__init__.py") if found.at_import_time] == []


@pack_files
def test_nothing_a_scanner_or_a_user_would_object_to(folder: str, path: Path):
    for found in imports_of(path):
        assert found.name.split(".")[0] not in FORBIDDEN_MODULES or found.relative, f"{path}:{found.line}: {found.name}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN_BUILTINS | FORBIDDEN_CALLS, f"{path}:{node.lineno} calls {called}"


def test_scripts_of_the_page_have_no_flagged_tokens():
    for path in sorted((ROOT / "web").rglob("*.js")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for token in FORBIDDEN_IN_SCRIPTS:
                assert token not in line or "http://www.w3.org/" in line, f"{path}:{number} has {token!r}"


@pack_files
def test_files_stay_small(folder: str, path: Path):
    assert len(path.read_text().splitlines()) <= FILE_LINES, f"{path}: split it where the code shows a seam"


@pytest.mark.parametrize("path", sources("nodes"), ids=lambda path: path.name)
def test_a_node_calls_one_function(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "execute":
            body = [
                statement for statement in node.body if not isinstance(getattr(statement, "value", None), ast.Constant)
            ]
            lines = node.end_lineno - body[0].lineno + 1 if node.end_lineno and body else 0
            assert lines <= EXECUTE_LINES, f"{path}:{node.lineno}: execute has {lines} lines"


def test_every_entry_is_published_or_left_out_on_purpose():
    """The registry serves what git tracks, less .comfyignore: a new top-level entry must choose."""
    ignored = [line.rstrip("/") for line in patterns(".comfyignore")]
    untracked = [line.strip("/") for line in patterns(".gitignore")]
    for entry in ROOT.iterdir():
        if entry.name == ".git" or any(fnmatch(entry.name, pattern) for pattern in untracked):
            continue
        chosen = entry.name in PUBLISHED, entry.name in ignored
        assert chosen.count(True) == 1, f"{entry.name}: put it into PUBLISHED here or into .comfyignore"


def patterns(name: str) -> list[str]:
    lines = (line.strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


# ── the same, by running it ────────────────────────────────────────────────────────────────────────

LOAD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from devtools import loading
loading.load_checkout()
"""

WALL = f"""
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(HOST)!r}:
            raise ImportError("a pure module imports ComfyUI: " + name)
sys.meta_path.insert(0, Wall())
import importlib
"""


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pure_folders_import_without_comfyui():
    modules = [
        ".".join(["tidetable", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        for folder in PURE
        for path in sources(folder)
        if path.name != "__main__.py"
    ]
    code = LOAD + WALL + f"for name in {modules!r}: importlib.import_module(name)\nprint(len(sys.modules))"
    assert int(run_python(code)) > len(modules)


def test_importing_the_pack_is_cheap():
    """ComfyUI imports the root at its start: it must not bring in anything large, nor the pack's own folders."""
    heavy = ["torch", "numpy", "PIL", "scipy", "safetensors", "comfy", "comfy_api"]
    code = LOAD + f"print([name for name in {heavy!r} if name in sys.modules])\n"
    code += "print([name for name in sys.modules if name.startswith('tidetable.')])"
    assert run_python(code).split("\n")[:2] == ["[]", "[]"]
