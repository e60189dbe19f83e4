"""
On several processes
====================

A loop of torch.distributed needs nothing but the preconditioner itself: it takes the processes from the wrapped model.
Each layer's inverse is made by one of them, and the step is that of one process on the whole batch.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt

# %%
# The script
# ----------
#
# An ordinary one for ``torchrun``. Every process takes its part of each mini-batch; ``DistributedDataParallel`` means
# their gradients, and the preconditioner sums their statistics. So that any number of processes can be compared, two
# things are not as usual: the Fisher matrix is the exact one, for which no targets are drawn, and all inverses are new
# in each step. Else a layer's turn to be refreshed depends on how many share the work.

SCRIPT = """
import json, sys
import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from kfaclinalg_torch import KFACPreconditioner

distributed.init_process_group("gloo")  # "nccl" on GPUs
rank, world = distributed.get_rank(), distributed.get_world_size()
torch.set_num_threads(1)
digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10))
model = nn.parallel.DistributedDataParallel(model)
same = {"estimator": "exact", "statistics_period": 1, "inverse_period": 1}
preconditioner = KFACPreconditioner(model, likelihood="categorical", placement=sys.argv[1], **same)
optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, nesterov=True)
generator, losses = torch.Generator().manual_seed(0), []
for _ in range(60):
    batch = torch.randint(len(x), (120,), generator=generator).tensor_split(world)[rank]
    optimizer.zero_grad()
    outputs = model(x[batch])
    preconditioner.update(outputs)
    loss = nn.functional.cross_entropy(outputs, y[batch])
    loss.backward()
    preconditioner.step()
    optimizer.step()
    distributed.all_reduce(loss.detach_())
    losses.append(loss.item() / world)
if rank == 0:
    print(json.dumps(losses))
distributed.destroy_process_group()
"""

# %%
# What it gives
# -------------
#
# By one process, by two that all hold the inverses, and by two of which each holds those of its own layers.


def run(processes, placement):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "train.py"
        path.write_text(SCRIPT, encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run([*command, str(path), placement], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


alone = run(1, "replicated")
shared = {placement: run(2, placement) for placement in ("replicated", "owner")}

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
left.semilogy(alone, label="one process", color="#8a9097", linewidth=4)
for (placement, losses), colour in zip(shared.items(), ("#0072B2", "#D55E00"), strict=True):
    left.semilogy(losses, label=f"two, {placement}", color=colour, linewidth=1)
    right.semilogy([abs(a - b) / a + 1e-9 for a, b in zip(alone, losses, strict=True)], color=colour, label=placement)
left.set(xlabel="step", ylabel="loss of the batch")
left.legend(frameon=False)
right.set(xlabel="step", title="relative difference to one process")
plt.show()
difference = max(abs(a - b) / a for a, b in zip(alone[:20], shared["owner"][:20], strict=True))
print(f"the largest difference in the first 20 steps is {difference:.0e} of the loss")
assert difference < 1e-4

# %%
# Rounding is what differs, for sums are taken in another order.
#
# Next: :doc:`/distributed` has FSDP2 and HSDP, what travels, what happens when a process dies, and checkpoints that any
# number of processes can load.
