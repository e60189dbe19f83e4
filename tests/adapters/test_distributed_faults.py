"""A process that is killed: the others say what they waited for, and torchrun goes on from the last checkpoint."""

import re
import subprocess
import sys
from pathlib import Path

KILLS, STEPS, INTERVAL = 1, 12, 3


def test_a_run_goes_on_after_a_process_was_killed(tmp_path):
    """What 20 kills do is seen by hand: `tests/adapters/killed.py` says how."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    script = [str(Path(__file__).with_name("killed.py")), "--folder", str(tmp_path)]
    given = ["--kills", str(KILLS), "--steps", str(STEPS), "--within", "0.5"]
    command = [*torchrun, "--max-restarts", str(KILLS), *script, *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "exitcode: -9" in done.stderr
    check(tmp_path, KILLS, STEPS)


def check(folder, kills, steps):
    """No start goes back by more than an interval; all come to the end; whoever saw the loss in a step says so."""
    for rank in range(3):
        lines = (folder / f"log.{rank}").read_text(encoding="utf-8").splitlines()
        assert lines[-1] == f"done {steps}"
        starts = [int(line.split()[-1]) for line in lines if line.startswith("start")]
        assert len(starts) == kills + 1
        reached = 0
        for line in lines:
            kind, *_, at = re.split("[ :]+", line) if line.startswith(("start", "step")) else ("", "0")
            if kind == "start":
                assert reached - int(at) <= INTERVAL
            reached = max(reached, int(at))
