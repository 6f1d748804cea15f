"""The plan, pure: Ray's rules one by one, verdicts, who holds what, and the text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from app_v5 import (
    SLOW,
    STEPS,
    Demand,
    Node,
    Resources,
    format_amount,
    format_prediction,
    free_gpus,
    matches,
    new_nodes,
    predict,
    take,
)


def node(name: str, free_gpus: tuple[float, ...] = (), **total: float) -> Node:
    free = {**total, "GPU": sum(free_gpus)} if free_gpus else total
    return Node(name, total, free, free_gpus)


def demand(
    name: str, *bundles: Resources, strategy: str = "PACK", replicas: int = 1, **more: Any
) -> Demand:
    most = more.pop("max_replicas", replicas)
    return Demand(name, "D", bundles, strategy, replicas, most, **more)


def where(demands: Sequence[Demand], nodes: Sequence[Node]) -> list[str]:
    """Each demand's verdict or places: "A0 B" is GPU 0 of A and something on B."""
    found = []
    for fit in predict(demands, nodes).fits:
        places = [
            nodes[slot.node].name + "".join(map(str, slot.gpus))
            for replica in fit.slots
            for slot in replica
        ]
        misfit = "NEVER" if fit.never else "NOT_NOW"
        found.append(misfit if fit.reason else " ".join(places))
    return found


@pytest.mark.parametrize(
    ("free", "wanted", "taken"),
    [
        pytest.param((1, 1), 0.45, (0.45, 0), id="a share comes from one GPU"),
        pytest.param((1, 0.55), 0.45, (0, 0.45), id="from the GPU that it fits best"),
        pytest.param((0.55, 0.55), 0.9, None, id="not from two"),
        pytest.param((0.5, 1, 1), 2, (0, 1, 1), id="whole GPUs that are wholly free"),
        pytest.param((0.5, 1, 0.5), 2, None, id="halves are no whole"),
        pytest.param((1, 1), 1.45, (1, 0.45), id="a whole one and a share"),
        pytest.param((0.5, 1), 1.45, (0.45, 1), id="the share beside another"),
        pytest.param((0.6,), 0.6, (0.6,), id="exactly what is left"),
        pytest.param((0.1 + 0.2,), 0.3, (0.3,), id="float noise does not count"),
    ],
)
def test_a_raylet_allocates_gpus_one_by_one(
    free: tuple[float, ...], wanted: float, taken: tuple[float, ...] | None
) -> None:
    found = take(tuple(round(f * STEPS) for f in free), round(wanted * STEPS))
    assert found == (None if taken is None else tuple(round(t * STEPS) for t in taken))


A, B = node("A", CPU=8, GPU=2), node("B", CPU=8, GPU=1)
HALF_A = node("A", (0.55, 0.55), CPU=8, GPU=2)
TWINS = (node("A", CPU=4), node("B", CPU=4))
G45 = demand("x", {"CPU": 1, "GPU": 0.45}, replicas=2)


@pytest.mark.parametrize(
    ("demands", "nodes", "places"),
    [
        pytest.param([G45, G45], [B], ["B0 B0", "NOT_NOW"], id="two shares fill one GPU"),
        pytest.param([G45, G45], [A], ["A0 A0", "A1 A1"], id="the best fit fills a GPU first"),
        pytest.param([demand("x", {"GPU": 0.9})], [HALF_A], ["NOT_NOW"], id="halves do not add up"),
        pytest.param(
            [demand("x", {"GPU": 0.7})],
            [HALF_A, node("B", (0.8,), CPU=8, GPU=1)],
            ["B0"],
            id="a refused node is passed over",
        ),
        pytest.param([demand("x", {"GPU": 3})], [A, B], ["NEVER"], id="a bundle needs one node"),
        pytest.param(
            [demand("x", {"GPU": 2}, {"GPU": 1})], [A, B], ["A01 B0"], id="pack overflows"
        ),
        pytest.param(
            [demand("x", {"GPU": 2}, {"GPU": 1}, strategy="STRICT_PACK")],
            [A, B],
            ["NEVER"],
            id="strict pack does not",
        ),
        pytest.param(
            [demand("x", {"CPU": 1}, {"CPU": 1})], TWINS, ["A A"], id="pack keeps together"
        ),
        pytest.param(
            [demand("x", {"CPU": 1}, {"CPU": 1}, {"CPU": 1}, strategy="SPREAD")],
            TWINS,
            ["A B A"],
            id="spread uses a node again where it must",
        ),
        pytest.param(
            [demand("x", {"CPU": 1}, {"CPU": 1}, {"CPU": 1}, strategy="STRICT_SPREAD")],
            TWINS,
            ["NEVER"],
            id="strict spread does not",
        ),
        pytest.param(
            [demand("x", {"CPU": 0.1}, replicas=3, max_replicas_per_node=1)],
            TWINS,
            ["NEVER"],
            id="one replica a node",
        ),
        pytest.param(
            [demand("x", {"CPU": 0.1}, replicas=7, max_replicas_per_node=7)],
            TWINS[:1],
            [" ".join("AAAAAAA")],
            id="seven sevenths are one",
        ),
        pytest.param(
            [demand("x", {"CPU": 1}, label_selectors=({"zone": "b"},))],
            [A, Node("Z", {"CPU": 1}, {"CPU": 1}, labels={"zone": "b"})],
            ["Z"],
            id="labels",
        ),
        pytest.param([demand("x", {"CPU": 1})], [], ["NEVER"], id="no node at all"),
        pytest.param([demand("x", {"CPU": 9}, replicas=0)], [A], ["NEVER"], id="zero of too large"),
        pytest.param([demand("x", {"CPU": 1}, replicas=0)], [A], [""], id="scaled from zero"),
        pytest.param(
            [demand("x", {"memory": 2e9, "tpu-slice": 1})], [A], ["NEVER"], id="unknown resource"
        ),
    ],
)
def test_replicas_go_where_ray_puts_them(
    demands: list[Demand], nodes: Sequence[Node], places: list[str]
) -> None:
    assert where(demands, nodes) == places


@pytest.mark.parametrize(
    ("wanted", "label", "expected"),
    [
        pytest.param("a", "a", True, id="equal"),
        pytest.param("!a", "a", False, id="not equal"),
        pytest.param("in(a, b)", "b", True, id="one of"),
        pytest.param("!in(a,b)", "b", False, id="none of"),
        pytest.param("!in(a,b)", None, True, id="a missing label is none of them"),
        pytest.param("a", None, False, id="a missing label equals nothing"),
    ],
)
def test_label_selectors(wanted: str, label: str | None, expected: bool) -> None:
    labels = {} if label is None else {"zone": label}
    assert matches(Node("n", {}, {}, labels=labels), {"zone": wanted}) is expected


@pytest.mark.parametrize(
    ("total", "running", "free", "expected"),
    [
        pytest.param(2, [], 2, (1, 1), id="nothing runs"),
        pytest.param(2, [0.45, 0.45, 0.45], 0.65, (0.1, 0.55), id="replayed in order"),
        pytest.param(2, [0.45], 0.55, (0.55, 0), id="somebody else holds a whole one"),
        pytest.param(2, [0.45], 1.25, (0.55, 0.7), id="or a share: off the freest"),
        pytest.param(1, [0.45], 0.9, (0.55,), id="more free than it can be: not believed"),
        pytest.param(0, [], 0, (), id="no GPU"),
    ],
)
def test_free_gpus_are_guessed_with_care(
    total: float, running: list[float], free: float, expected: tuple[float, ...]
) -> None:
    assert free_gpus(total, running, free) == pytest.approx(expected)


def test_what_ray_may_be_slow_to_see_is_said() -> None:
    """GCS picks A, which refuses, before B."""
    shares = [HALF_A, node("B", (0.8,), CPU=8, GPU=1)]
    plan = predict([demand("x", {"GPU": 0.7}), demand("y", {"GPU": 0.3})], shares)
    assert [fit.slow for fit in plan.fits] == [True, False]
    assert f"x/D: {SLOW}" in format_prediction(plan)


def test_growth_counts_what_remains() -> None:
    first = demand("x", {"GPU": 0.45}, replicas=1, max_replicas=5)
    lines = format_prediction(predict([first, first], [A]))
    assert lines[-2:] == ["x/D: room for 3 of 5 replicas"] * 2


def test_the_text_of_a_tight_cluster() -> None:
    falcon3 = demand("falcon3", {"CPU": 1, "GPU": 0.45}, replicas=2, max_replicas=3)
    falcon_h1 = demand("falcon-h1", {"CPU": 1, "GPU": 0.45})
    huge = demand("huge", {"GPU": 99})
    old = Node("10.0.0.2", {"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 0.1}, (0.1,), {}, HELD)
    plan = predict([falcon3, falcon_h1, huge], [node("10.0.0.1", CPU=16, GPU=1), old])
    assert [fit.demand.label for fit in plan.misfits] == ["falcon-h1/D", "huge/D"]
    assert format_prediction(plan)[1:] == [
        "node 10.0.0.1 · GPU 0: falcon3/D 2 x 0.45 · 0.10 free",
        "node 10.0.0.1 · CPU: 2 of 16 used by this plan, 14 free",
        "node 10.0.0.2 · GPU 0: already running 0.90 · 0.10 free",
        "node 10.0.0.2 · CPU: 0 of 4 used by this plan, 4 free",
        "falcon3/D: room for 2 of 3 replicas",
        "falcon-h1/D: predicted: does not fit now; needs 0.45 GPU; the largest free share is 0.10 "
        "(node 10.0.0.1, GPU 0, held by falcon3/D 0.90)",
        "huge/D: predicted: can never fit; needs 99 GPU; no node has 99 GPU: the largest has 1 "
        "(node 10.0.0.1)",
    ]


HELD = (("old/D", {"GPU": 0.9}),)


def test_who_holds_what_is_short_counts_what_runs_and_what_is_planned() -> None:
    old = Node("n", {"CPU": 4}, {"CPU": 1}, holders=(("old/D", {"CPU": 3.0}),))
    plan = predict([demand("a", {"CPU": 0.5}), demand("b", {"CPU": 2})], [old])
    assert plan.fits[1].reason == (
        "needs 2 CPU; the most that one node has free is 0.50 (node n, held by old/D 3 + a/D 0.50)"
    )


MONITOR = """
2026-01-01 00:00:00,000 INFO monitor.py:1 -- Using Autoscaling Config:
max_workers: 4
provider: {type: external}
available_node_types:
  head: {resources: {CPU: 4}, max_workers: 0}
  gpu: {resources: {CPU: 4, GPU: 1}, max_workers: 2}
2026-01-01 00:00:01,000 INFO next
""".replace("Config:\n", "Config: \n")


def test_nodes_that_an_autoscaler_may_add_make_things_wait_and_not_fail() -> None:
    new = new_nodes(MONITOR)
    assert [dict(one.total) for one in new] == [{"CPU": 4, "GPU": 1}] * 2
    now = [node("head", CPU=4)]
    fits = predict(
        [demand("a", {"GPU": 1}, replicas=2), demand("b", {"GPU": 3})], [*now, *new]
    ).fits
    assert [fit.never for fit in fits] == [False, True]
    assert all(fit.reason for fit in fits)
    v1 = "x INFO StandardAutoscaler: {'provider': {'type': 'aws'}, 'max_workers': 1, "
    v1 += "'available_node_types': {'big': {'resources': {'CPU': 64}}}}\n"
    assert [one.total["CPU"] for one in new_nodes(v1)] == [64]
    assert new_nodes(MONITOR.replace("external", "readonly")) == new_nodes("nothing") == []


@pytest.mark.parametrize(
    ("resource", "amount", "text"),
    [("GPU", 0.1, "0.10"), ("GPU", 0.45, "0.45"), ("CPU", 16.0, "16"), ("GPU", 0.125, "0.125"),
     ("memory", 2e9, "2 GB"), ("GPU", 1 / 3, "0.3333")],
)  # fmt: skip
def test_amounts_are_short(resource: str, amount: float, text: str) -> None:
    assert format_amount(resource, amount) == text


def test_a_hundred_deployments_on_fifty_nodes_take_no_time() -> None:
    nodes = [node(f"n{index}", CPU=64, GPU=8) for index in range(50)]
    demands = [
        demand(f"a{index}", {"CPU": 1, "GPU": 0.45}, replicas=2, max_replicas=4)
        for index in range(100)
    ]
    started = time.process_time()
    assert not predict(demands, nodes).misfits
    print(f"100 deployments on 50 nodes: {time.process_time() - started:.1f} s of CPU")
