"""The packing model against real raylets: what it says fits is placed, the rest stays pending."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from app_v5 import Demand, Fit, Ledger, Node, bundles_of, grant, label_of

untyped_ray: Any = ray
pytestmark = pytest.mark.serve

SEED = int(os.environ.get("PLAN_SEED", "20260"))
CASES = 50
PATIENCE_S = {Fit.FITS: 15.0, Fit.NOT_NOW: 0.4, Fit.NEVER: 0.1}
QUIET_S = 0.7
SHARES = (0.1, 0.25, 0.3, 0.45, 0.5, 0.55, 0.6, 0.7, 0.9, 1.0, 1.0, 2.0, 3.0)
STRATEGIES = ("PACK", "PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
WORKERS: tuple[dict[str, Any], ...] = (
    {"num_cpus": 7, "num_gpus": 2, "labels": {"zone": "a"}},
    {"num_cpus": 5, "num_gpus": 1, "labels": {"zone": "b"}},
    {"num_cpus": 9, "num_gpus": 4, "labels": {"zone": "b", "kind": "big"}},
    {"num_cpus": 11, "num_gpus": 0, "labels": {"zone": "c"}},
)
RETRY_EVENLY = {
    "gcs_create_placement_group_retry_min_interval_ms": 300,
    "gcs_create_placement_group_retry_max_interval_ms": 300,
}
"""GCS's own are 100 ms growing to 1 s. Much below 300 ms it would act on what raylets report in the
middle of an attempt (every 100 ms), which hardly ever happens at one attempt a second."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, ...]]:
    """Four raylets besides the head; each has a resource of its own, `touch-<i>`."""
    small: dict[str, Any] = {
        "object_store_memory": 80_000_000,
        "temp_dir": tempfile.mkdtemp(prefix="rp"),
    }
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": RETRY_EVENLY, **small}
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)
    for index, worker in enumerate(WORKERS):
        cluster.add_node(**worker, resources={f"touch-{index}": 1, "custom": 4 - index}, **small)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        cluster.wait_for_nodes()
        yield tuple(
            Node(node["NodeID"], node["Resources"], node["Resources"], labels=node["Labels"])
            for node in untyped_ray.nodes()
        )
    finally:
        untyped_ray.shutdown()
        cluster.shutdown()


def random_demand(rng: random.Random, index: int) -> Demand:
    bundles = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        bundle: dict[str, float] = {"CPU": rng.choice((0, 0, 0.5, 1, 1, 2))}
        bundle["GPU"] = rng.choice(SHARES) if rng.random() < 0.8 else 0
        bundle["custom"] = rng.choice((0.5, 1)) if rng.random() < 0.1 else 0
        kept = {resource: amount for resource, amount in bundle.items() if amount}
        bundles.append(kept or {"CPU": 1.0})
    selectors = ({"zone": "in(a,b)"}, {"zone": "!b"}, {"kind": "big"}, {"kind": "!big"})
    selector = rng.choice(selectors) if rng.random() < 0.2 else {}
    replicas = rng.choice((1, 1, 2))
    return Demand(
        "app",
        f"d{index}",
        tuple(bundles),
        rng.choice(STRATEGIES),
        replicas,
        replicas,
        label_selectors=(selector,) * len(bundles),
    )


def create(demand: Demand) -> PlacementGroup:
    group: PlacementGroup = placement_group(
        [dict(bundle) for bundle in demand.bundles],
        strategy=demand.strategy,
        name=label_of(demand),
        bundle_label_selector=[dict(selector) for selector in demand.label_selectors],
    )
    return group


def is_placed(group: PlacementGroup, patience_s: float) -> bool:
    """Wait until Ray has placed it, or has had many chances to.

    A raylet's refusal leaves GCS with too little in its view of that node until something changes
    there: here a tiny placement group, now and then. In between it stays quiet for a few attempts,
    as a node that changes before each attempt would be picked, and refuse, each time.
    """
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if created_within(group, QUIET_S):
            return True
        touch_nodes()
    return created_within(group, QUIET_S)


def created_within(group: PlacementGroup, timeout_s: float) -> bool:
    """`PlacementGroup.wait` takes whole seconds, and 0 is for ever."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if placement_group_table(group)["state"] == "CREATED":
            return True
        time.sleep(0.005)
    return False


def touch_nodes() -> None:
    for index in range(len(WORKERS)):
        touch = placement_group([{f"touch-{index}": 1}])
        assert created_within(touch, 5)
        remove_placement_group(touch)


def actually(ledger: Ledger, demand: Demand, group: PlacementGroup) -> Ledger:
    """The ledger with the group where Ray has put it: among equal nodes Ray picks at random."""
    where = placement_group_table(group)["bundles_to_node_id"]
    stocks = list(ledger.stocks)
    for index, bundle in enumerate(bundles_of(demand)):
        node = next(n for n, stock in enumerate(stocks) if stock.name == where[index])
        granted = grant(stocks[node], bundle, node)
        assert granted is not None, f"Ray gave {bundle} on {stocks[node]}: the model is wrong"
        stocks[node] = granted[0]
    return replace(ledger, stocks=tuple(stocks))


def disagreements(rng: random.Random, nodes: tuple[Node, ...], stats: Counter[str]) -> list[str]:
    """Play one case: the demands one after the other, what does not fit stays pending."""
    ledger, found = Ledger.of(nodes), []
    groups: list[PlacementGroup] = []
    pending: list[PlacementGroup] = []
    for index in range(rng.randint(3, 9)):
        demand = replace(random_demand(rng, index), min_replicas=1)
        fitting, after = ledger.place(demand)
        groups.append(create(demand))
        placed = is_placed(groups[-1], PATIENCE_S[fitting.fit] if fitting.sure else 1.0)
        agrees = placed == (fitting.fit is Fit.FITS)
        stats[f"{fitting.fit.name}{'' if fitting.sure else ' perhaps'}: {agrees}"] += 1
        if fitting.sure and not agrees:
            free = {s.name[:4]: dict(s.instances) for s in ledger.stocks}
            found.append(f"{fitting.fit}, Ray placed: {placed}: {demand} on {free}")
        if not placed:
            if fitting.sure:
                pending.append(groups[-1])
            ledger = replace(ledger, contended=after.contended)
        else:
            names = placement_group_table(groups[-1])["bundles_to_node_id"]
            said = [ledger.stocks[slot.node].name for r in fitting.replicas for slot in r]
            stats["other node"] += said != [names[i] for i in range(len(names))]
            ledger = actually(ledger, demand, groups[-1])
    late = [group for group in pending if created_within(group, 0.01)]
    found += [f"Ray placed it late: {placement_group_table(group)}" for group in late]
    for group in groups:
        remove_placement_group(group)
    wait_until_free(nodes)
    return found


def wait_until_free(nodes: tuple[Node, ...]) -> None:
    """Touch the nodes until Ray says that everything is free again."""
    for _ in range(40):
        free = untyped_ray.available_resources()
        if free.get("GPU") == 7 and free.get("CPU") == 32 and free.get("custom") == 10:
            return
        touch_nodes()
        time.sleep(0.05)
    raise AssertionError(f"not free: {untyped_ray.available_resources()}")


def test_ray_places_what_the_plan_says_fits(nodes: tuple[Node, ...]) -> None:
    stats: Counter[str] = Counter()
    wrong: list[str] = []
    for case in range(CASES):
        found = disagreements(random.Random(SEED + case), nodes, stats)
        wrong += [f"seed {SEED + case}: {text}" for text in found]
    print(f"seeds {SEED}..{SEED + CASES - 1}: {dict(stats)}, {len(wrong)} disagreements")
    assert not wrong, "\n".join(wrong)
