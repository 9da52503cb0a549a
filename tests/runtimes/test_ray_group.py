"""Which network gloo uses on a cluster."""

import os

import pytest

from rotssl.runtimes.ray_cluster import import_ray


@pytest.fixture
def group():
    import_ray()
    from rotssl.runtimes import ray_group

    return ray_group


def test_gloo_uses_the_network_of_the_node_s_address_unless_told_otherwise(group, monkeypatch):
    import psutil

    monkeypatch.setenv(group.INTERFACE, "")
    for name, known in psutil.net_if_addrs().items():
        monkeypatch.setattr(group.ray.util, "get_node_ip_address", lambda known=known: known[0].address)
        monkeypatch.setenv(group.INTERFACE, "")
        group.choose_interface()
        assert os.environ[group.INTERFACE] == name
    monkeypatch.setenv(group.INTERFACE, "mine")
    group.choose_interface()
    assert os.environ[group.INTERFACE] == "mine"
    monkeypatch.setenv(group.INTERFACE, "")
    monkeypatch.setattr(group.ray.util, "get_node_ip_address", lambda: "203.0.113.1")
    group.choose_interface()  # an address that no interface has, behind a translation: gloo chooses by itself
    assert os.environ[group.INTERFACE] == ""
