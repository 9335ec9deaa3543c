"""TCP ports."""

import os
import socket

import pytest
from free_ports import free_port

from petals_win.errors import UserError
from petals_win.host.ports import check_port_free


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_named_with_its_user(host):
    port = free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        with pytest.raises(UserError) as refused:
            check_port_free(host, port)
    assert f"Port {port} is in use" in str(refused.value)
    assert f"process {os.getpid()}" in str(refused.value) or "another program" in str(refused.value)
    check_port_free(host, port)  # and free again


def test_port_0_is_always_free():
    check_port_free("127.0.0.1", 0)


def test_no_port_at_all():
    with pytest.raises(UserError, match="no port"):
        check_port_free("127.0.0.1", 70000)


def test_an_address_of_another_pc():
    with socket.socket() as listener:  # whoever has the port on an address of this PC is not to blame
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(UserError, match="192.0.2.1 is no address of this PC"):
            check_port_free("192.0.2.1", listener.getsockname()[1])


def test_no_address_at_all():
    with pytest.raises(UserError, match="no address"):
        check_port_free("no such host.", 8000)
