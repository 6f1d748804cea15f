"""The test cluster itself: what it starts is there, and what it stops is gone."""

from __future__ import annotations

import pytest

from cluster import RayHead, wait_until
from user import on_request

pytestmark = pytest.mark.serve


@on_request
def test_a_head_with_a_second_node_leaves_nothing_behind() -> None:
    with RayHead(num_cpus=1, num_gpus=0) as head:
        head.add_node(num_cpus=2, resources={"special": 1})
        # `ray status` is the autoscaler's report, a few seconds old.
        wait_until(lambda: "special" in head.ray_status(), 30, "`ray status` to show the node")
        started = {process for node in head.nodes for process in node.processes()}
    assert started
    assert not [process for process in started if process.is_running()]
    assert not head.temp_dir.exists()
