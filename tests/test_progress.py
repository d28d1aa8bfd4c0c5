"""Progress: plain lines in a pipe, a bar in a terminal, nothing where it is not wanted, and all of it on stderr."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from gpu_mlp import MLP, Trainer, progress

pty = pytest.importorskip("pty", reason="terminals are tried through pseudo-terminals, which this system has not")
termios = pytest.importorskip("termios")

RUN = """
    import sys
    import numpy as np
    from gpu_mlp import MLP, Trainer

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 6)), rng.integers(0, 3, 200)
    net = MLP([6, 8, 3], output="softmax")
    Trainer(net).fit((x, y), epochs=int(sys.argv[1]), validation=0.2, progress=sys.argv[2] == "on")
"""
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def command(epochs, progress="on"):
    return [sys.executable, "-c", textwrap.dedent(RUN), str(epochs), progress]


# --- in a pipe ---------------------------------------------------------------------------------------------------


def test_a_pipe_gets_plain_lines_on_stderr_alone():
    done = subprocess.run(command(3), capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
    assert not CONTROL.search(done.stderr), "no control characters in a log"
    lines = done.stderr.splitlines()
    assert 1 <= len(lines) <= 3
    last = re.fullmatch(
        r"epoch 3/3  cost [\d.e+-]+  validation_loss [\d.e+-]+  validation_accuracy [\d.e+-]+"
        r"  [\d.]+[kM]? samples/s  0:00:00 left",
        lines[-1],
    )
    assert last, lines[-1]


def test_silence_is_silence():
    done = subprocess.run(command(2, "off"), capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# --- in a terminal -----------------------------------------------------------------------------------------------


def in_terminal(arguments, interrupt_after=None):
    """Run with stderr on a pseudo-terminal: what it showed, stdout, the exit status, and if it was left in order."""
    mine, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        environment.pop(name, None)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    shown = b""
    deadline = time.monotonic() + 60
    os.set_blocking(mine, False)
    while time.monotonic() < deadline:
        try:
            shown += os.read(mine, 65536)
        except BlockingIOError:
            if process.poll() is not None:
                break
            time.sleep(0.01)
        if interrupt_after is not None and interrupt_after in shown:
            process.send_signal(signal.SIGINT)
            interrupt_after = None
    try:
        while True:
            shown += os.read(mine, 65536)
    except OSError:
        pass
    status = process.wait(5)
    in_order = termios.tcgetattr(theirs) == before
    out = process.stdout.read()
    for end in (mine, theirs):
        os.close(end)
    return shown.decode(), out, status, in_order


def test_a_terminal_gets_a_bar_that_is_cleaned_up():
    shown, out, status, in_order = in_terminal(command(6))
    assert status == 0
    assert out == b""
    assert in_order, "the terminal's settings are as they were"
    assert "epoch 6/6" in shown
    assert "samples/s" in shown
    assert "validation_accuracy" in shown
    assert "\x1b[" in shown, "it draws"
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is shown again"


def test_a_terminal_is_given_back_after_ctrl_c():
    shown, _, status, in_order = in_terminal(command(10**7), interrupt_after=b"samples/s")
    assert status == 0
    assert in_order
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert "interrupted" in shown
    assert "Traceback" not in shown


def test_a_terminal_sees_nothing_where_progress_is_off():
    assert in_terminal(command(2, "off"))[0] == ""


def test_a_terminal_is_given_back_after_an_error():
    """The display is closed whatever ends the run."""
    closed = []

    class Spy(progress.Progress):
        def close(self):
            closed.append(True)
            super().close()

    def broken(trainer, row):
        raise KeyError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpu_mlp.fitting.Progress", Spy)
        with pytest.raises(KeyError):
            Trainer(MLP([2, 2])).fit((np.ones((4, 2)), np.ones((4, 2))), callbacks=[broken])
    assert closed == [True]


# --- how often ---------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_lines_come_at_most_so_often_and_the_last_one_always(clock):
    stream = io.StringIO()
    shown = progress.Progress(100, 50, stream=stream)
    for _ in range(100):
        clock[0] += 0.1
        shown.advance(50)
        shown.end_epoch({"cost": 0.25})
    shown.close()
    lines = stream.getvalue().splitlines()
    epochs = [int(re.match(r"epoch +(\d+)/100 ", line)[1]) for line in lines]
    assert epochs[0] == 1, "the first epoch shows that it runs"
    assert epochs[-1] == 100, "and the last one is always there"
    gaps = np.diff(epochs[:-1]) * 0.1
    assert (gaps >= progress.SECONDS_BETWEEN_LINES - 1e-9).all()
    assert (gaps <= progress.SECONDS_BETWEEN_LINES + 0.1 + 1e-9).all()
    assert len(set(epochs)) == len(epochs)


def test_a_run_that_ends_early_still_shows_its_last_epoch(clock):
    stream = io.StringIO()
    shown = progress.Progress(9, 50, stream=stream)
    for epoch in range(1, 4):
        clock[0] += 0.01
        shown.advance(50)
        shown.end_epoch({"cost": float(epoch)})
    shown.close()
    shown.close()
    assert [line.split("  ")[:2] for line in stream.getvalue().splitlines()] == [
        ["epoch 1/9", "cost 1"],
        ["epoch 3/9", "cost 3"],
    ]


def test_the_figures_of_a_line(clock):
    """2 of 4 epochs of 3000 samples in 2 s: 3000 samples/s, and 2 s are left."""
    stream = io.StringIO()
    shown = progress.Progress(4, 3000, stream=stream)
    for seconds in (0.5, 1.5):
        clock[0] += seconds
        shown.advance(3000)
        shown.end_epoch({"cost": 1 / 3, "validation_loss": 12345.678})
    assert shown.samples_per_second == 3000
    assert stream.getvalue().splitlines()[-1] == (
        "epoch 2/4  cost 0.3333  validation_loss 1.235e+04  3k samples/s  0:00:02 left"
    )


@pytest.mark.parametrize(
    ("seconds", "samples", "text"),
    [(10, 25, "2.5 samples/s"), (1, 1500, "1.5k samples/s"), (0.5, 4_000_000, "8M samples/s")],
)
def test_rates(clock, seconds, samples, text):
    stream = io.StringIO()
    shown = progress.Progress(1, samples, stream=stream)
    clock[0] += seconds
    shown.advance(samples)
    shown.end_epoch({})
    assert text in stream.getvalue()


def test_hours_are_told_as_hours(clock):
    stream = io.StringIO()
    shown = progress.Progress(3601, 1, stream=stream)
    clock[0] += 3.0
    shown.advance(1)
    shown.end_epoch({})
    assert stream.getvalue().endswith("3:00:00 left\n")


def test_nothing_is_written_where_it_is_off(clock):
    stream = io.StringIO()
    shown = progress.Progress(2, 10, enabled=False, stream=stream)
    shown.advance(10)
    shown.end_epoch({"cost": 1.0})
    shown.close()
    assert stream.getvalue() == ""


def test_a_process_without_standard_error_trains_all_the_same(monkeypatch):
    """Under pythonw and some services sys.stderr is None."""
    monkeypatch.setattr(sys, "stderr", None)
    history = Trainer(MLP([2, 2])).fit((np.ones((4, 2)), np.ones((4, 2))), epochs=2)
    assert history.stopped == "completed"
