"""The table of ranks (CONTRIBUTING.md), read off the source: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE, ADAPTERS = ROOT / "kfaclinalg", ROOT / "adapters"
RANKS = {
    "_typing": 0,
    "_array": 1,
    "_value": 1,
    "_linalg": 2,
    "_host": 2,
    "_conversions": 2,
    "_blas": 2,
    "_lapack": 3,
    "_capacitance": 4,
    "_newton_schulz": 3,
    "_moments": 3,
    "spd": 4,
    "factors": 4,
    "quadratic": 4,
    "averages": 5,
    "diagonal": 5,
    "cholesky_inverse": 5,
    "_woodbury": 5,
    "_subspace": 5,
    "low_rank": 6,
    "_side": 7,
    "kronecker_basis": 7,
    "damping": 8,
    "kronecker": 8,
    "kronecker_pair": 9,
    "blocks": 10,
    "curvature": 11,
    "options": 12,
    "algorithm": 13,
    "testing": 13,
}
STANDARD = set(sys.stdlib_module_names)
DOORS = {
    "_conversions": {"array_api_compat", "numpy", "scipy"},
    "_array": {"array_api_compat", "array_api_extra", "numpy", "scipy"},
    "_linalg": {"array_api_compat", "array_api_extra", "numpy", "scipy"},
    "_host": {"numpy", "scipy"},
    "_blas": {"numpy", "scipy"},
    "_lapack": {"numpy", "scipy"},
    "_capacitance": {"numpy", "scipy"},
}
BACKENDS = {"torch", "jax", "cupy", "cupyx"}  # in `_linalg`, `_host` and `_value`, inside a branch
OWN = {
    "kfaclinalg_torch": {"torch", "kfaclinalg"},
    "kfaclinalg_mlp": {"array_api_compat", "kfaclinalg"},
}


def imports(path: Path):
    """(module, names, whether at the top level) of each import; a relative module starts with a dot."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], node in tree.body
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), [alias.name for alias in node.names], node in tree.body


def core_modules():
    return [path for path in sorted(CORE.glob("*.py")) if path.stem != "__init__"]


@pytest.mark.parametrize("path", core_modules(), ids=lambda path: path.stem)
def test_a_core_module_imports_lower_ranks_only(path):
    allowed = STANDARD | DOORS.get(path.stem, set())
    for module, names, top in imports(path):
        if module.startswith("."):
            lower = names if module == "." else [module.removeprefix(".")]
            for name in lower:
                assert RANKS[name] < RANKS[path.stem], f"{path.stem} imports {name}"
        else:
            package = module.partition(".")[0]
            lazily = path.stem in ("_linalg", "_host", "_value") and not top and package in BACKENDS
            assert package in allowed or lazily, f"{path.stem} imports {module}"


def test_every_core_module_has_a_rank():
    assert {path.stem for path in core_modules()} <= set(RANKS)


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


def test_no_core_module_outgrows_its_page():
    for path in core_modules():
        assert len(path.read_text().splitlines()) <= 200, f"{path.stem} is longer than 200 lines"


def test_the_core_sets_no_boolean_options_but_links():
    """Two behaviours are two functions."""
    found = []
    for path in core_modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                defaults = [*node.args.defaults, *node.args.kw_defaults]
                if any(isinstance(d, ast.Constant) and isinstance(d.value, bool) for d in defaults):
                    found.append(node.name)
    assert found == ["batch_factors"]


@pytest.mark.parametrize("path", core_modules(), ids=lambda path: path.stem)
def test_what_is_created_has_a_dtype_and_a_device(path):
    """Without them an array lands on the default device, in the default dtype."""
    for node in ast.walk(ast.parse(path.read_text())):
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
