"""The library on a GPU: three parts, each under four minutes, and a report in build/gpu.

    python gpu/run.py                  # all: correct, speed, train
    python gpu/run.py speed            # one part
    make gpu-dry                       # on the CPU, in small: what a typo would cost a GPU, it costs here

It needs Python, pip and NVIDIA's driver. What is already there (torch, CuPy, JAX, ...) is used, what is missing comes
from the folder of wheels that GPU_WHEELS names, or from the package index; what cannot be had is reported and left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "gpu"
SITE = ROOT / "build" / "gpu-site"
PARTS = ("correct", "speed", "train")
LIMIT = 235  # seconds a part
# By the name that is imported: what pip calls it.
PURE = {
    "array_api_compat": "array-api-compat>=1.12",
    "array_api_strict": "array-api-strict>=2.3",
    "hypothesis": "hypothesis>=6.100",
    "mpmath": "mpmath>=1.3",
    "numpy": "numpy>=2",
    "pytest": "pytest>=8.2",
    "scipy": "scipy>=1.13",
    "tqdm": "tqdm>=4.60",
}
ON_CUDA = {"torch": "torch", "cupy": "cupy-cuda{major}x", "jax": "jax[cuda{major}]"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--dry", action="store_true", help="on the CPU, in small")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}, expected some of {', '.join(PARTS)}")
    OUT.mkdir(parents=True, exist_ok=True)
    machine = "" if asked.dry else driver()
    missing = install({} if asked.dry else ON_CUDA, cuda_major(machine))
    report = [f"# kfaclinalg on a GPU{' (dry run on the CPU)' if asked.dry else ''}", "", machine, *missing, ""]
    failed = []
    for part in asked.parts or PARTS:
        passed, seconds, text = run(part, asked.dry)
        report += [f"## {part}: {'done' if passed else 'FAILED'} in {seconds:.0f} s", "", "```", text, "```", ""]
        failed += [] if passed else [part]
        (OUT / "report.md").write_text("\n".join(report), encoding="utf-8")  # after each part: the machine may go away
    print(f"{OUT / 'report.md'}: {'all parts done' if not failed else 'failed: ' + ', '.join(failed)}")
    return len(failed)


def driver() -> str:
    """The card and its driver, by nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        raise SystemExit("no nvidia-smi on the PATH: a GPU and NVIDIA's driver are needed, or `make gpu-dry`")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    banner = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=True).stdout
    version = banner.partition("CUDA Version:")[2].split()[0] if "CUDA Version:" in banner else "12"
    return f"{said}, CUDA {version}"


def cuda_major(machine: str) -> str:
    return "13" if "CUDA 13" in machine else "12"


def install(on_cuda: dict[str, str], major: str) -> list[str]:
    """Install what cannot be imported; one line for each that stays missing."""
    sys.path.insert(0, str(SITE))
    missing = []
    wheels = os.environ.get("GPU_WHEELS")
    source = ["--no-index", "--find-links", wheels] if wheels else []
    for name, wanted in {**on_cuda, **PURE}.items():
        if find_spec(name) is not None:
            continue
        what = wanted.format(major=major)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(SITE), *source, what]
        print("+", *pip, flush=True)
        if subprocess.run(pip, check=False).returncode:
            missing.append(f"not installed: {what}")
    return missing


def run(part: str, dry: bool) -> tuple[bool, float, str]:
    """One part in its own process, shown as it goes: whether it ended well, its seconds, what it said."""
    paths = [SITE, ROOT, ROOT / "adapters", ROOT / "tests", ROOT / "tests" / "adapters", ROOT / "docs" / "examples"]
    environment = (
        os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONUNBUFFERED": "1",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        | ({"OMP_NUM_THREADS": "1"} if dry else {})
    )
    command = [sys.executable, str(ROOT / "gpu" / f"{part}.py"), *(["--dry"] if dry else [])]
    start, lines = time.monotonic(), []
    process = subprocess.Popen(
        ["timeout", str(LIMIT), *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    code = process.wait()
    if code == 124:
        lines.append(f"stopped after {LIMIT} s\n")
    return code == 0, time.monotonic() - start, "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
