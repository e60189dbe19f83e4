"""The table of ranks (CONTRIBUTING.md), read off the source: who may import whom."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE, ADAPTERS = ROOT / "kfaclinalg", ROOT / "adapters"
STANDARD = set(sys.stdlib_module_names)
CELLAR = {"array_api_compat", "numpy", "scipy"}
BACKENDS = {"torch", "jax", "cupy", "cupyx"}  # in the cellar, inside a function


def table():
    """The ranks of CONTRIBUTING.md, by module."""
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {module: int(rank) for rank, modules in rows for module in re.findall(r"`([\w.]+)`", modules)}


RANKS = table()
OWN = {
    "kfaclinalg_torch": {"torch", "kfaclinalg", "tqdm", "scipy", "matplotlib"}
    | {"laplace", "linear_operator", "curvlinops"},
    "kfaclinalg_jax": {"jax", "kfaclinalg", "numpy", "optax"},
    "kfaclinalg_mlp": {"array_api_compat", "kfaclinalg"},
}


def imports(path: Path):
    """(module, names, whether at the top level) of each import; a relative module starts with a dot."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], node in tree.body
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), [alias.name for alias in node.names], node in tree.body


def core_modules():
    return [path for path in sorted(CORE.rglob("*.py")) if path != CORE / "__init__.py"]


def name_of(path):
    """As the table has it: `_backends.door`, and `_backends` for the package itself."""
    return ".".join(path.relative_to(CORE).with_suffix("").parts).removesuffix(".__init__")


every_module = pytest.mark.parametrize("path", core_modules(), ids=name_of)


def imported(path):
    """Modules of the core, by their names in the table, and packages from outside, each with whether at the top."""
    inside = path.parent != CORE
    for module, names, top in imports(path):
        if not module.startswith("."):
            yield module.partition(".")[0], False, top
            continue
        dots, rest = len(module) - len(module.lstrip(".")), module.lstrip(".")
        prefix = "_backends." if inside and dots == 1 else ""
        yield from ((prefix + name, True, top) for name in ([rest] if rest else names))


@every_module
def test_a_core_module_imports_lower_ranks_only(path):
    own = name_of(path)
    cellar = own.startswith("_backends")
    for module, of_the_core, top in imported(path):
        if of_the_core:
            assert RANKS[module] < RANKS[own], f"{own} imports {module}"
        else:
            lazily = cellar and not top and module in BACKENDS | {"kfaclinalg"}
            assert module in STANDARD | (CELLAR if cellar else set()) or lazily, f"{own} imports {module}"


def test_every_core_module_has_a_rank():
    assert {name_of(path) for path in core_modules()} == {name for name in RANKS if "/" not in name}


@every_module
def test_above_the_cellar_nobody_knows_the_machine(path):
    """No backend, no kind of one, no numpy and no scipy in the code of a room upstairs; its documentation may."""
    if name_of(path).startswith("_backends"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not (names | strings | attributes) & (BACKENDS | CELLAR | {"np"})
    assert "kind" not in attributes


def adapter_modules():
    return sorted(ADAPTERS.glob("*/*.py"))


@pytest.mark.parametrize("path", adapter_modules(), ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_an_adapter_imports_public_names_and_its_own_framework(path):
    import kfaclinalg

    for module, names, _ in imports(path):
        if module.startswith("."):
            assert module.count(".") == 1, f"{module} leaves the package"
            continue
        package = module.partition(".")[0]
        assert package in STANDARD | OWN[path.parent.name], f"{path.parent.name} imports {module}"
        if package == "kfaclinalg":
            assert module == "kfaclinalg", f"{module} is not public"
            assert set(names) <= set(kfaclinalg.__all__)


def test_no_module_outgrows_its_page():
    for path in [*core_modules(), *ADAPTERS.rglob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 200, f"{path.stem} is longer than 200 lines"


def test_the_core_sets_no_boolean_options_but_links():
    """Two behaviours are two functions."""
    found = []
    for path in core_modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                defaults = [*node.args.defaults, *node.args.kw_defaults]
                if any(isinstance(d, ast.Constant) and isinstance(d.value, bool) for d in defaults):
                    found.append(node.name)
    assert found == ["batch_factors"]


@every_module
def test_what_is_created_has_a_dtype_and_a_device(path):
    """Without them an array lands on the default device, in the default dtype."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        on_namespace = isinstance(node.func.value, ast.Name | ast.Attribute) and ast.unparse(node.func.value).endswith(
            "xp"
        )
        if on_namespace and node.func.attr in {
            "zeros",
            "ones",
            "empty",
            "full",
            "eye",
            "arange",
            "linspace",
            "asarray",
        }:
            given = {keyword.arg for keyword in node.keywords}
            needed = {"device"} if node.func.attr == "asarray" else {"dtype", "device"}
            assert needed <= given, f"{path.stem}:{node.lineno} {ast.unparse(node)}"


def test_the_inner_modules_of_the_torch_adapter_have_an_underscore():
    assert [path.name for path in (ADAPTERS / "kfaclinalg_torch").glob("[!_]*.py")] == []
