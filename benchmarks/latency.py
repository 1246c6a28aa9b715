"""Latency and memory of bundles beside transformers, measured in one run.

Method: every round starts each contender once in a process of its own, pinned to the same cores, and the order
rotates; so what else the machine does hits all alike. A process opens the model, answers one warm-up request and
then `--requests` requests about different pictures; stages are wall-clock times inside it, memory is its own peak
(VmHWM). Ratios are taken round by round. Pictures are preprocessed by edgevl for all contenders.

    python -m edgevl.benchmarks.latency CHECKPOINT BUNDLE... [--size 448x448] [--prompt-tokens 286] [--json FILE]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.doctor import cpu_flags, cpu_model, machine, peak_rss_bytes
from edgevl.runtime.errors import EdgeVLError

__all__ = ["TokenClock", "Workload", "main", "messages_for", "spread"]

METRICS = ("open_s", "vision_s", "prefill_s", "ttft_s", "decode_tokens_per_s", "peak_mb")


@dataclass(frozen=True)
class Workload:
    """One request shape: a picture of noise (no two alike) and a text that fills the prompt to a number of tokens."""

    width: int = 448
    height: int = 448
    prompt_tokens: int = 286
    new_tokens: int = 64
    requests: int = 3
    threads: int = 2
    cores: tuple[int, ...] = ()

    def picture(self, index: int) -> Image.Image:
        rng = np.random.default_rng(1000 + index)
        return Image.fromarray(rng.integers(0, 256, (self.height, self.width, 3), dtype=np.uint8))


@dataclass
class Result:
    """What one process measured: one entry per request, but for opening and memory."""

    contender: str
    versions: dict[str, str]
    measured: dict[str, list[float]] = field(default_factory=dict)


# ---------------------------------------------------------------------- inside a process


def messages_for(model: Any, work: Workload, picture: Image.Image) -> list[dict[str, Any]]:
    """A question about `picture` whose prompt has exactly `prompt_tokens` tokens."""

    def messages(image: Any, words: int) -> list[dict[str, Any]]:
        # A system prompt of its own: the template's default one is of different length in every tokenizer.
        content = [{"type": "image", "image": image}, {"type": "text", "text": " ".join(["a"] * words)}]
        return [{"role": "system", "content": "a"}, {"role": "user", "content": content}]

    encoded = model.encode_image(picture)
    shortest = len(model.prepare(messages(encoded, 1)).ids)
    for words in range(1, work.prompt_tokens):
        size = len(model.prepare(messages(encoded, words)).ids)
        if size >= work.prompt_tokens:
            break
    if size != work.prompt_tokens:
        raise click.ClickException(
            f"the prompt cannot have {work.prompt_tokens} tokens: the picture and one word need {shortest}"
        )
    return messages(picture, words)


def _measure_bundle(path: str, work: Workload) -> Result:
    started = time.perf_counter()
    from edgevl.runtime import VisionLanguageModel

    model = VisionLanguageModel.open(path, "ort-cpu", threads=work.threads, image_cache_mb=0)
    opened = time.perf_counter() - started
    result = Result(Path(path).name, {"onnxruntime": machine().get("onnxruntime", "")}, {"open_s": [opened]})
    rows: list[Any] = []
    messages = messages_for(model, work, work.picture(0))
    for i in range(work.requests + 1):
        messages[-1]["content"][0]["image"] = work.picture(i)
        rows.append(model.generate(messages, max_new_tokens=work.new_tokens, eos_token_ids=(-1,)).timings)
    rows = rows[1:]
    result.measured |= {
        "vision_s": [t.vision_s for t in rows],
        "prefill_s": [t.prefill_s for t in rows],
        "ttft_s": [t.first_token_s for t in rows],
        "decode_tokens_per_s": [t.tokens_per_s for t in rows],
        "peak_mb": [peak_rss_bytes() / 1e6],
    }
    return result


class TokenClock:
    """A transformers streamer that keeps when every token came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        pass


def _measure_transformers(checkpoint: str, bundle: str, work: Workload) -> Result:
    # The prompt's ids come from the bundle's tokenizer, in a process that has ended before torch is loaded.
    code = f"from edgevl.benchmarks import latency; latency._print_ids({bundle!r}, {json.dumps(asdict(work))!r})"
    ids = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    started = time.perf_counter()
    import torch
    import transformers

    from edgevl.runtime.image_processing import ImageProcessorConfig, preprocess_image

    torch.set_num_threads(work.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    opened = time.perf_counter() - started
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    result = Result("transformers bf16", versions, {"open_s": [opened], "vision_s": [], "ttft_s": []})
    result.measured["decode_tokens_per_s"] = []
    processor = ImageProcessorConfig.from_folder(checkpoint)
    for i in range(work.requests + 1):
        clock, began = TokenClock(), time.perf_counter()
        done = preprocess_image(work.picture(i), processor)
        pixels = torch.from_numpy(done.pixel_values).to(torch.bfloat16)
        grid = torch.tensor([[done.grid.t, done.grid.h, done.grid.w]])
        with torch.inference_mode():
            model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                pixel_values=pixels,
                image_grid_thw=grid,
                mm_token_type_ids=(torch.tensor([ids]) == model.config.image_token_id).int(),
                max_new_tokens=work.new_tokens,
                min_new_tokens=work.new_tokens,
                do_sample=False,
                streamer=clock,
            )
            vision_began = time.perf_counter()
            model.model.visual(pixels, grid)
            vision = time.perf_counter() - vision_began
        if i:
            result.measured["vision_s"].append(vision)
            result.measured["ttft_s"].append(clock.times[0] - began)
            rate = (len(clock.times) - 1) / (clock.times[-1] - clock.times[0])
            result.measured["decode_tokens_per_s"].append(rate)
    result.measured["peak_mb"] = [peak_rss_bytes() / 1e6]
    return result


def _print_ids(bundle: str, work_json: str) -> None:
    from edgevl.runtime import VisionLanguageModel

    work = _workload(work_json)
    model = VisionLanguageModel.open(bundle, "ort-cpu", threads=work.threads)
    messages = messages_for(model, work, work.picture(0))
    sys.stdout.write(json.dumps(model.prepare(messages).ids.tolist()))


def _workload(text: str) -> Workload:
    data = json.loads(text)
    return Workload(**{**data, "cores": tuple(data["cores"])})


def worker(kind: str, path: str, bundle: str, work_json: str) -> None:
    """Entry of one measuring process: prints its Result as one JSON line."""
    work = _workload(work_json)
    if work.cores:
        os.sched_setaffinity(0, work.cores)
    result = _measure_bundle(path, work) if kind == "bundle" else _measure_transformers(path, bundle, work)
    sys.stdout.write(json.dumps(asdict(result)) + "\n")


# ---------------------------------------------------------------------- the run


def run_rounds(contenders: list[tuple[str, str]], bundle: str, work: Workload, rounds: int) -> list[list[Result]]:
    """Results by contender and round; the order of the contenders rotates."""
    results: list[list[Result]] = [[] for _ in contenders]
    environment = {**os.environ, "OMP_NUM_THREADS": str(work.threads), "TOKENIZERS_PARALLELISM": "false"}
    with tqdm(total=rounds * len(contenders), unit="process", file=sys.stderr, disable=None) as bar:
        for number in range(rounds):
            for offset in range(len(contenders)):
                index = (number + offset) % len(contenders)
                kind, path = contenders[index]
                bar.set_postfix_str(Path(path).name)
                code = "import sys; from edgevl.benchmarks import latency; latency.worker(*sys.argv[1:])"
                command = [sys.executable, "-c", code, kind, path, bundle, json.dumps(asdict(work))]
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                if done.returncode:
                    raise click.ClickException(f"{kind} {path} failed:\n{done.stderr[-2000:]}")
                results[index].append(Result(**json.loads(done.stdout.splitlines()[-1])))
                bar.update()
    return results


def spread(values: list[float]) -> str:
    if not values:
        return ""
    middle = statistics.median(values)
    digits = 0 if middle > 100 else 2 if middle < 10 else 1
    return f"{middle:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def summary(results: list[list[Result]], baseline: int | None) -> str:
    """A table: medians over all rounds, and the median ratio to the baseline taken round by round, with spreads."""
    headers = ["", "open s", "vision s", "prefill s", "TTFT s", "decode tok/s", "peak MB"]
    rows = []
    for rounds in results:
        pooled = {m: [v for r in rounds for v in r.measured.get(m, [])] for m in METRICS}
        rows.append([rounds[0].contender, *(spread(pooled[m]) for m in METRICS)])
    table = tabulate(rows, headers=headers, tablefmt="github")
    if baseline is None:
        return table
    rows = []
    for rounds in results:
        cells = [rounds[0].contender]
        for metric in METRICS:
            pairs = [(r.measured.get(metric), b.measured.get(metric)) for r, b in zip(rounds, results[baseline])]
            cells.append(spread([statistics.median(a) / statistics.median(b) for a, b in pairs if a and b]))
        rows.append(cells)
    name = results[baseline][0].contender
    return f"{table}\n\nratio to {name}\n\n{tabulate(rows, headers=headers, tablefmt='github')}"


@click.command()
@click.argument("checkpoint")
@click.argument("bundles", nargs=-1, required=True)
@click.option("--size", default="448x448", show_default=True, help="Picture, width x height.")
@click.option("--prompt-tokens", default=286, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--requests", default=3, show_default=True, help="Measured requests per process.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--no-transformers", is_flag=True, help="Bundles only.")
@click.option("--json", "json_path", help="Write all results as JSON lines.")
def main(checkpoint: str, bundles: tuple[str, ...], **options: Any) -> None:
    """Measure BUNDLES beside transformers (bf16, sdpa) on CHECKPOINT."""
    try:
        width, height = (int(x) for x in options["size"].lower().split("x"))
        for bundle in bundles:
            Bundle.open(bundle)
    except ValueError:
        raise click.UsageError(f"size {options['size']!r}: expected WIDTHxHEIGHT, such as 448x448") from None
    except EdgeVLError as e:
        raise click.UsageError(str(e)) from None
    cores = tuple(sorted(os.sched_getaffinity(0))[: options["threads"]])
    work = Workload(
        width, height, options["prompt_tokens"], options["new_tokens"], options["requests"], options["threads"], cores
    )
    contenders = [("bundle", b) for b in bundles]
    if not options["no_transformers"]:
        contenders.insert(0, ("transformers", checkpoint))
    results = run_rounds(contenders, bundles[0], work, options["rounds"])
    click.echo(f"{cpu_model()} ({', '.join(cpu_flags())}), {work.threads} threads, checkpoint {Path(checkpoint).name}")
    picture = f"{width}×{height} picture, {work.prompt_tokens} prompt tokens, {work.new_tokens} new tokens"
    click.echo(f"{picture}, {options['rounds']} rounds of {work.requests} requests; median (min–max)\n")
    click.echo(summary(results, None if options["no_transformers"] else 0))
    if options["json_path"]:
        head = {"machine": machine(), "cpu_flags": cpu_flags(), "workload": asdict(work)}
        lines = [json.dumps({**head, "round": n, **asdict(r)}) for rs in results for n, r in enumerate(rs)]
        Path(options["json_path"]).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
