"""The plan, pure: Ray's rules one by one, verdicts, what would help, and the text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from app_v5 import (
    UNITS,
    Demand,
    Fit,
    Ledger,
    Node,
    Resources,
    allocate,
    format_amount,
    format_prediction,
    initial_free_gpus,
    matches,
    predict,
    requested_units,
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
    for fitting in predict(demands, nodes).fittings:
        places = [
            nodes[slot.node].name + "".join(str(index) for index, _ in slot.gpus)
            for replica in fitting.replicas
            for slot in replica
        ]
        found.append(" ".join(places) if fitting.fit is Fit.FITS else fitting.fit.name)
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
    found = allocate(tuple(round(f * UNITS) for f in free), requested_units(wanted))
    assert found == (None if taken is None else tuple(round(t * UNITS) for t in taken))


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
    assert matches({} if label is None else {"zone": label}, {"zone": wanted}) is expected


@pytest.mark.parametrize(
    ("total", "running", "free", "expected"),
    [
        pytest.param(2, [], None, (1, 1), id="nothing runs"),
        pytest.param(2, [0.45, 0.45, 0.45], None, (0.1, 0.55), id="replayed in order"),
        pytest.param(2, [0.45], 0.55, (0.55, 0), id="somebody else holds a whole one"),
        pytest.param(2, [0.45], 1.25, (0.55, 0.7), id="or a share: off the freest"),
        pytest.param(2, [0.6, 0.6, 0.6], None, (0, 0.2), id="what cannot be: spread over both"),
        pytest.param(1, [0.45], 0.9, (0.55,), id="more free than it can be: not believed"),
        pytest.param(0, [], 0, (), id="no GPU"),
    ],
)
def test_free_gpus_are_guessed_with_care(
    total: float, running: list[float], free: float | None, expected: tuple[float, ...]
) -> None:
    assert initial_free_gpus(total, running, free) == pytest.approx(expected)


def test_a_ledger_is_a_value() -> None:
    ledger = Ledger.of([B])
    fitting, after = ledger.place(G45)
    assert fitting.fit is Fit.FITS
    assert ledger.place(G45)[0] == fitting
    assert after.place(G45)[0].fit is Fit.NOT_NOW


def test_what_depends_on_the_moment_is_not_sure() -> None:
    """GCS picks A, which refuses, before B; and what waits so makes it lose sight of A."""
    shares = [HALF_A, node("B", (0.8,), CPU=8, GPU=1)]
    large, small = demand("x", {"GPU": 0.7}), demand("y", {"GPU": 0.3})
    assert [f.sure for f in predict([large, large, small], shares).fittings] == [False, True, False]
    assert [f.sure for f in predict([small, small], shares).fittings] == [True, True]


def test_growth_counts_what_remains() -> None:
    first = demand("x", {"GPU": 0.45}, replicas=1, max_replicas=5)
    prediction = predict([first, first], [A])
    assert [fitting.room_for for fitting in prediction.fittings] == [3, 3]


def test_the_text_of_a_tight_cluster() -> None:
    falcon3 = demand("falcon3", {"CPU": 1, "GPU": 0.45}, replicas=2, max_replicas=3)
    falcon_h1 = demand("falcon-h1", {"CPU": 1, "GPU": 0.45})
    huge = demand("huge", {"GPU": 99})
    prediction = predict(
        [falcon3, falcon_h1, huge],
        [node("10.0.0.1", CPU=16, GPU=1), node("10.0.0.2", (0.1,), CPU=4, GPU=1)],
        {"10.0.0.2": [("old/D", {"GPU": 0.9})]},
    )
    assert [fitting.label for fitting in prediction.misfits] == ["falcon-h1/D", "huge/D"]
    assert format_prediction(prediction)[1:] == [
        "node 10.0.0.1 · GPU 0: falcon3/D 2 x 0.45 · 0.10 free",
        "node 10.0.0.1 · CPU: 2 of 16 used by this plan, 14 free",
        "node 10.0.0.2 · GPU 0: already running 0.90 · 0.10 free",
        "node 10.0.0.2 · CPU: 0 of 4 used by this plan, 4 free",
        "falcon3/D: room for 2 of 3 replicas",
        "falcon-h1/D: predicted: does not fit now; needs 0.45 GPU; the largest free share is 0.10 "
        "(node 10.0.0.1, GPU 0, held by falcon3/D 0.90); lower num_gpus to 0.10, or lower "
        "min_replicas of falcon3/D from 2 to 1, or add a node like 10.0.0.1",
        "huge/D: predicted: can never fit; needs 99 GPU; no node has 99 GPU: the largest has 1 "
        "(node 10.0.0.1); lower num_gpus to 0.10, or add a node with 99 GPU",
    ]


def test_every_suggestion_helps() -> None:
    """Lowering to what was said really makes it fit, and nothing else falls out."""
    others = [demand("a", {"GPU": 0.45}), demand("b", {"GPU": 0.6}), demand("c", {"GPU": 0.3})]
    misfit = predict([*others, demand("d", {"GPU": 0.7})], [A]).fittings[3]
    assert misfit.shortage is not None
    assert misfit.shortage.help == ("lower num_gpus to 0.55", "add a node like A")
    assert not predict([*others, demand("d", {"GPU": 0.55})], [A]).misfits
    assert predict([*others, demand("d", {"GPU": 0.56})], [A]).misfits


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
    assert time.process_time() - started < 1
