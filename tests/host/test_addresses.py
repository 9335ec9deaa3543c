"""Which of a PC's addresses another one is told, and how an address to listen on may be written."""

from __future__ import annotations

import pytest

from petals_win.errors import UserError
from petals_win.host import addresses
from petals_win.host.addresses import listen_maddr, order

HOME = {
    "192.168.1.20": "Ethernet",
    "172.17.0.1": "docker0",
    "169.254.7.7": "veth12ab",
    "192.168.56.1": "Ethernet 2",
    "172.29.0.1": "vEthernet (WSL)",
    "127.0.0.1": "Loopback Pseudo-Interface 1",
}


def hosts(maddrs: list[str]) -> list[str]:
    return [maddr.split("/")[2] for maddr in maddrs]


def ordered(adapters: dict[str, str], *default: str) -> list[str]:
    maddrs = [f"/ip{6 if ':' in host else 4}/{host}/tcp/31330/p2p/12D3" for host in adapters]
    return hosts(order(maddrs, default=default, adapters=adapters))


@pytest.mark.parametrize("turn", range(len(HOME)))
def test_the_address_of_the_default_route_comes_first_in_whatever_order_they_are_found(turn):
    found = list(HOME.items())
    assert ordered(dict(found[turn:] + found[:turn]), "192.168.1.20")[0] == "192.168.1.20"


def test_what_no_other_pc_reaches_is_left_out_and_virtual_adapters_come_last():
    assert ordered(HOME, "192.168.1.20") == ["192.168.1.20", "172.17.0.1", "192.168.56.1", "172.29.0.1"]


def test_a_pc_without_a_route_to_the_internet():
    assert ordered(HOME)[0] == "192.168.1.20"
    assert ordered({"169.254.7.7": "Ethernet", "127.0.0.1": "lo"}) == ["169.254.7.7", "127.0.0.1"]
    assert ordered({"127.0.0.1": "lo"}) == ["127.0.0.1"]
    assert ordered({"fe80::1": "eth0", "10.0.0.5": "eth0", "fd00::5": "eth0"}) == ["10.0.0.5", "fd00::5"]


def test_a_vpn_that_takes_the_default_route_does_not_hide_the_home_network():
    assert ordered({"10.8.0.2": "tun0", "192.168.1.20": "eth0"}, "10.8.0.2")[0] == "192.168.1.20"
    assert ordered({"10.8.0.2": "wg0"}, "10.8.0.2") == ["10.8.0.2"]


def test_a_bridge_with_the_default_route_is_no_virtual_adapter():
    assert (
        ordered({"192.168.1.20": "vEthernet (External)", "10.1.1.1": "Ethernet"}, "192.168.1.20")[0] == "192.168.1.20"
    )


def test_addresses_of_the_internet_and_relays_come_behind_the_home_network():
    maddrs = ["/ip4/8.8.8.8/tcp/1/p2p/R/p2p-circuit", "/ip4/8.8.4.4/tcp/1", "/dns4/x/tcp/1", "/ip4/192.168.1.20/tcp/1"]
    first, second, *rest = order(maddrs, default=[], adapters={})
    assert (first, second) == (maddrs[3], maddrs[1]) and len(rest) == 2


def test_this_pc_is_asked():
    names = addresses.adapters()
    assert addresses.default_addresses() <= set(names)


@pytest.mark.parametrize(
    ("host", "maddr"),
    [
        ("0.0.0.0", "/ip4/0.0.0.0/tcp/5"),
        ("127.0.0.1", "/ip4/127.0.0.1/tcp/5"),
        ("::1", "/ip6/::1/tcp/5"),
        ("[::1]", "/ip6/::1/tcp/5"),
        ("::", "/ip6/::/tcp/5"),
        ("0:0:0:0:0:0:0:1", "/ip6/::1/tcp/5"),
        ("localhost", "/ip4/127.0.0.1/tcp/5"),
    ],
)
def test_addresses_to_listen_on(host, maddr):
    assert listen_maddr(host, 5) == maddr
    assert addresses.is_loopback(maddr) == (host not in ("0.0.0.0", "::"))


@pytest.mark.parametrize(
    "host", ["", "*", "my-pc", "my-pc.local", "192.168.1", "192.168.1.300", "http://1.2.3.4", "fe80::1%eth0"]
)
def test_what_is_no_address_gets_a_sentence(host):
    with pytest.raises(UserError, match="--host an IP address"):
        listen_maddr(host, 5)
