"""Store what `make figures` has drawn in full form for the gallery of the documentation, small, and how it was made.

    make figures && .venv/bin/python docs/examples/store_gallery.py

Each becomes a WebP of at most 1,400 pixels in docs/_static/gallery; a table beside them names the command, the day of
the picture, the processor and the versions. What has not been drawn since stays as it is stored.
"""

import argparse
import platform
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "_static" / "gallery"
WIDTH, QUALITY = 1400, 82
COMMANDS = {
    "figure_2": "make fisher_blocks",
    "figure_3": "make fisher_blocks",
    "figure_5": "make fisher_blocks",
    "figure_6": "make fisher_blocks",
    "fisher_and_inverses": "make fisher_blocks",
    "figure_7": "make improvement_against_gamma",
    "figure_9": "make progress_against_batch",
    "figure_10": "make training_curves ARGS='--seconds 60'",
    "figure_11": "make training_curves ARGS='--seconds 60'",
    "demo": "make demo",
    "race_autoencoder": "make race ARGS='--tasks autoencoder'",
    "race_transformer": "make race ARGS='--tasks transformer'",
    "race_gru": "make race ARGS='--tasks gru'",
    "race_vit": "make race ARGS='--tasks vit'",
    "race_convnet": "make race ARGS='--tasks convnet'",
    "race_sparse": "make race ARGS='--tasks sparse'",
    "jax_transformer": "make jax_transformer",
    "influence": "make influence",
    "laplace_digits": "make interop && .venv-interop/bin/python docs/examples/laplace_digits.py",
    "pruning": "make pruning",
    "hessian_free": "make hessian_free",
    "distributed_autoencoder": "make distributed_autoencoder",
}


def store(source: Path, target: Path) -> None:
    image = Image.open(source).convert("RGB")
    image.thumbnail((WIDTH, 10 * WIDTH))
    image.save(target, quality=QUALITY, method=6)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folders = [ROOT / "build" / name for name in ("figures", "race", "demo")]
    parser.add_argument("--figures", type=Path, nargs="+", default=folders, help="where they are")
    parser.add_argument("--out", type=Path, default=OUT, help="where they go")
    parser.add_argument("--quick", action="store_true", help="into build/gallery, for a test of the script")
    args = parser.parse_args()
    out = ROOT / "build" / "gallery" if args.quick else args.out
    out.mkdir(parents=True, exist_ok=True)
    made, heading = out / "made.md", "| picture | command | made on | with one thread of |\n|---|---|---|---|\n"
    rows = dict.fromkeys(COMMANDS, "")
    if made.exists():
        rows |= {row.split("|")[1].strip().replace(" ", "_"): row for row in made.read_text("utf-8").splitlines()[2:]}
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, torch {torch.__version__}"
    for name, command in tqdm(COMMANDS.items(), unit="picture"):
        sources = [path for folder in args.figures if (path := folder / f"{name}.png").exists()]
        if sources:
            store(sources[0], out / f"{name}.webp")
            day = datetime.fromtimestamp(sources[0].stat().st_mtime, UTC).date()
            rows[name] = f"| {name.replace('_', ' ')} | `{command}` | {day} | {processor()}; {versions} |"
    if not any(rows.values()):
        raise SystemExit(f"no picture is there: {', '.join(map(str, args.figures))}")
    made.write_text(heading + "\n".join(filter(None, rows.values())) + "\n", encoding="utf-8")
    print(f"Pictures: {out}")


if __name__ == "__main__":
    main()
