"""What `edgevl bench` tells: tables that fit and cut no figure, a page that shows what the JSON lines hold."""

from __future__ import annotations

import copy
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import Pair
from test_cli import edgevl

from edgevl.benchmarks import closed_loop_report, open_loop_report, plotting, report
from edgevl.benchmarks.closed_loop_report import ceiling_table, closed_plots, latency_table, stage_table
from edgevl.benchmarks.machine_report import machine_table, system_rows
from edgevl.benchmarks.open_loop_report import load_table, open_plots, wait_table
from edgevl.benchmarks.plotting import case_labels, case_styles, figure, legend, row_figure
from edgevl.benchmarks.report import html_page, print_table, read_lines
from edgevl.benchmarks.report_table import Piece, Printer, pieces
from edgevl.benchmarks.stages import STAGES

LONG = "qwen2-vl-2b-instruct-w8a8-smoothed-vision-int8-decoder-hybrid"
ABSENT = {"RAPL": "no zones", "INA": "no sensors", "NVML": "not installed"}


def spread(p50: float) -> dict[str, float]:
    return {"p50": p50, "p95": 2 * p50, "p99": 4 * p50, "min": p50 / 2, "max": 5 * p50, "n": 3}


def request(number: int, **changes: Any) -> dict[str, Any]:
    found = {"ttft_s": [0.2 + 0.1 * number], "steps_s": [0.05, 0.06], "total_s": 0.4, "at_s": 0.5 * number}
    return {**found, "rss_mb": 100.0 + number, "mhz": None, "celsius": None, "round": 0, **changes}


def closed_case(bundle: str = "int8", workload: str = "picture", **changes: Any) -> dict[str, Any]:
    """As `case_of` (cases.py) makes them; figures by hand."""
    case = {
        "schema": report.SCHEMA, "date": "2026-01-02", "loop": "closed", "checkpoint": "real",
        "system": {"processor": "a processor", "threads": 2, "cpu_flags": ["avx2", "vnni"], "gpus": [],
                   "governor": None, "hypervisor": True},
        "bundle": bundle, "precision": "int8", "engine": "ort-cpu", "describe": f"what {workload} asks",
        "workload": {"name": workload, "concurrency": 1},
        "cold_s": [1.0, 3.0, 2.0], "open_s": [0.5], "minutes": 0.0, "throttled": None,
        "ttft_s": spread(0.25), "tpot_s": spread(0.0502), "total_s": spread(1.5), "tokens_per_s": spread(19.9),
        "detokenize_s": spread(0.00123), "stages": {s: spread(0.01 * (i + 1)) for i, s in enumerate(STAGES)},
        "memory_mb": {"peak": 2345.6, "after_open": 1000.0, "arena_mb": None, "peak_gpu_mb": None},
        "energy": {"j_per_request": None, "j_before_first_token": None, "j_per_token": None, "j_per_picture": None,
                   "sources": [], "absent": ABSENT},
        "roofline": {"read_gb_s": 40.0, "gemm_gop_s": {"fp32": 200.0, "int8": 1800.0}, "kind": "int8", "absent": {},
                     "vision": 0.25, "prefill": 0.5, "decode": 0.75, "decode_bytes": 1.5e9},
        "requests": [request(0), request(1)],
    }  # fmt: skip
    return {**copy.deepcopy(case), **changes}


def open_case(bundle: str = "int8", rate: int = 4, **changes: Any) -> dict[str, Any]:
    """As `case_of` makes them of an open loop."""
    one = {"at_s": 0.0, "queue_s": 0.1, "ttft_s": 0.3, "total_s": 0.5, "round": 0}
    load = {"offered_per_s": rate, "served_per_s": 3.5, "tokens_per_s": 70.0, "batch_size": 1.5, "busy": 0.83}
    case = closed_case(bundle, f"picture {rate}/s")
    for name in ("stages", "roofline", "tokens_per_s", "detokenize_s", "minutes"):
        del case[name]
    return {
        **case, "loop": "open", "queue_s": spread(0.1), "requests": [one, {**one, "at_s": 1.0}],
        "energy": {"j_per_request": None, "j_per_picture": None, "sources": [], "absent": ABSENT},
        "load": {**load, "waiting": 0.4, "overloaded": rate > 9, "verdict": "keeps up, in words"}, **changes,
    }  # fmt: skip


def nine() -> list[dict[str, Any]]:
    return [closed_case(b, w) for b in ("int8", "int4", "hybrid") for w in ("picture", "thumbnail", "batch-4")]


def printed(cases: list[dict[str, Any]], room: int | None, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_table(cases, Printer(room))
    return capsys.readouterr().out.splitlines()


# ---------------------------------------------------------------- the terminal


def test_columns_are_dealt_out_to_tables_that_fit():
    assert pieces((6, 8), (5, 10), 40) == [Piece((6, 8), (0, 1))]
    # all fit with the names folded, and what is left over is the names'
    assert pieces((60, 8), (5, 10), 40) == [Piece((11, 8), (0, 1))]
    # never: two tables
    assert pieces((60, 8), (20, 10, 5), 40) == [Piece((8, 8), (0,)), Piece((11, 8), (1, 2))]
    # wider than the terminal: alone, and not cut
    assert pieces((60, 8), (5, 50), 40) == [Piece((23, 8), (0,)), Piece((8, 8), (1,))]


@pytest.mark.parametrize("room", [30, 40, 60, 80, 100, 120, 200])
def test_a_piece_fits_and_no_column_is_lost(room):
    names, figures = (61, 15), (6, 21, 16, 10, 18, 9, 9)
    found = pieces(names, figures, room)
    assert [i for piece in found for i in piece.figures] == list(range(len(figures)))
    for piece in found:
        width = sum(piece.names) + 2 + sum(2 + figures[i] for i in piece.figures)
        assert width <= room or (len(piece.figures) == 1 and piece.names == (8, 8))


@pytest.mark.parametrize("name", ["int8", LONG])
@pytest.mark.parametrize("room", [80, 120])
def test_no_figure_is_cut_on_a_terminal(room, name, capsys):
    cases = [closed_case(name, "document"), open_case(name, 12)]
    lines = printed(cases, room, capsys)
    assert max(map(len, lines)) <= room
    text = "\n".join(lines)
    assert "…" not in text
    for table in (
        latency_table(cases[:1]),
        stage_table(cases[:1], False),
        wait_table(cases[1:]),
        load_table(cases[1:]),
    ):
        assert table is not None
        for column, figure_of in zip(table.columns[2:], table.rows[0][2:]):
            assert column in text and re.search(rf"(^| ){re.escape(figure_of)}( |$)", text, re.MULTILINE)


def test_what_fits_into_80_columns_is_one_table(capsys):
    lines = printed([closed_case(tpot_s=spread(0.02))], 80, capsys)
    assert "bundle  workload  cold s                 TTFT s          ms / token  tokens / s" in lines
    assert "int8    picture     2.00  0.250 / 0.500 / 1.000  20.0 / 40.0 / 80.0        19.9" in lines
    assert "bundle  workload  file  resize  patches  vision  prompt  prefill  detokenize" in lines


def test_without_a_terminal_a_table_is_as_wide_as_it_needs(capsys):
    lines = printed([closed_case(LONG, "document")], None, capsys)
    row = f"{LONG}  document    2.00  0.250 / 0.500 / 1.000  50.2 / 100.4 / 200.8        19.9  1.50 / 3.00 / 6.00"
    assert row in lines and len(row) > 120
    assert not any(line.endswith(" ") for line in lines)


def test_names_of_folders_are_no_markup(capsys):
    name = "[bold]a:smile:[/x]"
    assert any(line.startswith(f"{name}  picture ") for line in printed([closed_case(name)], None, capsys))


def test_blank_columns_are_left_out(capsys):
    blank, nothing = {"p50": 0.0, "p95": 0.0, "p99": 0.0, "min": 0.0, "max": 0.0, "n": 3}, {"n": 0}
    stages = {s: blank if s in STAGES[:4] else spread(0.01) for s in STAGES}
    roofline = {"read_gb_s": 40.0, "gemm_gop_s": {"int8": 1800.0}, "absent": {}, "prefill": 0.5}
    text = closed_case(stages=stages, roofline=roofline, tpot_s=nothing, tokens_per_s=nothing)
    heads = [line.split()[2:] for line in printed([text], None, capsys) if line.startswith("bundle ")]
    assert heads[0] == ["cold", "s", "TTFT", "s", "last", "token", "s"]
    assert heads[1] == ["prompt", "prefill", "detokenize"] and heads[2] == ["prefill", "%"]
    assert heads[3] == ["peak", "MB"]
    table = stage_table([text, closed_case()], tails=False)  # not blank for all
    assert table is not None and table.columns[2] == "file" and [row[2] for row in table.rows] == ["", "10.0"]


# ---------------------------------------------------------------- figures that were in the JSON lines only


def test_percentiles_of_a_closed_loop():
    case = closed_case(workload="batch-4")
    case["workload"]["concurrency"] = 4
    table = latency_table([case])
    assert table is not None and table.columns[2:] == ("cold s", "TTFT s", "ms / token", "tokens / s", "last token s")
    assert table.rows[0][2:] == ("2.00", "0.250 / 0.500 / 1.000", "50.2 / 100.4 / 200.8", "19.9", "1.50 / 3.00 / 6.00")
    assert "each of the requests answered together" in table.notes[0]
    stages = stage_table([case], tails=True)
    assert stages is not None and stages.rows[0][2] == "10.0\n20.0 / 40.0"
    assert stages.columns[-1] == "detokenize" and stages.rows[0][-1] == "1.23\n2.46 / 4.92"


def test_the_ceilings_are_told():
    case = closed_case()
    case["workload"]["concurrency"] = 2
    table = ceiling_table([case])
    assert table is not None
    assert dict(zip(table.columns[2:], table.rows[0][2:])) == {
        "vision %": "25", "prefill %": "50", "decode %": "75", "decode GB/s": "30.0", "MB read / token": "750.0",
    }  # fmt: skip
    assert table.notes == (
        "the ceiling of decode: memory is read at 40.0 GB/s by 2 threads",
        "the ceiling of vision and prefill: int8 matrix products at 1,800 GOP/s (fp32: 200)",
    )
    case["roofline"] |= {"gemm_gop_s": {"fp32": 200.0}, "kind": "fp32", "absent": {"int8 GEMM": "needs onnxruntime"}}
    table = ceiling_table([case, case])
    assert table is not None and table.notes[1:] == (  # said once
        "the ceiling of vision and prefill: fp32 matrix products at 200 GOP/s",
        "int8 GEMM absent: needs onnxruntime",
    )


def test_memory_energy_and_heat():
    case = closed_case(workload="batch-4", throttled=3)
    case["workload"]["concurrency"] = 4
    case["memory_mb"] |= {"arena_mb": 1234.5, "peak_gpu_mb": 987.6}
    case["energy"] |= {
        "j_per_request": 50.0,
        "j_per_picture": 3.25,
        "j_per_token": 0.125,
        "sources": ["rapl package-0"],
    }
    case["requests"] = [request(n, mhz=mhz, celsius=60.0 + n) for n, mhz in enumerate((2400.0, 2350.0, 1800.0))]
    opened = open_case(throttled=False)
    opened["energy"] |= {"j_per_request": 7.5, "sources": ["rapl package-0"]}
    table = machine_table([case, opened])
    assert table is not None and table.columns[2:] == (
        "peak MB", "arena MB", "GPU MB", "J / request", "J / picture", "J / token", "MHz", "°C", "throttled",
    )  # fmt: skip
    told = ("2,346", "1,234", "988", "12.50", "3.25", "0.12", "2,350 (1,800)", "62", "3 times")
    assert table.rows[0][2:] == told  # joules of one request of the four
    assert table.rows[1][2:] == ("2,346", "", "", "7.50", "", "", "", "", "no")
    assert table.notes[:2] == (
        "energy of rapl package-0; in an open loop idle seconds count",
        "MHz: median (least) over requests; °C: the highest",
    )


@pytest.mark.parametrize(
    ("throttled", "shown"), [(None, None), (True, "yes"), (False, "no"), (0, "no"), (1, "once"), (2, "2 times")]
)
def test_throttling(throttled, shown):
    table = machine_table([closed_case(throttled=throttled)])
    assert table is not None
    assert (table.rows[0][-1] if table.columns[-1] == "throttled" else None) == shown
    assert ("throttling" in " ".join(table.notes)) == (shown is None)


def test_absent_sensors_are_said_to_be_absent(capsys):
    energy = {**closed_case()["energy"], "absent": {**ABSENT, "arena memory": "not told by the engine"}}
    notes = [
        "RAPL absent: no zones", "INA absent: no sensors", "NVML absent: not installed",
        "arena memory absent: not told by the engine",
        "clock, temperature, throttling absent: not told by this machine",
    ]  # fmt: skip
    lines = printed([closed_case(energy=energy)], None, capsys)
    assert lines[lines.index(notes[0]) :][: len(notes)] == notes
    page = html_page([closed_case(energy=energy)])
    assert all(note[1:] in page for note in notes)
    lines = printed([open_case()], None, capsys)
    assert "clock, temperature absent: not kept in an open loop" in lines and "throttling absent: not told" in str(
        lines
    )


def test_lines_written_before_still_print(capsys):
    case = closed_case()
    case["requests"] = [{**r, "ttft_s": 0.3} for r in case["requests"]]
    for group, name in (("memory_mb", "arena_mb"), ("memory_mb", "peak_gpu_mb"), ("energy", "j_per_picture")):
        del case[group][name]
    del case["roofline"]["kind"]
    assert any("int8 matrix products at 1,800 GOP/s" in line for line in printed([case], None, capsys))
    assert "Time to first token" in html_page([case])


# ---------------------------------------------------------------- the page


@pytest.fixture
def drawn(monkeypatch) -> list[Any]:
    """The figures, as they are handed over to become SVG."""
    figures: list[Any] = []
    for module in (closed_loop_report, open_loop_report):
        real = module.svg
        monkeypatch.setattr(module, "svg", lambda f, real=real: (figures.append(f), real(f))[1])
    return figures


def named(figures: list[Any], label: str) -> Any:
    return next(f for f in figures if any(label in (a.get_ylabel(), a.get_xlabel()) for a in f.axes))


def looks(figure_drawn: Any) -> list[tuple[str, str, str]]:
    """Colour, marker and inside of every line that the legend names."""
    lines = [line for line in figure_drawn.axes[0].lines if not line.get_label().startswith("_")]
    return [(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line in lines]


def test_no_two_cases_look_alike():
    assert len(set(case_styles(112))) == 112
    assert len({(s.colour, s.marker) for s in case_styles(56)}) == 56


def test_nine_cases_look_unlike_in_every_plot(drawn):
    cases = nine()
    for case in cases:
        case["minutes"] = 1.0
    closed_plots(cases, {"int8": 0.01, "int4": 0.03, "hybrid": 0.02})
    labels = [f"{b}, {w}" for b in ("int8", "int4", "hybrid") for w in ("picture", "thumbnail", "batch-4")]
    for label in ("MB", "minutes", "KL to the original"):
        made = named(drawn, label)
        assert len(set(looks(made))) == 9
        assert [text.get_text() for text in made.legends[0].get_texts()] == labels
    drawn.clear()
    open_plots([open_case(b, r) for b in ("a", "b", "c") for r in (1, 5, 12)])
    assert len(set(looks(named(drawn, "waited, s")))) == 9


def test_what_precision_costs_says_of_which_workload(drawn):
    cases = [closed_case("int8", w, tokens_per_s=spread(r)) for w, r in (("picture", 9.0), ("text", 12.0))]
    plots = closed_plots(cases, {"int8": 0.01})
    made = named(drawn, "KL to the original")
    assert [(line.get_label(), *line.get_xydata()[0]) for line in made.axes[0].lines] == [
        ("int8, picture", 9.0, 0.01),
        ("int8, text", 12.0, 0.01),
    ]
    assert plots[-1][0] == "What precision costs"
    assert not [p for p in closed_plots(cases, {"another": 0.1}) if p[0] == "What precision costs"]


@pytest.mark.parametrize(
    "names", [["int8"], [f"bundle-{i}, thumbnail" for i in range(9)], [LONG + str(i) for i in range(9)]]
)
def test_a_legend_takes_no_height_from_the_axes(names):
    made, axes = figure(3.2, labels=names)
    for name in names:
        axes.plot([0, 1], [0, 1], label=name)
    legend(made, names)
    made.canvas.draw()
    height = axes.get_window_extent().height / made.dpi
    width = made.legends[0].get_window_extent().width / made.dpi
    plotting.library("matplotlib.pyplot").close(made)
    assert 2.5 < height < 3.2 and width < 8


def test_long_and_odd_names_are_drawn():
    cases = [closed_case(LONG, "picture"), closed_case("_a$b$", "text")]
    assert case_labels(cases) == [f"{LONG}, picture", r" _a\$b\$, text"]
    made, axes = row_figure(cases, 0.5)
    texts = [text.get_text() for text in axes.get_yticklabels()]
    assert texts == ["qwen2-vl-2b-instruct-w8a8-\nsmoothed-vision-\nint8-decoder-hybrid\npicture", " _a\\$b\\$\ntext"]
    assert made.get_size_inches()[1] == pytest.approx(1.0 + 2 * 0.17 * 4)
    plotting.library("matplotlib.pyplot").close(made)


def test_answers_of_one_token_warn_of_nothing():
    nothing = {"n": 0}
    short = closed_case(tpot_s=nothing, tokens_per_s=nothing, requests=[request(0, steps_s=[])])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = html_page([short], {"int8": 0.1})
        assert "Time per token" not in page and "What precision costs" not in page
        assert "Against the machine" in html_page([{**short, "roofline": {**short["roofline"], "decode": None}}])
        both = html_page([short, closed_case("int4")])  # the first has no step to name the lines by
    assert "Time per token" in both and both.count("p99</text>") >= 2


def test_a_soak_shows_clock_and_temperature_where_they_are_told(drawn):
    told = [request(n, mhz=2000.0 - n, celsius=50.0 + n) for n in range(3)]
    (_, note, _), *_ = [p for p in closed_plots([closed_case(minutes=1.0, requests=told)], None) if p[0] == "Over time"]
    assert note == "Time to first token while the machine heats up, its clock and its temperature."
    panels = {axes.get_ylabel(): list(axes.lines[0].get_ydata()) for axes in named(drawn, "minutes").axes}
    assert panels == {
        "TTFT, s": pytest.approx([0.2, 0.3, 0.4]), "MHz": [2000.0, 1999.0, 1998.0], "°C": [50.0, 51.0, 52.0],
    }  # fmt: skip
    (_, note, _), *_ = [p for p in closed_plots([closed_case(minutes=1.0)], None) if p[0] == "Over time"]
    assert note == "Time to first token while the machine heats up; it does not tell its clock or temperature."


def test_every_row_of_a_group_is_a_point(drawn):
    group = closed_case(requests=[request(0, ttft_s=[0.1, 0.2, 0.3]), request(1, ttft_s=[0.4, 0.5, 0.6])])
    closed_plots([group], None)
    points = drawn[1].axes[0].lines[0].get_xdata()
    assert drawn[1].axes[0].get_xlabel() == "s" and sorted(points) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_the_page_says_what_the_json_lines_hold():
    case = closed_case(throttled=True)
    case["memory_mb"]["arena_mb"] = 1234.0
    case["energy"] |= {"j_per_picture": 3.25, "sources": ["gpu 0"]}
    opened = open_case(rate=12)
    opened["energy"] |= {"j_per_request": 7.5, "sources": ["gpu 0"]}
    page = html_page([case, opened])
    for text in (
        "0.250 / 0.500 / 1.000", "1.23<br><small>2.46 / 4.92</small>", "40.0 GB/s", "1,800 GOP/s", "1,500.0", "3.25",
        "<td>1,234</td>", "<td>7.50</td>", "<td>yes</td>", "what picture asks", "int8, ort-cpu, checkpoint: real",
        '<li class="bad">int8, picture 12/s: keeps up, in words</li>',
    ):  # fmt: skip
        assert text in page, text
    assert "% of the ceiling" in page and page.count("40.0 GB/s") == 2  # at the table and at the plot
    assert html_page([open_case(rate=4)]).count('class="bad"') == 0


def test_the_machine_is_described_in_words():
    rows = system_rows(closed_case()["system"])
    assert rows == {
        "processor": "a processor", "threads": "2", "cpu flags": "avx2, vnni", "GPUs": "none", "governor": "not told",
        "hypervisor": "yes",
    }  # fmt: skip
    page = html_page([closed_case()])
    assert "<dt>cpu flags</dt><dd>avx2, vnni</dd>" in page and "<dt>GPUs</dt><dd>none</dd>" in page
    assert "[&#39;" not in page and "[]" not in page


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def measured(tiny: Pair, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    small = ("--size", "56x56", "--new-tokens", 2, "--rounds", 1, "--threads", 1)
    for name, more in (("closed", ("--requests", 1)), ("open", ("--requests", 3, "--arrivals", 50))):
        done = edgevl("bench", tiny.bundle, *small, *more, "--json", folder / f"{name}.jsonl")
        assert done.returncode == 0, done.stderr
    return folder


def test_the_schema_names_every_field(measured):
    documented = set(re.findall(r"\w+", report.__doc__ or ""))
    for name in ("closed", "open"):
        (case,) = read_lines(measured / f"{name}.jsonl")
        within = [k for group in ("energy", "memory_mb", "roofline") for k in case.get(group, {})]
        assert {*case, *within} - {"after_open"} <= documented, {*case, *within} - documented
    for text in ('{"n": 0}', "of N at once a number for each of the N", "one group, until all ended"):
        assert text in (report.__doc__ or "")


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_narrow_terminal_and_a_pipe(measured, tiny: Pair):
    """The width is the terminal's; what goes into a pipe is not folded, whatever COLUMNS says."""
    import fcntl
    import pty
    import struct
    import subprocess
    import termios

    code = "import sys; from pathlib import Path; from edgevl.benchmarks.report import print_table, read_lines\n"
    code += "print_table([{**c, 'bundle': sys.argv[2]} for c in read_lines(Path(sys.argv[1]))])"
    command = [sys.executable, "-c", code, str(measured / "closed.jsonl"), LONG]
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"TERM": "xterm"}
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 72, 0, 0))
    with subprocess.Popen(command, stdout=far, stdin=far, env=environment) as process:
        os.close(far)
        seen = b""
        while True:
            try:
                piece = os.read(near, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            seen += piece
    os.close(near)
    assert process.returncode == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", seen.decode()).replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 72 and "…" not in "".join(lines) and "TTFT s" in " ".join(lines)
    assert not any(LONG in line for line in lines if line.endswith(tuple("0123456789")))
    piped = subprocess.run(command, capture_output=True, env=environment | {"COLUMNS": "60", "FORCE_COLOR": "1"})
    assert piped.returncode == 0
    rows = [line for line in piped.stdout.decode().splitlines() if line.startswith(f"{LONG}  picture*")]
    assert len(rows) == 4 and max(map(len, rows)) > 120  # four tables, none of them split
