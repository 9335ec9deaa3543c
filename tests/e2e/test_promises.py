"""What a swarm promises: sessions survive a lost node, gradients flow through it, adapters are served."""

from __future__ import annotations

import psutil
import pytest
import torch
from conftest import connect, disconnect, node_of
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from petals_win.models.source import DEFAULT_MODEL, open_model
from petals_win.swarm.local import LocalSwarm


class AfterTokens(BaseStreamer):
    """Calls `action` once, when `count` tokens have been generated."""

    def __init__(self, count: int, action):
        self.count, self.action = count, action

    def put(self, value):
        self.count -= 1
        if self.count == -1:  # the prompt comes first
            self.action()

    def end(self):
        pass


@torch.inference_mode()
def test_a_session_survives_the_loss_of_a_node():
    prompt = open_model(DEFAULT_MODEL).tokenizer()("My favourite animal is", return_tensors="pt")["input_ids"]
    options = dict(max_new_tokens=40, min_new_tokens=40, do_sample=False)
    with LocalSwarm(DEFAULT_MODEL, ["0:15", "15:30", "15:30"]) as swarm:
        swarm.wait_until_serving()
        remote = connect(swarm, DEFAULT_MODEL)
        try:
            undisturbed = remote.generate(prompt, **options)
            with remote.inference_session(max_length=64) as session:

                def kill_the_node_in_use():
                    used, start, end = session.remote.route[-1]
                    assert (start, end) == (15, 30)
                    psutil.Process(node_of(swarm, used).child.pid).kill()
                    killed.append(used)

                killed: list[object] = []
                text = remote.generate(
                    prompt, streamer=AfterTokens(15, kill_the_node_in_use), session=session, **options
                )
                assert killed and session.remote.route[-1][0] != killed[0]
            assert torch.equal(text, undisturbed)
        finally:
            disconnect(remote)


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_prompt_tuning_lowers_the_loss(swarm, mode):
    torch.manual_seed(0)
    tokens = open_model(DEFAULT_MODEL).tokenizer()("The secret word of our house is petunia.", return_tensors="pt")
    model = connect(swarm, DEFAULT_MODEL, tuning_mode=mode, pre_seq_len=4)
    try:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(trained) == (1 if mode == "ptune" else 2)
        optimizer = torch.optim.Adam(trained, lr=0.05)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(tokens["input_ids"], labels=tokens["input_ids"]).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        # The tuned prompts take part in generation, too.
        assert model.generate(tokens["input_ids"][:, :4], max_new_tokens=2, do_sample=False).shape == (1, 6)
    finally:
        disconnect(model)


def test_gradients_are_those_of_one_process(swarm, remote):
    local = open_model(DEFAULT_MODEL).whole_model()
    torch.manual_seed(0)
    inputs = 0.1 * torch.randn(1, 6, 576)
    theirs, ours = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    local(inputs_embeds=theirs).logits.logsumexp(-1).sum().backward()
    remote(inputs_embeds=ours).logits.logsumexp(-1).sum().backward()
    assert (ours.grad - theirs.grad).abs().max() <= 1e-3 * theirs.grad.abs().max()


@torch.inference_mode()
def test_lora_adapters_are_served(checkpoint, tmp_path):
    folder = checkpoint(
        "llama", vocab_size=320, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128
    )
    adapter = tmp_path / "pirate"
    with torch.inference_mode(False):
        tuned = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder),
            LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False),
        )
    tuned.save_pretrained(adapter)
    ids = torch.tensor([[1, 5, 9, 200, 7, 31]])
    expected, plain = tuned.eval()(ids).logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert (expected - plain).abs().max() > 0.1

    with LocalSwarm(str(folder), ["0:2", "2:4"], options=["--adapters", str(adapter)]) as swarm:
        swarm.wait_until_serving()
        for active, wanted in ((str(adapter), expected), (None, plain)):
            remote = connect(swarm, str(folder), active_adapter=active)
            try:
                assert (remote(ids).logits - wanted).abs().max() <= 1e-4
                with remote.inference_session(max_length=16):
                    assert (remote(ids).logits - wanted).abs().max() <= 1e-4
            finally:
                disconnect(remote)
