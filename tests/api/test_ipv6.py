"""The API on IPv6's loopback address."""

import socket

import httpx
import pytest

from api.serving import serving


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_it_answers_under_its_address():
    with serving(host="::1") as served:
        assert served.api.url == f"http://[::1]:{served.port}"
        with httpx.Client(trust_env=False) as http:
            assert http.get(f"{served.api.url}/health").status_code == 200
            assert http.get(f"{served.api.url}/ready").status_code == 200
