"""The public surface: every name is exported, documented, shown by an example, and in the docs."""

import inspect
import re
import subprocess
import sys
import tomllib
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

import _arguments
import kfaclinalg
import kfaclinalg_jax
import kfaclinalg_mlp
import kfaclinalg_torch
from kfaclinalg import spd
from mnist_autoencoder import load_digits

ROOT = Path(__file__).parents[1]
CONTRACT = {
    *("Kronecker", "KroneckerBasis", "KroneckerEigen", "KroneckerPair", "BlockDiagonal", "BlockTridiagonalInverse"),
    *("block_tridiagonal_inverse", "exactly_damped_inverse"),
    *("LayerFactors", "Link", "Factors", "homogeneous", "batch_factors"),
    *("moving_average", "averaging_decay", "tikhonov_pi", "factored_tikhonov", "block_diagonal_inverse"),
    *("QuadraticFit", "fit_quadratic", "reduction_ratio", "levenberg_marquardt", "Problem", "KFACOptions"),
    *("KFACState", "StepInfo", "kfac_step", "assert_finite", "LinAlgError", "spd", "testing"),
}
CORE = [getattr(kfaclinalg, name) for name in kfaclinalg.__all__ if name not in ("spd", "testing")]
CORE += [spd.inverse, spd.cholesky, spd.solve, spd.inverse_root, spd.logdet, spd.newton_schulz_inverse]
MLP = [getattr(kfaclinalg_mlp, name) for name in kfaclinalg_mlp.__all__]
named = pytest.mark.parametrize(
    "thing", [*CORE, *MLP, kfaclinalg_torch.KFAC, kfaclinalg_torch.KFACPreconditioner], ids=lambda thing: thing.__name__
)


def test_the_contract_is_exported():
    assert set(kfaclinalg.__all__) >= CONTRACT
    for package in (kfaclinalg, kfaclinalg_jax, kfaclinalg_mlp, kfaclinalg_torch):
        assert all(hasattr(package, name) for name in package.__all__)
        public = {
            name for name, value in vars(package).items() if not name.startswith("_") and not inspect.ismodule(value)
        }
        assert public <= set(package.__all__)


@named
def test_it_is_documented(thing):
    doc = inspect.getdoc(thing)
    assert doc
    assert not re.match(rf"{thing.__name__}\(", doc), "the docstring is the generated one"


@pytest.mark.parametrize("thing", [t for t in CORE if inspect.isfunction(t)], ids=lambda thing: thing.__name__)
def test_a_function_says_what_it_raises_and_shows_an_example(thing):
    doc = inspect.getdoc(thing)
    assert ">>>" in doc
    if thing not in (kfaclinalg.reduction_ratio, kfaclinalg.inner_products, kfaclinalg.assert_finite):
        assert "Raises:" in doc


def methods():
    """Of every operator, by name; conversions compute nothing, and a block operator does what its blocks do."""
    conversions = {"astype", "to_device", "to_namespace", "as_scipy"}
    for cls in (t for t in CORE if hasattr(t, "to_dense") and t is not kfaclinalg.BlockDiagonal):
        for name, f in vars(cls).items():
            if inspect.isfunction(f) and (name == "__matmul__" or not name.startswith("_")) and name not in conversions:
                yield f"{cls.__name__}.{name}", f


COUNTED = [(t.__name__, t) for t in CORE if inspect.isfunction(t)]
NOT_COUNTED = {"assert_finite", "reduction_ratio", "levenberg_marquardt"}  # a few on the host


@pytest.mark.parametrize("f", [pytest.param(f, id=name) for name, f in [*COUNTED, *methods()]])
def test_its_cost_is_in_flops(f):
    assert "flops" in f.__doc__ or f.__name__ in NOT_COUNTED


@pytest.mark.parametrize("cls", [t for t in CORE if inspect.isclass(t)], ids=lambda cls: cls.__name__)
def test_a_class_shows_an_example(cls):
    given = {
        kfaclinalg.Problem,
        kfaclinalg.KFACState,
        kfaclinalg.StepInfo,
        kfaclinalg.LinAlgError,
        kfaclinalg.Structure,
    }  # not made by users
    assert cls in given or ">>>" in cls.__doc__


@pytest.mark.parametrize(
    "package", [kfaclinalg, kfaclinalg_jax, kfaclinalg_mlp, kfaclinalg_torch], ids=lambda package: package.__name__
)
def test_each_name_has_a_page_in_the_reference(package):
    listed = set(
        re.findall(r"^   (\w+\.[\w.]+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    names = {f"{package.__name__}.{name}" for name in package.__all__} - {"kfaclinalg.spd", "kfaclinalg.testing"}
    assert names <= listed
    if package is kfaclinalg:
        for module in (kfaclinalg.spd, kfaclinalg.testing):
            own = {
                name for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__
            }
            assert {f"{module.__name__}.{name}" for name in own if not name.startswith("_")} <= listed


def anchors(page):
    """Of its headings, as GitHub and Sphinx name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_plain_pages_lead_somewhere():
    """What Sphinx does not see; it checks those of its own pages."""
    for page in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "asv_benchmarks/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([^)#:]+)(?:#([^)]*))?\)", text):
            path = (ROOT / page).parent / target
            assert path.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(path), f"{page}: {target}#{anchor}"


def test_the_map_of_the_paper_names_what_exists():
    rows = [
        line.split(" | ")
        for line in (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8").splitlines()
        if "::" in line
    ]
    assert len(rows) > 20
    for _, functions, tests in rows:
        for name in re.findall(r"`([\w.]+)`", functions):
            thing = kfaclinalg
            for part in name.split("."):
                thing = getattr(thing, part)
        path, test = re.search(r"`(\S+)::(\w+)`", tests).groups()
        assert f"def {test}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), f"{path}::{test}"


def test_the_fields_of_the_records_are_the_contract():
    assert kfaclinalg.KFACOptions._fields == (
        *("structure", "damping", "weight_decay", "momentum", "damping_period", "damping_decay", "gamma_period"),
        *("gamma_decay", "inverse_period", "statistics_fraction", "curvature_fraction", "averaging_maximum"),
        *("pi_norm", "chunk_size", "generator"),
    )
    assert kfaclinalg.StepInfo._fields == (
        *("loss", "damping", "gamma", "alpha", "mu", "change", "ratio", "update_norm", "refreshed", "refused"),
    )


@pytest.mark.parametrize(("package", "framework"), [("kfaclinalg_torch", "torch"), ("kfaclinalg_jax", "jax")])
def test_an_adapter_says_which_framework_is_missing(package, framework):
    program = f"import sys; sys.modules[{framework!r}] = None; import {package}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert re.search(rf"ModuleNotFoundError: {package} needs \w+: pip install {framework}", done.stderr)


def test_the_first_lines_of_the_readme_warn_of_nothing():
    """Not even of what PyTorch has deprecated and uses itself."""
    program = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_the_examples_refuse_arguments_that_make_no_sense(tmp_path):
    (tmp_path / "file").touch()
    for kind, sound, wrong in (
        (_arguments.whole, "0", ("-1", "1.5", "x", "")),
        (_arguments.count, "3", ("0", "-1", "1.5")),
        (_arguments.positive, "0.5", ("0", "-1", "nan", "inf", "x")),
        (_arguments.folder, str(tmp_path / "a" / "b"), (str(tmp_path / "file"), str(tmp_path / "file" / "c"))),
    ):
        assert str(kind(sound)) == sound
        for text in wrong:
            with pytest.raises(ArgumentTypeError, match=f"got {re.escape(repr(text))}, expected"):
                kind(text)
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(SystemExit, match=r"nothing\.npz is no \.npz with x_train and y_train"):
        load_digits(tmp_path / "nothing.npz")


def test_the_packages_are_typed():
    for folder in ("kfaclinalg", "adapters/kfaclinalg_jax", "adapters/kfaclinalg_mlp", "adapters/kfaclinalg_torch"):
        assert (ROOT / folder / "py.typed").exists()


def test_what_is_cited_is_what_is_released():
    """One version, and whoever looks for a release finds the changes."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert re.search(
        rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert version in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
