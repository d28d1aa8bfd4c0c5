"""Data sets on the disk: their order, what reaches the network from every format, budgets, failures, and whole runs.

The order is checked for many sizes; what is trained on is compared with the same rows in memory, bit for bit.
"""

from __future__ import annotations

import errno
import io
import json
import os
import threading
import time
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_mlp import LBFGS, MLP, SGD, BrokenData, CrossEntropy, EarlyStopping, Stream, Trainer, fitting, streams
from gpu_mlp import shards as shard_files
from gpu_mlp.feeding import FromDisk
from gpu_mlp.shards import PAGE, WORTH_A_DETOUR, File, Piece
from gpu_mlp.streams import MOST_BUFFERS, Order, ReadAhead

QUICK = settings(max_examples=100, deadline=None, database=None)
N, D = 500, 5


@pytest.fixture
def arrays():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(N, D)).astype(np.float32)
    return x, rng.integers(0, 3, N), rng.random(N)


def columns(x, y, w):
    return {**{f"f{j}": x[:, j].astype(float) for j in range(x.shape[1])}, "y": y, "w": w}


def write_npy(folder, x, y, w, shard=""):
    for prefix, part in zip("xyw", (x, y, w)):
        np.save(folder / f"{prefix}{shard}.npy", part)


def write_parquet(path, x, y, w, rows=50):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table(columns(x, y, w)), path, row_group_size=rows)


def write_csv(path, x, y, w):
    table = columns(x, y, w)
    lines = [",".join(table), *(",".join(map(repr, row)) for row in zip(*(c.tolist() for c in table.values())))]
    path.write_text("\n".join(lines) + "\n")


def write(kind, folder, parts, shards=1):
    """A set of a kind in so many shards; its source and the arguments that name y and w."""
    folder.mkdir(exist_ok=True)
    for k, rows in enumerate(np.array_split(np.arange(len(parts[0])), shards)):
        x, y, w = (part[rows] for part in parts)
        if kind == "npy":
            write_npy(folder, x, y, w, f"-{k:03}")
        elif kind == "npz":
            np.savez(folder / f"{k:03}.npz", x=x, y=y, w=w)
        elif kind == "npz packed":
            np.savez_compressed(folder / f"{k:03}.npz", x=x, y=y, w=w)
        elif kind == "parquet":
            write_parquet(folder / f"{k:03}.parquet", x, y, w)
        else:
            write_csv(folder / f"{k:03}.csv", x, y, w)
    return folder, {"target": "y", "sample_weight": "w"}


KINDS = ("npy", "npz", "npz packed", "parquet", "csv")


def read(stream, seed=3, epoch=0, batch=32, first=0):
    """The rows of an epoch from ``first`` on, as the feed takes them."""
    ahead, order = stream.ahead(), stream.order(seed, epoch)
    ahead.begin(order, first)
    outs = [np.empty((stream.n - first, *part.shape[1:]), part.dtype) for part in ahead.like if part is not None]
    try:
        for cursor in range(first, stream.n, batch):
            rows = slice(cursor - first, min(cursor + batch, stream.n) - first)
            ahead.take(cursor, [*(out[rows] for out in outs), *[None] * (3 - len(outs))])
    finally:
        ahead.close()
    return outs


def classifier(d=D, seed=0, **options):
    return MLP([d, 6, 3], output="softmax", seed=seed, **options)


# --- the order -------------------------------------------------------------------------------------------------------


@st.composite
def chunkings(draw):
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=25))
    bounds = np.cumsum([0, *lengths])
    return np.column_stack([bounds[:-1], bounds[1:]])


@QUICK
@given(chunkings(), st.integers(1, 80), st.integers(0, 2**64 - 1), st.integers(0, 50))
def test_every_row_comes_once_an_epoch(chunks, buffer_rows, seed, epoch):
    order = Order(chunks, buffer_rows, seed, epoch)
    rows = order.rows()
    assert sorted(rows.tolist()) == list(range(chunks[-1, 1]))
    sizes = np.diff(order.first)
    assert sizes.sum() == len(rows)
    assert (sizes <= max(buffer_rows, (chunks[:, 1] - chunks[:, 0]).max())).all()
    for buffer in range(len(order)):  # what is in a buffer is what chunks brought there, each whole
        found = set(rows[order.first[buffer] : order.first[buffer + 1]].tolist())
        assert found == {row for chunk in order.chunks(buffer) for row in range(*chunks[chunk])}
    assert (Order(chunks, buffer_rows, seed, epoch).rows() == rows).all()


def test_epochs_and_seeds_differ_and_no_seed_is_the_order_of_the_files():
    chunks = np.column_stack([np.arange(0, 400, 10), np.arange(10, 410, 10)])
    orders = {Order(chunks, 100, seed, epoch).rows().tobytes() for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert Order(chunks, 100, None, 5).rows().tolist() == list(range(400))


def test_chunks_are_mixed_within_a_buffer_and_over_the_set():
    chunks = np.column_stack([np.arange(0, 4000, 10), np.arange(10, 4010, 10)])
    rows = Order(chunks, 1000, 0, 0).rows()
    batch = rows[:100] // 10  # the chunks that the first hundred rows come from
    assert len(set(batch.tolist())) > 50
    assert abs(np.corrcoef(np.arange(4000), rows)[0, 1]) < 0.1


@QUICK
@given(chunkings(), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_a_split_keeps_every_row_once_and_holds_out_the_share(chunks, fraction, seed):
    n = int(chunks[-1, 1])
    stream = Stream.__new__(Stream)  # the split looks at the chunks alone
    stream.source, stream.chunks, stream.n = "some", chunks, n
    if n < 2:
        with pytest.raises(ValueError, match="cannot be split"):
            stream.split(fraction, seed)
        return
    kept, held = stream.split(fraction, seed)
    rows = [np.concatenate([np.arange(*chunk) for chunk in part.chunks]) for part in (kept, held)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(n))
    assert held.n == len(rows[1]) == min(max(1, round(fraction * n)), n - 1)
    again = stream.split(fraction, seed)[1]
    assert (again.chunks == held.chunks).all()


# --- every format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_is_what_was_written_in_the_stated_order(tmp_path, arrays, kind, shards):
    folder, names = write(kind, tmp_path / "set", arrays, shards)
    stream = Stream(folder, **names, buffer_rows=120)
    rows = stream.order(3, 1).rows()
    for part, found in zip(arrays, read(stream, 3, 1)):
        np.testing.assert_array_equal(found, part[rows])
    pieces = [piece.arrays() for piece in stream.pieces()]
    for part, found in zip(arrays, zip(*pieces)):
        np.testing.assert_array_equal(np.concatenate(found), part)


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_is_a_set_too(tmp_path, arrays, kind):
    folder, names = write(kind, tmp_path / "set", arrays)
    source = next(path for path in sorted(folder.iterdir()) if not path.name.startswith(("y", "w")))
    if kind == "npy":
        names = {"target": folder / "y-000.npy", "sample_weight": folder / "w-000.npy"}
    stream = Stream(source, **names)
    np.testing.assert_array_equal(read(stream)[0], arrays[0][stream.order(3, 0).rows()])
    if kind == "npy":
        pair = Stream(f"{source},{folder / 'y-000.npy'}")
        np.testing.assert_array_equal(read(pair)[1], arrays[1][pair.order(3, 0).rows()])


@pytest.mark.parametrize("kind", KINDS)
def test_reading_from_a_cursor_on_is_skipping_to_it(tmp_path, arrays, kind):
    folder, names = write(kind, tmp_path / "set", arrays, 2)
    stream = Stream(folder, **names, buffer_rows=60)
    whole = read(stream)
    for first in (0, 1, 59, 60, 250, N - 1, N):
        for part, found in zip(whole, read(stream, first=first)):
            np.testing.assert_array_equal(found, part[first:])


@pytest.mark.parametrize("kind", KINDS)
def test_training_from_the_disk_is_training_from_memory_bit_for_bit(tmp_path, arrays, kind, monkeypatch):
    folder, names = write(kind, tmp_path / "set", arrays, 2)
    stream = Stream(folder, **names, buffer_rows=100)
    nets = [classifier(dropout=0.2), classifier(dropout=0.2)]
    Trainer(nets[0]).fit(stream, epochs=3, batch_size=32, progress=False)
    monkeypatch.setattr(fitting.data, "epoch_order", lambda n, seed, epoch: stream.order(seed, epoch).rows())
    Trainer(nets[1]).fit(arrays, epochs=3, batch_size=32, progress=False)
    assert nets[0].theta.tobytes() == nets[1].theta.tobytes()


@pytest.mark.parametrize("first", [0, 32, 100, 499])
def test_an_epoch_goes_on_from_the_rows_that_were_trained_on_before(tmp_path, arrays, first):
    """What a resumed run asks the feed for; a look back comes to the same rows too."""
    folder, names = write("npy", tmp_path / "set", arrays)
    stream, ops = Stream(folder, **names, buffer_rows=60), classifier()._ops
    rows = stream.order(3, 0).rows()
    feed = FromDisk(ops, stream.ahead(), 32)
    pieces = []
    for cursor, count in feed.epoch(stream.order(3, 0), first):
        pieces.append((cursor, count))
        for part, found in zip(arrays, feed.fetch(count, None)):
            np.testing.assert_array_equal(found, part[rows[cursor : cursor + count]])
    assert pieces == [(cursor, min(32, N - cursor)) for cursor in range(first, N, 32)]
    back = min(5, len(pieces) - 1)
    cursor, count = feed.again(back)
    assert (cursor, count) == pieces[-1 - back]
    np.testing.assert_array_equal(feed.fetch(count, None)[0], arrays[0][rows[cursor : cursor + count]])
    feed._ahead.close()


def test_dtypes_are_kept_and_foreign_byte_orders_read(tmp_path):
    x = np.arange(60, dtype=np.uint8).reshape(20, 3)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.arange(20).astype(">i4"))
    found = read(Stream(tmp_path), None)
    assert (found[0].dtype, found[1].dtype.newbyteorder("="), found[1].dtype.isnative) == (np.uint8, np.int32, True)
    np.testing.assert_array_equal(found[0], x)
    np.testing.assert_array_equal(found[1], np.arange(20))


CSVS = {
    "quotes": 'a,b,y\n1,"2",0\n3,"4.5",1\n',
    "a line end in quotes": 'a,"b\nb",y\n1,"2\n",0\n3,4,1\n',
    "blank lines": "a,b,y\n\n1,2,0\n\n\n3,4,1\n\n",
    "no last line end": "a,b,y\n1,2,0\n3,4,1",
    "carriage returns": "a,b,y\r\n1,2,0\r\n3,4,1\r\n",
    "a byte order mark": "\ufeffa,b,y\n1,2,0\n3,4,1\n",
    "missing": "a,b,y\n1,NA,0\n3,,1\n",
    "blanks around": "a , b,y\n 1, 2 ,0\n3,4,1 \n",
    "semicolons": "a;b;y\n1;2;0\n3;4;1\n",
    "a late fraction": "a,b,y\n1,2,0\n3,4,1.5\n",
    "signs": "a,b,y\n+1,-2,0\n3,4e5,1\n",
    "hexadecimal": "a,b,y\n1,2,0x1\n3,4,1\n",
    "underscores": "a,b,y\n1,2,1_0\n3,4,1\n",
    "text": "a,b,y\n1,2,red\n3,4,blue\n",
}


@pytest.mark.parametrize("arrow", [True, False], ids=["pyarrow", "python"])
@pytest.mark.parametrize("name", CSVS)
def test_csv_in_pieces_is_read_as_csv_in_memory(tmp_path, monkeypatch, name, arrow):
    """Also where every record is a piece of its own, and whichever parser reads it."""
    from gpu_mlp import readers, tables

    if arrow:
        pytest.importorskip("pyarrow")
    else:
        monkeypatch.setattr(tables, "_arrow_or_none", lambda: None)
    path = tmp_path / "some.csv"
    path.write_bytes(CSVS[name].encode())
    whole = readers.read(path, "y")
    stream = Stream(path, "y")
    pieces = [stream.raw_piece(chunk) for chunk in range(len(stream.chunks))]
    assert len(pieces) == 2
    assert list(pieces[0].x) == list(whole.x)
    for column in whole.x:
        np.testing.assert_array_equal(np.concatenate([piece.x[column] for piece in pieces]), whole.x[column])
    y = np.concatenate([piece.y for piece in pieces])
    assert y.dtype == whole.y.dtype
    np.testing.assert_array_equal(y, whole.y)


def test_a_column_that_is_text_in_one_shard_is_text_in_all(tmp_path):
    (tmp_path / "a.csv").write_text("a,y\n1,0\n2,1\n")
    (tmp_path / "b.csv").write_text("a,y\nred,0\n2.5,1\n")
    stream = Stream(tmp_path, "y")
    found = np.concatenate([stream.raw_piece(chunk).x["a"] for chunk in range(len(stream.chunks))])
    assert found.tolist() == ["1", "2", "red", "2.5"]
    with pytest.raises(BrokenData, match="column 'a' holds text"):
        stream.piece(0)


# --- reading ahead ---------------------------------------------------------------------------------------------------


def test_the_batches_do_not_depend_on_when_reads_end_nor_on_the_memory(tmp_path, arrays, monkeypatch):
    folder, names = write("npz", tmp_path / "set", arrays)
    honest = read(Stream(folder, **names, buffer_rows=60))
    rng, piece = np.random.default_rng(0), Stream.piece

    def slow(self, chunk, *rest):
        time.sleep(float(rng.random()) / 500)
        return piece(self, chunk, *rest)

    monkeypatch.setattr(Stream, "piece", slow)
    for memory in ("8KiB", "1GiB"):
        for part, found in zip(honest, read(Stream(folder, **names, buffer_rows=60, memory=memory))):
            np.testing.assert_array_equal(found, part)


def test_reading_ahead_stops_at_the_slots(tmp_path, arrays, monkeypatch):
    """However slow the training is: the buffer at hand and those of the other slots, and no more."""
    folder, names = write("npy", tmp_path / "set", arrays)
    stream = Stream(folder, **names, buffer_rows=20)
    seen, piece = [], Stream.piece
    monkeypatch.setattr(Stream, "piece", lambda self, chunk, *rest: seen.append(chunk) or piece(self, chunk, *rest))
    ahead, order = stream.ahead(), stream.order(0, 0)
    assert len(order) > 2 * MOST_BUFFERS
    seen.clear()
    ahead.begin(order)
    ahead.take(0, [np.empty((1, D), np.float32), None, None])
    deadline = time.monotonic() + 20
    wanted = sum(len(order.chunks(b)) for b in range(MOST_BUFFERS))
    while len(seen) < wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(seen) == wanted
    ahead.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("gpu-mlp-stream")]


def test_a_look_back_reads_again_what_is_gone(tmp_path, arrays):
    folder, names = write("npy", tmp_path / "set", arrays)
    stream = Stream(folder, **names, buffer_rows=20)
    ahead, order = stream.ahead(), stream.order(0, 0)
    rows = order.rows()
    ahead.begin(order)
    out = np.empty((10, D), np.float32)
    for cursor in (0, 300, 290, 10, 480):
        ahead.take(cursor, [out, None, None])
        np.testing.assert_array_equal(out, arrays[0][rows[cursor : cursor + 10]])
    ahead.close()
    ahead.take(40, [out, None, None])  # after the end of an epoch too
    np.testing.assert_array_equal(out, arrays[0][rows[40:50]])
    ahead.close()


def test_an_error_of_a_thread_comes_out_of_fit_with_the_last_good_weights(tmp_path, arrays, monkeypatch):
    folder, names = write("npy", tmp_path / "set", arrays)
    stream = Stream(folder, **names, buffer_rows=100)
    net = classifier()
    trainer = Trainer(net)
    kept = []

    def callback(trainer, row):
        kept.append(net.theta.tobytes())
        os.truncate(folder / "x-000.npy", 2000)  # after the first epoch

    with pytest.raises(
        BrokenData, match=r"epoch 2: .*x-000\.npy: was changed while it was in use.*start again"
    ) as error:
        trainer.fit(stream, epochs=3, batch_size=10, progress=False, callbacks=[callback])
    assert error.value.history.stopped == "data lost"
    assert len(error.value.history) == 1
    assert [net.theta.tobytes()] == kept
    assert "\n" not in str(error.value)
    assert not [t for t in threading.enumerate() if t.name.startswith("gpu-mlp-stream")]


def test_a_file_that_is_gone_or_exchanged_is_told(tmp_path, arrays):
    folder, names = write("npy", tmp_path / "set", arrays)
    stream = Stream(folder, **names)
    (folder / "y-000.npy").rename(folder / "elsewhere")
    with pytest.raises(BrokenData, match=r"y-000\.npy: cannot be read any more"):
        read(stream)
    np.save(folder / "y-000.npy", arrays[1])  # the same bytes, but who knows
    with pytest.raises(BrokenData, match="was changed while it was in use"):
        read(stream)


def test_ctrl_c_ends_a_run_and_its_threads(tmp_path, arrays):
    import signal

    folder, names = write("npy", tmp_path / "set", arrays)
    trainer = Trainer(classifier())
    steps = []
    honest = trainer._step

    def step(*arguments):
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        honest(*arguments)

    trainer._step = step
    with pytest.warns(UserWarning, match="interrupted"):
        history = trainer.fit(Stream(folder, **names, buffer_rows=20), epochs=9, batch_size=10, progress=False)
    assert history.stopped == "interrupted"
    assert len(steps) == 5
    assert not [t for t in threading.enumerate() if t.name.startswith("gpu-mlp-stream")]


# --- validation, evaluation, weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_validation_by_fraction_as_a_stream_and_as_arrays_agree(tmp_path, arrays, kind):
    folder, names = write(kind, tmp_path / "set", arrays, 2)
    stream = Stream(folder, **names, buffer_rows=100)
    kept, held = stream.split(0.2, 0)
    rows = np.concatenate([np.arange(*chunk) for chunk in held.chunks])
    parts = [part[rows] for part in arrays]
    runs = [(stream, 0.2), (kept, held), (kept, parts)]
    histories = [
        Trainer(classifier(), seed=0).fit(data, epochs=2, batch_size=25, validation=validation, progress=False)
        for data, validation in runs
    ]
    for column in ("cost", "validation_loss", "validation_accuracy"):
        first, second, third = (history[column] for history in histories)
        assert first == second
        np.testing.assert_allclose(first, third, rtol=1e-6)


def test_evaluate_in_pieces_is_evaluate_at_once(tmp_path, arrays):
    folder, names = write("npz", tmp_path / "set", arrays, 3)
    for loss in (None, CrossEntropy(class_weight=[1.0, 2.0, 0.5])):
        trainer = Trainer(classifier(precision="float64"), loss)
        found, wanted = trainer.evaluate(Stream(folder, **names)), trainer.evaluate(*arrays)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert abs(found[name] - value) < 1e-12
    with pytest.raises(ValueError, match="y, sample_weight: a stream has its own"):
        trainer.evaluate(Stream(folder, **names), arrays[1])


def test_early_stopping_and_a_regression_on_a_stream(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 4)).astype(np.float32)
    y = (x @ np.array([1.0, -2.0, 0.5, 0.0]) + 3).astype(np.float32)
    write_npy(tmp_path, x, y, y**0)
    net = MLP([4, 1], output="identity")
    history = Trainer(net, optimizer=SGD(lr=0.05)).fit(
        Stream(tmp_path), epochs=30, validation=0.1, progress=False, early_stopping=EarlyStopping(patience=2)
    )
    assert history["validation_r2"][-1] > 0.9999
    np.testing.assert_allclose(net.weights[0][0], [1, -2, 0.5, 0], atol=0.01)


def test_what_a_stream_cannot_do_is_refused_with_the_reason(tmp_path, arrays):
    folder, names = write("npy", tmp_path / "set", arrays)
    stream = Stream(folder, **names)
    with pytest.raises(ValueError, match="L-BFGS works on the whole data set, many times an iteration"):
        Trainer(classifier(), optimizer=LBFGS()).fit(stream, progress=False)
    with pytest.raises(ValueError, match=r"x-000\.npy.*expected shape \(batch, 4\)"):
        Trainer(classifier(4)).fit(stream, progress=False)
    with pytest.raises(ValueError, match="no target; name it with target="):
        Trainer(classifier()).fit(Stream(folder / "x-000.npy", require_target=False), progress=False)
    with pytest.raises(ValueError, match=r"x-000\.npy, counted from row 0: y: label 2 in row \d+ is outside"):
        Trainer(MLP([D, 2], output="softmax")).fit(stream, progress=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_told_with_its_file_and_row(tmp_path, arrays, bad):
    x = arrays[0].copy()
    x[321, 2] = bad
    folder, names = write("npy", tmp_path / "set", (x, *arrays[1:]))
    stream = Stream(folder, **names, chunk_rows=100)
    with pytest.raises(BrokenData, match=r"x-000\.npy, counted from row 300: x: row 21, column 2 is (nan|inf)"):
        Trainer(classifier()).fit(stream, progress=False)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stream_trains_on_a_gpu_as_on_the_cpu(tmp_path, arrays, gpu, precision):
    gpu.hurry()
    folder, names = write("npz", tmp_path / "set", [part[:150] for part in arrays])
    thetas = []
    for device in ("cpu", "cuda"):
        net = classifier(precision=precision, device=device)
        Trainer(net, optimizer=SGD(lr=0.1)).fit(
            Stream(folder, **names, buffer_rows=40), epochs=2, batch_size=16, validation=0.1, progress=False
        )
        thetas.append(np.array(net._ops.to_host(net._theta), np.float64))
    np.testing.assert_allclose(thetas[1], thetas[0], atol=1e-5 if precision == "float32" else 2e-2)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_budget_that_is_too_small_is_refused_with_what_is_needed(tmp_path, arrays):
    folder, names = write("npy", tmp_path / "set", arrays)
    with pytest.raises(ValueError, match=r"memory: 1\.0 KiB is too little for .*; allow more, lower buffer_rows=100"):
        Stream(folder, **names, memory="1KiB", buffer_rows=100).ahead()
    packed, names = write("npz packed", tmp_path / "packed", arrays)
    with pytest.raises(ValueError, match="smaller row groups or shards"):
        next(Stream(packed, **names, memory="1KiB").pieces())


def test_sizes():
    from gpu_mlp.checks import size

    assert [size("memory", text) for text in ("512", "1kB", "1KiB", "1.5 GiB", "2g", "3MB", 7)] == [
        512, 1000, 1024, 3 << 29, 2 * 10**9, 3 * 10**6, 7,
    ]  # fmt: skip
    for bad in ("", "much", "-1MiB", "1 GiB free", "0"):
        with pytest.raises(ValueError, match="memory: expected"):
            size("memory", bad)
    with pytest.raises(TypeError, match="memory: expected an integer"):
        size("memory", 1.5)


def test_the_buffers_stay_within_the_memory(tmp_path, arrays):
    folder, names = write("npy", tmp_path / "set", arrays)
    row = D * 4 + 8 + 8
    for memory in (8000, 16000, 10**6):
        ahead = Stream(folder, **names, memory=memory, buffer_rows=40).ahead()
        taken = sum(part.nbytes for slot in ahead._slots for part in slot.parts)
        assert 2 * 40 * row <= taken <= memory
    assert len(ahead._slots) == MOST_BUFFERS


# --- what does not fit together --------------------------------------------------------------------------------------


def refuse(match, source, **options):
    with pytest.raises((ValueError, OSError), match=match) as error:
        Stream(source, **{"target": "y", **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_is_cut_short_is_refused(tmp_path, arrays, kind):
    folder, _ = write(kind, tmp_path / "set", arrays, 3)
    path = sorted(folder.iterdir())[-1 if kind != "npy" else 5]
    whole = path.read_bytes()
    path.write_bytes(b"")
    refuse(f"{path.name}.*(cut short|empty file|not a valid)", folder)
    path.write_bytes(whole[: len(whole) * 2 // 3])
    if kind == "csv":  # the cut record has too few fields, or the shard too few rows, which a manifest would know
        path.write_bytes(whole[: whole.rindex(b",")])
    refuse(path.name, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_that_differ_are_refused(tmp_path, arrays, kind):
    x, y, w = arrays
    folder, _ = write(kind, tmp_path / "set", arrays, 2)
    other, _ = write(kind, tmp_path / "other", (x[:, :3], y, w))
    for path in other.iterdir():
        path.rename(folder / path.name.replace("000", "009"))
    refuse("009.*(x is|column 'f3' is)", folder)


def test_dtypes_that_differ_are_refused(tmp_path, arrays):
    x, y, w = arrays
    write_npy(tmp_path, x, y, w, "-0")
    write_npy(tmp_path, x.astype(np.float64), y, w, "-1")
    refuse(r"x-1\.npy: x is float64 of 5 columns, but in x-0\.npy it is float32 of 5 columns", tmp_path)


def test_arrays_that_do_not_go_together_are_refused(tmp_path, arrays):
    x, y, w = arrays
    write_npy(tmp_path, x, y[:-1], w)
    refuse(r"x has 500 rows and y has 499", tmp_path)
    write_npy(tmp_path, np.asfortranarray(x), y, w)
    refuse("Fortran order.*ascontiguousarray", tmp_path)
    write_npy(tmp_path, x[:0], y[:0], w[:0])
    refuse("no rows", tmp_path)
    np.save(tmp_path / "x.npy", np.array([{}] * 3), allow_pickle=True)
    refuse("pickled", tmp_path)
    (tmp_path / "y.npy").unlink()
    write_npy(tmp_path, x, y, w)
    (tmp_path / "y.npy").unlink()
    refuse(r"target: there is no y\.npy beside it", tmp_path)
    np.savez(tmp_path / "s.npz", x_train=x, y_train=y)
    refuse("training and a test part", tmp_path / "s.npz", target=None)
    refuse("several kinds, .npy, .npz", tmp_path)
    refuse("cannot be read in pieces.*gunzip", _packed_csv(tmp_path))


def _packed_csv(folder):
    import gzip

    path = folder / "t.csv.gz"
    path.write_bytes(gzip.compress(b"a,y\n1,2\n"))
    return path


def test_a_folder_without_shards(tmp_path):
    refuse("no shards in it", tmp_path)
    refuse("no such file or folder", tmp_path / "nowhere")
    (tmp_path / "a.npy").write_bytes(b"")
    refuse("x is called x.npy or x-NAME.npy", tmp_path)


def test_an_npz_that_lies_about_its_members_is_refused(tmp_path, arrays):
    """A local header that is gone, and a size beyond the end of the file."""
    path = tmp_path / "s.npz"
    np.savez(path, x=arrays[0], y=arrays[1])
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(bytes(content))) as archive:
        at = archive.getinfo("y.npy").header_offset
    content[at : at + 4] = b"XXXX"
    path.write_bytes(content)
    refuse(r"s\.npz", path)


# --- lists of shards -------------------------------------------------------------------------------------------------


def manifest(folder, entries, **more):
    record = {"format": "gpu_mlp.shards", "version": 1, "shards": entries, **more}
    (folder / "manifest.json").write_text(json.dumps(record))


def test_a_manifest_says_which_shards_and_in_which_order(tmp_path, arrays):
    folder, _ = write("npz", tmp_path / "set", arrays, 3)
    manifest(folder, [{"file": "002.npz"}, {"file": "000.npz", "rows": 167}], target="y")
    stream = Stream(folder)
    thirds = np.array_split(np.arange(N), 3)
    np.testing.assert_array_equal(read(stream, None)[0], arrays[0][np.concatenate([thirds[2], thirds[0]])])
    manifest(folder, [{"file": "000.npz", "rows": 166}])
    refuse("has 167 rows, but manifest.json says 166", folder)
    manifest(folder, [{"file": "000.npz"}, {"file": "007.npz"}])
    refuse(r"007\.npz: is listed as a shard and not there", folder)


@pytest.mark.parametrize(
    "name",
    ["../outside.npz", "/etc/passwd", "sub/a.npz", "..", ".", "", "a\\b.npz", "\0.npz", "./000.npz"],
)
def test_a_manifest_leads_nowhere_else(tmp_path, arrays, name):
    folder, _ = write("npz", tmp_path / "set", arrays)
    np.savez(tmp_path / "outside.npz", x=arrays[0], y=arrays[1])
    manifest(folder, [{"file": name}])
    refuse("not a bare file name", folder)


@pytest.mark.parametrize("listed", [True, False])
def test_links_lead_nowhere_else(tmp_path, arrays, listed):
    folder, names = write("npz", tmp_path / "set", arrays)
    np.savez(tmp_path / "outside.npz", x=arrays[0], y=arrays[1], w=arrays[2])
    (folder / "link.npz").symlink_to("000.npz")
    if listed:
        manifest(folder, [{"file": "000.npz"}, {"file": "link.npz"}])
    assert Stream(folder, **names).n == 2 * N  # within the folder
    (folder / "link.npz").unlink()
    (folder / "link.npz").symlink_to(tmp_path / "outside.npz")
    refuse("a link that leads outside", folder)
    (folder / "link.npz").unlink()
    (folder / "link.npz").symlink_to(folder / "gone.npz")
    refuse("not there", folder)
    linked = tmp_path / "linked"
    linked.symlink_to(folder)  # a folder that the user names may be a link
    (folder / "link.npz").unlink()
    if listed:
        manifest(folder, [{"file": "000.npz"}])
    assert Stream(linked, **names).n == N


def test_the_companions_of_an_npy_shard_lead_nowhere_else(tmp_path, arrays):
    folder, _ = write("npy", tmp_path / "set", arrays)
    np.save(tmp_path / "y.npy", arrays[1])
    (folder / "y-000.npy").unlink()
    (folder / "y-000.npy").symlink_to(tmp_path / "y.npy")
    refuse("a link that leads outside", folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": "other"}', "[" * 100000, '{"format": "gpu_mlp.shards", "version": 2, "shards": []}',
     '{"format": "gpu_mlp.shards", "version": 1, "shards": []}',
     '{"format": "gpu_mlp.shards", "version": 1, "shards": ["a.npz"]}',
     '{"format": "gpu_mlp.shards", "version": 1, "shards": [{"file": 3}]}',
     '{"format": "gpu_mlp.shards", "version": 1, "shards": [{"file": "000.npz"}, {"file": "000.npz"}]}',
     '{"format": "gpu_mlp.shards", "version": 1, "shards": [{"file": "000.npz"}], "target": 3}'],
)  # fmt: skip
def test_a_broken_manifest_is_refused(tmp_path, arrays, text):
    folder, _ = write("npz", tmp_path / "set", arrays)
    (folder / "manifest.json").write_text(text)
    refuse("manifest.json", folder, target=None)


@pytest.fixture
def large(tmp_path):
    """A file of numbers of which long runs are read past the page cache, and the numbers."""
    numbers = np.random.default_rng(3).integers(0, 256, 5 * WORTH_A_DETOUR + 77, dtype=np.uint8)
    numbers.tofile(tmp_path / "numbers")
    file = File(tmp_path / "numbers")
    file.bypass = True
    return file, numbers


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system always reads through its page cache")
@pytest.mark.parametrize("count", [1, WORTH_A_DETOUR - 1, WORTH_A_DETOUR, 3 * WORTH_A_DETOUR + 5])
@pytest.mark.parametrize("offset", [0, 1, PAGE - 1, PAGE, 2 * WORTH_A_DETOUR + 72])
def test_reads_past_the_page_cache_are_reads(large, offset, count, monkeypatch):
    file, numbers = large
    flags, usual = [], os.open
    monkeypatch.setattr(os, "open", lambda path, mode, *more: flags.append(mode) or usual(path, mode, *more))
    out = np.zeros(count, np.uint8)
    file.read_at(offset, out)
    assert np.array_equal(out, numbers[offset : offset + count])
    assert bool(flags[0] & os.O_DIRECT) == (count >= WORTH_A_DETOUR)
    assert len(flags) == 1 or not file.bypass  # it fell back only where the file system of the test cannot do it


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system always reads through its page cache")
def test_a_file_system_that_has_only_the_page_cache_is_read_through_it(large, monkeypatch):
    file, numbers = large
    usual = os.open

    def refusing(path, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return usual(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    out = np.zeros(2 * WORTH_A_DETOUR, np.uint8)
    file.read_at(9, out)
    assert np.array_equal(out, numbers[9 : 9 + len(out)])
    assert not file.bypass


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system always reads through its page cache")
def test_a_file_that_ends_too_early_is_told_past_the_page_cache_too(large):
    file, numbers = large
    with pytest.raises(ValueError, match="cut short while it was in use"):
        file.read_at(len(numbers) - WORTH_A_DETOUR, np.zeros(WORTH_A_DETOUR + 1, np.uint8))


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system always reads through its page cache")
@pytest.mark.parametrize("kind", ["npy", "csv", "parquet"])
def test_a_set_that_memory_cannot_hold_gives_the_same_batches(tmp_path, arrays, kind, monkeypatch):
    source, names = write(kind, tmp_path / "set", arrays)
    usual = read(Stream(source, **names))
    monkeypatch.setattr(streams, "KEPT_IN_MEMORY", 0.0)
    monkeypatch.setattr(shard_files, "WORTH_A_DETOUR", 1)
    stream = Stream(source, **names)
    assert all(file.bypass == (kind != "parquet") for shard in stream.shards for file in shard.files)
    for part, expected in zip(read(stream), usual):
        assert np.array_equal(part, expected)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_named_pipe_is_not_waited_for(tmp_path, arrays):
    folder, _ = write("npz", tmp_path / "set", arrays)
    os.mkfifo(folder / "pipe.npz")
    refuse("not a regular file", folder)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_row_group_that_counts_other_rows_than_the_file_is_refused(tmp_path, arrays):
    write_parquet(tmp_path / "a.parquet", *(part[:40] for part in arrays))
    content, refused = (tmp_path / "a.parquet").read_bytes(), 0
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for at in range(footer, len(content) - 8):
        if content[at] != 80:  # how 40 is written there
            continue
        for count in (-4, 39):
            damaged = bytearray(content)
            damaged[at] = 2 * count if count > 0 else -2 * count - 1
            (tmp_path / "b.parquet").write_bytes(damaged)
            try:
                list(Stream(tmp_path / "b.parquet", target="y").pieces())
            except (ValueError, BrokenData) as error:
                refused += "other rows than it says" in str(error)
    assert refused >= 3  # the row group's two counts and the file's 39; pyarrow refuses a file's −4 itself


def test_a_fingerprint_tells_sets_apart_and_knows_a_copy(tmp_path, arrays):
    folder, names = write("npz", tmp_path / "set", arrays, 2)
    copy, _ = write("npz", tmp_path / "copy", arrays, 2)
    changed, _ = write("npz", tmp_path / "changed", (arrays[0], arrays[1][::-1], arrays[2]), 2)
    found = Stream(folder, **names, memory="1GiB").fingerprint()
    assert json.loads(json.dumps(found)) == found
    assert Stream(copy, **names, memory="100MiB").fingerprint() == found
    assert Stream(changed, **names).fingerprint()["content"] != found["content"]
    assert Stream(folder, **names, buffer_rows=10).fingerprint()["buffer_rows"] == 10
    kept, held = Stream(folder, **names).split(0.5, 0)
    assert len({json.dumps(part.fingerprint()) for part in (kept, held, Stream(folder, **names))}) == 3


def test_a_prepared_stream_is_prepared_piece_by_piece(tmp_path, arrays):
    folder, names = write("parquet", tmp_path / "set", arrays)

    def doubled(piece):
        return Piece(np.column_stack([2 * column for column in piece.x.values()]), piece.y, piece.w)

    stream = Stream(folder, **names)
    found = read(stream.prepared(doubled), None)
    np.testing.assert_array_equal(found[0], 2 * arrays[0].astype(np.float64))
    assert isinstance(stream.prepared(doubled).ahead(), ReadAhead)
    assert read(stream, None)[0].max() == arrays[0].max()
