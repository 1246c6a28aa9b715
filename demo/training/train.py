"""Resumable trainer: one single-threaded process per core on shared memory, or one process on a GPU.

    python -m demo.training.train RUN [--from demo/model|EARLIER_RUN] [--plan PLAN] [--share 1]
        [--device cpu|cuda] [--processes 2]

--from a checkpoint folder takes its weights; from an earlier run, its dense heads and momenta too. RUN/plan.json is
made from PLAN (demo/training/plan.json) when missing, with --share of its budget, and re-read every 25 steps:
  cpu_minutes  the budget: consumed CPU time of all processes together (on CUDA: seconds of the run / 60), so that a
               run that is paused does not lose its schedule;
  rate         learning-rate factor at its peak (1: Muon 0.02, Adam 2e-3); rises over `warm` of the budget, stays
               until `hold`, then falls linearly to zero at its end;
  mix, late    weights of the tasks of demo/training/pictures.py; `late` replaces `mix` after `late_from`;
  seed         of the pictures: a run from an earlier run's weights takes another, or it sees the same ones again;
  micro        batches of different tasks per step and process; aux: weight of the dense heads.
RUN/state.pt holds everything; RUN/log.jsonl gets a line per 25 steps; RUN/pids the process ids.
On a CPU, LD_PRELOAD=libtcmalloc_minimal.so.4 makes it faster.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from demo.training import pictures
from demo.training.losses import Heads, losses
from demo.training.model import Model
from demo.training.optimizer import adam_step, muon_step


def fastest_compute(device: str) -> torch.dtype:
    """bfloat16 where products in it are faster than in float32: always on a GPU, on some CPUs (one Zen 4 was seen at
    180 against 70 GFLOP/s a core, another at 85 against 150)."""
    if device == "cuda":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2400, 192).to(dtype), torch.randn(768, 192).to(dtype)
        times = []
        for _ in range(20):
            began = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times)
    return min(seconds, key=lambda dtype: seconds[dtype])


def rate_factor(plan: dict, progress: float) -> float:
    """The learning-rate factor at a fraction of the budget."""
    if progress < plan["warm"]:
        return plan["rate"] * max(0.05, progress / plan["warm"])
    return plan["rate"] * max(0.0, min(1.0, (1 - progress) / (1 - plan["hold"])))


class Worker:
    """One of `world` processes. Weights, optimizer state and gradients lie in shared memory: each differentiates its
    own pictures, then updates its own share of the parameters with everybody's gradients."""

    def __init__(self, rank: int, run: Path, device: str, shared: dict[str, Any]) -> None:
        self.rank, self.run, self.device, self.shared = rank, run, torch.device(device), shared
        self.world, self.state = shared["world"], shared["state"]
        self.model, self.heads = shared["model"], shared["heads"]
        self.model.set_compute(shared["compute"])
        self.named = named_parameters(self.model, self.heads)
        self.spans, self.gradients = shared["spans"], shared["gradients"]
        for n, p in self.named.items():
            a, z = self.spans[n]
            p.grad = self.gradients[rank, a:z].view(p.shape)
        mine = self._share()
        self.matrices = [(n, self.named[n]) for n in mine if self.is_matrix(n)]
        self.others = [(n, self.named[n]) for n in mine if not self.is_matrix(n)]
        self.began, self.used_before = time.time(), self.state["used"]
        self.ema: dict[str, dict[str, float]] = self.state["ema"]

    def is_matrix(self, name: str) -> bool:
        """Whether Muon takes it."""
        return self.named[name].dim() == 2 and "embed" not in name and not name.startswith("heads.")

    def _share(self) -> list[str]:
        def cost(n: str) -> float:
            s = self.named[n].shape
            return min(s) ** 2 * max(s) if self.is_matrix(n) else self.named[n].numel()

        shares: list[list[str]] = [[] for _ in range(self.world)]
        load = [0.0] * self.world
        for n in sorted(self.named, key=lambda n: -cost(n)):
            i = int(np.argmin(load))
            shares[i].append(n)
            load[i] += cost(n)
        return shares[self.rank]

    def gradient(self, name: str) -> torch.Tensor:
        """Everybody's mean."""
        a, z = self.spans[name]
        return self.gradients[:, a:z].mean(0).view(self.named[name].shape)

    def used(self) -> float:
        """Minutes of the budget used so far."""
        if self.device.type == "cuda":
            return self.used_before + (time.time() - self.began) / 60
        return self.used_before + self.world * sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) / 60

    def wait(self) -> None:
        """For the other processes."""
        if self.world > 1:
            self.shared["barrier"].wait()

    def save(self, step: int) -> None:
        """Everything, atomically."""
        self.state.update(step=step, used=self.used(), ema=self.ema)
        path = self.run / "state.pt"
        whole = dict(self.state, model=self.model.state_dict(), heads=self.heads.state_dict())
        torch.save(whole, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def note(self, names: list[str], figures: list[dict[str, float]]) -> None:
        """Running means by task."""
        for name, out in zip(names, figures):
            e = self.ema.setdefault(name, {})
            for k, v in out.items():
                if v == v:
                    e[k] = v if k not in e else e[k] + 0.05 * (v - e[k])

    def train(self) -> None:
        """Until the budget is used."""
        step = self.state["step"]
        seed = json.loads((self.run / "plan.json").read_text()).get("seed", 0)
        rng, common = np.random.default_rng([2000 + step, self.rank, seed]), np.random.default_rng([7, step, seed])
        plan, logged, saved, seen = {}, time.time(), time.time(), 0
        progress = self.shared["progress"]
        while True:
            if step % 25 == 0 or not plan:  # every process reads it at the same step
                self.wait()
                plan = json.loads((self.run / "plan.json").read_text())
                if self.rank == 0:
                    progress[0] = self.used() / plan["cpu_minutes"]
                self.wait()
            done = float(progress[0])
            if done >= 1:
                break
            factor = rate_factor(plan, done)
            mix = plan["late"] if done > plan["late_from"] else plan["mix"]
            names, weights = list(mix), np.array(list(mix.values()), float)
            todo = [names[int(common.choice(len(names), p=weights / weights.sum()))] for _ in range(plan["micro"])]
            self.gradients[self.rank].zero_()
            figures = []
            for name in todo:
                batch = pictures.make(name, rng, np.random.default_rng(int(common.integers(1 << 31))))
                both = bool(common.random() < 0.5)
                loss, out = losses(self.model, self.heads, batch, plan["aux"], self.device, both)
                (loss / len(todo)).backward()
                seen += len(batch["q"]) * self.world
                figures.append(out)
            self.note(todo, figures)
            self.wait()
            momentum, compute = self.state["momentum"], self.shared["compute"]
            muon_step(self.matrices, self.gradient, momentum, 0.02 * factor, compute=compute)
            fresh = min(1.0, (1 - done) / 0.5)  # the heads start from nothing: a high rate at once
            rates = {"heads.": 2e-3 * fresh, "model.embed_tokens": 3e-3 * factor, "visual.patch_embed": 3e-4 * factor}

            def rate(n: str, rates: dict[str, float] = rates, factor: float = factor) -> float:
                return next((r for start, r in rates.items() if n.startswith(start)), 2e-3 * factor)

            adam_step(self.others, self.gradient, self.state["first"], self.state["second"], rate, step + 1)
            step += 1
            if self.rank == 0:
                progress[0] = self.used() / plan["cpu_minutes"]
            self.wait()
            if self.rank == 0 and step % 25 == 0:
                record = dict(step=step, minutes=round(self.used(), 2), per_s=round(seen / (time.time() - logged), 1))
                record["factor"] = round(factor, 4)
                record |= {n: {k: round(v, 3) for k, v in self.ema[n].items()} for n in names if n in self.ema}
                with (self.run / "log.jsonl").open("a") as f:
                    f.write(json.dumps(record) + "\n")
                logged, seen = time.time(), 0
                if time.time() - saved > plan["save_seconds"]:
                    self.save(step)
                    saved = time.time()
        if self.rank == 0:
            self.save(step)


def named_parameters(model: Model, heads: Heads) -> dict[str, torch.nn.Parameter]:
    """All of both, the heads' under "heads."."""
    return dict(model.named_parameters()) | {"heads." + n: p for n, p in heads.named_parameters()}


def prepare(run: Path, start: Path | None, device: str, world: int) -> dict[str, Any]:
    """The run's state, resumed, or begun from a checkpoint folder, an earlier run or nothing."""
    torch.manual_seed(0)
    model = Model()
    heads = Heads(model.c)
    saved = run / "state.pt"
    if start and (start / "state.pt").exists() and not saved.exists():
        saved = start / "state.pt"
    elif start and not saved.exists():
        model.load_state_dict({k: v.float() for k, v in load_file(start / "model.safetensors").items()})
    model.to(device)
    heads.to(device)
    named = named_parameters(model, heads)
    state: dict[str, Any] = dict(step=0, used=0.0, ema={})
    for kind in ("momentum", "first", "second"):
        state[kind] = {n: torch.zeros_like(p, requires_grad=False) for n, p in named.items()}
    if saved.exists():
        s = torch.load(saved, weights_only=False, map_location=device)
        model.load_state_dict(s.pop("model"))
        heads.load_state_dict(s.pop("heads"))
        if saved.parent != run:  # another run's: this one's budget and log begin anew
            s |= dict(step=0, used=0.0, ema={})
        state.update(s)
    spans, at = {}, 0
    for n, p in named.items():
        spans[n] = (at, at + p.numel())
        at += p.numel()
    gradients, progress = torch.zeros(world, at, device=device), torch.zeros(1, dtype=torch.float64)
    if world > 1:
        tensors = [*named.values(), gradients, progress]
        for kind in ("momentum", "first", "second"):
            tensors += state[kind].values()
        for t in tensors:
            t.data = t.data.contiguous()
            t.share_memory_()
    shared = dict(model=model, heads=heads, state=state, spans=spans, gradients=gradients, progress=progress)
    return shared | dict(world=world, compute=fastest_compute(device))


def work(rank: int, run: Path, device: str, shared: dict[str, Any]) -> None:
    """A process's life."""
    torch.set_num_threads(1)
    Worker(rank, run, device, shared).train()


def main() -> None:
    """See the module."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run", type=Path)
    ap.add_argument("--from", dest="start", type=Path)
    ap.add_argument("--plan", type=Path, default=Path(__file__).parent / "plan.json")
    ap.add_argument("--share", type=float, default=1.0, help="of the plan's budget, to try a plan out")
    ap.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    ap.add_argument("--processes", type=int, default=0, help="of a CPU run; default: its cores")
    o = ap.parse_args()
    if o.share <= 0:
        ap.error(f"--share is {o.share:g}, expected more than 0")
    world = 1 if o.device == "cuda" else o.processes or len(os.sched_getaffinity(0))
    o.run.mkdir(parents=True, exist_ok=True)
    if not (o.run / "plan.json").exists():
        plan = json.loads(o.plan.read_text())
        plan["cpu_minutes"] *= o.share
        (o.run / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")
    torch.set_num_threads(1 if o.device == "cpu" else 4)
    shared = prepare(o.run, o.start, o.device, world)
    if world == 1:
        (o.run / "pids").write_text(f"{os.getpid()}\n")
        Worker(0, o.run, o.device, shared).train()
        return
    context = mp.get_context("fork")
    shared["barrier"] = context.Barrier(world)
    processes = [context.Process(target=work, args=(r, o.run, o.device, shared)) for r in range(world)]
    for p in processes:
        p.start()
    (o.run / "pids").write_text("\n".join(str(p) for p in [os.getpid(), *(p.pid for p in processes)]) + "\n")
    while all(p.exitcode is None for p in processes):
        time.sleep(1)
    if any(p.exitcode for p in processes):  # one died: do not leave the others at the barrier
        for p in processes:
            p.kill()
    for p in processes:
        p.join()


if __name__ == "__main__":
    main()
