"""The house: every module imports only from its own floor's room or from floors below, and there is no circle."""

import ast
from pathlib import Path

import golf_jax

ROOT = Path(golf_jax.__file__).parents[1]
FLOORS = [
    {"config", "interrupt", "kernels", "ahead", "starting"},
    {"supervise"},
    {"configs", "processes", "progress", "mesh", "files", "cli", "options"},
    {"model", "optim", "quant"},
    {"data"},
    {"artifact"},
    {"training", "evaluation"},
    {"opening", "plan"},
    {"pipeline"},
    {"interop", "proof"},
    {"reporting", "sweeping", "rescoring"},
    {"train", "evaluate", "reproduce", "check", "report", "generate", "submit", "sweep", "__main__"},
]


def modules() -> dict[str, Path]:
    """Dotted name -> file of everything that is installed."""
    found = {}
    for folder, package in (("golf_jax", "golf_jax"), ("kernels", "golf_jax.kernels"), ("configs", "golf_jax.configs")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: set[str], top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {n for n in names if n in known and n != name}


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_no_import_points_up():
    found = modules()
    floor = {r: i for i, rooms in enumerate(FLOORS) for r in rooms}
    for name, path in found.items():
        for other in imports(name, path, set(found)):
            here, there = room(name), room(other)
            if not here or not there or here == there or name.endswith(".__main__"):
                continue
            assert floor[there] < floor[here], f"{name} imports {other}, which is not on a floor below"


def test_no_circle():
    found = modules()
    graph = {name: imports(name, path, set(found), top_level_only=True) for name, path in found.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in graph[name]:
                if not other.startswith(f"{name}."):  # a package and its own modules
                    visit(other, (*trail, name))
            done.add(name)

    for name in found:
        visit(name, ())


def test_no_file_is_long():
    for name, path in modules().items():
        assert len(path.read_text().splitlines()) <= 420, name
