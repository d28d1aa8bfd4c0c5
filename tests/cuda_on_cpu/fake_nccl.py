"""A stand-in for CuPy's NCCL: collectives on raw addresses of the emulated device, in the stream they are given.

One rank works alone; of several, each is a process of mpiexec, and the bytes go through mpi4py as host memory. Checked:
constants, counts, that whole ranges lie within allocations, and in place or apart but never half over each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import streams
from .emulator import Emulator, OutOfBounds, bytes_at
from .fake_cublas import _dtype

SUM = 0
_CODES = {7: 0, 8: 1, 9: 14}  # NCCL's types by those of CUDA's data types
CONSTANTS = {"NCCL_SUM": SUM, "NCCL_FLOAT32": 7, "NCCL_FLOAT64": 8, "NCCL_BFLOAT16": 9}
ID_BYTES = 128


class NcclError(RuntimeError):
    """An error of NCCL."""

    __module__ = "cupy_backends.cuda.libs.nccl"

    def __init__(self, status: str) -> None:
        super().__init__(f"NCCL_ERROR_{status}")


def names(device: Emulator) -> dict[str, Any]:
    """The names of the module `cupy.cuda.nccl`."""
    group: list[Any] = []  # what was called since groupStart; None at its bottom

    def start() -> None:
        group.append(None)

    def end() -> None:
        if not group:
            raise NcclError("INVALID_USAGE: groupEnd without groupStart")
        calls = group[1:]
        group.clear()
        for submit in calls:
            submit()

    class Communicator(_Communicator):
        def _call(self, submit: Any) -> None:
            if group:
                group.append(submit)
            else:
                submit()

    Communicator.device = device
    return {
        **CONSTANTS,
        "NcclError": NcclError,
        "NcclCommunicator": Communicator,
        "available": True,
        "get_unique_id": lambda: bytes((i * 37) % 256 for i in range(ID_BYTES)),
        "get_version": lambda: 22700,
        "groupStart": start,
        "groupEnd": end,
    }


class _Communicator:
    """The ranks of NCCL, which are those of MPI's world where there are several."""

    device: Emulator

    def __init__(self, ndev: int, commId: bytes, rank: int) -> None:
        if type(commId) is not bytes or len(commId) != ID_BYTES:
            raise NcclError("INVALID_ARGUMENT: the unique id")
        if not 0 <= rank < ndev:
            raise NcclError("INVALID_ARGUMENT: the rank")
        self._size, self._rank, self._comm = ndev, rank, None
        if ndev > 1:
            from mpi4py import MPI

            self._comm = MPI.COMM_WORLD.Dup()
            assert (self._comm.size, self._comm.rank) == (ndev, rank)

    # --- CuPy's names ---

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        self._queue(stream, lambda: self._write(recvbuf, self._sum(self._read(sendbuf, count, datatype)), datatype), op)

    def reduceScatter(self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int) -> None:
        def work() -> None:
            total = self._sum(self._read(sendbuf, recvcount * self._size, datatype))
            self._write(recvbuf, total[self._rank * recvcount : (self._rank + 1) * recvcount], datatype)

        self._queue(stream, work, op)

    def reduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, root: int, stream: int) -> None:
        def work() -> None:
            total = self._sum(self._read(sendbuf, count, datatype))
            if self._rank == root:
                self._write(recvbuf, total, datatype)

        self._queue(stream, work, op, root)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        def work() -> None:
            self._write(recvbuf, self._all(self._read(sendbuf, count, datatype)).reshape(-1), datatype)

        self._queue(stream, work)

    def broadcast(self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int) -> None:
        def work() -> None:
            own = self._read(sendbuff if self._rank == root else recvbuff, count, datatype)
            self._write(recvbuff, self._all(own)[root], datatype)

        self._queue(stream, work, root=root)

    # --- the emulation ---

    def _call(self, submit: Any) -> None:
        raise NotImplementedError

    def _queue(self, stream: int, work: Any, op: int = SUM, root: int = 0) -> None:
        if op != SUM or not 0 <= root < self._size:
            raise NcclError("INVALID_ARGUMENT: the operation or the root")
        if type(stream) is not int or stream not in streams.Stream.living:
            raise NcclError("INVALID_ARGUMENT: the stream")
        self.device.counts["collectives"] += 1
        self._call(lambda: streams.Stream.living[stream].submit(work))

    def _read(self, address: int, count: int, datatype: int) -> np.ndarray:
        if type(address) is not int or type(count) is not int or count < 0:
            raise NcclError("INVALID_ARGUMENT: an address or a count")
        dtype = _dtype(_CODES[datatype])
        return self._bytes(address, count * dtype.itemsize).view(dtype).copy()

    def _write(self, address: int, values: np.ndarray, datatype: int) -> None:
        self._bytes(address, values.nbytes)[...] = np.ascontiguousarray(values).view(np.uint8)

    def _bytes(self, address: int, size: int) -> np.ndarray:
        """Memory of the device, all within one allocation."""
        if not size:
            return np.empty(0, np.uint8)
        allocation = self.device.memory.find(address)
        if allocation is None or address + size > allocation.end:
            raise OutOfBounds(f"NCCL: {size} bytes at 0x{address:x} are not within an allocation of the device")
        return bytes_at(address, size)

    def _all(self, own: np.ndarray) -> np.ndarray:
        """Every rank's array, (size, count)."""
        if self._comm is None:
            return own[None]
        found = np.empty((self._size, own.nbytes), np.uint8)
        self._comm.Allgather(own.view(np.uint8), found)
        return found.view(own.dtype).reshape(self._size, -1)

    def _sum(self, own: np.ndarray) -> np.ndarray:
        total, *others = self._all(own)
        for other in others:
            total = total + other
        return total
