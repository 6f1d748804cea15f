"""Fixtures that more than one test file uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import RayHead, free_port
from tiny_models import make_falcon_h1, make_llama
from user import User


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """The session's one Ray cluster: 16 logical CPUs, 2 logical GPUs, the CPU engine."""
    with RayHead() as head:
        yield head


@pytest.fixture(scope="module")
def gpu_ray_head() -> Iterator[RayHead]:
    """A cluster where vLLM takes logical GPUs for real ones, and runs its real Ray executor."""
    with RayHead(logical_gpus=True) as head:
        yield head


@pytest.fixture
def serve_head(ray_head: RayHead) -> Iterator[RayHead]:
    """`ray_head`, with Serve removed after the test."""
    with _serve_removed_after(ray_head) as head:
        yield head


@pytest.fixture
def gpu_serve_head(gpu_ray_head: RayHead) -> Iterator[RayHead]:
    """`gpu_ray_head`, with Serve removed after the test."""
    with _serve_removed_after(gpu_ray_head) as head:
        yield head


@contextmanager
def _serve_removed_after(head: RayHead) -> Iterator[RayHead]:
    try:
        yield head
    finally:
        head.shut_down_serve()


@pytest.fixture
def http_port() -> int:
    """A port for the `http_options` of a test's config: 8000 may be somebody else's."""
    return free_port()


@pytest.fixture
def user(serve_head: RayHead, tmp_path: Path, http_port: int) -> User:
    return User(serve_head, tmp_path, http_port)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama on disk: the architecture of Falcon3."""
    return make_llama(tmp_path_factory.getbasetemp() / "falcon3")


@pytest.fixture(scope="session")
def tiny_falcon_h1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Falcon-H1 on disk: attention and Mamba."""
    return make_falcon_h1(tmp_path_factory.getbasetemp() / "falcon-h1")
