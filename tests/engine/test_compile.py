"""torch.compile inside the sandbox, in a real ./run.sh: it needs a compiler and a place to execute what that builds."""

from __future__ import annotations

from repository import CANDIDATES, Project

COMPILES = """
import time
import torch
from torch import nn

if __name__ == "__main__":
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))
    x, found, started = torch.randn(16, 32), [], time.monotonic()
    for f in (model, torch.compile(model)):
        model.zero_grad()
        y = f(x)
        y.square().mean().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*found)
    from torch._dynamo.utils import counters
    assert counters["inductor"], "nothing was compiled"
    print(f"compiled like eager after {time.monotonic() - started:.0f} s", flush=True)
"""


def test_torch_compile_works_in_the_sandbox(fast: Project):
    fast.write("train.py", COMPILES + CANDIDATES["discarded"])
    done, shown = fast.experiment("compile a small model, forward and backward, as eager computes it")
    assert (done.returncode, shown["verdict"]) == (0, "discarded"), done.stdout + done.stderr
    log = fast.git("show", f"refs/experiments/{shown['experiment']}:experiment/train.log")
    assert "compiled like eager after" in log, log
