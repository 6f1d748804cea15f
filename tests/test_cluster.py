"""The test cluster itself: what it starts is there, and what it stops is gone."""

from __future__ import annotations

import pytest

from cluster import RayHead, free_port, is_free, run_python, wait_until

pytestmark = pytest.mark.serve

HELLO = """
import sys
from ray import serve

@serve.deployment
def hello(request):
    return "hello"

serve.start(http_options={"port": int(sys.argv[1])})
serve.run(hello.bind(), name="hello")
"""


def test_a_head_with_a_second_node_leaves_nothing_behind() -> None:
    with RayHead(num_cpus=1, num_gpus=0) as head:
        head.add_node(num_cpus=2, resources={"special": 1})
        # `ray status` is the autoscaler's report, a few seconds old.
        wait_until(lambda: "special" in head.ray_status(), 30, "`ray status` to show the node")
        started = {process for node in head.nodes for process in node.processes()}
    assert started
    assert not [process for process in started if process.is_running()]
    assert not head.temp_dir.exists()


def test_serve_is_gone_after_the_test_and_can_start_again(ray_head: RayHead) -> None:
    for _ in range(2):
        port = free_port()
        run_python("-c", HELLO, str(port), env=ray_head.env, timeout_s=120).check_returncode()
        assert list(ray_head.serve_details()["applications"]) == ["hello"]
        ray_head.shut_down_serve()
        assert ray_head.serve_details()["applications"] == {}
        assert is_free(port)
