"""A run under torchrun that loses a process now and then, and goes on from its last checkpoint.

    torchrun --standalone --nproc_per_node 3 --max-restarts 20 tests/adapters/killed.py --folder DIR --kills 20

The process to be killed and the moment are drawn at random; each start writes a line of what it has seen.
"""

import argparse
import os
import random
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.distributed import checkpoint

from kfaclinalg_torch import DistributedState

sys.path.insert(0, str(Path(__file__).parent))
from test_distributed_agreement import made
from together import batch_of, loss_of, model_of, wrapped

INTERVAL = 3  # steps between two checkpoints


def latest(folder):
    """The steps of the last whole checkpoint: its metadata come last."""
    found = [int(path.name) for path in folder.glob("[0-9]*") if (path / ".metadata").exists()]
    return max(found, default=0)


def doomed(seconds):
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--within", type=float, default=1.0, help="seconds after the first step of a start")
    given = parser.parse_args()
    rank, world, start = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    torch.set_num_threads(1)
    # torchrun keeps its store over the restarts, with the addresses of who is gone
    at = distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, False)
    store, within = distributed.PrefixStore(f"start {start}", at), timedelta(seconds=20)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=within)
    torch.manual_seed(0)
    model = model_of()
    called = wrapped(model, "ddp", world)
    preconditioner, optimizer = made(called, placement="owner"), torch.optim.SGD(model.parameters(), lr=0.1)
    k = latest(given.folder)
    state = {"model": model.state_dict(), "kfac": DistributedState(preconditioner)}
    if k:
        checkpoint.load(state, checkpoint_id=given.folder / str(k))
        model.load_state_dict(state["model"])
    fate = random.Random(1000 + start)
    victim, moment = fate.randrange(world), fate.random() * given.within
    log = given.folder / f"log.{rank}"
    with log.open("a", encoding="utf-8") as lines:
        print(f"start {start} at {k}", file=lines)
    step = k
    try:
        while step < given.steps:
            x, y = (t.tensor_split(world)[rank] for t in batch_of(step))
            optimizer.zero_grad()
            outputs = called(x)
            preconditioner.update(outputs)
            loss_of(outputs, y, world).backward()
            preconditioner.step()
            optimizer.step()
            step += 1
            if start < given.kills and rank == victim and step == k + 1:
                threading.Thread(target=doomed, args=(moment,), daemon=True).start()
            if start < given.kills:
                time.sleep(0.02)  # so that no start ends before its kill
                step = min(step, given.steps - 1)
            if step % INTERVAL == 0 and step > latest(given.folder):
                checkpoint.save(state, checkpoint_id=given.folder / str(step))
            with log.open("a", encoding="utf-8") as lines:
                print(f"step {step}", file=lines)
    except Exception as error:
        with log.open("a", encoding="utf-8") as lines:
            print(f"lost {start} at {step}: {' '.join(str(error).split())[:200]}", file=lines)
        raise
    with log.open("a", encoding="utf-8") as lines:
        print(f"done {step}", file=lines)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
