"""The section Plan, pure: Ray's rules one by one, verdicts, who holds what, and the text."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from ray._raylet import node_labels_match_selector

from app_v5 import (
    SLOW,
    STEPS,
    Amounts,
    Demand,
    Node,
    Options,
    RayCluster,
    Reservation,
    Resources,
    format_amount,
    format_prediction,
    gpus_of,
    predict,
    stock,
    take,
)


def node(name: str, shares: tuple[float, ...] = (), **total: float) -> Node:
    """A node of which all is free, but of its GPUs these shares where they are given."""
    free = {**total, "GPU": sum(shares)} if shares else total
    return Node(name, total, free)


def demand(
    name: str, *bundles: Resources, strategy: str = "PACK", replicas: int = 1, **more: Any
) -> Demand:
    most = more.pop("max_replicas", replicas)
    first = more.pop("initial_replicas", replicas)
    return Demand(name, "D", bundles, strategy, replicas, most, first, **more)


def where(demands: Sequence[Demand], nodes: Sequence[Node]) -> list[str]:
    """Each demand's places as they are found, "A0 B" being GPU 0 of A and something on B; or its
    verdict."""
    found, plan = [], predict(demands, nodes)
    slots = iter(plan.slots)
    for fit in plan.fits:
        count = 0 if fit.misfit else fit.demand.initial_replicas
        mine = itertools.islice(slots, count * len(fit.demand.bundles))
        places = [nodes[n].name + "".join(map(str, gpus_of(taken))) for _, n, taken in mine]
        verdict = "NEVER" if fit.never else "NOT NOW"
        assert bool(fit.misfit) or not fit.never
        found.append(verdict if fit.misfit else " ".join(places))
    return found


@pytest.mark.parametrize(
    ("free", "wanted", "taken"),
    [
        pytest.param((1, 1), 0.45, (0.45, 0), id="a share comes from one GPU"),
        pytest.param((1, 0.55), 0.45, (0, 0.45), id="from the GPU that it fits best"),
        pytest.param((0.55, 0.55), 0.9, (), id="not from two"),
        pytest.param((0.5, 1, 1), 2, (0, 1, 1), id="whole GPUs that are wholly free"),
        pytest.param((0.5, 1, 0.5), 2, (), id="halves are no whole"),
        pytest.param((1, 1), 1.45, (1, 0.45), id="a whole one and a share"),
        pytest.param((0.5, 1), 1.45, (0.45, 1), id="the share beside another"),
        pytest.param((0.6,), 0.6, (0.6,), id="exactly what is left"),
        pytest.param((0.1 + 0.2,), 0.3, (0.3,), id="float noise does not count"),
    ],
)
def test_a_raylet_allocates_gpus_one_by_one(
    free: tuple[float, ...], wanted: float, taken: tuple[float, ...]
) -> None:
    gpus = Amounts({gpu: round(share * STEPS) for gpu, share in enumerate(free)})
    expected = Amounts({gpu: round(share * STEPS) for gpu, share in enumerate(taken)})
    assert take(gpus, round(wanted * STEPS)) == (expected if taken else None)


def holding(label: str, *gpus: int, **amounts: float) -> Reservation:
    """What a replica holds on a node, of these GPUs."""
    application, _, deployment = label.partition("/")
    return Reservation(application, deployment, "r", "1", "n", amounts, gpus)


A, B = node("A", CPU=8, GPU=2), node("B", CPU=8, GPU=1)
HALF_A = replace(node("A", (0.55, 0.55), CPU=8, GPU=2), holders=(holding("old/D", GPU=0.45),))
TWINS = (node("A", CPU=4), node("B", CPU=4))
G45 = demand("x", {"CPU": 1, "GPU": 0.45}, replicas=2)
CPU = {"CPU": 1}
IN_B = Node("Z", CPU, CPU, partial(node_labels_match_selector, {"zone": "b"}))


@pytest.mark.parametrize(
    ("demands", "nodes", "places"),
    [
        pytest.param([G45, G45], [B], ["B0 B0", "NOT NOW"], id="two shares fill one GPU"),
        pytest.param([G45, G45], [A], ["A0 A0", "A1 A1"], id="the best fit fills a GPU first"),
        pytest.param([demand("x", {"GPU": 0.9})], [HALF_A], ["NOT NOW"], id="halves do not add up"),
        pytest.param([demand("x", {"GPU": 3})], [A, B], ["NEVER"], id="a bundle needs one node"),
        pytest.param(
            [demand("x", {"GPU": 0.9}), demand("y", CPU), demand("z", {"CPU": 99})],
            [HALF_A],
            ["NOT NOW", "A", "NEVER"],
            id="what does not fit takes nothing from the others",
        ),
        pytest.param(
            [demand("x", {"GPU": 0.9}, replicas=3)],
            [A],
            ["NEVER"],
            id="three where two are the most",
        ),
        pytest.param(
            [demand("x", {"GPU": 2}, {"GPU": 1})], [A, B], ["A01 B0"], id="pack overflows"
        ),
        pytest.param(
            [demand("x", {"GPU": 2}, {"GPU": 1}, strategy="STRICT_PACK")],
            [A, B],
            ["NEVER"],
            id="strict pack does not",
        ),
        pytest.param([demand("x", CPU, CPU)], TWINS, ["A A"], id="pack keeps together"),
        pytest.param(
            [demand("x", CPU, CPU, CPU, strategy="SPREAD")],
            TWINS,
            ["A B A"],
            id="spread uses a node again where it must",
        ),
        pytest.param(
            [demand("x", CPU, CPU, CPU, strategy="STRICT_SPREAD")],
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
            [demand("x", {"CPU": 0.1}, max_replicas_per_node=1)] * 2
            + [demand("y", {"CPU": 0.1}, max_replicas_per_node=1)],
            TWINS[:1],
            ["A", "NOT NOW", "A"],
            id="each deployment counts its own",
        ),
        pytest.param(
            [demand("x", CPU, label_selectors=({"zone": "b"},))],
            [A, IN_B],
            ["Z"],
            id="labels",
        ),
        pytest.param(
            [demand("x", CPU, CPU, label_selectors=({"zone": "b"}, {}), strategy="STRICT_SPREAD")],
            [A, IN_B],
            ["Z A"],
            id="labels of one bundle",
        ),
        pytest.param([demand("x", CPU)], [], ["NEVER"], id="no node at all"),
        pytest.param([demand("x", {"CPU": 9}, replicas=0)], [A], ["NEVER"], id="zero of too large"),
        pytest.param([demand("x", CPU, replicas=0)], [A], [""], id="scaled from zero"),
        pytest.param(
            [demand("x", {"GPU": 1}, replicas=0)], [HALF_A], [""], id="zero of what is in use"
        ),
        pytest.param(
            [demand("x", {"memory": 2e9, "tpu-slice": 1})], [A], ["NEVER"], id="unknown resource"
        ),
    ],
)
def test_replicas_go_where_ray_puts_them(
    demands: list[Demand], nodes: Sequence[Node], places: list[str]
) -> None:
    assert where(demands, nodes) == places


def test_a_node_whose_gpus_refuse_is_passed_over_and_that_may_take_long() -> None:
    """Ray picks A, by the sum of what is free there, before it finds B."""
    shares = [HALF_A, node("B", (0.8,), CPU=8, GPU=1)]
    large, small = demand("x", {"GPU": 0.7}), demand("y", {"GPU": 0.3})
    assert where([large, small], shares) == ["B0", "A0"]
    plan = predict([large, small], shares)
    assert [fit.slow for fit in plan.fits] == [True, False]
    assert [line for line in format_prediction(plan) if SLOW in line] == [f"x/D: {SLOW}"]


def test_bundles_that_ray_packs_on_a_node_whose_gpus_refuse_may_take_long() -> None:
    """Ray packs both on B, by the sum of what is free there."""
    nodes = [node("A", (0.9,), CPU=4, GPU=1), node("B", (0.2, 1), CPU=4, GPU=2)]
    two = demand("x", {"CPU": 1, "GPU": 0.5}, {"CPU": 2, "GPU": 0.55})
    assert where([two], nodes) == ["B1 A0"]
    assert predict([two], nodes).fits[0].slow
    assert not predict([two], [nodes[0], node("B", (1, 1), CPU=4, GPU=2)]).fits[0].slow


# -- what is free --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "running", "free", "expected"),
    [
        pytest.param(2, [], 2, (1, 1), id="nothing runs"),
        pytest.param(2, [0.45, 0.45, 0.45], 0.65, (0.1, 0.55), id="replayed in order"),
        pytest.param(2, [0.45], 0.55, (0.55, 0), id="somebody else holds a whole one"),
        pytest.param(2, [0.45], 1.25, (0.55, 0.7), id="or a share: off the freest"),
        pytest.param(2, [0.6, 0.6, 0.6], 0.2, (0, 0.2), id="what cannot be: spread over both"),
        pytest.param(1, [0.45], 0.9, (0.55,), id="more free than it can be: not believed"),
        pytest.param(0, [], 0, (), id="no GPU"),
    ],
)
def test_free_gpus_are_guessed_with_care(
    total: float, running: list[float], free: float, expected: tuple[float, ...]
) -> None:
    held = tuple(holding(f"a{index}/D", GPU=share) for index, share in enumerate(running))
    guessed = stock(Node("n", {"GPU": total}, {"GPU": free}, holders=held))
    assert [guessed[gpu] for gpu in gpus_of(guessed)] == [round(n * STEPS) for n in expected]
    assert guessed["GPU"] == round(sum(expected) * STEPS)


def test_each_worker_of_a_replica_has_its_part_of_one_gpu() -> None:
    two = holding("a/D", 0, 1, GPU=1.2)
    guessed = stock(Node("n", {"GPU": 2.0}, {"GPU": 0.8}, holders=(two,)))
    assert [guessed[gpu] for gpu in gpus_of(guessed)] == [4_000, 4_000]


def test_what_gives_way_counts_as_free() -> None:
    row = {
        "Resources": {"CPU": 8.0, "GPU": 1.0},
        "Labels": {"zone": "a"},
        "NodeID": "1",
        "NodeManagerAddress": "n",
        "Alive": True,
    }
    held = [
        Reservation("x/old", "D", "r", "1", "n", {"CPU": 2.0, "GPU": 0.45}),
        Reservation("other", "D", "r", "1", "n", {"CPU": 1.0, "GPU": 0.3}),
    ]
    cluster: Any = RayCluster(Options("c"))
    available = {"1": {"CPU": 5.0, "GPU": 0.25}}
    state = SimpleNamespace(available_resources_per_node=lambda: available)
    raylet = SimpleNamespace(node_labels_match_selector=node_labels_match_selector)
    private = SimpleNamespace(state=state)
    cluster.ray = SimpleNamespace(nodes=lambda: [row], _private=private, _raylet=raylet)
    cluster.reservations = lambda: held
    cluster.ask_dashboard = lambda *_, **__: "not JSON"
    [stays], [goes] = cluster.nodes(), cluster.nodes({"x/old"})
    assert (stays.free["CPU"], stock(stays)[0]) == (5.0, 2_500)
    assert (goes.free["CPU"], stock(goes)[0]) == (7.0, 7_000)
    assert (stays.holders, goes.holders) == (tuple(held), tuple(held[1:]))
    assert goes.name == "n"
    assert goes.matches({"zone": "in(a,b)"})
    assert not goes.matches({"zone": "!a"})


# -- the text ------------------------------------------------------------------------------------


def test_the_text_of_a_tight_cluster() -> None:
    demands = [
        demand("falcon3", {"CPU": 1, "GPU": 0.45}, replicas=2, max_replicas=3),
        demand("falcon-h1", {"CPU": 1, "GPU": 0.45}, replicas=1, max_replicas=9),
        demand("falcon-h1-2", {"CPU": 1, "GPU": 0.45}, replicas=2),
        demand("huge", {"GPU": 99}),
    ]
    old = Node(
        "10.0.0.2",
        {"CPU": 4, "GPU": 1},
        {"CPU": 3, "GPU": 0.5},
        holders=(holding("old/D", CPU=1, GPU=0.5),),
    )
    plan = predict(demands, [node("10.0.0.1", CPU=16, GPU=1), old])
    assert [fit.demand.label for fit in plan.misfits] == ["falcon-h1-2/D", "huge/D"]
    assert format_prediction(plan)[1:] == [
        "node 10.0.0.1 · GPU 0 ██████████████████·· falcon3/D 0.90 · 0.10 free",
        "node 10.0.0.1 · CPU: 2 of 16 used by this plan, 14 free",
        "node 10.0.0.2 · GPU 0 █████████▓▓▓▓▓▓▓▓▓▓· falcon-h1/D 0.45 + already running 0.50"
        " · 0.05 free",
        "node 10.0.0.2 · CPU: 1 of 4 used by this plan, 2 free",
        "falcon3/D: room for 2 of 3 replicas",
        "falcon-h1/D: room for 1 of 9 replicas",
        "falcon-h1-2/D: predicted: does not fit now; needs 0.45 GPU; the most free in one place is "
        "0.10 (node 10.0.0.1, GPU 0, held by falcon3/D 0.90)",
        "huge/D: predicted: can never fit; needs 99 GPU; the most free in one place is 1 "
        "(node 10.0.0.1)",
    ]


@pytest.mark.parametrize(
    ("demands", "nodes", "reason"),
    [
        pytest.param(
            [demand("x", {"GPU": 0.45})],
            [Node("A", {"GPU": 1}, {"GPU": 0.4}, holders=(holding("old/D", GPU=0.6),))],
            "needs 0.45 GPU; the most free in one place is 0.40 "
            "(node A, GPU 0, held by old/D 0.60)",
            id="a share that something running holds",
        ),
        pytest.param(
            [demand("x", {"GPU": 0.7}), demand("y", {"GPU": 2})],
            [A],
            "needs 2 GPU; the most free in one place is 1.30 (node A, held by x/D 0.70)",
            id="whole ones of which a share is gone",
        ),
        pytest.param(
            [demand(n, CPU) for n in "abcd"] + [demand("x", CPU)],
            TWINS[:1],
            "needs 1 CPU; the most free in one place is 0 "
            "(node A, held by a/D 1 + b/D 1 + c/D 1 + 1 others)",
            id="many holders",
        ),
        pytest.param(
            [demand("x", {"CPU": 1, "tpu-slice": 1})],
            [A],
            "needs 1 tpu-slice; the most free in one place is 0 (node A)",
            id="unknown resource",
        ),
        pytest.param(
            [demand("x", CPU, label_selectors=({"zone": "b"},))],
            [A],
            "no node matches the labels {'zone': 'b'}",
            id="labels",
        ),
        pytest.param(
            [demand("x", {"GPU": 0.1})],
            [node("A", CPU=8), node("B", (0,), CPU=8, GPU=1)],
            "needs 0.10 GPU; the most free in one place is 0 (node B, GPU 0)",
            id="a node without a GPU does not count",
        ),
        pytest.param(
            [demand("x", {"CPU": 0.1}, replicas=2, max_replicas_per_node=1)],
            TWINS[:1],
            "1 of 2 replicas fit; needs 0.1 CPUs in 1 bundle(s) (PACK, max_replicas_per_node: 1); "
            "free on all nodes, in pieces: 3.9 CPUs",
            id="a limit of replicas a node",
        ),
        pytest.param(
            [demand("x", CPU, CPU, CPU, strategy="STRICT_SPREAD")],
            TWINS,
            "needs 3.0 CPUs in 3 bundle(s) (STRICT_SPREAD); free on all nodes, in pieces: 8.0 CPUs",
            id="each bundle fits, and they do not together",
        ),
        pytest.param(
            [demand("x", {"CPU": 5, "GPU": 1})],
            [node("C", CPU=8), node("G", CPU=4, GPU=1)],
            "needs 5.0 CPUs, 1.0 GPUs in 1 bundle(s) (PACK); "
            "free on all nodes, in pieces: 12.0 CPUs, 1.0 GPUs",
            id="each resource is there, and not on one node",
        ),
    ],
)
def test_a_misfit_says_what_is_short_and_who_holds_it(
    demands: list[Demand], nodes: Sequence[Node], reason: str
) -> None:
    assert predict(demands, nodes).fits[-1].misfit.partition("; ")[2] == reason


def test_some_replicas_fit() -> None:
    nodes = [node("A", GPU=1), Node("B", {"GPU": 1}, {})]
    plan = predict([demand("x", {"GPU": 0.9}, replicas=2)], nodes)
    assert format_prediction(plan)[1:] == [
        "node A · GPU 0 ██████████████████·· x/D 0.90 · 0.10 free",
        "node B · GPU 0 ████████████████████ already running 1 · 0 free",
        "x/D: predicted: does not fit now; 1 of 2 replicas fit; needs 0.90 GPU; the most free "
        "in one place is 0.10 (node A, GPU 0, held by x/D 0.90)",
    ]


def test_autoscaling_starts_with_the_initial_replicas() -> None:
    scaled = demand("x", {"GPU": 0.5}, replicas=0, max_replicas=5, initial_replicas=3)
    assert format_prediction(predict([scaled], [A]))[-1] == "x/D: room for 4 of 5 replicas"
    assert where([scaled, demand("y", {"GPU": 1})], [A]) == ["A0 A0 A1", "NOT NOW"]
    # Serve may come down to the minimum, so too many at first are no reason to refuse.
    assert where([scaled], [node("B", GPU=1)]) == ["NOT NOW"]
    [fit] = predict([scaled], [node("B", GPU=1)]).fits
    assert "x/D: predicted: does not fit now; 2 of 3 replicas fit; " in fit.misfit


def test_growth_counts_what_remains() -> None:
    first = demand("x", {"GPU": 0.45}, replicas=1, max_replicas=5)
    zero = demand("z", {"GPU": 0.5}, replicas=0, max_replicas=5)
    assert [
        line for line in format_prediction(predict([first, first, zero], [A])) if "room" in line
    ] == [
        "x/D: room for 3 of 5 replicas",
        "x/D: room for 3 of 5 replicas",
        "z/D: room for 2 of 5 replicas",
    ]


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
    assert time.process_time() - started < 2
