"""The house rules that a machine can check: floors, sizes, what `import saekit` loads, no print."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

from saekit.codes import SparseCodes

REPOSITORY = Path(__file__).resolve().parents[1]
FLOORS = [  # a module may import from its own floor and from lower ones, never from higher ones
    {"errors"},
    {"codes", "kernels", "targets"},
    {"budgets", "selection", "normalisation", "activations", "checkpoint", "formats", "hub", "index", "pretrained"},
    {
        "sae_config",
        "sae",
        "crosscoder",
        "codes_file",
        "loading",
        "publishing",
        "verifying",
        "density",
        "revival",
        "losses",
    },
    {"patching", "training"},
    {"adaptive", "analysis"},
    {"dashboards"},
    {"saekit"},  # the list of public names
    {"saekit_cli"},
]
ROOMS = set().union(*FLOORS)
LIBRARY = sorted((REPOSITORY / "saekit").rglob("*.py"))
FILES = [*LIBRARY, *sorted((REPOSITORY / "cli").rglob("*.py"))]
HEAVY = {"transformers", "transformer_lens", "plotly", "datasets", "tokenizers", "huggingface_hub", "pandas"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def dotted(path: Path) -> str:
    """The name a file is imported by: saekit/sae.py is saekit.sae, cli/main.py is saekit_cli.main."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    parts = ("saekit_cli", *parts[1:]) if parts[0] == "cli" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """`sae` for saekit.sae, `kernels` for saekit.kernels.select, `saekit_cli` for everything in it."""
    top, _, rest = module.partition(".")
    return rest.split(".")[0] if top == "saekit" and rest else top


def floor_of(module: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room_of(module) in rooms)


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, wherever in the file: inside functions and TYPE_CHECKING blocks too."""
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from saekit import sae` is the module saekit.sae, `from saekit import SAE` the public list
            yield from (f"saekit.{a.name}" if source == "saekit" and a.name in ROOMS else source for a in node.names)


def ids(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_every_room_is_on_a_floor():
    assert {room_of(dotted(path)) for path in FILES} <= ROOMS


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_point_downwards(path):
    ours = {name for name in imports(path) if name.split(".")[0] in ("saekit", "saekit_cli")}
    too_high = [name for name in ours if floor_of(name) > floor_of(dotted(path))]
    assert not too_high, f"{ids(path)} reaches up to {too_high}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_a_file_is_short_enough_to_read(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE_LINES
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=ids)
def test_an_init_file_only_re_exports(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    others = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]
    is_docstring = [isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in others]
    is_all = [isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for node in others]
    assert all(a or b for a, b in zip(is_docstring, is_all, strict=True))


@pytest.mark.parametrize("path", LIBRARY, ids=ids)
def test_the_library_does_not_print(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert "print" not in [ast.unparse(call.func) for call in calls]


def test_annotations_are_not_strings():
    # a postponed annotation is never checked by jaxtyping, and says nothing about it
    postponed = [path for path in FILES if "__future__" in imports(path)]
    assert not postponed


@pytest.mark.parametrize("module", ["saekit", "saekit_cli.main"])
def test_importing_loads_nothing_heavy(module):
    script = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = HEAVY | {"torch"} if module == "saekit_cli.main" else HEAVY
    assert not heavy & set(done.stdout.split())


def test_shapes_are_checked_while_testing():
    with pytest.raises(jaxtyping.TypeCheckError, match="values"):
        SparseCodes(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2]), n_features=4)


@pytest.mark.parametrize("allocate", [torch.empty, torch.zeros(1).new_empty, lambda n: torch.empty_like(torch.ones(n))])
def test_unwritten_memory_is_poisoned_while_testing(allocate):
    assert allocate(3).isnan().all()
