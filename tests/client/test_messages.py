"""What a step looks like on the wire, and what is taken for an answer."""

from __future__ import annotations

import pytest
import torch
from hivemind import MSGPackSerializer, deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto import runtime_pb2
from petals.utils.packaging import pack_args_kwargs, unpack_args_kwargs

from petals_win.client.wire import BadAnswer, read_answer, step_request

NONE, HALF = runtime_pb2.CompressionType.NONE, runtime_pb2.CompressionType.FLOAT16


@pytest.mark.parametrize("compression", [NONE, HALF])
def test_a_request_is_what_petals_unpacks(compression):
    hidden, prompts, hypo_ids = torch.randn(2, 3, 8), torch.randn(4, 1, 2, 8)[1:3], torch.tensor([1, 0])
    request = step_request("a.0 a.1", hidden, prompts, hypo_ids, compression=compression, metadata={"step_id": "x"})
    request = runtime_pb2.ExpertRequest.FromString(request.SerializeToString())
    metadata = MSGPackSerializer.loads(request.metadata)
    assert (request.uid, metadata["step_id"]) == ("a.0 a.1", "x")
    flat = [deserialize_torch_tensor(tensor) for tensor in request.tensors]
    args, kwargs = unpack_args_kwargs(flat, metadata["args_structure"])
    assert not kwargs
    for arrived, sent in zip(args, (hidden, prompts, hypo_ids), strict=True):
        torch.testing.assert_close(arrived, sent, rtol=1e-2 if compression == HALF else 0, atol=1e-2)
    assert torch.equal(args[2], hypo_ids) and args[2].dtype == torch.int64
    # As petals' own client packs them.
    _, theirs = pack_args_kwargs(torch.zeros(1), torch.zeros(2), torch.zeros(3))
    assert metadata["args_structure"] == MSGPackSerializer.loads(MSGPackSerializer.dumps(theirs))


def test_nothing_stands_for_no_prompts_and_no_hypo_ids():
    request = step_request("a.0", torch.zeros(1, 1, 8), None, None, compression=NONE, metadata={})
    flat = [deserialize_torch_tensor(tensor) for tensor in request.tensors]
    assert [tensor.numel() for tensor in flat] == [8, 0, 0] and flat[2].dtype == torch.int64


def test_answers():
    shape = torch.Size((1, 2, 8))

    def answer(tensor, **changed):
        packed = serialize_torch_tensor(tensor, NONE)
        for name, value in changed.items():
            if name == "size":
                del packed.size[:]
                packed.size.extend(value)
            else:
                setattr(packed, name, value)
        return runtime_pb2.ExpertResponse(tensors=[packed])

    for least in (0, 1, 2):
        assert torch.equal(read_answer(answer(torch.ones(shape)), shape, least), torch.ones(shape))
    assert torch.equal(read_answer(answer(torch.ones(1, 1, 8)), shape, 1), torch.ones(1, 1, 8))
    for kind in (torch.float32, torch.bfloat16):
        assert read_answer(answer(torch.ones(1, 0, 8, dtype=kind)), shape, 0).shape == (1, 0, 8)
    for wrong in (
        runtime_pb2.ExpertResponse(),
        answer(torch.ones(2, 8)),
        answer(torch.ones(1, 0, 8)),
        answer(torch.ones(1, 1, 9)),
        answer(torch.ones(2, 1, 8)),
        answer(torch.ones(1, 3, 8)),
        answer(torch.ones(shape, dtype=torch.int64)),
        answer(torch.ones(1, 3, 8), size=shape),
        answer(torch.ones(shape), dtype="made up"),
        answer(torch.ones(shape), buffer=b"short"),
        answer(torch.ones(shape), compression=HALF),
    ):
        with pytest.raises(BadAnswer):
            read_answer(wrong, shape, 1)
