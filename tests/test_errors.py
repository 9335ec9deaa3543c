"""The kinds of a node's errors, as they come out of the text that the network carries."""

from __future__ import annotations

import pytest

from petals_win.errors import NodeFull, NodeRefused, node_error, printable


@pytest.mark.parametrize("kind", [NodeFull, NodeRefused])
def test_a_kind_travels_in_the_text(kind):
    sent = kind("All 12 MiB are taken. [Try] (again)!")
    got = node_error(f"TransformerConnectionHandler.rpc_inference at 12D3Koo failed: {sent}")
    assert type(got) is kind and got.sentence == sent.sentence


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("rpc_inference at Qm failed: AllocationFailed()", NodeFull),
        ("A session needs 7 bytes of KV cache, but only 5 are free on this node now", NodeFull),
        ("A session needs 7 bytes of KV cache, but this node sets aside 5 in all", NodeRefused),
        ("Cannot allocate KV cache for 9000 tokens, max = 8192", NodeRefused),
        ("CUDA error: an illegal memory access was encountered", None),
        ("", None),
    ],
)
def test_what_other_versions_say(text, kind):
    assert type(node_error(text)) is (kind or type(None))


def test_a_stranger_s_sentence_is_cut_and_has_no_control_characters():
    got = node_error("[petals-win:full] \x1b[2Jfull\r\n\x00\u202eevil\u2028 " + "x" * 10_000)
    assert got is not None
    assert got.sentence.startswith("[2Jfull evil xxx") and len(got.sentence) == 300
    assert got.sentence.isprintable()
    assert printable("  a\tb\n") == "a b"
