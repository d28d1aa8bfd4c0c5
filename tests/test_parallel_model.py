"""The cost model of many ranks: its limits, its rates back from steps that it made itself, and the page's tables."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import parallel_model
from parallel_model import PAGE, UPDATE_BYTES, Job, Rates, calibrated, reckon, written

RATES = Rates(flop=1e12, memory=1e11, near=1e10, far=1e9, latency=0.0)
JOB = Job((512, 1024, 256), 4096, 1, bucket_bytes=1 << 20)


def test_one_rank_has_the_products_the_passes_and_the_update():
    cost = reckon(JOB, RATES)
    products = 2 * 4096 * (2 * 512 * 1024 + 3 * 1024 * 256) / 1e12
    passes = 5 * 4096 * (1024 + 256) * 2 / 1e11
    assert cost.compute == pytest.approx(products + passes, rel=1e-12)
    assert cost.update == pytest.approx(JOB.layout.size * UPDATE_BYTES / 1e11, rel=1e-12)
    assert cost.waiting == cost.link == 0


@pytest.mark.parametrize(("ranks", "link"), [(2, 1e10), (8, 1e10), (9, 1e9), (1024, 1e9)])
def test_a_sum_moves_two_thirds_of_a_gradient_and_so_on(ranks, link):
    job = dataclasses.replace(JOB, ranks=ranks, rows=4096 * ranks)
    apart, beside = (reckon(job, dataclasses.replace(RATES, overlaps=overlaps)) for overlaps in (False, True))
    moved = 2 * (ranks - 1) / ranks * JOB.layout.size * 4 / link
    assert apart.link == pytest.approx(moved, rel=1e-12)
    assert apart.waiting == pytest.approx(moved, rel=1e-12)
    assert beside.link == pytest.approx(moved, rel=1e-12)
    assert max(0.0, moved - apart.compute) <= beside.waiting < moved


def test_an_endless_link_costs_nothing_and_a_latency_counts_by_the_bucket():
    job = dataclasses.replace(JOB, ranks=8, rows=8 * 4096, bucket_bytes=1)
    assert reckon(job, dataclasses.replace(RATES, near=1e30)).waiting == pytest.approx(0, abs=1e-12)
    slow = dataclasses.replace(RATES, near=1e30, latency=1e-3, overlaps=False)
    assert reckon(job, slow).link == pytest.approx(3 * 2 * 3 * 1e-3)  # W of two layers and all biases; 2 log₂ 8


def test_a_sharded_optimizer_moves_the_same_and_updates_its_part():
    job = dataclasses.replace(JOB, ranks=4, rows=4 * 4096)
    whole, sharded = reckon(job, RATES), reckon(dataclasses.replace(job, sharded=True), RATES)
    assert sharded.link == pytest.approx(whole.link)
    assert sharded.update == pytest.approx(whole.update / 4)


def test_the_check_finds_the_rates_that_steps_were_made_with():
    rates = Rates(3e11, 2e10, 5e9, 5e9, 4e-5, overlaps=False)
    job = Job((1024, 1024, 1024, 10), 4096, 2, storage=4)
    sizes = {"buckets of 256 KiB": 1 << 18, "buckets of 4096 KiB": 1 << 22, "one bucket": 1 << 62}
    costs = {name: reckon(dataclasses.replace(job, bucket_bytes=size), rates) for name, size in sizes.items()}
    one = reckon(dataclasses.replace(job, ranks=1), rates)
    steps = 3
    measured = {
        "sizes": "1024,1024,1024,10", "batch": 4096, "ranks": 2, "steps": steps, "buckets": f"{1 << 18},{1 << 22}",
        "updates": [steps * one.update], "sums": {name: [steps * cost.link] for name, cost in costs.items()},
        "seconds": {"alone": [steps * one.step], "sharded": [1.0], **{n: [steps * c.step] for n, c in costs.items()}},
    }  # fmt: skip
    _, found = calibrated(measured)
    for name in ("flop", "memory", "near", "latency"):
        assert getattr(found, name) == pytest.approx(getattr(rates, name), rel=1e-6)
    for name, taken, said in parallel_model.check(measured):
        assert said == pytest.approx(taken, rel=1e-6) or name == "sharded"


def test_the_page_has_the_tables_of_its_command():
    page = PAGE.read_text()
    assert written(page) == page
    assert len(re.findall(r"<!-- (?:model|check): \w+ -->\n\n\|", page)) == 4
