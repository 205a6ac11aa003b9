"""How a conversion is shared out over processes: which weight files each makes, and what that moves."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import RequestError
from ..options import assigned, called
from ..tables import Shown, Table, duration, size
from .plan import Plan

# A byte of an FFN takes so many times as long as one that is copied (examples/benchmarks/conversion.py).
FFN_WORK = 10


MOST_PROCESSES = 10_000
# Speeds that can be given, in GB/s and GFLOP/s.
FASTEST = 1e6


def check_speed(name: str, speed: float | None) -> None:
    """Raises RequestError unless a speed may be given."""
    if speed is not None and not 0 < speed <= FASTEST:
        raise RequestError(
            f"{called(name)} is {speed:g}; expected a number above 0 and of at most {FASTEST:g}"
        )


@dataclass(frozen=True)
class Costs:
    """What the work takes.

    Attributes:
        disk: bytes per second that all processes together read or write.
        ffns: seconds to make each FFN, by its key.
    """

    disk: float
    ffns: Mapping[str, float]

    def to_json(self) -> dict[str, float]:
        return {"disk_bytes_per_second": self.disk, "ffn_seconds": sum(self.ffns.values())}


def check_count(processes: int) -> None:
    """Raises RequestError unless a run may have so many processes."""
    if not (isinstance(processes, int) and 1 <= processes <= MOST_PROCESSES):
        raise RequestError(
            f"{called('processes')} is {processes!r}; expected a whole number from 1 to {MOST_PROCESSES:,}"
        )


def check_shared(plan: Plan, count: int) -> None:
    """Raises RequestError if there is one weight file for several processes."""
    if count > 1 and len(plan.shards) == 1:
        share = sum(tensor.num_bytes for tensor in plan.tensors) / count
        raise RequestError(
            f"{count} processes have one weight file to write; expected one for each: "
            f"{assigned('max_shard_size', f'{max(int(share / 1e6), 1)}MB')}"
        )


def share_out(plan: Plan, count: int, finished: Collection[str] = ()) -> list[list[str]]:
    """The weight files that each of `count` processes makes: neighbours, of about equal work.

    Args:
        finished: files that nobody has to make.

    Raises:
        RequestError: there is one file for several processes.
    """
    check_shared(plan, count)
    works = {file: _work(plan, file) for file in plan.shards if file not in finished}
    shares: list[list[str]] = [[] for _ in range(count)]
    done, total = 0, max(sum(works.values()), 1)  # 0: of tensors without numbers
    for file, own in works.items():
        middle = (done + own / 2) / total
        shares[min(int(middle * count), count - 1)].append(file)
        done += own
    return shares


def _work(plan: Plan, file: str) -> int:
    """What a weight file takes, in bytes that are copied."""
    tensors = (plan.by_name[name] for name in plan.shards[file])
    return sum(tensor.num_bytes * (FFN_WORK if tensor.ffn else 1) for tensor in tensors)


@dataclass(frozen=True)
class Share:
    """What one process of a conversion does. Calibration is left out.

    Attributes:
        files: weight files that it writes.
        ffns: that it makes; one that lies in the files of two processes is made by both.
        read_bytes, written_bytes: of tensors.
        peak_bytes: as `Plan.peak_bytes`.
        work: its share of the estimated work, by which files are shared out; all together 1.
        seconds: of reading and of making its FFNs; files are written meanwhile. None: not measured.
    """

    files: int
    ffns: int
    read_bytes: int
    written_bytes: int
    peak_bytes: int
    work: float
    seconds: float | None = None


@dataclass(frozen=True, repr=False)
class Shares(Shown):
    """The processes of a conversion, by rank; `costs`: what their work takes, if it was measured."""

    each: tuple[Share, ...]
    costs: Costs | None = None

    @property
    def seconds(self) -> float | None:
        """Of the conversion: of its busiest process, or of the disk where that takes longer."""
        if self.costs is None:
            return None
        moved = sum(share.read_bytes + share.written_bytes for share in self.each)
        return max(moved / self.costs.disk, *(share.seconds or 0.0 for share in self.each))

    @property
    def speed_up(self) -> float:
        """How many times faster than one process the busiest one allows, if cores and disks keep up."""
        return 1 / max(share.work for share in self.each)

    def to_json(self) -> dict[str, Any]:
        """What stands beside the plan's own entries."""
        times = {"seconds": self.seconds, "costs": self.costs.to_json()} if self.costs else {}
        return {"processes": [asdict(share) for share in self.each]} | times

    def shown(self, limit: int | None = None) -> Iterator[Table | str]:
        """See `Shown`."""
        rows = tuple(
            {
                "process": rank,
                "files": share.files,
                "FFNs": share.ffns,
                "reads": size(share.read_bytes),
                "writes": size(share.written_bytes),
                "peak memory": size(share.peak_bytes),
                "work": f"{share.work:.1%}",
            }
            | ({} if share.seconds is None else {"time": duration(share.seconds)})
            for rank, share in enumerate(self.each)
        )
        yield Table("Processes", rows, left=()).head(limit)
        yield (
            f"At most {self.speed_up:.3g} times as fast as one process; the first one also writes card and "
            "report. Calibration is left out."
        )
        if self.seconds is not None and self.costs is not None:
            disk = size(int(self.costs.disk))
            yield (
                f"About {duration(self.seconds)}, with a disk of {disk}/s and a core for each process; "
                "starting and calibration are left out."
            )


def plan_shares(plan: Plan, count: int, costs: Costs | None = None) -> Shares:
    """What each of `count` processes does.

    Args:
        costs: what the work takes; None: times are left out.

    Raises:
        RequestError: there is one file for several, or their number is out of range.
    """
    check_count(count)
    files = share_out(plan, count)
    total = sum(_work(plan, file) for file in plan.shards)
    return Shares(tuple(_share(plan, own, total, costs) for own in files), costs)


def _share(plan: Plan, files: list[str], total: int, costs: Costs | None) -> Share:
    tensors = [plan.by_name[name] for file in files for name in plan.shards[file]]
    made = {tensor.ffn for tensor in tensors if tensor.ffn is not None}
    copied = [tensor.name for tensor in tensors if tensor.ffn is None]
    read = sum(plan.reads[name] for name in [*copied, *made])
    seconds = None if costs is None else read / costs.disk + sum(costs.ffns[key] for key in made)
    return Share(
        files=len(files),
        ffns=len(made),
        read_bytes=read,
        written_bytes=sum(tensor.num_bytes for tensor in tensors),
        peak_bytes=plan.peak_of(files),
        work=sum(_work(plan, file) for file in files) / total,
        seconds=seconds,
    )
