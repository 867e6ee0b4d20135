"""What test_devices.py runs in a process of its own: to have a device named is to have it until the process ends."""

import pytest
import torch

from tests.standin import DEVICE, StandIn
from tests.training.test_devices import trainer


@pytest.mark.parametrize("there, here", [(DEVICE, DEVICE), (DEVICE, "cpu"), ("cpu", DEVICE)])
def test_a_checkpoint_goes_on_where_the_sae_is_now(there, here):
    with StandIn():
        one, other = trainer(there), trainer(here)
        x = torch.randn(64, 16)
        one.initialise({"x": x.to(there)})
        one.step({"x": x.to(there)})
        other.load_state_dict({name: tensor.to("cpu") for name, tensor in one.state_dict().items()})  # as a file has it
        found = [float(t.step({"x": x.to(d)})["loss"]) for t, d in ((one, there), (other, here))]
        assert found[0] == found[1]
        assert torch.equal(one.sae.W_dec.to("cpu"), other.sae.W_dec.to("cpu"))


def test_the_stand_in_refuses_to_mix():
    with StandIn(), pytest.raises(RuntimeError, match="same device"):
        torch.ones(2).to(DEVICE) + torch.ones(2)
