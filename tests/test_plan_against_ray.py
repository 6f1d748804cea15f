"""The packing model against real raylets: what it says fits is placed, the rest stays pending."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import ray
from ray._raylet import node_labels_match_selector
from ray.cluster_utils import Cluster
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from app_v5 import Demand, Node, Plan, bundles_of, predict, stock

untyped_ray: Any = ray
pytestmark = pytest.mark.serve

SEED = int(os.environ.get("PLAN_SEED", "20260"))
CASES = 50
PATIENCE_S = {"fits": 15.0, "fits, slowly": 1.0, "not now": 0.4, "never": 0.1, "refused": 0.4}
"""By the plan's verdict; "refused" is what GCS believes to fit, by sums, and single GPUs refuse."""

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
    with tempfile.TemporaryDirectory(prefix="rp", dir="/tmp", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        # Else the address of this cluster would become that of the whole machine.
        with patch.dict(os.environ, {"RAY_TMPDIR": folder}):
            yield from cluster_nodes()


def cluster_nodes() -> Iterator[tuple[Node, ...]]:
    small = {"object_store_memory": 80_000_000}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": RETRY_EVENLY, **small}
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)
    try:
        for index, worker in enumerate(WORKERS):
            own = {f"touch-{index}": 1, "custom": 4 - index}
            cluster.add_node(**worker, resources=own, **small)
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        yield tuple(
            Node(
                row["NodeID"],
                row["Resources"],
                row["Resources"],
                partial(node_labels_match_selector, row["Labels"]),
            )
            for row in untyped_ray.nodes()
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
    return Demand(
        "app",
        f"d{index}",
        tuple(bundles),
        rng.choice(STRATEGIES),
        label_selectors=(selector,) * len(bundles),
    )


def create(demand: Demand) -> PlacementGroup:
    group: PlacementGroup = placement_group(
        [dict(bundle) for bundle in demand.bundles],
        strategy=demand.strategy,
        name=demand.label,
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


def said(demand: Demand, nodes: tuple[Node, ...], plan: Plan) -> tuple[str, list[str]]:
    """The plan's verdict, and the nodes that it chooses; `plan` stays as it is."""
    empty = predict([demand], nodes).fits[0]  # all of them is free
    trial = Plan(nodes, list(plan.free))
    if not trial.place(demand):
        return "never" if empty.never else "refused" if trial.slow else "not now", []
    return "fits, slowly" if trial.slow else "fits", [
        nodes[node].name for _, node, _ in trial.slots
    ]


def actually(plan: Plan, demand: Demand, names: list[str]) -> None:
    """Take what the group has where Ray has put it: among equal nodes Ray picks at random."""
    index = {node.name: number for number, node in enumerate(plan.nodes)}
    for name, bundle in zip(names, bundles_of(demand), strict=True):
        node = index[name]
        alone = Plan([plan.nodes[node]], [plan.free[node]])
        assert alone.grant(demand, [bundle], []), f"Ray gave {bundle} on {alone.free}: not so here"
        plan.free[node] = alone.free[0]


def disagreements(rng: random.Random, nodes: tuple[Node, ...], stats: Counter[str]) -> list[str]:
    """Play one case: the demands one after the other, what does not fit stays pending."""
    plan, found = Plan(nodes, [stock(node) for node in nodes]), list[str]()
    groups: list[PlacementGroup] = []
    pending: list[PlacementGroup] = []
    for index in range(rng.randint(3, 9)):
        demand = random_demand(rng, index)
        verdict, chosen = said(demand, nodes, plan)
        groups.append(create(demand))
        placed = is_placed(groups[-1], PATIENCE_S[verdict])
        stats[f"{verdict}: {'placed' if placed else 'pending'}"] += 1
        if placed != verdict.startswith("fits") and verdict != "fits, slowly":
            free = {n.name[:4]: f for n, f in zip(nodes, plan.free, strict=True)}
            found.append(f"{verdict}, Ray placed: {placed}: {demand} on {free}")
        if placed:
            names = placement_group_table(groups[-1])["bundles_to_node_id"]
            stats["other node"] += sorted(chosen) != sorted(names.values())
            actually(plan, demand, [names[i] for i in range(len(names))])
        elif verdict in ("fits, slowly", "refused"):
            # It might come at any time, and GCS's attempts at it hide from the others what is free.
            remove_placement_group(groups.pop())
        else:
            pending.append(groups[-1])
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
